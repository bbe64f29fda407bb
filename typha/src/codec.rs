//! Frames that are encoded already, whose bytes are shared among nodes, and the decoder of what
//! nodes send.

use std::sync::Arc;

use bytes::Bytes;
use margay_proto::sync::{split, wire};
use prost::Message;
use tokio::time::Instant;
use tonic::Status;
use tonic::codec::{DecodeBuf, Decoder};

use crate::delivery::Delivery;

/// Size above which a frame is sent in parts, in bytes: what a connection holds of it at a time.
const PART: usize = 64 << 10;

/// An encoded message in chunks: a frame, or a part of one.
#[derive(Debug, Clone, Default)]
pub struct FrameBytes {
    chunks: Vec<Bytes>,
    in_parts: bool,
    /// The flush that it belongs to.
    delivery: Option<Arc<Delivery>>,
}

impl FrameBytes {
    /// Creates a frame; `in_parts` is true for an agent that reads partial frames.
    pub fn new(chunks: Vec<Bytes>, in_parts: bool) -> Self {
        Self {
            chunks,
            in_parts,
            delivery: None,
        }
    }

    /// The frame as one of this flush.
    pub fn of_flush(self, delivery: Arc<Delivery>) -> Self {
        Self {
            delivery: Some(delivery),
            ..self
        }
    }

    /// Records that the stream has taken the frame.
    pub fn record_taken(&self) {
        if let Some(delivery) = &self.delivery {
            delivery.record_taken(Instant::now());
        }
    }

    /// Splits the frame into the messages that are sent.
    pub fn into_messages(self) -> Vec<Self> {
        if !self.in_parts || self.len() <= PART {
            return vec![self];
        }
        split(self.chunks, PART)
            .into_iter()
            .map(|chunks| Self::new(chunks, false))
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

/// Decoder of messages of nodes.
#[derive(Debug, Clone, Copy, Default)]
pub struct UpDecoder;

impl Decoder for UpDecoder {
    type Item = wire::Up;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<wire::Up>, Status> {
        let message = wire::Up::decode(buffer);
        message
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("Up: {error}")))
    }
}
