//! Our own table as the kernel has it: read back to adopt it after a restart, and to find what others did to it.
//!
//! Rules are not decoded. Each carries a fingerprint of what it means as its comment; a rule without one, or with
//! another, is not ours and its chain is written anew. Foreign tables are never read.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::constants::*;
use super::diff::diff_present;
use super::exec::{Generation, Socket};
use super::ruleset::{Base, ChainName, Ruleset, SetName, TableName};
use super::set::Set;
use super::transaction::Transaction;
use margay_netlink::wire::{Writer, attribute_str, attribute_u32};

mod decode;

use decode::SetReader;

/// Readings of a ruleset that changes meanwhile before giving up; others commit to their tables every few seconds
/// at most, a reading takes milliseconds.
const ATTEMPTS: usize = 10;

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
    /// The transaction that makes this the wanted table; it replaces the whole table if that holds something we
    /// cannot understand.
    pub fn plan(&self, wanted: &Ruleset) -> Transaction {
        if self.strange.is_empty() { diff_present(self, wanted) } else { Transaction::replace(wanted) }
    }

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

// --- Reading ---

fn changing() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "the ruleset kept changing while it was read")
}

impl Socket {
    /// Reads our table back, as of one generation. An error of kind `Interrupted`: it kept changing.
    pub fn list(&mut self, table: &TableName) -> io::Result<Present> {
        self.attempts(ATTEMPTS, |socket| socket.list_once(table))
    }

    /// Reads our table back, as of one generation, without trying again: reading a large one takes long.
    pub fn list_once(&mut self, table: &TableName) -> io::Result<Present> {
        let before = self.generation()?;
        let (present, interrupted) = match self.read(table, before) {
            // Something listed a moment ago is gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Err(changing()),
            read => read?,
        };
        if interrupted || self.generation()? != before { Err(changing()) } else { Ok(present) }
    }

    /// Whether there is such a table.
    pub fn has(&mut self, table: &TableName) -> io::Result<bool> {
        self.attempts(ATTEMPTS, |socket| {
            let (chains, sets, strange) = Default::default();
            let generation = Generation(0);
            let mut present = Present { table: table.clone(), exists: false, generation, chains, sets, strange };
            let interrupted = socket.read_table(&mut present)?;
            if interrupted && !present.exists { Err(changing()) } else { Ok(present.exists) }
        })
    }

    fn attempts<T>(&mut self, most: usize, read: impl Fn(&mut Self) -> io::Result<T>) -> io::Result<T> {
        for _ in 1..most {
            match read(self) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
        read(self)
    }

    fn read(&mut self, table: &TableName, generation: Generation) -> io::Result<(Present, bool)> {
        let (chains, sets, strange) = Default::default();
        let mut present = Present { table: table.clone(), exists: false, generation, chains, sets, strange };
        let mut interrupted = self.read_table(&mut present)?;
        if present.exists {
            interrupted |= self.read_chains(&mut present)?;
            interrupted |= self.read_rules(&mut present)?;
            interrupted |= self.read_sets(&mut present)?;
        }
        Ok((present, interrupted))
    }

    fn dump(&mut self, kind: u16, body: impl FnOnce(&mut Writer), mut each: impl FnMut(&[u8])) -> io::Result<bool> {
        self.request(kind, NLM_F_DUMP, body, |_, attributes| each(attributes))
    }

    fn read_table(&mut self, present: &mut Present) -> io::Result<bool> {
        self.dump(
            NFT_MSG_GETTABLE,
            |_| {},
            |attributes| {
                if attribute_str(attributes, NFTA_TABLE_NAME) == Some(present.table.as_str()) {
                    present.exists = true;
                    if attribute_u32(attributes, NFTA_TABLE_FLAGS).is_some_and(|flags| flags != 0) {
                        present.strange.push("the table has flags, as dormant".to_owned());
                    }
                }
            },
        )
    }

    fn read_chains(&mut self, present: &mut Present) -> io::Result<bool> {
        self.dump(
            NFT_MSG_GETCHAIN,
            |_| {},
            |attributes| {
                if attribute_str(attributes, NFTA_CHAIN_TABLE) != Some(present.table.as_str()) {
                    return;
                }
                match decode::chain(attributes) {
                    Ok((name, base)) => {
                        present.chains.insert(name, PresentChain { base, rules: Vec::new() });
                    }
                    Err(strange) => present.strange.push(strange),
                }
            },
        )
    }

    fn read_rules(&mut self, present: &mut Present) -> io::Result<bool> {
        let table = present.table.clone();
        self.dump(
            NFT_MSG_GETRULE,
            |w| w.put_str(NFTA_RULE_TABLE, table.as_str()),
            |attributes| {
                let chain = attribute_str(attributes, NFTA_RULE_CHAIN).unwrap_or_default();
                if let Some(chain) = present.chains.get_mut(chain) {
                    chain.rules.push(decode::fingerprint(attributes));
                }
            },
        )
    }

    fn read_sets(&mut self, present: &mut Present) -> io::Result<bool> {
        let table = present.table.clone();
        let mut readers = Vec::new();
        let mut interrupted = self.dump(
            NFT_MSG_GETSET,
            |w| w.put_str(NFTA_SET_TABLE, table.as_str()),
            |attributes| match SetReader::of(attributes) {
                Ok(Some(reader)) => readers.push(reader),
                Ok(None) => {}
                Err(strange) => present.strange.push(strange),
            },
        )?;
        for mut reader in readers {
            let name = reader.name().clone();
            let request = |w: &mut Writer| {
                w.put_str(NFTA_SET_ELEM_LIST_TABLE, table.as_str());
                w.put_str(NFTA_SET_ELEM_LIST_SET, name.as_str());
            };
            interrupted |= self.dump(NFT_MSG_GETSETELEM, request, |attributes| reader.read(attributes))?;
            match reader.finish() {
                Ok(set) => {
                    present.sets.insert(name, Arc::new(set));
                }
                Err(strange) => present.strange.push(strange),
            }
        }
        Ok(interrupted)
    }
}
