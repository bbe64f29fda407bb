//! The node's copy of its view: frames from typha become the state that everything is planned from.
//!
//! What is marked dirty depends on the records held, never on how they arrived: a frame that
//! repeats held records marks nothing dirty.

use std::collections::{BTreeMap, BTreeSet};

use margay_calc::digest;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{IpSetRecord, Record, RecordId, SetId, SetKind};
use margay_dataplane::Dirty;
use margay_proto::sync::{Change, Frame, Versions};

/// A change that cannot be applied to the records held; the stream must be reopened with a new
/// hello.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ViewError {
    /// Members for a set that is not held.
    #[error(
        "received members of set {0}, which this node does not hold; the view is requested again"
    )]
    UnknownSet(SetId),
    /// Members of a kind other than the set's.
    #[error(
        "received members of kind {got:?} for set {set}, which holds {held:?}; the view is \
         requested again"
    )]
    SetKind {
        /// The set.
        set: SetId,
        /// Kind of the set.
        held: SetKind,
        /// Kind of the members.
        got: SetKind,
    },
}

/// The records of the node's view.
#[derive(Clone, Debug, Default)]
pub struct State {
    records: BTreeMap<RecordId, Record>,
    revision: u64,
    in_sync: bool,
    /// Number of changes of records that every node holds.
    global_changes: u64,
    versions: Versions,
    resend: Resend,
    dirty: Dirty,
    /// IP sets removed since `take_dirty`, with the member changes not yet taken: a removal and
    /// re-add in one batch then costs a member delta, not a new kernel set.
    removed_sets: BTreeMap<SetId, (IpSetRecord, MemberDelta)>,
}

/// What a hello says of the records held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Digests of the buckets; empty if nothing is held.
    pub buckets: Vec<u64>,
    /// Versions of the API that the records take into account.
    pub versions: Versions,
}

/// Buckets that the server is resending, and the records received of them so far.
#[derive(Clone, Debug, Default)]
struct Resend {
    buckets: BTreeSet<u32>,
    received: BTreeSet<RecordId>,
}

impl State {
    /// A state with these records, all dirty and not in sync.
    pub fn with_records(records: BTreeMap<RecordId, Record>) -> Self {
        let dirty = Dirty {
            records: records.keys().cloned().collect(),
            members: BTreeMap::new(),
        };
        Self {
            records,
            dirty,
            ..Self::default()
        }
    }

    /// All records.
    pub fn records(&self) -> &BTreeMap<RecordId, Record> {
        &self.records
    }

    /// Newest revision applied.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Number of changes so far of records that every node holds: what is computed from these alone
    /// holds as long as it stays the same.
    pub fn global_changes(&self) -> u64 {
        self.global_changes
    }

    /// Whether a server has declared the view complete since the last [`State::disconnect`].
    pub fn is_in_sync(&self) -> bool {
        self.in_sync
    }

    /// What the agent holds, for a hello.
    pub fn held(&self) -> Held {
        Held {
            buckets: self.buckets(),
            versions: self.versions.clone(),
        }
    }

    /// Drains what changed since the last call.
    pub fn take_dirty(&mut self) -> Dirty {
        self.removed_sets.clear();
        std::mem::take(&mut self.dirty)
    }

    /// Bucket digests for a hello; empty when nothing is held.
    pub fn buckets(&self) -> Vec<u64> {
        if self.records.is_empty() {
            Vec::new()
        } else {
            digest::buckets(&self.records).to_vec()
        }
    }

    /// Handles the end of the stream: records stay, and buckets that were being resent are not
    /// swept.
    pub fn disconnect(&mut self) {
        self.in_sync = false;
        self.resend = Resend::default();
    }

    /// Applies a frame. After an error it is applied in part, and the stream must be reopened.
    pub fn apply(&mut self, frame: Frame) -> Result<(), ViewError> {
        self.resend.buckets.extend(&frame.trailer.restated_buckets);
        for change in frame.changes {
            match change {
                Change::Upsert(id, record) => self.upsert(id, record),
                Change::Remove(id) => self.remove(&id),
                Change::Members(set, kind, delta) => self.apply_members(set, kind, delta)?,
            }
        }
        self.revision = frame.trailer.revision;
        // Older ones too, when the API has gone back.
        self.versions.extend(frame.trailer.versions);
        if frame.trailer.in_sync {
            self.sweep();
            self.in_sync = true;
        }
        Ok(())
    }

