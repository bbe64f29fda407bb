//! Frames in parts: a message of bounded size is taken and freed by everybody on the way, however large a view is.
//!
//! A part is a frame that says `more`, and the parts of a frame are put together again before anybody looks at it. So where a frame is cut changes nothing:
//! no half of one is ever in force.

use bytes::{Buf, Bytes};

use super::{Change, Error, Frame, decode_frame, wire};

/// Tag and value of `Frame.more`.
const MORE: &[u8] = &[7 << 3, 1];

/// Cuts a frame, given as its bytes in pieces of which the last is its trailer, into parts of at most `most` bytes where it can be cut: between two
/// changes. The trailer stays whole.
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
        if place == last || piece.len() + MORE.len() <= most {
            put(piece);
        } else {
            fields(piece).for_each(&mut put);
        }
    }
    parts.push(part);
    parts
}

/// A message as its fields, one by one. What cannot be read as one stays whole.
fn fields(mut rest: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let length = field(&rest).unwrap_or(rest.len());
        Some(rest.split_to(length))
    })
}

/// Length of the first field.
fn field(mut message: &[u8]) -> Option<usize> {
    let whole = message.len();
    let (tag, kind) = prost::encoding::decode_key(&mut message).ok()?;
    let context = prost::encoding::DecodeContext::default();
    match kind {
        prost::encoding::WireType::LengthDelimited => {
            let length = usize::try_from(prost::encoding::decode_varint(&mut message).ok()?).ok()?;
            (length <= message.remaining()).then(|| message.advance(length))?;
        }
        other => prost::encoding::skip_field(other, tag, &mut message, context).ok()?,
    }
    Some(whole - message.len())
}

/// Puts parts together again.
#[derive(Debug, Default)]
pub struct Joiner {
    changes: Vec<Change>,
}

impl Joiner {
    /// Takes a message; gives the frame whose last part it is. What restates buckets or is in sync is said by the last part alone.
    pub fn take(&mut self, part: wire::Frame) -> Result<Option<Frame>, Error> {
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
