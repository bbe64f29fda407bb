//! Collects the changes of one compiler call.

use std::collections::{BTreeMap, BTreeSet};

use crate::nftables::names;
use margay_nft::{ChainName, Key, Ruleset, Set, SetKind, SetName, Transaction, diff};

/// Replaced chains and sets with their old and new values.
pub(super) struct TableDelta {
    pub(super) old: Ruleset,
    pub(super) new: Ruleset,
    /// Chains whose old value is recorded, or that had none.
    pub(super) chains: BTreeSet<ChainName>,
    pub(super) sets: BTreeSet<SetName>,
    /// Elements added (`true`) and removed in kernel sets of the view that stay.
    pub(super) elements: BTreeMap<SetName, (SetKind, BTreeMap<Key, bool>)>,
}

impl TableDelta {
    pub(super) fn new() -> Self {
        let empty = || Ruleset::new(names::table());
        Self {
            old: empty(),
            new: empty(),
            chains: BTreeSet::new(),
            sets: BTreeSet::new(),
            elements: BTreeMap::new(),
        }
    }

    pub(super) fn into_transaction(self) -> Transaction {
        let is_empty = |ruleset: &Ruleset| ruleset.chains.is_empty() && ruleset.sets.is_empty();
        let mut transaction = if is_empty(&self.old) && is_empty(&self.new) {
            Transaction::new(names::table())
        } else {
            diff(&self.old, &self.new)
        };
        for (name, (kind, keys)) in self.elements {
            let (added, removed): (Vec<_>, Vec<_>) =
                keys.into_iter().partition(|(_, wanted)| *wanted);
            let set = |keys: Vec<(Key, bool)>| {
                Set::members(kind.clone(), keys.into_iter().map(|(key, _)| key))
            };
            transaction.delete_elements(&name, set(removed));
            transaction.add_elements(&name, set(added));
        }
        transaction
    }
}
