//! Label index: the items that each selector matches, maintained in both directions.
//!
//! An item is an endpoint or a network set. It has labels of its own and inherits those of its
//! namespace and service account, which are stored once, with the parent. Selectors are looked up
//! by item, and items by selector, through the selector's most selective requirement: its namespace
//! first, then the label and value that fewest items are expected to have.
//!
//! A selector is maintained only while it is *live*, that is while a policy in force or a live set
//! uses it.

use std::collections::{BTreeMap, BTreeSet};

use crate::interner::{Interner, Marks, Symbol};
use crate::item_set::ItemSet;
use crate::postings::Postings;
use crate::selector::{IndexKey, Test, WellKnown, index_keys, is_inherited};
use crate::store::{Map, Slab};

mod select;

/// Labels, sorted by the symbols of their keys.
pub(crate) type LabelList = Box<[(Symbol, Symbol)]>;

/// An endpoint or network set as selectors match it.
#[derive(Debug, Default)]
struct Item {
    labels: LabelList,
    /// Namespace and service account of a pod, or the profiles of a host endpoint. Where several
    /// define a label, the first one wins.
    parents: Box<[u32]>,
    /// Live selectors that match it and are not broad, sorted.
    selectors: Vec<u32>,
}

/// A namespace or service account.
#[derive(Debug, Default)]
struct Parent {
    name: ParentName,
    /// `None`: the object does not exist, and nothing is inherited.
    labels: Option<LabelList>,
    items: BTreeSet<u32>,
}

/// A namespace, or a service account in it.
pub(crate) type ParentName = (Symbol, Option<Symbol>);

#[derive(Debug)]
struct IndexedSelector {
    test: Test,
    /// Items that it matches, while it is live.
    items: ItemSet,
    is_live: bool,
}

/// Difference between the selectors that match an item and those linked to it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MatchDelta {
    pub(crate) removed: Vec<u32>,
    pub(crate) added: Vec<u32>,
}

/// Index of items by label and of live selectors by index key.
#[derive(Debug)]
pub(crate) struct Index {
    well_known: WellKnown,
    items: Slab<Item>,
    parents: Slab<Parent>,
    selectors: Slab<IndexedSelector>,
    parent_by_name: Map<ParentName, u32>,
    /// Live selectors whose sets of items are broad, sorted. Items have no links to these: each of
    /// so many would be touched when such a selector comes or goes.
    broad: Vec<u32>,
    /// Live selectors by index key.
    selectors_by_key: Map<IndexKey, Vec<u32>>,
    /// Live selectors by the inherited labels that they use.
    selectors_by_inherited: Map<Symbol, BTreeSet<u32>>,
    /// Items by own label, then value.
    items_by_label: Map<Symbol, BTreeMap<Symbol, Postings>>,
    /// Namespaces and service accounts by label (with its prefix), then value.
    parents_by_label: Map<Symbol, BTreeMap<Symbol, Postings>>,
}

impl Index {
    pub(crate) fn new(well_known: WellKnown) -> Self {
        Self {
            well_known,
            items: Slab::default(),
            parents: Slab::default(),
            selectors: Slab::default(),
            parent_by_name: Map::default(),
            broad: Vec::new(),
            selectors_by_key: Map::default(),
            selectors_by_inherited: Map::default(),
            items_by_label: Map::default(),
            parents_by_label: Map::default(),
        }
    }

    /// Adds an item without labels, which no selector matches until [`Index::place_item`].
    pub(crate) fn add_item(&mut self) -> u32 {
        self.items.insert(Item::default())
    }

    /// Removes an item. The caller has unlinked it from every selector.
    pub(crate) fn remove_item(&mut self, item: u32) {
        self.place_item(item, Box::default(), &[]);
        self.items.remove(item);
    }

