//! Reading a table back from the kernel: to adopt it after a restart, and to find what other
//! programs changed.
//!
//! Rules are not decoded. Each has its fingerprint as a comment; a rule without one, or with
//! another, is foreign, and its chain is rewritten. The contents of other tables are never used.

use std::io;
use std::sync::Arc;

use crate::constants::*;
use crate::exec::{Generation, NftSocket};
use crate::present::{ListedChain, TableListing};
use crate::ruleset::TableName;
use margay_netlink::wire::{Writer, attribute_str, attribute_u32};

mod decode;

use decode::SetReader;

/// Attempts to read a table before giving up because each was interrupted. Other programs usually
/// commit every few seconds at most, and reading takes milliseconds.
const ATTEMPTS: usize = 10;

fn interrupted_error() -> io::Error {
    io::Error::new(
        io::ErrorKind::Interrupted,
        "the ruleset kept changing while it was read",
    )
}

impl NftSocket {
    /// Reads a table, as of one generation.
    ///
    /// # Errors
    /// The socket's or the kernel's; of kind `Interrupted` if other programs kept committing while
    /// it was read.
    pub fn list(&mut self, table: &TableName) -> io::Result<TableListing> {
        self.retry(ATTEMPTS, |socket| socket.list_once(table))
    }

    /// Like [`NftSocket::list`], but does not retry when interrupted: reading a large table takes
    /// long.
    ///
    /// # Errors
    /// As [`NftSocket::list`].
    pub fn list_once(&mut self, table: &TableName) -> io::Result<TableListing> {
        let before = self.read_generation()?;
        let (present, interrupted) = match self.read(table, before) {
            // Another program deleted something that was listed a moment ago.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                return Err(interrupted_error());
            }
            read => read?,
        };
        // Each dump is consistent in itself, but a commit between two of them leaves no
        // `NLM_F_DUMP_INTR`: only the generation tells.
        if interrupted || self.read_generation()? != before {
            Err(interrupted_error())
        } else {
            Ok(present)
        }
    }

    /// Whether the table exists.
    ///
    /// # Errors
    /// As [`NftSocket::list`].
    pub fn table_exists(&mut self, table: &TableName) -> io::Result<bool> {
        self.retry(ATTEMPTS, |socket| {
            let (chains, sets, unrecognised) = Default::default();
            let generation = Generation(0);
            let mut present = TableListing {
                table: table.clone(),
                exists: false,
                generation,
                chains,
                sets,
                unrecognised,
            };
            let interrupted = socket.read_table(&mut present)?;
            if interrupted && !present.exists {
                Err(interrupted_error())
            } else {
                Ok(present.exists)
            }
        })
    }

    fn retry<T>(
        &mut self,
        attempts: usize,
        read: impl Fn(&mut Self) -> io::Result<T>,
    ) -> io::Result<T> {
        for _ in 1..attempts {
            match read(self) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
        read(self)
    }

    fn read(
        &mut self,
        table: &TableName,
        generation: Generation,
    ) -> io::Result<(TableListing, bool)> {
        let (chains, sets, unrecognised) = Default::default();
        let mut present = TableListing {
            table: table.clone(),
            exists: false,
            generation,
            chains,
            sets,
            unrecognised,
        };
        let mut interrupted = self.read_table(&mut present)?;
        if present.exists {
            interrupted |= self.read_chains(&mut present)?;
            interrupted |= self.read_rules(&mut present)?;
            interrupted |= self.read_sets(&mut present)?;
        }
        Ok((present, interrupted))
    }

    fn dump(
        &mut self,
        kind: u16,
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<bool> {
        self.request(kind, NLM_F_DUMP, body, |_, attributes| each(attributes))
    }

    fn read_table(&mut self, present: &mut TableListing) -> io::Result<bool> {
        self.dump(
            NFT_MSG_GETTABLE,
            |_| {},
            |attributes| {
                if attribute_str(attributes, NFTA_TABLE_NAME) == Some(present.table.as_str()) {
                    present.exists = true;
                    if attribute_u32(attributes, NFTA_TABLE_FLAGS).is_some_and(|flags| flags != 0) {
                        present
                            .unrecognised
                            .push("the table has flags such as dormant".to_owned());
                    }
                }
            },
        )
    }

    fn read_chains(&mut self, present: &mut TableListing) -> io::Result<bool> {
        self.dump(
            NFT_MSG_GETCHAIN,
            |_| {},
            |attributes| {
                if attribute_str(attributes, NFTA_CHAIN_TABLE) != Some(present.table.as_str()) {
                    return;
                }
                match decode::chain(attributes) {
                    Ok((name, base)) => {
                        present.chains.insert(
                            name,
                            ListedChain {
                                base,
                                rules: Vec::new(),
                            },
                        );
                    }
                    Err(unrecognised) => present.unrecognised.push(unrecognised),
                }
            },
        )
    }

    fn read_rules(&mut self, present: &mut TableListing) -> io::Result<bool> {
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

    fn read_sets(&mut self, present: &mut TableListing) -> io::Result<bool> {
        let table = present.table.clone();
        let mut readers = Vec::new();
        let mut interrupted = self.dump(
            NFT_MSG_GETSET,
            |w| w.put_str(NFTA_SET_TABLE, table.as_str()),
            |attributes| match SetReader::of(attributes) {
                Ok(Some(reader)) => readers.push(reader),
                Ok(None) => {}
                Err(unrecognised) => present.unrecognised.push(unrecognised),
            },
        )?;
        for mut reader in readers {
            let name = reader.name().clone();
            let request = |w: &mut Writer| {
                w.put_str(NFTA_SET_ELEM_LIST_TABLE, table.as_str());
                w.put_str(NFTA_SET_ELEM_LIST_SET, name.as_str());
            };
            interrupted |= self.dump(NFT_MSG_GETSETELEM, request, |attributes| {
                reader.read(attributes)
            })?;
            match reader.finish() {
                Ok(set) => {
                    present.sets.insert(name, Arc::new(set));
                }
                Err(unrecognised) => present.unrecognised.push(unrecognised),
            }
        }
        Ok(interrupted)
    }
}
