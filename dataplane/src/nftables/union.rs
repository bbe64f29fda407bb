//! Unions of sets of the view: kept with their members, since the members of its parts say what changes in a union only together.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use margay_api::rule::Protocol;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{IpSetRecord, Member, Record, RecordId, SetId, SetKind};

use super::merge::Parts;

type Records = BTreeMap<RecordId, Record>;

/// A union that a class uses.
#[derive(Debug)]
pub(super) struct Union {
    parts: Parts,
    /// It as a set.
    pub(super) record: IpSetRecord,
}

/// The members of a set of the view.
fn members<'a>(records: &'a Records, id: &SetId) -> Option<&'a BTreeSet<Member>> {
    match records.get(&RecordId::IpSet(id.clone())) {
        Some(Record::IpSet(record)) => Some(&record.members),
        _ => None,
    }
}

/// A single address with each of these ports. A range cannot be kept with ports; a set that has one leaves the union before anything looks at it.
fn with_ports<'a>(
    member: &Member,
    ports: impl IntoIterator<Item = &'a (Protocol, u16)>,
) -> impl Iterator<Item = Member> {
    let single = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    let address =
        if let Member::Net(net) = member { Some(net).filter(|net| single(net)).map(IpNet::addr) } else { None };
    let ports = ports.into_iter();
    ports.filter_map(move |(protocol, port)| Some(Member::AddressPort(address?, *protocol, *port)))
}

impl Union {
    /// The union of these sets as they are now.
    pub(super) fn new(parts: Parts, records: &Records) -> Self {
        let record = match &parts {
            Parts::Addresses(sets) => {
                let all = sets.iter().filter_map(|id| members(records, id)).flatten().cloned();
                IpSetRecord { kind: SetKind::Net, members: all.collect() }
            }
            Parts::Ports(sets) => {
                let all = sets.iter().filter_map(|(id, ports)| Some((members(records, id)?, ports)));
                let all = all.flat_map(|(members, ports)| members.iter().flat_map(move |one| with_ports(one, ports)));
                IpSetRecord { kind: SetKind::AddressPort, members: all.collect() }
            }
        };
        Self { parts, record }
    }

    /// Whether it is of this set, among others.
    pub(super) fn is_of(&self, id: &SetId) -> bool {
        self.parts.contains(id)
    }

    /// Follows a change of one of its sets, which the records show already; returns what changed in the union.
    pub(super) fn follow(&mut self, id: &SetId, delta: &MemberDelta, records: &Records) -> MemberDelta {
        let mut own = MemberDelta::default();
        let wanted = |members: &BTreeSet<Member>| -> Vec<Member> {
            members.iter().flat_map(|member| self.wanted(id, member)).collect()
        };
        let (removed, added) = (wanted(&delta.removed), wanted(&delta.added));
        for member in removed {
            if !self.is_elsewhere(&member, records) && self.record.members.remove(&member) {
                own.removed.insert(member);
            }
        }
        for member in added {
            if self.record.members.insert(member.clone()) {
                own.added.insert(member);
            }
        }
        own
    }

    /// What a member of one of the sets is in the union.
    fn wanted(&self, id: &SetId, member: &Member) -> Vec<Member> {
        match &self.parts {
            Parts::Addresses(_) => vec![member.clone()],
            Parts::Ports(sets) => with_ports(member, sets.get(id).into_iter().flatten()).collect(),
        }
    }

    /// Whether some set still puts this into the union.
    fn is_elsewhere(&self, member: &Member, records: &Records) -> bool {
        let has = |id: &SetId, member: &Member| members(records, id).is_some_and(|members| members.contains(member));
        match (&self.parts, member) {
            (Parts::Addresses(sets), _) => sets.iter().any(|id| has(id, member)),
            (Parts::Ports(sets), Member::AddressPort(address, protocol, port)) => {
                let single = Member::Net(IpNet::from(*address));
                sets.iter().any(|(id, ports)| ports.contains(&(*protocol, *port)) && has(id, &single))
            }
            (Parts::Ports(_), Member::Net(_)) => false,
        }
    }
}
