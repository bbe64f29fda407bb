//! What leads from one ruleset to another: as few operations as possible, in an order the kernel accepts.
//!
//! Everything that goes away goes first and everything new comes after, so that a set or chain may be made anew under
//! its old name within one transaction. Packets see none of the steps between.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::present::Present;
use super::ruleset::{Base, Chain, ChainName, Ruleset, SetName};
use super::set::Set;
use super::transaction::{Op, Transaction};

/// The transaction from `present` to `wanted`; empty if they are equal. Both must be about the same table, and the
/// table must exist unless `present` is empty.
pub fn diff(present: &Ruleset, wanted: &Ruleset) -> Transaction {
    let mut delta = Delta::default();
    let replaced = delta.sets(&present.sets, &wanted.sets);
    let known = |chain: &Arc<Chain>, wanted: &Arc<Chain>| {
        if Arc::ptr_eq(chain, wanted) {
            return wanted.rules.len();
        }
        common_start(&chain.rules, &wanted.rules, |old, new| old == new)
    };
    for (name, chain) in &present.chains {
        delta.old_chain(name, chain.base, chain.rules.len(), wanted.chains.get(name), &replaced, |new| {
            known(chain, new)
        });
    }
    delta.new_chains(wanted, |name| present.chains.contains_key(name));
    delta.into_transaction(wanted, present.chains.is_empty() && present.sets.is_empty())
}

/// The same from what was read back from the kernel, where rules are known by their fingerprints.
fn diff_present(present: &Present, wanted: &Ruleset) -> Transaction {
    let mut delta = Delta::default();
    let replaced = delta.sets(&present.sets, &wanted.sets);
    for (name, chain) in &present.chains {
        let known =
            |new: &Arc<Chain>| common_start(&chain.rules, &new.rules, |old, new| *old == Some(new.fingerprint()));
        delta.old_chain(name, chain.base, chain.rules.len(), wanted.chains.get(name), &replaced, known);
    }
    delta.new_chains(wanted, |name| present.chains.contains_key(name));
    delta.into_transaction(wanted, !present.exists)
}

impl Present {
    /// The transaction that makes this the wanted table; it replaces the whole table if that holds something we
    /// cannot understand.
    pub fn plan(&self, wanted: &Ruleset) -> Transaction {
        if self.strange.is_empty() { diff_present(self, wanted) } else { Transaction::replace(wanted) }
    }
}

impl Transaction {
    /// Removes the table, if there is one, and makes it anew as wanted: for a table that cannot be understood.
    /// Packets meet either the old or the new table.
    pub fn replace(wanted: &Ruleset) -> Self {
        let mut transaction = Self::new(wanted.table.clone());
        transaction.push(Op::CreateTable);
        transaction.push(Op::DeleteTable);
        let empty = Ruleset::new(wanted.table.clone());
        transaction.append(diff(&empty, wanted));
        transaction
    }
}

/// How many items at the start are equal.
fn common_start<A, B>(old: &[A], new: &[B], equal: impl Fn(&A, &B) -> bool) -> usize {
    old.iter().zip(new).take_while(|(old, new)| equal(old, new)).count()
}

/// Operations by kind, in the order in which they become a transaction.
#[derive(Default)]
struct Delta {
    flushed: Vec<ChainName>,
    deleted_elements: Vec<(SetName, Arc<Set>)>,
    deleted_sets: Vec<SetName>,
    deleted_chains: Vec<ChainName>,
    put_chains: Vec<(ChainName, Option<Base>)>,
    created_sets: Vec<(SetName, Arc<Set>)>,
    added_elements: Vec<(SetName, Arc<Set>)>,
    appended: Vec<(ChainName, Arc<Chain>, usize)>,
}

impl Delta {
    /// Compares the sets; returns those deleted or made anew, which no rule may refer to meanwhile.
    fn sets(
        &mut self,
        present: &BTreeMap<SetName, Arc<Set>>,
        wanted: &BTreeMap<SetName, Arc<Set>>,
    ) -> BTreeSet<SetName> {
        let mut replaced = BTreeSet::new();
        for (name, old) in present {
            match wanted.get(name) {
                Some(new) if new.kind == old.kind => self.elements(name, old, new),
                _ => {
                    self.deleted_sets.push(name.clone());
                    replaced.insert(name.clone());
                }
            }
        }
        let created = wanted.iter().filter(|(name, _)| !present.contains_key(*name) || replaced.contains(*name));
        self.created_sets.extend(created.map(|(name, set)| (name.clone(), set.clone())));
        replaced
    }

