//! From the node's records and its own pods to the complete wanted routes, tunnel device, neighbours and forwarding entries. Pure.
//!
//! Only objects that carry our route protocol, or sit on our tunnel device, are ever wanted or removed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::{Encapsulation, FelixSettings, Mac, NodeInfo};
use margay_api::rule::IpVersion;
use margay_calc::model::{Record, RecordId, globals};

/// Protocol number that marks our routes; `ip route` shows it as a number. Calico's own is 80.
pub const ROUTE_PROTOCOL: u8 = 82;
/// Both IP versions: each has a tunnel device, peers and routes of its own.
pub const VERSIONS: [IpVersion; 2] = IpVersion::ALL;

/// Name of the VXLAN device for an IP version, Calico's.
pub const fn vxlan_device_name(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "vxlan.calico",
        IpVersion::V6 => "vxlan-v6.calico",
    }
}

/// Bytes that VXLAN adds to a packet when the outer one is of that IP version.
pub const fn vxlan_overhead(version: IpVersion) -> u32 {
    match version {
        IpVersion::V4 => 50,
        IpVersion::V6 => 70,
    }
}

/// The IP version of an address.
pub fn version_of(address: IpAddr) -> IpVersion {
    IpVersion::of(address)
}

/// Where a route leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// To a pod of this node: directly out of its host side interface.
    Pod {
        /// Host side interface.
        interface: String,
    },
    /// Nowhere: addresses of an own block that no pod has.
    Blackhole,
    /// By another node's own address.
    Gateway {
        /// The other node's address, on a subnet of this one.
        via: IpAddr,
    },
    /// Through the VXLAN device of the destination's IP version.
    Vxlan {
        /// Tunnel address of the other node.
        via: IpAddr,
    },
}

/// A tunnel device of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanDevice {
    /// Own tunnel address.
    pub address: IpAddr,
    /// Own tunnel MAC address.
    pub mac: Mac,
    /// Outer source address: the node's own, of the same IP version.
    pub local: IpAddr,
    /// Network identifier.
    pub vni: u32,
    /// Outer UDP port.
    pub port: u16,
    /// MTU; 0 means that of the underlay less the overhead.
    pub mtu: u32,
    /// Index of the link that carries the outer packets; none: it has to be found out.
    pub underlay: Option<u32>,
    /// Whether it is up. A wanted one always is.
    pub up: bool,
    /// Whether checksums of what is sent may be left to hardware. A wanted one for which they may is content with one that does not.
    pub offloads: bool,
}

impl VxlanDevice {
    /// Whether this one can become `wanted` without being made anew. A tunnel device cannot change its identifier, port or own address in place.
    pub fn can_become(&self, wanted: &Self) -> bool {
        let is_same = |own: &Self| (own.mac, own.local, own.vni, own.port);
        let has_address = self.address == wanted.address || self.address.is_unspecified();
        let is_on_link = self.underlay.is_none() || wanted.underlay.is_none() || self.underlay == wanted.underlay;
        is_same(self) == is_same(wanted) && has_address && is_on_link
    }
}

/// How another node is reached through the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// MAC address of its tunnel device.
    pub mac: Mac,
    /// Its own address, where the outer packet goes.
    pub underlay: IpAddr,
}

/// Everything that the node's routing is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Routes by destination.
    pub routes: BTreeMap<IpNet, Target>,
    /// The tunnel devices of the IP versions in which something is encapsulated and this node has a tunnel address.
    pub tunnels: BTreeMap<IpVersion, VxlanDevice>,
    /// Other nodes behind the tunnels, by their tunnel address.
    pub peers: BTreeMap<IpAddr, Peer>,
    /// Destinations that cannot be reached, with the reason.
    pub unreachable: BTreeMap<IpNet, String>,
    /// Host sides of pods' links, which are up and have the pods' gateway of IPv6.
    pub pods: BTreeSet<String>,
    /// IP versions that the node forwards: those of pools and of its pods.
    pub forwards: BTreeSet<IpVersion>,
    /// What a plan of other pods is made from; not in the kernel.
    pub base: Base,
}

/// What of a plan does not depend on the node's own pods and does not show while they are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// Routes to other nodes whose destination is the address of an own pod, which goes before.
    shadowed: BTreeMap<IpNet, Target>,
    /// IP versions of pools.
    forwards: BTreeSet<IpVersion>,
    /// The pods that the plan is of.
    pods: LocalPods,
}

/// The pods of this node: host side interface by address.
pub type LocalPods = BTreeMap<IpAddr, String>;

