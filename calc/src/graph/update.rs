//! Propagation: every step by which a change of an object reaches records. See the drawing in
//! [`super`].
//!
//! Order matters in three places, each explained where it is: sets that are live count a newly
//! selected item before policies may make further sets live; an item's payload is replaced before
//! its matches; a policy's new sets are acquired before its old ones are released.

use std::collections::BTreeSet;

use margay_api::policy::Tier;

use crate::globals::{BlockChange, NodeChange};
use crate::index::{LabelList, MatchDelta, ParentName};
use crate::interner::{NamePair, Symbol};
use crate::items::{Payload, Subject};
use crate::model::{IpSetRecord, Member, Record, SetId};
use crate::node_sets;
use crate::policies::{Binding, PolicyId, StoredPolicy, normalise_order};
use crate::sets::{SetSpec, address};
use crate::update::Backend;

use super::Graph;

/// Payload, labels and parents of an item.
pub(crate) struct Placement {
    pub(crate) payload: Payload,
    pub(crate) labels: LabelList,
    /// Without duplicates.
    pub(crate) parents: Vec<ParentName>,
}

impl Graph {
    /// Inserts an item or replaces its value.
    pub(crate) fn put_item(&mut self, item: u32, placement: Placement) {
        let Placement {
            payload,
            labels,
            parents,
        } = placement;
        let is_new = self.items.get(item).is_none();
        // The payload first: what a selector that no longer matches subtracts below must be what
        // was added, which is now the new payload.
        self.replace_payload(item, payload);
        if self.index.place_item(item, labels, &parents) || is_new {
            let matches = self.index.matches(item, &self.interner);
            self.update_matches(item, matches);
        }
    }

    /// Removes an item whose object was deleted.
    pub(crate) fn delete_item(&mut self, item: u32) {
        let removed = self.index.selectors_of(item);
        self.update_matches(
            item,
            MatchDelta {
                removed,
                added: Vec::new(),
            },
        );
        self.items.put(item, None);
        self.index.remove_item(item);
    }

    /// Applies changed labels (with their prefix) of a namespace or service account; `None`: it was
    /// deleted.
    pub(crate) fn update_parent(&mut self, name: ParentName, labels: Option<LabelList>) {
        if self.index.is_parent(name) != labels.is_some() {
            // A pod's only profile is its namespace; a host endpoint may have profiles of both
            // kinds.
            let is_account = name.1.is_some();
            for item in self.index.children(name) {
                if !is_account
                    || self.items.get(item).and_then(Payload::subject) == Some(Subject::Host)
                {
                    self.items.mark_dirty(item);
                }
            }
        }
        for (item, matches) in self.index.set_parent_labels(name, labels, &self.interner) {
            self.update_matches(item, matches);
        }
    }

    /// Applies a created, changed or deleted Tier and marks the endpoints of its policies dirty.
    pub(crate) fn update_tier(&mut self, name: Symbol, tier: Option<Tier>) {
        let tier = tier.map(|tier| Tier {
            order: normalise_order(tier.order),
            ..tier
        });
        for policy in self.policies.set_tier(name, tier) {
            self.mark_endpoints_dirty(policy);
        }
    }

    /// Inserts or replaces a policy and binds it to the endpoints that its selector matches.
    pub(crate) fn put_policy(&mut self, policy: StoredPolicy) {
        let Some(known) = self.policies.find(policy.key) else {
            let handle = self.policies.insert(policy);
            return self.bind_policy(handle);
        };
        let before = self.policies.get(known).binding;
        if (before.subject, before.traffic) == (policy.binding.subject, policy.binding.traffic) {
            self.replace_rules(known, policy);
            self.selectors.unmention(before.subject);
        } else {
            self.unbind_policy(known);
            self.replace_rules(known, policy);
            self.bind_policy(known);
            self.selectors.unmention(before.subject);
        }
    }

    /// Removes a policy, releasing its sets and its selector.
    pub(crate) fn delete_policy(&mut self, key: PolicyId) {
        let Some(handle) = self.policies.find(key) else {
            return;
        };
        self.unbind_policy(handle);
        if let Some(policy) = self.policies.remove(handle) {
            policy.sets.iter().for_each(|set| self.sets.unmention(*set));
            self.selectors.unmention(policy.binding.subject);
        }
    }

