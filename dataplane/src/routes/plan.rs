//! Computes the wanted routes, tunnel devices, neighbours and forwarding entries from the node's
//! records and its own pods. Pure.
//!
//! Only objects with our route protocol or on our tunnel devices are ever wanted or removed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use margay_api::network::{Encapsulation, Mac, NodeInfo, TunnelKind};
use margay_api::rule::IpVersion;
use margay_calc::model::{Record, RecordId, globals};

use super::tunnel::{self, TunnelDevice};

/// IPv6 gateway of every pod: the link-local address derived from [`HOST_MAC`] (EUI-64, RFC 4291).
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0xecee, 0xeeff, 0xfeee, 0xeeee);
/// MAC address of the host side of every pod's link, as in Calico's CNI plugin.
pub const HOST_MAC: Mac = Mac([0xee; 6]);
/// Protocol number that marks our routes; Calico's is 80.
pub const ROUTE_PROTOCOL: u8 = 82;
/// Target of a route.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// A pod of this node, by its host-side interface.
    Pod {
        /// Host-side interface.
        interface: String,
    },
    /// Discards packets to addresses of this node's blocks that no pod has.
    Blackhole,
    /// The address of another node.
    Gateway {
        /// Address of the other node, in a subnet of this one.
        via: IpAddr,
    },
    /// The VXLAN device of the destination's IP version.
    Vxlan {
        /// Tunnel address of the other node.
        via: IpAddr,
    },
    /// The IPIP device.
    Ipip {
        /// Address of the other node.
        via: IpAddr,
    },
}

impl Target {
    /// The tunnel of a route to this destination, if it takes one.
    pub fn tunnel(&self, destination: &IpNet) -> Option<TunnelKind> {
        match self {
            Self::Vxlan { .. } => Some(TunnelKind::Vxlan(IpVersion::of(destination.addr()))),
            Self::Ipip { .. } => Some(TunnelKind::Ipip),
            Self::Pod { .. } | Self::Blackhole | Self::Gateway { .. } => None,
        }
    }
}

/// Another node behind a VXLAN tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// MAC address of its tunnel device.
    pub mac: Mac,
    /// Address of the node, the outer destination.
    pub underlay: IpAddr,
}

/// Complete routing of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Routes by destination.
    pub routes: BTreeMap<IpNet, Target>,
    /// Tunnel devices, of the tunnels that pools use and this node has an address for.
    pub tunnels: BTreeMap<TunnelKind, TunnelDevice>,
    /// Other nodes behind VXLAN tunnels, by tunnel address.
    pub peers: BTreeMap<IpAddr, Peer>,
    /// Destinations without a route, with the reason.
    pub unreachable: BTreeMap<IpNet, String>,
    /// Host sides of pods' links, which must be up and have the pods' IPv6 gateway.
    pub pods: BTreeSet<String>,
    /// IP versions to forward: those of pools and of the node's pods.
    pub forwards: BTreeSet<IpVersion>,
    /// Inputs of [`Plan::update_pods`]; not in the kernel.
    pub base: Base,
}

/// What a change of the node's own pods needs besides the plan itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// Routes to other nodes hidden by a route to an own pod with the same address.
    shadowed: BTreeMap<IpNet, Target>,
    /// IP versions of the pools.
    forwards: BTreeSet<IpVersion>,
    /// Pods in the plan.
    pods: LocalPods,
}

/// Pods of this node: host-side interface by address.
pub type LocalPods = BTreeMap<IpAddr, String>;

/// Computes the plan of node `own` from its records.
pub fn plan(own: &str, records: &BTreeMap<RecordId, Record>, pods: &LocalPods) -> Plan {
    let nodes = node_infos(records);
    let mut plan = Plan::default();
    plan.base.forwards = pool_versions(records);
    plan.update_pods(pods);
    let Some(me) = nodes.get(own) else {
        return plan;
    };
    let has_bgp = records.contains_key(&RecordId::Bgp);
    for (id, record) in globals(records) {
        let (RecordId::Route(destination), Record::Route(route)) = (id, record) else {
            continue;
        };
        if route.node == own {
            if destination.prefix_len() < destination.max_prefix_len() {
                plan.routes.insert(*destination, Target::Blackhole);
            }
            continue;
        }
        match route_to_node(
            me,
            nodes.get(route.node.as_str()).copied(),
            *destination,
            route.encapsulation,
        ) {
            // An own pod is where its link is, whatever the records say about its address.
            Ok(target) if plan.routes.contains_key(destination) => {
                plan.base.shadowed.insert(*destination, target);
            }
            Ok(target) => {
                plan.routes.insert(*destination, target);
            }
            // The routers between the nodes have learnt it.
            Err(_) if has_bgp && route.encapsulation == Encapsulation::None => {}
            Err(reason) => {
                plan.unreachable
                    .insert(*destination, format!("node {}: {reason}", route.node));
            }
        }
    }
    for kind in TunnelKind::ALL {
        plan.tunnels
            .extend(tunnel::plan_device(me, records, kind).map(|device| (kind, device)));
    }
    plan.peers = plan_peers(own, &nodes);
    remove_without_tunnel(&mut plan);
    plan
}

