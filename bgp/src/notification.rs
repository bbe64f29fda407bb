//! NOTIFICATION: error codes, their names and data (RFC 4271 sections 4.5 and 6, 4486, 7313, 8538,
//! 9003, 9234, 9687).

use std::fmt;

/// Longest shutdown communication, in bytes (RFC 9003).
const MAX_COMMUNICATION: usize = 255;

/// A NOTIFICATION message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// Error code.
    pub code: u8,
    /// Error subcode.
    pub subcode: u8,
    /// Data; what it holds depends on the codes.
    pub data: Vec<u8>,
}

/// An error code with its subcode.
pub type Codes = (u8, u8);

/// Message header error, connection not synchronised.
pub const BAD_MESSAGE_LENGTH: Codes = (1, 2);
/// OPEN: the AS number is not that of the peer.
pub const BAD_PEER_AS: Codes = (2, 2);
/// OPEN: the BGP identifier is zero or our own.
pub const BAD_BGP_IDENTIFIER: Codes = (2, 3);
/// OPEN: hold time of one or two seconds, or below what we accept.
pub const UNACCEPTABLE_HOLD_TIME: Codes = (2, 6);
/// OPEN: a capability that we cannot do without is missing.
pub const UNSUPPORTED_CAPABILITY: Codes = (2, 7);
/// OPEN: the roles do not go together (RFC 9234).
pub const ROLE_MISMATCH: Codes = (2, 11);
/// Hold timer expired.
pub const HOLD_TIMER_EXPIRED: Codes = (4, 0);
/// A message that the state does not expect: in OpenSent (RFC 6608).
pub const UNEXPECTED_IN_OPEN_SENT: Codes = (5, 1);
/// As before, in OpenConfirm.
pub const UNEXPECTED_IN_OPEN_CONFIRM: Codes = (5, 2);
/// As before, in Established.
pub const UNEXPECTED_IN_ESTABLISHED: Codes = (5, 3);
/// Cease: more prefixes than the limit.
pub const MAX_PREFIXES: Codes = (6, 1);
/// Cease: the operator shut the session down.
pub const ADMINISTRATIVE_SHUTDOWN: Codes = (6, 2);
/// Cease: the peer is not configured any more.
pub const PEER_DECONFIGURED: Codes = (6, 3);
/// Cease: the operator restarts the session.
pub const ADMINISTRATIVE_RESET: Codes = (6, 4);
/// Cease: other configuration change.
pub const CONFIGURATION_CHANGE: Codes = (6, 6);
/// Cease: the other connection with this peer stays (RFC 4271 section 6.8).
pub const CONNECTION_COLLISION: Codes = (6, 7);
/// Cease: no room.
pub const OUT_OF_RESOURCES: Codes = (6, 8);
/// Cease: routes do not stay although graceful restart has been agreed on (RFC 8538).
pub const HARD_RESET: Codes = (6, 9);
/// ROUTE-REFRESH of a wrong length (RFC 7313 section 5).
pub const INVALID_REFRESH_LENGTH: Codes = (7, 1);
/// The peer takes nothing (RFC 9687).
pub const SEND_HOLD_TIMER_EXPIRED: Codes = (8, 0);

impl Notification {
    /// A message without data.
    pub fn new((code, subcode): Codes) -> Self {
        Self {
            code,
            subcode,
            data: Vec::new(),
        }
    }

    /// A message with data.
    pub fn with_data((code, subcode): Codes, data: &[u8]) -> Self {
        Self {
            code,
            subcode,
            data: data.to_vec(),
        }
    }

    /// A Cease with a text for the peer's operator, cut at 255 bytes (RFC 9003).
    pub fn with_communication(codes: Codes, text: &str) -> Self {
        let mut end = text.len().min(MAX_COMMUNICATION);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let length = u8::try_from(end).unwrap_or_default();
        Self::with_data(codes, &[&[length], &text.as_bytes()[..end]].concat())
    }

    /// Error code and subcode.
    pub fn codes(&self) -> Codes {
        (self.code, self.subcode)
    }

    /// The peer's routes go although graceful restart has been agreed on (RFC 8538 section 3.1).
    pub fn is_hard_reset(&self) -> bool {
        self.codes() == HARD_RESET
    }

    /// The same inside a Hard Reset: code, subcode and data are its data (RFC 8538 section 3.1).
    pub fn into_hard_reset(self) -> Self {
        let data = [&[self.code, self.subcode], self.data.as_slice()].concat();
        Self::with_data(HARD_RESET, &data)
    }

    /// The shutdown communication (RFC 9003) of an administrative shutdown or reset.
    pub fn communication(&self) -> Option<&str> {
        if ![ADMINISTRATIVE_SHUTDOWN, ADMINISTRATIVE_RESET].contains(&self.codes()) {
            return None;
        }
        let (length, text) = self.data.split_first()?;
        std::str::from_utf8(text.get(..usize::from(*length))?)
            .ok()
            .filter(|text| !text.is_empty())
    }

