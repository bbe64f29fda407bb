//! Latest state of every watched object in parsed form, and the resulting changes.
//!
//! Objects are compared in parsed form, so a change that policy does not depend on (a heartbeat, a
//! status) ends here. An object that a new list lacks is not removed without confirmation: see
//! [`Cache::missing`].

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use margay_api::endpoint::WorkloadEndpoint;
use margay_api::network::BlockInfo;
use margay_api::storage::name;
use margay_calc::blocks::Blocks;
use margay_calc::update::Update;
use margay_proto::sync::LocalEndpoint;

use crate::object::{Missing, ObjectKey, Observed, POD};
use crate::overlay::{Overlays, ReportRejected};
use crate::packed::PackedUpdate;
use crate::services::Services;

/// Latest state of all kinds.
#[derive(Debug)]
pub struct Cache {
    kinds: BTreeMap<&'static str, KindStore>,
    overlays: Overlays,
    services: Services,
    blocks: Blocks,
}

#[derive(Debug, Default)]
struct KindStore {
    /// Incremented by every list.
    generation: u64,
    synced: bool,
    objects: BTreeMap<ObjectKey, CachedObject>,
    /// Objects with problems.
    refused: BTreeSet<ObjectKey>,
}

impl KindStore {
    fn insert(&mut self, key: ObjectKey, entry: CachedObject) {
        match entry.problems.is_empty() {
            true => self.refused.remove(&key),
            false => self.refused.insert(key.clone()),
        };
        self.objects.insert(key, entry);
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<CachedObject> {
        self.refused.remove(key);
        self.objects.remove(key)
    }
}

#[derive(Debug)]
struct CachedObject {
    generation: u64,
    uid: Box<str>,
    value: PackedUpdate,
    problems: Box<[String]>,
}

impl CachedObject {
    /// Creates the entry of an object. A refused one keeps its former value, if it is the same
    /// object (by uid).
    fn of(observed: &Observed, former: Option<&Self>, generation: u64) -> Self {
        let Observed {
            key,
            uid,
            update,
            problems,
            ..
        } = observed;
        let former = former.filter(|former| *former.uid == **uid || update.is_none());
        let former = former
            .map(|former| &former.value)
            .filter(|value| **value != PackedUpdate::Nothing);
        let former = former.filter(|_| observed.prefers_former);
        let mut problems = problems.clone();
        if !problems.is_empty() {
            problems.extend(in_force(former.is_some(), observed).map(str::to_owned));
        }
        let value = former.map_or_else(
            || PackedUpdate::new(key, update.as_ref().map(Cow::Borrowed)),
            PackedUpdate::clone,
        );
        Self {
            generation,
            uid: uid.as_str().into(),
            value,
            problems: problems.into(),
        }
    }

    fn update(&self, key: &ObjectKey) -> Option<Cow<'_, Update>> {
        self.value.update(key)
    }
}

/// States what is in force while an object is refused, unless its problems state that.
fn in_force(is_former: bool, observed: &Observed) -> Option<&'static str> {
    match &observed.update {
        _ if is_former => Some("until it is corrected, its previous version stays in force"),
        None => Some("until it is corrected, it has no effect"),
        Some(Update::Policy(..)) if observed.prefers_former => Some(
            "until it is corrected, everything that its readable fields may select is denied in \
             its directions",
        ),
        Some(_) => None,
    }
}

impl Cache {
    /// Creates a cache that is in sync once each of `kinds` has been listed.
    pub fn new(kinds: impl IntoIterator<Item = &'static str>) -> Self {
        Self {
            kinds: kinds
                .into_iter()
                .map(|kind| (kind, KindStore::default()))
                .collect(),
            overlays: Overlays::default(),
            services: Services::default(),
            blocks: Blocks::default(),
        }
    }

    /// Starts a new list: objects not observed until its end are [`Cache::missing`].
    pub fn start_list(&mut self, kind: &'static str) {
        self.kinds.entry(kind).or_default().generation += 1;
    }

    /// Applies the state of one object; returns the resulting updates.
    pub fn apply(&mut self, kind: &'static str, observed: Observed) -> Vec<Update> {
        let store = self.kinds.entry(kind).or_default();
        let former = store.objects.get(&observed.key);
        let entry = CachedObject::of(&observed, former, store.generation);
        let api = entry.update(&observed.key);
        let known = former.map(|former| (&former.uid, former.update(&observed.key)));
        let wanted = self.overlays.effective(&entry.uid, api.as_deref());
        let known = known
            .as_ref()
            .and_then(|(uid, api)| self.overlays.effective(uid, api.as_deref()));
        let updates = difference(known.as_deref(), wanted.as_deref());
        // Only now: the comparison above needs the report that this may remove.
        self.overlays.confirm(&entry.uid, api.as_deref());
        let services = &mut self.services;
        let updates = updates
            .into_iter()
            .filter_map(|update| resolve_duplicate(store, &observed.key, update));
        let updates = updates.filter_map(|update| services.merge_slice(&observed.key, update));
        let updates: Vec<_> = updates.collect();
        store.insert(observed.key, entry);
        self.update_indexes(&updates);
        updates
    }

