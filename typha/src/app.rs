//! Makes the parts in the order in which they need each other, and ends them the other way round.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use margay_api::storage::mode::{self, Decision, Evidence};
use margay_proto::debug::debug_server::DebugServer;
use margay_runtime::grpc::{Admission, Trace};
use margay_runtime::ready::Readiness;
use margay_runtime::shutdown::Shutdown;
use margay_runtime::tasks::{Ended, Tasks};
use margay_runtime::tls::{Files, Tls, incoming};
use margay_runtime::{admin, telemetry};
use prometheus_client::registry::Registry as Metrics;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::ServiceBuilder;
use tracing::{info, warn};

use crate::cache::Cache;
use crate::compute::{EVENTS, Event, Owner};
use crate::config::Args;
use crate::debug::DebugService;
use crate::kinds;
use crate::metrics::Counters;
use crate::notices;
use crate::registry::Registry;
use crate::reporter::Reporter;
use crate::server::SyncService;

/// The longest that the end of the process may take; Kubernetes gives 30 seconds by default.
const END: Duration = Duration::from_secs(20);
/// Between attempts to find out where Calico's data is stored.
const DISCOVER: Duration = Duration::from_secs(2);
/// Streams of one connection: an agent needs one, a person a few.
const STREAMS: u32 = 32;
/// Calls that are being set up at once, over all connections; more are told to come again.
const CALLS: usize = 1024;
/// The longest time until a call is set up; streams live on.
const CALL: Duration = Duration::from_secs(15);

/// Nodes have a stream; whoever looks does not.
const MAY_CALL: [(&str, &[&str]); 2] = [
    ("margay:nodes", &["margay.sync.v1.Sync"]),
    (
        "margay:readers",
        &[
            "margay.debug.v1.Debug",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        ],
    ),
];

/// Runs typha until it is told to end.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let telemetry = telemetry::init("margay-typha", &args.log)?;
    info!(?args, "typha starts");
    let served = serve(args).await;
    telemetry.shutdown().await;
    served
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals(END).context("signals")?;
    let readiness = Readiness::default();
    let listening = readiness.gate("listen", "the port is not open yet");
    let in_sync = readiness.gate("sync", "nothing listed yet");

    let mut metrics = Metrics::default();
    let registry = Registry::default();
    let counters = Counters::register(&mut metrics, registry.clone());
    admin::serve(args.admin_listen, Arc::new(metrics), readiness.clone(), shutdown.clone()).await?;

    let tls = Tls::load(Files::in_dirs(&args.tls_dir, &args.ca_dir))?;
    let client = kube::Client::try_default().await.context("API server")?;

    let ask = async || {
        let groups = client.list_api_groups().await?.groups;
        Ok::<_, kube::Error>(Evidence { groups: groups.into_iter().map(|group| group.name).collect(), migration: None })
    };
    let Decision { mode, reason } = mode::discover(&args.api_group, ask, async || sleep(DISCOVER).await).await?;
    info!(storage = %mode, reason, "storage of Calico's data");

    let (events, inbox) = mpsc::channel(EVENTS);
    let cache = Cache::new(kinds::TABLE.iter().map(|line| line.kind));
    let owner = Owner::new(cache, counters.clone(), registry.clone(), in_sync);
    let mut tasks = Tasks::default();
    if !args.pod_name.is_empty() {
        let (client, registry, events) = (client.clone(), registry.clone(), events.clone());
        let (instance, namespace) = (args.pod_name, args.pod_namespace);
        tasks.spawn("events", notices::run(client.clone(), mode, instance.clone(), owner.notices.clone()));
        tasks.spawn("report", Reporter { client, namespace, instance, events, registry }.run());
    }
    tasks.spawn("owner", owner.run(inbox, shutdown.clone()));
    for line in kinds::TABLE {
        let watch = line.start(mode, client.clone(), events.clone(), counters.clone());
        tasks.spawn(&format!("watch of {}", line.kind), watch);
    }

    let listener = TcpListener::bind(args.listen).await;
    let listener =
        listener.with_context(|| format!("address {}: choose a free one with MARGAY_LISTEN", args.listen))?;
    listening.open();
    let parts =
        Parts { events, registry, counters, readiness, shutdown: shutdown.clone(), patience: Patience::default() };
    let ended = shutdown.drain("gRPC", END / 2, parts.serve(listener, tls));
    tokio::select! {
        ended = ended => match ended {
            Ok(outcome) => outcome?,
            Err(unfinished) => warn!(%unfinished),
        },
        fault = fault(&mut tasks, &shutdown) => return Err(fault.into()),
    }
    tasks.shutdown().await;
    Ok(())
}

