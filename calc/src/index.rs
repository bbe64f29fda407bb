//! The label index: which items each selector selects, kept up to date in both directions.
//!
//! An item is an endpoint or a network set. It has labels of its own and inherits those of its namespace and service account,
//! which are kept once, with the parent. A selector is found by an item, and an item by a selector, through what the selector
//! demands at least: its namespace first, then the label and value that leave the fewest.
//!
//! A selector takes part only while it is *live*, that is while somebody wants to know what it selects.

use std::collections::{BTreeMap, BTreeSet};

use crate::selector::{Known, Need, Place, Test, is_inherited, places};
use crate::store::{Map, Slab};
use crate::texts::{Marks, Text, Texts};

/// Labels, sorted by the numbers of their keys.
pub(crate) type LabelList = Box<[(Text, Text)]>;

/// An endpoint or network set, as selectors see it.
#[derive(Debug, Default)]
struct Item {
    labels: LabelList,
    /// A pod's namespace and service account, or what a host endpoint's profiles are; of labels that several have, the first's counts.
    parents: Box<[u32]>,
    /// Live selectors that select it, sorted.
    selectors: Vec<u32>,
}

/// A namespace or service account.
#[derive(Debug, Default)]
struct Parent {
    name: ParentName,
    /// Absent: the object does not exist, and nothing is inherited.
    labels: Option<LabelList>,
    items: BTreeSet<u32>,
}

/// A namespace, or a service account in it.
pub(crate) type ParentName = (Text, Option<Text>);

#[derive(Debug)]
struct Selector {
    test: Test,
    /// Items that it selects, while it is live.
    items: BTreeSet<u32>,
    is_live: bool,
}

/// How the selectors of an item differ from what they were.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Matches {
    pub(crate) gone: Vec<u32>,
    pub(crate) new: Vec<u32>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Index {
    known: Known,
    items: Slab<Item>,
    parents: Slab<Parent>,
    selectors: Slab<Selector>,
    parent_by_name: Map<ParentName, u32>,
    /// Live selectors by where they are found.
    selectors_by_place: Map<Place, Vec<u32>>,
    /// Live selectors by the inherited labels that they look at.
    selectors_by_inherited: Map<Text, BTreeSet<u32>>,
    /// Items by label of their own, then value.
    items_by_label: Map<Text, BTreeMap<Text, BTreeSet<u32>>>,
    /// Namespaces and service accounts by label (with its prefix), then value.
    parents_by_label: Map<Text, BTreeMap<Text, BTreeSet<u32>>>,
}

impl Index {
    pub(crate) fn new(known: Known) -> Self {
        Self {
            known,
            items: Slab::default(),
            parents: Slab::default(),
            selectors: Slab::default(),
            parent_by_name: Map::default(),
            selectors_by_place: Map::default(),
            selectors_by_inherited: Map::default(),
            items_by_label: Map::default(),
            parents_by_label: Map::default(),
        }
    }

    /// A new item without labels, which no selector selects until [`Index::relabel`].
    pub(crate) fn add_item(&mut self) -> u32 {
        self.items.insert(Item::default())
    }

    /// Forgets an item. The caller has unlinked it from every selector.
    pub(crate) fn remove_item(&mut self, item: u32) {
        self.place_item(item, Box::default(), &[]);
        self.items.remove(item);
    }

    /// Gives an item other labels and parents, each of which is there once. True if they differ from those it had.
    pub(crate) fn place_item(&mut self, item: u32, labels: LabelList, parents: &[ParentName]) -> bool {
        let parents: Box<[u32]> = parents.iter().map(|name| self.parent(*name)).collect();
        if self.items[item].labels == labels && self.items[item].parents == parents {
            return false;
        }
        let before = std::mem::take(&mut self.items[item]);
        for (key, value) in &before.labels {
            if self.is_posted(*key) && !labels.contains(&(*key, *value)) {
                unpost(&mut self.items_by_label, *key, *value, item);
            }
        }
        for (key, value) in &labels {
            if self.is_posted(*key) && !before.labels.contains(&(*key, *value)) {
                post(&mut self.items_by_label, *key, *value, item);
            }
        }
        for parent in before.parents.iter().filter(|parent| !parents.contains(parent)) {
            self.parents[*parent].items.remove(&item);
            self.drop_parent(*parent);
        }
        for parent in &parents {
            self.parents[*parent].items.insert(item);
        }
        self.items[item] = Item { labels, parents, selectors: before.selectors };
        true
    }

