//! Next hops of learnt routes: how they are reached, and what that makes of routes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use margay_bgp::filter::is_name_like;
use margay_bgp::rib::{KernelRoute, NextHopInfo};
use margay_dataplane::routes::learned::{LearnedHop, LearnedRoute};
use margay_dataplane::routes::next_hop::{NextHopLookup, NextHopWay};

/// Metric of a next hop behind a gateway; one on a link has 0 and is preferred.
const GATEWAY_METRIC: u32 = 1;

/// Finds the way to an address in the kernel.
pub trait FindWay {
    /// The way; `None`: there is none.
    fn find(&mut self, address: IpAddr) -> Option<NextHopWay>;
}

impl FindWay for NextHopLookup {
    fn find(&mut self, address: IpAddr) -> Option<NextHopWay> {
        Self::find(self, address).unwrap_or_else(|error| {
            tracing::warn!(%address, %error, "a next hop cannot be looked up");
            None
        })
    }
}

/// Next hops that routes have, with the ways to them as of the last look.
pub(super) struct Hops {
    lookup: Box<dyn FindWay>,
    gateways: BTreeMap<IpAddr, IpAddr>,
    ignored: BTreeSet<String>,
    known: BTreeMap<IpAddr, Option<NextHopWay>>,
    /// The route that was translated last: most have the same next hops.
    last: Option<(Arc<KernelRoute>, Option<Arc<LearnedRoute>>)>,
}

impl Hops {
    pub(super) fn new(lookup: Box<dyn FindWay>) -> Self {
        Self {
            lookup,
            gateways: BTreeMap::new(),
            ignored: BTreeSet::new(),
            known: BTreeMap::new(),
            last: None,
        }
    }

    /// Addresses that are reached by a gateway whatever the kernel's table says, and patterns of
    /// interfaces that are not used. Returns the next hops that have another way now.
    pub(super) fn set_rules(
        &mut self,
        gateways: &BTreeMap<IpAddr, IpAddr>,
        ignored: &BTreeSet<String>,
    ) -> BTreeSet<IpAddr> {
        if (&self.gateways, &self.ignored) == (gateways, ignored) {
            return BTreeSet::new();
        }
        self.gateways.clone_from(gateways);
        self.ignored.clone_from(ignored);
        self.refresh()
    }

    /// Looks all next hops up again. Returns those that have another way now.
    pub(super) fn refresh(&mut self) -> BTreeSet<IpAddr> {
        let addresses: Vec<IpAddr> = self.known.keys().copied().collect();
        let mut changed = BTreeSet::new();
        for address in addresses {
            let way = self.find(address);
            if self.known.insert(address, way.clone()) != Some(way) {
                changed.insert(address);
            }
        }
        if !changed.is_empty() {
            self.last = None;
        }
        changed
    }

    /// Forgets next hops that no route has any more, and returns them.
    pub(super) fn retain(&mut self, used: &BTreeSet<IpAddr>) -> Vec<IpAddr> {
        let gone = self.known.keys().filter(|address| !used.contains(address));
        let gone: Vec<IpAddr> = gone.copied().collect();
        gone.iter()
            .for_each(|address| drop(self.known.remove(address)));
        self.last = None;
        gone
    }

    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Looks a next hop up if it is not known. Returns whether it is new.
    pub(super) fn learn(&mut self, address: IpAddr) -> bool {
        if self.known.contains_key(&address) {
            return false;
        }
        let way = self.find(address);
        self.known.insert(address, way);
        true
    }

    /// What the speaker is to know of a next hop; `None`: it cannot be reached.
    pub(super) fn info(&self, address: &IpAddr) -> Option<NextHopInfo> {
        let way = self.known.get(address)?.as_ref()?;
        Some(NextHopInfo {
            metric: if way.is_on_link { 0 } else { GATEWAY_METRIC },
            interface: Some(way.interface.clone()),
            gateway: (!way.is_on_link).then_some(way.hop.via),
        })
    }

    /// Whether the speaker needs a report of it: by itself it takes next hops for reachable on a
    /// link.
    pub(super) fn is_special(&self, address: &IpAddr) -> bool {
        let way = self.known.get(address).and_then(Option::as_ref);
        way.is_none_or(|way| !way.is_on_link)
    }

