//! What follows from what: every step by which a change of an object reaches records. See the drawing in [`crate::graph`].
//!
//! Order matters in three places, each said where it is: an item that comes to a selector is counted by the sets that are live before
//! policies may make more sets live; what an item adds is replaced before what selects it; a policy's new sets are needed before its
//! old ones are released.

use margay_api::meta::NamespacedName;
use margay_api::policy::Tier;

use crate::globals::Belief;
use crate::graph::Graph;
use crate::index::{LabelList, Matches, ParentName};
use crate::intake::plain;
use crate::members::{Payload, Subject};
use crate::model::{IpSetRecord, Member, Record, SetId};
use crate::node_sets;
use crate::policies::{Binding, Key, Policy};
use crate::sets::{Spec, address};
use crate::texts::Text;
use crate::update::Backend;

/// Backends of a Service and the live sets that hold them.
#[derive(Debug, Default)]
pub(crate) struct Service {
    pub(crate) backends: Vec<Backend>,
    pub(crate) sets: Vec<u32>,
}

/// An item as it is placed in the index.
pub(crate) struct Placement {
    pub(crate) payload: Payload,
    pub(crate) labels: LabelList,
    /// Each once.
    pub(crate) parents: Vec<ParentName>,
}

impl Graph {
    /// A new item, or another value of a known one.
    pub(crate) fn place(&mut self, item: u32, placement: Placement) {
        let Placement { payload, labels, parents } = placement;
        let is_new = self.members.get(item).is_none();
        // What it adds first: then what is counted for a selector that it leaves is what is taken back.
        self.replace(item, payload);
        if self.index.place_item(item, labels, &parents) || is_new {
            let matches = self.index.matches(item, &self.texts);
            self.rematch(item, matches);
        }
    }

    /// The object behind an item is gone.
    pub(crate) fn displace(&mut self, item: u32) {
        let gone = self.index.selectors_of(item).to_vec();
        self.rematch(item, Matches { gone, new: Vec::new() });
        self.members.put(item, None);
        self.index.remove_item(item);
    }

    /// A namespace or service account has other labels (with their prefix), or is gone.
    pub(crate) fn relabel(&mut self, name: ParentName, labels: Option<LabelList>) {
        if self.index.is_parent(name) != labels.is_some() {
            // Without its namespace a pod has no profile, and a host endpoint's may be any of both.
            let is_account = name.1.is_some();
            for item in self.index.children(name) {
                if !is_account || self.members.get(item).and_then(Payload::subject) == Some(Subject::Host) {
                    self.members.touch(item);
                }
            }
        }
        for (item, matches) in self.index.relabel_parent(name, labels, &self.texts) {
            self.rematch(item, matches);
        }
    }

    /// A tier is other than it was.
    pub(crate) fn retier(&mut self, name: Text, tier: Option<Tier>) {
        let tier = tier.map(|tier| Tier { order: plain(tier.order), ..tier });
        for policy in self.policies.set_tier(name, tier) {
            self.touch_endpoints(policy);
        }
    }

    /// A policy that is in force wherever its selector selects an endpoint.
    pub(crate) fn enforce(&mut self, policy: Policy) {
        let Some(known) = self.policies.find(policy.key) else {
            let handle = self.policies.insert(policy);
            return self.bind_all(handle);
        };
        let before = self.policies.get(known).binding;
        if (before.subject, before.traffic) == (policy.binding.subject, policy.binding.traffic) {
            self.replace_rules(known, policy);
            self.selectors.unmention(before.subject);
        } else {
            self.unbind_all(known);
            self.replace_rules(known, policy);
            self.bind_all(known);
            self.selectors.unmention(before.subject);
        }
    }

    /// A policy is not enforced any more.
    pub(crate) fn repeal(&mut self, key: Key) {
        let Some(handle) = self.policies.find(key) else {
            return;
        };
        self.unbind_all(handle);
        if let Some(policy) = self.policies.remove(handle) {
            policy.sets.iter().for_each(|set| self.sets.unmention(*set));
            self.selectors.unmention(policy.binding.subject);
        }
    }

    /// Nodes are believed to be other than they were.
    pub(crate) fn renode(&mut self, changes: Vec<Belief>) {
        for (before, after) in changes {
            for (set, selector) in self.node_sets.live() {
                let added = after.iter().flat_map(|node| node_sets::added(selector, node));
                added.for_each(|member| self.sets.add(set, member));
                let removed = before.iter().flat_map(|node| node_sets::added(selector, node));
                removed.for_each(|member| self.sets.remove(set, member));
            }
        }
    }

    /// A Service has other backends.
    pub(crate) fn reserve(&mut self, key: (Text, Text), backends: Vec<Backend>) {
        let service = self.services.entry(key).or_default();
        let before = std::mem::replace(&mut service.backends, backends);
        for set in &service.sets {
            let spec = self.sets.spec(*set);
            service.backends.iter().for_each(|backend| self.sets.add(*set, backend_member(spec, backend)));
            before.iter().for_each(|backend| self.sets.remove(*set, backend_member(spec, backend)));
        }
        self.drop_service(key);
    }

