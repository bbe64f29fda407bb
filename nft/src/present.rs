//! Our own table as it was read back, and how it differs from what we believe.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::exec::Generation;
use super::ruleset::{Base, ChainName, Ruleset, SetName, TableName};
use super::set::Set;

/// What is in the kernel under our table's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Present {
    /// Name of the table.
    pub table: TableName,
    /// Whether there is such a table.
    pub exists: bool,
    /// The generation that this is the state of.
    pub generation: Generation,
    /// Chains by name.
    pub chains: BTreeMap<ChainName, PresentChain>,
    /// Named sets by name.
    pub sets: BTreeMap<SetName, Arc<Set>>,
    /// What is there and cannot have come from us, in words. If there is any, only the whole table can be replaced.
    pub strange: Vec<String>,
}

/// A chain in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PresentChain {
    /// Where it is attached.
    pub base: Option<Base>,
    /// Fingerprints of its rules in order; `None` for a rule that carries none.
    pub rules: Vec<Option<u64>>,
}

/// A difference between what is in the kernel and what we believe is there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Drift {
    /// The table is gone.
    MissingTable,
    /// A chain is gone.
    MissingChain(ChainName),
    /// A chain is not ours.
    ForeignChain(ChainName),
    /// A chain is attached elsewhere, or has another policy.
    Attachment(ChainName),
    /// A chain's rules are not ours, or not in our order.
    Rules(ChainName),
    /// A set is gone.
    MissingSet(SetName),
    /// A set is not ours.
    ForeignSet(SetName),
    /// A set has another type.
    Kind(SetName),
    /// A set lacks elements, or has some that are not ours.
    Elements {
        /// The set.
        set: SetName,
        /// Number of elements missing.
        missing: usize,
        /// Number of elements that are not ours.
        foreign: usize,
    },
    /// Something that cannot have come from us.
    Strange(String),
}

impl Present {
    /// Every difference to what we believe; none exactly if [`Present::plan`] has nothing to do.
    pub fn drift(&self, believed: &Ruleset) -> Vec<Drift> {
        if !self.exists {
            return vec![Drift::MissingTable];
        }
        let mut drift: Vec<Drift> = self.strange.iter().cloned().map(Drift::Strange).collect();
        for (name, chain) in &believed.chains {
            match self.chains.get(name) {
                None => drift.push(Drift::MissingChain(name.clone())),
                Some(present) if present.base != chain.base => drift.push(Drift::Attachment(name.clone())),
                Some(present) => {
                    let ours = chain.rules.iter().map(|rule| Some(rule.fingerprint()));
                    if !ours.eq(present.rules.iter().copied()) {
                        drift.push(Drift::Rules(name.clone()));
                    }
                }
            }
        }
        let foreign = self.chains.keys().filter(|name| !believed.chains.contains_key(*name));
        drift.extend(foreign.cloned().map(Drift::ForeignChain));
        self.set_drift(believed, &mut drift);
        drift
    }

    fn set_drift(&self, believed: &Ruleset, drift: &mut Vec<Drift>) {
        for (name, set) in &believed.sets {
            match self.sets.get(name) {
                None => drift.push(Drift::MissingSet(name.clone())),
                Some(present) if present.kind != set.kind => drift.push(Drift::Kind(name.clone())),
                Some(present) => {
                    let (missing, foreign) = (set.count_beyond(present), present.count_beyond(set));
                    if missing + foreign > 0 {
                        drift.push(Drift::Elements { set: name.clone(), missing, foreign });
                    }
                }
            }
        }
        let foreign = self.sets.keys().filter(|name| !believed.sets.contains_key(*name));
        drift.extend(foreign.cloned().map(Drift::ForeignSet));
    }
}

impl Set {
    /// Number of elements that `other` has not, or not with the same value.
    fn count_beyond(&self, other: &Self) -> usize {
        self.elements.iter().filter(|(key, value)| other.elements.get(*key) != Some(*value)).count()
    }
}
