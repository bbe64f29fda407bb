//! The stream between typha and a node: wire to model and back.
//!
//! The server encodes each change once, with [`encode_change`], and a frame is the changes' bytes one after another with
//! [`encode_trailer`] behind them. Decoding accepts nothing that the model cannot hold and fills in nothing: whatever is
//! missing or out of range is named by [`Error`]. Fields that are not known are ignored.

mod decode;
mod encode;
mod members;
mod parts;
mod problem;

use std::net::IpAddr;

use margay_api::endpoint::EndpointKey;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{Record, RecordId, SetId, SetKind};

pub use decode::{
    decode_ack, decode_change, decode_frame, decode_id, decode_local_endpoint, decode_problems, decode_record,
};
pub use encode::{
    encode_ack, encode_change, encode_compact, encode_id, encode_local_endpoint, encode_problems, encode_record,
    encode_trailer,
};
pub use parts::{Joiner, split};
pub use problem::NodeProblem;

/// The messages and services as generated.
pub use crate::generated::sync::v1 as wire;

/// The largest message that a node must take, in bytes: a server that knows no parts of frames sends a whole view as one. Those that do stay near [`PART`].
pub const MAX_FRAME: usize = 256 << 20;
/// A frame is sent in parts of at most so many bytes, but for a change that is larger alone: a policy at its limits is a few times as large.
pub const PART: usize = 1 << 20;
/// The largest message that a server must take, in bytes: an Ack with [`ERRORS`] errors of records with long names.
pub const MAX_UP: usize = 256 << 10;
/// Errors that an Ack has at most; those of more records are told when these are mended.
pub const ERRORS: usize = 128;
/// Bytes of the reason of one, at most.
pub const REASON: usize = 512;
/// The longest name of an object, and uid, in bytes.
pub const NAME: usize = 253;
/// Addresses that a node tells of one pod, at most: as a rule it has one of each IP version.
pub const ADDRESSES: usize = 8;

/// One change of what a node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The record has this value.
    Upsert(RecordId, Record),
    /// The record is not in the view any more.
    Remove(RecordId),
    /// Members of a set that the node holds came and went.
    Members(SetId, SetKind, MemberDelta),
}

/// A [`Change`] whose parts belong to somebody else.
#[derive(Clone, Copy, Debug)]
pub enum ChangeRef<'a> {
    /// See [`Change::Upsert`].
    Upsert(&'a RecordId, &'a Record),
    /// See [`Change::Remove`].
    Remove(&'a RecordId),
    /// See [`Change::Members`].
    Members(&'a SetId, SetKind, &'a MemberDelta),
}

impl<'a> From<&'a Change> for ChangeRef<'a> {
    fn from(change: &'a Change) -> Self {
        match change {
            Change::Upsert(id, record) => Self::Upsert(id, record),
            Change::Remove(id) => Self::Remove(id),
            Change::Members(set, kind, delta) => Self::Members(set, *kind, delta),
        }
    }
}

/// What a frame says beside its changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trailer {
    /// Revision of the server that the node has reached with this frame.
    pub revision: u64,
    /// Buckets that are restated in full, ascending; at `in_sync` the node drops what it holds in them and was not told again.
    pub restated_buckets: Vec<u32>,
    /// The node now holds its whole view.
    pub in_sync: bool,
    /// Trace context of the newest event that contributed; may be empty.
    pub traceparent: String,
    /// When the server saw that event, in nanoseconds since the epoch; 0 when there is none.
    pub event_unix_ns: u64,
}

/// A frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// Changes in the order in which they are to be applied.
    pub changes: Vec<Change>,
    /// The rest.
    pub trailer: Trailer,
}

/// The node has committed a revision, and all before it, to the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// The revision.
    pub revision: u64,
    /// Records that could not be enforced, and why.
    pub errors: Vec<(RecordId, String)>,
    /// How long it took to compute what the kernel must hold, in microseconds.
    pub plan_us: u64,
    /// How long the kernel took, in microseconds.
    pub commit_us: u64,
    /// Trace context of the node's work; may be empty.
    pub traceparent: String,
}

/// Addresses that a node gave to one of its pods, before the API knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// The pod.
    pub key: EndpointKey,
    /// Its addresses; none: it has none any more.
    pub addresses: Vec<IpAddr>,
    /// The pod's uid, so that a later pod of the same name is not mistaken for it.
    pub uid: String,
}

/// A message that the model cannot hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field that must be there is not, or is of a kind that this version does not know.
    #[error("{field}: missing, or of a kind that this version does not know")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A number is outside what it may be.
    #[error("{field}: {value} is not within {rule}")]
    Number {
        /// The field.
        field: &'static str,
        /// The number.
        value: u64,
        /// What it may be.
        rule: &'static str,
    },
    /// A text is not what it must be.
    #[error("{field}: {value:?} is not {rule}")]
    Text {
        /// The field.
        field: &'static str,
        /// The text, cut to a length that can be logged.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// Bytes are not of the length that they must have.
    #[error("{field}: {length} bytes, which is not {rule}")]
    Length {
        /// The field.
        field: &'static str,
        /// The length found.
        length: usize,
        /// The length demanded.
        rule: &'static str,
    },
    /// The id of a record says one kind and its value is of another.
    #[error("record {id}: its value is of another kind than its id")]
    Kind {
        /// The id.
        id: String,
    },
}
