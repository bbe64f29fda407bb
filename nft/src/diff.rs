//! The difference between two rulesets: as few operations as possible, in an order that the kernel
//! accepts.
//!
//! Deletions come before additions, so one transaction can delete a set or chain and recreate it
//! under the same name. Packets never see an intermediate state.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::present::TableListing;
use crate::ruleset::{Base, Chain, ChainName, ChainPolicy, Ruleset, SetName};
use crate::set::Set;
use crate::transaction::{Transaction, TransactionOp};

/// The transaction from `present` to `wanted`; empty if they are equal.
///
/// Both must describe the same table, and the table must exist unless `present` is empty.
///
/// ```
/// use margay_nft::{Chain, ChainName, Rule, Ruleset, TableName, diff};
///
/// let empty = Ruleset::new(TableName::new("example-1")?);
/// let mut wanted = empty.clone();
/// wanted.put_chain(ChainName::new("chain-1")?, Chain::regular([Rule::new().counter().drop()]));
///
/// let transaction = diff(&empty, &wanted);
/// assert_eq!(
///     transaction.to_string(),
///     "create the table\ncreate chain chain-1\nadd 1 rule(s) to chain chain-1\n"
/// );
/// assert!(diff(&wanted, &wanted).is_empty());
/// # Ok::<(), margay_nft::NameError>(())
/// ```
pub fn diff(present: &Ruleset, wanted: &Ruleset) -> Transaction {
    let mut delta = Delta::default();
    let replaced = delta.diff_sets(&present.sets, &wanted.sets);
    let kept = |chain: &Arc<Chain>, wanted: &Arc<Chain>| {
        if Arc::ptr_eq(chain, wanted) {
            return wanted.rules.len();
        }
        common_prefix_len(&chain.rules, &wanted.rules, |old, new| old == new)
    };
    for (name, chain) in &present.chains {
        delta.diff_chain(
            name,
            chain.base,
            chain.rules.len(),
            wanted.chains.get(name),
            &replaced,
            |new| kept(chain, new),
        );
    }
    delta.add_new_chains(wanted, |name| present.chains.contains_key(name));
    delta.into_transaction(wanted, present.chains.is_empty() && present.sets.is_empty())
}

/// The transaction from a table read back from the kernel, whose rules are known by fingerprint
/// only.
fn diff_listing(present: &TableListing, wanted: &Ruleset) -> Transaction {
    let mut delta = Delta::default();
    let replaced = delta.diff_sets(&present.sets, &wanted.sets);
    for (name, chain) in &present.chains {
        let kept = |new: &Arc<Chain>| {
            common_prefix_len(&chain.rules, &new.rules, |old, new| {
                *old == Some(new.fingerprint())
            })
        };
        delta.diff_chain(
            name,
            chain.base,
            chain.rules.len(),
            wanted.chains.get(name),
            &replaced,
            kept,
        );
    }
    delta.add_new_chains(wanted, |name| present.chains.contains_key(name));
    delta.into_transaction(wanted, !present.exists)
}

impl TableListing {
    /// The transaction from this table to the wanted one. It replaces the whole table if that has
    /// anything unrecognised.
    pub fn diff(&self, wanted: &Ruleset) -> Transaction {
        if self.unrecognised.is_empty() {
            diff_listing(self, wanted)
        } else {
            Transaction::replace(wanted)
        }
    }
}

impl Transaction {
    /// Deletes the table if it exists and creates it as wanted, whatever it held before. Packets
    /// see either the old table or the new one.
    pub fn replace(wanted: &Ruleset) -> Self {
        let mut transaction = Self::new(wanted.table.clone());
        // The kernel refuses to delete a table that does not exist, so it is created first.
        transaction.push(TransactionOp::CreateTable);
        transaction.push(TransactionOp::DeleteTable);
        let empty = Ruleset::new(wanted.table.clone());
        transaction.append(diff(&empty, wanted));
        transaction
    }
}

/// Number of leading items that are equal.
fn common_prefix_len<A, B>(old: &[A], new: &[B], equal: impl Fn(&A, &B) -> bool) -> usize {
    old.iter()
        .zip(new)
        .take_while(|(old, new)| equal(old, new))
        .count()
}