    /// Sets labels and parents (without duplicates) of an item. Returns true if they changed.
    pub(crate) fn place_item(
        &mut self,
        item: u32,
        labels: LabelList,
        parents: &[ParentName],
    ) -> bool {
        let parents: Box<[u32]> = parents
            .iter()
            .map(|name| self.find_or_add_parent(*name))
            .collect();
        if self.items[item].labels == labels && self.items[item].parents == parents {
            return false;
        }
        let before = std::mem::take(&mut self.items[item]);
        for (key, value) in &before.labels {
            if self.is_indexed(*key) && !labels.contains(&(*key, *value)) {
                unindex_label(&mut self.items_by_label, *key, *value, item);
            }
        }
        for (key, value) in &labels {
            if self.is_indexed(*key) && !before.labels.contains(&(*key, *value)) {
                index_label(&mut self.items_by_label, *key, *value, item);
            }
        }
        for parent in before
            .parents
            .iter()
            .filter(|parent| !parents.contains(parent))
        {
            self.parents[*parent].items.remove(&item);
            self.free_parent(*parent);
        }
        for parent in &parents {
            self.parents[*parent].items.insert(item);
        }
        self.items[item] = Item {
            labels,
            parents,
            selectors: before.selectors,
        };
        true
    }

    /// Compares the selectors that match an item with those linked to it.
    pub(crate) fn matches(&self, item: u32, interner: &Interner) -> MatchDelta {
        let mut now = Vec::new();
        let entry = &self.items[item];
        let mut lookup = |index_key: IndexKey| {
            let found = self.selectors_by_key.get(&index_key).into_iter().flatten();
            now.extend(found.filter(|selector| self.is_match(**selector, item, interner)));
        };
        lookup(IndexKey::Any);
        // A host endpoint is in no namespace: this looks up that of its first profile, which costs
        // a lookup and matches nothing.
        let namespace = entry
            .parents
            .first()
            .map(|parent| self.parents[*parent].name.0);
        if let Some(namespace) = namespace {
            lookup(IndexKey::In(namespace));
        }
        for (key, value) in &entry.labels {
            lookup(IndexKey::Key(*key));
            lookup(IndexKey::Pair(*key, *value));
            if let Some(namespace) = namespace {
                lookup(IndexKey::InPair(namespace, *key, *value));
            }
        }
        for (key, value) in self.inherited(item) {
            lookup(IndexKey::Key(*key));
            lookup(IndexKey::Pair(*key, *value));
        }
        now.sort_unstable();
        now.dedup();
        difference(&self.selectors_of(item), &now)
    }

    /// Sets the labels (with their prefix) of a namespace or service account; `None`: the object
    /// does not exist. Returns the items whose matches changed, each with the difference.
    pub(crate) fn set_parent_labels(
        &mut self,
        name: ParentName,
        labels: Option<LabelList>,
        interner: &Interner,
    ) -> Vec<(u32, MatchDelta)> {
        let parent = self.find_or_add_parent(name);
        let before = self.parents[parent].labels.take();
        let (old, new) = (
            before.as_deref().unwrap_or_default(),
            labels.as_deref().unwrap_or_default(),
        );
        let removed = old.iter().filter(|label| !new.contains(label));
        let added = new.iter().filter(|label| !old.contains(label));
        let changed = removed.clone().chain(added.clone());
        let users = changed.filter_map(|(key, _)| self.selectors_by_inherited.get(key));
        let users: Vec<&BTreeSet<u32>> = users.collect();
        let affected = match users.iter().map(|selectors| selectors.len()).sum() {
            0 => Affected::None,
            1..=64 => Affected::These(users.into_iter().flatten().copied().collect()),
            _ => Affected::Many,
        };
        removed.for_each(|(key, value)| {
            unindex_label(&mut self.parents_by_label, *key, *value, parent)
        });
        added
            .for_each(|(key, value)| index_label(&mut self.parents_by_label, *key, *value, parent));
        self.parents[parent].labels = labels;
        let mut differ = Vec::new();
        for item in &self.parents[parent].items {
            let matches = match &affected {
                Affected::None => break,
                Affected::These(selectors) => self.check_selectors(*item, selectors, interner),
                Affected::Many => self.matches(*item, interner),
            };
            if matches != MatchDelta::default() {
                differ.push((*item, matches));
            }
        }
        self.free_parent(parent);
        differ
    }

    /// Items of a namespace or service account.
    pub(crate) fn children(&self, name: ParentName) -> impl Iterator<Item = u32> {
        let parent = self.parent_by_name.get(&name);
        parent
            .into_iter()
            .flat_map(|parent| self.parents[*parent].items.iter().copied())
    }

    /// Returns true if the namespace or service account exists as an object.
    pub(crate) fn is_parent(&self, name: ParentName) -> bool {
        self.parent_by_name
            .get(&name)
            .is_some_and(|parent| self.parents[*parent].labels.is_some())
    }

