//! What changed in a node's view since it was last asked.

use std::collections::{BTreeMap, BTreeSet};

use margay_calc::flush::MemberDelta;
use margay_calc::model::{Member, RecordId, SetId};

/// Changes of a view, without their values: those are in the view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Records that came, went or have another value.
    pub records: BTreeSet<RecordId>,
    /// Members that came and went, of sets that are not in `records`: net of what cancelled out.
    pub members: BTreeMap<SetId, MemberDelta>,
}

impl Dirty {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.members.is_empty()
    }

    /// Notes that a record came, went or has another value.
    pub fn mark(&mut self, id: RecordId) {
        if let RecordId::IpSet(set) = &id {
            self.members.remove(set);
        }
        self.records.insert(id);
    }

    /// Notes one member that came or went; twice the other way round is nothing.
    pub fn mark_member(&mut self, set: &SetId, member: Member, came: bool) {
        if self.records.contains(&RecordId::IpSet(set.clone())) {
            return;
        }
        let delta = self.members.entry(set.clone()).or_default();
        let (here, there) =
            if came { (&mut delta.added, &mut delta.removed) } else { (&mut delta.removed, &mut delta.added) };
        if !there.remove(&member) {
            here.insert(member);
        }
        if delta.added.is_empty() && delta.removed.is_empty() {
            self.members.remove(set);
        }
    }
}
