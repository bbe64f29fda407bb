//! rtnetlink requests: one at a time, in batches, or as dumps.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use crate::socket::{Buffers, Protocol, Socket};
use crate::wire::{self, HEADER_LEN, u32_ne};

/// What a request does if the object exists, as `ip` has it in `add`, `replace` and `change`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestMode {
    /// Create the object; fail if it exists (`NLM_F_CREATE | NLM_F_EXCL`).
    Create,
    /// Create the object, or replace the one that exists (`NLM_F_CREATE | NLM_F_REPLACE`).
    Replace,
    /// Change, delete or read the object that exists (no flag).
    Change,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused the request.
    #[error("{what}: {errno}")]
    Refused {
        /// The request.
        what: String,
        /// The kernel's errno.
        errno: Errno,
    },
    /// The socket failed.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel's reply could not be decoded.
    #[error("netlink reply: {0}")]
    Decode(String),
}

impl NetlinkError {
    /// Whether the object does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                errno: Errno::ENODEV | Errno::ESRCH | Errno::ENOENT | Errno::EADDRNOTAVAIL,
                ..
            }
        )
    }

    /// Whether the object already exists.
    pub fn is_existing(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                errno: Errno::EEXIST,
                ..
            }
        )
    }
}

/// An rtnetlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct RouteSocket {
    socket: Socket,
    sequence: u32,
}

/// Receive buffer: room for the acknowledgements of a batch, 36 bytes each.
const RECEIVE_BUFFER: usize = 1 << 20;
/// Length in bytes at which a batch is sent.
const BATCH: usize = 32 * 1024;
/// Attempts to dump before giving up because each was interrupted. A dump takes milliseconds.
const DUMP_ATTEMPTS: usize = 20;