/// Operations by kind, in the order in which they join the transaction. The kernel checks
/// references at each step: rules go before the sets and chains they refer to, and come after them.
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
    /// Compares the sets. Returns those to delete or recreate: the kernel refuses to delete a set
    /// while a rule refers to it, so chains that do must be flushed first.
    fn diff_sets(
        &mut self,
        present: &BTreeMap<SetName, Arc<Set>>,
        wanted: &BTreeMap<SetName, Arc<Set>>,
    ) -> BTreeSet<SetName> {
        let mut replaced = BTreeSet::new();
        for (name, old) in present {
            match wanted.get(name) {
                Some(new) if new.kind == old.kind => self.diff_elements(name, old, new),
                _ => {
                    self.deleted_sets.push(name.clone());
                    replaced.insert(name.clone());
                }
            }
        }
        let created = wanted
            .iter()
            .filter(|(name, _)| !present.contains_key(*name) || replaced.contains(*name));
        self.created_sets
            .extend(created.map(|(name, set)| (name.clone(), set.clone())));
        replaced
    }

    /// Compares the elements of two sets of the same kind. The kernel cannot update a value in
    /// place, so an element whose value changed is deleted and added.
    fn diff_elements(&mut self, name: &SetName, old: &Arc<Set>, new: &Arc<Set>) {
        if Arc::ptr_eq(old, new) {
            return;
        }
        let (gone, added) = diff_of_elements(old, new);
        if !gone.elements.is_empty() {
            self.deleted_elements.push((name.clone(), Arc::new(gone)));
        }
        if !added.elements.is_empty() {
            self.added_elements.push((name.clone(), Arc::new(added)));
        }
    }

    /// Compares a chain that exists with `count` rules; `kept` tells how many leading rules are
    /// already as wanted.
    fn diff_chain(
        &mut self,
        name: &ChainName,
        base: Option<Base>,
        count: usize,
        wanted: Option<&Arc<Chain>>,
        replaced: &BTreeSet<SetName>,
        kept: impl FnOnce(&Arc<Chain>) -> usize,
    ) {
        let Some(new) = wanted else {
            self.push_flush(name, count);
            return self.deleted_chains.push(name.clone());
        };
        if fixed_part(base) != fixed_part(new.base) {
            self.push_flush(name, count);
            self.deleted_chains.push(name.clone());
            self.put_chains.push((name.clone(), new.base));
            return self.push_append(name, new, 0);
        }
        if base != new.base {
            self.put_chains.push((name.clone(), new.base));
        }
        let kept = if new.refers_to(replaced) {
            0
        } else {
            kept(new)
        };
        if kept == count {
            self.push_append(name, new, kept);
        } else {
            self.push_flush(name, count);
            self.push_append(name, new, 0);
        }
    }

    fn add_new_chains(&mut self, wanted: &Ruleset, is_present: impl Fn(&ChainName) -> bool) {
        for (name, chain) in wanted.chains.iter().filter(|(name, _)| !is_present(name)) {
            self.put_chains.push((name.clone(), chain.base));
            self.push_append(name, chain, 0);
        }
    }

    fn push_flush(&mut self, name: &ChainName, count: usize) {
        if count > 0 {
            self.flushed.push(name.clone());
        }
    }

    fn push_append(&mut self, name: &ChainName, chain: &Arc<Chain>, from: usize) {
        if from < chain.rules.len() {
            self.appended.push((name.clone(), chain.clone(), from));
        }
    }

    fn into_transaction(self, wanted: &Ruleset, create_table: bool) -> Transaction {
        let mut transaction = Transaction::new(wanted.table.clone());
        if create_table {
            transaction.push(TransactionOp::CreateTable);
        }
        let created = self
            .created_sets
            .iter()
            .map(|(name, set)| TransactionOp::CreateSet(name.clone(), set.kind.clone()));
        let created: Vec<TransactionOp> = created.collect();
        let ops = (self.flushed.into_iter().map(TransactionOp::FlushChain))
            .chain(
                self.deleted_elements
                    .into_iter()
                    .map(|(name, set)| TransactionOp::DeleteElements(name, set)),
            )
            .chain(self.deleted_sets.into_iter().map(TransactionOp::DeleteSet))
            .chain(
                self.deleted_chains
                    .into_iter()
                    .map(TransactionOp::DeleteChain),
            )
            .chain(
                self.put_chains
                    .into_iter()
                    .map(|(name, base)| TransactionOp::PutChain(name, base)),
            )
            .chain(created);
        ops.for_each(|op| transaction.push(op));
        for (name, set) in self.created_sets.into_iter().chain(self.added_elements) {
            transaction.add_elements(&name, set);
        }
        for (name, chain, from) in self.appended {
            transaction.push(TransactionOp::AppendRules(name, chain, from));
        }
        transaction
    }
}

/// The part of a base chain that cannot change while it exists: everything but its policy.
fn fixed_part(base: Option<Base>) -> Option<Base> {
    base.map(|base| Base {
        policy: ChainPolicy::Accept,
        ..base
    })
}

/// The elements to delete from `old` and to add to it to get `new`, by walking both in key order.
fn diff_of_elements(old: &Set, new: &Set) -> (Set, Set) {
    let (mut gone, mut added) = (Set::new(old.kind.clone()), Set::new(new.kind.clone()));
    let mut present = old.elements.iter().peekable();
    let mut wanted = new.elements.iter().peekable();
    loop {
        let order = match (present.peek(), wanted.peek()) {
            (None, None) => return (gone, added),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((old, _)), Some((new, _))) => old.cmp(new),
        };
        let old = if order.is_le() { present.next() } else { None };
        let new = if order.is_ge() { wanted.next() } else { None };
        if old != new {
            gone.elements
                .extend(old.map(|(key, value)| (key.clone(), value.clone())));
            added
                .elements
                .extend(new.map(|(key, value)| (key.clone(), value.clone())));
        }
    }
}

impl Chain {
    /// Whether a rule does a lookup in one of these sets.
    fn refers_to(&self, sets: &BTreeSet<SetName>) -> bool {
        let lookups = self
            .rules
            .iter()
            .flat_map(|rule| &rule.statements)
            .filter_map(|statement| statement.lookup());
        !sets.is_empty()
            && lookups
                .into_iter()
                .filter_map(|(_, set)| set.name())
                .any(|name| sets.contains(name))
    }
}