    /// Forgets sets and selectors that are not needed any more; the last step of a flush.
    pub(crate) fn settle(&mut self, retired: Vec<(u32, Spec)>, gone: Vec<Spec>) {
        for (set, spec) in retired {
            match spec {
                Spec::Selected(selector) | Spec::NamedPorts(selector, ..) => self.selectors.remove_set(selector, set),
                Spec::Nodes(_) => self.node_sets.retire(set),
                Spec::Service(namespace, name) | Spec::ServiceAddresses(namespace, name) => {
                    if let Some(service) = self.services.get_mut(&(namespace, name)) {
                        service.sets.retain(|known| *known != set);
                    }
                    self.drop_service((namespace, name));
                }
            }
        }
        for spec in gone {
            if let Spec::NamedPorts(_, _, names) = spec {
                self.port_names.release(names);
            }
            if let Some(selector) = spec.selector() {
                self.selectors.unmention(selector);
            }
        }
        self.selectors.flush(&mut self.index, &self.texts);
    }

    /// Gives an item another payload, with everything that counts what it adds.
    fn replace(&mut self, item: u32, payload: Payload) {
        let before = self.members.get(item);
        if before == Some(&payload) {
            return;
        }
        let (node, subject) = (payload.node(), payload.subject());
        let Some(before) = self.members.put(item, Some(payload)) else {
            return;
        };
        let now = self.members.get(item).expect("it was just put there");
        for selector in self.index.selectors_of(item) {
            for set in &self.selectors.users(*selector).sets {
                let spec = self.sets.spec(*set);
                now.members(spec, &self.port_names, |member| self.sets.add(*set, member));
                before.members(spec, &self.port_names, |member| self.sets.remove(*set, member));
            }
        }
        if before.node() != node {
            for selector in self.index.selectors_of(item).to_vec() {
                for policy in self.applying(selector, subject) {
                    self.arrive(policy, node);
                    self.depart(policy, before.node());
                }
            }
        }
    }

    fn rematch(&mut self, item: u32, matches: Matches) {
        for selector in matches.gone {
            self.index.unlink(selector, item);
            self.leave(selector, item);
        }
        for selector in matches.new {
            self.index.link(selector, item);
            self.join(selector, item);
        }
    }

    /// The selector selects the item from now on.
    fn join(&mut self, selector: u32, item: u32) {
        let Some(payload) = self.members.get(item) else {
            return;
        };
        // Sets first: one that a policy below makes live is filled with all that is selected, this item included.
        for set in &self.selectors.users(selector).sets {
            payload.members(self.sets.spec(*set), &self.port_names, |member| self.sets.add(*set, member));
        }
        let (node, subject) = (payload.node(), payload.subject());
        for policy in self.applying(selector, subject) {
            self.members.touch(item);
            self.arrive(policy, node);
        }
    }

    /// The selector does not select the item any more.
    fn leave(&mut self, selector: u32, item: u32) {
        let Some(payload) = self.members.get(item) else {
            return;
        };
        for set in &self.selectors.users(selector).sets {
            payload.members(self.sets.spec(*set), &self.port_names, |member| self.sets.remove(*set, member));
        }
        let (node, subject) = (payload.node(), payload.subject());
        for policy in self.applying(selector, subject) {
            self.members.touch(item);
            self.depart(policy, node);
        }
    }

    /// Policies of the selector that apply to what is of that sort.
    fn applying(&self, selector: u32, subject: Option<Subject>) -> Vec<u32> {
        let Some(subject) = subject else {
            return Vec::new();
        };
        let policies = self.selectors.users(selector).subjects.iter().copied();
        policies.filter(|policy| self.policies.get(*policy).applies_to(subject)).collect()
    }

    /// The policy applies to one more endpoint on the node.
    fn arrive(&mut self, policy: u32, node: Option<Text>) {
        if let Some(node) = node
            && self.policies.bind(policy, node)
        {
            for position in 0..self.policies.get(policy).sets.len() {
                let set = self.policies.get(policy).sets[position];
                self.need(set, node);
            }
        }
    }

    /// The policy applies to one endpoint less on the node.
    fn depart(&mut self, policy: u32, node: Option<Text>) {
        if let Some(node) = node
            && self.policies.unbind(policy, node)
        {
            for set in &self.policies.get(policy).sets {
                self.sets.release(*set, node);
            }
        }
    }

    fn need(&mut self, set: u32, node: Text) {
        if self.sets.need(set, node) {
            self.fill(set);
        }
    }

