//! Computes the operations from the present plan to the wanted one. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::rule::IpVersion;

use super::plan::{Peer, Plan, Target, VxlanDevice};

/// One change of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteOp {
    /// Remove a tunnel device, and with it its routes and neighbours.
    RemoveVxlan(IpVersion),
    /// Create a tunnel device, bring it up and set its address.
    CreateVxlan(IpVersion, VxlanDevice),
    /// Change what a tunnel device allows while in use: MTU, address, up.
    AdjustVxlan(IpVersion, VxlanDevice),
    /// Bring the host side of a pod's link up, with the MAC address and the IPv6 gateway that pods
    /// know.
    SetPod(String),
    /// Set the neighbour and forwarding entry of a peer.
    SetPeer(IpAddr, Peer),
    /// Remove the neighbour and forwarding entry of a peer.
    RemovePeer(IpAddr, Peer),
    /// Set a route, replacing one with the same destination.
    SetRoute(IpNet, Target),
    /// Remove a route.
    RemoveRoute(IpNet, Target),
}

/// Computes the operations that turn `present` into `wanted`, each after what it needs: devices,
/// peers, routes; then removals in reverse order.
///
/// A tunnel device that cannot be changed in place is recreated, with everything on it.
pub fn diff(present: &Plan, wanted: &Plan) -> Vec<RouteOp> {
    let mut ops = Vec::new();
    let rebuilt = diff_tunnels(present, wanted, &mut ops);
    ops.extend(
        wanted
            .pods
            .difference(&present.pods)
            .cloned()
            .map(RouteOp::SetPod),
    );
    let goes_with_device = |destination: &IpNet, target: &Target| {
        matches!(target, Target::Vxlan { .. })
            && rebuilt.contains(&IpVersion::of(destination.addr()))
    };
    for (address, peer) in &wanted.peers {
        if rebuilt.contains(&IpVersion::of(*address)) || present.peers.get(address) != Some(peer) {
            ops.push(RouteOp::SetPeer(*address, peer.clone()));
        }
    }
    for (destination, target) in &wanted.routes {
        if goes_with_device(destination, target) || present.routes.get(destination) != Some(target)
        {
            ops.push(RouteOp::SetRoute(*destination, target.clone()));
        }
    }
    for (destination, target) in present.routes.iter().rev() {
        if !wanted.routes.contains_key(destination) && !goes_with_device(destination, target) {
            ops.push(RouteOp::RemoveRoute(*destination, target.clone()));
        }
    }
    for (address, peer) in present.peers.iter().rev() {
        if !wanted.peers.contains_key(address) && !rebuilt.contains(&IpVersion::of(*address)) {
            ops.push(RouteOp::RemovePeer(*address, peer.clone()));
        }
    }
    ops
}

impl Plan {
    /// Applies an operation that the kernel has executed.
    pub fn apply_op(&mut self, op: RouteOp) {
        let on = |version: IpVersion, address: IpAddr| IpVersion::of(address) == version;
        match op {
            RouteOp::RemoveVxlan(version) => {
                self.tunnels.remove(&version);
                self.peers.retain(|address, _| !on(version, *address));
                self.routes.retain(|destination, target| {
                    !matches!(target, Target::Vxlan { .. }) || !on(version, destination.addr())
                });
            }
            RouteOp::CreateVxlan(version, device) | RouteOp::AdjustVxlan(version, device) => {
                self.tunnels.insert(version, device);
            }
            RouteOp::SetPod(name) => drop(self.pods.insert(name)),
            RouteOp::SetPeer(address, peer) => drop(self.peers.insert(address, peer)),
            RouteOp::RemovePeer(address, _) => drop(self.peers.remove(&address)),
            RouteOp::SetRoute(destination, target) => drop(self.routes.insert(destination, target)),
            RouteOp::RemoveRoute(destination, _) => drop(self.routes.remove(&destination)),
        }
    }
}

/// Adds the operations of tunnel devices and returns the IP versions whose device is recreated,
/// which loses everything on it.
fn diff_tunnels(present: &Plan, wanted: &Plan, ops: &mut Vec<RouteOp>) -> BTreeSet<IpVersion> {
    let mut rebuilt = BTreeSet::new();
    for version in IpVersion::ALL {
        match (present.tunnels.get(&version), wanted.tunnels.get(&version)) {
            (None, None) => {}
            (Some(present), Some(wanted)) if present.can_become(wanted) => {
                let adjustable = |device: &VxlanDevice| (device.address, device.mtu, device.up);
                if adjustable(present) != adjustable(wanted) || present.offloads && !wanted.offloads
                {
                    ops.push(RouteOp::AdjustVxlan(version, wanted.clone()));
                }
            }
            (present, wanted) => {
                rebuilt.insert(version);
                ops.extend(present.map(|_| RouteOp::RemoveVxlan(version)));
                ops.extend(wanted.map(|device| RouteOp::CreateVxlan(version, device.clone())));
            }
        }
    }
    rebuilt
}

