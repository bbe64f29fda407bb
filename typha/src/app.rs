//! Starts the parts in order of dependency, and stops them in reverse.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use margay_api::storage::mode::{self, Decision, Evidence};
use margay_proto::debug::debug_server::DebugServer;
use margay_runtime::backoff::jitter;
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
use crate::compute::{EVENT_QUEUE, GraphOwner};
use crate::config::{Args, NetworkingBackend};
use crate::debug::DebugService;
use crate::event::Event;
use crate::kinds;
use crate::metrics::Counters;
use crate::object_events;
use crate::placement::Placement;
use crate::registry::Registry;
use crate::replicas;
use crate::reporter::Reporter;
use crate::server::SyncService;

/// Maximal duration of shutdown; Kubernetes allows 30 seconds by default.
const SHUTDOWN: Duration = Duration::from_secs(20);
/// Time without a sign of life from which on the owner task counts as hung, as in Calico.
const HUNG: Duration = Duration::from_secs(20);
/// Time between attempts to detect where Calico's data is stored.
const DETECT_INTERVAL: Duration = Duration::from_secs(2);
/// Streams per connection: an agent needs one, a person a few.
const MAX_STREAMS: u32 = 32;
/// Calls that are being set up at the same time, over all connections; further ones are refused as
/// retryable.
const MAX_CALLS: usize = 1024;
/// Maximal time to set up a call; streams live on.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Services by group (O of the client certificate): agents may open a stream, readers may ask.
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

/// Runs typha until a termination signal.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let telemetry = telemetry::init("margay-typha", &args.log)?;
    info!(?args, "typha starting");
    let served = serve(args).await;
    telemetry.shutdown().await;
    served
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals(SHUTDOWN).context("signals")?;
    let readiness = Readiness::default();
    let listening = readiness.gate("listen", "the port is not open yet");
    let in_sync = readiness.gate("sync", "nothing listed yet");

    let mut metrics = Metrics::default();
    let registry = Registry::default();
    let counters = Counters::register(&mut metrics, registry.clone());
    let metrics = Arc::new(metrics);
    let _metrics_port = match args.metrics_listen {
        Some(address) => {
            Some(admin::serve_metrics(address, metrics.clone(), "MARGAY_METRICS_LISTEN").await?)
        }
        None => None,
    };
    admin::serve(
        args.admin_listen,
        metrics,
        readiness.clone(),
        shutdown.clone(),
    )
    .await?;

    let tls = Tls::load(Files::in_dirs(&args.tls_dir, &args.ca_dir))?;
    let client = kube::Client::try_default().await.context("API server")?;

    let ask = async || {
        let groups = client.list_api_groups().await?.groups;
        Ok::<_, kube::Error>(Evidence {
            groups: groups.into_iter().map(|group| group.name).collect(),
            migration: None,
        })
    };
    let Decision { mode, reason } =
        mode::discover(&args.api_group, ask, async || sleep(DETECT_INTERVAL).await).await?;
    info!(storage = %mode, reason, "storage of Calico's data");

    let (events, inbox) = mpsc::channel(EVENT_QUEUE);
    let bgp = args.networking_backend == NetworkingBackend::Bird;
    let cache = Cache::new(kinds::watched(bgp).map(|kind| kind.name));
    let mut owner =
        GraphOwner::new(cache, counters.clone(), registry.clone(), in_sync).with_bgp(bgp);
    owner.hub.placement = Placement::new(&args.pod_name);
    owner.pulse = Some(readiness.liveness().part("owner", HUNG));
    let mut tasks = Tasks::default();
    if !args.pod_name.is_empty() {
        let (client, registry, events) = (client.clone(), registry.clone(), events.clone());
        let (instance, namespace) = (args.pod_name, args.pod_namespace);
        let watching = replicas::run(client.clone(), namespace.clone(), events.clone());
        tasks.spawn("watch of replicas", watching);
        tasks.spawn(
            "events",
            object_events::run(
                client.clone(),
                mode,
                instance.clone(),
                owner.warnings.clone(),
            ),
        );
        tasks.spawn(
            "report",
            Reporter {
                client,
                namespace,
                instance,
                events,
                registry,
            }
            .run(),
        );
    }
    tasks.spawn("owner", owner.run(inbox, shutdown.clone()));
    for kind in kinds::watched(bgp) {
        let watch = kind.start(
            mode,
            client.clone(),
            events.clone(),
            counters.clone(),
            jitter,
        );
        tasks.spawn(&format!("watch of {}", kind.name), watch);
    }

    let listener = TcpListener::bind(args.listen).await;
    let listener = listener.with_context(|| {
        format!(
            "address {}: choose a free one with MARGAY_LISTEN",
            args.listen
        )
    })?;
    listening.open();
    let services = GrpcServices {
        events,
        registry,
        counters,
        readiness,
        shutdown: shutdown.clone(),
        timeouts: Timeouts::default(),
    };
    let ended = shutdown.drain("gRPC", SHUTDOWN / 2, services.serve(listener, tls));
    tokio::select! {
        ended = ended => match ended {
            Ok(outcome) => outcome?,
            Err(unfinished) => warn!(%unfinished),
        },
        ended = unexpected_end(&mut tasks, &shutdown) => return Err(ended.into()),
    }
    tasks.shutdown().await;
    Ok(())
}

