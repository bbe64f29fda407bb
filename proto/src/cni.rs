//! Exchange between the CNI plugin and the agent: messages and their framing.
//!
//! A frame is the length of the message in four bytes, big-endian, followed by the message. The
//! plugin uses [`write()`] and [`read`]; an agent on an async runtime reads [`HEADER`] bytes, gets
//! the [`length`], reads as many bytes and calls [`decode`].

use std::fmt;
use std::io::{self, Read, Write};

use prost::Message;

pub use v1::{
    Add, Attachment, Check, Del, Dns, Done, Error, Gc, Interface, Ip, Pod, Request, Response,
    Result, Route, Status, ValidAttachment, request::Verb, response::Outcome,
};

// Generated from documented messages.
#[allow(missing_docs, clippy::all)]
mod v1 {
    include!(concat!(env!("OUT_DIR"), "/margay.cni.v1.rs"));
}

/// Default path of the agent's socket.
pub const SOCKET: &str = "/var/run/margay/cni.sock";
/// Default path of the file that says that Margay has been removed from the node. It outlives a
/// reboot, after which the runtime still deletes what it knew before.
pub const REMOVED: &str = "/var/lib/margay/removed";
/// Bytes before each message.
pub const HEADER: usize = 4;
/// Maximal length of a message: far above any configuration, and small enough to allocate for a
/// wrong length.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Error codes of the CNI specification (section "Error") that plugin or agent return, and our own
/// from 100 on.
pub mod code {
    /// The cniVersion of the configuration is not supported, or does not have the command.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// A field of the configuration is not supported; the message has its key and value.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container is unknown or gone; the caller need not clean up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// An environment variable is missing or invalid; the message has its name.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// Content does not parse.
    pub const DECODE: u32 = 6;
    /// The configuration is invalid.
    pub const INVALID_CONFIG: u32 = 7;
    /// Transient: the same call will work later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: no ADD would succeed now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: no ADD would succeed now, and existing containers may have limited connectivity.
    pub const LIMITED: u32 = 51;
    /// Ours: plugin and agent do not understand each other's messages.
    pub const MISUNDERSTOOD: u32 = 100;
    /// Ours: no address is free in the pools that the pod may use.
    pub const NO_ADDRESS: u32 = 101;
    /// Ours: the kernel refused an operation.
    pub const KERNEL: u32 = 102;
}

/// Error of encoding or decoding a frame.
#[derive(Debug)]
pub enum FrameError {
    /// The length is above [`MAX_MESSAGE`].
    TooLong(usize),
    /// The body is not a message of the expected type.
    Malformed(prost::DecodeError),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(length) => {
                write!(
                    f,
                    "message of {length} bytes: must be at most {MAX_MESSAGE}"
                )
            }
            Self::Malformed(error) => write!(f, "message does not parse: {error}"),
        }
    }
}

impl std::error::Error for FrameError {}

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Encodes a message with its length before it.
pub fn encode_frame(message: &impl Message) -> std::result::Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    if length > MAX_MESSAGE {
        return Err(FrameError::TooLong(length));
    }
    let mut frame = Vec::with_capacity(HEADER + length);
    frame.extend_from_slice(&(length as u32).to_be_bytes());
    message.encode_raw(&mut frame);
    Ok(frame)
}

/// Number of bytes that follow this header.
pub fn length(header: [u8; HEADER]) -> std::result::Result<usize, FrameError> {
    let length = u32::from_be_bytes(header) as usize;
    if length > MAX_MESSAGE {
        Err(FrameError::TooLong(length))
    } else {
        Ok(length)
    }
}

/// Decodes the message of a frame, without its header.
pub fn decode<M: Message + Default>(body: &[u8]) -> std::result::Result<M, FrameError> {
    M::decode(body).map_err(FrameError::Malformed)
}

/// Writes one frame.
pub fn write(writer: &mut impl Write, message: &impl Message) -> io::Result<()> {
    writer.write_all(&encode_frame(message)?)
}

/// Reads one frame; end of file within it is an error of kind `UnexpectedEof`.
pub fn read<M: Message + Default>(reader: &mut impl Read) -> io::Result<M> {
    let mut header = [0; HEADER];
    reader.read_exact(&mut header)?;
    // The length is checked before memory is allocated.
    let mut body = vec![0; length(header)?];
    reader.read_exact(&mut body)?;
    Ok(decode(&body)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(container: String, config: Vec<u8>, valid: Vec<String>) -> Request {
        let attachment = Attachment {
            container_id: container,
            ifname: "eth0".to_owned(),
            netns: "/var/run/netns/x".to_owned(),
            pod: Some(Pod {
                namespace: "a".to_owned(),
                name: "b".to_owned(),
                ..Pod::default()
            }),
        };
        let verb = if valid.is_empty() {
            Verb::Add(Add {
                attachment: Some(attachment),
                prev_result: Vec::new(),
            })
        } else {
            let valid = valid.into_iter().map(|container_id| ValidAttachment {
                container_id,
                ifname: "eth0".to_owned(),
            });
            Verb::Gc(Gc {
                valid: valid.collect(),
            })
        };
        Request {
            cni_version: "1.1.0".to_owned(),
            config,
            verb: Some(verb),
            ..Request::default()
        }
    }

    proptest! {
        #[test]
        fn encoding_is_reversible(
            container in "[a-z0-9]{0,64}",
            config in proptest::collection::vec(any::<u8>(), 0..512),
            valid in proptest::collection::vec("[a-z0-9]{1,8}", 0..5),
            cut in 0..600_usize,
        ) {
            let wanted = request(container, config, valid);
            let frame = encode_frame(&wanted).expect("short");
            let mut written = Vec::new();
            write(&mut written, &wanted).expect("write");
            prop_assert_eq!(&written, &frame);
            let header = frame[..HEADER].try_into().expect("header");
            prop_assert_eq!(length(header).expect("short"), frame.len() - HEADER);
            prop_assert_eq!(&decode::<Request>(&frame[HEADER..]).expect("body"), &wanted);
            // A frame cut anywhere is an error, never a shorter message.
            let part = &frame[..cut.min(frame.len() - 1)];
            let error = read::<Request>(&mut &part[..]).expect_err("cut");
            prop_assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            prop_assert_eq!(read::<Request>(&mut &frame[..]).expect("whole"), wanted);
        }

        #[test]
        fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = read::<Response>(&mut &noise[..]);
        }
    }

    #[test]
    fn lengths_are_bounded_on_both_sides() {
        let long = request(String::new(), vec![0; MAX_MESSAGE + 1], Vec::new());
        assert!(matches!(encode_frame(&long), Err(FrameError::TooLong(_))));
        let error = length([0xff; HEADER]).expect_err("too long");
        assert_eq!(
            error.to_string(),
            "message of 4294967295 bytes: must be at most 1048576"
        );
        assert!(read::<Request>(&mut &[0xff; 64][..]).is_err());
    }
}
