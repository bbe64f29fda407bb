//! Policies in force and tiers: what each policy refers to, where it is in force, and in which order policies apply.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use margay_api::policy::{Order, PolicyKey, PolicyKind, Tier, Traffic};
use margay_api::rule::Action;

use crate::counts::{Counts, Told, transition};
use crate::digest;
use crate::flush::{Change, Flush};
use crate::members::Subject;
use crate::model::{PolicyRecord, Record, RecordId, SetId, TierBinding};
use crate::rules::{SharedSets, StoredRule};
use crate::sets::Sets;
use crate::store::{Map, Slab};
use crate::texts::{Marks, Text, Texts};

/// Identity of a policy: kind, namespace, name.
pub(crate) type Key = (PolicyKind, Text, Text);

/// What decides which endpoints a policy is bound to, and where it stands among their policies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Binding {
    pub(crate) tier: Text,
    pub(crate) order: Order,
    /// Selector of the endpoints that it applies to.
    pub(crate) subject: u32,
    /// Which packets of host endpoints it is about; some are about no workload.
    pub(crate) traffic: Traffic,
    pub(crate) ingress: bool,
    pub(crate) egress: bool,
}

#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) key: Key,
    pub(crate) binding: Binding,
    pub(crate) ingress: Box<[StoredRule]>,
    pub(crate) egress: Box<[StoredRule]>,
    /// Sets that the rules refer to, each once, sorted.
    pub(crate) sets: Box<[u32]>,
    /// Per node, the endpoints that it applies to.
    pub(crate) nodes: Counts,
}

impl Policy {
    /// Whether it applies to endpoints of that sort which it selects. No policy of a namespace has a say about a host.
    pub(crate) fn applies_to(&self, subject: Subject) -> bool {
        match subject {
            Subject::Workload => self.binding.traffic.is_for_workloads(),
            Subject::Host => self.key.0.enforced() == PolicyKind::GlobalNetworkPolicy,
        }
    }
}

#[derive(Debug, Default)]
struct TierEntry {
    object: Option<Tier>,
    policies: BTreeSet<u32>,
}

/// All policies that are enforced, and all tiers.
#[derive(Debug, Default)]
pub(crate) struct Policies {
    policies: Slab<Policy>,
    by_key: Map<Key, u32>,
    tiers: Map<Text, TierEntry>,
    told: Map<Key, Told>,
    dirty: BTreeSet<Key>,
}

impl Policies {
    pub(crate) fn insert(&mut self, policy: Policy) -> u32 {
        let (key, tier) = (policy.key, policy.binding.tier);
        let handle = self.policies.insert(policy);
        self.by_key.insert(key, handle);
        self.tiers.entry(tier).or_default().policies.insert(handle);
        self.dirty.insert(key);
        handle
    }

    /// Forgets a policy; the caller has unbound it from every endpoint.
    pub(crate) fn remove(&mut self, handle: u32) -> Option<Policy> {
        let policy = self.policies.remove(handle)?;
        self.by_key.remove(&policy.key);
        self.leave_tier(handle, policy.binding.tier);
        self.dirty.insert(policy.key);
        Some(policy)
    }

    /// Gives a policy another place.
    pub(crate) fn rebind(&mut self, handle: u32, binding: Binding) {
        let before = std::mem::replace(&mut self.policies[handle].binding, binding);
        if before.tier != binding.tier {
            self.leave_tier(handle, before.tier);
            self.tiers.entry(binding.tier).or_default().policies.insert(handle);
        }
    }

    pub(crate) fn find(&self, key: Key) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    pub(crate) fn get(&self, handle: u32) -> &Policy {
        &self.policies[handle]
    }

    /// For changing rules, sets and nodes; the record is compared at the next flush.
    pub(crate) fn touch(&mut self, handle: u32) -> &mut Policy {
        let policy = &mut self.policies[handle];
        self.dirty.insert(policy.key);
        policy
    }

    /// Counts one more endpoint on the node. True if it is the policy's first there.
    pub(crate) fn bind(&mut self, handle: u32, node: Text) -> bool {
        let policy = &mut self.policies[handle];
        let is_first = policy.nodes.add(node);
        if is_first {
            self.dirty.insert(policy.key);
        }
        is_first
    }

    /// Counts one endpoint less. True if it was the policy's last there.
    pub(crate) fn unbind(&mut self, handle: u32, node: Text) -> bool {
        let policy = &mut self.policies[handle];
        let is_last = policy.nodes.remove(node);
        if is_last {
            self.dirty.insert(policy.key);
        }
        is_last
    }

    /// Takes a tier. Answers with its policies if their endpoints see a difference.
    pub(crate) fn set_tier(&mut self, name: Text, object: Option<Tier>) -> Vec<u32> {
        let tier = self.tiers.entry(name).or_default();
        if tier.object == object {
            self.drop_tier(name);
            return Vec::new();
        }
        tier.object = object;
        let policies = tier.policies.iter().copied().collect();
        self.drop_tier(name);
        policies
    }

    /// Policies that refer to a tier which does not exist, with the tier.
    pub(crate) fn without_tier(&self) -> impl Iterator<Item = (Key, Text)> {
        let policies = self.policies.iter().map(|(_, policy)| (policy.key, policy.binding.tier));
        policies.filter(|(_, tier)| !self.has_tier(*tier))
    }

    /// Whether the tier exists as an object.
    pub(crate) fn has_tier(&self, tier: Text) -> bool {
        self.tiers.get(&tier).is_some_and(|tier| tier.object.is_some())
    }

