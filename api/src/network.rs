//! Pools, blocks, nodes and network sets in parsed form: the inputs of routing and membership.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;

use crate::meta::Labels;
use crate::rule::Protocol;
use crate::settings::LogRate;

/// Encapsulation of packets between nodes to and from addresses of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Encapsulation {
    /// No encapsulation: plain routes through the nodes' addresses.
    #[default]
    None,
    /// VXLAN between all nodes.
    Vxlan,
    /// VXLAN between nodes of different subnets, plain routes within one.
    VxlanCrossSubnet,
    /// IP in IP between all nodes.
    Ipip,
    /// IP in IP between nodes of different subnets, plain routes within one.
    IpipCrossSubnet,
}

/// An IP pool, as far as routes and NAT depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Range of the pool.
    pub cidr: IpNet,
    /// Encapsulation of its packets.
    pub encapsulation: Encapsulation,
    /// True when packets from the pool to an address outside of all pools are masqueraded.
    pub nat_outgoing: bool,
    /// Prefix length of the blocks that it is divided into.
    pub block_size: u8,
    /// Creation time of the object, in seconds since 1970; 0: not known.
    pub created: i64,
}

impl Pool {
    /// Default prefix length of blocks, from Calico.
    pub fn default_block_size(cidr: IpNet) -> u8 {
        if cidr.addr().is_ipv4() { 26 } else { 122 }
    }
}

/// An IPAM block, as far as routes depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockInfo {
    /// Node that the block is affine to; none for blocks without a host.
    pub node: Option<String>,
    /// Addresses of the block used by other nodes (borrowed), with the node that uses each.
    pub borrowed: Vec<(IpAddr, String)>,
    /// Addresses of the block that are tunnel endpoints, with the node whose tunnel's handle they
    /// are under.
    pub tunnels: Vec<(IpAddr, String)>,
    /// Creation time of the object, in seconds since 1970; 0: not known.
    pub created: i64,
}

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text that is not a MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address; write it like 66:0a:1b:2c:3d:4e")]
pub struct MacError(String);

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let parse = || {
            let mut bytes = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut bytes {
                let part = parts.next().filter(|part| part.len() == 2)?;
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            parts.next().is_none().then_some(Self(bytes))
        };
        parse().ok_or_else(|| MacError(text.to_owned()))
    }
}

/// VXLAN tunnel endpoint (VTEP) of a node for one IP version: each has a device of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vtep<A> {
    /// Address of the VXLAN device.
    pub address: A,
    /// MAC address of the VXLAN device.
    pub mac: Mac,
}

/// Tie-breaker between nodes that report the same address. It is not sent to nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Kubelet reports the IPv4 address as the node's own, too.
    pub ipv4_reported: bool,
    /// Kubelet reports the IPv6 address as the node's own, too.
    pub ipv6_reported: bool,
    /// Creation time of the object, in seconds since 1970; 0: not known.
    pub created: i64,
}

/// Addresses and tunnel of a node, as other nodes need them.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NodeInfo {
    /// IPv4 address with the prefix length of its subnet.
    pub ipv4: Option<ipnet::Ipv4Net>,
    /// IPv6 address with the prefix length of its subnet.
    pub ipv6: Option<ipnet::Ipv6Net>,
    /// VXLAN tunnel endpoint for IPv4, once the node has one.
    pub vtep: Option<Vtep<Ipv4Addr>>,
    /// VXLAN tunnel endpoint for IPv6, once the node has one.
    pub vtep6: Option<Vtep<Ipv6Addr>>,
    /// Labels, for selectors over nodes.
    pub labels: Labels,
    /// Precedence over other nodes that report the same addresses.
    pub standing: Standing,
}

/// A NetworkSet (with its namespace) or GlobalNetworkSet (without).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSet {
    /// Labels that selectors see, with the reserved namespace label added for namespaced sets.
    pub labels: Labels,
    /// Members.
    pub nets: Vec<IpNet>,
}

/// Action on packets from a workload to its own node that its egress policy has allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum EndpointToHostAction {
    /// Drop: Felix's own default.
    Drop,
    /// Accept: the value that Calico's operator and manifests set.
    #[default]
    Accept,
    /// Continue with the host's own rules.
    Return,
}