/// The end of a task that nobody has asked to end. All that this replica knows would stay as it is then, and it would go on as if it were in sync.
async fn fault(tasks: &mut Tasks, shutdown: &Shutdown) -> Ended {
    loop {
        let ended = tasks.wait_for_end().await;
        if !shutdown.is_triggered() {
            return ended;
        }
    }
}

/// What the gRPC services need.
pub struct Parts {
    /// The owner task.
    pub events: mpsc::Sender<Event>,
    /// The sessions.
    pub registry: Registry,
    /// What is counted.
    pub counters: Counters,
    /// What health tells.
    pub readiness: Readiness,
    /// The end.
    pub shutdown: Shutdown,
    /// How long peers are waited for.
    pub patience: Patience,
}

/// How long a peer may keep typha waiting.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Until a node says hello.
    pub hello: Duration,
    /// Between HTTP/2 pings, which find peers that are gone without a word.
    pub ping: Duration,
    /// For an answer to a ping.
    pub pong: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { hello: Duration::from_secs(10), ping: Duration::from_secs(10), pong: Duration::from_secs(10) }
    }
}

impl Parts {
    /// Serves every gRPC service on `listener` until shutdown and until the last stream has ended.
    pub async fn serve(self, listener: TcpListener, tls: Tls) -> anyhow::Result<()> {
        let address: SocketAddr = listener.local_addr()?;
        info!(%address, "gRPC port open");
        let sync =
            SyncService::new(self.events.clone(), self.registry.clone(), self.counters.clone(), self.patience.hello);
        let debug = DebugServer::new(DebugService::new(self.events, self.registry));
        let reporter = HealthReporter::new();
        let health = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
        let reporting = tokio::spawn(report(reporter, self.readiness, self.shutdown.clone()));
        // From the outside in: a span for everything, then who it is, then whether there is room.
        let layers = ServiceBuilder::new()
            .layer(Trace)
            .layer(Admission::new(MAY_CALL))
            .load_shed()
            .concurrency_limit(CALLS)
            .timeout(CALL);
        let shutdown = self.shutdown.clone();
        Server::builder()
            .http2_keepalive_interval(Some(self.patience.ping))
            .http2_keepalive_timeout(Some(self.patience.pong))
            .max_concurrent_streams(STREAMS)
            .layer(layers)
            .add_service(sync)
            .add_service(debug)
            .add_service(health)
            .add_service(reflection()?.build_v1()?)
            .add_service(reflection()?.build_v1alpha()?)
            .serve_with_incoming_shutdown(incoming(listener, tls), async move {
                shutdown.wait().await;
            })
            .await?;
        reporting.abort();
        Ok(())
    }
}

fn reflection<'a>() -> anyhow::Result<tonic_reflection::server::Builder<'a>> {
    Ok(tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(margay_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET))
}

/// Health says what readiness says; the empty name is the whole server.
async fn report(reporter: HealthReporter, readiness: Readiness, shutdown: Shutdown) {
    let names = ["", "margay.sync.v1.Sync", "margay.debug.v1.Debug"];
    for name in names {
        reporter.set_service_status(name, ServingStatus::NotServing).await;
    }
    readiness.wait().await;
    for name in names {
        reporter.set_service_status(name, ServingStatus::Serving).await;
    }
    shutdown.wait().await;
    for name in names {
        reporter.set_service_status(name, ServingStatus::NotServing).await;
    }
}