    /// How the selectors of an item differ from what is linked.
    pub(crate) fn matches(&self, item: u32, texts: &Texts) -> Matches {
        let mut now = Vec::new();
        let entry = &self.items[item];
        let mut look = |place: Place| {
            let found = self.selectors_by_place.get(&place).into_iter().flatten();
            now.extend(found.filter(|selector| self.is_selected(**selector, item, texts)));
        };
        look(Place::Any);
        // Of a host endpoint it is none of its own, which costs a look in vain.
        let namespace = entry.parents.first().map(|parent| self.parents[*parent].name.0);
        if let Some(namespace) = namespace {
            look(Place::In(namespace));
        }
        for (key, value) in &entry.labels {
            look(Place::Key(*key));
            look(Place::Pair(*key, *value));
            if let Some(namespace) = namespace {
                look(Place::InPair(namespace, *key, *value));
            }
        }
        for (key, value) in self.inherited(item) {
            look(Place::Key(*key));
            look(Place::Pair(*key, *value));
        }
        now.sort_unstable();
        now.dedup();
        difference(&entry.selectors, &now)
    }

    /// Gives a namespace or service account other labels (with their prefix); absent: the object does not exist. Answers with the items
    /// whose selectors may differ now, each with the difference.
    pub(crate) fn relabel_parent(
        &mut self,
        name: ParentName,
        labels: Option<LabelList>,
        texts: &Texts,
    ) -> Vec<(u32, Matches)> {
        let parent = self.parent(name);
        let before = self.parents[parent].labels.take();
        let (old, new) = (before.as_deref().unwrap_or_default(), labels.as_deref().unwrap_or_default());
        let gone = old.iter().filter(|label| !new.contains(label));
        let came = new.iter().filter(|label| !old.contains(label));
        let changed = gone.clone().chain(came.clone());
        let looking = changed.filter_map(|(key, _)| self.selectors_by_inherited.get(key));
        let looking: Vec<&BTreeSet<u32>> = looking.collect();
        let concerned = match looking.iter().map(|selectors| selectors.len()).sum() {
            0 => Concerned::None,
            1..=64 => Concerned::These(looking.into_iter().flatten().copied().collect()),
            _ => Concerned::Many,
        };
        gone.for_each(|(key, value)| unpost(&mut self.parents_by_label, *key, *value, parent));
        came.for_each(|(key, value)| post(&mut self.parents_by_label, *key, *value, parent));
        self.parents[parent].labels = labels;
        let mut differ = Vec::new();
        for item in &self.parents[parent].items {
            let matches = match &concerned {
                Concerned::None => break,
                Concerned::These(selectors) => self.recheck(*item, selectors, texts),
                Concerned::Many => self.matches(*item, texts),
            };
            if matches != Matches::default() {
                differ.push((*item, matches));
            }
        }
        self.drop_parent(parent);
        differ
    }

    /// Items of a namespace or service account.
    pub(crate) fn children(&self, name: ParentName) -> impl Iterator<Item = u32> {
        let parent = self.parent_by_name.get(&name);
        parent.into_iter().flat_map(|parent| self.parents[*parent].items.iter().copied())
    }

    /// Whether the namespace or service account exists as an object.
    pub(crate) fn is_parent(&self, name: ParentName) -> bool {
        self.parent_by_name.get(&name).is_some_and(|parent| self.parents[*parent].labels.is_some())
    }

    /// A new selector, which is not live.
    pub(crate) fn add_selector(&mut self, test: Test) -> u32 {
        self.selectors.insert(Selector { test, items: BTreeSet::new(), is_live: false })
    }

    /// Forgets a selector that is not live.
    pub(crate) fn remove_selector(&mut self, selector: u32) {
        self.selectors.remove(selector);
    }

    /// From now on, what the selector selects is kept up to date.
    pub(crate) fn enliven(&mut self, selector: u32, texts: &Texts) {
        if std::mem::replace(&mut self.selectors[selector].is_live, true) {
            return;
        }
        let entry = &self.selectors[selector];
        for place in places(&entry.test.needs(), &self.known, texts) {
            self.selectors_by_place.entry(place).or_default().push(selector);
        }
        entry.test.keys(&mut |key| {
            if is_inherited(texts.get(key)) {
                self.selectors_by_inherited.entry(key).or_default().insert(selector);
            }
        });
        let selected = self.select(selector, texts);
        for item in &selected {
            let selectors = &mut self.items[*item].selectors;
            if let Err(position) = selectors.binary_search(&selector) {
                selectors.insert(position, selector);
            }
        }
        self.selectors[selector].items = selected.into_iter().collect();
    }

