//! What happens to a route between a peer and the table: import and export.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::attributes::{
    AttributeStore, Attributes, DEFAULT_LOCAL_PREF, Family, NO_ADVERTISE, NO_EXPORT,
    NO_EXPORT_SUBCONFED, NextHop,
};
use crate::config::{NextHopMode, PeerConfig, SpeakerConfig};
use crate::export::ExportPolicy;
use crate::filter::{self, Candidate, FilterAction, PeerType, RouteOperation};
use crate::message::Role;
use crate::rib::{Best, Imported, Source};

/// A session, as far as routes depend on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Session<'a> {
    pub(crate) speaker: &'a SpeakerConfig,
    pub(crate) peer: &'a PeerConfig,
    /// Our own address of the connection.
    pub(crate) local_address: IpAddr,
    /// IPv4 routes may have IPv6 next hops.
    pub(crate) extended_next_hop: bool,
}

impl Session<'_> {
    /// Our AS number towards the peer.
    pub(crate) fn local_asn(&self) -> u32 {
        self.peer.local_asn.unwrap_or(self.speaker.asn)
    }

    pub(crate) fn is_internal(&self) -> bool {
        self.local_asn() == self.peer.asn
    }

    fn peer_type(&self) -> PeerType {
        if self.is_internal() {
            PeerType::Internal
        } else {
            PeerType::External
        }
    }

    fn cluster_id(&self) -> std::net::Ipv4Addr {
        self.speaker.cluster_id.unwrap_or(self.speaker.router_id)
    }

    fn normal_priority(&self, family: Family) -> u32 {
        match family {
            Family::Ipv4 => self.speaker.ipv4_priority,
            Family::Ipv6 => self.speaker.ipv6_priority,
        }
    }

    /// Where packets to us go, for a route of this family.
    fn own_next_hop(&self, family: Family) -> Option<IpAddr> {
        let configured = self.peer.own_next_hops.get(&family).copied();
        let local =
            Some(self.local_address).filter(|address| Family::of_address(address) == family);
        let is_possible = |address: &IpAddr| {
            address.is_ipv4() || family == Family::Ipv6 || self.extended_next_hop
        };
        let other =
            Some(self.local_address).filter(|_| family == Family::Ipv4 && self.extended_next_hop);
        configured.filter(is_possible).or(local).or(other)
    }

    /// What import makes of a route that the peer sent; none if it is of no use.
    pub(crate) fn import(
        &self,
        store: &mut AttributeStore,
        net: &IpNet,
        received: &Arc<Attributes>,
        interface: Option<&str>,
    ) -> Imported {
        if self.has_loop(received) || (!self.is_internal() && self.is_leak(received)) {
            return None;
        }
        let mut priority = self.normal_priority(Family::of(net));
        let candidate = Candidate {
            net,
            attributes: received,
            is_from_peer: true,
            interface,
            peer_type: self.peer_type(),
            priority,
        };
        let operations: &[RouteOperation] = match filter::decide(&self.peer.import, &candidate) {
            Some(FilterAction::Reject) => return None,
            Some(FilterAction::Accept(operations)) => operations,
            None => &[],
        };
        let to_customer = self.only_to_customer_on_import(received);
        if operations.is_empty() && to_customer == received.only_to_customer {
            return Some((received.clone(), priority));
        }
        let mut attributes = (**received).clone();
        attributes.only_to_customer = to_customer;
        for operation in operations {
            filter::apply(operation, &mut attributes, &mut priority);
        }
        Some((store.intern(attributes), priority))
    }

    /// The route has been here: our AS number in its path more often than is allowed (RFC 4271
    /// section 9.1.2), our identifier or our cluster in what reflectors note (RFC 4456 section 8).
    fn has_loop(&self, attributes: &Attributes) -> bool {
        let count = attributes.as_path.count(self.local_asn());
        // Within the system its own number is in no path; the limit is for what comes from outside.
        count > usize::from(self.peer.allowed_local_asn)
            || attributes.originator_id == Some(self.speaker.router_id)
            || attributes.cluster_list.contains(&self.cluster_id())
    }

    /// RFC 9234 section 5, on reception.
    fn is_leak(&self, attributes: &Attributes) -> bool {
        match (self.peer.role, attributes.only_to_customer) {
            (Some(Role::Provider | Role::RouteServer), Some(_)) => true,
            (Some(Role::Peer), Some(asn)) => asn != self.peer.asn,
            _ => false,
        }
    }

    fn only_to_customer_on_import(&self, attributes: &Attributes) -> Option<u32> {
        let marks = matches!(
            self.peer.role,
            Some(Role::Customer | Role::Peer | Role::RouteServerClient)
        );
        attributes
            .only_to_customer
            .or((marks && !self.is_internal()).then_some(self.peer.asn))
    }

    /// How a chosen route goes to the peer: what its filters and the rules of the node do with it.
    /// None if it does not go.
    pub(crate) fn export<'a>(
        &'a self,
        policy: &ExportPolicy,
        net: &IpNet,
        best: &Best,
        from: Option<&PeerConfig>,
        interface: Option<&str>,
    ) -> Option<&'a [RouteOperation]> {
        let family = Family::of(net);
        if !self.peer.families.contains(&family) || !self.may_pass(best, from) {
            return None;
        }
        let normal = self.normal_priority(family);
        let candidate = Candidate {
            net,
            attributes: &best.attributes,
            is_from_peer: best.source != Source::Local,
            interface,
            peer_type: self.peer_type(),
            priority: best.priority,
        };
        match filter::decide(&self.peer.export, &candidate) {
            Some(FilterAction::Reject) => None,
            Some(FilterAction::Accept(operations)) => Some(operations),
            None => policy.exports(net, best.priority < normal).then_some(&[]),
        }
    }

    /// The rules of the protocol: communities of RFC 1997, routes within the system that go to and
    /// from clients of a reflector alone (RFC 4456 section 6), leaks (RFC 9234 section 5).
    fn may_pass(&self, best: &Best, from: Option<&PeerConfig>) -> bool {
        let communities = &best.attributes.communities;
        let is_within = self.is_internal();
        if communities.contains(&NO_ADVERTISE)
            || (!is_within
                && [NO_EXPORT, NO_EXPORT_SUBCONFED]
                    .iter()
                    .any(|each| communities.contains(each)))
        {
            return false;
        }
        let sells = matches!(self.peer.role, Some(Role::Provider | Role::RouteServer));
        if !is_within
            && self.peer.role.is_some()
            && !sells
            && best.attributes.only_to_customer.is_some()
        {
            return false;
        }
        let Some(from) = from else { return true };
        let came_from_within = from.asn == from.local_asn.unwrap_or(self.speaker.asn);
        let is_reflected = from.is_reflector_client || self.peer.is_reflector_client;
        !(is_within && came_from_within) || is_reflected
    }

    /// The attributes with which a route goes out. `from` is the peer that sent it, with its BGP
    /// identifier. None if we have no next hop that the peer could use.
    pub(crate) fn outgoing(
        &self,
        attributes: &Attributes,
        family: Family,
        from: Option<(&PeerConfig, std::net::Ipv4Addr)>,
        operations: &[RouteOperation],
    ) -> Option<Attributes> {
        let mut out = attributes.clone();
        let mut unused = 0;
        for operation in operations {
            filter::apply(operation, &mut out, &mut unused);
        }
        out.communities
            .extend(self.peer.communities.iter().copied());
        out.next_hop = self.outgoing_next_hop(attributes, family, from.is_some())?;
        if self.is_internal() {
            out.local_pref = Some(out.local_pref.unwrap_or(DEFAULT_LOCAL_PREF));
            let within =
                from.filter(|(from, _)| from.asn == from.local_asn.unwrap_or(self.speaker.asn));
            if let Some((_, router_id)) = within {
                out.originator_id.get_or_insert(router_id);
                out.cluster_list.insert(0, self.cluster_id());
            }
            return Some(out);
        }
        out.as_path.prepend(&[self.local_asn()]);
        out.local_pref = None;
        out.originator_id = None;
        out.cluster_list.clear();
        if from.is_some() {
            // It is not for the systems beyond the neighbouring one (RFC 4271 section 5.1.4).
            out.med = None;
        }
        let marks = matches!(
            self.peer.role,
            Some(Role::Provider | Role::RouteServer | Role::Peer)
        );
        if marks {
            out.only_to_customer.get_or_insert(self.local_asn());
        }
        Some(out)
    }

    fn outgoing_next_hop(
        &self,
        attributes: &Attributes,
        family: Family,
        is_from_peer: bool,
    ) -> Option<NextHop> {
        let keeps = match self.peer.next_hop_mode {
            NextHopMode::Own => false,
            NextHopMode::Keep => true,
            NextHopMode::Auto => self.is_internal(),
        };
        if !keeps || !is_from_peer {
            return self.own_next_hop(family).map(NextHop::from);
        }
        let address = attributes.next_hop.address;
        let is_foreign = family == Family::Ipv4 && address.is_ipv6() && !self.extended_next_hop;
        // A link-local address means another link to others (RFC 2545 section 3).
        (!is_foreign).then(|| NextHop::from(address))
    }

    /// Peer's routes must begin with its number, where that is asked for.
    pub(crate) fn has_wrong_first_as(&self, attributes: &Attributes) -> bool {
        let first = attributes.as_path.neighbor();
        self.peer.enforce_first_as && !self.is_internal() && first != Some(self.peer.asn)
    }
}
