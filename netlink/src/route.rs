//! rtnetlink requests: one at a time, or a batch that goes out in few system calls.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

pub use crate::wire::HEADER;

use crate::socket::{Buffers, Protocol, Socket};

/// How an object that exists already is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Fail if it exists.
    Create,
    /// Create it, or replace what exists.
    Replace,
    /// Change or delete what exists.
    Change,
}

/// A refused request, with the kernel's errno.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused the request.
    #[error("{what}: {errno}")]
    Refused {
        /// What was asked for.
        what: String,
        /// Why it was refused.
        errno: Errno,
    },
    /// The socket itself failed.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel's answer could not be understood.
    #[error("netlink answer: {0}")]
    Decode(String),
}

impl NetlinkError {
    /// Whether the object was missing or already gone.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { errno: Errno::ENODEV | Errno::ESRCH | Errno::ENOENT | Errno::EADDRNOTAVAIL, .. })
    }

    /// Whether the object existed already.
    pub fn is_existing(&self) -> bool {
        matches!(self, Self::Refused { errno: Errno::EEXIST, .. })
    }
}

/// An rtnetlink socket in the network namespace of the thread that opened it; it stays there.
#[derive(Debug)]
pub struct RouteSocket {
    socket: Socket,
    sequence: u32,
}

/// Answers that wait to be read: those of a batch, 36 bytes each.
const RECEIVE: usize = 1 << 20;
/// Requests are collected up to this many bytes before they are sent.
const BATCH: usize = 32 * 1024;
/// Readings of a list that changes meanwhile before giving up; a reading takes milliseconds.
const READINGS: usize = 20;

impl RouteSocket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        let buffers = Buffers { send: None, receive: RECEIVE };
        Ok(Self { socket: Socket::open(Protocol::Route, 0, buffers)?, sequence: 0 })
    }

    /// Sends one request and waits for its acknowledgement. `what` names it in an error.
    pub fn exec(
        &mut self,
        request: RouteNetlinkMessage,
        verb: Verb,
        what: impl FnOnce() -> String,
    ) -> Result<(), NetlinkError> {
        let mut out = Vec::with_capacity(512);
        let sequence = self.encode(request, verb, &mut out);
        self.socket.send(&out)?;
        match self.acknowledgement(sequence)? {
            None => Ok(()),
            Some(errno) => Err(NetlinkError::Refused { what: what(), errno }),
        }
    }

    /// Sends many requests; returns the error of each that was refused, by its position. One refusal does not stop the rest.
    pub fn exec_all(
        &mut self,
        requests: Vec<(RouteNetlinkMessage, Verb)>,
    ) -> Result<Vec<(usize, Errno)>, NetlinkError> {
        let mut refused = Vec::new();
        let (mut out, mut sent) = (Vec::with_capacity(BATCH + 512), Vec::new());
        let mut position = 0;
        let mut requests = requests.into_iter().peekable();
        while let Some((request, verb)) = requests.next() {
            sent.push((position, self.encode(request, verb, &mut out)));
            position += 1;
            if out.len() < BATCH && requests.peek().is_some() {
                continue;
            }
            self.socket.send(&out)?;
            out.clear();
            for (index, sequence) in sent.drain(..) {
                if let Some(errno) = self.acknowledgement(sequence)? {
                    refused.push((index, errno));
                }
            }
        }
        Ok(refused)
    }

    /// Sends a dump request and returns everything that it lists. A list that changed while it was read may lack what was there all the time, so it is
    /// read again; one that never stands still is an error (`EINTR`).
    pub fn dump(&mut self, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        message.finalize();
        for _ in 0..READINGS {
            self.sequence += 1;
            message.header.sequence_number = self.sequence;
            let mut out = vec![0; message.buffer_len()];
            message.serialize(&mut out);
            self.socket.send(&out)?;
            let mut listing = Listing::default();
            while !listing.is_whole {
                for message in self.receive()? {
                    if message.header.sequence_number == self.sequence {
                        listing.take(message)?;
                    }
                }
            }
            if !listing.is_interrupted {
                return Ok(listing.found);
            }
        }
        Err(NetlinkError::Refused {
            what: "list, which kept changing while it was read".to_owned(),
            errno: Errno::EINTR,
        })
    }

    /// Asks for one object and returns what the kernel says of it. `what` names it in an error.
    pub fn get(
        &mut self,
        request: RouteNetlinkMessage,
        what: impl FnOnce() -> String,
    ) -> Result<Option<RouteNetlinkMessage>, NetlinkError> {
        let mut out = Vec::with_capacity(128);
        let sequence = self.encode(request, Verb::Change, &mut out);
        self.socket.send(&out)?;
        let mut found = None;
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => found = Some(inner),
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            Some(code) => {
                                Err(NetlinkError::Refused { what: what(), errno: Errno::from_raw(-code.get()) })
                            }
                            None => Ok(found),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    fn encode(&mut self, request: RouteNetlinkMessage, verb: Verb, out: &mut Vec<u8>) -> u32 {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST
            | NLM_F_ACK
            | match verb {
                Verb::Create => NLM_F_CREATE | NLM_F_EXCL,
                Verb::Replace => NLM_F_CREATE | NLM_F_REPLACE,
                Verb::Change => 0,
            };
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = out.len();
        out.resize(start + message.buffer_len(), 0);
        message.serialize(&mut out[start..]);
        self.sequence
    }

    fn acknowledgement(&mut self, sequence: u32) -> Result<Option<Errno>, NetlinkError> {
        loop {
            for message in self.receive()? {
                if let (true, NetlinkPayload::Error(error)) =
                    (message.header.sequence_number == sequence, message.payload)
                {
                    return Ok(error.code.map(|code| Errno::from_raw(-code.get())));
                }
            }
        }
    }

    fn receive(&mut self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetlinkError> {
        parse(self.socket.receive()?)
    }
}

/// What has come of a list.
#[derive(Default)]
struct Listing {
    found: Vec<RouteNetlinkMessage>,
    /// The list changed while it was read: something that is there may be missing from it.
    is_interrupted: bool,
    is_whole: bool,
}

impl Listing {
    fn take(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) -> Result<(), NetlinkError> {
        self.is_interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(inner) => self.found.push(inner),
            NetlinkPayload::Done(done) => self.end(done.code)?,
            NetlinkPayload::Error(error) => self.end(error.code.map_or(0, i32::from))?,
            _ => {}
        }
        Ok(())
    }

    /// `code` is an errno below zero, or none.
    fn end(&mut self, code: i32) -> Result<(), NetlinkError> {
        self.is_whole = true;
        match Errno::from_raw(-code.min(0)) {
            Errno::EINTR => self.is_interrupted = true,
            errno if code < 0 => return Err(NetlinkError::Refused { what: "list".to_owned(), errno }),
            _ => {}
        }
        Ok(())
    }
}

