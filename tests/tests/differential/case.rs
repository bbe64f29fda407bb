//! A case: objects, and packets that meet them. Random ones come from the world that `calc`'s own
//! tests use.

use std::net::IpAddr;

use margay_api::endpoint::EndpointKey;
use margay_calc::update::{Backend, Update};
use margay_tests::raw::packet::protocol::{ICMP, ICMPV6, SCTP, TCP, UDP, UDPLITE};
use proptest::prelude::*;
use proptest::sample::select;

use crate::world;

/// The node whose kernel gives the verdict.
pub const NODE: &str = "n1";
/// Pods of that node: one of each namespace.
pub const LOCAL: [&str; 3] = ["red/p0", "green/p0", "blue/p0"];
/// Addresses that no pod has.
const STRANGERS: [&str; 6] = [
    "203.0.113.7",
    "10.0.0.200",
    "198.51.100.1",
    "fd00::99",
    "2001:db8::7",
    "fd01::1",
];

/// Packets of a case: as many as show that its rules meet something.
const PACKETS: usize = 120;

/// A packet that is the first of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Source.
    pub source: IpAddr,
    /// Destination, of the same version.
    pub destination: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// Source and destination port, of protocols that have them.
    pub ports: (u16, u16),
    /// ICMP type and code.
    pub icmp: (u8, u8),
}

/// Objects, and packets that meet them.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Objects in the order in which they come; the last of each counts.
    pub updates: Vec<Update>,
    /// Packets.
    pub probes: Vec<Probe>,
}

/// Addresses of a pod: each has its own, as in a cluster.
pub fn addresses(key: &EndpointKey) -> [IpAddr; 2] {
    let texts = match (key.namespace.as_str(), key.name.as_str()) {
        ("red", "p0") => ["10.0.0.1", "fd00::1"],
        ("green", "p0") => ["10.0.0.2", "fd00::2"],
        ("blue", "p0") => ["10.0.0.66", "fd00::3"],
        ("red", "p1") => ["10.1.0.3", "fd00::4"],
        ("green", "p1") => ["10.0.0.5", "fd00::5"],
        ("blue", "p1") => ["10.0.0.6", "fd00::6"],
        ("red", _) => ["10.0.0.7", "fd00::7"],
        ("green", _) => ["10.0.0.8", "fd00::8"],
        _ => ["10.0.0.70", "fd00::70"],
    };
    texts.map(|text| text.parse().expect("an address"))
}

/// A pod by its name `NAMESPACE/NAME`.
pub fn pod(name: &str) -> EndpointKey {
    let (namespace, name) = name.split_once('/').expect("namespace/name");
    EndpointKey::new(namespace, name)
}

/// The pod of the judging node that has the address.
pub fn local(address: IpAddr) -> Option<usize> {
    LOCAL
        .iter()
        .position(|name| addresses(&pod(name)).contains(&address))
}

/// Any case.
pub fn case() -> impl Strategy<Value = Case> {
    (
        prop::collection::vec(world::update(), 20..80),
        prop::collection::vec(probe(), PACKETS),
    )
        .prop_map(|(updates, probes)| Case {
            updates: updates.into_iter().filter_map(placed).collect(),
            probes,
        })
}

/// Adapts an update to a cluster where addresses are unique and the node under test has its own
/// pods. Drops updates that policy does not depend on.
fn placed(update: Update) -> Option<Update> {
    match update {
        Update::Endpoint(key, value) => {
            let value = value.map(|mut endpoint| {
                // A node's own pods may be known before their addresses are.
                let known = endpoint.addresses.len();
                endpoint.addresses = addresses(&key)[..known.min(2)].to_vec();
                let is_local = LOCAL.iter().any(|name| pod(name) == key);
                if is_local || endpoint.node == NODE {
                    endpoint.node = if is_local { NODE } else { "n2" }.to_owned();
                }
                endpoint
            });
            Some(Update::Endpoint(key, value))
        }
        Update::Namespace(..)
        | Update::ServiceAccount(..)
        | Update::Policy(..)
        | Update::Tier(..)
        | Update::NetworkSet(..) => Some(update),
        Update::Service(key, backends) => {
            // Policies do not depend on where backends are ready.
            let without = |mut backend: Backend| {
                backend.ready_on = None;
                backend
            };
            let backends = backends.map(|list| list.into_iter().map(without).collect());
            Some(Update::Service(key, backends))
        }
        _ => None,
    }
}

fn probe() -> impl Strategy<Value = Probe> {
    let names = ["red", "green", "blue"]
        .map(|namespace| ["p0", "p1", "p2"].map(|name| EndpointKey::new(namespace, name)));
    let pods = names
        .concat()
        .iter()
        .flat_map(addresses)
        .collect::<Vec<_>>();
    let locals: Vec<IpAddr> = LOCAL
        .iter()
        .flat_map(|name| addresses(&pod(name)))
        .collect();
    let strangers: Vec<IpAddr> = STRANGERS
        .iter()
        .map(|text| text.parse().expect("an address"))
        .collect();
    let peer = prop_oneof![3 => select(pods), 1 => select(strangers)];
    let protocols = vec![TCP, TCP, UDP, UDP, SCTP, UDPLITE, ICMP, ICMPV6, 47, 253];
    let ports = (world::port(), world::port());
    let icmp = (world::icmp_type(), 0..2_u8);
    let foreign = prop::bool::weighted(0.2);
    (
        select(locals),
        peer,
        any::<bool>(),
        (select(protocols), foreign),
        ports,
        icmp,
    )
        .prop_map(|(own, peer, outward, (protocol, foreign), ports, icmp)| {
            let (source, destination) = if outward { (own, peer) } else { (peer, own) };
            // Mostly ICMP of the packet's own version; that of the other one is a protocol like any
            // other.
            let protocol = match (protocol, own.is_ipv4(), foreign) {
                (ICMPV6, true, false) => ICMP,
                (ICMP, false, false) => ICMPV6,
                (protocol, ..) => protocol,
            };
            Probe {
                source,
                destination,
                protocol,
                ports,
                icmp,
            }
        })
        .prop_filter("between two places, of one version", |probe| {
            let (from, to) = (local(probe.source), local(probe.destination));
            probe.source.is_ipv4() == probe.destination.is_ipv4() && (from.is_none() || from != to)
        })
}
