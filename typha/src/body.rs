//! Body of a node's stream: frames as gRPC messages, whose large pieces are shared among nodes down
//! to the TLS layer.
//!
//! gRPC over HTTP/2: each message is preceded by five bytes, a flag that it is not compressed and
//! its length in big-endian order; the status follows the last one as trailers.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tonic::Status;

use crate::codec::FrameBytes;
use crate::event::Event;

/// Length of a message's prefix.
const PREFIX: usize = 5;
/// Length of a chunk from which on it is not copied, in bytes.
const SHARED: usize = 4 << 10;

/// A frame, or the reason why the stream ends.
pub type FrameResult = Result<FrameBytes, Status>;

/// Source of a node's outgoing stream.
#[derive(Debug)]
pub struct FrameBody {
    frames: mpsc::Receiver<FrameResult>,
    /// Remaining messages of the frame that is being sent.
    messages: VecDeque<FrameBytes>,
    /// Remaining pieces of the message that is being sent.
    pieces: VecDeque<Bytes>,
    blocked: Arc<AtomicBool>,
    events: mpsc::Sender<Event>,
    node: String,
    session: u64,
    has_ended: bool,
}

impl FrameBody {
    /// Creates a body that sends what `frames` yields. If `blocked` is set once the slot is free,
    /// it sends an event.
    pub fn new(
        frames: mpsc::Receiver<FrameResult>,
        blocked: Arc<AtomicBool>,
        events: mpsc::Sender<Event>,
        node: String,
        session: u64,
    ) -> Self {
        let (messages, pieces) = (VecDeque::new(), VecDeque::new());
        Self {
            frames,
            messages,
            pieces,
            blocked,
            events,
            node,
            session,
            has_ended: false,
        }
    }

    /// The slot is empty from here on, so the owner task can fill it again.
    fn announce_free(&self) {
        if !self.blocked.swap(false, Ordering::SeqCst) {
            return;
        }
        let ready = Event::SlotFree {
            node: self.node.clone(),
            session: self.session,
        };
        if let Err(TrySendError::Full(ready)) = self.events.try_send(ready) {
            let events = self.events.clone();
            // If the owner task has ended, so has the slot's sender, and the stream ends.
            tokio::spawn(async move { drop(events.send(ready).await) });
        }
    }
}

impl Body for FrameBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            if let Some(message) = self.messages.pop_front() {
                self.pieces = pieces(&message);
                continue;
            }
            if self.has_ended {
                return Poll::Ready(None);
            }
            let status = match ready!(self.frames.poll_recv(cx)) {
                Some(Ok(frame)) => {
                    frame.record_taken();
                    self.announce_free();
                    self.messages = frame.into_messages().into();
                    continue;
                }
                Some(Err(status)) => status,
                None => Status::ok(""),
            };
            self.has_ended = true;
            let mut trailers = HeaderMap::new();
            status.add_header(&mut trailers)?;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended && self.pieces.is_empty()
    }
}

/// A message with its prefix: small chunks in one piece, so that they take one write, and large
/// ones as they are.
fn pieces(message: &FrameBytes) -> VecDeque<Bytes> {
    let chunks = message.chunks();
    let copied: usize = chunks
        .iter()
        .map(Bytes::len)
        .filter(|length| *length < SHARED)
        .sum();
    let mut small = BytesMut::with_capacity(PREFIX + copied);
    let mut pieces = VecDeque::new();
    small.put_u8(0);
    small.put_u32(u32::try_from(message.len()).expect("a part is smaller than 4 GiB"));
    for chunk in chunks {
        if chunk.len() < SHARED {
            small.put_slice(chunk);
            continue;
        }
        if !small.is_empty() {
            pieces.push_back(small.split().freeze());
        }
        pieces.push_back(chunk.clone());
    }
    if !small.is_empty() {
        pieces.push_back(small.freeze());
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_message_and_large_ones_are_shared() {
        let (small, large) = (Bytes::from_static(b"abc"), Bytes::from(vec![7; SHARED]));
        for chunks in [
            vec![],
            vec![small.clone()],
            vec![
                small.clone(),
                large.clone(),
                small.clone(),
                small,
                large.clone(),
            ],
        ] {
            let message = FrameBytes::new(chunks.clone(), true);
            let pieces = pieces(&message);
            let all: Vec<u8> = pieces.iter().flatten().copied().collect();
            let length = u32::try_from(message.len()).expect("short").to_be_bytes();
            assert_eq!(all[..PREFIX], [&[0][..], &length].concat());
            assert_eq!(all[PREFIX..], chunks.concat());
            let shared = pieces
                .iter()
                .filter(|piece| piece.as_ptr() == large.as_ptr())
                .count();
            assert_eq!(
                shared,
                chunks.iter().filter(|chunk| chunk.len() == SHARED).count()
            );
        }
    }
}
