//! What one replica may know: every event from its watches to its owner passes here. Each is
//! compared with what the API has held, and the views that follow are computed by a graph of their
//! own, so that every state of a node can be found among them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use margay_calc::digest;
use margay_calc::graph::Graph;
use margay_calc::model::{Record, RecordId};
use margay_calc::update::Update;
use margay_typha::cause::Cause;
use margay_typha::event::Event;
use margay_typha::object::Observed;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::api::{Api, Key, kinds};
use crate::plant::Plant;
use crate::run::Run;

/// Records of a node.
pub type Records = BTreeMap<RecordId, Record>;

/// Objects that a replica knows, of the kinds that it has listed: by them it tells a bad list from
/// a good one.
pub type Listed = Arc<Mutex<BTreeMap<&'static str, BTreeSet<Key>>>>;

/// An oracle that several parts of a run ask.
pub type Shared = Arc<Mutex<Oracle>>;

/// One object, as the replica was sent it.
#[derive(Default)]
struct Known {
    value: Option<Update>,
    /// Position of this value among those that the object has had.
    position: usize,
}

#[derive(Default)]
struct KnownKind {
    objects: BTreeMap<Key, Known>,
    /// Objects of the list in progress.
    listing: Option<BTreeSet<Key>>,
}

/// What one process of a replica may know.
pub struct Oracle {
    run: Run,
    name: String,
    api: Api,
    nodes: Vec<String>,
    graph: Graph,
    kinds: BTreeMap<&'static str, KnownKind>,
    /// Digests of each node's view.
    digests: Vec<BTreeMap<RecordId, u64>>,
    /// Their sums, after each event.
    states: Vec<Vec<u64>>,
    /// What the door asks for.
    listed: Listed,
    /// First state in which every kind was listed: no node hears of one before.
    complete: Option<usize>,
}

impl Oracle {
    /// Creates an oracle of a process that knows nothing.
    pub fn new(run: &Run, name: &str, api: &Api, nodes: &[String], listed: Listed) -> Self {
        Self {
            run: run.clone(),
            name: name.to_owned(),
            api: api.clone(),
            nodes: nodes.to_vec(),
            graph: Graph::default(),
            kinds: kinds()
                .map(|kind| (kind.name, KnownKind::default()))
                .collect(),
            digests: vec![BTreeMap::new(); nodes.len()],
            states: vec![vec![0; nodes.len()]],
            listed,
            complete: None,
        }
    }

    /// Number of the newest state.
    pub fn newest(&self) -> usize {
        self.states.len() - 1
    }

    /// First state, from that one on, in which the node's view has this sum.
    pub fn find(&self, from: usize, node: usize, sum: u64) -> Option<usize> {
        let later = self
            .states
            .iter()
            .enumerate()
            .skip(from.max(self.complete?));
        let mut same = later
            .filter(|(_, sums)| sums[node] == sum)
            .map(|(state, _)| state);
        same.next()
    }

    /// The node's view in the newest state.
    pub fn view(&self, node: &str) -> Records {
        view(&self.graph, node)
    }

    /// Returns true once every kind has been listed.
    pub fn is_synced(&self) -> bool {
        self.complete.is_some()
    }

    fn observe(&mut self, event: &Event) {
        match event {
            Event::ListStarted(kind) => self.known(kind).listing = Some(BTreeSet::new()),
            Event::Observed { kind, objects, .. } => {
                objects
                    .iter()
                    .for_each(|object| self.change(kind, &object.key, object.update.clone()));
            }
            Event::Deleted { kind, key, .. } => self.change(kind, key, None),
            Event::Sweep { kind, .. } => self.sweep(kind),
            _ => return,
        }
        self.record_flush();
        if self.complete.is_none() && self.listed.lock().len() == self.kinds.len() {
            self.complete = Some(self.newest());
        }
    }

    fn known(&mut self, kind: &'static str) -> &mut KnownKind {
        self.kinds.get_mut(kind).expect("a simulated kind")
    }

