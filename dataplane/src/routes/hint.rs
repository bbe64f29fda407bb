//! Decides whether kernel notifications concern a plan. Pure.
//!
//! Our own changes are notified like those of others, and pods come and go all the time. Reading
//! everything back costs milliseconds, so it is done only if a notification differs from the plan.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::{Mac, TunnelKind};
use margay_api::rule::IpVersion;

use super::plan::Plan;

/// Maximal number of pending hints; beyond it, everything is checked.
const MAX_HINTS: usize = 4096;

/// Possible change by another program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hint {
    /// Notifications were lost: anything may have changed.
    Lost,
    /// Another link went up or down, was removed, or has another MTU. The kernel removes IPv4
    /// routes over it without a notification.
    Underlay,
    /// An address of another link was removed. With the last address of a link the kernel removes
    /// IPv4 routes over it without a notification.
    AddressRemoved(IpAddr),
    /// An address of another link was added.
    AddressAdded(IpAddr),
    /// A pod's link was created.
    PodAdded(String),
    /// A pod's link is down or was removed, lost an address, or has another MAC address or
    /// controller.
    PodRemoved(String),
    /// A tunnel device changed.
    Tunnel(TunnelKind),
    /// A neighbour on a tunnel device has this permanent MAC address; `None`: it was removed or may
    /// expire.
    Neighbour(IpAddr, Option<Mac>),
    /// A forwarding entry of a tunnel device has this destination; `None`: it was removed.
    Forwarding(Mac, Option<IpAddr>),
    /// One of our routes was removed, or a foreign one has its destination.
    Route(IpNet),
    /// A kernel parameter of the node or of one of our links has a wrong value.
    Parameter,
}

/// Filter of hints by the plan.
#[derive(Clone, Copy)]
pub struct HintFilter<'a> {
    /// The wanted plan.
    pub plan: &'a Plan,
    /// Links of pods in the plan that do not exist.
    pub missing: &'a BTreeSet<String>,
    /// Whether part of the plan has failed.
    pub is_failing: bool,
}

impl HintFilter<'_> {
    /// Whether any of the hints is a reason to read back and repair.
    pub fn needs_resync(&self, hints: &BTreeSet<Hint>) -> bool {
        let is_forwarding = |hint: &Hint| matches!(hint, Hint::Forwarding(..));
        let macs: BTreeMap<Mac, IpAddr> = match hints.iter().any(is_forwarding) {
            true => self
                .plan
                .peers
                .values()
                .map(|peer| (peer.mac, peer.underlay))
                .collect(),
            false => BTreeMap::new(),
        };
        hints.iter().any(|hint| self.concerns_plan(hint, &macs))
    }

    fn concerns_plan(&self, hint: &Hint, macs: &BTreeMap<Mac, IpAddr>) -> bool {
        let plan = self.plan;
        match hint {
            Hint::Lost | Hint::Underlay | Hint::AddressRemoved(_) | Hint::Parameter => true,
            Hint::AddressAdded(address) => {
                self.is_failing
                    || plan
                        .tunnels
                        .values()
                        .any(|device| device.local() == Some(*address))
            }
            Hint::PodAdded(name) => self.missing.contains(name),
            Hint::PodRemoved(name) => plan.pods.contains(name) && !self.missing.contains(name),
            Hint::Tunnel(kind) => plan.tunnels.contains_key(kind),
            Hint::Neighbour(address, mac) => {
                plan.peers
                    .get(address)
                    .is_some_and(|peer| Some(peer.mac) != *mac)
                    && plan
                        .tunnels
                        .contains_key(&TunnelKind::Vxlan(IpVersion::of(*address)))
            }
            Hint::Forwarding(mac, leads_to) => macs
                .get(mac)
                .is_some_and(|underlay| Some(*underlay) != *leads_to),
            Hint::Route(destination) => plan.routes.contains_key(destination),
        }
    }
}

