//! A codec for frames that are encoded already: their bytes are shared among nodes and copied once, into the stream's buffer.

use bytes::{BufMut, Bytes};
use margay_proto::sync::{PART, split, wire};
use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// A message as pieces that follow each other: a frame, or a part of one.
#[derive(Debug, Clone, Default)]
pub struct FrameBytes {
    pieces: Vec<Bytes>,
    in_parts: bool,
}

impl FrameBytes {
    /// A frame; `in_parts` for a node that reads it in parts.
    pub fn new(pieces: Vec<Bytes>, in_parts: bool) -> Self {
        Self { pieces, in_parts }
    }

    /// The messages that it is sent as.
    pub fn into_messages(self) -> Vec<Self> {
        if !self.in_parts || self.len() <= PART {
            return vec![self];
        }
        split(self.pieces, PART).into_iter().map(|pieces| Self { pieces, in_parts: false }).collect()
    }

    /// Its bytes, in order.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// Length of the whole.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Frames out, what nodes say in.
#[derive(Debug, Clone, Copy, Default)]
pub struct FrameCodec;

impl Codec for FrameCodec {
    type Encode = FrameBytes;
    type Decode = wire::Up;
    type Encoder = FrameCodec;
    type Decoder = FrameCodec;

    fn encoder(&mut self) -> Self::Encoder {
        Self
    }

    fn decoder(&mut self) -> Self::Decoder {
        Self
    }
}

impl Encoder for FrameCodec {
    type Item = FrameBytes;
    type Error = Status;

    fn encode(&mut self, frame: FrameBytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(frame.len());
        for piece in frame.pieces {
            buffer.put(piece);
        }
        Ok(())
    }
}

impl Decoder for FrameCodec {
    type Item = wire::Up;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<wire::Up>, Status> {
        let said = wire::Up::decode(buffer);
        said.map(Some).map_err(|error| Status::invalid_argument(format!("Up: {error}")))
    }
}
