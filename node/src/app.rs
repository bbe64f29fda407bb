//! Starts the agent's parts in the order of their dependencies: first what enforces policy, then
//! what receives it from typha, then what serves pods and readers.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use kube::Client;
use margay_dataplane::nftables::{self, Netfilter, Nftables};
use margay_dataplane::routes::addresses::AddressWatch;
use margay_dataplane::routes::learned::has_routes_of_ours;
use margay_dataplane::routes::worker::Network;
use margay_dataplane::{Links, probe};
use margay_netlink::route::RouteSocket;
use margay_proto::debug::capture_server::CaptureServer;
use margay_proto::debug::node_debug_server::NodeDebugServer;
use margay_runtime::backoff::jitter;
use margay_runtime::grpc::{Admission, Trace};
use margay_runtime::ready::{Gate, Readiness};
use margay_runtime::shutdown::Shutdown;
use margay_runtime::tls::{Connector, Tls, incoming};
use margay_runtime::{admin, telemetry};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::ServiceBuilder;

use crate::agent::{self, AgentHandle, Routes, watch_drift, watch_links};
use crate::bgp::metrics::BgpMetrics;
use crate::bgp::passwords::ApiSecrets;
use crate::bgp::report::BgpReport;
use crate::bgp::{self, BgpParts, InputsReceiver};
use crate::capture::CaptureService;
use crate::clean;
use crate::cni::attachment::Attachments;
use crate::cni::plugin::PluginFile;
use crate::cni::{conf, host_file};
use crate::config::Args;
use crate::debug::DebugService;
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::metrics_port;
use crate::pods;
use crate::problems::Problems;
use crate::requests;
use crate::store::ViewStore;
use crate::upstream::notices::Notices;
use crate::upstream::{SERVER_NAME, Upstream};

/// Time limit of the shutdown; enforcement stays in the kernel.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);
/// Maximal number of debug calls in progress.
const MAX_CALLS: usize = 64;
/// Time limit of a debug call, until its response begins.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// Services by client organization.
const ALLOWED_SERVICES: [(&str, &[&str]); 2] = [
    (
        "margay:readers",
        &[
            "margay.debug.v1.NodeDebug",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        ],
    ),
    ("margay:capturers", &["margay.debug.v1.Capture"]),
];

/// Runs the agent until a signal ends it. What is in the kernel stays.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let telemetry = telemetry::init("margay-node", &args.log)?;
    tracing::info!(?args, "starting node agent");
    let served = run_parts(args).await;
    telemetry.shutdown().await;
    served
}

async fn run_parts(args: Args) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals(SHUTDOWN_LIMIT).context("signals")?;
    let readiness = Readiness::default();
    let certified = readiness.gate("certificate", "no certificate yet");
    let enforcing = readiness.gate("policy", "no complete view received from typha yet");
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let bgp_metrics = BgpMetrics::new(&mut registry);
    let registry = Arc::new(registry);
    admin::serve(
        args.admin_listen,
        registry.clone(),
        readiness.clone(),
        shutdown.clone(),
    )
    .await?;

    clean::forget_removal(&args.state_dir).context("the mark of a removal")?;
    let folder = args.state_dir.join("attachments");
    let attachments = Attachments::load(&folder)
        .with_context(|| format!("attachments in {}", folder.display()))?;
    metrics
        .damaged
        .set(i64::try_from(attachments.damaged()).unwrap_or(i64::MAX));
    let problems = Problems::default();
    let client = requests::client().await.context("API server")?;
    let (bgp, bgp_seen) = watch::channel(None);
    let (agent, network, fatal) = start_agent(
        &args,
        &attachments,
        metrics,
        &problems,
        |inputs, network, had_routes| BgpParts {
            inputs,
            routes: network.learned(),
            secrets: ApiSecrets(client.clone()),
            problems: problems.clone(),
            metrics: bgp_metrics,
            report: bgp,
            had_routes,
            jitter,
        },
    )?;
    tokio::spawn(follow_status(agent.clone(), enforcing));
    tokio::spawn(metrics_port::run(
        args.metrics_listen,
        registry,
        agent.clone(),
        problems.clone(),
    ));

    watch_host_files(&args, &problems);
    let notices = Notices::default();
    let connected = run_connected(
        &args,
        &agent,
        (&network, bgp_seen),
        (&notices, &problems),
        &readiness,
        certified,
        &shutdown,
    );
    let pods = serve_pods(
        &args,
        client,
        agent.clone(),
        attachments,
        notices.clone(),
        problems.clone(),
    );
    tokio::select! {
        () = shutdown.wait() => Ok(()),
        reason = fatal => Err(
            reason.map_or_else(|_| anyhow::anyhow!("the agent's thread has ended"), Into::into),
        ),
        ended = connected => ended,
        ended = pods => ended,
    }
}

/// Keeps what the container runtime needs to call our plugin.
fn watch_host_files(args: &Args, problems: &Problems) {
    if let Some(folder) = args.cni_conf_dir.clone() {
        let (problems, own) = (problems.clone(), args.cni_conflist.clone());
        let check = move || conf::check_folder(&folder, own.as_deref());
        tokio::spawn(host_file::watch(check, move |wrong| {
            problems.report("network-configuration", true, wrong)
        }));
    }
    if let Some(folder) = args.cni_bin_dir.clone() {
        let (problems, plugin) = (
            problems.clone(),
            PluginFile::new(args.cni_plugin.clone(), folder),
        );
        let check = move || plugin.check(SystemTime::now());
        tokio::spawn(host_file::watch(check, move |wrong| {
            problems.report("plugin", true, wrong)
        }));
    }
}

