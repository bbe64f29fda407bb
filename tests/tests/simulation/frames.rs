//! Frames as a node must get them: each once, in order, complete, and with what a record refers to
//! before the record.

use std::collections::BTreeSet;

use margay_calc::digest;
use margay_calc::model::{Record, RecordId, SideMatch};
use margay_proto::sync::{Change, Frame, Joiner, Versions, wire};
use prost::Message;

use crate::oracle::Records;

/// What a node holds after the frames that it got.
#[derive(Default)]
pub struct Mirror {
    records: Records,
    parts: Joiner,
    /// Revision of the last frame of the stream.
    revision: u64,
    is_in_sync: bool,
    /// Versions of the API in the hello.
    versions: Versions,
    /// Changes of the first frame of the stream.
    pub resent: usize,
}

impl Mirror {
    /// A stream of a node that holds these.
    pub fn of(records: Records, versions: Versions) -> Self {
        Self {
            records,
            versions,
            ..Self::default()
        }
    }

    /// Takes a message; returns the revision of the frame that it completes.
    pub fn take(&mut self, message: &[u8]) -> Result<Option<u64>, String> {
        let part = wire::Frame::decode(message).map_err(|error| error.to_string())?;
        match self.parts.push(part).map_err(|error| error.to_string())? {
            Some(frame) => self.apply(frame).map(Some),
            None => Ok(None),
        }
    }

    fn apply(&mut self, frame: Frame) -> Result<u64, String> {
        let Frame { changes, trailer } = frame;
        if trailer.revision <= self.revision {
            return Err(format!(
                "frame {} comes after frame {}",
                trailer.revision, self.revision
            ));
        }
        if self.is_in_sync == trailer.in_sync {
            return Err(format!(
                "frame {} is not the one that completes the view",
                trailer.revision
            ));
        }
        self.revision = trailer.revision;
        check_order(&changes)?;
        let mut sent = BTreeSet::new();
        let is_first = trailer.in_sync;
        if is_first {
            self.resent = changes.len();
            self.check_versions(&trailer.versions)?;
        }
        for change in changes {
            self.change(
                change,
                is_first.then_some(&mut sent),
                &trailer.restated_buckets,
            )?;
        }
        if is_first {
            self.is_in_sync = true;
            let buckets = &trailer.restated_buckets;
            self.records
                .retain(|id, _| sent.contains(id) || !buckets.contains(&digest::bucket(id)));
        }
        let dangling = self
            .records
            .iter()
            .find_map(|(id, record)| Some((id, missing(&self.records, record)?)));
        match dangling {
            Some((id, other)) => Err(format!(
                "after frame {}, {id:?} refers to {other:?}, which is gone",
                trailer.revision
            )),
            None => Ok(trailer.revision),
        }
    }

    /// The server must know at least what the node knew.
    fn check_versions(&self, known: &Versions) -> Result<(), String> {
        let older = self.versions.iter().find_map(|(kind, held)| {
            let version = known.get(kind).filter(|version| *version < held)?;
            Some(format!(
                "the view goes back from version {held} of {kind} to {version}"
            ))
        });
        older.map_or(Ok(()), Err)
    }

    fn change(
        &mut self,
        change: Change,
        sent: Option<&mut BTreeSet<RecordId>>,
        buckets: &[u32],
    ) -> Result<(), String> {
        match change {
            Change::Upsert(id, record) => {
                if let Some(other) = missing(&self.records, &record) {
                    return Err(format!("{id:?} comes before {other:?}, which it refers to"));
                }
                if let Some(sent) = sent {
                    if !buckets.contains(&digest::bucket(&id)) {
                        return Err(format!("{id:?} is of a bucket that is not resent"));
                    }
                    sent.insert(id.clone());
                }
                self.records.insert(id, record);
            }
            Change::Remove(id) => {
                if self.records.remove(&id).is_none() {
                    return Err(format!("{id:?} is removed and was not there"));
                }
            }
            Change::Members(set, _, delta) => {
                let id = RecordId::IpSet(set);
                let Some(Record::IpSet(held)) = self.records.get_mut(&id) else {
                    return Err(format!("members of {id:?}, which is not there"));
                };
                if !delta.added.is_disjoint(&held.members)
                    || !delta.removed.is_subset(&held.members)
                {
                    return Err(format!("members of {id:?} come or go twice"));
                }
                held.members
                    .retain(|member| !delta.removed.contains(member));
                held.members.extend(delta.added);
            }
        }
        Ok(())
    }
}

/// Additions ascend, and removals follow and descend.
fn check_order(changes: &[Change]) -> Result<(), String> {
    let id = |change: &Change| match change {
        Change::Upsert(id, _) | Change::Remove(id) => id.clone(),
        Change::Members(set, _, _) => RecordId::IpSet(set.clone()),
    };
    for (former, next) in changes.iter().zip(changes.iter().skip(1)) {
        let is_ordered = match (former, next) {
            (Change::Remove(former), Change::Remove(next)) => former > next,
            (Change::Remove(_), _) => false,
            (_, Change::Remove(_)) => true,
            (former, next) => id(former) < id(next),
        };
        if !is_ordered {
            return Err(format!("{:?} before {:?}", id(former), id(next)));
        }
    }
    Ok(())
}

/// A record that this one refers to and that is not there.
fn missing(records: &Records, record: &Record) -> Option<RecordId> {
    let lacks = |id: RecordId| (!records.contains_key(&id)).then_some(id);
    match record {
        Record::Policy(policy) => {
            let sides = policy
                .ingress
                .iter()
                .chain(&policy.egress)
                .flat_map(|rule| [&rule.source, &rule.destination]);
            let sets = sides.flat_map(|side: &SideMatch| {
                let nets = side
                    .sets
                    .iter()
                    .chain(&side.not_sets)
                    .chain(&side.not_port_sets);
                nets.chain(side.port_sets.iter()).chain(&side.service_set)
            });
            sets.cloned().find_map(|set| lacks(RecordId::IpSet(set)))
        }
        Record::Endpoint(endpoint) => {
            let policies = endpoint
                .tiers
                .iter()
                .flat_map(|tier| tier.ingress.iter().chain(&tier.egress));
            policies
                .cloned()
                .find_map(|policy| lacks(RecordId::Policy(policy)))
        }
        _ => None,
    }
}
