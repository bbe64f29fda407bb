//! Command line and environment of the agent, parsed once.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use margay_api::rule::IpVersion;
use margay_api::storage::Mode;

/// Settings of the node agent; each is a flag and an environment variable.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Name of the node that this agent runs on.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Address of the node on the link that reaches other nodes; or one of each IP version,
    /// separated by a comma.
    #[arg(long, env = "NODE_IP")]
    pub node_ip: NodeIps,
    /// Host and port of typha.
    #[arg(long, env = "MARGAY_TYPHA")]
    pub typha: String,
    /// Directory with `ca.crt`, the certificate authorities of typha's and readers' certificates.
    #[arg(long, env = "MARGAY_CA_DIR", default_value = "/etc/margay/ca")]
    pub ca_dir: PathBuf,
    /// Directory of what survives a reboot: the saved view, attachments, the node's key and
    /// certificate.
    #[arg(long, env = "MARGAY_STATE_DIR", default_value = "/var/lib/margay")]
    pub state_dir: PathBuf,
    /// Directory of the CNI socket.
    #[arg(long, env = "MARGAY_RUN_DIR", default_value = "/var/run/margay")]
    pub run_dir: PathBuf,
    /// Directory of the network configurations that the container runtime reads, to be checked for
    /// configurations that bypass this network. Unset: no check.
    #[arg(long, env = "MARGAY_CNI_CONF_DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Our network configuration, restored in that directory when it is missing. Unset: a missing
    /// one is only reported.
    #[arg(long, env = "CNI_CONFLIST")]
    pub cni_conflist: Option<String>,
    /// Directory that the container runtime calls plugins from, where ours is restored when it is
    /// missing or another one. Unset: no check.
    #[arg(long, env = "MARGAY_CNI_BIN_DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Plugin that is restored there.
    #[arg(long, env = "MARGAY_CNI_PLUGIN", default_value = "/margay-cni")]
    pub cni_plugin: PathBuf,
    /// Address of the debug service: gRPC with mutual TLS.
    #[arg(long, env = "MARGAY_LISTEN", default_value = "0.0.0.0:5474")]
    pub listen: SocketAddr,
    /// Address of metrics and probes: plain HTTP, so loopback.
    #[arg(long, env = "MARGAY_ADMIN_LISTEN", default_value = "127.0.0.1:9099")]
    pub admin_listen: SocketAddr,
    /// Address at which Prometheus gets the metrics, over plain HTTP. Unset: as FelixConfiguration
    /// has it.
    #[arg(long, env = "MARGAY_METRICS_LISTEN")]
    pub metrics_listen: Option<SocketAddr>,
    /// How long a pod waits for its policy before ADD fails and the runtime retries.
    #[arg(
        long,
        env = "MARGAY_POLICY_SETUP_TIMEOUT_SECONDS",
        default_value_t = 30,
        value_parser = clap::value_parser!(u64).range(1..=600),
    )]
    pub policy_setup_timeout_seconds: u64,
    /// MTU of pods; 0: that of the node's link less the overhead of the encapsulation in use.
    #[arg(long, env = "MARGAY_MTU", default_value_t = 0)]
    pub mtu: u32,
    /// API group of Calico's data: `projectcalico.org/v3` or `crd.projectcalico.org/v1`. The
    /// operator sets it; an agent does not guess.
    #[arg(long, env = "CALICO_API_GROUP", default_value_t = Mode::V3)]
    pub api_group: Mode,
    /// Log filter, such as `margay_node=debug,info`.
    #[arg(long, env = "MARGAY_LOG", default_value = "info")]
    pub log: String,
}

/// The node's own addresses: one, or one of each IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeIps {
    first: IpAddr,
    /// Address of the other IP version.
    second: Option<IpAddr>,
}

impl NodeIps {
    /// The first address, which always exists.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// The address of an IP version.
    pub fn of(&self, version: IpVersion) -> Option<IpAddr> {
        [Some(self.first), self.second]
            .into_iter()
            .flatten()
            .find(|address| IpVersion::of(*address) == version)
    }
}

impl FromStr for NodeIps {
    type Err = String;

    /// Of several addresses of one IP version the first counts, as with the kubelet.
    fn from_str(text: &str) -> Result<Self, String> {
        const REMEDY: &str = "write one address, or one of each IP version: 192.0.2.1,fd00::1";
        let parts = text
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty());
        let parse = |part: &str| {
            part.parse::<IpAddr>()
                .map_err(|_| format!("{part:?} is not an IP address; {REMEDY}"))
        };
        let addresses = parts.map(parse).collect::<Result<Vec<_>, _>>()?;
        let first = *addresses
            .first()
            .ok_or_else(|| format!("no address; {REMEDY}"))?;
        let second = addresses
            .into_iter()
            .find(|address| IpVersion::of(*address) != IpVersion::of(first));
        Ok(Self { first, second })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_address_of_each_version() {
        let table = [
            ("192.0.2.1", "192.0.2.1: 192.0.2.1 -"),
            ("fd00::1,192.0.2.1, fd00::2", "fd00::1: 192.0.2.1 fd00::1"),
            ("fd00::1", "fd00::1: - fd00::1"),
        ];
        for (text, wanted) in table {
            let ips: NodeIps = text.parse().expect("addresses");
            let of = |version| {
                ips.of(version)
                    .map_or("-".to_owned(), |address| address.to_string())
            };
            assert_eq!(
                format!(
                    "{}: {} {}",
                    ips.first(),
                    of(IpVersion::V4),
                    of(IpVersion::V6)
                ),
                wanted
            );
        }
        for wrong in ["", ",", "192.0.2.1,here"] {
            let error = wrong.parse::<NodeIps>().expect_err(wrong);
            assert!(error.contains("write one address"), "{error}");
        }
    }
}