    fn name(&self) -> &'static str {
        match self.codes() {
            (1, 1) => "message header error: connection not synchronised",
            (1, 2) => "message header error: bad message length",
            (1, 3) => "message header error: bad message type",
            (1, _) => "message header error",
            (2, 1) => "OPEN message error: unsupported version number",
            (2, 2) => "OPEN message error: bad peer AS",
            (2, 3) => "OPEN message error: bad BGP identifier",
            (2, 4) => "OPEN message error: unsupported optional parameter",
            (2, 6) => "OPEN message error: unacceptable hold time",
            (2, 7) => "OPEN message error: unsupported capability",
            (2, 11) => "OPEN message error: role mismatch",
            (2, _) => "OPEN message error",
            (3, 1) => "UPDATE message error: malformed attribute list",
            (3, 2) => "UPDATE message error: unrecognised well-known attribute",
            (3, 3) => "UPDATE message error: missing well-known attribute",
            (3, 4) => "UPDATE message error: attribute flags error",
            (3, 5) => "UPDATE message error: attribute length error",
            (3, 6) => "UPDATE message error: invalid ORIGIN attribute",
            (3, 8) => "UPDATE message error: invalid NEXT_HOP attribute",
            (3, 9) => "UPDATE message error: optional attribute error",
            (3, 10) => "UPDATE message error: invalid network field",
            (3, 11) => "UPDATE message error: malformed AS_PATH",
            (3, _) => "UPDATE message error",
            (4, _) => "hold timer expired",
            (5, 1) => "finite state machine error: unexpected message in OpenSent",
            (5, 2) => "finite state machine error: unexpected message in OpenConfirm",
            (5, 3) => "finite state machine error: unexpected message in Established",
            (5, _) => "finite state machine error",
            _ => self.name_of_cease(),
        }
    }

    fn name_of_cease(&self) -> &'static str {
        match self.codes() {
            (6, 1) => "cease: maximum number of prefixes reached",
            (6, 2) => "cease: administrative shutdown",
            (6, 3) => "cease: peer de-configured",
            (6, 4) => "cease: administrative reset",
            (6, 5) => "cease: connection rejected",
            (6, 6) => "cease: other configuration change",
            (6, 7) => "cease: connection collision resolution",
            (6, 8) => "cease: out of resources",
            (6, 9) => "cease: hard reset",
            (6, 10) => "cease: BFD down",
            (6, _) => "cease",
            (7, _) => "ROUTE-REFRESH message error",
            (8, _) => "send hold timer expired",
            _ => "unknown error",
        }
    }
}

impl fmt::Display for Notification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}/{})", self.name(), self.code, self.subcode)?;
        if let Some(text) = self.communication() {
            // Quoted, as it is the peer's text in our log.
            write!(f, ": {text:?}")?;
        }
        if let (true, [code, subcode, data @ ..]) = (self.is_hard_reset(), self.data.as_slice()) {
            let inner = Self {
                code: *code,
                subcode: *subcode,
                data: data.to_vec(),
            };
            // One level only, whatever a peer nests.
            let inner = if inner.is_hard_reset() {
                Self::new(inner.codes())
            } else {
                inner
            };
            write!(f, " for {inner}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_are_shown_by_name_with_the_operators_text() {
        let long = "ä".repeat(200);
        let shutdown = Notification::with_communication(ADMINISTRATIVE_SHUTDOWN, "moved\nrack 7");
        let nested = Notification::new(HARD_RESET)
            .into_hard_reset()
            .into_hard_reset();
        let rows = [
            (
                Notification::new(BAD_PEER_AS),
                "OPEN message error: bad peer AS (2/2)",
            ),
            (
                shutdown.clone(),
                "cease: administrative shutdown (6/2): \"moved\\nrack 7\"",
            ),
            (
                shutdown.into_hard_reset(),
                "cease: hard reset (6/9) for cease: administrative shutdown (6/2): \"moved\\nrack \
                 7\"",
            ),
            (
                nested,
                "cease: hard reset (6/9) for cease: hard reset (6/9)",
            ),
            (Notification::new((99, 1)), "unknown error (99/1)"),
            (
                Notification::with_data(ADMINISTRATIVE_RESET, &[9, b'x']),
                "cease: administrative reset (6/4)",
            ),
        ];
        for (notification, expected) in rows {
            assert_eq!(notification.to_string(), expected);
        }
        let cut = Notification::with_communication(ADMINISTRATIVE_RESET, &long);
        assert_eq!(cut.communication().map(str::len), Some(254));
    }
}
