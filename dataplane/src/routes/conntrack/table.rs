//! The kernel's table of conversations, in the network namespace of the thread that opened it.

use std::collections::BTreeSet;
use std::io;

use margay_api::rule::IpVersion;
use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR};
use nix::errno::Errno;

use super::message::{self, Entry, Place, Subject};
use margay_netlink::wire::{Message, messages, u32_ne};
use margay_netlink::{Buffers, Protocol, Socket};

/// Requests are small; room for a part of a list.
const BUFFERS: Buffers = Buffers { send: Some(64 << 10), receive: 1 << 20 };

/// Why entries could not be deleted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The kernel refused it.
    #[error("{what}: {errno}; does the kernel have nf_conntrack_netlink?")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// Why it was refused.
        errno: Errno,
    },
    /// The list changed while it was read, each time.
    #[error("the table of connections changed its size whenever it was read")]
    Interrupted,
    /// The socket failed, or gave no answer.
    #[error("ctnetlink: {0}")]
    Socket(String),
}

impl From<io::Error> for TableError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error.to_string())
    }
}

/// What is asked of the table.
pub trait Table: Send + 'static {
    /// Deletes whatever has the address in that place. False: this kernel cannot be asked that.
    fn flush(&mut self, subject: Subject, place: Place) -> Result<bool, TableError>;
    /// The entries of an IP version that have one of the addresses in any place.
    fn find(&mut self, version: IpVersion, subjects: &BTreeSet<Subject>) -> Result<Vec<Entry>, TableError>;
    /// Deletes an entry; one that is gone is a success.
    fn delete(&mut self, entry: &Entry) -> Result<(), TableError>;
}

/// The real one.
pub struct Kernel {
    socket: Socket,
    sequence: u32,
}

impl Kernel {
    /// Opens a socket in the calling thread's network namespace; needs CAP_NET_ADMIN.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: Socket::open(Protocol::Netfilter, 0, BUFFERS)?, sequence: 0 })
    }

    /// Sends a request and hands the body of each answer to `each`; returns the kernel's error number, 0 for none, and whether the list was
    /// changed while it was read.
    fn ask(&mut self, request: impl FnOnce(u32) -> Vec<u8>, mut each: impl FnMut(&[u8])) -> io::Result<(i32, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        self.socket.send(&request(sequence))?;
        let mut interrupted = false;
        // The kernel works within the calls: nothing has to be waited for.
        while let Some(datagram) = self.socket.try_receive()? {
            let replies = messages(datagram).filter(|message| message.header.sequence == sequence);
            for Message { header, body, .. } in replies {
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match header.kind {
                    NLMSG_DONE => return Ok((0, interrupted)),
                    NLMSG_ERROR => {
                        let errno = u32_ne(body, 0).map_or(libc::EPROTO, |number| -(number as i32));
                        return Ok((errno, interrupted));
                    }
                    _ => each(body),
                }
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

impl Kernel {
    /// Reads the list, and keeps nothing of it.
    pub fn list(&mut self) -> io::Result<()> {
        match self.ask(|sequence| message::list(IpVersion::V4, sequence), |_| {})? {
            (0, _) => Ok(()),
            (errno, _) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Whether the namespace has no entry at all: a list walks over the rows of all namespaces.
    fn is_empty(&mut self) -> Result<bool, TableError> {
        let mut count = None;
        let (errno, _) = self.ask(message::count, |body| count = message::count_of(body))?;
        Ok(errno == 0 && count == Some(0))
    }
}

/// Reads of a list that others change before it is given up.
const READS: u32 = 5;

impl Table for Kernel {
    fn flush(&mut self, subject: Subject, place: Place) -> Result<bool, TableError> {
        if subject.version() == IpVersion::V6 {
            // It would delete those of everybody else.
            return Ok(false);
        }
        let (errno, _) = self.ask(|sequence| message::flush(subject, place, sequence), |_| {})?;
        match Errno::from_raw(errno) {
            _ if errno == 0 => Ok(true),
            // What comes then names what is wrong, if that is not it.
            Errno::EINVAL | Errno::EOPNOTSUPP => Ok(false),
            errno => Err(TableError::Refused { what: "delete the entries of an address", errno }),
        }
    }

    fn find(&mut self, version: IpVersion, subjects: &BTreeSet<Subject>) -> Result<Vec<Entry>, TableError> {
        if self.is_empty()? {
            return Ok(Vec::new());
        }
        for _ in 0..READS {
            let mut found = Vec::new();
            let read = |body: &[u8]| found.extend(message::entry_of(version, body, subjects));
            let (errno, interrupted) = self.ask(|sequence| message::list(version, sequence), read)?;
            if errno != 0 {
                return Err(TableError::Refused { what: "list connections", errno: Errno::from_raw(errno) });
            }
            if !interrupted {
                return Ok(found);
            }
        }
        Err(TableError::Interrupted)
    }

    fn delete(&mut self, entry: &Entry) -> Result<(), TableError> {
        let (errno, _) = self.ask(|sequence| message::delete(entry, sequence), |_| {})?;
        match Errno::from_raw(errno) {
            _ if errno == 0 => Ok(()),
            Errno::ENOENT => Ok(()),
            errno => Err(TableError::Refused { what: "delete a connection", errno }),
        }
    }
}