    /// The set becomes live, with all its members.
    fn fill(&mut self, set: u32) {
        let spec = self.sets.spec(set);
        let members = match spec {
            Spec::Selected(selector) | Spec::NamedPorts(selector, ..) => {
                self.index.enliven(selector, &self.texts);
                self.selectors.users_mut(selector).sets.push(set);
                self.members_of(spec, self.index.items_of(selector).iter().copied())
            }
            Spec::Nodes(selector) => {
                self.node_sets.enliven(set, self.texts.get(selector));
                self.members_of(spec, [])
            }
            Spec::Service(namespace, name) | Spec::ServiceAddresses(namespace, name) => {
                self.services.entry((namespace, name)).or_default().sets.push(set);
                self.members_of(spec, [])
            }
        };
        self.sets.enliven(set, members, &self.texts);
    }

    /// The record that a set which is not live would have.
    pub(crate) fn resting_set(&self, id: &SetId) -> Option<Record> {
        let spec = self.sets.find(self.texts.find(&id.0)?)?;
        let items = spec.selector().map(|selector| self.index.select(selector, &self.texts)).unwrap_or_default();
        let members = self.members_of(spec, items).into_iter().collect();
        Some(Record::IpSet(IpSetRecord { kind: spec.kind(), members }))
    }

    /// What these items, or the backends of the Service, add to a set of that content.
    fn members_of(&self, spec: Spec, items: impl IntoIterator<Item = u32>) -> Vec<Member> {
        let mut members = Vec::new();
        for payload in items.into_iter().filter_map(|item| self.members.get(item)) {
            payload.members(spec, &self.port_names, |member| members.push(member));
        }
        match spec {
            Spec::Selected(_) | Spec::NamedPorts(..) => {}
            Spec::Nodes(selector) => {
                members.extend(node_sets::members(self.texts.get(selector), self.globals.nodes()));
            }
            Spec::Service(namespace, name) | Spec::ServiceAddresses(namespace, name) => {
                let backends = self.services.get(&(namespace, name)).into_iter().flat_map(|service| &service.backends);
                members.extend(backends.map(|backend| backend_member(spec, backend)));
            }
        }
        members
    }

    fn bind_all(&mut self, policy: u32) {
        let subject = self.policies.get(policy).binding.subject;
        self.index.enliven(subject, &self.texts);
        self.selectors.users_mut(subject).subjects.push(policy);
        for (item, node) in self.endpoints_of(policy) {
            self.members.touch(item);
            self.arrive(policy, node);
        }
    }

    fn unbind_all(&mut self, policy: u32) {
        let subject = self.policies.get(policy).binding.subject;
        for (item, node) in self.endpoints_of(policy) {
            self.members.touch(item);
            self.depart(policy, node);
        }
        self.selectors.remove_subject(subject, policy);
    }

    /// Gives a policy another place, other rules and sets. The caller cares for its subject.
    fn replace_rules(&mut self, handle: u32, policy: Policy) {
        let Binding { subject, .. } = self.policies.get(handle).binding;
        let is_moved = self.policies.get(handle).binding != policy.binding;
        self.policies.rebind(handle, policy.binding);
        if is_moved && subject == policy.binding.subject {
            self.touch_endpoints(handle);
        }
        let entry = self.policies.touch(handle);
        entry.ingress = policy.ingress;
        entry.egress = policy.egress;
        let before = std::mem::replace(&mut entry.sets, policy.sets);
        let now = entry.sets.clone();
        let nodes: Vec<Text> = entry.nodes.nodes().collect();
        // New ones first: a selector that both use never rests between.
        for set in now.iter().filter(|set| before.binary_search(set).is_err()) {
            nodes.iter().for_each(|node| self.need(*set, *node));
        }
        for set in before.iter().filter(|set| now.binary_search(set).is_err()) {
            nodes.iter().for_each(|node| self.sets.release(*set, *node));
        }
        before.iter().for_each(|set| self.sets.unmention(*set));
    }

    fn touch_endpoints(&mut self, policy: u32) {
        let subject = self.policies.get(policy).binding.subject;
        for item in self.index.items_of(subject) {
            self.members.touch(*item);
        }
    }

    /// Endpoints that a policy applies to, with their nodes. Its selector is live.
    fn endpoints_of(&self, policy: u32) -> Vec<(u32, Option<Text>)> {
        let policy = self.policies.get(policy);
        let items = self.index.items_of(policy.binding.subject).iter();
        let endpoints = items.filter_map(|item| {
            let payload = self.members.get(*item)?;
            policy.applies_to(payload.subject()?).then(|| (*item, payload.node()))
        });
        endpoints.collect()
    }

    fn drop_service(&mut self, key: (Text, Text)) {
        if self.services.get(&key).is_some_and(|service| service.backends.is_empty() && service.sets.is_empty()) {
            self.services.remove(&key);
        }
    }
}

fn backend_member(spec: Spec, backend: &Backend) -> Member {
    match spec {
        Spec::ServiceAddresses(..) => address(backend.address),
        _ => Member::AddressPort(backend.address, backend.protocol, backend.port),
    }
}

/// A Service or service account by its parts.
pub(crate) fn key(name: &NamespacedName, texts: &mut crate::texts::Texts) -> (Text, Text) {
    (texts.intern(&name.namespace), texts.intern(&name.name))
}