impl RouteSocket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// If the process has no file descriptor left.
    pub fn open() -> Result<Self, NetlinkError> {
        let buffers = Buffers {
            send: None,
            receive: RECEIVE_BUFFER,
        };
        Ok(Self {
            socket: Socket::open_strict(Protocol::Route, buffers)?,
            sequence: 0,
        })
    }

    /// Sends one request and waits for its acknowledgement. `what` names the request in an error.
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the socket.
    pub fn exec(
        &mut self,
        request: RouteNetlinkMessage,
        mode: RequestMode,
        what: impl FnOnce() -> String,
    ) -> Result<(), NetlinkError> {
        let mut out = Vec::with_capacity(512);
        let sequence = self.encode(request, mode, &mut out);
        self.socket.send(&out)?;
        match self.read_acknowledgement(sequence)? {
            None => Ok(()),
            Some(errno) => Err(NetlinkError::Refused {
                what: what(),
                errno,
            }),
        }
    }

    /// Sends many requests in few system calls. Returns the position and the errno of each that the
    /// kernel refused, which does not stop the others.
    ///
    /// # Errors
    /// A failure of the socket.
    pub fn exec_all(
        &mut self,
        requests: Vec<(RouteNetlinkMessage, RequestMode)>,
    ) -> Result<Vec<(usize, Errno)>, NetlinkError> {
        let mut refused = Vec::new();
        let (mut out, mut sent) = (Vec::with_capacity(BATCH + 512), Vec::new());
        let mut position = 0;
        let mut requests = requests.into_iter().peekable();
        while let Some((request, mode)) = requests.next() {
            sent.push((position, self.encode(request, mode, &mut out)));
            position += 1;
            if out.len() < BATCH && requests.peek().is_some() {
                continue;
            }
            self.socket.send(&out)?;
            out.clear();
            for (index, sequence) in sent.drain(..) {
                if let Some(errno) = self.read_acknowledgement(sequence)? {
                    refused.push((index, errno));
                }
            }
        }
        Ok(refused)
    }

    /// Sends a dump request and returns all objects. A dump that was interrupted by a change
    /// (`NLM_F_DUMP_INTR`) may miss objects that existed all the time, so it is repeated.
    ///
    /// # Errors
    /// The kernel's refusal or a failure of the socket; `EINTR` if every attempt was interrupted.
    pub fn dump(
        &mut self,
        request: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        self.dump_map(request, Some)
    }

    /// As [`Self::dump`], keeping of each object only what `keep` makes of it: a table may have
    /// hundreds of thousands of objects.
    ///
    /// # Errors
    /// As [`Self::dump`].
    pub fn dump_map<T>(
        &mut self,
        request: RouteNetlinkMessage,
        keep: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        message.finalize();
        for _ in 0..DUMP_ATTEMPTS {
            self.sequence += 1;
            message.header.sequence_number = self.sequence;
            let mut out = vec![0; message.buffer_len()];
            message.serialize(&mut out);
            self.socket.send(&out)?;
            let mut dump = Dump::new();
            while !dump.is_complete {
                for message in self.receive()? {
                    if message.header.sequence_number == self.sequence {
                        dump.add(message, &keep)?;
                    }
                }
            }
            if !dump.is_interrupted {
                return Ok(dump.found);
            }
        }
        Err(NetlinkError::Refused {
            what: "dump, which changes kept interrupting".to_owned(),
            errno: Errno::EINTR,
        })
    }

    /// Reads one object. `what` names the request in an error.
    ///
    /// # Errors
    /// The kernel's refusal, or a failure of the socket.
    pub fn get(
        &mut self,
        request: RouteNetlinkMessage,
        what: impl FnOnce() -> String,
    ) -> Result<Option<RouteNetlinkMessage>, NetlinkError> {
        let mut out = Vec::with_capacity(128);
        let sequence = self.encode(request, RequestMode::Change, &mut out);
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
                            Some(code) => Err(NetlinkError::Refused {
                                what: what(),
                                errno: Errno::from_raw(-code.get()),
                            }),
                            None => Ok(found),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    fn encode(
        &mut self,
        request: RouteNetlinkMessage,
        mode: RequestMode,
        out: &mut Vec<u8>,
    ) -> u32 {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST
            | NLM_F_ACK
            | match mode {
                RequestMode::Create => NLM_F_CREATE | NLM_F_EXCL,
                RequestMode::Replace => NLM_F_CREATE | NLM_F_REPLACE,
                RequestMode::Change => 0,
            };
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = out.len();
        out.resize(start + message.buffer_len(), 0);
        message.serialize(&mut out[start..]);
        self.sequence
    }

    fn read_acknowledgement(&mut self, sequence: u32) -> Result<Option<Errno>, NetlinkError> {
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

/// The replies to a dump so far.
struct Dump<T> {
    found: Vec<T>,
    /// A change interrupted the dump: it may miss objects.
    is_interrupted: bool,
    is_complete: bool,
}

impl<T> Dump<T> {
    const fn new() -> Self {
        Self {
            found: Vec::new(),
            is_interrupted: false,
            is_complete: false,
        }
    }

    fn add(
        &mut self,
        message: NetlinkMessage<RouteNetlinkMessage>,
        keep: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<(), NetlinkError> {
        self.is_interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(inner) => self.found.extend(keep(inner)),
            NetlinkPayload::Done(done) => self.finish(done.code)?,
            NetlinkPayload::Error(error) => self.finish(error.code.map_or(0, i32::from))?,
            _ => {}
        }
        Ok(())
    }

    /// Ends the dump with a code of the kernel: a negative errno, or 0.
    fn finish(&mut self, code: i32) -> Result<(), NetlinkError> {
        self.is_complete = true;
        match Errno::from_raw(-code.min(0)) {
            Errno::EINTR => self.is_interrupted = true,
            errno if code < 0 => {
                return Err(NetlinkError::Refused {
                    what: "dump".to_owned(),
                    errno,
                });
            }
            _ => {}
        }
        Ok(())
    }
}

/// Decodes a received datagram. Messages of types that netlink-packet-route does not know are
/// skipped.
///
/// # Errors
/// If the length of a message is malformed.
pub fn parse(datagram: &[u8]) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetlinkError> {
    let mut messages = wire::messages(datagram);
    let found = messages
        .by_ref()
        .filter_map(|message| NetlinkMessage::deserialize(message.bytes).ok())
        .collect();
    match messages.rest() {
        rest if rest.len() < HEADER_LEN => Ok(found),
        rest => {
            let length = u32_ne(rest, 0).unwrap_or_default();
            Err(NetlinkError::Decode(format!(
                "a message of length {length} in {} bytes",
                rest.len()
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message with an empty body.
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
            let mut dump = Dump::new();
            for message in [links(flags[0]), links(flags[1]), done(flags[2])] {
                assert!(!dump.is_complete);
                dump.add(message, Some).expect("no error");
            }
            assert_eq!(
                (dump.is_complete, dump.is_interrupted, dump.found.len()),
                (true, is_interrupted, 2)
            );
        }
    }
}