    fn sweep(&mut self, kind: &'static str) {
        let known = self.known(kind);
        let listed = known.listing.take().unwrap_or_default();
        let is_gone =
            |(key, known): &(&Key, &Known)| known.value.is_some() && !listed.contains(*key);
        let gone: Vec<Key> = known
            .objects
            .iter()
            .filter(is_gone)
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.change(kind, &key, None);
        }
        let held = self
            .known(kind)
            .objects
            .iter()
            .filter(|(_, known)| known.value.is_some());
        let held = held.map(|(key, _)| key.clone()).collect();
        self.listed.lock().insert(kind, held);
    }

    /// Applies a value, which must be one that the object has had, and none before what was known.
    fn change(&mut self, kind: &'static str, key: &Key, value: Option<Update>) {
        let api = self.api.clone();
        let known = self.known(kind);
        if let Some(listing) = &mut known.listing {
            listing.insert(key.clone());
        }
        let known = known.objects.entry(key.clone()).or_default();
        let position = api.with(|contents| {
            let values = contents.kinds[kind].values.get(key)?;
            values
                .iter()
                .skip(known.position)
                .position(|held| *held == value)
        });
        let former = known.value.take();
        match position {
            Some(ahead) => known.position += ahead,
            None => {
                let what = if value.is_some() {
                    "a state"
                } else {
                    "an absence"
                };
                let newest = known.position;
                self.run.fail(
                    &self.name,
                    format_args!(
                        "{kind} {key}: {what} that the API has not had since its state {newest}"
                    ),
                );
            }
        }
        self.known(kind)
            .objects
            .entry(key.clone())
            .or_default()
            .value
            .clone_from(&value);
        if let Some(held) = self.listed.lock().get_mut(kind) {
            match value {
                Some(_) => drop(held.insert(key.clone())),
                None => drop(held.remove(key)),
            }
        }
        let update = value.or_else(|| former.map(|former| former.removal()));
        if let Some(update) = update {
            self.graph.apply(update);
        }
    }

    fn record_flush(&mut self) {
        let flush = self.graph.flush();
        if flush.records.is_empty() {
            return;
        }
        let mut sums = self.states.last().cloned().unwrap_or_default();
        for (id, change) in flush.records {
            for ((node, held), sum) in self.nodes.iter().zip(&mut self.digests).zip(&mut sums) {
                let is_held = change.gained.contains(node) || change.kept.contains(node);
                let digest = self.graph.view(node).digest(&id).filter(|_| is_held);
                if is_held || change.lost.contains(node) {
                    let former = match digest {
                        Some(digest) => held.insert(id.clone(), digest),
                        None => held.remove(&id),
                    };
                    *sum = sum
                        .wrapping_sub(former.unwrap_or_default())
                        .wrapping_add(digest.unwrap_or_default());
                }
            }
        }
        self.states.push(sums);
    }
}

/// Passes events from the watches to the owner.
pub async fn relay(
    run: Run,
    oracle: Shared,
    mut watches: mpsc::Receiver<Event>,
    owner: mpsc::Sender<Event>,
) {
    if run.has(Plant::EarlyAnswer) {
        for kind in kinds() {
            // The owner ends only with the replica.
            let sweep = Event::Sweep {
                kind: kind.name,
                version: 0,
                newest: 0,
            };
            let _ = owner.send(sweep).await;
        }
    }
    while let Some(event) = watches.recv().await {
        // Room first: nobody else's event comes between what is noted here and the owner.
        let Ok(room) = owner.reserve().await else {
            return;
        };
        oracle.lock().observe(&event);
        let is_synced = oracle.lock().is_synced();
        let event = match event {
            Event::Observed {
                kind,
                objects,
                cause,
            } if is_synced && run.has(Plant::LostChange) => {
                let kept = usize::from(!run.now_ms().is_multiple_of(3));
                Event::Observed {
                    kind,
                    objects: objects.into_iter().take(kept).collect(),
                    cause,
                }
            }
            Event::Deleted { kind, .. } if run.has(Plant::LostDeletion) => {
                let objects: Vec<Observed> = Vec::new();
                Event::Observed {
                    kind,
                    objects,
                    cause: Cause::default(),
                }
            }
            event => event,
        };
        room.send(event);
    }
}

/// The node's view of a graph that is flushed.
pub fn view(graph: &Graph, node: &str) -> Records {
    let view = graph.view(node);
    let records = view.ids().map(|id| {
        let record = view.record(&id).expect("a record of the view");
        (id.into_owned(), record.into_owned())
    });
    records.collect()
}

/// Sum of the digests of records.
pub fn sum(records: &Records) -> u64 {
    records
        .iter()
        .map(|(id, record)| digest::digest(id, record))
        .fold(0, u64::wrapping_add)
}

/// Graph of the objects that the API holds now, added one after another.
pub fn final_graph(api: &Api) -> Graph {
    let mut graph = Graph::default();
    api.with(|contents| {
        let values = contents
            .kinds
            .values()
            .flat_map(|kind| kind.values.values());
        values
            .filter_map(|values| values.last().cloned().flatten())
            .for_each(|update| graph.apply(update));
    });
    graph.flush();
    graph
}