    /// From now on, nobody wants to know what the selector selects.
    pub(crate) fn retire(&mut self, selector: u32, texts: &Texts) {
        if !std::mem::replace(&mut self.selectors[selector].is_live, false) {
            return;
        }
        for item in std::mem::take(&mut self.selectors[selector].items) {
            let selectors = &mut self.items[item].selectors;
            selectors.retain(|linked| *linked != selector);
        }
        let entry = &self.selectors[selector];
        for place in places(&entry.test.needs(), &self.known, texts) {
            if let Some(found) = self.selectors_by_place.get_mut(&place) {
                found.retain(|found| *found != selector);
                if found.is_empty() {
                    self.selectors_by_place.remove(&place);
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

    /// The item is selected.
    pub(crate) fn link(&mut self, selector: u32, item: u32) {
        self.selectors[selector].items.insert(item);
        let selectors = &mut self.items[item].selectors;
        if let Err(position) = selectors.binary_search(&selector) {
            selectors.insert(position, selector);
        }
    }

    /// The item is not selected any more.
    pub(crate) fn unlink(&mut self, selector: u32, item: u32) {
        self.selectors[selector].items.remove(&item);
        let selectors = &mut self.items[item].selectors;
        if let Ok(position) = selectors.binary_search(&selector) {
            selectors.remove(position);
        }
    }

    /// Live selectors that select the item.
    pub(crate) fn selectors_of(&self, item: u32) -> &[u32] {
        &self.items[item].selectors
    }

    /// Items that a live selector selects.
    pub(crate) fn items_of(&self, selector: u32) -> &BTreeSet<u32> {
        &self.selectors[selector].items
    }

    /// Marks every text that is kept here.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        marks.all([self.known.namespace, self.known.orchestrator]);
        let items = self.items.iter().flat_map(|(_, item)| item.labels.iter());
        let parents = self.parents.iter().flat_map(|(_, parent)| parent.labels.iter().flatten());
        for (key, value) in items.chain(parents) {
            marks.all([*key, *value]);
        }
        for (_, parent) in self.parents.iter() {
            marks.mark(parent.name.0);
            marks.all(parent.name.1);
        }
        self.selectors.iter().for_each(|(_, selector)| selector.test.mark(marks));
    }

    fn parent(&mut self, name: ParentName) -> u32 {
        if let Some(known) = self.parent_by_name.get(&name) {
            return *known;
        }
        let parent = self.parents.insert(Parent { name, ..Parent::default() });
        self.parent_by_name.insert(name, parent);
        parent
    }

    fn drop_parent(&mut self, parent: u32) {
        let entry = &self.parents[parent];
        if entry.labels.is_none() && entry.items.is_empty() {
            self.parent_by_name.remove(&entry.name);
            self.parents.remove(parent);
        }
    }

    fn inherited(&self, item: u32) -> impl Iterator<Item = &(Text, Text)> {
        let parents = self.items[item].parents.iter();
        parents.flat_map(|parent| self.parents[*parent].labels.iter().flatten())
    }

    /// Items that a selector selects, whether it is live or not.
    pub(crate) fn select(&self, selector: u32, texts: &Texts) -> Vec<u32> {
        self.candidates(selector).filter(|item| self.is_selected(selector, *item, texts)).collect()
    }

    /// Whether a selector selects the item, whether it is live or not.
    pub(crate) fn is_selected(&self, selector: u32, item: u32, texts: &Texts) -> bool {
        let own = &self.items[item].labels;
        let label = |key: Text| {
            let own = own.binary_search_by_key(&key, |(key, _)| *key).ok().map(|position| own[position].1);
            own.or_else(|| self.inherited(item).find(|(inherited, _)| *inherited == key).map(|(_, value)| *value))
        };
        self.selectors[selector].test.matches(texts, &label)
    }

    /// The difference that these selectors make for an item.
    fn recheck(&self, item: u32, concerned: &BTreeSet<u32>, texts: &Texts) -> Matches {
        let mut matches = Matches::default();
        for selector in concerned {
            let was = self.items[item].selectors.binary_search(selector).is_ok();
            match (was, self.is_selected(*selector, item, texts)) {
                (true, false) => matches.gone.push(*selector),
                (false, true) => matches.new.push(*selector),
                _ => {}
            }
        }
        matches
    }

    /// Items among which are all that the selector selects: the smallest group that its needs lead to.
    fn candidates(&self, selector: u32) -> Box<dyn Iterator<Item = u32> + '_> {
        let mut best: Option<(usize, Group<'_>)> = None;
        for (key, need) in &self.selectors[selector].test.needs() {
            if let Some(group) = self.group(*key, need) {
                let size = group.size(self);
                if best.as_ref().is_none_or(|(smallest, _)| size < *smallest) {
                    best = Some((size, group));
                }
            }
        }
        match best {
            Some((_, group)) => group.items(self),
            None => Box::new(self.items.iter().map(|(item, _)| item)),
        }
    }

    /// The items that meet one need; none if that is not known.
    fn group(&self, key: Text, need: &Need) -> Option<Group<'_>> {
        if key == self.known.namespace {
            return match need {
                Need::OneOf(values) => {
                    let parents = values.iter().filter_map(|value| self.parent_by_name.get(&(*value, None)));
                    Some(Group::Children(parents.copied().collect()))
                }
                Need::Present => None,
            };
        }
        // A label is inherited by its prefix, and then it is nobody's own.
        if let Some(by_value) = self.parents_by_label.get(&key) {
            return Some(Group::Children(pick(by_value, need).flatten().copied().collect()));
        }
        if !self.is_posted(key) {
            return None;
        }
        let by_value = self.items_by_label.get(&key);
        Some(Group::Items(by_value.into_iter().flat_map(|by_value| pick(by_value, need)).collect()))
    }

    /// Whether items are kept by this label. Every item has those that are not.
    fn is_posted(&self, key: Text) -> bool {
        key != self.known.namespace && key != self.known.orchestrator
    }
}

/// Selectors that look at labels which changed.
enum Concerned {
    None,
    These(BTreeSet<u32>),
    /// So many that an item had better look for its selectors anew.
    Many,
}

/// Items that meet a need. An item is in one only once, unless it has several parents of a kind, as host endpoints may.
enum Group<'a> {
    Items(Vec<&'a BTreeSet<u32>>),
    Children(Vec<u32>),
}

impl<'a> Group<'a> {
    fn size(&self, index: &Index) -> usize {
        match self {
            Self::Items(groups) => groups.iter().map(|group| group.len()).sum(),
            Self::Children(parents) => parents.iter().map(|parent| index.parents[*parent].items.len()).sum(),
        }
    }

    fn items(self, index: &'a Index) -> Box<dyn Iterator<Item = u32> + 'a> {
        match self {
            Self::Items(groups) => Box::new(groups.into_iter().flatten().copied()),
            Self::Children(parents) => {
                Box::new(parents.into_iter().flat_map(|parent| index.parents[parent].items.iter().copied()))
            }
        }
    }
}

fn pick<'a>(
    by_value: &'a BTreeMap<Text, BTreeSet<u32>>,
    need: &Need,
) -> Box<dyn Iterator<Item = &'a BTreeSet<u32>> + 'a> {
    match need {
        Need::Present => Box::new(by_value.values()),
        Need::OneOf(values) => {
            let found: Vec<_> = values.iter().filter_map(|value| by_value.get(value)).collect();
            Box::new(found.into_iter())
        }
    }
}

fn post(map: &mut Map<Text, BTreeMap<Text, BTreeSet<u32>>>, key: Text, value: Text, entry: u32) {
    map.entry(key).or_default().entry(value).or_default().insert(entry);
}

fn unpost(map: &mut Map<Text, BTreeMap<Text, BTreeSet<u32>>>, key: Text, value: Text, entry: u32) {
    if let Some(by_value) = map.get_mut(&key) {
        if let Some(entries) = by_value.get_mut(&value) {
            entries.remove(&entry);
            if entries.is_empty() {
                by_value.remove(&value);
            }
        }
        if by_value.is_empty() {
            map.remove(&key);
        }
    }
}

/// The difference between two sorted lists.
fn difference(before: &[u32], now: &[u32]) -> Matches {
    Matches {
        gone: before.iter().filter(|value| now.binary_search(value).is_err()).copied().collect(),
        new: now.iter().filter(|value| before.binary_search(value).is_err()).copied().collect(),
    }
}