    /// Applies the deletion of an object; returns the resulting update.
    pub fn delete(&mut self, kind: &'static str, key: &ObjectKey) -> Option<Update> {
        let store = self.kinds.get_mut(kind)?;
        let entry = store.remove(key)?;
        self.overlays
            .withdraw(&entry.uid, entry.update(key).as_deref());
        let gone = resolve_duplicate(store, key, entry.value.removal(key)?)?;
        let update = self.services.merge_slice(key, gone);
        self.update_indexes(update.as_slice());
        update
    }

    /// Objects that the latest list lacks, at most `limit` of them by name. An incomplete list may
    /// be an error of the API server, so the caller must confirm some of them by name before
    /// [`Cache::sweep`].
    pub fn missing(&self, kind: &'static str, limit: usize) -> Missing {
        let Some(store) = self.kinds.get(kind) else {
            return Missing::default();
        };
        let stale = || {
            store
                .objects
                .iter()
                .filter(|(_, entry)| entry.generation < store.generation)
        };
        let total = stale().count();
        let step = total.div_ceil(limit.max(1)).max(1);
        Missing {
            total,
            sample: stale().step_by(step).map(|(key, _)| key.clone()).collect(),
        }
    }

    /// Removes what the latest list lacks and marks the kind as in sync; returns the resulting
    /// updates.
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
            self.overlays
                .withdraw(&entry.uid, entry.update(key).as_deref());
            let gone = entry
                .value
                .removal(key)
                .and_then(|gone| resolve_duplicate(store, key, gone));
            removed.extend(gone.and_then(|gone| self.services.merge_slice(key, gone)));
        }
        // Until now it was not known which pods exist, so reports of no address were kept for all.
        if is_first && kind == POD {
            let pods = &store.objects;
            self.overlays.retain(|node, report| {
                !report.addresses.is_empty() || is_pod_of(pods, node, report)
            });
        }
        self.update_indexes(&removed);
        removed
    }

    /// Updates the indexes derived from accepted changes: blocks, pools and node overlays.
    fn update_indexes(&mut self, updates: &[Update]) {
        for update in updates {
            match update {
                Update::Block(range, info) => drop(self.blocks.set_block(*range, info.clone())),
                Update::Pool(name, pool) => drop(self.blocks.set_pool(name.clone(), pool.clone())),
                Update::Node(gone, None) => {
                    let Some(pods) = self.kinds.get(POD) else {
                        continue;
                    };
                    // Reports about pods that still exist are removed together with the pods.
                    self.overlays.retain(|node, report| {
                        node != gone || is_pod_of(&pods.objects, node, report)
                    });
                }
                _ => {}
            }
        }
    }

    /// Applies a node's report of a pod's addresses, ahead of the API; returns the resulting
    /// updates. Addresses in blocks of other nodes are rejected, so that no node can add another
    /// node's addresses to a set.
    pub fn apply_local(
        &mut self,
        node: &str,
        report: LocalEndpoint,
    ) -> Result<Vec<Update>, ReportRejected> {
        self.check_ownership(node, &report)?;
        let key = report.key.clone();
        let pods = self.kinds.get(POD);
        let is_over = |pods: &&KindStore| pods.synced && !is_pod_of(&pods.objects, node, &report);
        if report.addresses.is_empty() && pods.filter(is_over).is_some() {
            // The pod has ended or is deleted in the API, so nothing would ever confirm that it has
            // no address.
            self.overlays.forget(node, &report);
            return Ok(Vec::new());
        }
        let Some(entry) = pods.and_then(|pods| pods.objects.get(&key)) else {
            // Before the first list of pods every pod counts as known.
            let is_known = |key: &ObjectKey| {
                pods.is_none_or(|pods| !pods.synced || pods.objects.contains_key(key))
            };
            if !self.overlays.has_room(node, &report, is_known) {
                return Err(ReportRejected::TooManyUnknown {
                    node: node.to_owned(),
                });
            }
            self.overlays.set(node, report)?;
            return Ok(Vec::new());
        };
        let api = entry.update(&key);
        let former = self.overlays.effective(&entry.uid, api.as_deref());
        self.overlays.set(node, report)?;
        let wanted = self.overlays.effective(&entry.uid, api.as_deref());
        let updates = difference(former.as_deref(), wanted.as_deref());
        self.overlays.confirm(&entry.uid, api.as_deref());
        Ok(updates)
    }

    /// Drops the reports of a node without a stream, which it cannot revoke here, so that the API's
    /// addresses apply again. Returns the resulting updates.
    pub fn expire_reports(&mut self, node: &str) -> Vec<Update> {
        let reports = self.overlays.remove_node(node);
        let pods = self.kinds.get(POD);
        let updates = reports.values().filter_map(|report| {
            let entry = pods?.objects.get(&report.key)?;
            let api = entry.update(&report.key)?;
            let former = with_report(node, report, &entry.uid, &api)?;
            Some(difference(Some(&former), Some(&*api)))
        });
        updates.flatten().collect()
    }

    fn check_ownership(&self, node: &str, report: &LocalEndpoint) -> Result<(), ReportRejected> {
        for address in &report.addresses {
            let lent = |info: &BlockInfo| {
                info.borrowed
                    .iter()
                    .any(|(lent, user)| lent == address && user == node)
            };
            let foreign = self.blocks.containing(*address).filter(|info| !lent(info));
            let mut owners = foreign
                .filter_map(|info| info.node.as_ref())
                .filter(|owner| *owner != node);
            if let Some(owner) = owners.next() {
                return Err(ReportRejected::Foreign {
                    node: node.to_owned(),
                    address: *address,
                    owner: owner.clone(),
                });
            }
        }
        Ok(())
    }

    /// Returns true once every kind has been listed.
    pub fn is_synced(&self) -> bool {
        self.kinds.values().all(|store| store.synced)
    }

    /// Kinds that have not been listed yet.
    pub fn unsynced(&self) -> Vec<&'static str> {
        let unsynced = self.kinds.iter().filter(|(_, store)| !store.synced);
        unsynced.map(|(kind, _)| *kind).collect()
    }

    /// Number of objects per kind, and how many of them have problems.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, usize, usize)> {
        let counts = self.kinds.iter();
        counts.map(|(kind, store)| (*kind, store.objects.len(), store.refused.len()))
    }

    /// Objects that are not enforced as written, with the reasons.
    pub fn problems(&self) -> impl Iterator<Item = (&'static str, &ObjectKey, &[String])> {
        self.kinds.iter().flat_map(|(kind, store)| {
            let refused = store
                .refused
                .iter()
                .filter_map(|key| store.objects.get_key_value(key));
            refused.map(|(key, entry)| (*kind, key, &*entry.problems))
        })
    }

    /// The kind of that name.
    pub fn kind(&self, name: &str) -> Option<&'static str> {
        self.kinds.get_key_value(name).map(|(kind, _)| *kind)
    }

    /// Uid of the object; empty if it does not exist.
    pub fn uid_of(&self, kind: &'static str, key: &ObjectKey) -> &str {
        let entry = self
            .kinds
            .get(kind)
            .and_then(|store| store.objects.get(key));
        entry.map_or("", |entry| &*entry.uid)
    }

    /// Reasons why the object is not enforced as written.
    pub fn problems_of(&self, kind: &'static str, key: &ObjectKey) -> &[String] {
        let entry = self
            .kinds
            .get(kind)
            .and_then(|store| store.objects.get(key));
        entry.map_or(&[], |entry| &*entry.problems)
    }
}

