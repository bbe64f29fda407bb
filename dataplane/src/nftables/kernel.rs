//! What is needed of nftables, as a trait, so that the dataplane can be driven without a kernel.

use std::io;
use std::os::fd::AsFd;

use margay_nft::{ExecError, Monitor, MonitorPause, NftSocket, Ruleset, TableName, Transaction};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::names;

/// The table in the kernel.
pub trait Kernel: Send {
    /// Applies all of it or nothing. True: others have changed nftables meanwhile, and no notification tells what.
    fn exec(&mut self, transaction: &Transaction) -> Result<bool, ExecError>;
    /// Whether the table is there, from an earlier run.
    fn is_programmed(&mut self, table: &TableName) -> io::Result<bool>;
    /// Reads the table back: what leads from there to the wanted one. An error of kind `Interrupted`: others changed
    /// nftables meanwhile.
    fn plan(&mut self, wanted: &Ruleset) -> io::Result<Transaction>;
}

/// Transactions with more elements than this are committed while the monitor is paused.
const UNMONITORED: usize = 4096;

/// nftables of the network namespace of the thread that opened it.
pub struct Netfilter {
    socket: NftSocket,
    pause: Option<MonitorPause>,
}

impl Netfilter {
    /// Opens the socket.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: NftSocket::open()?, pause: None })
    }

    /// Subscribes to changes of our table by others.
    pub fn watch(&mut self) -> io::Result<Watch> {
        let monitor = Monitor::open(names::table(), &[self.socket.port()])?;
        self.pause = Some(monitor.pause()?);
        Ok(Watch(monitor))
    }
}

impl Kernel for Netfilter {
    fn exec(&mut self, transaction: &Transaction) -> Result<bool, ExecError> {
        match &self.pause {
            Some(pause) if transaction.element_count() > UNMONITORED => pause.exec(&mut self.socket, transaction),
            _ => self.socket.exec(transaction).map(|_| false),
        }
    }

    fn is_programmed(&mut self, table: &TableName) -> io::Result<bool> {
        self.socket.table_exists(table)
    }

    fn plan(&mut self, wanted: &Ruleset) -> io::Result<Transaction> {
        Ok(self.socket.list_once(&wanted.table)?.diff(wanted))
    }
}

/// A subscription to changes of our table by others.
pub struct Watch(Monitor);

impl Watch {
    /// Blocks until somebody has changed the table.
    pub fn wait(&mut self) -> io::Result<()> {
        loop {
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                Err(errno) if errno != Errno::EINTR => return Err(errno.into()),
                _ => {}
            }
            let mut is_changed = false;
            while let Some(event) = self.0.try_next()? {
                tracing::warn!(?event, "somebody changed our nftables table");
                is_changed = true;
            }
            if is_changed {
                return Ok(());
            }
        }
    }
}