/// Failsafe port: traffic of a host that no policy can block, so that a mistake in one locks nobody
/// out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Failsafe {
    /// Protocol of the packet, which must have ports.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
    /// Range of the other end of the connection; none: any.
    pub net: Option<IpNet>,
}

impl Failsafe {
    /// Default inbound failsafes (Calico's FelixConfiguration): SSH, DHCP, BGP, etcd, typha and the
    /// API server.
    pub fn default_inbound() -> Vec<Self> {
        let tcp = [22, 179, 2379, 2380, 5473, 6443, 6666, 6667];
        Self::anywhere(&tcp, &[68])
    }

    /// Default outbound failsafes (Calico's FelixConfiguration): DNS, DHCP, BGP, etcd, typha and
    /// the API server.
    pub fn default_outbound() -> Vec<Self> {
        let tcp = [179, 2379, 2380, 5473, 6443, 6666, 6667];
        Self::anywhere(&tcp, &[53, 67])
    }

    /// Returns them in order, as lists of failsafes are.
    fn anywhere(tcp: &[u16], udp: &[u16]) -> Vec<Self> {
        let of = |protocol, ports: &[u16]| -> Vec<Self> {
            ports.iter().map(|port| Self { protocol, port: *port, net: None }).collect()
        };
        [of(Protocol::TCP, tcp), of(Protocol::UDP, udp)].concat()
    }
}

/// Settings of FelixConfiguration that Margay reads, with defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FelixSettings {
    /// `defaultEndpointToHostAction`.
    pub endpoint_to_host: EndpointToHostAction,
    /// `vxlanVNI`.
    pub vxlan_vni: u32,
    /// `vxlanPort`.
    pub vxlan_port: u16,
    /// `vxlanMTU`; 0: detected.
    pub vxlan_mtu: u32,
    /// `vxlanMTUV6`; 0: detected.
    pub vxlan_mtu_v6: u32,
    /// `ChecksumOffloadBroken=true` in `featureDetectOverride`: VXLAN devices leave no checksums to
    /// hardware.
    pub checksum_offload_broken: bool,
    /// `natOutgoingExclusions: IPPoolsAndHostIPs`: packets to nodes' own addresses are not
    /// masqueraded either.
    pub nat_exclude_hosts: bool,
    /// `disableConntrackInvalidCheck`.
    pub allow_conntrack_invalid: bool,
    /// `logPrefix`: template of the prefix of log lines of rules with action Log; see
    /// [`crate::settings::log_prefix`].
    pub log_prefix: String,
    /// `logActionRateLimit`: limit of the log lines of a rule with action Log; none: no limit.
    pub log_rate: Option<LogRate>,
    /// `logActionRateLimitBurst`: burst of log lines that the rate limit allows, at least 1.
    pub log_burst: u16,
    /// `ipv6Support`.
    pub ipv6: bool,
    /// `failsafeInboundHostPorts`, in order, each once.
    pub failsafe_inbound: Vec<Failsafe>,
    /// `failsafeOutboundHostPorts`, in order, each once.
    pub failsafe_outbound: Vec<Failsafe>,
}

impl Default for FelixSettings {
    fn default() -> Self {
        Self {
            endpoint_to_host: EndpointToHostAction::default(),
            vxlan_vni: 4096,
            vxlan_port: 4789,
            vxlan_mtu: 0,
            vxlan_mtu_v6: 0,
            checksum_offload_broken: false,
            nat_exclude_hosts: false,
            allow_conntrack_invalid: false,
            log_prefix: "calico-packet".to_owned(),
            log_rate: None,
            log_burst: LogRate::BURST,
            ipv6: true,
            failsafe_inbound: Failsafe::default_inbound(),
            failsafe_outbound: Failsafe::default_outbound(),
        }
    }
}

/// Parses an address or range; an address is the range that holds it alone, and bits behind the
/// prefix are cleared.
pub fn parse_net(text: &str) -> Option<IpNet> {
    match text.parse::<IpNet>() {
        Ok(net) => Some(net.trunc()),
        Err(_) => text.parse::<IpAddr>().ok().map(IpNet::from),
    }
}