/// Adds hints to the pending ones.
pub fn merge_hints(waiting: &mut BTreeSet<Hint>, hints: BTreeSet<Hint>) {
    waiting.extend(hints);
    if waiting.len() > MAX_HINTS {
        *waiting = BTreeSet::from([Hint::Lost]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::plan::{Peer, Target};
    use crate::routes::tunnel::{TunnelDevice, VxlanDevice};

    const MAC: Mac = Mac([0x66, 0, 0, 0, 0, 2]);
    const OTHER: Mac = Mac([0x66, 0, 0, 0, 0, 9]);

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a range")
    }

    fn mk_plan() -> Plan {
        let device = TunnelDevice::Vxlan(VxlanDevice {
            address: ip("10.1.1.0"),
            mac: Mac([0x66, 0, 0, 0, 0, 1]),
            local: ip("172.30.0.1"),
            vni: 4096,
            port: 4789,
            mtu: 0,
            underlay: None,
            up: true,
            offloads: true,
        });
        Plan {
            routes: [
                (
                    net("10.1.2.0/26"),
                    Target::Vxlan {
                        via: ip("10.1.2.0"),
                    },
                ),
                (
                    net("10.1.1.5/32"),
                    Target::Pod {
                        interface: "cali1".to_owned(),
                    },
                ),
            ]
            .into(),
            tunnels: [(TunnelKind::Vxlan(IpVersion::V4), device)].into(),
            peers: [(
                ip("10.1.2.0"),
                Peer {
                    mac: MAC,
                    underlay: ip("172.30.0.2"),
                },
            )]
            .into(),
            pods: ["cali1", "cali2"].map(str::to_owned).into(),
            ..Plan::default()
        }
    }

    #[test]
    fn what_differs_from_the_plan_is_looked_at_and_nothing_else() {
        let (plan, missing) = (mk_plan(), BTreeSet::from(["cali2".to_owned()]));
        let pod = |name: &str| name.to_owned();
        for (hint, when_fine, when_failing) in [
            (Hint::Lost, true, true),
            (Hint::Underlay, true, true),
            (Hint::Parameter, true, true),
            (Hint::AddressRemoved(ip("172.30.0.1")), true, true),
            (Hint::AddressAdded(ip("172.30.0.1")), true, true),
            (Hint::AddressAdded(ip("192.0.2.1")), false, true),
            (Hint::PodAdded(pod("cali1")), false, false),
            (Hint::PodAdded(pod("cali2")), true, true),
            (Hint::PodRemoved(pod("cali1")), true, true),
            (Hint::PodRemoved(pod("cali2")), false, false),
            (Hint::PodRemoved(pod("cali3")), false, false),
            (Hint::Tunnel(TunnelKind::Vxlan(IpVersion::V4)), true, true),
            (Hint::Tunnel(TunnelKind::Vxlan(IpVersion::V6)), false, false),
            (Hint::Tunnel(TunnelKind::Ipip), false, false),
            (Hint::Neighbour(ip("10.1.2.0"), Some(MAC)), false, false),
            (Hint::Neighbour(ip("10.1.2.0"), Some(OTHER)), true, true),
            (Hint::Neighbour(ip("10.1.2.0"), None), true, true),
            (Hint::Neighbour(ip("10.1.3.0"), None), false, false),
            (Hint::Forwarding(MAC, Some(ip("172.30.0.2"))), false, false),
            (Hint::Forwarding(MAC, Some(ip("172.30.0.3"))), true, true),
            (Hint::Forwarding(MAC, None), true, true),
            (Hint::Forwarding(OTHER, None), false, false),
            (Hint::Route(net("10.1.2.0/26")), true, true),
            (Hint::Route(net("10.1.1.9/32")), false, false),
        ] {
            for (is_failing, expected) in [(false, when_fine), (true, when_failing)] {
                let filter = HintFilter {
                    plan: &plan,
                    missing: &missing,
                    is_failing,
                };
                assert_eq!(
                    filter.needs_resync(&[hint.clone()].into()),
                    expected,
                    "{hint:?}, failing: {is_failing}"
                );
            }
        }
    }

    #[test]
    fn too_many_hints_become_one() {
        let mut waiting = BTreeSet::new();
        for number in 0..=MAX_HINTS {
            merge_hints(
                &mut waiting,
                [Hint::PodRemoved(format!("cali{number}"))].into(),
            );
        }
        assert_eq!(waiting, [Hint::Lost].into());
    }
}
