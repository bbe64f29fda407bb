//! Notifications of changes that other programs make to a table.
//!
//! The kernel notifies of every commit in the network namespace. A socket filter drops those of our
//! own sockets before they wake the reader; those of others are searched for the name of the table.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use crate::constants::*;
use crate::exec::{ExecError, Generation, NftSocket};
use crate::ruleset::TableName;
use crate::transaction::Transaction;
use margay_netlink::wire::{Message, NF_HEADER_LEN, attribute_str, attribute_u32, messages};
use margay_netlink::{Buffers, Membership, Protocol, Socket};

/// Room for unread notifications: some ten thousand elements changed in one commit. Overflow is
/// reported as [`MonitorEvent::Lost`].
const BUFFERS: Buffers = Buffers {
    send: None,
    receive: 4 << 20,
};

/// A subscription to changes of one table by other programs.
///
/// Wait until its file descriptor is readable, then call [`Monitor::try_next`] until it returns
/// `None`.
///
/// ```no_run
/// use margay_nft::{Monitor, NftSocket, TableName};
///
/// let socket = NftSocket::open()?;
/// let mut monitor = Monitor::open(TableName::new("example-1")?, &[socket.port()])?;
/// while let Some(event) = monitor.try_next()? {
///     println!("{event:?}");
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Monitor {
    netlink: Socket,
    table: TableName,
    changed: BTreeSet<ChangedObject>,
}

/// A reason to read the table back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MonitorEvent {
    /// Another program changed the table.
    Changed(ForeignCommit),
    /// Notifications were lost: anything may have changed.
    Lost,
}

/// A commit of another program that changed the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignCommit {
    /// The objects that it changed.
    pub changed: BTreeSet<ChangedObject>,
    /// The resulting generation.
    pub generation: Generation,
    /// Name of the process (`NFTA_GEN_PROC_NAME`), cut to 15 bytes by the kernel.
    pub process_name: String,
    /// Process ID in the initial PID namespace (`NFTA_GEN_PROC_PID`).
    pub pid: u32,
}

/// A changed object of the table. Names are plain strings, since other programs may use names that
/// this crate refuses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChangedObject {
    /// The table itself.
    Table,
    /// A chain.
    Chain(String),
    /// Rules of a chain.
    Rules(String),
    /// A set.
    Set(String),
    /// Elements of a set.
    Elements(String),
    /// An object of a kind that this crate does not support.
    Other,
}

impl Monitor {
    /// Subscribes to changes of a table, except those made through sockets with these ports
    /// ([`NftSocket::port`]).
    ///
    /// # Errors
    /// The kernel's, if it has no nfnetlink or the caller lacks CAP_NET_ADMIN.
    pub fn open(table: TableName, except: &[u32]) -> io::Result<Self> {
        let netlink = Socket::open(Protocol::Netfilter, 0, BUFFERS)?;
        netlink.subscribe(NFNLGRP_NFTABLES, except)?;
        Ok(Self {
            netlink,
            table,
            changed: BTreeSet::new(),
        })
    }

    /// A handle to commit while this monitor is paused, usable from another thread.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn pause(&self) -> io::Result<MonitorPause> {
        Ok(MonitorPause(self.netlink.membership(NFNLGRP_NFTABLES)?))
    }

    /// Reads the next event; `None` if there is none yet.
    ///
    /// # Errors
    /// The socket's.
    pub fn try_next(&mut self) -> io::Result<Option<MonitorEvent>> {
        loop {
            match self.netlink.try_receive() {
                Ok(Some(datagram)) => {
                    let change = collect(datagram, &self.table, &mut self.changed);
                    if let Some(change) = change {
                        return Ok(Some(MonitorEvent::Changed(change)));
                    }
                }
                Ok(None) => return Ok(None),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.changed.clear();
                    return Ok(Some(MonitorEvent::Lost));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Commits while a [`Monitor`] is paused, for transactions with many elements.
///
/// While the multicast group has a member, the kernel builds a notification for each element of a
/// commit, all of them before it sends the first, whatever the member's filter drops later
/// (`nf_tables_setelem_notify`, `nft_commit_notify`). Each takes a page or two: for a hundred
/// thousand elements, 850 MB and nine tenths of the time of the commit.
#[derive(Debug)]
pub struct MonitorPause(Membership);

impl MonitorPause {
    /// Like [`NftSocket::exec`]. Returns whether other programs committed meanwhile: the monitor
    /// has no event for that, so the table must be read back.
    ///
    /// # Errors
    /// As [`NftSocket::exec`].
    pub fn exec(
        &self,
        socket: &mut NftSocket,
        transaction: &Transaction,
    ) -> Result<bool, ExecError> {
        let before = socket.read_generation().map_err(ExecError::Send)?;
        self.0.leave().map_err(ExecError::Send)?;
        let result = socket.exec(transaction);
        let heard = self.0.join();
        let made = result?;
        heard.map_err(ExecError::Unanswered)?;
        // The generation is read after the monitor has rejoined: a commit before this read is seen
        // here, a commit after it by the monitor. Reading it earlier would leave a gap between the
        // two.
        let after = socket.read_generation().map_err(ExecError::Unanswered)?;
        Ok(made != Generation(before.0.wrapping_add(1)) || after != made)
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.netlink.as_raw_fd()
    }
}

/// Collects the changes to the table from a datagram. The notification of the new generation ends a
/// commit and comes in a datagram of its own.
fn collect(
    datagram: &[u8],
    table: &TableName,
    changed: &mut BTreeSet<ChangedObject>,
) -> Option<ForeignCommit> {
    let mut change = None;
    for Message { header, body, .. } in messages(datagram) {
        let attributes = body.get(NF_HEADER_LEN..).unwrap_or_default();
        let kind = header.kind & 0xff;
        if header.kind >> 8 != NFNL_SUBSYS_NFTABLES {
            continue;
        }
        if kind == NFT_MSG_NEWGEN && !changed.is_empty() {
            change = Some(ForeignCommit {
                changed: std::mem::take(changed),
                generation: Generation(attribute_u32(attributes, NFTA_GEN_ID).unwrap_or_default()),
                process_name: attribute_str(attributes, NFTA_GEN_PROC_NAME)
                    .unwrap_or_default()
                    .to_owned(),
                pid: attribute_u32(attributes, NFTA_GEN_PROC_PID).unwrap_or_default(),
            });
        } else if body.first() == Some(&NFPROTO_INET)
            && attribute_str(attributes, NFTA_ANY_TABLE) == Some(table.as_str())
        {
            changed.insert(changed_object(kind, attributes));
        }
    }
    change
}

fn changed_object(kind: u16, attributes: &[u8]) -> ChangedObject {
    let name = |attribute| {
        attribute_str(attributes, attribute)
            .unwrap_or_default()
            .to_owned()
    };
    match kind {
        NFT_MSG_NEWTABLE | NFT_MSG_DELTABLE => ChangedObject::Table,
        NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN => ChangedObject::Chain(name(NFTA_CHAIN_NAME)),
        NFT_MSG_NEWRULE | NFT_MSG_DELRULE => ChangedObject::Rules(name(NFTA_RULE_CHAIN)),
        NFT_MSG_NEWSET | NFT_MSG_DELSET => ChangedObject::Set(name(NFTA_SET_NAME)),
        NFT_MSG_NEWSETELEM | NFT_MSG_DELSETELEM => {
            ChangedObject::Elements(name(NFTA_SET_ELEM_LIST_SET))
        }
        _ => ChangedObject::Other,
    }
}
