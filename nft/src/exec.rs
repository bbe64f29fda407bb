//! The nf_tables socket, which executes transactions.
//!
//! Keep one socket for the life of the program: closing it after a deletion waits for an RCU grace
//! period of the kernel, 5 to 30 ms. Every call blocks while the kernel works (microseconds for one
//! element, a few hundred milliseconds for a table of ten thousand rules), so it belongs on a
//! thread of its own.

use std::io;

use crate::constants::*;
use crate::encode::{Batch, Origin};
use crate::transaction::{Transaction, TransactionOp};
use margay_netlink::wire::{
    HEADER_LEN, Header, Message, NF_HEADER_LEN, Writer, attribute_str, attribute_u32, messages,
    u32_ne,
};
use margay_netlink::{Buffers, Protocol, Socket};

/// Room to send a table of a hundred thousand rules, and to receive an error for every operation of
/// a refused batch.
const BUFFERS: Buffers = Buffers {
    send: Some(64 << 20),
    receive: 4 << 20,
};

/// The kernel's generation counter: the number of nf_tables commits in this network namespace, by
/// any program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

/// Why a transaction was not committed, or may not have been.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The kernel refused it and changed nothing.
    #[error("the kernel refused to {operation}: {source}{}", detail(.message))]
    Refused {
        /// The first operation that the kernel refused.
        operation: String,
        /// Its index in the transaction; `None` when the batch as a whole failed.
        index: Option<usize>,
        /// The kernel's errno.
        source: io::Error,
        /// The kernel's extended acknowledgement message, if it sent one.
        message: Option<String>,
    },
    /// The socket failed before the kernel did anything.
    #[error("netlink: {0}")]
    Send(#[source] io::Error),
    /// The acknowledgement was lost. The transaction may have been committed, so the table must be
    /// read back.
    #[error("no acknowledgement of a transaction: {0}; the table must be read back")]
    Unanswered(#[source] io::Error),
}

impl ExecError {
    /// Whether the transaction exceeds the socket's send buffer (`EMSGSIZE`): split it, since a
    /// retry fails as well.
    pub fn is_oversized(&self) -> bool {
        matches!(self, Self::Send(error) if error.raw_os_error() == Some(libc::EMSGSIZE))
    }

    /// Whether the error is about the transaction as a whole rather than one of its operations.
    pub const fn is_batch_error(&self) -> bool {
        matches!(self, Self::Send(_) | Self::Refused { index: None, .. })
    }
}

fn detail(message: &Option<String>) -> String {
    message
        .as_ref()
        .map(|message| format!(" ({message})"))
        .unwrap_or_default()
}

/// A connection to nf_tables in the network namespace of the thread that opened it.
///
/// ```no_run
/// use margay_nft::{Chain, ChainName, NftSocket, Rule, Ruleset, TableName, Transaction};
///
/// let mut wanted = Ruleset::new(TableName::new("example-1")?);
/// wanted.put_chain(ChainName::new("chain-1")?, Chain::regular([Rule::new().counter().drop()]));
///
/// let mut socket = NftSocket::open()?;
/// socket.exec(&Transaction::replace(&wanted))?;
/// assert!(socket.list(&wanted.table)?.drift(&wanted).is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct NftSocket {
    netlink: Socket,
    batch: Batch,
    sequence: u32,
}

/// The kernel's replies to a batch.
#[derive(Default)]
struct Outcome {
    generation: Option<Generation>,
    acknowledged: bool,
    /// The first error: sequence number, errno and message.
    refused: Option<(u32, i32, Option<String>)>,
}

impl NftSocket {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel's, if it has no nfnetlink. Executing and listing need CAP_NET_ADMIN.
    pub fn open() -> io::Result<Self> {
        let netlink = Socket::open(Protocol::Netfilter, 0, BUFFERS)?;
        Ok(Self {
            netlink,
            batch: Batch::default(),
            sequence: 0,
        })
    }

    /// The netlink port ID, by which notifications name this socket as the origin of a change.
    pub const fn port(&self) -> u32 {
        self.netlink.port()
    }