    /// Applies changes of nodes to the sets of node addresses.
    pub(crate) fn update_nodes(&mut self, changes: Vec<NodeChange>) {
        for NodeChange {
            name,
            before,
            after,
        } in changes
        {
            self.speakers.mark_node(&name);
            for (set, selector) in self.node_sets.live() {
                // Adds before it removes: a member in both stays, and marks nothing dirty.
                let added = after
                    .iter()
                    .flat_map(|node| node_sets::added(selector, node));
                added.for_each(|member| self.sets.add(set, member));
                let removed = before
                    .iter()
                    .flat_map(|node| node_sets::added(selector, node));
                removed.for_each(|member| self.sets.remove(set, member));
            }
        }
    }

    /// Applies blocks that are accepted, changed or refused.
    pub(crate) fn update_blocks(&mut self, change: BlockChange) {
        self.speakers.mark_blocks(&change.ranges);
        self.update_nodes(change.nodes);
        let names: BTreeSet<String> = change
            .ranges
            .iter()
            .flat_map(|range| self.auto_hosts.within(*range))
            .cloned()
            .collect();
        names.iter().for_each(|name| self.put_auto_host(name));
    }

    /// Applies what kubelet reports of a node, which decides about addresses of its host endpoints.
    pub(crate) fn update_auto_hosts_on(&mut self, node: &str) {
        let names: Vec<String> = self.auto_hosts.on(node).cloned().collect();
        names.iter().for_each(|name| self.put_auto_host(name));
    }

    /// Puts an automatic host endpoint in with the addresses that it may have.
    pub(crate) fn put_auto_host(&mut self, name: &str) {
        if let Some(written) = self.auto_hosts.get(name) {
            let mut endpoint = written.clone();
            endpoint
                .addresses
                .retain(|address| self.globals.may_have(&endpoint.node, *address));
            self.store_host_endpoint(name, endpoint);
        }
    }

    /// Applies changed backends of a Service to the sets that contain them.
    pub(crate) fn update_service(&mut self, key: NamePair, backends: Vec<Backend>) {
        let service = self.services.entry(key).or_default();
        let before = std::mem::replace(&mut service.backends, backends);
        for set in &service.sets {
            let spec = self.sets.spec(*set);
            // Adds before it removes, as above.
            service
                .backends
                .iter()
                .for_each(|backend| self.sets.add(*set, backend_member(spec, backend)));
            before
                .iter()
                .for_each(|backend| self.sets.remove(*set, backend_member(spec, backend)));
        }
        self.free_service(key);
    }

    /// Frees sets and selectors without references; the last step of a flush.
    pub(crate) fn free_unused(&mut self, deactivated: Vec<(u32, SetSpec)>, gone: Vec<SetSpec>) {
        for (set, spec) in deactivated {
            match spec {
                SetSpec::Selected(selector) | SetSpec::NamedPorts(selector, ..) => {
                    self.selectors.remove_set(selector, set)
                }
                SetSpec::Nodes(_) => self.node_sets.deactivate(set),
                SetSpec::Service(namespace, name) | SetSpec::ServiceAddresses(namespace, name) => {
                    if let Some(service) = self.services.get_mut(&(namespace, name)) {
                        service.sets.retain(|known| *known != set);
                    }
                    self.free_service((namespace, name));
                }
            }
        }
        for spec in gone {
            if let SetSpec::NamedPorts(_, _, names) = spec {
                self.port_names.release(names);
            }
            if let Some(selector) = spec.selector() {
                self.selectors.unmention(selector);
            }
        }
        self.selectors.flush(&mut self.index, &self.interner);
    }

    /// Replaces the payload of an item and adjusts every count that it contributes to.
    fn replace_payload(&mut self, item: u32, payload: Payload) {
        let before = self.items.get(item);
        if before == Some(&payload) {
            return;
        }
        let (node, subject) = (payload.node(), payload.subject());
        self.mark_local_peers(item);
        let Some(before) = self.items.put(item, Some(payload)) else {
            return;
        };
        self.mark_local_peers(item);
        let now = self.items.get(item).expect("inserted above");
        for selector in self.index.selectors_of(item) {
            for set in &self.selectors.users(selector).sets {
                let spec = self.sets.spec(*set);
                // Adds before it removes, as above.
                now.members(spec, &self.port_names, |member| self.sets.add(*set, member));
                before.members(spec, &self.port_names, |member| {
                    self.sets.remove(*set, member)
                });
            }
        }
        if before.node() != node {
            for selector in self.index.selectors_of(item) {
                for policy in self.policies_for(selector, subject) {
                    self.count_endpoint(policy, node);
                    self.uncount_endpoint(policy, before.node());
                }
            }
        }
    }

