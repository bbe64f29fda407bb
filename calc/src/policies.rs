//! Enforced policies and tiers: what each policy refers to, on which nodes it is in force, and the
//! order of evaluation.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use margay_api::policy::{Order, PolicyKey, PolicyKind, Tier, Traffic};
use margay_api::rule::Action;

use crate::digest;
use crate::flush::{Change, Flush};
use crate::interner::{Interner, Marks, Symbol};
use crate::items::Subject;
use crate::model::{PolicyRecord, Record, RecordId, SetId, TierBinding};
use crate::refcount::{RefCounts, Sent, transition};
use crate::rules::{SharedSets, StoredRule};
use crate::sets::Sets;
use crate::store::{Map, Slab};

/// Identity of a policy: kind, namespace, name.
pub(crate) type PolicyId = (PolicyKind, Symbol, Symbol);

/// Determines which endpoints a policy applies to, and its place among their policies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Binding {
    pub(crate) tier: Symbol,
    pub(crate) order: Order,
    /// Handle of the selector of the endpoints that it applies to.
    pub(crate) subject: u32,
    /// Which packets of host endpoints it applies to; only some kinds apply to workloads.
    pub(crate) traffic: Traffic,
    pub(crate) ingress: bool,
    pub(crate) egress: bool,
}

#[derive(Debug)]
pub(crate) struct StoredPolicy {
    pub(crate) key: PolicyId,
    pub(crate) binding: Binding,
    pub(crate) ingress: Box<[StoredRule]>,
    pub(crate) egress: Box<[StoredRule]>,
    /// Sets that the rules refer to, without duplicates, sorted.
    pub(crate) sets: Box<[u32]>,
    /// Per node, the number of endpoints that it applies to.
    pub(crate) nodes: RefCounts,
}

impl StoredPolicy {
    /// Returns true if it applies to endpoints of that kind which it selects. Namespaced policies
    /// never apply to host endpoints.
    pub(crate) fn applies_to(&self, subject: Subject) -> bool {
        match subject {
            Subject::Workload => self.binding.traffic.is_for_workloads(),
            Subject::Host => self.key.0.enforced() == PolicyKind::GlobalNetworkPolicy,
        }
    }
}

#[derive(Debug, Default)]
struct StoredTier {
    object: Option<Tier>,
    policies: BTreeSet<u32>,
}

/// All policies that are enforced, and all tiers.
#[derive(Debug, Default)]
pub(crate) struct Policies {
    policies: Slab<StoredPolicy>,
    by_key: Map<PolicyId, u32>,
    tiers: Map<Symbol, StoredTier>,
    sent: Map<PolicyId, Sent>,
    dirty: BTreeSet<PolicyId>,
}

impl Policies {
    pub(crate) fn insert(&mut self, policy: StoredPolicy) -> u32 {
        let (key, tier) = (policy.key, policy.binding.tier);
        let handle = self.policies.insert(policy);
        self.by_key.insert(key, handle);
        self.tiers.entry(tier).or_default().policies.insert(handle);
        self.dirty.insert(key);
        handle
    }

    /// Removes a policy; the caller has unbound it from every endpoint.
    pub(crate) fn remove(&mut self, handle: u32) -> Option<StoredPolicy> {
        let policy = self.policies.remove(handle)?;
        self.by_key.remove(&policy.key);
        self.leave_tier(handle, policy.binding.tier);
        self.dirty.insert(policy.key);
        Some(policy)
    }

    /// Changes tier, order or subject of a policy.
    pub(crate) fn rebind(&mut self, handle: u32, binding: Binding) {
        let before = std::mem::replace(&mut self.policies[handle].binding, binding);
        if before.tier != binding.tier {
            self.leave_tier(handle, before.tier);
            self.tiers
                .entry(binding.tier)
                .or_default()
                .policies
                .insert(handle);
        }
    }

    pub(crate) fn find(&self, key: PolicyId) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    pub(crate) fn get(&self, handle: u32) -> &StoredPolicy {
        &self.policies[handle]
    }

    /// Returns a policy for a change of rules, sets or nodes, and marks its record dirty.
    pub(crate) fn touch(&mut self, handle: u32) -> &mut StoredPolicy {
        let policy = &mut self.policies[handle];
        self.dirty.insert(policy.key);
        policy
    }

