//! Frames as a node receives them: raw bytes, of which most nodes of a run read the trailer only,
//! so that they leave the processors to the server.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result};
use bytes::{Buf, Bytes};
use margay_calc::model::{Member, Record};
use margay_proto::sync::{Change, Frame, Joiner, wire};
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use super::model::event_of;

/// Numbers of the fields of a frame that are read without decoding it.
const REVISION: u32 = 2;
const IN_SYNC: u32 = 4;
const MORE: u32 = 7;

/// Fields of a frame besides its changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Glance {
    /// Revision of the server.
    pub revision: u64,
    /// The node has its whole view.
    pub in_sync: bool,
    /// The next message continues the frame.
    pub more: bool,
}

impl Glance {
    /// Reads the fields of an encoded frame and skips its changes.
    pub fn of(mut frame: &[u8]) -> Result<Self> {
        let mut glance = Self::default();
        while frame.has_remaining() {
            let (tag, kind) = decode_key(&mut frame)?;
            match (tag, kind) {
                (REVISION, WireType::Varint) => glance.revision = decode_varint(&mut frame)?,
                (IN_SYNC, WireType::Varint) => glance.in_sync = decode_varint(&mut frame)? != 0,
                (MORE, WireType::Varint) => glance.more = decode_varint(&mut frame)? != 0,
                (_, WireType::LengthDelimited) => {
                    let length = usize::try_from(decode_varint(&mut frame)?)?;
                    frame = frame
                        .get(length..)
                        .context("a field is longer than its frame")?;
                }
                _ => skip_field(kind, tag, &mut frame, DecodeContext::default())?,
            }
        }
        Ok(glance)
    }
}

/// Decodes a message; returns the frame if it is the last part of one.
pub fn decode(message: &[u8], parts: &mut Joiner) -> Result<Option<Frame>> {
    Ok(parts.push(wire::Frame::decode(message)?)?)
}

/// Events whose addresses the frame adds to sets.
pub fn events(frame: &Frame) -> BTreeSet<u32> {
    let mut events = BTreeSet::new();
    for change in &frame.changes {
        let members = match change {
            Change::Members(_, _, delta) => &delta.added,
            Change::Upsert(_, Record::IpSet(set)) => &set.members,
            _ => continue,
        };
        events.extend(members.iter().filter_map(|member| match member {
            Member::Net(net) => match net.addr() {
                IpAddr::V4(address) => event_of(address),
                IpAddr::V6(_) => None,
            },
            _ => None,
        }));
    }
    events
}

/// Codec of a node: sends messages, receives frames as bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawFrames;

impl Codec for RawFrames {
    type Encode = wire::Up;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawFrames {
    type Item = wire::Up;
    type Error = Status;

    fn encode(&mut self, message: wire::Up, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message
            .encode(buffer)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for RawFrames {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

#[cfg(test)]
mod tests {
    use margay_proto::sync::{Trailer, encode_trailer};

    use super::*;

    #[test]
    fn a_glance_reads_what_decoding_reads() {
        let trailer = Trailer {
            revision: 300,
            restated_buckets: vec![1, 2],
            in_sync: true,
            traceparent: "x".to_owned(),
            event_unix_ns: 9,
            versions: [("Pod".to_owned(), 7)].into(),
            servers: vec!["192.0.2.1:5473".to_owned()],
        };
        let glance = Glance::of(&encode_trailer(&trailer)).expect("a frame");
        assert_eq!(
            glance,
            Glance {
                revision: 300,
                in_sync: true,
                more: false
            }
        );
        assert!(
            Glance::of(&[0x0a, 200, 1]).is_err(),
            "a field beyond the end"
        );
    }
}