    fn update_matches(&mut self, item: u32, matches: MatchDelta) {
        for selector in matches.removed {
            self.index.unlink(selector, item);
            self.revert_match(selector, item);
        }
        for selector in matches.added {
            self.index.link(selector, item);
            self.apply_match(selector, item);
        }
    }

    /// Adds an item that the selector now matches to its sets and policies.
    fn apply_match(&mut self, selector: u32, item: u32) {
        self.mark_local_peer(selector, item);
        let Some(payload) = self.items.get(item) else {
            return;
        };
        // Sets first: a set that becomes live below is filled with all matching items, including
        // this one, which would then be counted twice.
        for set in &self.selectors.users(selector).sets {
            payload.members(self.sets.spec(*set), &self.port_names, |member| {
                self.sets.add(*set, member)
            });
        }
        let (node, subject) = (payload.node(), payload.subject());
        for policy in self.policies_for(selector, subject) {
            self.items.mark_dirty(item);
            self.count_endpoint(policy, node);
        }
    }

    /// Removes an item that the selector no longer matches from its sets and policies.
    fn revert_match(&mut self, selector: u32, item: u32) {
        self.mark_local_peer(selector, item);
        let Some(payload) = self.items.get(item) else {
            return;
        };
        for set in &self.selectors.users(selector).sets {
            payload.members(self.sets.spec(*set), &self.port_names, |member| {
                self.sets.remove(*set, member)
            });
        }
        let (node, subject) = (payload.node(), payload.subject());
        for policy in self.policies_for(selector, subject) {
            self.items.mark_dirty(item);
            self.uncount_endpoint(policy, node);
        }
    }

    /// Policies with this selector that apply to endpoints of that kind.
    fn policies_for(&self, selector: u32, subject: Option<Subject>) -> Vec<u32> {
        let Some(subject) = subject else {
            return Vec::new();
        };
        let policies = self.selectors.users(selector).subjects.iter().copied();
        policies
            .filter(|policy| self.policies.get(*policy).applies_to(subject))
            .collect()
    }

    /// Counts one more endpoint of the node to which the policy applies.
    fn count_endpoint(&mut self, policy: u32, node: Option<Symbol>) {
        if let Some(node) = node
            && self.policies.bind(policy, node)
        {
            for position in 0..self.policies.get(policy).sets.len() {
                let set = self.policies.get(policy).sets[position];
                self.need_set(set, node);
            }
        }
    }

    /// Counts one endpoint less of the node to which the policy applies.
    fn uncount_endpoint(&mut self, policy: u32, node: Option<Symbol>) {
        if let Some(node) = node
            && self.policies.unbind(policy, node)
        {
            for set in &self.policies.get(policy).sets {
                self.sets.release(*set, node);
            }
        }
    }

    fn need_set(&mut self, set: u32, node: Symbol) {
        if self.sets.need(set, node) {
            self.fill_set(set);
        }
    }

    /// Makes a set live and adds all its members.
    fn fill_set(&mut self, set: u32) {
        let spec = self.sets.spec(set);
        let members = match spec {
            SetSpec::Selected(selector) | SetSpec::NamedPorts(selector, ..) => {
                self.index.activate(selector, &self.interner);
                self.selectors.users_mut(selector).sets.push(set);
                self.members_of(spec, self.index.items_of(selector).iter())
            }
            SetSpec::Nodes(selector) => {
                self.node_sets.activate(set, self.interner.get(selector));
                self.members_of(spec, [])
            }
            SetSpec::Service(namespace, name) | SetSpec::ServiceAddresses(namespace, name) => {
                self.services
                    .entry((namespace, name))
                    .or_default()
                    .sets
                    .push(set);
                self.members_of(spec, [])
            }
        };
        self.sets.activate(set, members);
    }

    /// Computes the record of a set that is not live.
    pub(crate) fn inactive_set(&self, id: &SetId) -> Option<Record> {
        let spec = self.sets.find(self.interner.find(&id.0)?)?;
        let items = spec
            .selector()
            .map(|selector| self.index.matching_items(selector, &self.interner))
            .unwrap_or_default();
        let members = self.members_of(spec, items).into_iter().collect();
        Some(Record::IpSet(IpSetRecord {
            kind: spec.kind(),
            members,
        }))
    }

