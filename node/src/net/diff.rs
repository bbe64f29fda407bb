//! From what is there and what is wanted to the operations between them. Pure.

use std::net::Ipv4Addr;

use ipnet::IpNet;

use super::plan::{Peer, Plan, Target, VxlanDevice};

/// One change of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Remove the tunnel device; routes and neighbours on it go with it.
    RemoveVxlan,
    /// Create the tunnel device, give it its address and bring it up.
    CreateVxlan(VxlanDevice),
    /// Set how a peer is reached: neighbour and forwarding entry.
    SetPeer(Ipv4Addr, Peer),
    /// Forget a peer.
    RemovePeer(Ipv4Addr, Peer),
    /// Set a route, replacing what has the same destination.
    SetRoute(IpNet, Target),
    /// Remove a route.
    RemoveRoute(IpNet, Target),
}

/// The operations that turn `present` into `wanted`, in an order in which each finds what it needs: device, peers, routes; removals last and reversed.
///
/// A tunnel device cannot change its identifier or port in place, so a different device is made anew, and everything on it with it.
pub fn diff(present: &Plan, wanted: &Plan) -> Vec<Op> {
    let mut ops = Vec::new();
    let rebuilt = present.vxlan != wanted.vxlan;
    if rebuilt {
        if present.vxlan.is_some() {
            ops.push(Op::RemoveVxlan);
        }
        if let Some(device) = &wanted.vxlan {
            ops.push(Op::CreateVxlan(device.clone()));
        }
    }
    for (address, peer) in &wanted.peers {
        if rebuilt || present.peers.get(address) != Some(peer) {
            ops.push(Op::SetPeer(*address, peer.clone()));
        }
    }
    for (destination, target) in &wanted.routes {
        let lost = rebuilt && matches!(target, Target::Vxlan { .. });
        if lost || present.routes.get(destination) != Some(target) {
            ops.push(Op::SetRoute(*destination, target.clone()));
        }
    }
    for (destination, target) in present.routes.iter().rev() {
        let gone_with_device = rebuilt && matches!(target, Target::Vxlan { .. });
        if !wanted.routes.contains_key(destination) && !gone_with_device {
            ops.push(Op::RemoveRoute(*destination, target.clone()));
        }
    }
    if !rebuilt {
        for (address, peer) in present.peers.iter().rev() {
            if !wanted.peers.contains_key(address) {
                ops.push(Op::RemovePeer(*address, peer.clone()));
            }
        }
    }
    ops
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_api::network::Mac;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    /// What the kernel does with an operation, as far as a plan can tell.
    fn exec(kernel: &mut Plan, op: Op) {
        match op {
            Op::RemoveVxlan => {
                kernel.vxlan = None;
                kernel.peers.clear();
                kernel.routes.retain(|_, target| !matches!(target, Target::Vxlan { .. }));
            }
            Op::CreateVxlan(device) => {
                assert!(kernel.vxlan.is_none(), "created over an existing device");
                kernel.vxlan = Some(device);
            }
            Op::SetPeer(address, peer) => {
                assert!(kernel.vxlan.is_some(), "peer without a device");
                kernel.peers.insert(address, peer);
            }
            Op::RemovePeer(address, _) => assert!(kernel.peers.remove(&address).is_some()),
            Op::SetRoute(destination, target) => {
                assert!(kernel.vxlan.is_some() || !matches!(target, Target::Vxlan { .. }), "route without its device");
                kernel.routes.insert(destination, target);
            }
            Op::RemoveRoute(destination, _) => {
                assert!(kernel.routes.remove(&destination).is_some())
            }
        }
    }

    fn target(tunnel: bool) -> BoxedStrategy<Target> {
        let vxlan = (0u8..4).prop_map(|n| Target::Vxlan { via: [10, 9, 9, n].into() }).boxed();
        let plain = prop_oneof![
            (0u8..3).prop_map(|n| Target::Pod { interface: format!("cali{n}") }),
            Just(Target::Blackhole),
            (0u8..4).prop_map(|n| Target::Gateway { via: IpAddr::from([172, 30, 0, n]) }),
        ];
        if tunnel { prop_oneof![plain, vxlan].boxed() } else { plain.boxed() }
    }

    fn any_plan() -> impl Strategy<Value = Plan> {
        proptest::option::of((0u8..2, 4789u16..4791)).prop_flat_map(|device| {
            let tunnel = device.is_some();
            let routes = proptest::collection::btree_map(
                (0u8..6).prop_map(|n| format!("10.1.{n}.0/26").parse().expect("a range")),
                target(tunnel),
                0..6,
            );
            let peers = proptest::collection::btree_map(
                (0u8..4).prop_map(|n| Ipv4Addr::from([10, 9, 9, n])),
                (0u8..3).prop_map(|n| Peer { mac: Mac([0x66, 0, 0, 0, 0, n]), underlay: [172, 30, 0, n].into() }),
                0..4,
            );
            (routes, peers).prop_map(move |(routes, peers)| Plan {
                routes,
                vxlan: device.map(|(n, port)| VxlanDevice {
                    address: [10, 9, 8, n].into(),
                    mac: Mac([0x66; 6]),
                    local: [172, 30, 0, 9].into(),
                    vni: 4096,
                    port,
                    mtu: 0,
                }),
                peers: if tunnel { peers } else { BTreeMap::new() },
                unreachable: BTreeMap::new(),
            })
        })
    }

    proptest! {
        #[test]
        fn applying_the_difference_reaches_the_wanted_plan(plans in proptest::collection::vec(any_plan(), 1..6)) {
            let mut kernel = Plan::default();
            for wanted in plans {
                for op in diff(&kernel, &wanted) {
                    exec(&mut kernel, op);
                }
                prop_assert_eq!(&kernel, &wanted);
                prop_assert!(diff(&kernel, &wanted).is_empty());
            }
        }
    }
}
