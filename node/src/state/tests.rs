//! Tests that any history of frames ends in the state of its last values, and that dirty changes
//! lead a follower to the same state.

use std::collections::BTreeSet;

use margay_api::network::Encapsulation;
use margay_calc::model::{Member, PoolRecord};
use margay_proto::sync::Trailer;
use proptest::prelude::*;

use super::*;

type Records = BTreeMap<RecordId, Record>;

fn set_id(number: u8) -> SetId {
    SetId(format!("s:{number}"))
}

fn mk_member(number: u8) -> Member {
    Member::Net(format!("10.0.0.{number}/32").parse().expect("an address"))
}

/// A view of few ids with few values, so that histories meet.
fn mk_view(sets: &[Option<BTreeSet<u8>>], pools: &[Option<bool>]) -> Records {
    let sets = sets.iter().enumerate().filter_map(|(number, members)| {
        let members = members.as_ref()?.iter().copied().map(mk_member).collect();
        Some((
            RecordId::IpSet(set_id(number as u8)),
            Record::IpSet(IpSetRecord {
                kind: SetKind::Net,
                members,
            }),
        ))
    });
    let pools = pools.iter().enumerate().filter_map(|(number, nat)| {
        let range = format!("10.{number}.0.0/16").parse().expect("a range");
        Some((
            RecordId::Pool(range),
            Record::Pool(PoolRecord {
                nat_outgoing: (*nat)?,
                encapsulation: Encapsulation::None,
            }),
        ))
    });
    sets.chain(pools).collect()
}

fn view() -> impl Strategy<Value = Records> {
    let members = prop::option::of(prop::collection::btree_set(0..6_u8, 0..4));
    (
        prop::collection::vec(members, 4),
        prop::collection::vec(prop::option::of(any::<bool>()), 3),
    )
        .prop_map(|(sets, pools)| mk_view(&sets, &pools))
}

/// How a server sends the difference between two views.
#[derive(Clone, Debug)]
enum Way {
    /// Only differences, sets as member changes.
    Differences,
    /// Complete values of differing records.
    Values,
    /// A new stream that resends every bucket, in this many frames.
    Restatement(usize),
}

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![
        Just(Way::Differences),
        Just(Way::Values),
        (1..4_usize).prop_map(Way::Restatement)
    ]
}

fn frames(from: &Records, to: &Records, way: &Way) -> Vec<Frame> {
    let changed = to
        .iter()
        .filter(|(id, record)| from.get(*id) != Some(*record));
    let gone = from
        .keys()
        .filter(|id| !to.contains_key(*id))
        .rev()
        .map(|id| Change::Remove(id.clone()));
    let whole = |id: &RecordId, record: &Record| Change::Upsert(id.clone(), record.clone());
    let (changes, parts, restated): (Vec<Change>, usize, Vec<u32>) = match way {
        Way::Differences => {
            let change = changed.map(|(id, record)| match (id, from.get(id), record) {
                (RecordId::IpSet(set), Some(Record::IpSet(old)), Record::IpSet(new)) => {
                    Change::Members(set.clone(), new.kind, difference(old, new))
                }
                _ => whole(id, record),
            });
            (change.chain(gone).collect(), 1, Vec::new())
        }
        Way::Values => (
            changed
                .map(|(id, record)| whole(id, record))
                .chain(gone)
                .collect(),
            1,
            Vec::new(),
        ),
        Way::Restatement(parts) => (
            to.iter().map(|(id, record)| whole(id, record)).collect(),
            *parts,
            (0..256).collect(),
        ),
    };
    let size = changes.len().div_ceil(parts).max(1);
    let mut frames: Vec<Frame> = changes
        .chunks(size)
        .map(|changes| Frame {
            changes: changes.to_vec(),
            trailer: Trailer::default(),
        })
        .collect();
    if frames.is_empty() {
        frames.push(Frame::default());
    }
    frames[0].trailer.restated_buckets = restated;
    frames.last_mut().expect("at least one").trailer.in_sync = true;
    frames
}