/// Waits for a task that ends without shutdown. Without it this replica's state would become stale
/// while it still seems in sync, so the process must end.
async fn unexpected_end(tasks: &mut Tasks, shutdown: &Shutdown) -> Ended {
    loop {
        let ended = tasks.wait_for_end().await;
        if !shutdown.is_triggered() {
            return ended;
        }
    }
}

/// Dependencies of the gRPC services.
pub struct GrpcServices {
    /// The owner task.
    pub events: mpsc::Sender<Event>,
    /// The sessions.
    pub registry: Registry,
    /// Metrics.
    pub counters: Counters,
    /// Source of the health service.
    pub readiness: Readiness,
    /// Shutdown signal.
    pub shutdown: Shutdown,
    /// Timeouts for peers.
    pub timeouts: Timeouts,
}

/// Timeouts for peers of typha.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From the start of a stream to its hello.
    pub hello: Duration,
    /// Between HTTP/2 pings, which detect peers that disappeared.
    pub ping: Duration,
    /// From a ping to its response.
    pub pong: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(10),
            ping: Duration::from_secs(10),
            pong: Duration::from_secs(10),
        }
    }
}

impl GrpcServices {
    /// Serves every gRPC service on `listener` until shutdown and until the last stream has ended.
    pub async fn serve(self, listener: TcpListener, tls: Tls) -> anyhow::Result<()> {
        let address: SocketAddr = listener.local_addr()?;
        info!(%address, "gRPC port open");
        let sync = SyncService::new(
            self.events.clone(),
            self.registry.clone(),
            self.counters.clone(),
            self.timeouts.hello,
        );
        let debug = DebugServer::new(DebugService::new(self.events, self.registry));
        let reporter = HealthReporter::new();
        let health = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
        let reporting = tokio::spawn(mirror_readiness(
            reporter,
            self.readiness,
            self.shutdown.clone(),
        ));
        // From the outside in: tracing, then authorisation, then load limits.
        let layers = ServiceBuilder::new()
            .layer(Trace)
            .layer(Admission::new(MAY_CALL))
            .load_shed()
            .concurrency_limit(MAX_CALLS)
            .timeout(CALL_TIMEOUT);
        let shutdown = self.shutdown.clone();
        Server::builder()
            .http2_keepalive_interval(Some(self.timeouts.ping))
            .http2_keepalive_timeout(Some(self.timeouts.pong))
            .max_concurrent_streams(MAX_STREAMS)
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

/// Mirrors readiness in the health service until shutdown; the empty name is the whole server.
async fn mirror_readiness(reporter: HealthReporter, readiness: Readiness, shutdown: Shutdown) {
    let names = ["", "margay.sync.v1.Sync", "margay.debug.v1.Debug"];
    let report = async |status| {
        for name in names {
            reporter.set_service_status(name, status).await;
        }
    };
    let mut is_ready = false;
    loop {
        report(match is_ready {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        })
        .await;
        tokio::select! {
            () = shutdown.wait() => break,
            () = readiness.wait_for(!is_ready) => is_ready = !is_ready,
        }
    }
    report(ServingStatus::NotServing).await;
}