    /// The route for the kernel; `None`: no next hop can be reached. Its next hops are known, see
    /// [`Self::learn`].
    pub(super) fn translate(&mut self, route: &Arc<KernelRoute>) -> Option<Arc<LearnedRoute>> {
        if let Some((last, learned)) = &self.last
            && Arc::ptr_eq(last, route)
        {
            return learned.clone();
        }
        let ways = route
            .next_hops
            .iter()
            .filter_map(|hop| self.known.get(&hop.address)?.as_ref());
        // Two next hops may be behind one gateway.
        let hops: BTreeSet<LearnedHop> = ways.map(|way| way.hop).collect();
        let learned = (!hops.is_empty()).then(|| {
            Arc::new(LearnedRoute {
                hops: hops.into_iter().collect(),
                metric: route.priority,
            })
        });
        self.last = Some((route.clone(), learned.clone()));
        learned
    }

    fn find(&mut self, address: IpAddr) -> Option<NextHopWay> {
        let target = self.gateways.get(&address).copied().unwrap_or(address);
        let way = self.lookup.find(target)?;
        let is_ignored = |pattern: &String| is_name_like(pattern, &way.interface);
        if self.ignored.iter().any(is_ignored) {
            return None;
        }
        Some(NextHopWay {
            is_on_link: way.is_on_link && target == address,
            ..way
        })
    }
}

#[cfg(test)]
mod tests {
    use margay_bgp::attributes::NextHop;

    use super::*;

    struct Table(BTreeMap<IpAddr, (&'static str, &'static str)>);

    impl FindWay for Table {
        fn find(&mut self, address: IpAddr) -> Option<NextHopWay> {
            let (via, interface) = self.0.get(&address)?;
            let via = ip(via);
            Some(NextHopWay {
                hop: LearnedHop { via, link: 2 },
                interface: (*interface).to_owned(),
                is_on_link: via == address,
            })
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn mk_hops() -> Hops {
        let table = [
            ("10.0.0.2", ("10.0.0.2", "eth0")),
            ("10.0.0.3", ("10.0.0.3", "eth1")),
            ("10.9.0.1", ("10.0.0.2", "eth0")),
            ("10.9.0.2", ("10.0.0.2", "eth0")),
        ];
        Hops::new(Box::new(Table(table.map(|(to, way)| (ip(to), way)).into())))
    }

    fn vias(hops: &mut Hops, next_hops: &[&str]) -> Option<Vec<String>> {
        let route = Arc::new(KernelRoute {
            next_hops: next_hops.iter().map(|hop| NextHop::from(ip(hop))).collect(),
            priority: 1024,
        });
        for hop in next_hops {
            hops.learn(ip(hop));
        }
        let learned = hops.translate(&route)?;
        Some(learned.hops.iter().map(|hop| hop.via.to_string()).collect())
    }

    #[test]
    fn a_route_has_the_ways_to_its_next_hops() {
        let mut hops = mk_hops();
        for (next_hops, wanted) in [
            (&["10.0.0.2"][..], Some(&["10.0.0.2"][..])),
            (&["10.0.0.2", "10.0.0.3"], Some(&["10.0.0.2", "10.0.0.3"])),
            (&["10.9.0.1", "10.9.0.2"], Some(&["10.0.0.2"])),
            (&["10.8.0.1", "10.0.0.3"], Some(&["10.0.0.3"])),
            (&["10.8.0.1"], None),
        ] {
            let found = vias(&mut hops, next_hops);
            let wanted = wanted.map(|vias| vias.iter().map(|via| (*via).to_owned()).collect());
            assert_eq!(found, wanted, "{next_hops:?}");
        }
        let special = ["10.0.0.2", "10.9.0.1", "10.8.0.1"].map(|hop| hops.is_special(&ip(hop)));
        assert_eq!(special, [false, true, true]);
        assert_eq!(hops.info(&ip("10.9.0.1")).map(|info| info.metric), Some(1));
        assert_eq!(hops.info(&ip("10.8.0.1")), None);
    }

    #[test]
    fn gateways_and_ignored_interfaces_change_the_ways() {
        let mut hops = mk_hops();
        assert_eq!(vias(&mut hops, &["10.8.0.1"]), None);
        assert!(vias(&mut hops, &["10.0.0.3"]).is_some());
        let gateways = [(ip("10.8.0.1"), ip("10.0.0.2"))].into();
        let changed = hops.set_rules(&gateways, &["eth1*".to_owned()].into());
        assert_eq!(changed, [ip("10.8.0.1"), ip("10.0.0.3")].into());
        assert_eq!(
            vias(&mut hops, &["10.8.0.1"]),
            Some(vec!["10.0.0.2".to_owned()])
        );
        assert!(hops.is_special(&ip("10.8.0.1")));
        assert_eq!(vias(&mut hops, &["10.0.0.3"]), None);
        hops.retain(&BTreeSet::new());
        assert!(hops.is_empty());
    }
}
