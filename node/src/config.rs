//! What a person can set, parsed once.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// Settings of the node agent; each is a flag and an environment variable of the same meaning.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Name of the node that this agent runs on.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Address of the node, on the link that other nodes are reached by.
    #[arg(long, env = "NODE_IP")]
    pub node_ip: Ipv4Addr,
    /// Host and port of typha.
    #[arg(long, env = "MARGAY_TYPHA")]
    pub typha: String,
    /// Folder with `ca.crt`, the authorities that typha's certificate and readers' are of.
    #[arg(long, env = "MARGAY_CA_DIR", default_value = "/etc/margay/ca")]
    pub ca_dir: PathBuf,
    /// Folder of what survives a reboot: the last view, attachments, the node's key and certificate.
    #[arg(long, env = "MARGAY_STATE_DIR", default_value = "/var/lib/margay")]
    pub state_dir: PathBuf,
    /// Folder of the CNI socket.
    #[arg(long, env = "MARGAY_RUN_DIR", default_value = "/var/run/margay")]
    pub run_dir: PathBuf,
    /// Where readers look: gRPC with mutual TLS.
    #[arg(long, env = "MARGAY_LISTEN", default_value = "0.0.0.0:5474")]
    pub listen: SocketAddr,
    /// Where metrics and probes are served: plain HTTP, so loopback.
    #[arg(long, env = "MARGAY_ADMIN_LISTEN", default_value = "127.0.0.1:9099")]
    pub admin_listen: SocketAddr,
    /// How long a pod waits for its policy before its start fails and is tried again.
    #[arg(long, env = "MARGAY_POLICY_SETUP_TIMEOUT_SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub policy_setup_timeout_seconds: u64,
    /// MTU of pods; 0 means that of the node's link less the overhead of the encapsulation in use.
    #[arg(long, env = "MARGAY_MTU", default_value_t = 0)]
    pub mtu: u32,
    /// Log filter, such as `margay_node=debug,info`.
    #[arg(long, env = "MARGAY_LOG", default_value = "info")]
    pub log: String,
}
