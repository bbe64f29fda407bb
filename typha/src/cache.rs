//! The latest state of every watched object in parsed form, and what of it is news.
//!
//! The parsed form is compared, so a change that policy never reads (a heartbeat, a status) stops here. An object that is
//! not in a new list is not removed by the list alone: see [`Cache::missing`].

use std::collections::{BTreeMap, BTreeSet};

use margay_api::endpoint::WorkloadEndpoint;
use margay_api::meta::NamespacedName;
use margay_api::network::BlockInfo;
use margay_api::storage::name;
use margay_calc::blocks::Blocks;
use margay_calc::update::Update;
use margay_proto::sync::LocalEndpoint;

use crate::kinds::POD;
use crate::overlay::{NotTaken, Overlays};
use crate::services::Services;

/// Name and namespace of an object; the namespace is empty for cluster-wide kinds.
pub type ObjectKey = NamespacedName;

/// One object as a watch saw it.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The object.
    pub key: ObjectKey,
    /// Its uid: a later object of the same name has another one.
    pub uid: String,
    /// What it means, or what stands in its place; nothing for a pod in the host's network, say.
    pub update: Option<Update>,
    /// What it meant before, if that was something, stays: it was refused, and `update` stands in its place only where nothing else is known of it.
    pub prefers_former: bool,
    /// Why it is not used as it is written.
    pub problems: Vec<String>,
}

/// What a list did not hold, though the cache does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// How many.
    pub total: usize,
    /// Some of them, spread over all.
    pub sample: Vec<ObjectKey>,
}

/// Owner of the latest state.
#[derive(Debug)]
pub struct Cache {
    kinds: BTreeMap<&'static str, Store>,
    overlays: Overlays,
    services: Services,
    blocks: Blocks,
}

#[derive(Debug, Default)]
struct Store {
    /// Number of the newest list.
    generation: u64,
    synced: bool,
    objects: BTreeMap<ObjectKey, Entry>,
    /// Those of them that have problems.
    refused: BTreeSet<ObjectKey>,
}

impl Store {
    fn insert(&mut self, key: ObjectKey, entry: Entry) {
        match entry.problems.is_empty() {
            true => self.refused.remove(&key),
            false => self.refused.insert(key.clone()),
        };
        self.objects.insert(key, entry);
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<Entry> {
        self.refused.remove(key);
        self.objects.remove(key)
    }
}

#[derive(Debug)]
struct Entry {
    generation: u64,
    uid: String,
    update: Option<Update>,
    problems: Vec<String>,
}

impl Entry {
    /// What is kept of an object. One that was refused keeps the meaning that it had; an object of another uid had none.
    fn of(observed: &Observed, former: Option<&Self>, generation: u64) -> Self {
        let Observed { uid, update, problems, .. } = observed;
        let former = former.filter(|former| former.uid == *uid || update.is_none());
        let former = former.and_then(|former| former.update.as_ref()).filter(|_| observed.prefers_former);
        let mut problems = problems.clone();
        if !problems.is_empty() {
            problems.extend(in_force(former.is_some(), observed).map(str::to_owned));
        }
        Self { generation, uid: uid.clone(), update: former.or(update.as_ref()).cloned(), problems }
    }
}

/// What is in force while an object is refused, where its problems do not say so.
fn in_force(is_former: bool, observed: &Observed) -> Option<&'static str> {
    match &observed.update {
        _ if is_former => Some("until it is corrected, what it said before stays in force"),
        None => Some("until it is corrected, nothing of it is in force"),
        Some(Update::Policy(..)) if observed.prefers_former => {
            Some("until it is corrected, all that its readable parts may be about is closed in its directions")
        }
        Some(_) => None,
    }
}

impl Cache {
    /// A cache that is in sync once each of `kinds` has been listed.
    pub fn new(kinds: impl IntoIterator<Item = &'static str>) -> Self {
        Self {
            kinds: kinds.into_iter().map(|kind| (kind, Store::default())).collect(),
            overlays: Overlays::default(),
            services: Services::default(),
            blocks: Blocks::default(),
        }
    }