/// Starts the dataplane, the agent and BGP.
fn start_agent(
    args: &Args,
    attachments: &Attachments,
    metrics: Metrics,
    problems: &Problems,
    bgp: impl FnOnce(InputsReceiver, &Network, bool) -> BgpParts<ApiSecrets>,
) -> anyhow::Result<(
    AgentHandle,
    Network,
    tokio::sync::oneshot::Receiver<agent::RetriesExhausted>,
)> {
    let missing = probe::require_features(probe::probe().context("features of the kernel")?)?;
    problems.report(
        "kernel",
        false,
        probe::describe_missing(&missing).as_deref(),
    );
    let store = ViewStore::new(&args.state_dir);
    let mut kernel =
        Netfilter::open().context("nftables; does the agent have the capability NET_ADMIN?")?;
    let table = kernel.watch().context("changes of nftables")?;
    let had_routes = RouteSocket::open().and_then(|mut socket| has_routes_of_ours(&mut socket));
    let had_routes = had_routes.context("routes")?;
    let network = Network::spawn().context("rtnetlink")?;
    let (bgp_inputs, inputs_seen) = watch::channel(None);
    tokio::spawn(bgp::run(bgp(inputs_seen, &network, had_routes)));
    let mut addresses = AddressWatch::open().context("addresses of the node")?;
    let links = addresses.read().context("addresses of the node")?;
    let parts = agent::AgentParts {
        node: args.node_name.clone(),
        view: store.load(),
        attached: pods::load_attached(attachments)?,
        links: links.clone(),
        dataplane: Box::new(Nftables::new(&args.node_name, Box::new(kernel))),
        routes: Some(Box::new(network.clone()) as Box<dyn Routes>),
        bgp: bgp_inputs,
        store: Some(store),
        metrics,
    };
    let (agent, fatal) = agent::spawn(parts).context("thread of the agent")?;
    watch_drift(table, agent.clone()).context("thread of the monitor")?;
    let problems = problems.clone();
    let look = move |links: &Links| problems.report("ipvs", false, nftables::ipvs_advice(links));
    watch_links(addresses, links, agent.clone(), look).context("thread of the addresses")?;
    Ok((agent, network, fatal))
}

/// Opens the gate while the node is ready.
async fn follow_status(agent: AgentHandle, gate: Gate) {
    let mut status = agent.watch();
    loop {
        let reason = status.borrow_and_update().not_ready_reason();
        match reason {
            Some(reason) => gate.close(reason),
            None => gate.open(),
        }
        if status.changed().await.is_err() {
            return gate.close("the agent is ending");
        }
    }
}

/// Runs everything that needs the node's certificate.
async fn run_connected(
    args: &Args,
    agent: &AgentHandle,
    (network, bgp): (&Network, watch::Receiver<Option<BgpReport>>),
    (notices, problems): (&Notices, &Problems),
    readiness: &Readiness,
    certified: Gate,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    let identity = Identity::new(&args.node_name, &args.state_dir, &args.ca_dir);
    let tls = identity.obtain(&certified).await;
    certified.open();
    let upstream = Upstream {
        connector: Connector::new(tls.clone(), &args.typha, SERVER_NAME)?,
        server: args.typha.clone(),
        agent: agent.clone(),
        notices: notices.clone(),
        problems: problems.clone(),
        jitter,
    };
    let debug = DebugService {
        node: args.node_name.clone(),
        agent: agent.clone(),
        routing: network.watch(),
        readiness: readiness.clone(),
        problems: problems.clone(),
        bgp,
        learned: network.learned().watch(),
    };
    let listener = TcpListener::bind(args.listen).await;
    let listener = listener.with_context(|| {
        format!(
            "cannot listen on {}: choose a free address with MARGAY_LISTEN",
            args.listen
        )
    })?;
    tokio::select! {
        () = upstream.run(shutdown.clone()) => Ok(()),
        served = serve_debug(
            debug,
            readiness.clone(),
            listener,
            tls.clone(),
            shutdown.clone(),
        ) => served,
        () = identity.renew(&tls) => Ok(()),
    }
}

async fn serve_debug(
    debug: DebugService,
    readiness: Readiness,
    listener: TcpListener,
    tls: Tls,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(margay_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let reporter = HealthReporter::new();
    let health = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
    let reporting = async {
        reporter
            .set_service_status("", ServingStatus::NotServing)
            .await;
        readiness.wait().await;
        reporter
            .set_service_status("", ServingStatus::Serving)
            .await;
        std::future::pending::<()>().await;
    };
    let layers = ServiceBuilder::new()
        .layer(Trace)
        .layer(Admission::new(ALLOWED_SERVICES))
        .load_shed()
        .concurrency_limit(MAX_CALLS)
        .timeout(CALL_TIMEOUT);
    let served = Server::builder()
        .layer(layers)
        .add_service(CaptureServer::new(CaptureService::new(debug.agent.clone())))
        .add_service(NodeDebugServer::new(debug))
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .serve_with_incoming_shutdown(
            incoming(listener, tls),
            async move { shutdown.wait().await },
        );
    tokio::select! {
        served = served => Ok(served?),
        () = reporting => Ok(()),
    }
}

/// Serves the CNI socket.
async fn serve_pods(
    args: &Args,
    client: Client,
    agent: AgentHandle,
    attachments: Attachments,
    notices: Notices,
    problems: Problems,
) -> anyhow::Result<()> {
    let settings = pods::Settings {
        node: args.node_name.clone(),
        addresses: args.node_ip,
        run_dir: args.run_dir.clone(),
        policy_timeout: Duration::from_secs(args.policy_setup_timeout_seconds),
        mtu: args.mtu,
        problems,
    };
    let storage = pods::Storage {
        client,
        mode: args.api_group,
    };
    pods::serve(settings, storage, agent, attachments, notices).await
}