    /// Compares the elements of two sets of one kind. A changed value is removed and added.
    fn elements(&mut self, name: &SetName, old: &Arc<Set>, new: &Arc<Set>) {
        if Arc::ptr_eq(old, new) {
            return;
        }
        let (gone, added) = element_changes(old, new);
        if !gone.elements.is_empty() {
            self.deleted_elements.push((name.clone(), Arc::new(gone)));
        }
        if !added.elements.is_empty() {
            self.added_elements.push((name.clone(), Arc::new(added)));
        }
    }

    /// Decides about a chain that is there with `count` rules; `known` tells how many of them may stay at the start.
    fn old_chain(
        &mut self,
        name: &ChainName,
        base: Option<Base>,
        count: usize,
        wanted: Option<&Arc<Chain>>,
        replaced: &BTreeSet<SetName>,
        known: impl FnOnce(&Arc<Chain>) -> usize,
    ) {
        let Some(new) = wanted else {
            self.flush(name, count);
            return self.deleted_chains.push(name.clone());
        };
        if attachment(base) != attachment(new.base) {
            self.flush(name, count);
            self.deleted_chains.push(name.clone());
            self.put_chains.push((name.clone(), new.base));
            return self.append(name, new, 0);
        }
        if base != new.base {
            self.put_chains.push((name.clone(), new.base));
        }
        let kept = if new.refers_to(replaced) { 0 } else { known(new) };
        if kept == count {
            self.append(name, new, kept);
        } else {
            self.flush(name, count);
            self.append(name, new, 0);
        }
    }

    fn new_chains(&mut self, wanted: &Ruleset, is_present: impl Fn(&ChainName) -> bool) {
        for (name, chain) in wanted.chains.iter().filter(|(name, _)| !is_present(name)) {
            self.put_chains.push((name.clone(), chain.base));
            self.append(name, chain, 0);
        }
    }

    fn flush(&mut self, name: &ChainName, count: usize) {
        if count > 0 {
            self.flushed.push(name.clone());
        }
    }

    fn append(&mut self, name: &ChainName, chain: &Arc<Chain>, from: usize) {
        if from < chain.rules.len() {
            self.appended.push((name.clone(), chain.clone(), from));
        }
    }

    fn into_transaction(self, wanted: &Ruleset, create_table: bool) -> Transaction {
        let mut transaction = Transaction::new(wanted.table.clone());
        if create_table {
            transaction.push(Op::CreateTable);
        }
        let created = self.created_sets.iter().map(|(name, set)| Op::CreateSet(name.clone(), set.kind.clone()));
        let created: Vec<Op> = created.collect();
        let ops = (self.flushed.into_iter().map(Op::FlushChain))
            .chain(self.deleted_elements.into_iter().map(|(name, set)| Op::DeleteElements(name, set)))
            .chain(self.deleted_sets.into_iter().map(Op::DeleteSet))
            .chain(self.deleted_chains.into_iter().map(Op::DeleteChain))
            .chain(self.put_chains.into_iter().map(|(name, base)| Op::PutChain(name, base)))
            .chain(created);
        ops.for_each(|op| transaction.push(op));
        for (name, set) in self.created_sets.into_iter().chain(self.added_elements) {
            transaction.add_elements(&name, set);
        }
        for (name, chain, from) in self.appended {
            transaction.push(Op::AppendRules(name, chain, from));
        }
        transaction
    }
}

/// What cannot change while a chain exists; its policy can.
fn attachment(base: Option<Base>) -> Option<Base> {
    base.map(|base| Base { policy: super::ruleset::Policy::Accept, ..base })
}

/// Elements to remove from `old` and to add to it to make `new`; one walk along both.
fn element_changes(old: &Set, new: &Set) -> (Set, Set) {
    let (mut gone, mut added) = (Set::new(old.kind.clone()), Set::new(new.kind.clone()));
    let mut olds = old.elements.iter().peekable();
    let mut news = new.elements.iter().peekable();
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => return (gone, added),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((old, _)), Some((new, _))) => old.cmp(new),
        };
        let old = if order.is_le() { olds.next() } else { None };
        let new = if order.is_ge() { news.next() } else { None };
        if old != new {
            gone.elements.extend(old.map(|(key, value)| (key.clone(), value.clone())));
            added.elements.extend(new.map(|(key, value)| (key.clone(), value.clone())));
        }
    }
}

impl Chain {
    /// Whether a rule looks into one of these sets.
    fn refers_to(&self, sets: &BTreeSet<SetName>) -> bool {
        let lookups = self.rules.iter().flat_map(|rule| &rule.statements).filter_map(|statement| statement.lookup());
        !sets.is_empty() && lookups.into_iter().filter_map(|(_, set)| set.name()).any(|name| sets.contains(name))
    }
}
