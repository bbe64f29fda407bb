//! Reconciles an Installation into every component: gather, default, validate, render, apply,
//! status.
//!
//! Read in this order: [`controller`] (the reconcile loop), [`watch`] and [`inputs`] (the state of
//! the cluster), [`defaults`], [`validate`], [`render`], [`apply`], [`status`]. Parts of it are
//! [`hosts`] (automatic host endpoints, with the addresses that [`address_claims`] accepts),
//! [`allocatable`] (pools that addresses may be assigned from), [`pool_finalizer`] (deletion of
//! pools in use) and [`fields`] (settings without effect). Before the first reconcile:
//! [`storage_mode`] (storage of Calico's data). Beside the reconcile: [`certs`] (the cluster's CA
//! and its certificates), [`csr_policy`] and [`csr_controller`] (nodes' certificates),
//! [`collector`] (IPAM garbage collection, which [`margay_ipam`] decides), [`lease`] (leader
//! election). [`install`] has the objects to install the operator itself.

pub mod address_claims;
pub mod advice;
pub mod allocatable;
pub mod apply;
pub mod certs;
pub mod client;
pub mod collector;
pub mod controller;
pub mod csr_controller;
pub mod csr_policy;
pub mod defaults;
pub mod facts;
pub mod fields;
pub mod hosts;
pub mod inputs;
pub mod install;
pub mod kubeadm;
pub mod lease;
pub mod manifest;
pub mod metrics;
pub mod names;
pub mod pool_finalizer;
pub mod render;
pub mod scale;
pub mod status;
pub mod storage_mode;
pub mod storage_v1;
pub mod validate;
pub mod watch;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use margay_api::storage::Mode;
use margay_runtime::ready::Readiness;
use margay_runtime::shutdown::Shutdown;
use margay_runtime::tasks::Tasks;
use margay_runtime::{admin, telemetry};
use prometheus_client::registry::Registry;
use tracing::info;

/// Time limit of the shutdown: one request in progress.
const END: Duration = Duration::from_secs(10);

/// Command line of the operator.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Namespace of the operator itself, where the CA's Secret and the Lease are.
    #[arg(long, env = "NAMESPACE", default_value = "margay-operator")]
    pub namespace: String,
    /// Identity in the Lease, unique among operators. Default: host name and process id.
    #[arg(long, env = "POD_NAME", default_value = "")]
    pub identity: String,
    /// Image of every component. Default: from the Installation's registry and path, and this
    /// version.
    #[arg(long, env = "MARGAY_IMAGE", default_value = "")]
    pub image: String,
    /// Storage of Calico's data: `projectcalico.org/v3`, `crd.projectcalico.org/v1`, or empty to
    /// detect it at start.
    #[arg(long, env = "CALICO_API_GROUP", default_value = "")]
    pub api_group: String,
    /// Address of the admin port (/metrics, /healthz, /readyz).
    #[arg(long, env = "MARGAY_ADMIN_LISTEN", default_value = "127.0.0.1:9097")]
    pub admin_listen: SocketAddr,
    /// The components come from a manifest and not from an Installation: no component is rendered
    /// and none is swept.
    #[arg(long, env = "MARGAY_STANDALONE")]
    pub standalone: bool,
    /// Log filter, also of every component.
    #[arg(long, env = "MARGAY_LOG", default_value = "info")]
    pub log: String,
}

