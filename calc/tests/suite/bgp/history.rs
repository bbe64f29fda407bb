//! Speakers depend on nothing but the current objects.

use std::collections::BTreeSet;

use margay_calc::graph::Graph;
use margay_calc::model::RecordId;
use margay_calc::text;
use margay_calc::update::Update;
use proptest::prelude::*;

use super::objects;
use crate::converge::{Nodes, latest};
use crate::world::{self, NODES};

fn step() -> impl Strategy<Value = (Update, bool)> {
    let update = prop_oneof![1 => world::update(), 1 => objects::update()];
    (update, any::<bool>())
}

/// What every node holds of BGP, and conflicts.
fn outcome(graph: &Graph) -> (Vec<String>, BTreeSet<String>) {
    let ids = graph.ids();
    let nodes = ids.iter().filter(|id| matches!(id, RecordId::Node(_)));
    let mut records: Vec<String> = nodes
        .filter_map(|id| Some(text::record(id, &*graph.record(id)?)))
        .collect();
    for node in NODES {
        let record = graph.record_for(node, &RecordId::Bgp);
        records.extend(record.map(|record| text::record(&RecordId::Bgp, &record)));
    }
    let conflicts = graph.conflicts().into_iter();
    let conflicts = conflicts.map(|each| format!("{} {}", each.object(), each.reason()));
    (records, conflicts.collect())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn speakers_are_those_of_the_final_objects_whatever_their_history(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut graph = Graph::default();
        graph.set_bgp(true);
        let mut nodes = Nodes::default();
        for (update, is_flushed) in &steps {
            graph.apply(update.clone());
            if *is_flushed {
                let flush = graph.flush();
                nodes.take(&flush, &graph);
            }
        }
        let flush = graph.flush();
        nodes.take(&flush, &graph);
        prop_assert!(graph.flush().records.is_empty());

        let mut fresh = Graph::default();
        fresh.set_bgp(true);
        let updates: Vec<Update> = steps.iter().map(|(update, _)| update.clone()).collect();
        for update in latest(updates.clone()) {
            fresh.apply(update);
        }
        fresh.flush();
        prop_assert_eq!(outcome(&graph), outcome(&fresh));
        for node in NODES {
            let held = nodes.0.get(node).and_then(|held| held.get(&RecordId::Bgp));
            let record = graph.record_for(node, &RecordId::Bgp);
            prop_assert_eq!(held, record.as_deref());
            prop_assert_eq!(graph.view(node).buckets(), fresh.view(node).buckets());
        }

        for update in &updates {
            graph.apply(update.removal());
        }
        graph.flush();
        prop_assert_eq!(graph.ids(), [RecordId::Settings]);
    }
}
