//! Pending changes for one node, coalesced per record: a state machine without I/O.
//!
//! A session has no queue. For each record of which the node does not have the latest value it
//! holds the kind of change; when the node can receive a frame, it gets current values. A node that
//! does not read therefore costs at most its own view, and when it reads again it is one frame
//! behind.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use bytes::Bytes;
use margay_calc::digest::Buckets;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{RecordId, SetKind};

/// Maximal number of pending members of one set; with more the whole set is sent instead. Limits
/// the memory of a session that does not read.
const MAX_PENDING_MEMBERS: usize = 4096;

/// A change of members, encoded once for all nodes that get exactly this change.
#[derive(Debug)]
pub struct SharedDelta {
    /// Type of the members.
    pub kind: SetKind,
    /// Members added and removed.
    pub delta: MemberDelta,
    /// The encoded change.
    pub bytes: Bytes,
}

/// Pending change of one record.
#[derive(Debug, Clone)]
enum PendingChange {
    /// The node does not hold the record and needs its value.
    Gained,
    /// The node holds an old value and needs the current one.
    Value,
    /// The node holds the set as it was before this change of members.
    Members(Arc<SharedDelta>),
    /// Changes of members from several flushes; encoded when sent.
    Merged(SetKind, Box<MemberDelta>),
    /// The node holds the record and must drop it.
    Lost,
}

/// Encodes changes from the current state of the graph.
pub trait RecordSource {
    /// Encodes the current value of a record, if it exists.
    fn encode_value(&mut self, id: &RecordId) -> Option<Bytes>;
    /// Encodes a change of members.
    fn encode_members(&mut self, id: &RecordId, kind: SetKind, delta: &MemberDelta) -> Bytes;
    /// Encodes the removal of a record.
    fn encode_removal(&mut self, id: &RecordId) -> Bytes;
}

/// Pending changes for one node.
#[derive(Debug, Default)]
pub struct Session {
    pending: BTreeMap<Arc<RecordId>, PendingChange>,
}

impl Session {
    /// Marks a record that was added to the node's view.
    pub fn mark_gained(&mut self, id: &Arc<RecordId>) {
        match self.pending.entry(id.clone()) {
            Entry::Vacant(vacant) => {
                vacant.insert(PendingChange::Gained);
            }
            Entry::Occupied(mut entry) => {
                // Lost and gained again before it was sent: the node still holds an old value.
                if !matches!(entry.get(), PendingChange::Gained) {
                    entry.insert(PendingChange::Value);
                }
            }
        }
    }

    /// Marks a record whose value changed.
    pub fn mark_changed(&mut self, id: &Arc<RecordId>) {
        match self.pending.entry(id.clone()) {
            Entry::Occupied(entry) if matches!(entry.get(), PendingChange::Gained) => {}
            Entry::Occupied(mut entry) => {
                entry.insert(PendingChange::Value);
            }
            Entry::Vacant(vacant) => {
                vacant.insert(PendingChange::Value);
            }
        }
    }

    /// Adds a change of members.
    pub fn add_members(&mut self, id: &Arc<RecordId>, change: &Arc<SharedDelta>) {
        let Entry::Occupied(mut entry) = self.pending.entry(id.clone()) else {
            self.pending
                .insert(id.clone(), PendingChange::Members(change.clone()));
            return;
        };
        let merged = match entry.get_mut() {
            PendingChange::Gained | PendingChange::Value => return,
            // The node still holds the members that it had before.
            PendingChange::Lost => PendingChange::Value,
            PendingChange::Members(first) => {
                let mut merged = Box::new(first.delta.clone());
                merge(&mut merged, &change.delta);
                PendingChange::Merged(change.kind, merged)
            }
            PendingChange::Merged(kind, merged) => {
                merge(merged, &change.delta);
                PendingChange::Merged(*kind, std::mem::take(merged))
            }
        };
        let is_too_long =
            |delta: &MemberDelta| delta.added.len() + delta.removed.len() > MAX_PENDING_MEMBERS;
        let is_replaced = matches!(&merged, PendingChange::Merged(_, delta) if is_too_long(delta));
        entry.insert(if is_replaced {
            PendingChange::Value
        } else {
            merged
        });
    }

    /// Marks a record that was removed from the node's view.
    pub fn mark_lost(&mut self, id: &Arc<RecordId>) {
        match self.pending.entry(id.clone()) {
            Entry::Vacant(vacant) => {
                vacant.insert(PendingChange::Lost);
            }
            Entry::Occupied(entry) if matches!(entry.get(), PendingChange::Gained) => {
                // Never sent, so there is nothing to remove.
                entry.remove();
            }
            Entry::Occupied(mut entry) => {
                entry.insert(PendingChange::Lost);
            }
        }
    }

    /// Number of records with pending changes.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Drains all pending changes in the order in which they must be applied: a record after those
    /// that it refers to, removals last and in reverse order.
    pub fn drain(&mut self, records: &mut impl RecordSource) -> Vec<Bytes> {
        let mut removals = Vec::new();
        let mut changes = Vec::with_capacity(self.pending.len());
        for (id, change) in std::mem::take(&mut self.pending) {
            let bytes = match change {
                // `None` if the record has been removed since: it becomes a removal.
                PendingChange::Gained | PendingChange::Value => records.encode_value(&id),
                PendingChange::Members(shared) => Some(shared.bytes.clone()),
                PendingChange::Merged(_, delta)
                    if delta.added.is_empty() && delta.removed.is_empty() =>
                {
                    continue;
                }
                PendingChange::Merged(kind, delta) => {
                    Some(records.encode_members(&id, kind, &delta))
                }
                PendingChange::Lost => None,
            };
            match bytes {
                Some(bytes) => changes.push(bytes),
                None => removals.push(records.encode_removal(&id)),
            }
        }
        changes.extend(removals.into_iter().rev());
        changes
    }
}

/// Appends `second` to `first`.
fn merge(first: &mut MemberDelta, second: &MemberDelta) {
    for member in &second.added {
        if !first.removed.remove(member) {
            first.added.insert(member.clone());
        }
    }
    for member in &second.removed {
        if !first.added.remove(member) {
            first.removed.insert(member.clone());
        }
    }
}

/// Buckets that differ between a node's hello and its view, and must be sent in full. With another
/// number of buckets all of them differ.
pub fn differing_buckets(held: &[u64], wanted: &Buckets) -> Vec<u32> {
    let all = held.len() != wanted.len();
    let buckets = wanted.iter().enumerate();
    let differ = buckets.filter(|(index, digest)| all || held[*index] != **digest);
    differ.map(|(index, _)| index as u32).collect()
}
