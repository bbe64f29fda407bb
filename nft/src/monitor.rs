//! What others do to our table, as it happens.
//!
//! The kernel announces every commit in the namespace. Our own are filtered out before they wake anyone; those of
//! others are looked at only for our table's name.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use super::constants::*;
use super::exec::{ExecError, Generation, Socket};
use super::ruleset::TableName;
use super::transaction::Transaction;
use margay_netlink::wire::{NF_HEADER, attribute_str, attribute_u32, messages};
use margay_netlink::{Buffers, Membership, Protocol, Socket as NetlinkSocket};

/// Room for announcements not read yet: some ten thousand elements changed by others in one go. What does not fit is
/// reported as [`Event::Lost`].
const BUFFERS: Buffers = Buffers { send: None, receive: 4 << 20 };

/// A subscription to changes of one table by others.
///
/// Wait for its descriptor to become readable, then call [`Monitor::try_next`] until it returns `None`.
#[derive(Debug)]
pub struct Monitor {
    netlink: NetlinkSocket,
    table: TableName,
    touched: BTreeSet<Touched>,
}

/// Something that asks for the table to be read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody changed our table.
    Changed(Change),
    /// Announcements were lost; anything may have changed.
    Lost,
}

/// One commit of somebody else that touched our table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What it touched.
    pub touched: BTreeSet<Touched>,
    /// The generation it made.
    pub generation: Generation,
    /// Name of the process, as far as the kernel tells.
    pub process: String,
    /// Number of the process, seen from the namespace of processes that it is in.
    pub pid: u32,
}

/// A part of the table, by the name the kernel gave; foreign names need not be names that we would take.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Touched {
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
    /// An object of a kind that we never make.
    Other,
}

impl Monitor {
    /// Subscribes to changes of this table from now on, except those made through sockets with these ports.
    pub fn open(table: TableName, except: &[u32]) -> io::Result<Self> {
        let netlink = NetlinkSocket::open(Protocol::Netfilter, 0, BUFFERS)?;
        netlink.subscribe(NFNLGRP_NFTABLES, except)?;
        Ok(Self { netlink, table, touched: BTreeSet::new() })
    }

    /// A way to commit unnoticed by this monitor.
    pub fn silence(&self) -> io::Result<Silence> {
        Ok(Silence(self.netlink.membership(NFNLGRP_NFTABLES)?))
    }

    /// The next event, if there is one yet.
    pub fn try_next(&mut self) -> io::Result<Option<Event>> {
        loop {
            match self.netlink.try_receive() {
                Ok(Some(datagram)) => {
                    let change = read(datagram, &self.table, &mut self.touched);
                    if let Some(change) = change {
                        return Ok(Some(Event::Changed(change)));
                    }
                }
                Ok(None) => return Ok(None),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.touched.clear();
                    return Ok(Some(Event::Lost));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Commits while a [`Monitor`] does not listen. A kernel that has a listener makes a message for each element of a commit, all of them before it sends the
/// first, whatever the listener's filter drops (`nf_tables_setelem_notify`, `nft_commit_notify`), and each takes a page or two: of a hundred thousand
/// elements, 850 MB and nine tenths of the kernel's time.
#[derive(Debug)]
pub struct Silence(Membership);

impl Silence {
    /// As [`Socket::exec`]. True: others have committed too, and nobody was told what.
    pub fn exec(&self, socket: &mut Socket, transaction: &Transaction) -> Result<bool, ExecError> {
        let before = socket.generation().map_err(ExecError::Send)?;
        self.0.leave().map_err(ExecError::Send)?;
        let result = socket.exec(transaction);
        let heard = self.0.join();
        let made = result?;
        heard.map_err(ExecError::Unanswered)?;
        // What others commit from here on is heard of.
        let after = socket.generation().map_err(ExecError::Unanswered)?;
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

/// Notes what a datagram says about our table; the announcement of a generation ends a commit and comes alone.
fn read(datagram: &[u8], table: &TableName, touched: &mut BTreeSet<Touched>) -> Option<Change> {
    let mut change = None;
    for (header, body) in messages(datagram) {
        let attributes = body.get(NF_HEADER..).unwrap_or_default();
        let kind = header.kind & 0xff;
        if header.kind >> 8 != NFNL_SUBSYS_NFTABLES {
            continue;
        }
        if kind == NFT_MSG_NEWGEN && !touched.is_empty() {
            change = Some(Change {
                touched: std::mem::take(touched),
                generation: Generation(attribute_u32(attributes, NFTA_GEN_ID).unwrap_or_default()),
                process: attribute_str(attributes, NFTA_GEN_PROC_NAME).unwrap_or_default().to_owned(),
                pid: attribute_u32(attributes, NFTA_GEN_PROC_PID).unwrap_or_default(),
            });
        } else if body.first() == Some(&NFPROTO_INET)
            && attribute_str(attributes, NFTA_ANY_TABLE) == Some(table.as_str())
        {
            touched.insert(part(kind, attributes));
        }
    }
    change
}

fn part(kind: u16, attributes: &[u8]) -> Touched {
    let name = |attribute| attribute_str(attributes, attribute).unwrap_or_default().to_owned();
    match kind {
        NFT_MSG_NEWTABLE | NFT_MSG_DELTABLE => Touched::Table,
        NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN => Touched::Chain(name(NFTA_CHAIN_NAME)),
        NFT_MSG_NEWRULE | NFT_MSG_DELRULE => Touched::Rules(name(NFTA_RULE_CHAIN)),
        NFT_MSG_NEWSET | NFT_MSG_DELSET => Touched::Set(name(NFTA_SET_NAME)),
        NFT_MSG_NEWSETELEM | NFT_MSG_DELSETELEM => Touched::Elements(name(NFTA_SET_ELEM_LIST_SET)),
        _ => Touched::Other,
    }
}
