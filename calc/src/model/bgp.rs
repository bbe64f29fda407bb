//! BGP as a node's speaker carries it out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use margay_api::bgp::{BgpNextHopMode, CommunityValue, Filters, SecretKey};

/// What the BGP speaker of a node is and announces. A node without this record has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BgpRecord {
    /// AS number of the node.
    pub asn: u32,
    /// BGP identifier: the node's IPv4 address, or a number from its name.
    pub router_id: Ipv4Addr,
    /// Cluster of a route reflector (annotation `RouteReflectorClusterID`).
    pub cluster_id: Option<Ipv4Addr>,
    /// TCP port on which it listens.
    pub listen_port: u16,
    /// Listens on the node's own addresses only (`bindMode: NodeIP`).
    pub binds_node_address: bool,
    /// Interfaces whose routes are ignored.
    pub ignored_interfaces: BTreeSet<String>,
    /// Metric of learnt routes in the kernel, of IPv4 and IPv6, where no filter sets another.
    pub priorities: [u32; 2],
    /// The node peers with the others; see [`crate::bgp::mesh_peers`].
    pub mesh: Option<BgpMesh>,
    /// Blocks of the node; true if other nodes accept them, so that they may be announced.
    pub blocks: BTreeMap<IpNet, bool>,
    /// Pools; true if their routes are exported (no `disableBGPExport`).
    pub pools: BTreeMap<IpNet, bool>,
    /// Ranges and addresses of Services that the node announces.
    pub services: BTreeSet<IpNet>,
    /// Ranges of Services, whether announced or not: learnt routes within are not for the kernel.
    pub service_ranges: BTreeSet<IpNet>,
    /// Communities of announced routes, by the range that contains them.
    pub communities: BTreeMap<IpNet, BTreeSet<CommunityValue>>,
    /// Peers of BGPPeers, at most one per address.
    pub peers: Vec<BgpPeerRecord>,
}

/// Sessions of the mesh of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BgpMesh {
    /// TCP MD5 password.
    pub password: Option<SecretKey>,
    /// Restart time of graceful restart.
    pub restart_time: Option<Duration>,
}

/// A peer of a node. Fields are those of [`margay_api::bgp::BgpPeer`], resolved for the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BgpPeerRecord {
    /// Name of the BGPPeer; of a peer in the mesh, of its node.
    pub name: String,
    /// Address and port of the peer.
    pub address: SocketAddr,
    /// AS number of the peer.
    pub asn: u32,
    /// The node's AS number towards it, if it is not the record's.
    pub local_asn: Option<u32>,
    /// How often the node's AS number may be in its paths.
    pub allowed_local_asn: u8,
    /// Rules for its routes: those of all its filters, in order.
    pub import: Filters,
    /// Rules for routes to it.
    pub export: Filters,
    /// How next hops are announced.
    pub next_hop_mode: BgpNextHopMode,
    /// TCP MD5 password.
    pub password: Option<SecretKey>,
    /// Address from which to connect; `None`: as the kernel chooses.
    pub source: Option<IpAddr>,
    /// Restart time of graceful restart.
    pub restart_time: Option<Duration>,
    /// Time between keepalives.
    pub keepalive: Option<Duration>,
    /// Maximal number of hops to the peer (RFC 5082).
    pub ttl_security: Option<u8>,
    /// Gateway to the peer.
    pub reachable_by: Option<IpAddr>,
    /// The node reflects routes to and from it (RFC 4456).
    pub is_reflector_client: bool,
}

impl BgpPeerRecord {
    /// A peer with the defaults.
    pub fn new(name: impl Into<String>, address: SocketAddr, asn: u32) -> Self {
        Self {
            name: name.into(),
            address,
            asn,
            local_asn: None,
            allowed_local_asn: 0,
            import: Filters::default(),
            export: Filters::default(),
            next_hop_mode: BgpNextHopMode::Auto,
            password: None,
            source: None,
            restart_time: None,
            keepalive: None,
            ttl_security: None,
            reachable_by: None,
            is_reflector_client: false,
        }
    }
}