/// Computes the plan of node `own` from its records.
pub fn plan(own: &str, records: &BTreeMap<RecordId, Record>, pods: &LocalPods) -> Plan {
    let nodes = nodes(records);
    let mut plan = Plan::default();
    plan.base.forwards = pool_versions(records);
    plan.update_pods(pods);
    let Some(me) = nodes.get(own) else { return plan };
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
        match remote(me, nodes.get(route.node.as_str()).copied(), *destination, route.encapsulation) {
            // A pod of this node is where its link is, whatever is said of its address.
            Ok(target) if plan.routes.contains_key(destination) => {
                plan.base.shadowed.insert(*destination, target);
            }
            Ok(target) => {
                plan.routes.insert(*destination, target);
            }
            Err(reason) => {
                plan.unreachable.insert(*destination, format!("node {}: {reason}", route.node));
            }
        }
    }
    for version in VERSIONS {
        plan.tunnels.extend(vxlan_device(me, records, version).map(|device| (version, device)));
    }
    plan.peers = peers(own, &nodes);
    leave_out_without_tunnel(&mut plan);
    plan
}

impl Plan {
    /// Makes this the plan of these pods of the node, and returns the destinations whose route is another. Costs what
    /// the node's own pods do, and nothing for each of the cluster's nodes.
    pub fn update_pods(&mut self, pods: &LocalPods) -> BTreeSet<IpNet> {
        let mut changed = BTreeSet::new();
        for address in self.base.pods.keys().filter(|address| !pods.contains_key(*address)) {
            let destination = IpNet::from(*address);
            match self.base.shadowed.remove(&destination) {
                Some(target) => self.routes.insert(destination, target),
                None => self.routes.remove(&destination),
            };
            changed.insert(destination);
        }
        for (address, interface) in pods.iter().filter(|(address, link)| self.base.pods.get(*address) != Some(*link)) {
            let (destination, target) = (IpNet::from(*address), Target::Pod { interface: interface.clone() });
            match self.routes.insert(destination, target) {
                None | Some(Target::Pod { .. }) => {}
                Some(other) => drop(self.base.shadowed.insert(destination, other)),
            }
            changed.insert(destination);
        }
        self.pods = pods.values().cloned().collect();
        let versions = pods.keys().map(|address| version_of(*address));
        self.forwards = self.base.forwards.iter().copied().chain(versions).collect();
        self.base.pods.clone_from(pods);
        changed
    }

    /// The destinations of pods on these links.
    pub fn of_links(&self, links: &BTreeSet<String>) -> impl Iterator<Item = IpNet> {
        let pods = self.base.pods.iter().filter(|(_, link)| links.contains(*link));
        pods.map(|(address, _)| IpNet::from(*address))
    }
}

/// What needs a tunnel of this node that there is not.
fn leave_out_without_tunnel(plan: &mut Plan) {
    let Plan { routes, tunnels, peers, unreachable, base, .. } = plan;
    let mut leave_out = |destination: &IpNet, target: &mut Target| {
        let is_there = !matches!(target, Target::Vxlan { .. }) || tunnels.contains_key(&version_of(destination.addr()));
        if !is_there {
            let reason = "this node has no VXLAN tunnel address of that IP version yet";
            unreachable.insert(*destination, reason.to_owned());
        }
        is_there
    };
    routes.retain(&mut leave_out);
    base.shadowed.retain(leave_out);
    peers.retain(|address, _| tunnels.contains_key(&version_of(*address)));
}

fn pool_versions(records: &BTreeMap<RecordId, Record>) -> BTreeSet<IpVersion> {
    let pools = globals(records).filter_map(|(id, _)| match id {
        RecordId::Pool(range) => Some(version_of(range.addr())),
        _ => None,
    });
    pools.collect()
}

fn nodes(records: &BTreeMap<RecordId, Record>) -> BTreeMap<&str, &NodeInfo> {
    let nodes = globals(records).filter_map(|(id, record)| match (id, record) {
        (RecordId::Node(name), Record::Node(info)) => Some((name.as_str(), info)),
        _ => None,
    });
    nodes.collect()
}

