//! Messages to bytes and back.
//!
//! The bytes are rustbgpd-wire's; this module alone sees it. It was chosen over netgauze-bgp-pkt and
//! over a codec of our own:
//!
//! | | rustbgpd-wire 0.27 | netgauze-bgp-pkt 0.13 |
//! |---|---|---|
//! | Licence | MIT or Apache-2.0 | Apache-2.0 |
//! | Brings | bytes, thiserror | its own parser and registry crates, serde, strum_macros |
//! | Made for | a daemon of its own | collectors that must decode whatever they see |
//! | RFC 7606 | each error with its consequence: discard, withdraw, reset | malformed attributes can be skipped; their consequence is left to the caller |
//! | RFC 6793 | AS4_PATH is merged | attributes as they are |
//! | NOTIFICATION for an error | codes and data | left to the caller |
//! | RFC 4760, 8092, 4724, 8538, 2918, 7313, 9234, 8950 | all | all |
//! | Two million mutations of what daemons send | no panic, 1.0 µs each | no panic, 1.6 µs each |
//!
//! Both decode everything that BIRD 2.0.12, FRR 8.4.4 and GoBGP 3.10.0 send (`tests/data`). What
//! decided is RFC 7606, whose rules are the part of a codec that is easiest to get wrong: of the
//! mutations one in thirty is a route to be withdrawn, which netgauze-bgp-pkt tells from the rest only
//! by what it left out.
//!
//! Its price: minor versions change its interface, it knows twenty families that we do not, and it
//! takes RFC 9774 at its word (routes with an AS_SET are withdrawn). So its types end here. What
//! is kept of a message is bounded by the message, which is bounded by 4096 bytes: extended
//! messages (RFC 8654) are not offered.

mod decode;
mod encode;

pub use decode::{CodecContext, DecodeError, decode};
pub use encode::{Plain, encode, encode_update, end_of_rib, refresh};

/// Longest message, in bytes (RFC 4271 section 4.1).
pub const MAX_MESSAGE: usize = 4096;

/// Length of the header, in bytes.
pub const HEADER: usize = 19;

/// Cuts a stream of bytes into messages. Holds less than one message.
#[derive(Debug, Default)]
pub struct Framer {
    held: Vec<u8>,
}

impl Framer {
    /// Takes bytes in from the stream and calls `each` for every message that they complete, until
    /// it says that no more are wanted.
    ///
    /// # Errors
    ///
    /// A header that is not one: marker, length or type (RFC 4271 section 6.1). The stream cannot
    /// be read any further then.
    pub fn push(
        &mut self,
        mut bytes: &[u8],
        each: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<(), DecodeError> {
        loop {
            if self.held.is_empty() {
                // Messages that are whole are not copied.
                let Some(length) =
                    decode::message_length(bytes)?.filter(|length| *length <= bytes.len())
                else {
                    self.held.extend_from_slice(bytes);
                    return Ok(());
                };
                let (message, rest) = bytes.split_at(length);
                bytes = rest;
                if !each(message) {
                    return Ok(());
                }
                continue;
            }
            let wanted = decode::message_length(&self.held)?.unwrap_or(HEADER);
            let (more, rest) = bytes.split_at(bytes.len().min(wanted - self.held.len()));
            self.held.extend_from_slice(more);
            bytes = rest;
            match decode::message_length(&self.held)? {
                Some(length) if length == self.held.len() => {
                    let message = std::mem::take(&mut self.held);
                    if !each(&message) {
                        return Ok(());
                    }
                }
                _ if bytes.is_empty() => return Ok(()),
                _ => {}
            }
        }
    }

    /// Bytes of an unfinished message.
    pub fn held(&self) -> usize {
        self.held.len()
    }
}
