//! Convergence: after any updates, split into flushes in any way, the graph equals a plain
//! computation from the final objects, and nodes that applied every flush hold their views.

use std::collections::BTreeMap;

use crate::reference::Objects;
use crate::world::{NODES, update};
use margay_calc::digest;
use margay_calc::flush::{Audience, Change, Flush};
use margay_calc::graph::Graph;
use margay_calc::model::{Record, RecordId};
use margay_calc::update::Update;
use proptest::prelude::*;

/// Records of nodes that only ever applied flushes.
#[derive(Default)]
pub struct Nodes(pub BTreeMap<&'static str, BTreeMap<RecordId, Record>>);

impl Nodes {
    /// Applies a flush.
    pub fn take(&mut self, flush: &Flush, graph: &Graph) {
        for node in NODES {
            let held = self.0.entry(node).or_default();
            for (id, change) in &flush.records {
                let audiences = [&change.gained, &change.kept, &change.lost];
                let parts = audiences
                    .iter()
                    .filter(|audience| audience.contains(node))
                    .count();
                assert!(parts <= 1, "{id:?}: {node} gets two changes: {change:?}");
                if change.lost.contains(node) {
                    assert!(
                        held.remove(id).is_some(),
                        "{id:?}: {node} never had what it loses"
                    );
                }
                if change.gained.contains(node) {
                    let value = graph
                        .record_for(node, id)
                        .expect("who gains a record can have it");
                    assert!(
                        held.insert(id.clone(), value.into_owned()).is_none(),
                        "{id:?}: {node} gains what it had"
                    );
                }
                if change.kept.contains(node) {
                    let record = held.get_mut(id).expect("who keeps a record had it");
                    match (&change.change, record) {
                        (Change::Same, _) => {}
                        (Change::Value, record) => {
                            *record = graph
                                .record_for(node, id)
                                .expect("who keeps a record can have it")
                                .into_owned();
                        }
                        (Change::Members(delta), Record::IpSet(set)) => {
                            assert!(
                                delta
                                    .added
                                    .iter()
                                    .all(|member| set.members.insert(member.clone())),
                                "{id:?}: adds what it had"
                            );
                            assert!(
                                delta
                                    .removed
                                    .iter()
                                    .all(|member| set.members.remove(member)),
                                "{id:?}: removes what it had not"
                            );
                        }
                        (Change::Members(_), record) => panic!("{id:?}: members of {record:?}"),
                    }
                }
            }
        }
    }
}

fn check(graph: &Graph, objects: &Objects, nodes: &Nodes) {
    let wanted = objects.compute();
    assert_eq!(graph.ids(), wanted.keys().cloned().collect::<Vec<_>>());
    for (id, (record, audience)) in &wanted {
        assert_eq!(graph.record(id).as_deref(), Some(record), "{id:?}");
        assert_eq!(&graph.nodes_of(id), audience, "{id:?}");
        assert_eq!(graph.digest(id), Some(digest::digest(id, record)), "{id:?}");
    }
    for node in NODES {
        let view = graph.view(node);
        let ids: Vec<RecordId> = view.ids().map(|id| id.into_owned()).collect();
        let audience = |audience: &Audience| audience.contains(node);
        let expected: Vec<RecordId> = wanted
            .iter()
            .filter(|(_, (_, nodes))| audience(nodes))
            .map(|(id, _)| id.clone())
            .collect();
        assert_eq!(ids, expected, "the view of {node}");
        let records: BTreeMap<RecordId, Record> = ids
            .into_iter()
            .map(|id| {
                let record = view
                    .record(&id)
                    .expect("a view has its records")
                    .into_owned();
                assert_eq!(
                    view.digest(&id),
                    Some(digest::digest(&id, &record)),
                    "{id:?}"
                );
                (id, record)
            })
            .collect();
        assert_eq!(nodes.0.get(node), Some(&records), "what {node} holds");
        assert_eq!(
            records.get(&RecordId::Settings),
            Some(&Record::Settings(objects.settings(node)))
        );
        assert_eq!(view.buckets(), digest::buckets(&records));
    }
}

/// Event besides an update itself.
#[derive(Clone, Copy, Debug)]
enum Around {
    Nothing,
    Flush,
    Sweep,
    Twice,
    RemovedBefore,
    RemovedAndFlushedBefore,
}

fn around() -> impl Strategy<Value = Around> {
    prop_oneof![
        3 => Just(Around::Nothing),
        2 => Just(Around::Flush),
        1 => Just(Around::Sweep),
        1 => Just(Around::Twice),
        1 => Just(Around::RemovedBefore),
        1 => Just(Around::RemovedAndFlushedBefore),
    ]
}

struct Run {
    graph: Graph,
    objects: Objects,
    nodes: Nodes,
}

impl Run {
    fn new() -> Self {
        Self {
            graph: Graph::default(),
            objects: Objects::default(),
            nodes: Nodes::default(),
        }
    }

    fn apply(&mut self, update: &Update) {
        self.graph.apply(update.clone());
        self.objects.apply(update.clone());
    }

    fn flush(&mut self) {
        let flush = self.graph.flush();
        self.nodes.take(&flush, &self.graph);
        check(&self.graph, &self.objects, &self.nodes);
        assert!(
            self.graph.flush().records.is_empty(),
            "nothing has changed since the flush"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_history_ends_in_the_state_of_its_final_objects(
        steps in prop::collection::vec((update(), around()), 1..60),
    ) {
        let mut run = Run::new();
        for (update, around) in &steps {
            match around {
                Around::RemovedBefore => run.apply(&update.removal()),
                Around::RemovedAndFlushedBefore => {
                    run.apply(&update.removal());
                    run.flush();
                }
                _ => {}
            }
            run.apply(update);
            match around {
                Around::Flush => run.flush(),
                Around::Sweep => run.graph.sweep(),
                Around::Twice => run.apply(update),
                _ => {}
            }
        }
        run.flush();
        for (update, _) in &steps {
            run.apply(&update.removal());
        }
        run.flush();
    }

    #[test]
    fn any_order_of_the_same_objects_ends_the_same(
        (updates, shuffled) in prop::collection::vec(update(), 1..40)
            .prop_map(latest)
            .prop_flat_map(|updates| {
                let shuffled = Just(updates.clone()).prop_shuffle();
                (Just(updates), shuffled)
            }),
    ) {
        let mut ends = [updates, shuffled].into_iter().map(|updates| {
            let mut run = Run::new();
            updates.iter().for_each(|update| run.apply(update));
            run.flush();
            run.nodes.0
        });
        prop_assert_eq!(ends.next(), ends.next());
    }

    #[test]
    fn a_resync_changes_nothing(
        updates in prop::collection::vec(update(), 1..40).prop_map(latest),
    ) {
        let mut run = Run::new();
        updates.iter().for_each(|update| run.apply(update));
        run.flush();
        // Removes and restores everything between two flushes, in another order.
        updates.iter().for_each(|update| run.apply(&update.removal()));
        updates.iter().rev().for_each(|update| run.apply(update));
        let flush = run.graph.flush();
        prop_assert!(flush.records.is_empty(), "{:?}", flush);
    }
}

/// Last update of each object.
pub fn latest(updates: Vec<Update>) -> Vec<Update> {
    let mut seen = BTreeMap::new();
    for update in updates {
        seen.insert(format!("{:?}", update.removal()), update);
    }
    seen.into_values().collect()
}