    /// Adds a selector, which is not live.
    pub(crate) fn add_selector(&mut self, test: Test) -> u32 {
        self.selectors.insert(IndexedSelector {
            test,
            items: ItemSet::default(),
            is_live: false,
        })
    }

    /// Removes a selector that is not live.
    pub(crate) fn remove_selector(&mut self, selector: u32) {
        self.selectors.remove(selector);
    }

    /// Makes a selector live: computes its items and maintains them from now on.
    pub(crate) fn activate(&mut self, selector: u32, interner: &Interner) {
        if std::mem::replace(&mut self.selectors[selector].is_live, true) {
            return;
        }
        let entry = &self.selectors[selector];
        for index_key in index_keys(&entry.test.requirements(), &self.well_known, interner) {
            self.selectors_by_key
                .entry(index_key)
                .or_default()
                .push(selector);
        }
        entry.test.keys(&mut |key| {
            if is_inherited(interner.get(key)) {
                self.selectors_by_inherited
                    .entry(key)
                    .or_default()
                    .insert(selector);
            }
        });
        self.selectors[selector].items = self.select(selector, interner);
        match self.selectors[selector].items.is_broad() {
            true => insert_sorted(&mut self.broad, selector),
            false => self.link_items(selector),
        }
    }

    /// Stops maintaining the items of a selector.
    pub(crate) fn deactivate(&mut self, selector: u32, interner: &Interner) {
        if !std::mem::replace(&mut self.selectors[selector].is_live, false) {
            return;
        }
        match self.selectors[selector].items.is_broad() {
            true => remove_sorted(&mut self.broad, selector),
            false => self.unlink_items(selector),
        }
        self.selectors[selector].items = ItemSet::default();
        let entry = &self.selectors[selector];
        for index_key in index_keys(&entry.test.requirements(), &self.well_known, interner) {
            if let Some(found) = self.selectors_by_key.get_mut(&index_key) {
                found.retain(|found| *found != selector);
                if found.is_empty() {
                    self.selectors_by_key.remove(&index_key);
                }
            }
        }
        entry.test.keys(&mut |key| {
            if let Some(found) = self.selectors_by_inherited.get_mut(&key) {
                found.remove(&selector);
                if found.is_empty() {
                    self.selectors_by_inherited.remove(&key);
                }
            }
        });
    }

    /// Records that the selector matches the item.
    pub(crate) fn link(&mut self, selector: u32, item: u32) {
        let was_broad = self.selectors[selector].items.is_broad();
        if !was_broad {
            insert_sorted(&mut self.items[item].selectors, selector);
        }
        self.selectors[selector].items.insert(item);
        if !was_broad && self.selectors[selector].items.is_broad() {
            self.unlink_items(selector);
            insert_sorted(&mut self.broad, selector);
        }
    }

    /// Records that the selector does not match the item any more.
    pub(crate) fn unlink(&mut self, selector: u32, item: u32) {
        let was_broad = self.selectors[selector].items.is_broad();
        if !was_broad {
            remove_sorted(&mut self.items[item].selectors, selector);
        }
        self.selectors[selector].items.remove(item);
        if was_broad && !self.selectors[selector].items.is_broad() {
            remove_sorted(&mut self.broad, selector);
            self.link_items(selector);
        }
    }

    /// Live selectors that match the item, sorted.
    pub(crate) fn selectors_of(&self, item: u32) -> Vec<u32> {
        let own = self.items[item].selectors.iter().copied();
        let broad = self.broad.iter().copied();
        let mut all: Vec<u32> = own
            .chain(broad.filter(|selector| self.selectors[*selector].items.contains(item)))
            .collect();
        all.sort_unstable();
        all
    }

    /// Items that a live selector matches.
    pub(crate) fn items_of(&self, selector: u32) -> &ItemSet {
        &self.selectors[selector].items
    }

    /// Links the items of a selector to it.
    fn link_items(&mut self, selector: u32) {
        for item in self.selectors[selector].items.iter() {
            insert_sorted(&mut self.items[item].selectors, selector);
        }
    }

    fn unlink_items(&mut self, selector: u32) {
        for item in self.selectors[selector].items.iter() {
            remove_sorted(&mut self.items[item].selectors, selector);
        }
    }