    /// Members that these items, or the backends of the Service, contribute to a set.
    fn members_of(&self, spec: SetSpec, items: impl IntoIterator<Item = u32>) -> Vec<Member> {
        let mut members = Vec::new();
        for payload in items.into_iter().filter_map(|item| self.items.get(item)) {
            payload.members(spec, &self.port_names, |member| members.push(member));
        }
        match spec {
            SetSpec::Selected(_) | SetSpec::NamedPorts(..) => {}
            SetSpec::Nodes(selector) => {
                members.extend(node_sets::members(
                    self.interner.get(selector),
                    self.globals.accepted_nodes(),
                ));
            }
            SetSpec::Service(namespace, name) | SetSpec::ServiceAddresses(namespace, name) => {
                let backends = self
                    .services
                    .get(&(namespace, name))
                    .into_iter()
                    .flat_map(|service| &service.backends);
                members.extend(backends.map(|backend| backend_member(spec, backend)));
            }
        }
        members
    }

    fn bind_policy(&mut self, policy: u32) {
        let subject = self.policies.get(policy).binding.subject;
        self.index.activate(subject, &self.interner);
        self.selectors.users_mut(subject).subjects.push(policy);
        for (item, node) in self.endpoints_of(policy) {
            self.items.mark_dirty(item);
            self.count_endpoint(policy, node);
        }
    }

    fn unbind_policy(&mut self, policy: u32) {
        let subject = self.policies.get(policy).binding.subject;
        for (item, node) in self.endpoints_of(policy) {
            self.items.mark_dirty(item);
            self.uncount_endpoint(policy, node);
        }
        self.selectors.remove_subject(subject, policy);
    }

    /// Replaces tier, order, rules and sets of a policy. A changed subject is handled by the
    /// caller.
    fn replace_rules(&mut self, handle: u32, policy: StoredPolicy) {
        let Binding { subject, .. } = self.policies.get(handle).binding;
        let is_moved = self.policies.get(handle).binding != policy.binding;
        self.policies.rebind(handle, policy.binding);
        if is_moved && subject == policy.binding.subject {
            self.mark_endpoints_dirty(handle);
        }
        let entry = self.policies.touch(handle);
        entry.ingress = policy.ingress;
        entry.egress = policy.egress;
        let before = std::mem::replace(&mut entry.sets, policy.sets);
        let now = entry.sets.clone();
        let nodes: Vec<Symbol> = entry.nodes.nodes().collect();
        // Acquire new sets before releasing old ones: a selector that both use then stays live.
        for set in now.iter().filter(|set| before.binary_search(set).is_err()) {
            nodes.iter().for_each(|node| self.need_set(*set, *node));
        }
        for set in before.iter().filter(|set| now.binary_search(set).is_err()) {
            nodes.iter().for_each(|node| self.sets.release(*set, *node));
        }
        before.iter().for_each(|set| self.sets.unmention(*set));
    }

    fn mark_endpoints_dirty(&mut self, policy: u32) {
        let subject = self.policies.get(policy).binding.subject;
        for item in self.index.items_of(subject).iter() {
            self.items.mark_dirty(item);
        }
    }

    /// Endpoints that a policy applies to, with their nodes. Its selector must be live.
    fn endpoints_of(&self, policy: u32) -> Vec<(u32, Option<Symbol>)> {
        let policy = self.policies.get(policy);
        let items = self.index.items_of(policy.binding.subject).iter();
        let endpoints = items.filter_map(|item| {
            let payload = self.items.get(item)?;
            policy
                .applies_to(payload.subject()?)
                .then(|| (item, payload.node()))
        });
        endpoints.collect()
    }

    fn free_service(&mut self, key: NamePair) {
        if self
            .services
            .get(&key)
            .is_some_and(|service| service.backends.is_empty() && service.sets.is_empty())
        {
            self.services.remove(&key);
        }
    }
}

fn backend_member(spec: SetSpec, backend: &Backend) -> Member {
    match spec {
        SetSpec::ServiceAddresses(..) => address(backend.address),
        _ => Member::AddressPort(backend.address, backend.protocol, backend.port),
    }
}
