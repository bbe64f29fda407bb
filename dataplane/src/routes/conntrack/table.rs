//! The kernel's conntrack table, in the network namespace of the thread that opened it.

use std::io;

use margay_api::rule::IpVersion;
use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR};
use nix::errno::Errno;

use super::message::{self, Entry, PurgeAddress, Selection, TupleField};
use margay_netlink::wire::{Message, messages, u32_ne};
use margay_netlink::{Buffers, Protocol, Socket};

/// Sizes of the socket's buffers: requests are small, and one part of a dump has to fit.
const BUFFERS: Buffers = Buffers {
    send: Some(64 << 10),
    receive: 1 << 20,
};

/// Error of listing or deleting entries.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The kernel refused a request.
    #[error("{what}: {errno}; check that the kernel module nf_conntrack_netlink is available")]
    Refused {
        /// Request that was refused.
        what: &'static str,
        /// Error of the kernel.
        errno: Errno,
    },
    /// The table changed during each dump.
    #[error("the conntrack table was resized during each attempt to read it")]
    Interrupted,
    /// The socket failed or returned no response.
    #[error("ctnetlink: {0}")]
    Socket(String),
}

impl From<io::Error> for TableError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error.to_string())
    }
}

/// Operations on the conntrack table.
pub trait ConntrackTable: Send + 'static {
    /// Deletes all entries with the address in that field. False: the kernel does not support it.
    fn flush(&mut self, subject: PurgeAddress, place: TupleField) -> Result<bool, TableError>;
    /// Lists the entries of an IP version that are meant.
    fn find(&mut self, version: IpVersion, wanted: Selection<'_>)
    -> Result<Vec<Entry>, TableError>;
    /// Deletes an entry; a missing one is a success.
    fn delete(&mut self, entry: &Entry) -> Result<(), TableError>;
}

/// The table of the kernel.
pub struct KernelTable {
    socket: Socket,
    sequence: u32,
}

impl KernelTable {
    /// Opens a socket in the calling thread's network namespace; needs `CAP_NET_ADMIN`.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            socket: Socket::open(Protocol::Netfilter, 0, BUFFERS)?,
            sequence: 0,
        })
    }

    /// Sends a request and passes the body of each response to `each`; returns the kernel's error
    /// number, 0 for none, and whether a dump was interrupted.
    fn request(
        &mut self,
        request: impl FnOnce(u32) -> Vec<u8>,
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<(i32, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        self.socket.send(&request(sequence))?;
        let mut interrupted = false;
        // The kernel responds within the system calls, so there is nothing to wait for.
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

impl KernelTable {
    /// Dumps the entries and discards them.
    pub fn list(&mut self) -> io::Result<()> {
        match self.request(
            |sequence| message::encode_list(IpVersion::V4, sequence),
            |_| {},
        )? {
            (0, _) => Ok(()),
            (errno, _) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Whether the namespace has no entry. Saves a dump, which walks over the buckets of all
    /// namespaces.
    fn is_empty(&mut self) -> Result<bool, TableError> {
        let mut count = None;
        let (errno, _) = self.request(message::encode_count, |body| {
            count = message::parse_count(body)
        })?;
        Ok(errno == 0 && count == Some(0))
    }
}

/// Maximal number of dumps if each is interrupted.
const READS: u32 = 5;

impl ConntrackTable for KernelTable {
    fn flush(&mut self, subject: PurgeAddress, place: TupleField) -> Result<bool, TableError> {
        if subject.version() == IpVersion::V6 {
            // It would delete the entries of all other addresses.
            return Ok(false);
        }
        let (errno, _) = self.request(
            |sequence| message::encode_flush(subject, place, sequence),
            |_| {},
        )?;
        match Errno::from_raw(errno) {
            _ if errno == 0 => Ok(true),
            // The dump that follows reports the error, if this is not the reason.
            Errno::EINVAL | Errno::EOPNOTSUPP => Ok(false),
            errno => Err(TableError::Refused {
                what: "delete conntrack entries of an address",
                errno,
            }),
        }
    }

    fn find(
        &mut self,
        version: IpVersion,
        wanted: Selection<'_>,
    ) -> Result<Vec<Entry>, TableError> {
        if self.is_empty()? {
            return Ok(Vec::new());
        }
        for _ in 0..READS {
            let mut found = Vec::new();
            let read = |body: &[u8]| found.extend(message::parse_entry(version, body, wanted));
            let (errno, interrupted) =
                self.request(|sequence| message::encode_list(version, sequence), read)?;
            if errno != 0 {
                return Err(TableError::Refused {
                    what: "list conntrack entries",
                    errno: Errno::from_raw(errno),
                });
            }
            if !interrupted {
                return Ok(found);
            }
        }
        Err(TableError::Interrupted)
    }

    fn delete(&mut self, entry: &Entry) -> Result<(), TableError> {
        let (errno, _) =
            self.request(|sequence| message::encode_delete(entry, sequence), |_| {})?;
        match Errno::from_raw(errno) {
            _ if errno == 0 => Ok(()),
            Errno::ENOENT => Ok(()),
            errno => Err(TableError::Refused {
                what: "delete a conntrack entry",
                errno,
            }),
        }
    }
}
