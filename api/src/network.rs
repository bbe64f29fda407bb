//! Pools, blocks, nodes and network sets in parsed form: the inputs of routing and membership.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;

use crate::meta::Labels;
use crate::rule::IpVersion;

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

impl Encapsulation {
    /// The tunnel that packets of an IP version take, at least between subnets.
    pub const fn tunnel(self, version: IpVersion) -> Option<TunnelKind> {
        match self {
            Self::None => None,
            Self::Vxlan | Self::VxlanCrossSubnet => Some(TunnelKind::Vxlan(version)),
            Self::Ipip | Self::IpipCrossSubnet => Some(TunnelKind::Ipip),
        }
    }

    /// True when packets between nodes of one subnet take no tunnel.
    pub const fn is_cross_subnet(self) -> bool {
        matches!(self, Self::VxlanCrossSubnet | Self::IpipCrossSubnet)
    }
}

/// A tunnel of a node: each has a device and an address of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TunnelKind {
    /// VXLAN for packets of one IP version, between the nodes' addresses of that version.
    Vxlan(IpVersion),
    /// IP in IP, which carries IPv4 only.
    Ipip,
}

impl TunnelKind {
    /// All tunnels that a node may have.
    pub const ALL: [Self; 3] = [
        Self::Vxlan(IpVersion::V4),
        Self::Vxlan(IpVersion::V6),
        Self::Ipip,
    ];

    /// Name of the device, as in Calico. `tunl0` is also the device that the kernel creates itself.
    pub const fn device_name(self) -> &'static str {
        match self {
            Self::Vxlan(IpVersion::V4) => "vxlan.calico",
            Self::Vxlan(IpVersion::V6) => "vxlan-v6.calico",
            Self::Ipip => "tunl0",
        }
    }

    /// The tunnel of a device.
    pub fn of_device(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.device_name() == name)
    }

    /// IP version of inner and outer packets.
    pub const fn version(self) -> IpVersion {
        match self {
            Self::Vxlan(version) => version,
            Self::Ipip => IpVersion::V4,
        }
    }

    /// Bytes that it adds to a packet: the outer IP header (20 or 40) and, for VXLAN, UDP (8),
    /// VXLAN (8, RFC 7348) and the inner Ethernet header (14).
    pub const fn overhead(self) -> u32 {
        match self {
            Self::Vxlan(IpVersion::V4) => 50,
            Self::Vxlan(IpVersion::V6) => 70,
            Self::Ipip => 20,
        }
    }
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
    /// True when BGP announces its routes (`disableBGPExport` is not set).
    pub is_exported: bool,
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

/// BGP speaker of a node, as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeBgp {
    /// AS number.
    pub asn: u32,
    /// Cluster of a route reflector. Such a node is in no mesh.
    pub cluster_id: Option<Ipv4Addr>,
    /// TCP port on which it listens.
    pub listen_port: u16,
}

/// What a node's annotations say of BGP. It is not sent to nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BgpAnnotations {
    /// AS number of the node, if it is not that of its BGPConfiguration.
    pub asn: Option<u32>,
    /// Cluster of a route reflector.
    pub cluster_id: Option<Ipv4Addr>,
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
    /// Address of the IPIP device, once the node has one.
    pub ipip: Option<Ipv4Addr>,
    /// Labels, for selectors over nodes.
    pub labels: Labels,
    /// BGP speaker of the node; `None`: it has none, or it is not known which.
    pub bgp: Option<NodeBgp>,
    /// Annotations from which `bgp` follows.
    pub bgp_annotations: BgpAnnotations,
    /// Precedence over other nodes that report the same addresses.
    pub standing: Standing,
}

impl NodeInfo {
    /// Address of a tunnel device of the node.
    pub fn tunnel_address(&self, kind: TunnelKind) -> Option<IpAddr> {
        match kind {
            TunnelKind::Vxlan(IpVersion::V4) => self.vtep.map(|vtep| vtep.address.into()),
            TunnelKind::Vxlan(IpVersion::V6) => self.vtep6.map(|vtep| vtep.address.into()),
            TunnelKind::Ipip => self.ipip.map(IpAddr::V4),
        }
    }

    /// Removes a tunnel.
    pub fn remove_tunnel(&mut self, kind: TunnelKind) {
        match kind {
            TunnelKind::Vxlan(IpVersion::V4) => self.vtep = None,
            TunnelKind::Vxlan(IpVersion::V6) => self.vtep6 = None,
            TunnelKind::Ipip => self.ipip = None,
        }
    }

    /// Address of the node itself.
    pub fn own_address(&self, version: IpVersion) -> Option<IpAddr> {
        match version {
            IpVersion::V4 => self.ipv4.map(|net| net.addr().into()),
            IpVersion::V6 => self.ipv6.map(|net| net.addr().into()),
        }
    }
}

/// A NetworkSet (with its namespace) or GlobalNetworkSet (without).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSet {
    /// Labels that selectors see, with the reserved namespace label added for namespaced sets.
    pub labels: Labels,
    /// Members.
    pub nets: Vec<IpNet>,
}

/// Parses an address or range; an address is the range that holds it alone, and bits behind the
/// prefix are cleared.
pub fn parse_net(text: &str) -> Option<IpNet> {
    match text.parse::<IpNet>() {
        Ok(net) => Some(net.trunc()),
        Err(_) => text.parse::<IpAddr>().ok().map(IpNet::from),
    }
}
