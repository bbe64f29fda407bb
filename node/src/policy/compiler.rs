//! The compiler's memory: the table as wanted, and what of it depends on which record. A change costs what depends on it, and one member of a set
//! costs one element.
//!
//! The elements of the view's own sets are not kept a second time: they are made from the records when a set is new or the table is written whole.

mod delta;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use margay_api::endpoint::EndpointKey;
use margay_api::policy::PolicyKey;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{IpSetRecord, Member, PolicyRecord, Record, RecordId, SetId};

use super::base::{self, Inputs};
use super::class::{self, Class, Direction, Plan, Policies};
use super::elements::{self, Shape};
use super::merge::{self, Role, Unions};
use super::names;
use super::rule::Context;
use super::union::Union;
use crate::nft::{
    Chain, ChainName, Family, Field, IfName, Key, Ruleset, Set, SetName, Transaction, TransactionOp, Value,
};
use crate::state::Dirty;
use delta::Delta;

/// Sets with more members than this are no part of unions: it would cost more memory than lookups save time.
const UNION_PART: usize = 1024;

/// A pod whose link is on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The pod.
    pub endpoint: EndpointKey,
    /// The addresses it may send from.
    pub addresses: Vec<IpAddr>,
}

/// A part of the table that can fail alone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A set of the view.
    Set(SetId),
    /// The chains of a class.
    Class(Class),
}

/// The records, as the compiler reads them.
type Records = BTreeMap<RecordId, Record>;

/// See the module.
#[derive(Debug)]
pub struct Compiler {
    node: String,
    inputs: Inputs,
    families: Vec<Family>,
    /// Chains, and every set that is not a set of the view.
    wanted: Ruleset,
    /// Of the view's sets and of unions.
    shapes: BTreeMap<SetId, Shape>,
    unions: BTreeMap<SetId, Union>,
    attached: BTreeMap<String, Attached>,
    endpoints: BTreeMap<EndpointKey, [Class; 2]>,
    classes: BTreeMap<Class, ClassState>,
    /// Parts that the kernel refused: a set is treated as missing, a class drops everything.
    refused: BTreeMap<Part, String>,
}

#[derive(Debug, Default)]
struct ClassState {
    chains: BTreeSet<ChainName>,
    broken: BTreeMap<PolicyKey, String>,
    unions: Unions,
}

impl Policies for &Records {
    fn policy(&self, key: &PolicyKey) -> Option<&PolicyRecord> {
        match self.get(&RecordId::Policy(key.clone())) {
            Some(Record::Policy(policy)) => Some(policy),
            _ => None,
        }
    }
}

