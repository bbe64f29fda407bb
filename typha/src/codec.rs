//! A codec for frames that are encoded already: their bytes are shared among nodes and copied once, into the stream's buffer.

use bytes::{BufMut, Bytes};
use margay_proto::sync::wire;
use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// A frame as pieces that follow each other.
#[derive(Debug, Clone, Default)]
pub struct FrameBytes(pub Vec<Bytes>);

impl FrameBytes {
    /// Length of the whole.
    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
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
        for piece in frame.0 {
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
