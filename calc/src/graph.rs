//! The graph: objects in, records out, computed once for the whole cluster.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::digest::{self, Buckets};
use crate::flush::{Audience, Change, Flush, MemberDelta, NodeSet, RecordChange};
use crate::model::{Member, Record, RecordId, SetId, SetKind};
use crate::simple::{Computed, Objects};
use crate::update::Update;

/// Every object of the cluster and what follows from it. What it puts out depends on the objects alone, never on their history.
#[derive(Debug, Default)]
pub struct Graph {
    objects: Objects,
    told: Computed,
    told_settings: BTreeMap<String, Record>,
}

impl Graph {
    /// Takes the latest state of an object. Nothing that can be asked changes until [`Graph::flush`].
    pub fn apply(&mut self, update: Update) {
        self.objects.apply(update);
    }

    /// What changed since the last flush.
    pub fn flush(&mut self) -> Flush {
        let now = self.objects.compute();
        let before = std::mem::take(&mut self.told);
        let mut flush = Flush::default();
        let ids: BTreeSet<&RecordId> = before.keys().chain(now.keys()).collect();
        for id in ids {
            if let Some(change) = compare(before.get(id), now.get(id)) {
                flush.records.insert(id.clone(), change);
            }
        }
        let overrides = self.overrides();
        if let Some(change) = flush.records.get(&RecordId::Settings) {
            debug_assert!(change.lost.is_empty());
        } else {
            let names: BTreeSet<&String> =
                overrides.keys().chain(self.told_settings.keys()).collect();
            let differ = names
                .into_iter()
                .filter(|name| overrides.get(*name) != self.told_settings.get(*name));
            let nodes: NodeSet = differ.cloned().collect();
            if !nodes.is_empty() {
                flush.records.insert(
                    RecordId::Settings,
                    RecordChange {
                        gained: nobody(),
                        kept: Audience::Nodes(nodes),
                        change: Change::Value,
                        lost: nobody(),
                    },
                );
            }
        }
        self.told_settings = overrides;
        self.told = now;
        flush
    }

    /// The value of a record; of the settings, that for nodes without settings of their own. Sets are borrowed, never copied.
    pub fn record(&self, id: &RecordId) -> Option<Cow<'_, Record>> {
        self.told.get(id).map(|(record, _)| Cow::Borrowed(record))
    }

    /// The value of a record for this node. It differs from [`Graph::record`] for [`RecordId::Settings`] only.
    pub fn record_for(&self, node: &str, id: &RecordId) -> Option<Cow<'_, Record>> {
        match (id, self.told_settings.get(node)) {
            (RecordId::Settings, Some(own)) => Some(Cow::Borrowed(own)),
            _ => self.record(id),
        }
    }

    /// Kind and members of a set.
    pub fn ip_set(&self, id: &SetId) -> Option<(SetKind, &BTreeSet<Member>)> {
        match self.told.get(&RecordId::IpSet(id.clone())) {
            Some((Record::IpSet(set), _)) => Some((set.kind, &set.members)),
            _ => None,
        }
    }

    /// The digest of a record, as [`Graph::record`] has it.
    pub fn digest(&self, id: &RecordId) -> Option<u64> {
        self.record(id).map(|record| digest::digest(id, &record))
    }

    /// Who holds the record.
    pub fn nodes_of(&self, id: &RecordId) -> Audience {
        self.told
            .get(id)
            .map_or_else(nobody, |(_, audience)| audience.clone())
    }

    /// What this node must hold.
    pub fn view<'a>(&'a self, node: &'a str) -> View<'a> {
        View { graph: self, node }
    }

    fn overrides(&self) -> BTreeMap<String, Record> {
        let own = self.objects.settings.iter();
        own.filter_map(|(name, settings)| {
            Some((
                name.strip_prefix("node.")?.to_owned(),
                Record::Settings(settings.clone()),
            ))
        })
        .collect()
    }
}

/// What one node must hold, as of the last flush.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    graph: &'a Graph,
    node: &'a str,
}

impl<'a> View<'a> {
    /// The ids, ascending: what is referred to before what refers to it.
    pub fn ids(&self) -> impl Iterator<Item = Cow<'a, RecordId>> + use<'a> {
        let node = self.node;
        let told = self.graph.told.iter();
        told.filter(move |(_, (_, audience))| audience.contains(node))
            .map(|(id, _)| Cow::Borrowed(id))
    }

    /// The value of a record of the view.
    pub fn record(&self, id: &RecordId) -> Option<Cow<'a, Record>> {
        self.graph.record_for(self.node, id)
    }

    /// The digests of the view's buckets.
    pub fn buckets(&self) -> Buckets {
        let mut buckets = [0; digest::BUCKETS];
        for id in self.ids() {
            if let Some(record) = self.record(&id) {
                digest::add(&mut buckets, &id, digest::digest(&id, &record));
            }
        }
        buckets
    }

    /// The bucket of a record.
    pub fn bucket(&self, id: &RecordId) -> u32 {
        digest::bucket(id)
    }
}

fn nobody() -> Audience {
    Audience::Nodes(NodeSet::new())
}

fn compare(
    before: Option<&(Record, Audience)>,
    now: Option<&(Record, Audience)>,
) -> Option<RecordChange> {
    match (before, now) {
        (None, None) => None,
        (None, Some((_, audience))) => Some(RecordChange {
            gained: audience.clone(),
            kept: nobody(),
            change: Change::Same,
            lost: nobody(),
        }),
        (Some((_, audience)), None) => Some(RecordChange {
            gained: nobody(),
            kept: nobody(),
            change: Change::Same,
            lost: audience.clone(),
        }),
        (Some(before), Some(now)) if before == now => None,
        (Some((old, was)), Some((new, is))) => {
            let change = match (old, new) {
                _ if old == new => Change::Same,
                (Record::IpSet(old), Record::IpSet(new)) => Change::Members(MemberDelta {
                    added: new.members.difference(&old.members).cloned().collect(),
                    removed: old.members.difference(&new.members).cloned().collect(),
                }),
                _ => Change::Value,
            };
            let (gained, kept, lost) = match (was, is) {
                (Audience::Nodes(was), Audience::Nodes(is)) => (
                    Audience::Nodes(is.difference(was).cloned().collect()),
                    Audience::Nodes(is.intersection(was).cloned().collect()),
                    Audience::Nodes(was.difference(is).cloned().collect()),
                ),
                _ => (nobody(), is.clone(), nobody()),
            };
            Some(RecordChange {
                gained,
                kept,
                change,
                lost,
            })
        }
    }
}
