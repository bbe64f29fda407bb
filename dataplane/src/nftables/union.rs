//! Unions of sets of the view. They are stored with their members: whether a member leaves a union
//! depends on its other parts.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use margay_api::rule::Protocol;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{IpSetRecord, Member, Record, RecordId, SetId, SetKind};

use super::merge::Parts;

type Records = BTreeMap<RecordId, Record>;

/// Union used by a class.
#[derive(Debug)]
pub(super) struct Union {
    parts: Parts,
    /// The union as a set.
    pub(super) record: IpSetRecord,
}

/// Members of a set of the view.
fn set_members<'a>(records: &'a Records, id: &SetId) -> Option<&'a BTreeSet<Member>> {
    match records.get(&RecordId::IpSet(id.clone())) {
        Some(Record::IpSet(record)) => Some(&record.members),
        _ => None,
    }
}

/// Combines a single address with each port. A range cannot be combined with ports in one element;
/// a set that has one leaves the union before its members are read.
fn with_ports<'a>(
    member: &Member,
    ports: impl IntoIterator<Item = &'a (Protocol, u16)>,
) -> impl Iterator<Item = Member> {
    let single = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    let address = if let Member::Net(net) = member {
        Some(net).filter(|net| single(net)).map(IpNet::addr)
    } else {
        None
    };
    let ports = ports.into_iter();
    ports.filter_map(move |(protocol, port)| Some(Member::AddressPort(address?, *protocol, *port)))
}

impl Union {
    /// Builds the union of sets of the view.
    pub(super) fn new(parts: Parts, records: &Records) -> Self {
        let record = match &parts {
            Parts::Addresses(sets) => {
                let all = sets
                    .iter()
                    .filter_map(|id| set_members(records, id))
                    .flatten()
                    .cloned();
                IpSetRecord {
                    kind: SetKind::Net,
                    members: all.collect(),
                }
            }
            Parts::Ports(sets) => {
                let all = sets
                    .iter()
                    .filter_map(|(id, ports)| Some((set_members(records, id)?, ports)));
                let all = all.flat_map(|(members, ports)| {
                    members.iter().flat_map(move |one| with_ports(one, ports))
                });
                IpSetRecord {
                    kind: SetKind::AddressPort,
                    members: all.collect(),
                }
            }
        };
        Self { parts, record }
    }

    /// Whether a set is part of the union.
    pub(super) fn contains_set(&self, id: &SetId) -> bool {
        self.parts.contains(id)
    }

    /// Applies a member change of one part, already in the records; returns the change of the
    /// union.
    pub(super) fn apply_change(
        &mut self,
        id: &SetId,
        delta: &MemberDelta,
        records: &Records,
    ) -> MemberDelta {
        let mut own = MemberDelta::default();
        let wanted = |members: &BTreeSet<Member>| -> Vec<Member> {
            members
                .iter()
                .flat_map(|member| self.union_members(id, member))
                .collect()
        };
        let (removed, added) = (wanted(&delta.removed), wanted(&delta.added));
        for member in removed {
            if !self.is_in_other_part(&member, records) && self.record.members.remove(&member) {
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

    /// Members of the union that a member of a part stands for.
    fn union_members(&self, id: &SetId, member: &Member) -> Vec<Member> {
        match &self.parts {
            Parts::Addresses(_) => vec![member.clone()],
            Parts::Ports(sets) => with_ports(member, sets.get(id).into_iter().flatten()).collect(),
        }
    }

    /// Whether another part still has this member.
    fn is_in_other_part(&self, member: &Member, records: &Records) -> bool {
        let has = |id: &SetId, member: &Member| {
            set_members(records, id).is_some_and(|members| members.contains(member))
        };
        match (&self.parts, member) {
            (Parts::Addresses(sets), _) => sets.iter().any(|id| has(id, member)),
            (Parts::Ports(sets), Member::AddressPort(address, protocol, port)) => {
                let single = Member::Net(IpNet::from(*address));
                sets.iter()
                    .any(|(id, ports)| ports.contains(&(*protocol, *port)) && has(id, &single))
            }
            (Parts::Ports(_), Member::Net(_)) => false,
        }
    }
}
