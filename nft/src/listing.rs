//! Our own table as the kernel has it: read back to adopt it after a restart, and to find what others did to it.
//!
//! Rules are not decoded. Each carries a fingerprint of what it means as its comment; a rule without one, or with
//! another, is not ours and its chain is written anew. Foreign tables are never read.

use std::io;
use std::sync::Arc;

use super::constants::*;
use super::exec::{Generation, Socket};
use super::present::{Present, PresentChain};
use super::ruleset::TableName;
use margay_netlink::wire::{Writer, attribute_str, attribute_u32};

mod decode;

use decode::SetReader;

/// Readings of a ruleset that changes meanwhile before giving up; others commit to their tables every few seconds
/// at most, a reading takes milliseconds.
const ATTEMPTS: usize = 10;

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