impl Plan {
    /// Replaces the node's own pods and returns the destinations whose route changed. The cost
    /// depends on the node's pods only, not on the cluster's nodes.
    pub fn update_pods(&mut self, pods: &LocalPods) -> BTreeSet<IpNet> {
        let mut changed = BTreeSet::new();
        for address in self
            .base
            .pods
            .keys()
            .filter(|address| !pods.contains_key(*address))
        {
            let destination = IpNet::from(*address);
            match self.base.shadowed.remove(&destination) {
                Some(target) => self.routes.insert(destination, target),
                None => self.routes.remove(&destination),
            };
            changed.insert(destination);
        }
        for (address, interface) in pods
            .iter()
            .filter(|(address, link)| self.base.pods.get(*address) != Some(*link))
        {
            let (destination, target) = (
                IpNet::from(*address),
                Target::Pod {
                    interface: interface.clone(),
                },
            );
            match self.routes.insert(destination, target) {
                None | Some(Target::Pod { .. }) => {}
                Some(other) => drop(self.base.shadowed.insert(destination, other)),
            }
            changed.insert(destination);
        }
        self.pods = pods.values().cloned().collect();
        let versions = pods.keys().map(|address| IpVersion::of(*address));
        self.forwards = self.base.forwards.iter().copied().chain(versions).collect();
        self.base.pods.clone_from(pods);
        changed
    }

    /// Destinations of pods on these links.
    pub fn pods_on_links(&self, links: &BTreeSet<String>) -> impl Iterator<Item = IpNet> {
        let pods = self
            .base
            .pods
            .iter()
            .filter(|(_, link)| links.contains(*link));
        pods.map(|(address, _)| IpNet::from(*address))
    }
}

/// Removes routes and peers that need a tunnel device that this node does not have.
fn remove_without_tunnel(plan: &mut Plan) {
    let Plan {
        routes,
        tunnels,
        peers,
        unreachable,
        base,
        ..
    } = plan;
    let mut leave_out = |destination: &IpNet, target: &mut Target| {
        let missing = target
            .tunnel(destination)
            .filter(|kind| !tunnels.contains_key(kind));
        if let Some(kind) = missing {
            let device = kind.device_name();
            let reason = format!("this node has no address for its tunnel device {device} yet");
            unreachable.insert(*destination, reason);
        }
        missing.is_none()
    };
    routes.retain(&mut leave_out);
    base.shadowed.retain(leave_out);
    peers.retain(|address, _| tunnels.contains_key(&TunnelKind::Vxlan(IpVersion::of(*address))));
}

fn pool_versions(records: &BTreeMap<RecordId, Record>) -> BTreeSet<IpVersion> {
    let pools = globals(records).filter_map(|(id, _)| match id {
        RecordId::Pool(range) => Some(IpVersion::of(range.addr())),
        _ => None,
    });
    pools.collect()
}

fn node_infos(records: &BTreeMap<RecordId, Record>) -> BTreeMap<&str, &NodeInfo> {
    let nodes = globals(records).filter_map(|(id, record)| match (id, record) {
        (RecordId::Node(name), Record::Node(info)) => Some((name.as_str(), info)),
        _ => None,
    });
    nodes.collect()
}

/// Route to a block of another node. Without encapsulation the nodes must share a subnet, as a
/// route's gateway has to be on a link.
fn route_to_node(
    me: &NodeInfo,
    other: Option<&NodeInfo>,
    destination: IpNet,
    encapsulation: Encapsulation,
) -> Result<Target, String> {
    let other = other.ok_or("its Node object does not exist")?;
    let address = other.own_address(IpVersion::of(destination.addr()));
    let address = address.ok_or("it has no address of that IP version yet")?;
    let shares_subnet = shares_subnet(me, address);
    match encapsulation.tunnel(IpVersion::of(address)) {
        _ if encapsulation.is_cross_subnet() && shares_subnet => {
            Ok(Target::Gateway { via: address })
        }
        Some(TunnelKind::Ipip) if address.is_ipv6() => Err("IPIP carries IPv4 only".to_owned()),
        Some(TunnelKind::Ipip) => Ok(Target::Ipip { via: address }),
        Some(kind) => other
            .tunnel_address(kind)
            .map(|via| Target::Vxlan { via })
            .ok_or_else(|| "it has no VXLAN tunnel address of that IP version yet".to_owned()),
        None if shares_subnet => Ok(Target::Gateway { via: address }),
        None => Err(format!(
            "its address {address} is in another subnet and the pool has no encapsulation; set \
             vxlanMode or ipipMode CrossSubnet, or route the pool in the network between the nodes"
        )),
    }
}

fn shares_subnet(me: &NodeInfo, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => me.ipv4.is_some_and(|net| net.trunc().contains(&address)),
        IpAddr::V6(address) => me.ipv6.is_some_and(|net| net.trunc().contains(&address)),
    }
}

fn plan_peers(own: &str, nodes: &BTreeMap<&str, &NodeInfo>) -> BTreeMap<IpAddr, Peer> {
    let ends = |info: &NodeInfo| {
        IpVersion::ALL
            .map(|version| tunnel::vxlan_end(info, version))
            .into_iter()
            .flatten()
    };
    let mine: BTreeSet<IpAddr> = nodes
        .get(own)
        .into_iter()
        .flat_map(|me| ends(me))
        .map(|(address, ..)| address)
        .collect();
    let others = nodes
        .iter()
        .filter(|(name, _)| **name != own)
        .flat_map(|(_, info)| ends(info));
    let mut peers = BTreeMap::new();
    // typha sends one node per tunnel address; if there are more, the first keeps it.
    for (address, mac, underlay) in others.filter(|(address, ..)| !mine.contains(address)) {
        peers.entry(address).or_insert(Peer { mac, underlay });
    }
    peers
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
