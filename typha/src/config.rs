//! Settings of typha, parsed once.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Routing between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum NetworkingBackend {
    /// BGP, whichever encapsulation pools have.
    Bird,
    /// Routes of this network alone.
    Vxlan,
    /// As `vxlan`.
    None,
}

/// Settings of typha; each is a flag and an environment variable with the same meaning.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Name of the node that this replica runs on; only for logs.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Name of this replica's pod, under which it reports problems; empty: problems are only logged
    /// and returned by the debug service.
    #[arg(long, env = "POD_NAME", default_value = "")]
    pub pod_name: String,
    /// Namespace of this replica's pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = "margay-system")]
    pub pod_namespace: String,
    /// Address for nodes: gRPC with mutual TLS.
    #[arg(long, env = "MARGAY_LISTEN", default_value = "0.0.0.0:5473")]
    pub listen: SocketAddr,
    /// Address of metrics and probes: plain HTTP, so loopback.
    #[arg(long, env = "MARGAY_ADMIN_LISTEN", default_value = "127.0.0.1:9098")]
    pub admin_listen: SocketAddr,
    /// Address at which Prometheus gets the metrics, over plain HTTP. Unset: only at the address
    /// above.
    #[arg(long, env = "MARGAY_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// Directory with this replica's `tls.crt` and `tls.key`.
    #[arg(long, env = "MARGAY_TLS_DIR", default_value = "/etc/margay/tls")]
    pub tls_dir: PathBuf,
    /// Directory with `ca.crt`, the authorities whose certificates are accepted.
    #[arg(long, env = "MARGAY_CA_DIR", default_value = "/etc/margay/ca")]
    pub ca_dir: PathBuf,
    /// Storage of Calico's data: `projectcalico.org/v3`, `crd.projectcalico.org/v1`, or empty to
    /// detect it at start.
    #[arg(long, env = "CALICO_API_GROUP", default_value = "")]
    pub api_group: String,
    /// Routing between nodes, in Calico's words: `bird` gives every node a BGP speaker.
    #[arg(long, env = "CALICO_NETWORKING_BACKEND", default_value = "none")]
    pub networking_backend: NetworkingBackend,
    /// Log filter, such as `margay_typha=debug,info`.
    #[arg(long, env = "MARGAY_LOG", default_value = "info")]
    pub log: String,
}