    /// Counts one more endpoint on the node. Returns true if it is the policy's first there.
    pub(crate) fn bind(&mut self, handle: u32, node: Symbol) -> bool {
        let policy = &mut self.policies[handle];
        let is_first = policy.nodes.add(node);
        if is_first {
            self.dirty.insert(policy.key);
        }
        is_first
    }

    /// Counts one endpoint less. Returns true if it was the policy's last there.
    pub(crate) fn unbind(&mut self, handle: u32, node: Symbol) -> bool {
        let policy = &mut self.policies[handle];
        let is_last = policy.nodes.remove(node);
        if is_last {
            self.dirty.insert(policy.key);
        }
        is_last
    }

    /// Sets or removes a tier. Returns its policies if their endpoints must be computed again.
    pub(crate) fn set_tier(&mut self, name: Symbol, object: Option<Tier>) -> Vec<u32> {
        let tier = self.tiers.entry(name).or_default();
        if tier.object == object {
            self.free_tier(name);
            return Vec::new();
        }
        tier.object = object;
        let policies = tier.policies.iter().copied().collect();
        self.free_tier(name);
        policies
    }

    /// Policies whose tier does not exist, with the tier.
    pub(crate) fn without_tier(&self) -> impl Iterator<Item = (PolicyId, Symbol)> {
        let policies = self
            .policies
            .iter()
            .map(|(_, policy)| (policy.key, policy.binding.tier));
        policies.filter(|(_, tier)| !self.has_tier(*tier))
    }

    /// Returns true if the tier exists as an object.
    pub(crate) fn has_tier(&self, tier: Symbol) -> bool {
        self.tiers
            .get(&tier)
            .is_some_and(|tier| tier.object.is_some())
    }

    /// Tiers of an endpoint to which these policies apply, in order. A missing tier comes after all
    /// others and denies.
    pub(crate) fn bindings(
        &self,
        mut policies: Vec<&StoredPolicy>,
        interner: &Interner,
    ) -> Vec<TierBinding> {
        policies.sort_by(|a, b| self.compare(a, b, interner));
        let mut tiers: Vec<TierBinding> = Vec::new();
        for policy in policies {
            let name = interner.get(policy.binding.tier);
            if tiers.last().is_none_or(|tier| tier.name != name) {
                let object = self
                    .tiers
                    .get(&policy.binding.tier)
                    .and_then(|tier| tier.object.as_ref());
                tiers.push(TierBinding {
                    name: name.to_owned(),
                    default_action: object.map_or(Action::Deny, |tier| tier.default_action),
                    ingress: Vec::new(),
                    egress: Vec::new(),
                });
            }
            if let Some(tier) = tiers.last_mut() {
                let lists = [
                    (policy.binding.ingress, &mut tier.ingress),
                    (policy.binding.egress, &mut tier.egress),
                ];
                for (applies, list) in lists {
                    if applies {
                        list.push(key(policy.key, interner));
                    }
                }
            }
        }
        tiers
    }

    /// Adds what changed to the flush.
    pub(crate) fn flush(&mut self, flush: &mut Flush, sets: &Sets, interner: &Interner) {
        for name in std::mem::take(&mut self.dirty) {
            let id = RecordId::Policy(key(name, interner));
            let now = self.by_key.get(&name).map(|handle| &self.policies[*handle]);
            let now = now
                .filter(|policy| !policy.nodes.is_empty())
                .map(|policy| Sent {
                    digest: digest::digest(&id, &Record::Policy(record(policy, sets, interner))),
                    nodes: policy.nodes.nodes().collect(),
                });
            let sent = self.sent.get(&name);
            let differs = now.as_ref().map(|now| now.digest) != sent.map(|sent| sent.digest);
            let change = if differs { Change::Value } else { Change::Same };
            let was = sent.map(|sent| &*sent.nodes).unwrap_or_default();
            let is = now.as_ref().map(|now| &*now.nodes).unwrap_or_default();
            if (differs || was != is)
                && let Some(change) = transition(was, is, change, interner)
            {
                flush.records.insert(id, change);
            }
            match now {
                Some(now) => self.sent.insert(name, now),
                None => self.sent.remove(&name),
            };
        }
    }