/// Runs the operator until a signal ends it.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let telemetry = telemetry::init("margay-operator", &args.log)?;
    let shutdown = Shutdown::on_signals(END).context("signals cannot be received")?;
    let readiness = Readiness::default();
    let gate = readiness.gate("watches", "nothing read from the API yet");
    let mut registry = Registry::default();
    let metrics = metrics::Metrics::register(&mut registry);
    admin::serve(
        args.admin_listen,
        Arc::new(registry),
        readiness,
        shutdown.clone(),
    )
    .await?;

    let config = kube::Config::infer().await.context(
        "cannot configure the Kubernetes client: neither a kubeconfig nor a pod's service account",
    )?;
    let client = kube::Client::try_from(config).context("cannot create the Kubernetes client")?;
    let mode = storage_mode::find(&client, &args.api_group).await?;
    storage_mode::prepare(&client, mode).await?;
    let (leading, leads) = tokio::sync::watch::channel(false);
    let (authority, authorities) = tokio::sync::watch::channel(None);
    let (overlaps, overlapping) = tokio::sync::watch::channel(Vec::new());
    let (watch_blocks, wanted) = tokio::sync::watch::channel(false);
    let (ranges, blocks) = tokio::sync::watch::channel(None);
    let mut watches = Tasks::default();
    watches.spawn(
        "watch of blocks",
        pool_finalizer::watch_blocks(client.clone(), mode, wanted, ranges),
    );
    let controller = controller::Controller {
        reflectors: Arc::new(watch::Reflectors::start(
            &client,
            &args.namespace,
            mode,
            &mut watches,
        )),
        applier: apply::Applier::new(client.clone(), mode),
        settings: settings(&args, mode, std::env::vars()),
        namespace: args.namespace.clone(),
        authority,
        overlapping,
        watch_blocks,
        blocks,
        was_installed: false,
        mode,
        metrics,
        ignored: Default::default(),
        standalone: args.standalone,
    };
    let signer = csr_controller::run(client.clone(), authorities, leads.clone(), shutdown.clone());
    let collector = collector::run(
        client.clone(),
        mode,
        overlaps,
        leads.clone(),
        shutdown.clone(),
    );
    let lease = lease::hold(
        client,
        args.namespace.clone(),
        identity(&args),
        leading,
        shutdown.clone(),
    );
    info!(version = VERSION, "operator started");
    let reconciles = controller::run(controller, leads, gate, shutdown.clone());
    let all = async { tokio::join!(reconciles, signer, collector, lease) };
    let ended = tokio::select! {
        _ = all => Ok(()),
        // Without that watch it would reconcile outdated state.
        ended = watches.wait_for_end() => Err(ended.into()),
    };
    telemetry.shutdown().await;
    ended
}

/// Version of this build, which is the tag of images.
pub const VERSION: &str = concat!("v", env!("CARGO_PKG_VERSION"));

fn identity(args: &Args) -> String {
    if !args.identity.is_empty() {
        return args.identity.clone();
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}-{}", name.trim(), std::process::id())
}

/// Settings of components: they log and trace as the operator does. Credentials for a collector of
/// traces are not copied into objects that many may read.
fn settings(
    args: &Args,
    mode: Mode,
    environment: impl Iterator<Item = (String, String)>,
) -> render::Settings {
    let telemetry =
        environment.filter(|(name, _)| name.starts_with("OTEL_") && name != "OTEL_SERVICE_NAME");
    let (secrets, mut handed): (BTreeMap<_, _>, BTreeMap<_, _>) =
        telemetry.partition(|(name, _)| name.ends_with("_HEADERS"));
    handed.insert("MARGAY_LOG".to_owned(), args.log.clone());
    let secrets = secrets.into_keys().collect();
    render::Settings {
        image: args.image.clone(),
        version: VERSION.to_owned(),
        mode,
        environment: handed,
        secrets,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        Args {
            namespace: String::new(),
            identity: String::new(),
            image: String::new(),
            api_group: String::new(),
            admin_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            standalone: false,
            log: "info".to_owned(),
        }
    }

    #[test]
    fn credentials_for_a_collector_are_not_copied() {
        let given = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=SECRET"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=SECRET"),
            ("OTEL_SERVICE_NAME", "operator"),
            ("PATH", "/"),
        ];
        let given = given.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = settings(&args(), Mode::V3, given.into_iter());
        let handed: Vec<&str> = settings.environment.keys().map(String::as_str).collect();
        assert_eq!(handed, ["MARGAY_LOG", "OTEL_EXPORTER_OTLP_ENDPOINT"]);
        assert!(
            settings
                .environment
                .values()
                .all(|value| !value.contains("SECRET"))
        );
        let secrets: Vec<&str> = settings.secrets.iter().map(String::as_str).collect();
        assert_eq!(
            secrets,
            [
                "OTEL_EXPORTER_OTLP_HEADERS",
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS"
            ]
        );
    }
}