    /// Commits a transaction, all of it or nothing, and returns the resulting generation. An empty
    /// transaction only reads the current generation.
    ///
    /// # Errors
    /// See [`ExecError`]: the transaction was refused, was not sent, or may have been committed.
    pub fn exec(&mut self, transaction: &Transaction) -> Result<Generation, ExecError> {
        if transaction.is_empty() {
            return self.read_generation().map_err(ExecError::Unanswered);
        }
        self.discard_replies().map_err(ExecError::Send)?;
        let first = self.sequence;
        self.batch.encode(transaction, first);
        self.sequence = first.wrapping_add(self.batch.sequence_count());
        self.netlink
            .send(self.batch.bytes())
            .map_err(ExecError::Send)?;
        let outcome = self.read_outcome().map_err(ExecError::Unanswered)?;
        match (outcome.refused, outcome.generation) {
            (Some((sequence, errno, message)), _) => {
                Err(self.refusal(transaction, sequence, errno, message))
            }
            (None, Some(generation)) if outcome.acknowledged => Ok(generation),
            // A transaction that changes nothing makes no new generation.
            (None, None) if outcome.acknowledged => {
                self.read_generation().map_err(ExecError::Unanswered)
            }
            _ => Err(ExecError::Unanswered(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Reads the current generation (`NFT_MSG_GETGEN`).
    ///
    /// # Errors
    /// The socket's or the kernel's.
    pub fn read_generation(&mut self) -> io::Result<Generation> {
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

    /// Reads replies until the last operation is acknowledged or, after an error, until there are
    /// none left. This never waits: the kernel processes a batch, and queues every reply, inside
    /// the `send` call.
    fn read_outcome(&mut self) -> io::Result<Outcome> {
        let mut outcome = Outcome::default();
        while !outcome.acknowledged || outcome.refused.is_some() {
            let Some(datagram) = self.netlink.try_receive()? else {
                break;
            };
            for message in
                messages(datagram).filter(|message| self.batch.contains(message.header.sequence))
            {
                outcome.add(message, self.batch.last_sequence());
            }
        }
        Ok(outcome)
    }

    fn refusal(
        &self,
        transaction: &Transaction,
        sequence: u32,
        errno: i32,
        message: Option<String>,
    ) -> ExecError {
        let origin = self.batch.origin(sequence);
        let operation = origin.map_or_else(
            || "commit".to_owned(),
            |origin| describe(transaction, origin),
        );
        let source = io_error(errno);
        ExecError::Refused {
            operation,
            index: origin.map(|origin| origin.op),
            source,
            message,
        }
    }

    /// Discards unread replies to earlier requests. Lost ones (`ENOBUFS`) do not matter either.
    fn discard_replies(&mut self) -> io::Result<()> {
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
    fn add(&mut self, message: Message<'_>, last: u32) {
        let Message { header, body, .. } = message;
        if header.kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN {
            self.generation = body
                .get(NF_HEADER_LEN..)
                .and_then(|body| attribute_u32(body, NFTA_GEN_ID))
                .map(Generation);
        }
        if header.kind != NLMSG_ERROR {
            return;
        }
        match error_of(header, body) {
            (0, _) => self.acknowledged |= header.sequence == last,
            (errno, message) => {
                self.refused
                    .get_or_insert((header.sequence, errno, message));
            }
        }
    }
}

/// The errno (positive; 0 for an acknowledgement) and the extended message of an `NLMSG_ERROR`.
fn error_of(header: Header, body: &[u8]) -> (i32, Option<String>) {
    let errno = u32_ne(body, 0).map_or(libc::EPROTO, |number| -(number as i32));
    let request = if header.flags & NLM_F_CAPPED != 0 {
        HEADER_LEN
    } else {
        u32_ne(body, 4).map_or(0, |length| (length as usize).next_multiple_of(4))
    };
    let attributes = body
        .get(4 + request..)
        .filter(|_| header.flags & NLM_F_ACK_TLVS != 0)
        .unwrap_or_default();
    (
        errno,
        attribute_str(attributes, NLMSGERR_ATTR_MSG).map(str::to_owned),
    )
}

fn describe(transaction: &Transaction, origin: Origin) -> String {
    match (&transaction.ops()[origin.op], origin.rule) {
        (TransactionOp::AppendRules(name, chain, _), Some(index)) => {
            format!("add rule {index} to chain {name}: {}", chain.rules[index])
        }
        (op, _) => op.to_string(),
    }
}

/// An errno as an error, with a text of its own where the usual one would mislead: `ENFILE` from
/// nf_tables is about a set, not about open files.
fn io_error(errno: i32) -> io::Error {
    match errno {
        libc::ENFILE => io::Error::new(
            io::ErrorKind::StorageFull,
            "the set is full: it was created with a maximum size (ENFILE)",
        ),
        errno => io::Error::from_raw_os_error(errno),
    }
}

/// Requests with replies, for reading back.
impl NftSocket {
    /// Sends one request and calls `each` with the type and the attributes of each reply. Returns
    /// whether the ruleset changed during the dump (`NLM_F_DUMP_INTR`).
    pub(crate) fn request(
        &mut self,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<bool> {
        self.discard_replies()?;
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        let header = Header {
            kind: NFNL_SUBSYS_NFTABLES << 8 | kind,
            flags: NLM_F_REQUEST | flags,
            sequence,
        };
        let mut writer = Writer::default();
        writer.put_message(header, NFPROTO_INET, 0, body);
        self.netlink.send(writer.bytes())?;
        let mut interrupted = false;
        while let Some(datagram) = self.netlink.try_receive()? {
            let replies = messages(datagram).filter(|message| message.header.sequence == sequence);
            for Message { header, body, .. } in replies {
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match header.kind {
                    NLMSG_DONE => return Ok(interrupted),
                    NLMSG_ERROR => match error_of(header, body) {
                        (0, _) => return Ok(interrupted),
                        (errno, _) => return Err(io::Error::from_raw_os_error(errno)),
                    },
                    kind => each(kind & 0xff, body.get(NF_HEADER_LEN..).unwrap_or_default()),
                }
            }
            if flags & NLM_F_DUMP != NLM_F_DUMP {
                return Ok(interrupted);
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