/// How to reach a block of another node. Without encapsulation the other node must share a subnet: a route's gateway has to be on a link.
fn remote(
    me: &NodeInfo,
    other: Option<&NodeInfo>,
    destination: IpNet,
    encapsulation: Encapsulation,
) -> Result<Target, String> {
    let other = other.ok_or("no Node object")?;
    let address = match destination {
        IpNet::V4(_) => other.ipv4.map(|net| IpAddr::V4(net.addr())),
        IpNet::V6(_) => other.ipv6.map(|net| IpAddr::V6(net.addr())),
    };
    let address = address.ok_or("it has no address of that IP version yet")?;
    let tunnel = || {
        let via = match destination {
            IpNet::V4(_) => other.vtep.map(|vtep| IpAddr::V4(vtep.address)),
            IpNet::V6(_) => other.vtep6.map(|vtep| IpAddr::V6(vtep.address)),
        };
        via.map(|via| Target::Vxlan { via })
            .ok_or_else(|| "it has no VXLAN tunnel address of that IP version yet".to_owned())
    };
    match encapsulation {
        Encapsulation::None if same_subnet(me, address) => Ok(Target::Gateway { via: address }),
        Encapsulation::None => Err(format!(
            "{address} is on another subnet and the pool has no encapsulation; set CrossSubnet or route the pool in the fabric"
        )),
        Encapsulation::Vxlan => tunnel(),
        Encapsulation::VxlanCrossSubnet if same_subnet(me, address) => Ok(Target::Gateway { via: address }),
        Encapsulation::VxlanCrossSubnet => tunnel(),
        Encapsulation::Ipip | Encapsulation::IpipCrossSubnet => {
            Err("IPIP is not supported; use VXLAN or VXLANCrossSubnet".to_owned())
        }
    }
}

fn same_subnet(me: &NodeInfo, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => me.ipv4.is_some_and(|net| net.trunc().contains(&address)),
        IpAddr::V6(address) => me.ipv6.is_some_and(|net| net.trunc().contains(&address)),
    }
}

fn vxlan_device(me: &NodeInfo, records: &BTreeMap<RecordId, Record>, version: IpVersion) -> Option<VxlanDevice> {
    if !has_vxlan(records, version) {
        return None;
    }
    let (address, mac, local) = end_point(me, version)?;
    let defaults = FelixSettings::default();
    let settings = match records.get(&RecordId::Settings) {
        Some(Record::Settings(settings)) => settings,
        _ => &defaults,
    };
    let mtu = match version {
        IpVersion::V4 => settings.vxlan_mtu,
        IpVersion::V6 => settings.vxlan_mtu_v6,
    };
    let (vni, port) = (settings.vxlan_vni, settings.vxlan_port);
    let offloads = !settings.checksum_offload_broken;
    Some(VxlanDevice { address, mac, local, vni, port, mtu, underlay: None, up: true, offloads })
}

/// Whether any pool of this IP version is encapsulated in VXLAN, at least between subnets.
pub fn has_vxlan(records: &BTreeMap<RecordId, Record>, version: IpVersion) -> bool {
    globals(records).any(|(id, record)| match (id, record) {
        (RecordId::Pool(range), Record::Pool(pool)) => {
            version_of(range.addr()) == version
                && matches!(pool.encapsulation, Encapsulation::Vxlan | Encapsulation::VxlanCrossSubnet)
        }
        _ => false,
    })
}

/// Address and MAC address of a node's tunnel device, and the node's own address that the tunnel's packets go to.
fn end_point(node: &NodeInfo, version: IpVersion) -> Option<(IpAddr, Mac, IpAddr)> {
    match version {
        IpVersion::V4 => {
            let (vtep, own) = (node.vtep?, node.ipv4?);
            Some((vtep.address.into(), vtep.mac, own.addr().into()))
        }
        IpVersion::V6 => {
            let (vtep, own) = (node.vtep6?, node.ipv6?);
            Some((vtep.address.into(), vtep.mac, own.addr().into()))
        }
    }
}

fn peers(own: &str, nodes: &BTreeMap<&str, &NodeInfo>) -> BTreeMap<IpAddr, Peer> {
    let ends = |info: &NodeInfo| VERSIONS.map(|version| end_point(info, version)).into_iter().flatten();
    let mine: BTreeSet<IpAddr> =
        nodes.get(own).into_iter().flat_map(|me| ends(me)).map(|(address, ..)| address).collect();
    let others = nodes.iter().filter(|(name, _)| **name != own).flat_map(|(_, info)| ends(info));
    let mut peers = BTreeMap::new();
    // Typha tells of one node for each address; of more than one none takes the place of another.
    for (address, mac, underlay) in others.filter(|(address, ..)| !mine.contains(address)) {
        peers.entry(address).or_insert(Peer { mac, underlay });
    }
    peers
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