/// Overlays the pod with the node's report, if that is about it.
fn with_report(node: &str, report: &LocalEndpoint, uid: &str, api: &Update) -> Option<Update> {
    match api {
        Update::Endpoint(key, Some(endpoint)) if endpoint.node == node && *uid == report.uid => {
            let endpoint = WorkloadEndpoint {
                addresses: report.addresses.clone(),
                ..endpoint.clone()
            };
            Some(Update::Endpoint(key.clone(), Some(endpoint)))
        }
        _ => None,
    }
}

/// Returns true if the reported pod exists and is on that node.
fn is_pod_of(pods: &BTreeMap<ObjectKey, CachedObject>, node: &str, report: &LocalEndpoint) -> bool {
    pods.get(&report.key).is_some_and(|entry| {
        let is_of_node = match &entry.value {
            PackedUpdate::Nothing => false,
            PackedUpdate::Pod(packed) => packed.node() == node,
            PackedUpdate::Other(update) => {
                matches!(&**update, Update::Endpoint(_, Some(endpoint)) if endpoint.node == node)
            }
        };
        is_of_node && *entry.uid == *report.uid
    })
}

/// Resolves a policy that v1 storage holds as both `x` and `default.x` (see [`name`]); the
/// unprefixed one wins. Returns nothing for the other one while the winner exists, and the other
/// one's value when the winner is deleted.
fn resolve_duplicate(store: &KindStore, stored: &ObjectKey, update: Update) -> Option<Update> {
    let Update::Policy(key, policy) = &update else {
        return Some(update);
    };
    let other_key = ObjectKey::new(
        stored.namespace.as_str(),
        name::other_stored_name(&key.name, &stored.name),
    );
    let other = store
        .objects
        .get(&other_key)
        .and_then(|entry| entry.update(&other_key));
    let other =
        other.filter(|other| matches!(&**other, Update::Policy(theirs, Some(_)) if theirs == key));
    match other {
        Some(_) if !name::takes_precedence(&key.name, &stored.name) => None,
        Some(other) if policy.is_none() => Some(other.into_owned()),
        _ => Some(update),
    }
}

/// Updates that change `former` to `wanted`.
fn difference(former: Option<&Update>, wanted: Option<&Update>) -> Vec<Update> {
    if former == wanted {
        return Vec::new();
    }
    let removed = former.map(Update::removal);
    let replaced = removed.is_some() && removed == wanted.map(Update::removal);
    let removed = removed.filter(|_| !replaced);
    removed.into_iter().chain(wanted.cloned()).collect()
}

#[cfg(test)]
mod tests;