    fn upsert(&mut self, id: RecordId, record: Record) {
        if !self.in_sync {
            self.resend.received.insert(id.clone());
        }
        if let (RecordId::IpSet(set), Record::IpSet(new)) = (&id, &record) {
            self.restore_set(set, new.kind);
        }
        if let (RecordId::IpSet(set), Record::IpSet(new)) = (&id, &record)
            && let Some(Record::IpSet(old)) = self.records.get(&id)
            && old.kind == new.kind
        {
            // A resent set differs in few members if any, and only those are programmed.
            let set = set.clone();
            let delta = difference(old, new);
            delta
                .added
                .into_iter()
                .for_each(|member| self.dirty.mark_member(&set, member, true));
            delta
                .removed
                .into_iter()
                .for_each(|member| self.dirty.mark_member(&set, member, false));
        } else if self.records.get(&id) != Some(&record) {
            self.global_changes += u64::from(id.is_global());
            self.dirty.mark(id.clone());
        }
        self.records.insert(id, record);
    }

    fn remove(&mut self, id: &RecordId) {
        self.resend.received.remove(id);
        let Some(record) = self.records.remove(id) else {
            return;
        };
        self.global_changes += u64::from(id.is_global());
        if let (RecordId::IpSet(set), Record::IpSet(record)) = (id, record)
            && !self.dirty.records.contains(id)
        {
            let pending_members = self.dirty.members.remove(set).unwrap_or_default();
            self.removed_sets
                .insert(set.clone(), (record, pending_members));
        }
        self.dirty.records.insert(id.clone());
    }

    /// Restores a set that was removed since `take_dirty`, as if it had stayed.
    fn restore_set(&mut self, set: &SetId, kind: SetKind) {
        let Some((record, pending_members)) = self
            .removed_sets
            .remove(set)
            .filter(|(record, _)| record.kind == kind)
        else {
            return;
        };
        let id = RecordId::IpSet(set.clone());
        self.dirty.records.remove(&id);
        self.records.insert(id, Record::IpSet(record));
        if pending_members != MemberDelta::default() {
            self.dirty.members.insert(set.clone(), pending_members);
        }
    }

    fn apply_members(
        &mut self,
        set: SetId,
        kind: SetKind,
        delta: MemberDelta,
    ) -> Result<(), ViewError> {
        let Some(Record::IpSet(record)) = self.records.get_mut(&RecordId::IpSet(set.clone()))
        else {
            return Err(ViewError::UnknownSet(set));
        };
        if record.kind != kind {
            return Err(ViewError::SetKind {
                set,
                held: record.kind,
                got: kind,
            });
        }
        for member in delta.removed {
            if record.members.remove(&member) {
                self.dirty.mark_member(&set, member, false);
            }
        }
        for member in delta.added {
            if record.members.insert(member.clone()) {
                self.dirty.mark_member(&set, member, true);
            }
        }
        Ok(())
    }

    /// Removes records of resent buckets that the server did not send again. Only a complete resend
    /// may remove: before `in_sync` the rest may still come.
    fn sweep(&mut self) {
        let Resend { buckets, received } = std::mem::take(&mut self.resend);
        if buckets.is_empty() {
            return;
        }
        let stale = self
            .records
            .keys()
            .filter(|id| !received.contains(*id) && buckets.contains(&digest::bucket(id)));
        let stale: Vec<RecordId> = stale.cloned().collect();
        for id in stale {
            self.remove(&id);
        }
    }
}

fn difference(old: &IpSetRecord, new: &IpSetRecord) -> MemberDelta {
    MemberDelta {
        added: new.members.difference(&old.members).cloned().collect(),
        removed: old.members.difference(&new.members).cloned().collect(),
    }
}

#[cfg(test)]
mod tests;