    /// Record of a policy that is in force on a node.
    pub(crate) fn record(
        &self,
        key: PolicyId,
        sets: &Sets,
        interner: &Interner,
    ) -> Option<PolicyRecord> {
        let policy = &self.policies[self.find(key)?];
        (!policy.nodes.is_empty()).then(|| record(policy, sets, interner))
    }

    /// Policies whose record exists, in no order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = PolicyId> {
        self.sent.keys().copied()
    }

    pub(crate) fn sent(&self, key: PolicyId) -> Option<&Sent> {
        self.sent.get(&key)
    }

    /// Marks the symbols in use.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for (_, policy) in self.policies.iter() {
            marks.mark_all([policy.key.1, policy.key.2, policy.binding.tier]);
            marks.mark_all(policy.nodes.nodes());
        }
        self.tiers.keys().for_each(|tier| marks.mark(*tier));
        for (_, namespace, name) in &self.dirty {
            marks.mark_all([*namespace, *name]);
        }
        for ((_, namespace, name), sent) in &self.sent {
            marks.mark_all([*namespace, *name]);
            marks.mark_all(sent.nodes.iter().copied());
        }
    }

    fn leave_tier(&mut self, handle: u32, tier: Symbol) {
        if let Some(entry) = self.tiers.get_mut(&tier) {
            entry.policies.remove(&handle);
        }
        self.free_tier(tier);
    }

    fn free_tier(&mut self, name: Symbol) {
        if self
            .tiers
            .get(&name)
            .is_some_and(|tier| tier.object.is_none() && tier.policies.is_empty())
        {
            self.tiers.remove(&name);
        }
    }

    /// Orders by tier (existing ones first, then by order and name), then by order, then by
    /// [`tie_break`].
    fn compare(&self, a: &StoredPolicy, b: &StoredPolicy, interner: &Interner) -> Ordering {
        let by_tier = || {
            if a.binding.tier == b.binding.tier {
                return Ordering::Equal;
            }
            let rank = |policy: &StoredPolicy| {
                let object = self
                    .tiers
                    .get(&policy.binding.tier)
                    .and_then(|tier| tier.object.as_ref());
                (object.is_none(), object.map(|tier| tier.order))
            };
            let name = |policy: &StoredPolicy| interner.get(policy.binding.tier);
            rank(a).cmp(&rank(b)).then_with(|| name(a).cmp(name(b)))
        };
        let by_key = || tie_break(a.key, interner).cmp(tie_break(b.key, interner));
        by_tier()
            .then_with(|| a.binding.order.cmp(&b.binding.order))
            .then_with(by_key)
    }
}

/// Bytes that break ties: `name/namespace/kind`, as Calico does. This is not the order of name,
/// then namespace, then kind: `a-b` comes before `a`, because a hyphen comes before a slash. A
/// staged policy is placed as if it were enforced.
fn tie_break(
    (kind, namespace, name): PolicyId,
    interner: &Interner,
) -> impl Iterator<Item = u8> + '_ {
    let parts = [
        interner.get(name),
        "/",
        interner.get(namespace),
        "/",
        kind.enforced().as_str(),
    ];
    parts.into_iter().flat_map(str::bytes)
}

/// Normalises minus zero to zero: the two are equal as numbers, so the tie must be broken by name.
pub(crate) fn normalise_order(order: Order) -> Order {
    Order(order.0.map(|order| order + 0.0))
}

/// Key with its symbols resolved.
pub(crate) fn key((kind, namespace, name): PolicyId, interner: &Interner) -> PolicyKey {
    PolicyKey {
        kind,
        namespace: interner.get(namespace).to_owned(),
        name: interner.get(name).to_owned(),
    }
}

pub(crate) fn record(policy: &StoredPolicy, sets: &Sets, interner: &Interner) -> PolicyRecord {
    let id = |set: u32| SetId(interner.get(sets.id(set)).to_owned());
    let mut shared = SharedSets::new();
    let mut rules = |rules: &[StoredRule]| {
        rules
            .iter()
            .map(|rule| rule.record(&id, &mut shared))
            .collect()
    };
    PolicyRecord {
        ingress: rules(&policy.ingress),
        egress: rules(&policy.egress),
    }
}
