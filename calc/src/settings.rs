//! Effective FelixConfiguration per node: `node.NAME` overrides selector-scoped objects, which
//! override `default`.

use std::collections::{BTreeMap, BTreeSet};

use margay_api::meta::Labels;
use margay_api::network::NodeInfo;
use margay_api::settings::{FelixOverrides, FelixSettings, SettingsScope};

use crate::digest;
use crate::flush::{Audience, Change, NodeSet, RecordChange};
use crate::model::{Record, RecordId};
use crate::refcount::{Digested, change_for_all, no_nodes};

/// All FelixConfigurations, and the effective record of each node.
#[derive(Debug)]
pub(crate) struct EffectiveSettings {
    objects: BTreeMap<String, FelixOverrides>,
    /// Namespaces that name pools for their pods.
    naming_pools: BTreeSet<String>,
    /// As of the last flush, for nodes without settings of their own; `None` before the first
    /// flush.
    default: Option<Digested>,
    /// As of the last flush, for nodes that an object other than `default` applies to.
    own: BTreeMap<String, Digested>,
    dirty: bool,
}

impl Default for EffectiveSettings {
    fn default() -> Self {
        // The built-in settings apply before there is any object.
        Self {
            objects: BTreeMap::new(),
            naming_pools: BTreeSet::new(),
            default: None,
            own: BTreeMap::new(),
            dirty: true,
        }
    }
}

impl EffectiveSettings {
    pub(crate) fn set(&mut self, name: String, overrides: Option<FelixOverrides>) {
        self.dirty = true;
        match overrides {
            Some(overrides) => self.objects.insert(name, overrides),
            None => self.objects.remove(&name),
        };
    }

    /// Records if a namespace names pools for its pods; nodes are notified whether any does.
    pub(crate) fn set_names_pools(&mut self, namespace: &str, names_pools: bool) {
        let had_none = self.naming_pools.is_empty();
        if names_pools {
            self.naming_pools.insert(namespace.to_owned());
        } else {
            self.naming_pools.remove(namespace);
        }
        self.dirty |= had_none != self.naming_pools.is_empty();
    }

    /// Applies a changed Node; only its labels matter, and only to selectors.
    pub(crate) fn update_node(&mut self, before: Option<&NodeInfo>, now: Option<&NodeInfo>) {
        self.dirty |=
            before.map(|node| &node.labels) != now.map(|node| &node.labels) && self.has_selectors();
    }

    /// Record of a node, as of the last flush.
    pub(crate) fn get(&self, node: &str) -> Option<&Digested> {
        self.own.get(node).or(self.default.as_ref())
    }

    /// Returns the change since the last flush.
    pub(crate) fn flush(&mut self, nodes: &BTreeMap<String, NodeInfo>) -> Option<RecordChange> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        let default = with_digest(self.cluster_settings());
        let own = self.nodes_with_own(nodes).into_iter().map(|node| {
            let settings = self.node_settings(&node, nodes.get(&node).map(|info| &info.labels));
            (node, with_digest(settings))
        });
        let own: BTreeMap<String, Digested> = own.collect();
        let before = self.default.replace(default);
        let own_before = std::mem::replace(&mut self.own, own);
        let digest =
            |own: &BTreeMap<String, Digested>, default: &Option<Digested>, node: &String| {
                own.get(node).or(default.as_ref()).map(|held| held.digest)
            };
        if before.as_ref().map(|held| held.digest) != self.default.as_ref().map(|held| held.digest)
        {
            return Some(change_for_all(before.is_some(), true));
        }
        let named: BTreeSet<&String> = own_before.keys().chain(self.own.keys()).collect();
        let differ = named.into_iter().filter(|node| {
            digest(&own_before, &before, node) != digest(&self.own, &self.default, node)
        });
        let nodes: NodeSet = differ.map(String::as_str).collect();
        (!nodes.is_empty()).then_some(RecordChange {
            gained: no_nodes(),
            kept: Audience::Nodes(nodes),
            change: Change::Value,
            lost: no_nodes(),
        })
    }

    fn has_selectors(&self) -> bool {
        self.objects
            .values()
            .any(|object| matches!(object.scope, SettingsScope::Selected(_)))
    }

    /// Nodes that an object other than `default` applies to.
    fn nodes_with_own(&self, nodes: &BTreeMap<String, NodeInfo>) -> BTreeSet<String> {
        let mut special = BTreeSet::new();
        for object in self.objects.values() {
            match &object.scope {
                SettingsScope::Cluster => {}
                SettingsScope::Node(name) => {
                    special.insert(name.clone());
                }
                SettingsScope::Selected(_) => {
                    let selected = nodes
                        .iter()
                        .filter(|(name, node)| object.is_for(name, Some(&node.labels)));
                    special.extend(selected.map(|(name, _)| name.clone()));
                }
            }
        }
        special
    }

    fn cluster_settings(&self) -> FelixSettings {
        let objects = self
            .objects
            .values()
            .filter(|object| object.scope == SettingsScope::Cluster);
        let built_in = FelixSettings {
            no_namespace_names_pools: self.naming_pools.is_empty(),
            ..FelixSettings::default()
        };
        objects.fold(built_in, |settings, object| object.over(settings))
    }

    /// Applies the layers from the weakest on: `default`, selector-scoped objects (the first by
    /// name is the strongest), the node's own.
    fn node_settings(&self, node: &str, labels: Option<&Labels>) -> FelixSettings {
        let of = |rank: u8| {
            self.objects
                .values()
                .rev()
                .filter(move |object| weight(&object.scope) == rank)
        };
        let layers = (1..=2)
            .flat_map(of)
            .filter(|object| object.is_for(node, labels));
        layers.fold(self.cluster_settings(), |settings, object| {
            object.over(settings)
        })
    }
}

const fn weight(scope: &SettingsScope) -> u8 {
    match scope {
        SettingsScope::Cluster => 0,
        SettingsScope::Selected(_) => 1,
        SettingsScope::Node(_) => 2,
    }
}

fn with_digest(settings: FelixSettings) -> Digested {
    let record = Record::Settings(settings);
    let digest = digest::digest(&RecordId::Settings, &record);
    Digested { record, digest }
}
