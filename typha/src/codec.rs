//! Codec for frames that are encoded already: their bytes are shared among nodes and copied once,
//! into the stream's buffer.

use bytes::{BufMut, Bytes};
use margay_proto::sync::{PART_SIZE, split, wire};
use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// An encoded message in chunks: a frame, or a part of one.
#[derive(Debug, Clone, Default)]
pub struct FrameBytes {
    chunks: Vec<Bytes>,
    in_parts: bool,
}

impl FrameBytes {
    /// Creates a frame; `in_parts` is true for an agent that reads partial frames.
    pub fn new(chunks: Vec<Bytes>, in_parts: bool) -> Self {
        Self { chunks, in_parts }
    }

    /// Splits the frame into the messages that are sent.
    pub fn into_messages(self) -> Vec<Self> {
        if !self.in_parts || self.len() <= PART_SIZE {
            return vec![self];
        }
        split(self.chunks, PART_SIZE)
            .into_iter()
            .map(|chunks| Self {
                chunks,
                in_parts: false,
            })
            .collect()
    }

    /// Chunks, in order.
    pub fn chunks(&self) -> &[Bytes] {
        &self.chunks
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.chunks.iter().map(Bytes::len).sum()
    }

    /// Returns true if the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Codec that sends frames and receives messages of nodes.
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
        for chunk in frame.chunks {
            buffer.put(chunk);
        }
        Ok(())
    }
}

impl Decoder for FrameCodec {
    type Item = wire::Up;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<wire::Up>, Status> {
        let message = wire::Up::decode(buffer);
        message
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("Up: {error}")))
    }
}