    /// A new list of the kind begins: what is not seen until its end is [`Cache::missing`].
    pub fn begin(&mut self, kind: &'static str) {
        self.kinds.entry(kind).or_default().generation += 1;
    }

    /// Takes the state of one object; gives what is news of it.
    pub fn apply(&mut self, kind: &'static str, observed: Observed) -> Vec<Update> {
        let store = self.kinds.entry(kind).or_default();
        let former = store.objects.get(&observed.key);
        let entry = Entry::of(&observed, former, store.generation);
        let wanted = self.overlays.effective(&entry.uid, entry.update.as_ref());
        let known = former.and_then(|former| self.overlays.effective(&former.uid, former.update.as_ref()));
        let news = difference(known.as_deref(), wanted.as_deref());
        self.overlays.confirm(&entry.uid, entry.update.as_ref());
        let services = &mut self.services;
        let news = news.into_iter().filter_map(|update| of_twins(store, &observed.key, update));
        let news = news.filter_map(|update| services.whole(&observed.key, update));
        let news: Vec<_> = news.collect();
        store.insert(observed.key, entry);
        self.heed(&news);
        news
    }

    /// The object is gone.
    pub fn delete(&mut self, kind: &'static str, key: &ObjectKey) -> Option<Update> {
        let store = self.kinds.get_mut(kind)?;
        let entry = store.remove(key)?;
        self.overlays.withdraw(&entry.uid, entry.update.as_ref());
        let gone = of_twins(store, key, entry.update.as_ref().map(gone)?)?;
        let news = self.services.whole(key, gone);
        self.heed(news.as_slice());
        news
    }

    /// Objects that the newest list did not hold; at most `limit` are named. A list that lacks objects may be the
    /// API server's error, so whoever calls this asks for some of them by name before [`Cache::sweep`].
    pub fn missing(&self, kind: &'static str, limit: usize) -> Missing {
        let Some(store) = self.kinds.get(kind) else {
            return Missing::default();
        };
        let stale = || store.objects.iter().filter(|(_, entry)| entry.generation < store.generation);
        let total = stale().count();
        let step = total.div_ceil(limit.max(1)).max(1);
        Missing { total, sample: stale().step_by(step).map(|(key, _)| key.clone()).collect() }
    }

    /// The newest list of the kind was right: what it did not hold is gone, and the kind is in sync.
    pub fn sweep(&mut self, kind: &'static str) -> Vec<Update> {
        let store = self.kinds.entry(kind).or_default();
        let is_first = !std::mem::replace(&mut store.synced, true);
        let generation = store.generation;
        let stale = store.objects.iter();
        let stale = stale.filter(|(_, entry)| entry.generation < generation);
        let stale: Vec<_> = stale.map(|(key, _)| key.clone()).collect();
        let mut removed = Vec::new();
        for key in &stale {
            let Some(entry) = store.remove(key) else {
                continue;
            };
            self.overlays.withdraw(&entry.uid, entry.update.as_ref());
            let gone = entry.update.as_ref().and_then(|update| of_twins(store, key, gone(update)));
            removed.extend(gone.and_then(|gone| self.services.whole(key, gone)));
        }
        if is_first && kind == POD {
            let pods = &store.objects;
            self.overlays.retain(|node, said| !said.addresses.is_empty() || has(pods, node, said));
        }
        self.heed(&removed);
        removed
    }

    /// What follows from news in the cache itself.
    fn heed(&mut self, news: &[Update]) {
        for update in news {
            match update {
                Update::Block(range, info) => drop(self.blocks.set_block(*range, info.clone())),
                Update::Pool(name, pool) => drop(self.blocks.set_pool(name.clone(), pool.clone())),
                Update::Node(gone, None) => {
                    let Some(pods) = self.kinds.get(POD) else { continue };
                    // Pods of the node that are still there take what it said about them along when they go.
                    self.overlays.retain(|node, said| node != gone || has(&pods.objects, node, said));
                }
                _ => {}
            }
        }
    }

