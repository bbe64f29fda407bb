//! The incremental compiler: it holds the wanted table and which part of it depends on which
//! record. A change costs what depends on it; a set member costs one element.
//!
//! Elements of the view's sets are not stored again: they are rendered from the records when a set
//! is new or the whole table is written.

mod classes;
mod delta;
mod dispatch;
mod hosts;
mod origins;
mod room;
mod sets;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use margay_api::endpoint::EndpointKey;
use margay_api::policy::PolicyKey;
use margay_calc::model::{IpSetRecord, PolicyRecord, Record, RecordId, SetId};

use super::base::{Inputs, Section};
use super::class::{Class, Policies};
use super::elements::{self, Shape};
use super::host;
use super::host_ports;
use super::merge::{self, Unions};
use super::names;
use super::origin::RuleRef;
use super::union::Union;
use crate::{Attached, Dirty, Records};
use delta::TableDelta;
use hosts::HostEndpoints;
use margay_nft::{
    Chain, ChainName, Family, Ruleset, Set, SetName, Transaction, TransactionOp, Verdict,
};

/// Sets with more members than this are not merged into unions: the memory would cost more than the
/// saved lookups gain.
const UNION_PART: usize = 1024;

/// Part of the table that the kernel can refuse alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TablePart {
    /// Kernel sets of a set of the view.
    Set(SetId),
    /// Chains of a class.
    Class(Class),
}

/// Incremental compiler of one node's table.
#[derive(Debug)]
pub struct Compiler {
    node: String,
    inputs: Inputs,
    families: Vec<Family>,
    /// Chains, and the sets that do not come from sets of the view.
    wanted: Ruleset,
    /// Shapes of the view's sets and of unions.
    shapes: BTreeMap<SetId, Shape>,
    unions: BTreeMap<SetId, Union>,
    attached: BTreeMap<String, Attached>,
    endpoints: BTreeMap<EndpointKey, KnownEndpoint>,
    hosts: HostEndpoints,
    /// Classes in use; endpoints share the keys.
    classes: BTreeMap<Arc<Class>, ClassState>,
    /// Parts that the kernel refused, with the reason: a set counts as missing, a class drops
    /// everything.
    refused: BTreeMap<TablePart, String>,
}

/// Endpoint of the view.
#[derive(Clone, Debug)]
struct KnownEndpoint {
    /// UID of its pod; empty: not known.
    uid: String,
    /// Classes for ingress and egress.
    bound: [BoundClass; 2],
}

/// Class of an endpoint in one direction, and its entry point.
#[derive(Clone, Debug)]
struct BoundClass {
    class: Arc<Class>,
    /// Verdict that leads there, for IPv4 and IPv6; cached, because it takes a hash over the whole
    /// list of policies.
    entry: [Verdict; 2],
}

#[derive(Debug, Default)]
struct ClassState {
    /// Its chains, and for each rule the number of the item that it was made of.
    chains: BTreeMap<ChainName, Box<[Option<u32>]>>,
    /// The rules of policies that each item comes from, through all tiers.
    origins: Vec<Box<[RuleRef]>>,
    broken: BTreeMap<PolicyKey, String>,
    /// Sets that its policies name, missing ones included.
    sets: BTreeSet<SetId>,
    unions: Unions,
}

/// Set of shared classes.
type Classes = BTreeSet<Arc<Class>>;

impl Policies for &Records {
    fn policy(&self, key: &PolicyKey) -> Option<&PolicyRecord> {
        match self.get(&RecordId::Policy(key.clone())) {
            Some(Record::Policy(policy)) => Some(policy),
            _ => None,
        }
    }
}

impl Compiler {
    /// Creates a compiler with the table of an empty view.
    pub fn new(node: &str) -> Self {
        let mut compiler = Self {
            node: node.to_owned(),
            inputs: Inputs::default(),
            families: vec![Family::Ipv4],
            wanted: Ruleset::new(names::table()),
            shapes: BTreeMap::new(),
            unions: BTreeMap::new(),
            attached: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            hosts: HostEndpoints::default(),
            classes: BTreeMap::new(),
            refused: BTreeMap::new(),
        };
        let mut delta = TableDelta::new();
        compiler.update_base(&mut delta);
        compiler.update_dispatch(&mut delta);
        compiler
    }

    /// Pods of this node, by interface.
    pub fn attached(&self) -> &BTreeMap<String, Attached> {
        &self.attached
    }

