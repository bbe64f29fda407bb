//! Kernel sets of the view's sets and of their unions.

use std::collections::BTreeMap;

use margay_calc::flush::MemberDelta;
use margay_calc::model::{IpSetRecord, Member, RecordId, SetId};

use super::delta::TableDelta;
use super::{Classes, Compiler, Records, TablePart, UNION_PART, view_set};
use crate::Dirty;
use crate::nftables::elements::{self, Shape};
use crate::nftables::merge::Unions;
use crate::nftables::union::Union;
use margay_nft::Set;

impl Compiler {
    /// Applies added, changed and removed sets and member changes; classes to be compiled again are
    /// added to `stale`.
    pub(super) fn update_sets(
        &mut self,
        records: &Records,
        dirty: &Dirty,
        delta: &mut TableDelta,
        stale: &mut Classes,
    ) {
        let changed = dirty.records.iter().filter_map(|id| {
            if let RecordId::IpSet(id) = id {
                Some(id)
            } else {
                None
            }
        });
        for id in changed {
            self.refused.remove(&TablePart::Set(id.clone()));
            self.replace_kernel_sets(id, view_set(records, id), delta);
            stale.extend(self.classes_using(id));
        }
        let mut joined: BTreeMap<SetId, MemberDelta> = BTreeMap::new();
        for (id, members) in &dirty.members {
            let Some(record) = view_set(records, id) else {
                continue;
            };
            let before = record.members.len() + members.removed.len() - members.added.len();
            if self.update_members(id, record, members, delta)
                || (before > UNION_PART) != (record.members.len() > UNION_PART)
            {
                stale.extend(self.classes_using(id));
            }
            for (union, state) in self
                .unions
                .iter_mut()
                .filter(|(_, state)| state.contains_set(id))
            {
                let own = state.apply_change(id, members, records);
                let all = joined.entry(union.clone()).or_default();
                all.added.extend(own.added);
                all.removed.extend(own.removed);
            }
        }
        for (id, members) in joined {
            let Some(union) = self.unions.remove(&id) else {
                continue;
            };
            if self.update_members(&id, &union.record, &members, delta) {
                stale.extend(self.classes_using(&id));
            }
            self.unions.insert(id, union);
        }
    }

    /// Applies a member change to the kernel sets; returns whether the shape changed.
    fn update_members(
        &mut self,
        id: &SetId,
        record: &IpSetRecord,
        members: &MemberDelta,
        delta: &mut TableDelta,
    ) -> bool {
        let Some(shape) = self.shapes.get(id).copied() else {
            return false;
        };
        let ranged = |member: &Member| {
            matches!(
                member,
                Member::Net(net) if net.prefix_len() < net.max_prefix_len(),
            )
        };
        let touched = members.added.iter().chain(&members.removed).any(ranged);
        let kept = shape.sets(id);
        let reshaped = touched && Shape::of(record) != shape;
        if reshaped {
            self.replace_kernel_sets(id, Some(record), delta);
        }
        let now = self
            .shapes
            .get(id)
            .map(|shape| shape.sets(id))
            .unwrap_or_default();
        for (name, keys) in elements::change_elements(id, &record.members, members) {
            if let (Some(kind), true) = (kept.get(&name), now.contains_key(&name)) {
                delta.elements.insert(name, (kind.clone(), keys));
            }
        }
        reshaped
    }

    /// Replaces the kernel sets of a set by those of the record.
    pub(super) fn replace_kernel_sets(
        &mut self,
        id: &SetId,
        record: Option<&IpSetRecord>,
        delta: &mut TableDelta,
    ) {
        let before = self
            .shapes
            .remove(id)
            .map(|shape| shape.sets(id))
            .unwrap_or_default();
        let mut wanted = record
            .map(|record| elements::render(id, record))
            .unwrap_or_default();
        for (name, kind) in before {
            if wanted.remove(&name).is_none() {
                delta.elements.remove(&name);
                if delta.new.sets.remove(&name).is_none() {
                    delta.old.put_set(name, Set::new(kind));
                }
            }
        }
        for (name, set) in wanted {
            delta.new.put_set(name, set);
        }
        if let Some(record) = record {
            self.shapes.insert(id.clone(), Shape::of(record));
        }
    }

    /// Creates the unions that classes use and removes the others. Called once, last: a union that
    /// is removed and added again in one call must not be rebuilt with old members.
    pub(super) fn update_unions(&mut self, records: &Records, delta: &mut TableDelta) {
        let used: BTreeMap<&SetId, _> = self
            .classes
            .values()
            .flat_map(|state| &state.unions)
            .collect();
        let gone: Vec<SetId> = self
            .unions
            .keys()
            .filter(|id| !used.contains_key(id))
            .cloned()
            .collect();
        let new = used
            .into_iter()
            .filter(|(id, _)| !self.unions.contains_key(*id));
        let new: Unions = new.map(|(id, parts)| (id.clone(), parts.clone())).collect();
        for id in gone {
            self.unions.remove(&id);
            self.refused.remove(&TablePart::Set(id.clone()));
            self.replace_kernel_sets(&id, None, delta);
        }
        for (id, parts) in new {
            let union = Union::new(parts, records);
            self.replace_kernel_sets(&id, Some(&union.record), delta);
            self.unions.insert(id, union);
        }
    }
}