    /// A node says which addresses a pod of its own has, before the API knows; gives what is news of it. An address counts
    /// only if it is not in a block of another node, so that no node can put another's addresses into a set.
    pub fn local(&mut self, node: &str, said: LocalEndpoint) -> Result<Vec<Update>, NotTaken> {
        self.check_own(node, &said)?;
        let key = said.key.clone();
        let pods = self.kinds.get(POD);
        let is_over = |pods: &&Store| pods.synced && !has(&pods.objects, node, &said);
        if said.addresses.is_empty() && pods.filter(is_over).is_some() {
            // To the API the pod is gone or has ended, so nothing would ever confirm that it has no address.
            self.overlays.forget(node, &said);
            return Ok(Vec::new());
        }
        let Some(entry) = pods.and_then(|pods| pods.objects.get(&key)) else {
            // Before pods are listed none is known.
            let is_known = |key: &ObjectKey| pods.is_none_or(|pods| !pods.synced || pods.objects.contains_key(key));
            if !self.overlays.has_room(node, &said, is_known) {
                return Err(NotTaken::TooManyUnknown { node: node.to_owned() });
            }
            self.overlays.put(node, said)?;
            return Ok(Vec::new());
        };
        let api = entry.update.as_ref();
        let former = self.overlays.effective(&entry.uid, api);
        self.overlays.put(node, said)?;
        let wanted = self.overlays.effective(&entry.uid, api);
        let news = difference(former.as_deref(), wanted.as_deref());
        self.overlays.confirm(&entry.uid, api);
        Ok(news)
    }

    /// The node has had no stream here for a while: what it said is not taken back here if it is not so any more, so the API's word counts again.
    /// Gives what is news by that.
    pub fn silence(&mut self, node: &str) -> Vec<Update> {
        let words = self.overlays.take(node);
        let pods = self.kinds.get(POD);
        let told = words.values().filter_map(|said| {
            let entry = pods?.objects.get(&said.key)?;
            let api = entry.update.as_ref()?;
            let former = of_word(node, said, entry)?;
            Some(difference(Some(&former), Some(api)))
        });
        told.flatten().collect()
    }

    fn check_own(&self, node: &str, said: &LocalEndpoint) -> Result<(), NotTaken> {
        for address in &said.addresses {
            let lent = |info: &BlockInfo| info.borrowed.iter().any(|(lent, user)| lent == address && user == node);
            let foreign = self.blocks.around(*address).filter(|info| !lent(info));
            let mut owners = foreign.filter_map(|info| info.node.as_ref()).filter(|owner| *owner != node);
            if let Some(owner) = owners.next() {
                return Err(NotTaken::Foreign { node: node.to_owned(), address: *address, owner: owner.clone() });
            }
        }
        Ok(())
    }

    /// Whether every kind has been listed once.
    pub fn is_synced(&self) -> bool {
        self.kinds.values().all(|store| store.synced)
    }

    /// Kinds that have not been listed yet.
    pub fn unsynced(&self) -> Vec<&'static str> {
        let unsynced = self.kinds.iter().filter(|(_, store)| !store.synced);
        unsynced.map(|(kind, _)| *kind).collect()
    }

    /// Objects per kind, and how many of them are not used as they are written.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, usize, usize)> {
        let counts = self.kinds.iter();
        counts.map(|(kind, store)| (*kind, store.objects.len(), store.refused.len()))
    }

    /// Objects that are not used as they are written, with why.
    pub fn problems(&self) -> impl Iterator<Item = (&'static str, &ObjectKey, &[String])> {
        self.kinds.iter().flat_map(|(kind, store)| {
            let refused = store.refused.iter().filter_map(|key| store.objects.get_key_value(key));
            refused.map(|(key, entry)| (*kind, key, entry.problems.as_slice()))
        })
    }

    /// The uid of the object when it was last seen; empty if it is not there.
    pub fn uid_of(&self, kind: &'static str, key: &ObjectKey) -> &str {
        let entry = self.kinds.get(kind).and_then(|store| store.objects.get(key));
        entry.map_or("", |entry| entry.uid.as_str())
    }

    /// Why the object was not used as it is written when it was last seen.
    pub fn problems_of(&self, kind: &'static str, key: &ObjectKey) -> &[String] {
        let entry = self.kinds.get(kind).and_then(|store| store.objects.get(key));
        entry.map_or(&[], |entry| entry.problems.as_slice())
    }
}