#[cfg(test)]
mod tests {
    use super::*;
    use margay_api::network::Mac;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Executes an operation, asserting that what it needs exists.
    fn exec(kernel: &mut Plan, op: RouteOp) {
        match &op {
            RouteOp::CreateVxlan(version, _) => {
                assert!(!kernel.tunnels.contains_key(version), "there is a device")
            }
            RouteOp::AdjustVxlan(version, device) => {
                assert!(
                    kernel.tunnels[version].can_become(device),
                    "changed in place what cannot be"
                );
            }
            RouteOp::SetPeer(address, _) => assert!(
                kernel.tunnels.contains_key(&IpVersion::of(*address)),
                "no device"
            ),
            RouteOp::RemovePeer(address, _) => assert!(kernel.peers.contains_key(address)),
            RouteOp::SetRoute(destination, Target::Vxlan { .. }) => {
                assert!(
                    kernel
                        .tunnels
                        .contains_key(&IpVersion::of(destination.addr())),
                    "route without its device"
                );
            }
            RouteOp::RemoveRoute(destination, _) => {
                assert!(kernel.routes.contains_key(destination))
            }
            RouteOp::RemoveVxlan(_) | RouteOp::SetPod(_) | RouteOp::SetRoute(..) => {}
        }
        kernel.apply_op(op);
    }

    fn address(version: IpVersion, number: u8) -> IpAddr {
        match version {
            IpVersion::V4 => IpAddr::from([10, 9, 9, number]),
            IpVersion::V6 => IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 9, u16::from(number)]),
        }
    }

    fn target(version: IpVersion, tunnel: bool) -> BoxedStrategy<Target> {
        let vxlan = (0u8..4)
            .prop_map(move |n| Target::Vxlan {
                via: address(version, n),
            })
            .boxed();
        let plain = prop_oneof![
            (0u8..3).prop_map(|n| Target::Pod {
                interface: format!("cali{n}")
            }),
            Just(Target::Blackhole),
            (20u8..24).prop_map(move |n| Target::Gateway {
                via: address(version, n)
            }),
        ];
        if tunnel {
            prop_oneof![plain, vxlan].boxed()
        } else {
            plain.boxed()
        }
    }

    /// Part of a plan for one IP version.
    fn half(version: IpVersion) -> impl Strategy<Value = Plan> {
        proptest::option::of((0u8..2, 4789u16..4791, 0u32..2, 3u32..5)).prop_flat_map(
            move |device| {
                let tunnel = device.is_some();
                let range = move |n: u8| match version {
                    IpVersion::V4 => format!("10.1.{n}.0/26"),
                    IpVersion::V6 => format!("fd00:1:{n}::/122"),
                };
                let routes = proptest::collection::btree_map(
                    (0u8..6).prop_map(move |n| range(n).parse().expect("a range")),
                    target(version, tunnel),
                    0..6,
                );
                let peers = proptest::collection::btree_map(
                    (0u8..4).prop_map(move |n| address(version, n)),
                    (0u8..3).prop_map(move |n| Peer {
                        mac: Mac([0x66, 0, 0, 0, 0, n]),
                        underlay: address(version, 30 + n),
                    }),
                    0..4,
                );
                (routes, peers).prop_map(move |(routes, peers)| Plan {
                    routes,
                    tunnels: device
                        .map(|(n, port, mtu, underlay)| VxlanDevice {
                            address: address(version, 40 + n),
                            mac: Mac([0x66; 6]),
                            local: address(version, 50),
                            vni: 4096,
                            port,
                            mtu,
                            underlay: Some(underlay),
                            up: true,
                            offloads: n == 0,
                        })
                        .map(|device| (version, device))
                        .into_iter()
                        .collect(),
                    peers: if tunnel { peers } else { BTreeMap::new() },
                    ..Plan::default()
                })
            },
        )
    }

    fn any_plan() -> impl Strategy<Value = Plan> {
        (half(IpVersion::V4), half(IpVersion::V6)).prop_map(|(mut plan, other)| {
            plan.routes.extend(other.routes);
            plan.tunnels.extend(other.tunnels);
            plan.peers.extend(other.peers);
            plan.pods = plan
                .routes
                .values()
                .filter_map(|target| {
                    if let Target::Pod { interface } = target {
                        Some(interface.clone())
                    } else {
                        None
                    }
                })
                .collect();
            plan
        })
    }

    proptest! {
        #[test]
        fn applying_the_difference_reaches_the_wanted_plan(
            plans in proptest::collection::vec(any_plan(), 1..6),
        ) {
            let mut kernel = Plan::default();
            for wanted in plans {
                for op in diff(&kernel, &wanted) {
                    exec(&mut kernel, op);
                }
                // Links of removed pods are deleted by the CNI service, not by the driver.
                kernel.pods.retain(|name| wanted.pods.contains(name));
                // A device without offload is accepted where offload is allowed.
                for (version, device) in &mut kernel.tunnels {
                    let wanted = &wanted.tunnels[version];
                    prop_assert!(wanted.offloads || !device.offloads);
                    device.offloads = wanted.offloads;
                }
                prop_assert_eq!(&kernel, &wanted);
                prop_assert!(diff(&kernel, &wanted).is_empty());
                // Changes of devices by other programs.
                kernel.tunnels.values_mut().for_each(
                    |device| (device.up, device.mtu, device.offloads) = (false, 9, true),
                );
                kernel.pods.clear();
            }
        }
    }
}
