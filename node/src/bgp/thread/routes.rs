//! Routes of the speaker on their way to the kernel, and their next hops.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use margay_bgp::filter::Filters;
use margay_bgp::rib::KernelRoute;

use super::{FORGET, SpeakerOwner};

impl SpeakerOwner {
    pub(super) fn install(&mut self, net: IpNet, route: &Arc<KernelRoute>) {
        let new: Vec<IpAddr> = route
            .next_hops
            .iter()
            .map(|hop| hop.address)
            .filter(|address| self.hops.learn(*address))
            .collect();
        for address in new {
            self.tell_hop(address, false);
        }
        if !self.gateways.contains(&net) {
            let learned = self.hops.translate(route);
            self.changes.insert(net, learned);
        }
    }

    /// Tells the speaker how a next hop is reached, if it does not assume that by itself.
    pub(super) fn tell_hop(&mut self, address: IpAddr, has_changed: bool) {
        if has_changed || self.names_interfaces() || self.hops.is_special(&address) {
            let (info, moment) = (self.hops.info(&address), self.moment());
            self.speaker.set_next_hop(address, Some(info), moment);
        }
    }

    /// Import filters look at interfaces: every next hop has to be known.
    pub(super) fn names_interfaces(&self) -> bool {
        let peers = self.wanted.peers.values();
        peers.map(|peer| &peer.config.import).any(names_interfaces)
    }

    /// Looks next hops up that filters need. Returns whether there were any.
    pub(super) fn learn_all(&mut self) -> bool {
        if !self.names_interfaces() {
            return false;
        }
        let hops = self.speaker.next_hops();
        let new: Vec<IpAddr> = hops
            .into_iter()
            .filter(|hop| self.hops.learn(*hop))
            .collect();
        for address in &new {
            self.tell_hop(*address, true);
        }
        !new.is_empty()
    }

    /// Looks next hops up again, and tries again to listen.
    pub(super) fn look_around(&mut self) {
        self.listeners.retry();
        self.looks += 1;
        if self.looks.is_multiple_of(FORGET) && !self.hops.is_empty() {
            let gateways = self.wanted.gateways.keys().copied();
            let used: BTreeSet<IpAddr> = self
                .speaker
                .next_hops()
                .into_iter()
                .chain(gateways)
                .collect();
            let moment = self.moment();
            for address in self.hops.retain(&used) {
                self.speaker.set_next_hop(address, None, moment);
            }
        }
        let changed = self.hops.refresh();
        self.update_hops(&changed);
        let gateways = self.wanted.gateways.clone();
        if gateways.keys().any(|address| changed.contains(address)) {
            self.set_gateways(&gateways);
        }
        self.publish();
    }

    /// Next hops have another way.
    pub(super) fn update_hops(&mut self, changed: &BTreeSet<IpAddr>) {
        if changed.is_empty() {
            return;
        }
        for address in changed {
            self.tell_hop(*address, true);
        }
        let leads = |route: &KernelRoute| {
            route
                .next_hops
                .iter()
                .any(|hop| changed.contains(&hop.address))
        };
        let routes = self
            .speaker
            .kernel_routes()
            .filter(|(_, route)| leads(route));
        let routes: Vec<(IpNet, Arc<KernelRoute>)> =
            routes.map(|(net, route)| (net, route.clone())).collect();
        for (net, route) in routes {
            self.install(net, &route);
        }
    }
}

/// Rules look at the interface of a route.
pub(super) fn names_interfaces(filters: &Filters) -> bool {
    let mut rules = filters.ipv4.iter().chain(&filters.ipv6);
    rules.any(|rule| rule.interface.is_some())
}
