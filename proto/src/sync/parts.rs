//! Frames in parts: every hop handles and frees messages of bounded size, however large a view is.
//!
//! A part is a frame with `more` set. The parts of a frame are joined before it is used, so it
//! makes no difference where it is cut: no half of a frame is ever in force.

use bytes::{Buf, Bytes};

use super::{Change, Error, Frame, decode_frame, wire};

/// Encoded `Frame.more = true`: tag and value.
const MORE: &[u8] = &[7 << 3, 1];

/// Splits a frame into parts of at most `most` bytes, as far as it can be split between two
/// changes. The frame is given as chunks, the last of which is its trailer; the trailer stays
/// whole.
pub fn split(frame: Vec<Bytes>, most: usize) -> Vec<Vec<Bytes>> {
    let mut parts = Vec::new();
    let (mut part, mut used) = (Vec::new(), MORE.len());
    let mut put = |piece: Bytes| {
        if used + piece.len() > most && !part.is_empty() {
            let mut full = std::mem::take(&mut part);
            full.push(Bytes::from_static(MORE));
            parts.push(full);
            used = MORE.len();
        }
        used += piece.len();
        part.push(piece);
    };
    let last = frame.len().saturating_sub(1);
    for (place, piece) in frame.into_iter().enumerate() {
        // The last chunk is the trailer, which stays whole.
        if place == last || piece.len() + MORE.len() <= most {
            put(piece);
        } else {
            fields(piece).for_each(&mut put);
        }
    }
    parts.push(part);
    parts
}

/// Splits a message into its encoded fields. Bytes that are not a field stay together.
fn fields(mut rest: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let length = field(&rest).unwrap_or(rest.len());
        Some(rest.split_to(length))
    })
}

/// Length of the first field, in bytes.
fn field(mut message: &[u8]) -> Option<usize> {
    let whole = message.len();
    let (tag, kind) = prost::encoding::decode_key(&mut message).ok()?;
    let context = prost::encoding::DecodeContext::default();
    match kind {
        prost::encoding::WireType::LengthDelimited => {
            let length =
                usize::try_from(prost::encoding::decode_varint(&mut message).ok()?).ok()?;
            (length <= message.remaining()).then(|| message.advance(length))?;
        }
        other => prost::encoding::skip_field(other, tag, &mut message, context).ok()?,
    }
    Some(whole - message.len())
}

/// Joins the parts of frames.
#[derive(Debug, Default)]
pub struct Joiner {
    changes: Vec<Change>,
}

impl Joiner {
    /// Adds a message; returns the frame if it is its last part. Only the last part has the
    /// trailer's fields.
    pub fn push(&mut self, part: wire::Frame) -> Result<Option<Frame>, Error> {
        let more = part.more;
        let Frame { changes, trailer } = decode_frame(part)?;
        self.changes.extend(changes);
        if more {
            return Ok(None);
        }
        let changes = std::mem::take(&mut self.changes);
        Ok(Some(Frame { changes, trailer }))
    }
}
