//! Carrying transactions out: one socket for the life of the agent.
//!
//! The socket is never closed between transactions: closing one after a deletion waits for a grace period of the
//! kernel, 5 to 30 ms. Every call blocks for as long as the kernel works (microseconds for an element, a few hundred
//! milliseconds for a whole table of ten thousand rules) and belongs on a thread of its own.

use std::io;

use super::constants::*;
use super::encode::{Batch, Origin};
use super::transaction::{Op, Transaction};
use margay_netlink::wire::{Header, attribute_str, attribute_u32, messages, u32_ne};
use margay_netlink::{Buffers, Protocol, Socket as NetlinkSocket};

/// The largest batch is a table of a hundred thousand rules; errors of a refused batch come one per operation.
const BUFFERS: Buffers = Buffers { send: Some(64 << 20), receive: 4 << 20 };

/// The kernel's count of commits in this network namespace, ours and others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

/// Why a transaction did not happen, or may not have.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The kernel refused it; nothing has changed.
    #[error("the kernel refused to {operation}: {source}{}", detail(.message))]
    Refused {
        /// The first operation refused.
        operation: String,
        /// Its index in the transaction; `None` when the batch as a whole failed.
        index: Option<usize>,
        /// The kernel's error number.
        source: io::Error,
        /// The kernel's own words.
        message: Option<String>,
    },
    /// The socket failed before anything was done.
    #[error("netlink: {0}")]
    Send(#[source] io::Error),
    /// The answer was lost: the transaction may have happened. The table must be read back.
    #[error("no answer from the kernel to a transaction: {0}; the table must be read back")]
    Unanswered(#[source] io::Error),
}

impl ExecError {
    /// Whether a smaller transaction would go through, and this one never will.
    pub fn is_too_long(&self) -> bool {
        matches!(self, Self::Send(error) if error.raw_os_error() == Some(libc::EMSGSIZE))
    }

    /// Whether it is about the transaction as a whole, and none of its operations.
    pub const fn is_of_the_whole(&self) -> bool {
        matches!(self, Self::Send(_) | Self::Refused { index: None, .. })
    }
}

fn detail(message: &Option<String>) -> String {
    message.as_ref().map(|message| format!(" ({message})")).unwrap_or_default()
}

/// The agent's connection to nf_tables, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    netlink: NetlinkSocket,
    batch: Batch,
    sequence: u32,
}

/// What the kernel said to a batch.
#[derive(Default)]
struct Outcome {
    generation: Option<Generation>,
    acknowledged: bool,
    /// First error by position in the batch.
    refused: Option<(u32, i32, Option<String>)>,
}

impl Socket {
    /// Opens the socket; needs CAP_NET_ADMIN.
    pub fn open() -> io::Result<Self> {
        let netlink = NetlinkSocket::open(Protocol::Netfilter, 0, BUFFERS)?;
        Ok(Self { netlink, batch: Batch::default(), sequence: 0 })
    }

    /// The port by which the kernel names this socket as the cause of a change.
    pub const fn port(&self) -> u32 {
        self.netlink.port()
    }