    /// Whether the wanted table contains the policy of the interface's pod.
    pub fn has_policy(&self, interface: &str) -> bool {
        self.attached
            .get(interface)
            .is_some_and(|pod| self.classes_of(pod).is_some())
    }

    /// Classes of a pod. A record with another UID belongs to a former or later pod of the same
    /// name and does not count.
    fn classes_of(&self, pod: &Attached) -> Option<&[BoundClass; 2]> {
        let known = self.endpoints.get(&pod.endpoint)?;
        let is_same = known.uid == pod.uid || known.uid.is_empty() || pod.uid.is_empty();
        is_same.then_some(&known.bound)
    }

    /// Attaches a pod, or changes its addresses.
    pub fn attach(&mut self, interface: String, pod: Attached, records: &Records) -> Transaction {
        self.attached.insert(interface, pod);
        self.update_attachments(records)
    }

    /// Detaches a pod.
    pub fn detach(&mut self, interface: &str, records: &Records) -> Transaction {
        self.attached.remove(interface);
        self.update_attachments(records)
    }

    fn update_attachments(&mut self, records: &Records) -> Transaction {
        let mut delta = TableDelta::new();
        self.update_families(records, &mut delta);
        self.update_dispatch(&mut delta);
        self.update_unions(records, &mut delta);
        delta.into_transaction()
    }

    /// Applies a change of the view.
    pub fn apply(&mut self, records: &Records, dirty: &Dirty) -> Transaction {
        let mut delta = TableDelta::new();
        let mut stale = BTreeSet::new();
        // Sets first: classes are compiled with the shapes of the new members. Unions last: which
        // of them are used is known once all classes are compiled.
        self.update_sets(records, dirty, &mut delta, &mut stale);
        let inputs = dirty.records.iter().any(is_input)
            && self.update_inputs(records, &mut delta, &mut stale);
        let policies: BTreeSet<&PolicyKey> = dirty
            .records
            .iter()
            .filter_map(|id| {
                if let RecordId::Policy(key) = id {
                    Some(key)
                } else {
                    None
                }
            })
            .collect();
        let names_one = |class: &&Arc<Class>| class.policies().any(|key| policies.contains(key));
        for class in self
            .classes
            .keys()
            .filter(|_| !policies.is_empty())
            .filter(names_one)
        {
            self.refused.remove(&TablePart::Class(Class::clone(class)));
            stale.insert(class.clone());
        }
        // Endpoints before classes: a class without endpoints is removed, not compiled.
        let endpoints = self.update_endpoints(records, dirty, &mut stale);
        let hosts = self.update_host_endpoints(records, dirty, &mut stale);
        self.compile_classes(records, &stale, &mut delta);
        if endpoints {
            self.update_dispatch(&mut delta);
        }
        if inputs || hosts {
            self.update_host_hooks(&mut delta);
        }
        self.update_unions(records, &mut delta);
        delta.into_transaction()
    }

    /// Renders the whole wanted table.
    pub fn ruleset(&self, records: &Records) -> Ruleset {
        let mut ruleset = self.wanted.clone();
        let unions = self.unions.iter().map(|(id, union)| (id, &union.record));
        for (id, record) in view_sets(records)
            .chain(unions)
            .filter(|(id, _)| self.shapes.contains_key(id))
        {
            for (name, set) in elements::render(id, record) {
                ruleset.put_set(name, set);
            }
        }
        ruleset
    }

    /// Records that are not enforced as written, with the reason.
    pub fn errors(&self) -> BTreeMap<RecordId, String> {
        let unassigned = self.hosts.unassigned();
        let mut errors: BTreeMap<RecordId, String> = unassigned
            .into_iter()
            .map(|(name, reason)| (RecordId::HostEndpoint(name), reason))
            .collect();
        for state in self.classes.values() {
            errors.extend(
                state
                    .broken
                    .iter()
                    .map(|(key, reason)| (RecordId::Policy(key.clone()), reason.clone())),
            );
        }
        for (part, reason) in &self.refused {
            match part {
                TablePart::Set(id) if merge::is_union(id) => {
                    let users = self
                        .classes
                        .iter()
                        .filter(|(_, state)| state.unions.contains_key(id));
                    let policies = users.flat_map(|(class, _)| class.policies());
                    errors.extend(
                        policies.map(|key| (RecordId::Policy(key.clone()), reason.clone())),
                    );
                }
                TablePart::Set(id) => {
                    errors.insert(RecordId::IpSet(id.clone()), reason.clone());
                }
                TablePart::Class(class) => {
                    errors.extend(
                        class
                            .policies()
                            .map(|key| (RecordId::Policy(key.clone()), reason.clone())),
                    );
                }
            }
        }
        errors
    }