/// What the pod is with what its node says, if that is about it.
fn of_word(node: &str, said: &LocalEndpoint, entry: &Entry) -> Option<Update> {
    match &entry.update {
        Some(Update::Endpoint(key, Some(endpoint))) if endpoint.node == node && entry.uid == said.uid => {
            let endpoint = WorkloadEndpoint { addresses: said.addresses.clone(), ..endpoint.clone() };
            Some(Update::Endpoint(key.clone(), Some(endpoint)))
        }
        _ => None,
    }
}

/// Whether the pod that the node speaks of is there, and its own.
fn has(pods: &BTreeMap<ObjectKey, Entry>, node: &str, said: &LocalEndpoint) -> bool {
    pods.get(&said.key).is_some_and(|entry| {
        let is_of_node = matches!(&entry.update, Some(Update::Endpoint(_, Some(endpoint))) if endpoint.node == node);
        is_of_node && entry.uid == said.uid
    })
}

/// What a change of one object means where two can stand for one policy (see [`name`]): nothing while the other one counts, the other one's
/// meaning when the one that counted is gone.
fn of_twins(store: &Store, stored: &ObjectKey, update: Update) -> Option<Update> {
    let Update::Policy(key, policy) = &update else {
        return Some(update);
    };
    let other = ObjectKey::new(stored.namespace.as_str(), name::other_stored_name(&key.name, &stored.name));
    let other = store.objects.get(&other).and_then(|entry| entry.update.as_ref());
    let other = other.filter(|other| matches!(other, Update::Policy(theirs, Some(_)) if theirs == key));
    match other {
        Some(_) if !name::takes_precedence(&key.name, &stored.name) => None,
        Some(other) if policy.is_none() => Some(other.clone()),
        _ => Some(update),
    }
}

/// What turns `former` into `wanted`.
fn difference(former: Option<&Update>, wanted: Option<&Update>) -> Vec<Update> {
    if former == wanted {
        return Vec::new();
    }
    let removed = former.map(gone);
    let replaced = removed.is_some() && removed == wanted.map(gone);
    let removed = removed.filter(|_| !replaced);
    removed.into_iter().chain(wanted.cloned()).collect()
}

/// The same key without a value.
fn gone(update: &Update) -> Update {
    match update {
        Update::Endpoint(key, _) => Update::Endpoint(key.clone(), None),
        Update::Namespace(key, _) => Update::Namespace(key.clone(), None),
        Update::ServiceAccount(key, _) => Update::ServiceAccount(key.clone(), None),
        Update::Policy(key, _) => Update::Policy(key.clone(), None),
        Update::HostEndpoint(key, _) => Update::HostEndpoint(key.clone(), None),
        Update::Staged(key, _) => Update::Staged(key.clone(), None),
        Update::Tier(key, _) => Update::Tier(key.clone(), None),
        Update::NetworkSet(key, _) => Update::NetworkSet(key.clone(), None),
        Update::Service(key, _) => Update::Service(key.clone(), None),
        Update::Node(key, _) => Update::Node(key.clone(), None),
        Update::Pool(key, _) => Update::Pool(key.clone(), None),
        Update::Block(key, _) => Update::Block(*key, None),
        Update::Settings(key, _) => Update::Settings(key.clone(), None),
    }
}

#[cfg(test)]
mod tests;
