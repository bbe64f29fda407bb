//! A table as it was read back, and its drift from the expected ruleset.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::exec::Generation;
use crate::ruleset::{Base, ChainName, Ruleset, SetName, TableName};
use crate::set::Set;

/// A table as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableListing {
    /// Name of the table.
    pub table: TableName,
    /// Whether the table exists.
    pub exists: bool,
    /// The generation that was read.
    pub generation: Generation,
    /// Chains by name.
    pub chains: BTreeMap<ChainName, ListedChain>,
    /// Named sets by name.
    pub sets: BTreeMap<SetName, Arc<Set>>,
    /// Descriptions of what this crate never writes and cannot decode. If there is any, only
    /// replacing the whole table repairs it.
    pub unrecognised: Vec<String>,
}

/// A chain in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListedChain {
    /// Its hook, if it is a base chain.
    pub base: Option<Base>,
    /// Fingerprints of its rules, in order; `None` for a rule that has none.
    pub rules: Vec<Option<u64>>,
}

/// A difference between the table in the kernel and the expected ruleset.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Drift {
    /// The table does not exist.
    MissingTable,
    /// A chain is missing.
    MissingChain(ChainName),
    /// A chain is not in the ruleset.
    ForeignChain(ChainName),
    /// A chain has another type, hook, priority or policy.
    BaseChain(ChainName),
    /// A chain has other rules, or has them in another order.
    Rules(ChainName),
    /// A set is missing.
    MissingSet(SetName),
    /// A set is not in the ruleset.
    ForeignSet(SetName),
    /// A set has another kind.
    SetKind(SetName),
    /// A set has other elements.
    Elements {
        /// The set.
        set: SetName,
        /// Number of missing elements.
        missing: usize,
        /// Number of elements that are not in the ruleset.
        foreign: usize,
    },
    /// Something that this crate never writes and cannot decode.
    Unrecognised(String),
}

impl TableListing {
    /// All differences from the expected ruleset; none if and only if [`TableListing::diff`] is
    /// empty.
    pub fn drift(&self, expected: &Ruleset) -> Vec<Drift> {
        if !self.exists {
            return vec![Drift::MissingTable];
        }
        let mut drift: Vec<Drift> = self
            .unrecognised
            .iter()
            .cloned()
            .map(Drift::Unrecognised)
            .collect();
        for (name, chain) in &expected.chains {
            match self.chains.get(name) {
                None => drift.push(Drift::MissingChain(name.clone())),
                Some(present) if present.base != chain.base => {
                    drift.push(Drift::BaseChain(name.clone()))
                }
                Some(present) => {
                    let ours = chain.rules.iter().map(|rule| Some(rule.fingerprint()));
                    if !ours.eq(present.rules.iter().copied()) {
                        drift.push(Drift::Rules(name.clone()));
                    }
                }
            }
        }
        let foreign = self
            .chains
            .keys()
            .filter(|name| !expected.chains.contains_key(*name));
        drift.extend(foreign.cloned().map(Drift::ForeignChain));
        self.add_set_drift(expected, &mut drift);
        drift
    }

    fn add_set_drift(&self, expected: &Ruleset, drift: &mut Vec<Drift>) {
        for (name, set) in &expected.sets {
            match self.sets.get(name) {
                None => drift.push(Drift::MissingSet(name.clone())),
                Some(present) if present.kind != set.kind => {
                    drift.push(Drift::SetKind(name.clone()))
                }
                Some(present) => {
                    let (missing, foreign) = (
                        set.count_missing_from(present),
                        present.count_missing_from(set),
                    );
                    if missing + foreign > 0 {
                        drift.push(Drift::Elements {
                            set: name.clone(),
                            missing,
                            foreign,
                        });
                    }
                }
            }
        }
        let foreign = self
            .sets
            .keys()
            .filter(|name| !expected.sets.contains_key(*name));
        drift.extend(foreign.cloned().map(Drift::ForeignSet));
    }
}

impl Set {
    /// Number of elements that `other` lacks or has with another value.
    fn count_missing_from(&self, other: &Self) -> usize {
        self.elements
            .iter()
            .filter(|(key, value)| other.elements.get(*key) != Some(*value))
            .count()
    }
}
