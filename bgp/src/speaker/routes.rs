//! Routes through the speaker: from peers and from this node into the table, and out of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Action, MAX_PROBLEMS, Speaker};
use crate::attributes::{Attributes, Family};
use crate::config::{PeerConfig, PeerId};
use crate::export::ExportPolicy;
use crate::filter::RouteOperation;
use crate::message::{RefreshKind, RouteRefresh, Update};
use crate::rib::{LocalRoute, Selection, Source};
use crate::session::Moment;

impl Speaker {
    /// Replaces the rules of what goes to peers.
    pub fn set_export_policy(&mut self, policy: ExportPolicy, moment: Moment) {
        if self.policy == policy {
            return;
        }
        self.policy = policy;
        self.rib.touch_all();
        for peer in self.peers.keys().copied().collect::<Vec<_>>() {
            self.resend(peer);
        }
        self.update_peers(moment);
    }

    /// Adds a route that begins here, or changes it.
    pub fn announce(&mut self, route: LocalRoute, moment: Moment) {
        let net = route.net.trunc();
        if self.locals.get(&net) == Some(&route) {
            return;
        }
        let normal = match Family::of(&net) {
            Family::Ipv4 => self.config.ipv4_priority,
            Family::Ipv6 => self.config.ipv6_priority,
        };
        let priority = route.priority.unwrap_or(normal);
        let unspecified = match Family::of(&net) {
            Family::Ipv4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
            Family::Ipv6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let attributes = self.rib.store.intern(Attributes::local(unspecified));
        self.locals.insert(net, route);
        self.rib.insert(
            net,
            Source::Local,
            attributes.clone(),
            Some((attributes, priority)),
        );
        // Its interface alone may be another one, which filters look at.
        for state in self
            .peers
            .values_mut()
            .filter(|state| state.session.established().is_some())
        {
            state.out.touch(net);
        }
        self.update_peers(moment);
    }

    /// Removes a route that begins here.
    pub fn withdraw(&mut self, net: &IpNet, moment: Moment) {
        let net = net.trunc();
        if self.locals.remove(&net).is_some() {
            self.rib.remove(&net, Source::Local);
            self.update_peers(moment);
        }
    }

    /// Routes that begin here, in order.
    pub fn local_routes(&self) -> impl Iterator<Item = &LocalRoute> {
        self.locals.values()
    }

    /// Returns whether the session goes on.
    pub(super) fn take_update(&mut self, peer: PeerId, update: Update, moment: Moment) -> bool {
        let Some(state) = self.peers.get_mut(&peer) else {
            return false;
        };
        state.updates += 1;
        let problems = update.errors.into_iter().take(MAX_PROBLEMS);
        self.actions
            .extend(problems.map(|text| Action::Problem { peer, text }));
        for net in &update.withdrawn {
            self.rib.remove(net, Source::Peer(peer));
        }
        for (attributes, nets) in update.announced {
            if !self.take_announcement(peer, attributes, &nets, moment) {
                return false;
            }
        }
        if let Some(family) = update.end_of_rib {
            self.take_end_of_rib(peer, family);
        }
        true
    }

    /// Returns whether the session goes on.
    fn take_announcement(
        &mut self,
        peer: PeerId,
        attributes: Attributes,
        nets: &[IpNet],
        moment: Moment,
    ) -> bool {
        let Some(state) = self.peers.get(&peer) else {
            return false;
        };
        let session = crate::route_policy::Session {
            speaker: &self.config,
            peer: &state.config,
            local_address: state.config.address.ip(),
            extended_next_hop: false,
        };
        if session.has_wrong_first_as(&attributes) {
            let text = format!(
                "path {} does not begin with AS {}",
                attributes.as_path, state.config.asn
            );
            for net in nets {
                self.rib.remove(net, Source::Peer(peer));
            }
            self.actions.push(Action::Problem { peer, text });
            return true;
        }
        let received = self.rib.store.intern(attributes);
        let (max_prefixes, max_bytes) = (state.config.max_prefixes, state.config.max_bytes);
        let interface = self.rib.interface(&received).map(str::to_owned);
        for net in nets {
            let imported =
                session.import(&mut self.rib.store, net, &received, interface.as_deref());
            let usage = self
                .rib
                .insert(*net, Source::Peer(peer), received.clone(), imported);
            let prefixes = usage.prefixes[Family::of(net) as usize];
            if prefixes > max_prefixes || usage.bytes > max_bytes {
                let text = format!(
                    "{prefixes} prefixes and {} bytes, of {max_prefixes} and {max_bytes}",
                    usage.bytes
                );
                self.with_session(peer, moment, |session, around| {
                    session.stop_for_limit(text, around)
                });
                return false;
            }
        }
        true
    }

    pub(super) fn take_refresh(&mut self, peer: PeerId, refresh: RouteRefresh) {
        let Some(family) = refresh.family else { return };
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        let agreed = state
            .session
            .established()
            .and_then(|each| each.negotiated.as_ref());
        let Some(agreed) = agreed.filter(|agreed| agreed.families.contains(&family)) else {
            return;
        };
        let is_enhanced = agreed.enhanced_route_refresh;
        match refresh.kind {
            RefreshKind::Request => state.out.refresh(family, is_enhanced),
            RefreshKind::Begin if is_enhanced => {
                state.refreshing.insert(family);
                self.rib.mark_stale(peer, family);
            }
            RefreshKind::End if is_enhanced && state.refreshing.remove(&family) => {
                self.rib.remove_routes(peer, family, true);
            }
            _ => {}
        }
    }

    /// Imports what a peer sent by the configuration that there is now.
    pub(super) fn reimport(&mut self, peer: PeerId) {
        let Some(state) = self.peers.get(&peer) else {
            return;
        };
        let session = crate::route_policy::Session {
            speaker: &self.config,
            peer: &state.config,
            local_address: state.config.address.ip(),
            extended_next_hop: false,
        };
        self.rib
            .reimport(peer, &mut |store, net, received, interface| {
                session.import(store, net, received, interface)
            });
    }

    /// Looks at everything again that goes to a peer.
    pub(super) fn resend(&mut self, peer: PeerId) {
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        if state.session.established().is_some() {
            for family in Family::ALL {
                state.out.begin(family, self.rib.announced(family), false);
            }
        }
    }

    /// Selects where something has changed.
    pub(super) fn flush_routes(&mut self) {
        if !self.rib.is_dirty() {
            return;
        }
        let ready = self.ready_families();
        let policy = &self.policy;
        let installs = |net: &IpNet| policy.installs(net);
        let selection = Selection {
            max_paths: self.config.max_paths,
            assume_reachable: self.config.assume_reachable,
            installs: &installs,
        };
        let (changes, announced) = self.rib.flush(selection, &|family| ready.contains(&family));
        self.actions.extend(changes.into_iter().map(Action::Route));
        for state in self
            .peers
            .values_mut()
            .filter(|state| state.session.established().is_some())
        {
            for net in &announced {
                state.out.touch(*net);
            }
        }
    }

    /// Writes routes to a peer, up to a number of bytes.
    pub(super) fn write_routes(&mut self, peer: PeerId, budget: usize, out: &mut Vec<u8>) {
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        let mut table = std::mem::take(&mut state.out);
        let left_out = table.left_out();
        // Routes that came with the same attributes go out with the same.
        let mut known: BTreeMap<OutgoingKey, Option<Arc<Attributes>>> = BTreeMap::new();
        let Some(state) = self.peers.get(&peer) else {
            return;
        };
        if let Some(session) = self.route_session(state) {
            let agreed = state
                .session
                .established()
                .and_then(|each| each.negotiated.as_ref());
            if let Some(agreed) = agreed {
                let context = agreed.context(session.is_internal());
                let rib = &self.rib;
                table.write(
                    budget,
                    &context,
                    &mut |net| self.outgoing(rib, peer, &session, net, &mut known),
                    out,
                );
            }
        }
        if table.left_out() > left_out {
            let text = "attributes fill a message: some routes are not announced".to_owned();
            self.actions.push(Action::Problem { peer, text });
        }
        if let Some(state) = self.peers.get_mut(&peer) {
            state.out = table;
        }
    }

    /// A route as it goes to a peer, if it does.
    fn outgoing(
        &self,
        rib: &crate::rib::Rib,
        peer: PeerId,
        session: &crate::route_policy::Session<'_>,
        net: &IpNet,
        known: &mut BTreeMap<OutgoingKey, Option<Arc<Attributes>>>,
    ) -> Option<Arc<Attributes>> {
        let best = rib.best(net)?;
        let (from, interface) = match best.source {
            // A route does not go back to where it came from.
            Source::Peer(source) if source == peer => return None,
            // Nor to the router that its packets are sent by, which would send them back.
            Source::Peer(_)
                if rib.gateway(best.attributes.next_hop.address)
                    == Some(session.peer.address.ip()) =>
            {
                return None;
            }
            Source::Peer(source) => (Some(source), rib.interface(&best.attributes)),
            Source::Local => (
                None,
                self.locals
                    .get(net)
                    .and_then(|route| route.interface.as_deref()),
            ),
        };
        let from_config: Option<&PeerConfig> = match from {
            Some(source) => Some(&self.peers.get(&source)?.config),
            None => None,
        };
        let operations = session.export(&self.policy, net, best, from_config, interface)?;
        let mut operations: Vec<RouteOperation> = operations.to_vec();
        operations.extend(
            self.policy
                .communities(net)
                .map(RouteOperation::AddCommunity),
        );
        let key = OutgoingKey {
            attributes: best.attributes.clone(),
            family: Family::of(net),
            from,
            operations,
        };
        if let Some(outgoing) = known.get(&key) {
            return outgoing.clone();
        }
        let sender = from.and_then(|source| Some((from_config?, rib.router_id(source)?)));
        let outgoing = session
            .outgoing(&best.attributes, key.family, sender, &key.operations)
            .map(Arc::new);
        known.insert(key, outgoing.clone());
        outgoing
    }
}

/// What decides about the attributes with which a route goes out.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct OutgoingKey {
    attributes: Arc<Attributes>,
    family: Family,
    from: Option<PeerId>,
    operations: Vec<RouteOperation>,
}