impl Compiler {
    /// A compiler for this node that wants the table of an empty view.
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
            classes: BTreeMap::new(),
            refused: BTreeMap::new(),
        };
        let mut delta = Delta::new();
        compiler.fixed(&mut delta);
        compiler.dispatch(&mut delta);
        compiler
    }

    /// The pods of this node by interface.
    pub fn attached(&self) -> &BTreeMap<String, Attached> {
        &self.attached
    }

    /// Whether the pod on this interface has its policy in the wanted table.
    pub fn decides(&self, interface: &str) -> bool {
        self.attached.get(interface).is_some_and(|pod| self.endpoints.contains_key(&pod.endpoint))
    }

    /// A pod came, or has other addresses.
    pub fn attach(&mut self, interface: String, pod: Attached, records: &Records) -> Transaction {
        self.attached.insert(interface, pod);
        self.repatch(records)
    }

    /// A pod went.
    pub fn detach(&mut self, interface: &str, records: &Records) -> Transaction {
        self.attached.remove(interface);
        self.repatch(records)
    }

    fn repatch(&mut self, records: &Records) -> Transaction {
        let mut delta = Delta::new();
        self.refamily(records, &mut delta);
        self.dispatch(&mut delta);
        self.unions(records, &mut delta);
        delta.into_transaction()
    }

    /// Follows a change of the view.
    pub fn apply(&mut self, records: &Records, dirty: &Dirty) -> Transaction {
        let mut delta = Delta::new();
        let mut stale = BTreeSet::new();
        self.sets(records, dirty, &mut delta, &mut stale);
        if dirty.records.iter().any(is_input) {
            self.reinput(records, &mut delta, &mut stale);
        }
        let policies: BTreeSet<&PolicyKey> = dirty
            .records
            .iter()
            .filter_map(|id| if let RecordId::Policy(key) = id { Some(key) } else { None })
            .collect();
        for class in self.classes.keys().filter(|class| class.policies().any(|key| policies.contains(key))) {
            self.refused.remove(&Part::Class(class.clone()));
            stale.insert(class.clone());
        }
        let endpoints = self.endpoints(records, dirty, &mut stale);
        self.classes(records, &stale, &mut delta);
        if endpoints {
            self.dispatch(&mut delta);
        }
        self.unions(records, &mut delta);
        delta.into_transaction()
    }

    /// The whole table as wanted.
    pub fn ruleset(&self, records: &Records) -> Ruleset {
        let mut ruleset = self.wanted.clone();
        let unions = self.unions.iter().map(|(id, union)| (id, &union.record));
        for (id, record) in sets(records).chain(unions).filter(|(id, _)| self.shapes.contains_key(id)) {
            for (name, set) in elements::render(id, record) {
                ruleset.put_set(name, set);
            }
        }
        ruleset
    }

    /// Records that are not enforced as they are written, and why.
    pub fn errors(&self) -> BTreeMap<RecordId, String> {
        let mut errors = BTreeMap::new();
        for state in self.classes.values() {
            errors.extend(state.broken.iter().map(|(key, reason)| (RecordId::Policy(key.clone()), reason.clone())));
        }
        for (part, reason) in &self.refused {
            match part {
                Part::Set(id) if merge::is_union(id) => {
                    let users = self.classes.iter().filter(|(_, state)| state.unions.contains_key(id));
                    let policies = users.flat_map(|(class, _)| class.policies());
                    errors.extend(policies.map(|key| (RecordId::Policy(key.clone()), reason.clone())));
                }
                Part::Set(id) => {
                    errors.insert(RecordId::IpSet(id.clone()), reason.clone());
                }
                Part::Class(class) => {
                    errors.extend(class.policies().map(|key| (RecordId::Policy(key.clone()), reason.clone())));
                }
            }
        }
        errors
    }

    /// The part that an operation is about; none for the fixed part, without which there is no enforcement at all.
    pub fn part(&self, operation: &TransactionOp) -> Option<Part> {
        use TransactionOp as Op;
        match operation {
            Op::PutChain(name, _) | Op::FlushChain(name) | Op::DeleteChain(name) | Op::AppendRules(name, ..) => {
                let owner = self.classes.iter().find(|(_, state)| state.chains.contains(name));
                owner.map(|(class, _)| Part::Class(class.clone()))
            }
            Op::CreateSet(name, _) | Op::DeleteSet(name) | Op::AddElements(name, _) | Op::DeleteElements(name, _) => {
                let owner = self.shapes.iter().find(|(id, shape)| shape.sets(id).contains_key(name));
                owner.map(|(id, _)| Part::Set(id.clone()))
            }
            Op::CreateTable | Op::DeleteTable => None,
        }
    }

    /// Whether this part is refused already.
    pub fn has_refused(&self, part: &Part) -> bool {
        self.refused.contains_key(part)
    }

    /// Why the pod on this interface is cut off instead of being under its policy, if that is so.
    pub fn refusal(&self, interface: &str) -> Option<String> {
        let classes = self.endpoints.get(&self.attached.get(interface)?.endpoint)?;
        classes.iter().find_map(|class| self.refused.get(&Part::Class(class.clone())).cloned())
    }

    /// Wants the table without a part that the kernel refused: what depends on it is denied.
    pub fn refuse(&mut self, part: Part, reason: String, records: &Records) {
        let mut stale = BTreeSet::new();
        match &part {
            Part::Set(id) => {
                self.shapes.remove(id);
                stale.extend(self.users(id, records));
            }
            Part::Class(class) => {
                stale.insert(class.clone());
            }
        }
        self.refused.insert(part, reason);
        let mut unused = Delta::new();
        self.classes(records, &stale, &mut unused);
        self.unions(records, &mut unused);
    }

    /// Wants everything again that was refused; returns whether there was any.
    pub fn forgive(&mut self, records: &Records) -> bool {
        let refused = std::mem::take(&mut self.refused);
        let mut stale = BTreeSet::new();
        for part in refused.keys() {
            match part {
                Part::Set(id) => {
                    let union = self.unions.get(id).map(|union| &union.record);
                    if let Some(record) = set_of(records, id).or(union) {
                        self.shapes.insert(id.clone(), Shape::of(record));
                    }
                    stale.extend(self.users(id, records));
                }
                Part::Class(class) => {
                    stale.insert(class.clone());
                }
            }
        }
        let mut unused = Delta::new();
        self.classes(records, &stale, &mut unused);
        self.unions(records, &mut unused);
        !refused.is_empty()
    }

    /// Sets of the view that came, went or have other members.
    fn sets(&mut self, records: &Records, dirty: &Dirty, delta: &mut Delta, stale: &mut BTreeSet<Class>) {
        let changed = dirty.records.iter().filter_map(|id| if let RecordId::IpSet(id) = id { Some(id) } else { None });
        for id in changed {
            self.refused.remove(&Part::Set(id.clone()));
            self.reshape(id, set_of(records, id), delta);
            stale.extend(self.users(id, records));
        }
        let mut joined: BTreeMap<SetId, MemberDelta> = BTreeMap::new();
        for (id, members) in &dirty.members {
            let Some(record) = set_of(records, id) else { continue };
            let before = record.members.len() + members.removed.len() - members.added.len();
            if self.members(id, record, members, delta) || (before > UNION_PART) != (record.members.len() > UNION_PART)
            {
                stale.extend(self.users(id, records));
            }
            for (union, state) in self.unions.iter_mut().filter(|(_, state)| state.parts.contains(id)) {
                let own = state.follow(members, records);
                let all = joined.entry(union.clone()).or_default();
                all.added.extend(own.added);
                all.removed.extend(own.removed);
            }
        }
        for (id, members) in joined {
            let Some(union) = self.unions.remove(&id) else { continue };
            if self.members(&id, &union.record, &members, delta) {
                stale.extend(self.users(&id, records));
            }
            self.unions.insert(id, union);
        }
    }

    /// Follows a change of members; returns whether the shape is another.
    fn members(&mut self, id: &SetId, record: &IpSetRecord, members: &MemberDelta, delta: &mut Delta) -> bool {
        let Some(shape) = self.shapes.get(id).copied() else { return false };
        let ranged = |member: &Member| matches!(member, Member::Net(net) if net.prefix_len() < net.max_prefix_len());
        let touched = members.added.iter().chain(&members.removed).any(ranged);
        let kept = shape.sets(id);
        let reshaped = touched && Shape::of(record) != shape;
        if reshaped {
            self.reshape(id, Some(record), delta);
        }
        let now = self.shapes.get(id).map(|shape| shape.sets(id)).unwrap_or_default();
        for (name, keys) in elements::change(id, &record.members, members) {
            if let (Some(kind), true) = (kept.get(&name), now.contains_key(&name)) {
                delta.elements.insert(name, (kind.clone(), keys));
            }
        }
        reshaped
    }

    /// Makes and removes kernel sets so that they fit the record.
    fn reshape(&mut self, id: &SetId, record: Option<&IpSetRecord>, delta: &mut Delta) {
        let before = self.shapes.remove(id).map(|shape| shape.sets(id)).unwrap_or_default();
        let mut wanted = record.map(|record| elements::render(id, record)).unwrap_or_default();
        for (name, kind) in before {
            if wanted.remove(&name).is_none() {
                delta.elements.remove(&name);
                if delta.new.sets.remove(&name).is_none() {
                    delta.old.put_set(name, Set::new(kind));
                }
            }
        }
        for (name, set) in wanted {
            delta.new.put_set(name, set);
        }
        if let Some(record) = record {
            self.shapes.insert(id.clone(), Shape::of(record));
        }
    }

    /// Classes that have a policy which names the set, or that use the union.
    fn users(&self, id: &SetId, records: &Records) -> Vec<Class> {
        if merge::is_union(id) {
            return self
                .classes
                .iter()
                .filter(|(_, state)| state.unions.contains_key(id))
                .map(|(class, _)| class.clone())
                .collect();
        }
        let names_it = |key: &PolicyKey| records.policy(key).is_some_and(|policy| class::sets_of(policy).contains(id));
        self.classes.keys().filter(|class| class.policies().any(names_it)).cloned().collect()
    }

    fn reinput(&mut self, records: &Records, delta: &mut Delta, stale: &mut BTreeSet<Class>) {
        let inputs = Inputs::gather(&self.node, records);
        if inputs == self.inputs {
            return;
        }
        if inputs.log_prefix() != self.inputs.log_prefix() {
            stale.extend(self.classes.keys().cloned());
        }
        self.inputs = inputs;
        self.refamily(records, delta);
        self.fixed(delta);
    }

    /// IPv6 costs nothing where no pod can have such an address.
    fn refamily(&mut self, records: &Records, delta: &mut Delta) {
        let mut addresses = self.attached.values().flat_map(|pod| &pod.addresses);
        let v6 = self.inputs.has_ipv6() || addresses.any(IpAddr::is_ipv6);
        let families = if v6 { vec![Family::Ipv4, Family::Ipv6] } else { vec![Family::Ipv4] };
        if families != self.families {
            self.families = families;
            self.fixed(delta);
            let all = self.classes.keys().cloned().collect();
            self.classes(records, &all, delta);
            self.dispatch(delta);
        }
    }

    fn fixed(&mut self, delta: &mut Delta) {
        let fixed = self.inputs.render(&self.families);
        let is_base = |chain: &Chain| chain.base.is_some();
        let gone: Vec<ChainName> = (self.wanted.chains.iter())
            .filter(|(name, chain)| is_base(chain) && !fixed.chains.contains_key(*name))
            .map(|(name, _)| name.clone())
            .collect();
        let own: Vec<SetName> = self
            .wanted
            .sets
            .keys()
            .filter(|name| !self.is_dispatch(name) && !fixed.sets.contains_key(*name))
            .cloned()
            .collect();
        gone.into_iter().for_each(|name| self.put_chain(name, None, delta));
        own.into_iter().for_each(|name| self.put_set(name, None, delta));
        fixed.chains.into_iter().for_each(|(name, chain)| self.put_chain(name, Some(chain), delta));
        fixed.sets.into_iter().for_each(|(name, set)| self.put_set(name, Some(set), delta));
    }

    fn is_dispatch(&self, name: &SetName) -> bool {
        [names::SENDERS, names::RECEIVERS].contains(&name.as_str())
            || [Family::Ipv4, Family::Ipv6].iter().any(|family| base::pods(*family) == *name)
    }

    /// Endpoints that came, went or have other policies; returns whether any did.
    fn endpoints(&mut self, records: &Records, dirty: &Dirty, stale: &mut BTreeSet<Class>) -> bool {
        let changed =
            dirty.records.iter().filter_map(|id| if let RecordId::Endpoint(key) = id { Some(key) } else { None });
        let mut any = false;
        for key in changed {
            let new = match records.get(&RecordId::Endpoint(key.clone())) {
                Some(Record::Endpoint(record)) => {
                    Some([Direction::Ingress, Direction::Egress].map(|direction| Class::of(record, direction)))
                }
                _ => None,
            };
            if new.as_ref() == self.endpoints.get(key) {
                continue;
            }
            any = true;
            let old = match new.clone() {
                Some(classes) => self.endpoints.insert(key.clone(), classes),
                None => self.endpoints.remove(key),
            };
            stale.extend(old.into_iter().flatten().chain(new.into_iter().flatten()));
        }
        any
    }

    /// Compiles these classes anew, and removes those that no endpoint has any more.
    fn classes(&mut self, records: &Records, stale: &BTreeSet<Class>, delta: &mut Delta) {
        if stale.is_empty() {
            return;
        }
        let used: BTreeSet<&Class> = self.endpoints.values().flatten().collect();
        let (kept, gone): (Vec<&Class>, Vec<&Class>) = stale.iter().partition(|class| used.contains(class));
        let kept: Vec<Class> = kept.into_iter().cloned().collect();
        for class in gone.into_iter().cloned().collect::<Vec<_>>() {
            self.refused.remove(&Part::Class(class.clone()));
            let state = self.classes.remove(&class).unwrap_or_default();
            state.chains.into_iter().for_each(|name| self.put_chain(name, None, delta));
        }
        for class in kept {
            self.class(class, records, delta);
        }
    }

    fn class(&mut self, class: Class, records: &Records, delta: &mut Delta) {
        let role = |id: &SetId| match (self.shapes.get(id), set_of(records, id)) {
            (Some(Shape::Net { .. }), Some(record)) if record.members.len() <= UNION_PART => Role::Part,
            (Some(_), _) => Role::Alone,
            (None, _) => Role::Missing,
        };
        let plan = class.plan(&records, &role);
        let shape = |id: &SetId| match plan.unions.get(id) {
            Some(_) if self.refused.contains_key(&Part::Set(id.clone())) => None,
            Some(parts) => Some(Shape::union(parts.iter().filter_map(|part| self.shapes.get(part)))),
            None => self.shapes.get(id).copied(),
        };
        let mut chains = BTreeMap::new();
        for family in &self.families {
            if self.refused.contains_key(&Part::Class(class.clone())) {
                chains.extend(class.closed(*family));
                continue;
            }
            let context = Context { family: *family, shape: &shape, log_prefix: self.inputs.log_prefix() };
            chains.extend(class.compile(&plan, &context));
        }
        let Plan { unions, broken, .. } = plan;
        let state = ClassState { chains: chains.keys().cloned().collect(), broken, unions };
        let before = self.classes.get(&class).map(|state| state.chains.clone()).unwrap_or_default();
        for name in before.difference(&state.chains) {
            self.put_chain(name.clone(), None, delta);
        }
        self.classes.insert(class, state);
        chains.into_iter().for_each(|(name, chain)| self.put_chain(name, Some(chain), delta));
    }

    /// Makes the unions that classes use, and removes the others: once a call, at its end, as one that goes and comes back would keep its old members.
    fn unions(&mut self, records: &Records, delta: &mut Delta) {
        let wanted: Unions = self.classes.values().flat_map(|state| state.unions.clone()).collect();
        let gone: Vec<SetId> = self.unions.keys().filter(|id| !wanted.contains_key(*id)).cloned().collect();
        for id in gone {
            self.unions.remove(&id);
            self.refused.remove(&Part::Set(id.clone()));
            self.reshape(&id, None, delta);
        }
        for (id, parts) in wanted {
            if !self.unions.contains_key(&id) {
                let union = Union::new(parts, records);
                self.reshape(&id, Some(&union.record), delta);
                self.unions.insert(id, union);
            }
        }
    }

    /// Maps from interface to class, and the addresses that each interface may send from.
    fn dispatch(&mut self, delta: &mut Delta) {
        let mut maps = [Direction::Ingress, Direction::Egress].map(|_| Set::new(base::dispatch_kind()));
        let mut pods: BTreeMap<Family, Set> =
            self.families.iter().map(|family| (*family, Set::new(base::pods_kind(*family)))).collect();
        for (interface, pod) in &self.attached {
            let Some(interface) = IfName::new(interface) else { continue };
            for address in &pod.addresses {
                if let Some(set) = pods.get_mut(&elements::family(*address)) {
                    set.elements.insert(
                        Key::from([Field::from(interface), Field::from(crate::nft::Datum::from(*address))]),
                        Value::Member,
                    );
                }
            }
            let Some(classes) = self.endpoints.get(&pod.endpoint) else { continue };
            for (map, class) in maps.iter_mut().zip(classes) {
                for family in &self.families {
                    map.elements.insert(base::dispatch_key(*family, interface), Value::Verdict(class.entry(*family)));
                }
            }
        }
        let [receivers, senders] = maps;
        self.put_set(names::set(names::RECEIVERS), Some(receivers), delta);
        self.put_set(names::set(names::SENDERS), Some(senders), delta);
        for family in [Family::Ipv4, Family::Ipv6] {
            self.put_set(base::pods(family), pods.remove(&family), delta);
        }
    }

    fn put_chain(&mut self, name: ChainName, chain: Option<Chain>, delta: &mut Delta) {
        let old = match chain {
            Some(chain) if self.wanted.chains.get(&name).is_some_and(|old| **old == chain) => return,
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

    fn put_set(&mut self, name: SetName, set: Option<Set>, delta: &mut Delta) {
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

/// The set of this id.
fn set_of<'a>(records: &'a Records, id: &SetId) -> Option<&'a IpSetRecord> {
    match records.get(&RecordId::IpSet(id.clone())) {
        Some(Record::IpSet(record)) => Some(record),
        _ => None,
    }
}

/// The sets of the view.
fn sets(records: &Records) -> impl Iterator<Item = (&SetId, &IpSetRecord)> {
    records.iter().filter_map(|(id, record)| match (id, record) {
        (RecordId::IpSet(id), Record::IpSet(record)) => Some((id, record)),
        _ => None,
    })
}

/// Whether the fixed part depends on the record.
const fn is_input(id: &RecordId) -> bool {
    matches!(id, RecordId::Settings | RecordId::Pool(_) | RecordId::Node(_))
}

#[cfg(test)]
mod tests;