    /// Applies all of it or nothing, and returns the generation it made. An empty transaction asks nothing of the
    /// kernel but the present generation.
    pub fn exec(&mut self, transaction: &Transaction) -> Result<Generation, ExecError> {
        if transaction.is_empty() {
            return self.generation().map_err(ExecError::Unanswered);
        }
        self.drain().map_err(ExecError::Send)?;
        let first = self.sequence;
        self.batch.encode(transaction, first);
        self.sequence = first.wrapping_add(self.batch.sequences());
        self.netlink.send(self.batch.bytes()).map_err(ExecError::Send)?;
        let outcome = self.outcome().map_err(ExecError::Unanswered)?;
        match (outcome.refused, outcome.generation) {
            (Some((sequence, errno, message)), _) => Err(self.refusal(transaction, sequence, errno, message)),
            (None, Some(generation)) if outcome.acknowledged => Ok(generation),
            // What is true already makes no generation.
            (None, None) if outcome.acknowledged => self.generation().map_err(ExecError::Unanswered),
            _ => Err(ExecError::Unanswered(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// The present generation.
    pub fn generation(&mut self) -> io::Result<Generation> {
        let mut found = None;
        self.request(
            NFT_MSG_GETGEN,
            0,
            |_| {},
            |_, body| {
                found = attribute_u32(body, NFTA_GEN_ID).map(Generation);
            },
        )?;
        found.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Collects answers until the last operation is acknowledged or, after an error, until there are no more. They
    /// are all there already: the kernel works within the sending call.
    fn outcome(&mut self) -> io::Result<Outcome> {
        let mut outcome = Outcome::default();
        while !outcome.acknowledged || outcome.refused.is_some() {
            let Some(datagram) = self.netlink.try_receive()? else {
                break;
            };
            for (header, body) in messages(datagram).filter(|(header, _)| self.batch.holds(header.sequence)) {
                outcome.read(header, body, self.batch.last_sequence());
            }
        }
        Ok(outcome)
    }

    fn refusal(&self, transaction: &Transaction, sequence: u32, errno: i32, message: Option<String>) -> ExecError {
        let origin = self.batch.origin(sequence);
        let operation = origin.map_or_else(|| "commit".to_owned(), |origin| describe(transaction, origin));
        let source = explained(errno);
        ExecError::Refused { operation, index: origin.map(|origin| origin.op), source, message }
    }

    /// Throws away answers to earlier requests that nobody waited for. A lost one is of no interest either.
    fn drain(&mut self) -> io::Result<()> {
        loop {
            match self.netlink.try_receive() {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Outcome {
    fn read(&mut self, header: Header, body: &[u8], last: u32) {
        if header.kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN {
            self.generation = body
                .get(margay_netlink::wire::NF_HEADER..)
                .and_then(|body| attribute_u32(body, NFTA_GEN_ID))
                .map(Generation);
        }
        if header.kind != NLMSG_ERROR {
            return;
        }
        match error_of(header, body) {
            (0, _) => self.acknowledged |= header.sequence == last,
            (errno, message) => {
                self.refused.get_or_insert((header.sequence, errno, message));
            }
        }
    }
}

/// Error number (positive, 0 for an acknowledgement) and text of an error message.
pub(super) fn error_of(header: Header, body: &[u8]) -> (i32, Option<String>) {
    let errno = u32_ne(body, 0).map_or(libc::EPROTO, |number| -(number as i32));
    let request = if header.flags & NLM_F_CAPPED != 0 {
        margay_netlink::wire::HEADER
    } else {
        u32_ne(body, 4).map_or(0, |length| (length as usize).next_multiple_of(4))
    };
    let attributes = body.get(4 + request..).filter(|_| header.flags & NLM_F_ACK_TLVS != 0).unwrap_or_default();
    (errno, attribute_str(attributes, NLMSGERR_ATTR_MSG).map(str::to_owned))
}

fn describe(transaction: &Transaction, origin: Origin) -> String {
    match (&transaction.ops()[origin.op], origin.rule) {
        (Op::AppendRules(name, chain, _), Some(index)) => {
            format!("add rule {index} to chain {name}: {}", chain.rules[index])
        }
        (op, _) => op.to_string(),
    }
}

/// The kernel's error number as an error, in words of its own where what the number usually means would mislead.
fn explained(errno: i32) -> io::Error {
    match errno {
        libc::ENFILE => io::Error::new(
            io::ErrorKind::StorageFull,
            "the set is full: it has been given a size, and holds as many elements (ENFILE)",
        ),
        errno => io::Error::from_raw_os_error(errno),
    }
}

/// Requests with an answer, for reading back.
impl Socket {
    /// Sends one request and hands each answer to `each`, with the netfilter header taken off. Returns whether the
    /// kernel changed the list while it was read.
    pub(super) fn request(
        &mut self,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut margay_netlink::wire::Writer),
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<bool> {
        self.drain()?;
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        let header = Header { kind: NFNL_SUBSYS_NFTABLES << 8 | kind, flags: NLM_F_REQUEST | flags, sequence };
        let mut writer = margay_netlink::wire::Writer::default();
        writer.message(header, NFPROTO_INET, 0, body);
        self.netlink.send(writer.bytes())?;
        let mut interrupted = false;
        while let Some(datagram) = self.netlink.try_receive()? {
            for (header, body) in messages(datagram).filter(|(header, _)| header.sequence == sequence) {
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match header.kind {
                    NLMSG_DONE => return Ok(interrupted),
                    NLMSG_ERROR => match error_of(header, body) {
                        (0, _) => return Ok(interrupted),
                        (errno, _) => return Err(io::Error::from_raw_os_error(errno)),
                    },
                    kind => each(kind & 0xff, body.get(margay_netlink::wire::NF_HEADER..).unwrap_or_default()),
                }
            }
            if flags & NLM_F_DUMP != NLM_F_DUMP {
                return Ok(interrupted);
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
