//! Computes the operations from the present plan to the wanted one. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::TunnelKind;
use margay_api::rule::IpVersion;

use super::plan::{Peer, Plan, Target};
use super::tunnel::TunnelDevice;

/// One change of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteOp {
    /// Remove a tunnel device, and with it its routes and neighbours.
    RemoveTunnel(TunnelKind),
    /// Create a tunnel device, bring it up and set its address.
    CreateTunnel(TunnelKind, TunnelDevice),
    /// Change what a tunnel device allows while in use: MTU, address, up.
    AdjustTunnel(TunnelKind, TunnelDevice),
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
        target
            .tunnel(destination)
            .is_some_and(|kind| rebuilt.contains(&kind))
    };
    let is_rebuilt =
        |address: &IpAddr| rebuilt.contains(&TunnelKind::Vxlan(IpVersion::of(*address)));
    for (address, peer) in &wanted.peers {
        if is_rebuilt(address) || present.peers.get(address) != Some(peer) {
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
        if !wanted.peers.contains_key(address) && !is_rebuilt(address) {
            ops.push(RouteOp::RemovePeer(*address, peer.clone()));
        }
    }
    ops
}

impl Plan {
    /// Applies an operation that the kernel has executed.
    pub fn apply_op(&mut self, op: RouteOp) {
        match op {
            RouteOp::RemoveTunnel(kind) => {
                self.tunnels.remove(&kind);
                self.peers
                    .retain(|address, _| TunnelKind::Vxlan(IpVersion::of(*address)) != kind);
                self.routes
                    .retain(|destination, target| target.tunnel(destination) != Some(kind));
            }
            RouteOp::CreateTunnel(kind, device) | RouteOp::AdjustTunnel(kind, device) => {
                self.tunnels.insert(kind, device);
            }
            RouteOp::SetPod(name) => drop(self.pods.insert(name)),
            RouteOp::SetPeer(address, peer) => drop(self.peers.insert(address, peer)),
            RouteOp::RemovePeer(address, _) => drop(self.peers.remove(&address)),
            RouteOp::SetRoute(destination, target) => drop(self.routes.insert(destination, target)),
            RouteOp::RemoveRoute(destination, _) => drop(self.routes.remove(&destination)),
        }
    }
}

/// Adds the operations of tunnel devices and returns the tunnels whose device is recreated, which
/// loses everything on it.
fn diff_tunnels(present: &Plan, wanted: &Plan, ops: &mut Vec<RouteOp>) -> BTreeSet<TunnelKind> {
    let mut rebuilt = BTreeSet::new();
    for kind in TunnelKind::ALL {
        match (present.tunnels.get(&kind), wanted.tunnels.get(&kind)) {
            (None, None) => {}
            (Some(present), Some(wanted)) if present.can_become(wanted) => {
                if !present.is_as(wanted) {
                    ops.push(RouteOp::AdjustTunnel(kind, wanted.clone()));
                }
            }
            (present, wanted) => {
                rebuilt.insert(kind);
                ops.extend(present.map(|_| RouteOp::RemoveTunnel(kind)));
                ops.extend(wanted.map(|device| RouteOp::CreateTunnel(kind, device.clone())));
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
    use std::net::Ipv4Addr;

    use crate::routes::tunnel::{IpipDevice, VxlanDevice};

    /// Executes an operation, asserting that what it needs exists.
    fn exec(kernel: &mut Plan, op: RouteOp) {
        match &op {
            RouteOp::CreateTunnel(kind, _) => {
                assert!(!kernel.tunnels.contains_key(kind), "there is a device")
            }
            RouteOp::AdjustTunnel(kind, device) => {
                assert!(
                    kernel.tunnels[kind].can_become(device),
                    "changed in place what cannot be"
                );
            }
            RouteOp::SetPeer(address, _) => assert!(
                kernel
                    .tunnels
                    .contains_key(&TunnelKind::Vxlan(IpVersion::of(*address))),
                "no device"
            ),
            RouteOp::RemovePeer(address, _) => assert!(kernel.peers.contains_key(address)),
            RouteOp::SetRoute(destination, target) => assert!(
                target
                    .tunnel(destination)
                    .is_none_or(|kind| kernel.tunnels.contains_key(&kind)),
                "route without its device"
            ),
            RouteOp::RemoveRoute(destination, _) => {
                assert!(kernel.routes.contains_key(destination))
            }
            RouteOp::RemoveTunnel(_) | RouteOp::SetPod(_) => {}
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
                        .map(|device| (TunnelKind::Vxlan(version), TunnelDevice::Vxlan(device)))
                        .into_iter()
                        .collect(),
                    peers: if tunnel { peers } else { BTreeMap::new() },
                    ..Plan::default()
                })
            },
        )
    }

    /// The part of IPIP.
    fn ipip() -> impl Strategy<Value = Plan> {
        proptest::option::of((0u8..3, 3u32..5)).prop_flat_map(|device| {
            let range = |n: u8| format!("10.2.{n}.0/26").parse().expect("a range");
            let via = |n: u8| Target::Ipip {
                via: address(IpVersion::V4, n),
            };
            let most = if device.is_some() { 4 } else { 1 };
            proptest::collection::btree_map(
                (0u8..4).prop_map(range),
                (0u8..3).prop_map(via),
                0..most,
            )
            .prop_map(move |routes| Plan {
                routes,
                tunnels: device
                    .map(|(n, mtu)| IpipDevice {
                        address: [10, 9, 9, n].into(),
                        local: None,
                        mtu,
                        up: true,
                    })
                    .map(|device| (TunnelKind::Ipip, TunnelDevice::Ipip(device)))
                    .into_iter()
                    .collect(),
                ..Plan::default()
            })
        })
    }

    fn any_plan() -> impl Strategy<Value = Plan> {
        let all = (half(IpVersion::V4), half(IpVersion::V6), ipip());
        all.prop_map(|(mut plan, other, ipip)| {
            plan.routes
                .extend(other.routes.into_iter().chain(ipip.routes));
            plan.tunnels.extend(ipip.tunnels);
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
                for (kind, device) in &mut kernel.tunnels {
                    if let (TunnelDevice::Vxlan(device), TunnelDevice::Vxlan(wanted)) =
                        (device, &wanted.tunnels[kind])
                    {
                        prop_assert!(wanted.offloads || !device.offloads);
                        device.offloads = wanted.offloads;
                    }
                }
                prop_assert_eq!(&kernel, &wanted);
                prop_assert!(diff(&kernel, &wanted).is_empty());
                // Changes of devices by other programs.
                for device in kernel.tunnels.values_mut() {
                    match device {
                        TunnelDevice::Vxlan(device) => {
                            (device.up, device.mtu, device.offloads) = (false, 9, true);
                        }
                        TunnelDevice::Ipip(device) => {
                            (device.up, device.mtu) = (false, 9);
                            device.address = Ipv4Addr::UNSPECIFIED;
                        }
                    }
                }
                kernel.pods.clear();
            }
        }
    }
}
