//! Access to nftables as a trait, so that the dataplane can be tested without a kernel.

use std::io;
use std::os::fd::AsFd;

use margay_nft::{ExecError, Monitor, MonitorPause, NftSocket, Ruleset, TableName, Transaction};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::names;

/// Our table in the kernel.
pub trait Kernel: Send {
    /// Commits the transaction, all of it or nothing. True: another program changed nftables
    /// meanwhile without a notification.
    fn exec(&mut self, transaction: &Transaction) -> Result<bool, ExecError>;
    /// Whether the table of an earlier run exists.
    fn is_programmed(&mut self, table: &TableName) -> io::Result<bool>;
    /// Reads the table and returns the difference to the wanted one. An error of kind
    /// `Interrupted`: another program changed nftables meanwhile.
    fn read_diff(&mut self, wanted: &Ruleset) -> io::Result<Transaction>;
}

/// Transactions with more elements than this are committed while our monitor is paused: the kernel
/// builds a notification for each element before it sends the first.
const UNMONITORED: usize = 4096;

/// nftables in the network namespace of the thread that opened it.
pub struct Netfilter {
    socket: NftSocket,
    pause: Option<MonitorPause>,
}

impl Netfilter {
    /// Opens a netlink socket.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            socket: NftSocket::open()?,
            pause: None,
        })
    }

    /// Removes our table, if there is one.
    pub fn remove_table(&mut self) -> Result<(), ExecError> {
        self.socket
            .exec(&Transaction::remove(names::table()))
            .map(drop)
    }

    /// Subscribes to changes of our table by other programs.
    pub fn watch(&mut self) -> io::Result<TableWatch> {
        let monitor = Monitor::open(names::table(), &[self.socket.port()])?;
        self.pause = Some(monitor.pause()?);
        Ok(TableWatch(monitor))
    }
}

impl Kernel for Netfilter {
    fn exec(&mut self, transaction: &Transaction) -> Result<bool, ExecError> {
        match &self.pause {
            Some(pause) if transaction.element_count() > UNMONITORED => {
                pause.exec(&mut self.socket, transaction)
            }
            _ => self.socket.exec(transaction).map(|_| false),
        }
    }

    fn is_programmed(&mut self, table: &TableName) -> io::Result<bool> {
        self.socket.table_exists(table)
    }

    fn read_diff(&mut self, wanted: &Ruleset) -> io::Result<Transaction> {
        Ok(self.socket.list_once(&wanted.table)?.diff(wanted))
    }
}

/// Subscription to changes of our table by other programs.
pub struct TableWatch(Monitor);

impl TableWatch {
    /// Blocks until another program changes the table.
    pub fn wait(&mut self) -> io::Result<()> {
        loop {
            match poll(
                &mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)],
                PollTimeout::NONE,
            ) {
                Err(errno) if errno != Errno::EINTR => return Err(errno.into()),
                _ => {}
            }
            let mut is_changed = false;
            while let Some(event) = self.0.try_next()? {
                tracing::warn!(?event, "another program changed our nftables table");
                is_changed = true;
            }
            if is_changed {
                return Ok(());
            }
        }
    }
}
