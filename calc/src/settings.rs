//! Settings: what lies over what for which node.

use std::collections::{BTreeMap, BTreeSet};

use margay_api::meta::Labels;
use margay_api::network::{FelixSettings, NodeInfo};
use margay_api::settings::{FelixOverrides, SettingsScope};

use crate::digest;
use crate::flush::{Audience, Change, NodeSet, RecordChange};
use crate::globals::{Held, for_all, nobody};
use crate::model::{Record, RecordId};

/// All objects, and the record that each node has.
#[derive(Debug)]
pub(crate) struct Settings {
    objects: BTreeMap<String, FelixOverrides>,
    /// As of the last flush, of the nodes that have no other; none before the first.
    default: Option<Held>,
    /// As of the last flush, of the nodes that an object other than `default` is for.
    own: BTreeMap<String, Held>,
    dirty: bool,
}

impl Default for Settings {
    fn default() -> Self {
        // There are settings, the built-in ones, before there is an object.
        Self { objects: BTreeMap::new(), default: None, own: BTreeMap::new(), dirty: true }
    }
}

impl Settings {
    pub(crate) fn set(&mut self, name: String, overrides: Option<FelixOverrides>) {
        self.dirty = true;
        match overrides {
            Some(overrides) => self.objects.insert(name, overrides),
            None => self.objects.remove(&name),
        };
    }

    /// A node is other than it was, which matters if its labels do.
    pub(crate) fn touch_node(&mut self, before: Option<&NodeInfo>, now: Option<&NodeInfo>) {
        self.dirty |= before.map(|node| &node.labels) != now.map(|node| &node.labels) && self.selects();
    }

    /// The record of a node, as of the last flush.
    pub(crate) fn held(&self, node: &str) -> Option<&Held> {
        self.own.get(node).or(self.default.as_ref())
    }

    /// What changed since the last flush.
    pub(crate) fn flush(&mut self, nodes: &BTreeMap<String, NodeInfo>) -> Option<RecordChange> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        let default = held(self.of_cluster());
        let own = self.special(nodes).into_iter().map(|node| {
            let settings = self.of_node(&node, nodes.get(&node).map(|info| &info.labels));
            (node, held(settings))
        });
        let own: BTreeMap<String, Held> = own.collect();
        let before = self.default.replace(default);
        let own_before = std::mem::replace(&mut self.own, own);
        let digest = |own: &BTreeMap<String, Held>, default: &Option<Held>, node: &String| {
            own.get(node).or(default.as_ref()).map(|held| held.digest)
        };
        if before.as_ref().map(|held| held.digest) != self.default.as_ref().map(|held| held.digest) {
            return Some(for_all(before.is_some(), true));
        }
        let named: BTreeSet<&String> = own_before.keys().chain(self.own.keys()).collect();
        let differ = named
            .into_iter()
            .filter(|node| digest(&own_before, &before, node) != digest(&self.own, &self.default, node));
        let nodes: NodeSet = differ.map(String::as_str).collect();
        (!nodes.is_empty()).then_some(RecordChange {
            gained: nobody(),
            kept: Audience::Nodes(nodes),
            change: Change::Value,
            lost: nobody(),
        })
    }

    fn selects(&self) -> bool {
        self.objects.values().any(|object| matches!(object.scope, SettingsScope::Selected(_)))
    }

    /// Nodes that an object other than `default` is for.
    fn special(&self, nodes: &BTreeMap<String, NodeInfo>) -> BTreeSet<String> {
        let mut special = BTreeSet::new();
        for object in self.objects.values() {
            match &object.scope {
                SettingsScope::Cluster => {}
                SettingsScope::Node(name) => {
                    special.insert(name.clone());
                }
                SettingsScope::Selected(_) => {
                    let selected = nodes.iter().filter(|(name, node)| object.is_for(name, Some(&node.labels)));
                    special.extend(selected.map(|(name, _)| name.clone()));
                }
            }
        }
        special
    }

    fn of_cluster(&self) -> FelixSettings {
        let objects = self.objects.values().filter(|object| object.scope == SettingsScope::Cluster);
        objects.fold(FelixSettings::default(), |settings, object| object.over(settings))
    }

    /// From the weakest: `default`, those by selector (of which the first by name is the strongest), the node's own.
    fn of_node(&self, node: &str, labels: Option<&Labels>) -> FelixSettings {
        let of = |rank: u8| self.objects.values().rev().filter(move |object| weight(&object.scope) == rank);
        let layers = (1..=2).flat_map(of).filter(|object| object.is_for(node, labels));
        layers.fold(self.of_cluster(), |settings, object| object.over(settings))
    }
}

const fn weight(scope: &SettingsScope) -> u8 {
    match scope {
        SettingsScope::Cluster => 0,
        SettingsScope::Selected(_) => 1,
        SettingsScope::Node(_) => 2,
    }
}

fn held(settings: FelixSettings) -> Held {
    let record = Record::Settings(settings);
    let digest = digest::digest(&RecordId::Settings, &record);
    Held { record, digest }
}