/// Splits what was read into messages. One that this crate does not know is skipped by its length.
pub fn parse(mut bytes: &[u8]) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetlinkError> {
    let mut found = Vec::new();
    while bytes.len() >= HEADER {
        let length = length(bytes);
        if length < HEADER || length > bytes.len() {
            return Err(NetlinkError::Decode(format!("length {length} of {} bytes", bytes.len())));
        }
        if let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes[..length]) {
            found.push(message);
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    Ok(found)
}

/// The messages of what was read, whole, until one is malformed; each with its kind.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let message = bytes.get(..length(bytes)).filter(|message| message.len() >= HEADER)?;
        bytes = &bytes[message.len().next_multiple_of(4).min(bytes.len())..];
        Some((u16::from_ne_bytes([message[4], message[5]]), message))
    })
}

/// The length that the first message says it has.
fn length(bytes: &[u8]) -> usize {
    bytes.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, |bytes| u32::from_ne_bytes(bytes) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    /// A message without a body but one number.
    fn mk_message(kind: u16, flags: u16) -> NetlinkMessage<RouteNetlinkMessage> {
        let mut bytes = Vec::new();
        bytes.extend(32u32.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.resize(32, 0);
        parse(&bytes).expect("a message").pop().expect("a message")
    }

    #[test]
    fn a_list_that_changed_while_it_was_read_is_known_by_any_of_its_messages() {
        // RTM_NEWLINK and NLMSG_DONE.
        let (links, done) = (|flags| mk_message(16, flags), |flags| mk_message(3, flags));
        for (flags, is_interrupted) in [
            ([0, 0, 0], false),
            ([NLM_F_DUMP_INTR, 0, 0], true),
            ([0, NLM_F_DUMP_INTR, 0], true),
            ([0, 0, NLM_F_DUMP_INTR], true),
        ] {
            let mut listing = Listing::default();
            for message in [links(flags[0]), links(flags[1]), done(flags[2])] {
                assert!(!listing.is_whole);
                listing.take(message).expect("no error");
            }
            assert_eq!((listing.is_whole, listing.is_interrupted, listing.found.len()), (true, is_interrupted, 2));
        }
    }
}