    /// Part that an operation belongs to; `None` for the base part, without which nothing can be
    /// enforced.
    pub fn part_of(&self, operation: &TransactionOp) -> Option<TablePart> {
        use TransactionOp as Op;
        match operation {
            Op::PutChain(name, _)
            | Op::FlushChain(name)
            | Op::DeleteChain(name)
            | Op::AppendRules(name, ..) => {
                let owner = self
                    .classes
                    .iter()
                    .find(|(_, state)| state.chains.contains_key(name));
                owner.map(|(class, _)| TablePart::Class(Class::clone(class)))
            }
            Op::CreateSet(name, _)
            | Op::DeleteSet(name)
            | Op::AddElements(name, _)
            | Op::DeleteElements(name, _) => {
                let owner = self
                    .shapes
                    .iter()
                    .find(|(id, shape)| shape.sets(id).contains_key(name));
                owner.map(|(id, _)| TablePart::Set(id.clone()))
            }
            Op::CreateTable | Op::DeleteTable => None,
        }
    }

    /// Whether a part is refused.
    pub fn has_refused(&self, part: &TablePart) -> bool {
        self.refused.contains_key(part)
    }

    /// Why the interface's pod is cut off instead of under its policy, if so.
    pub fn refusal_of(&self, interface: &str) -> Option<String> {
        let classes = self.classes_of(self.attached.get(interface)?)?;
        classes.iter().find_map(|bound| {
            self.refused
                .get(&TablePart::Class(Class::clone(&bound.class)))
                .cloned()
        })
    }

    /// Compiles the table without a part that the kernel refused: what depends on it is denied.
    pub fn refuse(&mut self, part: TablePart, reason: String, records: &Records) {
        let mut stale = BTreeSet::new();
        match &part {
            TablePart::Set(id) => {
                self.shapes.remove(id);
                stale.extend(self.classes_using(id));
            }
            TablePart::Class(class) => stale.extend(self.shared_class(class)),
        }
        self.refused.insert(part, reason);
        let mut unused = TableDelta::new();
        self.compile_classes(records, &stale, &mut unused);
        self.update_unions(records, &mut unused);
    }

    /// Compiles all refused parts again; returns whether there were any.
    pub fn retry_refused(&mut self, records: &Records) -> bool {
        let refused = std::mem::take(&mut self.refused);
        let mut stale = BTreeSet::new();
        for part in refused.keys() {
            match part {
                TablePart::Set(id) => {
                    let union = self.unions.get(id).map(|union| &union.record);
                    if let Some(record) = view_set(records, id).or(union) {
                        self.shapes.insert(id.clone(), Shape::of(record));
                    }
                    stale.extend(self.classes_using(id));
                }
                TablePart::Class(class) => stale.extend(self.shared_class(class)),
            }
        }
        let mut unused = TableDelta::new();
        self.compile_classes(records, &stale, &mut unused);
        self.update_unions(records, &mut unused);
        !refused.is_empty()
    }

    /// Updates the inputs of the base part and of host endpoints; returns whether they changed.
    fn update_inputs(
        &mut self,
        records: &Records,
        delta: &mut TableDelta,
        stale: &mut Classes,
    ) -> bool {
        let inputs = Inputs::gather(&self.node, records, self.links());
        if inputs == self.inputs {
            return false;
        }
        if inputs.logging() != self.inputs.logging() {
            let reporting = self
                .classes
                .iter()
                .filter(|(class, _)| class.reports(&records));
            stale.extend(reporting.map(|(class, _)| class.clone()));
        }
        self.inputs = inputs;
        self.update_families(records, delta);
        self.update_base(delta);
        true
    }

