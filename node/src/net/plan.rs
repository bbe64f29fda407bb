//! From the node's records and its own pods to the complete wanted routes, tunnel device, neighbours and forwarding entries. Pure.
//!
//! Only objects that carry our route protocol, or sit on our tunnel device, are ever wanted or removed.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use margay_api::network::{Encapsulation, FelixSettings, Mac, NodeInfo};
use margay_calc::model::{Record, RecordId};

/// Protocol number that marks our routes; `ip route` shows it as a number. Calico's own is 80.
pub const ROUTE_PROTOCOL: u8 = 82;
/// Name of the VXLAN device, Calico's.
pub const VXLAN_DEVICE: &str = "vxlan.calico";
/// Bytes that VXLAN over IPv4 adds to a packet.
pub const VXLAN_OVERHEAD: u32 = 50;

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
    /// Through the VXLAN device.
    Vxlan {
        /// Tunnel address of the other node.
        via: Ipv4Addr,
    },
}

/// The tunnel device of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanDevice {
    /// Own tunnel address.
    pub address: Ipv4Addr,
    /// Own tunnel MAC address.
    pub mac: Mac,
    /// Outer source address: the node's own.
    pub local: Ipv4Addr,
    /// Network identifier.
    pub vni: u32,
    /// Outer UDP port.
    pub port: u16,
    /// MTU; 0 means that of the underlay less the overhead.
    pub mtu: u32,
}

/// How another node is reached through the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// MAC address of its tunnel device.
    pub mac: Mac,
    /// Its own address, where the outer packet goes.
    pub underlay: Ipv4Addr,
}

/// Everything that the node's routing is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Routes by destination.
    pub routes: BTreeMap<IpNet, Target>,
    /// The tunnel device, if anything is encapsulated and this node has a tunnel address.
    pub vxlan: Option<VxlanDevice>,
    /// Other nodes behind the tunnel, by their tunnel address.
    pub peers: BTreeMap<Ipv4Addr, Peer>,
    /// Destinations that cannot be reached, with the reason.
    pub unreachable: BTreeMap<IpNet, String>,
}

/// The pods of this node: host side interface by address.
pub type LocalPods = BTreeMap<IpAddr, String>;

/// Computes the plan of node `own` from its records.
pub fn plan(own: &str, records: &BTreeMap<RecordId, Record>, pods: &LocalPods) -> Plan {
    let nodes = nodes(records);
    let Some(me) = nodes.get(own) else {
        return Plan { routes: pod_routes(pods), ..Plan::default() };
    };
    let mut plan = Plan { routes: pod_routes(pods), ..Plan::default() };
    for (id, record) in records {
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
            Ok(target) => {
                plan.routes.insert(*destination, target);
            }
            Err(reason) => {
                plan.unreachable.insert(*destination, format!("node {}: {reason}", route.node));
            }
        }
    }
    plan.vxlan = vxlan_device(me, records);
    plan.peers = peers(own, &nodes);
    if plan.vxlan.is_none() {
        plan.routes.retain(|_, target| !matches!(target, Target::Vxlan { .. }));
        plan.peers.clear();
    }
    plan
}

fn pod_routes(pods: &LocalPods) -> BTreeMap<IpNet, Target> {
    pods.iter()
        .map(|(address, interface)| (IpNet::from(*address), Target::Pod { interface: interface.clone() }))
        .collect()
}

fn nodes(records: &BTreeMap<RecordId, Record>) -> BTreeMap<&str, &NodeInfo> {
    records
        .iter()
        .filter_map(|(id, record)| match (id, record) {
            (RecordId::Node(name), Record::Node(info)) => Some((name.as_str(), info)),
            _ => None,
        })
        .collect()
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
    let tunnel = || match (destination, &other.vtep) {
        (IpNet::V6(_), _) => Err("VXLAN for IPv6 is not supported; use encapsulation None for IPv6 pools".to_owned()),
        (IpNet::V4(_), None) => Err("it has no VXLAN tunnel address yet".to_owned()),
        (IpNet::V4(_), Some(vtep)) => Ok(Target::Vxlan { via: vtep.address }),
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

fn vxlan_device(me: &NodeInfo, records: &BTreeMap<RecordId, Record>) -> Option<VxlanDevice> {
    let encapsulated = records.values().any(|record| match record {
        Record::Pool(pool) => matches!(pool.encapsulation, Encapsulation::Vxlan | Encapsulation::VxlanCrossSubnet),
        _ => false,
    });
    let (vtep, local) = (me.vtep.as_ref()?, me.ipv4?);
    let defaults = FelixSettings::default();
    let settings = match records.get(&RecordId::Settings) {
        Some(Record::Settings(settings)) => settings,
        _ => &defaults,
    };
    encapsulated.then(|| VxlanDevice {
        address: vtep.address,
        mac: vtep.mac,
        local: local.addr(),
        vni: settings.vxlan_vni,
        port: settings.vxlan_port,
        mtu: settings.vxlan_mtu,
    })
}

fn peers(own: &str, nodes: &BTreeMap<&str, &NodeInfo>) -> BTreeMap<Ipv4Addr, Peer> {
    nodes
        .iter()
        .filter(|(name, _)| **name != own)
        .filter_map(|(_, info)| {
            let (vtep, underlay): (_, Ipv4Net) = (info.vtep.as_ref()?, info.ipv4?);
            Some((vtep.address, Peer { mac: vtep.mac, underlay: underlay.addr() }))
        })
        .collect()
}
