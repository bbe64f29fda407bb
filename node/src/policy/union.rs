//! Unions of sets of the view: kept with their members, since the members of its parts say what changes in a union only together.

use std::collections::{BTreeMap, BTreeSet};

use margay_calc::flush::MemberDelta;
use margay_calc::model::{IpSetRecord, Member, Record, RecordId, SetId, SetKind};

/// A union that a class uses.
#[derive(Debug)]
pub(super) struct Union {
    /// The sets that it is of.
    pub(super) parts: BTreeSet<SetId>,
    /// It as a set.
    pub(super) record: IpSetRecord,
}

/// The members of a set of the view.
fn members<'a>(records: &'a BTreeMap<RecordId, Record>, id: &SetId) -> Option<&'a BTreeSet<Member>> {
    match records.get(&RecordId::IpSet(id.clone())) {
        Some(Record::IpSet(record)) => Some(&record.members),
        _ => None,
    }
}

impl Union {
    /// The union of these sets as they are now.
    pub(super) fn new(parts: BTreeSet<SetId>, records: &BTreeMap<RecordId, Record>) -> Self {
        let all = parts.iter().filter_map(|id| members(records, id)).flatten().cloned().collect();
        Self { parts, record: IpSetRecord { kind: SetKind::Net, members: all } }
    }

    /// Follows a change of one part, which the records show already; returns what changed in the union.
    pub(super) fn follow(&mut self, delta: &MemberDelta, records: &BTreeMap<RecordId, Record>) -> MemberDelta {
        let mut own = MemberDelta::default();
        for member in &delta.removed {
            let elsewhere =
                self.parts.iter().filter_map(|id| members(records, id)).any(|members| members.contains(member));
            if !elsewhere && self.record.members.remove(member) {
                own.removed.insert(member.clone());
            }
        }
        for member in &delta.added {
            if self.record.members.insert(member.clone()) {
                own.added.insert(member.clone());
            }
        }
        own
    }
}
