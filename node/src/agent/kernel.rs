//! What the owner needs of nftables, as a trait, so that it can be driven without a kernel.

use std::io;
use std::os::fd::AsFd;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::agent::{AgentHandle, Event};
use crate::net::addresses::Addresses;
use margay_nft::{ExecError, Monitor, Ruleset, Socket, TableName, Transaction};
use crate::policy::Links;

/// The table in the kernel.
pub trait Kernel: Send {
    /// Applies all of it or nothing.
    fn exec(&mut self, transaction: &Transaction) -> Result<(), ExecError>;
    /// Whether the table is there, from an earlier run.
    fn is_programmed(&mut self, table: &TableName) -> io::Result<bool>;
    /// Reads the table back: what leads from there to the wanted one. An error of kind `Interrupted`: others changed nftables meanwhile.
    fn plan(&mut self, wanted: &Ruleset) -> io::Result<Transaction>;
}

/// nftables of the network namespace of the thread that opened it.
pub struct Netfilter(Socket);

impl Netfilter {
    /// Opens the socket.
    pub fn open() -> io::Result<Self> {
        Socket::open().map(Self)
    }

    /// Subscribes to changes of the table by others.
    pub fn monitor(&self, table: TableName) -> io::Result<Monitor> {
        Monitor::open(table, &[self.0.port()])
    }
}

impl Kernel for Netfilter {
    fn exec(&mut self, transaction: &Transaction) -> Result<(), ExecError> {
        self.0.exec(transaction).map(|_| ())
    }

    fn is_programmed(&mut self, table: &TableName) -> io::Result<bool> {
        self.0.has(table)
    }

    fn plan(&mut self, wanted: &Ruleset) -> io::Result<Transaction> {
        Ok(self.0.list_once(&wanted.table)?.plan(wanted))
    }
}

/// Tells the agent of every change by others, from a thread that ends with the agent.
pub fn watch_drift(mut monitor: Monitor, agent: AgentHandle) -> io::Result<()> {
    // Its sender would keep the agent alive.
    let events = agent.events.downgrade();
    drop(agent);
    let work = move || loop {
        let mut descriptors = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)];
        if poll(&mut descriptors, PollTimeout::NONE).is_err_and(|errno| errno != nix::errno::Errno::EINTR) {
            return;
        }
        let mut changed = false;
        loop {
            match monitor.try_next() {
                Ok(Some(event)) => {
                    tracing::warn!(?event, "somebody changed our nftables table");
                    changed = true;
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "changes of our table by others are found by the periodic check only");
                    return;
                }
            }
        }
        let Some(events) = events.upgrade() else { return };
        if changed && events.blocking_send(Event::Drift).is_err() {
            return;
        }
    };
    thread::Builder::new().name("nft-monitor".to_owned()).spawn(work).map(|_| ())
}

/// Tells the agent of other addresses of the node, from a thread that ends with the agent. `known` is what it has been told. `look` sees what it is
/// told, also at first.
pub fn watch_links(
    mut addresses: Addresses,
    mut known: Links,
    agent: AgentHandle,
    look: impl Fn(&Links) + Send + 'static,
) -> io::Result<()> {
    look(&known);
    let events = agent.events.downgrade();
    drop(agent);
    let work = move || loop {
        let links = addresses.wait().and_then(|()| addresses.read());
        let links = match links {
            Ok(links) => links,
            Err(error) => {
                tracing::error!(%error, "host endpoints do not follow the node's addresses any more; restart the agent");
                return;
            }
        };
        let Some(events) = events.upgrade() else { return };
        if links == known {
            continue;
        }
        look(&links);
        known.clone_from(&links);
        if events.blocking_send(Event::Links(links)).is_err() {
            return;
        }
    };
    thread::Builder::new().name("addresses".to_owned()).spawn(work).map(|_| ())
}
