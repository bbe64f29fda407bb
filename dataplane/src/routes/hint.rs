//! Decides whether kernel notifications concern a plan. Pure.
//!
//! Our own changes are notified like those of others, and pods come and go all the time. Reading
//! everything back costs milliseconds, so it is done only if a notification differs from the plan.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::Mac;
use margay_api::rule::IpVersion;

use super::plan::{Plan, version_of};

/// Maximal number of pending hints; beyond it, everything is checked.
const LIMIT: usize = 4096;

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
    AddressGone(IpAddr),
    /// An address of another link was added.
    AddressCame(IpAddr),
    /// A pod's link was created.
    PodCame(String),
    /// A pod's link is down or was removed, or lost an address.
    PodGone(String),
    /// A tunnel device changed.
    Tunnel(IpVersion),
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
pub struct Interest<'a> {
    /// The wanted plan.
    pub plan: &'a Plan,
    /// Links of pods in the plan that do not exist.
    pub missing: &'a BTreeSet<String>,
    /// Whether part of the plan has failed.
    pub is_failing: bool,
}

impl Interest<'_> {
    /// Whether any of the hints is a reason to read back and repair.
    pub fn is_touched(&self, hints: &BTreeSet<Hint>) -> bool {
        let is_forwarding = |hint: &Hint| matches!(hint, Hint::Forwarding(..));
        let macs: BTreeMap<Mac, IpAddr> = match hints.iter().any(is_forwarding) {
            true => self.plan.peers.values().map(|peer| (peer.mac, peer.underlay)).collect(),
            false => BTreeMap::new(),
        };
        hints.iter().any(|hint| self.matters(hint, &macs))
    }

    fn matters(&self, hint: &Hint, macs: &BTreeMap<Mac, IpAddr>) -> bool {
        let plan = self.plan;
        match hint {
            Hint::Lost | Hint::Underlay | Hint::AddressGone(_) | Hint::Parameter => true,
            Hint::AddressCame(address) => {
                self.is_failing || plan.tunnels.values().any(|device| device.local == *address)
            }
            Hint::PodCame(name) => self.missing.contains(name),
            Hint::PodGone(name) => plan.pods.contains(name) && !self.missing.contains(name),
            Hint::Tunnel(version) => plan.tunnels.contains_key(version),
            Hint::Neighbour(address, mac) => {
                plan.peers.get(address).is_some_and(|peer| Some(peer.mac) != *mac)
                    && plan.tunnels.contains_key(&version_of(*address))
            }
            Hint::Forwarding(mac, leads_to) => macs.get(mac).is_some_and(|underlay| Some(*underlay) != *leads_to),
            Hint::Route(destination) => plan.routes.contains_key(destination),
        }
    }
}

/// Adds hints to the pending ones.
pub fn merge(waiting: &mut BTreeSet<Hint>, hints: BTreeSet<Hint>) {
    waiting.extend(hints);
    if waiting.len() > LIMIT {
        *waiting = BTreeSet::from([Hint::Lost]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::plan::{Peer, Target, VxlanDevice};

    const MAC: Mac = Mac([0x66, 0, 0, 0, 0, 2]);
    const OTHER: Mac = Mac([0x66, 0, 0, 0, 0, 9]);

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a range")
    }

    fn mk_plan() -> Plan {
        let device = VxlanDevice {
            address: ip("10.1.1.0"),
            mac: Mac([0x66, 0, 0, 0, 0, 1]),
            local: ip("172.30.0.1"),
            vni: 4096,
            port: 4789,
            mtu: 0,
            underlay: None,
            up: true,
            offloads: true,
        };
        Plan {
            routes: [
                (net("10.1.2.0/26"), Target::Vxlan { via: ip("10.1.2.0") }),
                (net("10.1.1.5/32"), Target::Pod { interface: "cali1".to_owned() }),
            ]
            .into(),
            tunnels: [(IpVersion::V4, device)].into(),
            peers: [(ip("10.1.2.0"), Peer { mac: MAC, underlay: ip("172.30.0.2") })].into(),
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
            (Hint::AddressGone(ip("172.30.0.1")), true, true),
            (Hint::AddressCame(ip("172.30.0.1")), true, true),
            (Hint::AddressCame(ip("192.0.2.1")), false, true),
            (Hint::PodCame(pod("cali1")), false, false),
            (Hint::PodCame(pod("cali2")), true, true),
            (Hint::PodGone(pod("cali1")), true, true),
            (Hint::PodGone(pod("cali2")), false, false),
            (Hint::PodGone(pod("cali3")), false, false),
            (Hint::Tunnel(IpVersion::V4), true, true),
            (Hint::Tunnel(IpVersion::V6), false, false),
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
                let interest = Interest { plan: &plan, missing: &missing, is_failing };
                assert_eq!(interest.is_touched(&[hint.clone()].into()), expected, "{hint:?}, failing: {is_failing}");
            }
        }
    }

    #[test]
    fn too_many_hints_become_one() {
        let mut waiting = BTreeSet::new();
        for number in 0..=LIMIT {
            merge(&mut waiting, [Hint::PodGone(format!("cali{number}"))].into());
        }
        assert_eq!(waiting, [Hint::Lost].into());
    }
}
