//! What one node still has to be told: a state machine without I/O.
//!
//! A session keeps no queue. It keeps, per record that the node does not know the latest of, what kind of news there is;
//! when the node can take a frame it gets current values. So a node that does not read costs at most its own view, and
//! when it reads again it is one frame behind.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use bytes::Bytes;
use margay_calc::digest::Buckets;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{RecordId, SetKind};

/// Members that may be pending for one set before the whole set is sent instead: keeps a session that does not read small.
const MEMBERS: usize = 4096;

/// A change of members, encoded once for all nodes that are told exactly this.
#[derive(Debug)]
pub struct SharedDelta {
    /// What the members are.
    pub kind: SetKind,
    /// The members.
    pub delta: MemberDelta,
    /// The change as it travels.
    pub bytes: Bytes,
}

/// News of one record.
#[derive(Debug, Clone)]
enum Pending {
    /// The node does not hold the record and needs its value.
    Gained,
    /// The node holds a former value and needs the current one.
    Value,
    /// The node holds the set as it was before these members changed.
    Members(Arc<SharedDelta>),
    /// The same, from several flushes; encoded when it is sent.
    Merged(SetKind, Box<MemberDelta>),
    /// The node holds the record and must drop it.
    Lost,
}

/// What a session needs from whoever knows the records.
pub trait Records {
    /// The current value of a record as a change, if it exists.
    fn value(&mut self, id: &RecordId) -> Option<Bytes>;
    /// The change of these members.
    fn members(&mut self, id: &RecordId, kind: SetKind, delta: &MemberDelta) -> Bytes;
    /// The removal of a record.
    fn removal(&mut self, id: &RecordId) -> Bytes;
}

/// What one node still has to be told.
#[derive(Debug, Default)]
pub struct Session {
    pending: BTreeMap<Arc<RecordId>, Pending>,
}

impl Session {
    /// The record is new in the node's view.
    pub fn gained(&mut self, id: &Arc<RecordId>) {
        match self.pending.entry(id.clone()) {
            Entry::Vacant(none) => {
                none.insert(Pending::Gained);
            }
            Entry::Occupied(mut news) => {
                if !matches!(news.get(), Pending::Gained) {
                    news.insert(Pending::Value);
                }
            }
        }
    }

    /// The record has another value.
    pub fn changed(&mut self, id: &Arc<RecordId>) {
        self.gained_or(id, Pending::Value);
    }

    /// The set has other members.
    pub fn members(&mut self, id: &Arc<RecordId>, change: &Arc<SharedDelta>) {
        let Entry::Occupied(mut news) = self.pending.entry(id.clone()) else {
            self.pending.insert(id.clone(), Pending::Members(change.clone()));
            return;
        };
        let merged = match news.get_mut() {
            Pending::Gained | Pending::Value => return,
            Pending::Lost => Pending::Value,
            Pending::Members(first) => {
                let mut merged = Box::new(first.delta.clone());
                merge(&mut merged, &change.delta);
                Pending::Merged(change.kind, merged)
            }
            Pending::Merged(kind, merged) => {
                merge(merged, &change.delta);
                Pending::Merged(*kind, std::mem::take(merged))
            }
        };
        let long = matches!(&merged, Pending::Merged(_, delta) if delta.added.len() + delta.removed.len() > MEMBERS);
        news.insert(if long { Pending::Value } else { merged });
    }

    /// The record is not in the node's view any more.
    pub fn lost(&mut self, id: &Arc<RecordId>) {
        match self.pending.entry(id.clone()) {
            Entry::Vacant(none) => {
                none.insert(Pending::Lost);
            }
            Entry::Occupied(news) if matches!(news.get(), Pending::Gained) => {
                news.remove();
            }
            Entry::Occupied(mut news) => {
                news.insert(Pending::Lost);
            }
        }
    }

    /// Records that the node does not know the latest of.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Everything that the node does not know, in the order in which it may be applied: what is referred to first, then
    /// what refers to it, removals the other way round. Afterwards nothing is pending.
    pub fn take(&mut self, records: &mut impl Records) -> Vec<Bytes> {
        let mut removals = Vec::new();
        let mut changes = Vec::with_capacity(self.pending.len());
        for (id, news) in std::mem::take(&mut self.pending) {
            let change = match news {
                Pending::Gained | Pending::Value => records.value(&id),
                Pending::Members(shared) => Some(shared.bytes.clone()),
                Pending::Merged(_, delta) if delta.added.is_empty() && delta.removed.is_empty() => {
                    continue;
                }
                Pending::Merged(kind, delta) => Some(records.members(&id, kind, &delta)),
                Pending::Lost => None,
            };
            match change {
                Some(change) => changes.push(change),
                None => removals.push(records.removal(&id)),
            }
        }
        changes.extend(removals.into_iter().rev());
        changes
    }

    fn gained_or(&mut self, id: &Arc<RecordId>, news: Pending) {
        match self.pending.entry(id.clone()) {
            Entry::Occupied(known) if matches!(known.get(), Pending::Gained) => {}
            Entry::Occupied(mut known) => {
                known.insert(news);
            }
            Entry::Vacant(none) => {
                none.insert(news);
            }
        }
    }
}

/// `first`, then `second`.
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

/// Which buckets a node must be told in full, given what it says it holds and what it should hold.
/// A node that speaks of another number of buckets is told everything.
pub fn differing(held: &[u64], wanted: &Buckets) -> Vec<u32> {
    let all = held.len() != wanted.len();
    let buckets = wanted.iter().enumerate();
    let differ = buckets.filter(|(index, digest)| all || held[*index] != **digest);
    differ.map(|(index, _)| index as u32).collect()
}
