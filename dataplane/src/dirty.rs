//! Changes of a node's view since the last update of the dataplane.

use std::collections::{BTreeMap, BTreeSet};

use margay_calc::flush::MemberDelta;
use margay_calc::model::{Member, RecordId, SetId};

/// Changes of a view, without values, which are in the view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Records added, changed or removed.
    pub records: BTreeSet<RecordId>,
    /// Net member changes of sets that are not in `records`.
    pub members: BTreeMap<SetId, MemberDelta>,
}

impl Dirty {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.members.is_empty()
    }

    /// Marks a record as added, changed or removed.
    pub fn mark(&mut self, id: RecordId) {
        if let RecordId::IpSet(set) = &id {
            self.members.remove(set);
        }
        self.records.insert(id);
    }

    /// Marks a member as added or removed; the two cancel out.
    pub fn mark_member(&mut self, set: &SetId, member: Member, came: bool) {
        if self.records.contains(&RecordId::IpSet(set.clone())) {
            return;
        }
        let delta = self.members.entry(set.clone()).or_default();
        let (here, there) = if came {
            (&mut delta.added, &mut delta.removed)
        } else {
            (&mut delta.removed, &mut delta.added)
        };
        if !there.remove(&member) {
            here.insert(member);
        }
        if delta.added.is_empty() && delta.removed.is_empty() {
            self.members.remove(set);
        }
    }
}