    /// The tiers of an endpoint that these policies apply to, in order. A tier without object comes behind all others and denies.
    pub(crate) fn bindings(&self, mut policies: Vec<&Policy>, texts: &Texts) -> Vec<TierBinding> {
        policies.sort_by(|a, b| self.compare(a, b, texts));
        let mut tiers: Vec<TierBinding> = Vec::new();
        for policy in policies {
            let name = texts.get(policy.binding.tier);
            if tiers.last().is_none_or(|tier| tier.name != name) {
                let object = self.tiers.get(&policy.binding.tier).and_then(|tier| tier.object.as_ref());
                tiers.push(TierBinding {
                    name: name.to_owned(),
                    default_action: object.map_or(Action::Deny, |tier| tier.default_action),
                    ingress: Vec::new(),
                    egress: Vec::new(),
                });
            }
            if let Some(tier) = tiers.last_mut() {
                let lists = [(policy.binding.ingress, &mut tier.ingress), (policy.binding.egress, &mut tier.egress)];
                for (applies, list) in lists {
                    if applies {
                        list.push(key(policy.key, texts));
                    }
                }
            }
        }
        tiers
    }

    /// Puts what changed into the flush.
    pub(crate) fn flush(&mut self, flush: &mut Flush, sets: &Sets, texts: &Texts) {
        for name in std::mem::take(&mut self.dirty) {
            let id = RecordId::Policy(key(name, texts));
            let now = self.by_key.get(&name).map(|handle| &self.policies[*handle]);
            let now = now.filter(|policy| !policy.nodes.is_empty()).map(|policy| Told {
                digest: digest::digest(&id, &Record::Policy(record(policy, sets, texts))),
                nodes: policy.nodes.nodes().collect(),
            });
            let told = self.told.get(&name);
            let differs = now.as_ref().map(|now| now.digest) != told.map(|told| told.digest);
            let change = if differs { Change::Value } else { Change::Same };
            let was = told.map(|told| &*told.nodes).unwrap_or_default();
            let is = now.as_ref().map(|now| &*now.nodes).unwrap_or_default();
            if (differs || was != is)
                && let Some(change) = transition(was, is, change, texts)
            {
                flush.records.insert(id, change);
            }
            match now {
                Some(now) => self.told.insert(name, now),
                None => self.told.remove(&name),
            };
        }
    }

    /// The record of a policy that is in force somewhere.
    pub(crate) fn record(&self, key: Key, sets: &Sets, texts: &Texts) -> Option<PolicyRecord> {
        let policy = &self.policies[self.find(key)?];
        (!policy.nodes.is_empty()).then(|| record(policy, sets, texts))
    }

    /// Policies whose record exists, in no order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = Key> {
        self.told.keys().copied()
    }

    pub(crate) fn told(&self, key: Key) -> Option<&Told> {
        self.told.get(&key)
    }

    /// Marks every text that is kept here.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for (_, policy) in self.policies.iter() {
            marks.all([policy.key.1, policy.key.2, policy.binding.tier]);
            marks.all(policy.nodes.nodes());
        }
        self.tiers.keys().for_each(|tier| marks.mark(*tier));
        for (_, namespace, name) in &self.dirty {
            marks.all([*namespace, *name]);
        }
        for ((_, namespace, name), told) in &self.told {
            marks.all([*namespace, *name]);
            marks.all(told.nodes.iter().copied());
        }
    }

    fn leave_tier(&mut self, handle: u32, tier: Text) {
        if let Some(entry) = self.tiers.get_mut(&tier) {
            entry.policies.remove(&handle);
        }
        self.drop_tier(tier);
    }

    fn drop_tier(&mut self, name: Text) {
        if self.tiers.get(&name).is_some_and(|tier| tier.object.is_none() && tier.policies.is_empty()) {
            self.tiers.remove(&name);
        }
    }

    /// By tier (those that exist first, then by order and name), then by order, then by what [`spelled`] spells.
    fn compare(&self, a: &Policy, b: &Policy, texts: &Texts) -> Ordering {
        let by_tier = || {
            if a.binding.tier == b.binding.tier {
                return Ordering::Equal;
            }
            let rank = |policy: &Policy| {
                let object = self.tiers.get(&policy.binding.tier).and_then(|tier| tier.object.as_ref());
                (object.is_none(), object.map(|tier| tier.order))
            };
            let name = |policy: &Policy| texts.get(policy.binding.tier);
            rank(a).cmp(&rank(b)).then_with(|| name(a).cmp(name(b)))
        };
        let by_key = || spelled(a.key, texts).cmp(spelled(b.key, texts));
        by_tier().then_with(|| a.binding.order.cmp(&b.binding.order)).then_with(by_key)
    }
}

/// What breaks ties: the text `name/namespace/kind`, as in Calico. It is not the same as name, then namespace, then kind: `a-b` comes before
/// `a`, because a hyphen comes before a slash. A staged policy stands where it would if it were enforced.
fn spelled((kind, namespace, name): Key, texts: &Texts) -> impl Iterator<Item = u8> + '_ {
    let parts = [texts.get(name), "/", texts.get(namespace), "/", kind.enforced().as_str()];
    parts.into_iter().flat_map(str::bytes)
}

/// The key as others know it.
pub(crate) fn key((kind, namespace, name): Key, texts: &Texts) -> PolicyKey {
    PolicyKey { kind, namespace: texts.get(namespace).to_owned(), name: texts.get(name).to_owned() }
}

pub(crate) fn record(policy: &Policy, sets: &Sets, texts: &Texts) -> PolicyRecord {
    let id = |set: u32| SetId(texts.get(sets.id(set)).to_owned());
    let mut shared = SharedSets::new();
    let mut rules = |rules: &[StoredRule]| rules.iter().map(|rule| rule.record(&id, &mut shared)).collect();
    PolicyRecord { ingress: rules(&policy.ingress), egress: rules(&policy.egress) }
}