    /// Marks the symbols in use.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        marks.mark_all([self.well_known.namespace, self.well_known.orchestrator]);
        let items = self.items.iter().flat_map(|(_, item)| item.labels.iter());
        let parents = self
            .parents
            .iter()
            .flat_map(|(_, parent)| parent.labels.iter().flatten());
        for (key, value) in items.chain(parents) {
            marks.mark_all([*key, *value]);
        }
        for (_, parent) in self.parents.iter() {
            marks.mark(parent.name.0);
            marks.mark_all(parent.name.1);
        }
        self.selectors
            .iter()
            .for_each(|(_, selector)| selector.test.mark(marks));
    }

    fn find_or_add_parent(&mut self, name: ParentName) -> u32 {
        if let Some(known) = self.parent_by_name.get(&name) {
            return *known;
        }
        let parent = self.parents.insert(Parent {
            name,
            ..Parent::default()
        });
        self.parent_by_name.insert(name, parent);
        parent
    }

    fn free_parent(&mut self, parent: u32) {
        let entry = &self.parents[parent];
        if entry.labels.is_none() && entry.items.is_empty() {
            self.parent_by_name.remove(&entry.name);
            self.parents.remove(parent);
        }
    }

    fn inherited(&self, item: u32) -> impl Iterator<Item = &(Symbol, Symbol)> {
        let parents = self.items[item].parents.iter();
        parents.flat_map(|parent| self.parents[*parent].labels.iter().flatten())
    }

    /// Returns true if the selector, live or not, matches the item.
    pub(crate) fn is_match(&self, selector: u32, item: u32, interner: &Interner) -> bool {
        self.passes(&self.selectors[selector].test, item, interner)
    }

    /// Returns true if the item passes the test.
    fn passes(&self, test: &Test, item: u32, interner: &Interner) -> bool {
        let own = &self.items[item].labels;
        let label = |key: Symbol| {
            let own = own
                .binary_search_by_key(&key, |(key, _)| *key)
                .ok()
                .map(|position| own[position].1);
            own.or_else(|| {
                self.inherited(item)
                    .find(|(inherited, _)| *inherited == key)
                    .map(|(_, value)| *value)
            })
        };
        test.matches(interner, &label)
    }

    /// Checks these selectors against an item.
    fn check_selectors(
        &self,
        item: u32,
        affected: &BTreeSet<u32>,
        interner: &Interner,
    ) -> MatchDelta {
        let mut matches = MatchDelta::default();
        for selector in affected {
            let was = self.selectors[*selector].items.contains(item);
            match (was, self.is_match(*selector, item, interner)) {
                (true, false) => matches.removed.push(*selector),
                (false, true) => matches.added.push(*selector),
                _ => {}
            }
        }
        matches
    }

    /// Returns true if items are indexed by this label. Namespace and orchestrator are not: nearly
    /// every item has them.
    fn is_indexed(&self, key: Symbol) -> bool {
        key != self.well_known.namespace && key != self.well_known.orchestrator
    }
}

/// Selectors that use labels which changed.
enum Affected {
    None,
    These(BTreeSet<u32>),
    /// Too many: matching the item again is cheaper.
    Many,
}

fn index_label(
    map: &mut Map<Symbol, BTreeMap<Symbol, Postings>>,
    key: Symbol,
    value: Symbol,
    entry: u32,
) {
    map.entry(key)
        .or_default()
        .entry(value)
        .or_default()
        .insert(entry);
}

fn unindex_label(
    map: &mut Map<Symbol, BTreeMap<Symbol, Postings>>,
    key: Symbol,
    value: Symbol,
    entry: u32,
) {
    if let Some(by_value) = map.get_mut(&key) {
        if let Some(entries) = by_value.get_mut(&value) {
            entries.remove(entry);
            if entries.is_empty() {
                by_value.remove(&value);
            }
        }
        if by_value.is_empty() {
            map.remove(&key);
        }
    }
}

fn insert_sorted(list: &mut Vec<u32>, value: u32) {
    if let Err(position) = list.binary_search(&value) {
        list.insert(position, value);
    }
}

fn remove_sorted(list: &mut Vec<u32>, value: u32) {
    if let Ok(position) = list.binary_search(&value) {
        list.remove(position);
    }
}

/// Difference between two sorted lists.
fn difference(before: &[u32], now: &[u32]) -> MatchDelta {
    MatchDelta {
        removed: before
            .iter()
            .filter(|value| now.binary_search(value).is_err())
            .copied()
            .collect(),
        added: now
            .iter()
            .filter(|value| before.binary_search(value).is_err())
            .copied()
            .collect(),
    }
}
