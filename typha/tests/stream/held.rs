//! Records of a simulated node, and the effect of a frame on them.

use std::collections::{BTreeMap, BTreeSet};

use margay_calc::digest;
use margay_calc::model::{Record, RecordId};
use margay_proto::sync::{Change, Frame, Joiner, wire};
use margay_typha::codec::FrameBytes;
use prost::Message;

/// Records of a node.
pub type Held = BTreeMap<RecordId, Record>;

/// Decodes a frame.
pub fn decode(bytes: &FrameBytes) -> Frame {
    let mut parts = Joiner::default();
    let mut frames = bytes
        .clone()
        .into_messages()
        .into_iter()
        .filter_map(|message| {
            let part = wire::Frame::decode(&*message.chunks().concat()).expect("a frame");
            parts.push(part).expect("a valid frame")
        });
    frames.next().expect("its last part")
}

/// Digests of records, as in a hello.
pub fn buckets(held: &Held) -> Vec<u64> {
    digest::buckets(held.iter()).to_vec()
}

/// Applies a frame, checking that its changes are consistent.
pub fn apply(held: &mut Held, frame: &Frame) {
    let mut sent = BTreeSet::new();
    for change in &frame.changes {
        match change {
            Change::Upsert(id, record) => {
                check_references(held, id, record);
                sent.insert(id.clone());
                held.insert(id.clone(), record.clone());
            }
            Change::Remove(id) => {
                held.remove(id);
            }
            Change::Members(set, _, delta) => {
                let id = RecordId::IpSet(set.clone());
                let Some(Record::IpSet(record)) = held.get_mut(&id) else {
                    panic!("members of {id:?}, which was never sent");
                };
                assert!(delta.added.is_disjoint(&record.members), "added twice");
                assert!(delta.removed.is_subset(&record.members), "removed twice");
                record.members.extend(delta.added.iter().cloned());
                record
                    .members
                    .retain(|member| !delta.removed.contains(member));
            }
        }
    }
    if frame.trailer.in_sync {
        let resent = &frame.trailer.restated_buckets;
        held.retain(|id, _| sent.contains(id) || !resent.contains(&digest::bucket(id)));
    }
}

/// Checks that the records which a record refers to are present.
fn check_references(held: &Held, id: &RecordId, record: &Record) {
    let known = |id: RecordId| assert!(held.contains_key(&id), "{id:?} is missing");
    match record {
        Record::Policy(policy) => {
            for rule in policy.ingress.iter().chain(&policy.egress) {
                let sets = rule.source.sets.iter().chain(&rule.destination.sets);
                sets.for_each(|set| known(RecordId::IpSet(set.clone())));
            }
        }
        Record::Endpoint(endpoint) => {
            for tier in &endpoint.tiers {
                let policies = tier.ingress.iter().chain(&tier.egress);
                policies.for_each(|key| known(RecordId::Policy(key.clone())));
            }
        }
        Record::HostEndpoint(endpoint) => {
            for tier in [
                &endpoint.normal,
                &endpoint.forward,
                &endpoint.pre_dnat,
                &endpoint.untracked,
            ]
            .into_iter()
            .flatten()
            {
                let policies = tier.ingress.iter().chain(&tier.egress);
                policies.for_each(|key| known(RecordId::Policy(key.clone())));
            }
        }
        _ => assert!(!matches!(
            id,
            RecordId::Policy(_) | RecordId::Endpoint(_) | RecordId::HostEndpoint(_)
        )),
    }
}