/// Follows the dirty changes only, as the compiler does.
fn follow(follower: &mut Records, records: &Records, dirty: &Dirty) {
    for id in &dirty.records {
        match records.get(id) {
            Some(record) => follower.insert(id.clone(), record.clone()),
            None => follower.remove(id),
        };
    }
    for (set, delta) in &dirty.members {
        let Some(Record::IpSet(record)) = follower.get_mut(&RecordId::IpSet(set.clone())) else {
            panic!("members of {set}, which nobody knows");
        };
        assert!(
            delta
                .removed
                .iter()
                .all(|member| record.members.remove(member)),
            "a member that was not there went"
        );
        assert!(
            delta
                .added
                .iter()
                .all(|member| record.members.insert(member.clone())),
            "a member that was there came"
        );
    }
}

proptest! {
    #[test]
    fn any_history_ends_in_the_last_view_and_all_of_it_is_marked_dirty(
        history in prop::collection::vec((view(), way(), any::<bool>()), 1..8),
    ) {
        let (mut state, mut sent, mut follower) = (
            State::default(),
            Records::new(),
            Records::new(),
        );
        for (next, way, look) in history {
            if matches!(way, Way::Restatement(_)) {
                state.disconnect();
            }
            let globals = |records: &Records| -> Records {
                let globals = margay_calc::model::globals(records);
                globals.map(|(id, record)| (id.clone(), record.clone())).collect()
            };
            let before = (globals(state.records()), state.global_changes());
            for frame in frames(&sent, &next, &way) {
                state.apply(frame).expect("a server sends only what fits");
            }
            sent = next;
            prop_assert_eq!(state.records(), &sent);
            prop_assert!(state.is_in_sync());
            if globals(state.records()) != before.0 {
                prop_assert!(state.global_changes() > before.1);
            }
            if look {
                let dirty = state.take_dirty();
                follow(&mut follower, state.records(), &dirty);
                prop_assert_eq!(&follower, &sent);
                prop_assert!(state.take_dirty().is_empty());
            }
        }
        let dirty = state.take_dirty();
        follow(&mut follower, state.records(), &dirty);
        prop_assert_eq!(&follower, &sent);
    }
}

#[test]
fn a_record_that_is_sent_again_marks_nothing_dirty() {
    let view = mk_view(&[Some(BTreeSet::from([1, 2]))], &[Some(true)]);
    let mut state = State::default();
    for _ in 0..2 {
        state.disconnect();
        frames(&view, &view, &Way::Restatement(2))
            .into_iter()
            .for_each(|frame| state.apply(frame).expect("it fits"));
        state.take_dirty();
    }
    state.disconnect();
    frames(&view, &view, &Way::Restatement(2))
        .into_iter()
        .for_each(|frame| state.apply(frame).expect("it fits"));
    assert!(state.take_dirty().is_empty());
    assert_eq!(state.global_changes(), 1, "the pool, once");
}

#[test]
fn a_stream_that_ends_early_sweeps_nothing() {
    let view = mk_view(&[Some(BTreeSet::from([1]))], &[Some(true), Some(false)]);
    let mut state = State::with_records(view.clone());
    let mut first = frames(&view, &Records::new(), &Way::Restatement(1)).remove(0);
    first.trailer.in_sync = false;
    state.apply(first).expect("it fits");
    state.disconnect();
    let nothing = Frame {
        changes: Vec::new(),
        trailer: Trailer {
            in_sync: true,
            ..Trailer::default()
        },
    };
    state.apply(nothing).expect("it fits");
    assert_eq!(state.records(), &view);
}

#[test]
fn members_that_fit_nothing_are_a_fault() {
    let mut state = State::with_records(mk_view(&[Some(BTreeSet::new())], &[]));
    let members = |set: &SetId, kind| Frame {
        changes: vec![Change::Members(set.clone(), kind, MemberDelta::default())],
        trailer: Trailer::default(),
    };
    assert_eq!(
        state.apply(members(&set_id(9), SetKind::Net)),
        Err(ViewError::UnknownSet(set_id(9)))
    );
    let kind = ViewError::SetKind {
        set: set_id(0),
        held: SetKind::Net,
        got: SetKind::AddressPort,
    };
    assert_eq!(
        state.apply(members(&set_id(0), SetKind::AddressPort)),
        Err(kind)
    );
}