    /// Compiles IPv6 chains only if a pod can have an IPv6 address.
    fn update_families(&mut self, records: &Records, delta: &mut TableDelta) {
        let mut addresses = self.attached.values().flat_map(|pod| &pod.addresses);
        let v6 = self.inputs.has_ipv6() || addresses.any(IpAddr::is_ipv6);
        let families = if v6 {
            Family::ALL.to_vec()
        } else {
            vec![Family::Ipv4]
        };
        if families != self.families {
            self.families = families;
            self.update_base(delta);
            let all = self.classes.keys().cloned().collect();
            self.compile_classes(records, &all, delta);
            self.update_dispatch(delta);
        }
    }

    fn update_base(&mut self, delta: &mut TableDelta) {
        let section = self.inputs.render(&self.families);
        let is_ours = |name: &str| !host::is_host(name) && !host_ports::is_host_port(name);
        self.replace_section(
            section,
            |name, chain| chain.base.is_some() && is_ours(name.as_str()),
            |name| !dispatch::is_dispatch_set(name) && is_ours(name.as_str()),
            delta,
        );
    }

    /// Replaces the chains and sets of one part.
    fn replace_section(
        &mut self,
        section: Section,
        has_chain: impl Fn(&ChainName, &Chain) -> bool,
        has_set: impl Fn(&SetName) -> bool,
        delta: &mut TableDelta,
    ) {
        let present = self
            .wanted
            .chains
            .iter()
            .filter(|(name, chain)| has_chain(name, chain))
            .map(|(name, _)| name);
        let chains: Vec<ChainName> = present
            .filter(|name| !section.chains.contains_key(*name))
            .cloned()
            .collect();
        let present = self.wanted.sets.keys().filter(|name| has_set(name));
        let sets: Vec<SetName> = present
            .filter(|name| !section.sets.contains_key(*name))
            .cloned()
            .collect();
        chains
            .into_iter()
            .for_each(|name| self.put_chain(name, None, delta));
        sets.into_iter()
            .for_each(|name| self.put_set(name, None, delta));
        section
            .chains
            .into_iter()
            .for_each(|(name, chain)| self.put_chain(name, Some(chain), delta));
        section
            .sets
            .into_iter()
            .for_each(|(name, set)| self.put_set(name, Some(set), delta));
    }

    fn put_chain(&mut self, name: ChainName, chain: Option<Chain>, delta: &mut TableDelta) {
        let old = match chain {
            Some(chain)
                if self
                    .wanted
                    .chains
                    .get(&name)
                    .is_some_and(|old| **old == chain) =>
            {
                return;
            }
            Some(chain) => {
                let chain = Arc::new(chain);
                delta.new.chains.insert(name.clone(), chain.clone());
                self.wanted.chains.insert(name.clone(), chain)
            }
            None => {
                delta.new.chains.remove(&name);
                self.wanted.chains.remove(&name)
            }
        };
        if delta.chains.insert(name.clone()) {
            delta.old.chains.extend(old.map(|old| (name, old)));
        }
    }

    fn put_set(&mut self, name: SetName, set: Option<Set>, delta: &mut TableDelta) {
        let old = match set {
            Some(set) if self.wanted.sets.get(&name).is_some_and(|old| **old == set) => return,
            Some(set) => {
                let set = Arc::new(set);
                delta.new.sets.insert(name.clone(), set.clone());
                self.wanted.sets.insert(name.clone(), set)
            }
            None => {
                delta.new.sets.remove(&name);
                self.wanted.sets.remove(&name)
            }
        };
        if delta.sets.insert(name.clone()) {
            delta.old.sets.extend(old.map(|old| (name, old)));
        }
    }
}

/// Looks up a set of the view.
fn view_set<'a>(records: &'a Records, id: &SetId) -> Option<&'a IpSetRecord> {
    match records.get(&RecordId::IpSet(id.clone())) {
        Some(Record::IpSet(record)) => Some(record),
        _ => None,
    }
}

/// Iterates over the sets of the view.
fn view_sets(records: &Records) -> impl Iterator<Item = (&SetId, &IpSetRecord)> {
    records
        .iter()
        .filter_map(|(id, record)| match (id, record) {
            (RecordId::IpSet(id), Record::IpSet(record)) => Some((id, record)),
            _ => None,
        })
}

/// Whether the base part depends on the record.
const fn is_input(id: &RecordId) -> bool {
    matches!(
        id,
        RecordId::Settings | RecordId::Pool(_) | RecordId::Node(_)
    )
}

#[cfg(test)]
mod host_tests;
#[cfg(test)]
mod origin_tests;
#[cfg(test)]
mod size_tests;
#[cfg(test)]
mod tests;
