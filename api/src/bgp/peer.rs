//! Peers and settings: `BGPPeer` and `BGPConfiguration`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::{CommunityValue, FilterAction, FilterRule, Filters};
use crate::selector::Selector;

/// Nodes that have a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePeers {
    /// Every node.
    All,
    /// The node of this name.
    Node(String),
    /// The nodes that are selected.
    Selected(Selector),
}

/// Who the peers of a `BGPPeer` are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerTarget {
    /// One at an address; port 0: the port that it listens on is the cluster's, if it is a node,
    /// else 179.
    Address(SocketAddr),
    /// The nodes that are selected.
    Nodes(Selector),
    /// The workloads of the node that are selected.
    LocalWorkloads(Selector),
}

/// How next hops are announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum BgpNextHopMode {
    /// By RFC 4271 section 5.1.3.
    #[default]
    Auto,
    /// The node's address always.
    Own,
    /// As received.
    Keep,
}

/// Key of a Secret in the namespace of the agents.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SecretKey {
    /// Name of the Secret.
    pub name: String,
    /// Name of the key.
    pub key: String,
}

/// A `BGPPeer`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BgpPeer {
    /// Nodes that have it.
    pub nodes: NodePeers,
    /// Who it is.
    pub target: PeerTarget,
    /// Its AS number; nodes of the cluster have their own.
    pub asn: Option<u32>,
    /// The node's AS number towards it.
    pub local_asn: Option<u32>,
    /// How often that number may be in its paths.
    pub allowed_local_asn: u8,
    /// Names of filters, in order.
    pub filters: Vec<String>,
    /// How next hops are announced.
    pub next_hop_mode: BgpNextHopMode,
    /// Password.
    pub password: Option<SecretKey>,
    /// Connections begin at the node's address.
    pub uses_node_address: bool,
    /// Restart time of graceful restart.
    pub restart_time: Option<Duration>,
    /// Time between keepalives.
    pub keepalive: Option<Duration>,
    /// Packets from more hops away are dropped.
    pub ttl_security: Option<u8>,
    /// Gateway to it.
    pub reachable_by: Option<IpAddr>,
    /// Nodes of a selector have the session as well, without an object of their own.
    pub is_reversed: bool,
}

/// A `BGPFilter`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BgpFilter {
    /// Rules for routes of a peer.
    pub import: Filters,
    /// Rules for routes to a peer.
    pub export: Filters,
}

impl BgpFilter {
    /// A filter that lets no route pass.
    pub fn closed() -> Self {
        let rules = || vec![FilterRule::new(FilterAction::Reject)];
        let filters = || Filters {
            ipv4: rules(),
            ipv6: rules(),
        };
        Self {
            import: filters(),
            export: filters(),
        }
    }
}

/// Name of the BGPConfiguration of all nodes.
pub const DEFAULT_NAME: &str = "default";

/// Node that a BGPConfiguration of this name is for, if it is for one.
pub fn settings_node(name: &str) -> Option<&str> {
    name.strip_prefix("node.").filter(|node| !node.is_empty())
}

/// What one `BGPConfiguration` sets; what it does not is that of `default`, or the default.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BgpSettings {
    /// Peer every node with every other one.
    pub mesh: Option<bool>,
    /// AS number of the nodes.
    pub asn: Option<u32>,
    /// Port that nodes listen on.
    pub listen_port: Option<u16>,
    /// Listen on the node's address alone.
    pub binds_node_address: Option<bool>,
    /// Interfaces whose routes are left out.
    pub ignored_interfaces: BTreeSet<String>,
    /// Ranges of cluster IPs that are announced.
    pub cluster_ips: Vec<IpNet>,
    /// Ranges of external IPs that are announced.
    pub external_ips: Vec<IpNet>,
    /// Ranges of load balancer IPs that are announced.
    pub load_balancer_ips: Vec<IpNet>,
    /// Announce load balancer ranges as a whole.
    pub aggregates_load_balancers: Option<bool>,
    /// Communities of routes within ranges.
    pub communities: NamedPrefixes,
    /// Password of the mesh.
    pub mesh_password: Option<SecretKey>,
    /// Restart time of the mesh.
    pub mesh_restart_time: Option<Duration>,
    /// Addresses that local workloads connect to, of IPv4 and IPv6.
    pub local_workload_addresses: [Option<IpAddr>; 2],
    /// Metric of routes in the kernel, of IPv4 and IPv6.
    pub priorities: [Option<u32>; 2],
}

/// Communities by the range that has them.
pub type NamedPrefixes = BTreeMap<IpNet, BTreeSet<CommunityValue>>;

impl BgpSettings {
    /// These settings, with those of `base` where they set nothing.
    pub fn over(&self, base: &Self) -> Self {
        let lists = |own: &Vec<IpNet>, base: &Vec<IpNet>| match own.is_empty() {
            true => base.clone(),
            false => own.clone(),
        };
        let either = |own: &[Option<u32>; 2], base: &[Option<u32>; 2]| {
            [own[0].or(base[0]), own[1].or(base[1])]
        };
        let (own_local, base_local) =
            (self.local_workload_addresses, base.local_workload_addresses);
        Self {
            mesh: self.mesh.or(base.mesh),
            asn: self.asn.or(base.asn),
            listen_port: self.listen_port.or(base.listen_port),
            binds_node_address: self.binds_node_address.or(base.binds_node_address),
            ignored_interfaces: match self.ignored_interfaces.is_empty() {
                true => base.ignored_interfaces.clone(),
                false => self.ignored_interfaces.clone(),
            },
            cluster_ips: lists(&self.cluster_ips, &base.cluster_ips),
            external_ips: lists(&self.external_ips, &base.external_ips),
            load_balancer_ips: lists(&self.load_balancer_ips, &base.load_balancer_ips),
            aggregates_load_balancers: self
                .aggregates_load_balancers
                .or(base.aggregates_load_balancers),
            communities: match self.communities.is_empty() {
                true => base.communities.clone(),
                false => self.communities.clone(),
            },
            mesh_password: self.mesh_password.clone().or(base.mesh_password.clone()),
            mesh_restart_time: self.mesh_restart_time.or(base.mesh_restart_time),
            local_workload_addresses: [
                own_local[0].or(base_local[0]),
                own_local[1].or(base_local[1]),
            ],
            priorities: either(&self.priorities, &base.priorities),
        }
    }
}
