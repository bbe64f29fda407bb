//! Stream between typha and a node agent: conversion between wire and model.
//!
//! The server encodes each change once, with [`encode_change`]; a frame is the concatenation of its
//! changes' bytes and an [`encode_trailer`]. Decoding accepts only what the model can hold and sets
//! no defaults: [`Error`] names what is missing or out of range. Unknown fields are ignored.

mod bgp;
mod decode;
mod encode;
mod fields;
mod members;
mod parts;
mod problem;
mod settings;

use std::collections::BTreeMap;
use std::net::IpAddr;

use margay_api::endpoint::EndpointKey;
use margay_calc::flush::MemberDelta;
use margay_calc::model::{Record, RecordId, SetId, SetKind};

pub use decode::{
    decode_ack, decode_change, decode_frame, decode_id, decode_local_endpoint, decode_problems,
    decode_record, decode_versions,
};
pub use encode::{
    encode_ack, encode_change, encode_compact, encode_id, encode_local_endpoint, encode_problems,
    encode_record, encode_trailer, encode_versions,
};
pub use parts::{Joiner, split};
pub use problem::NodeProblem;

/// Generated messages and services.
pub use crate::generated::sync::v1 as wire;

/// Maximal message that a node must accept, in bytes: a server without partial frames sends a whole
/// view in one message. Others stay near [`PART_SIZE`].
pub const MAX_FRAME: usize = 256 << 20;
/// Size above which a frame is sent in parts, in bytes. A single change may be larger: a policy at
/// its limits is a few times as large.
pub const PART_SIZE: usize = 1 << 20;
/// Maximal message that a server must accept, in bytes: an Ack with [`MAX_ERRORS`] errors of
/// records with long names.
pub const MAX_UP: usize = 256 << 10;
/// Maximal number of errors in an Ack; errors of further records are reported once these are
/// resolved.
pub const MAX_ERRORS: usize = 128;
/// Maximal length of the reason of an error, in bytes.
pub const MAX_REASON: usize = 512;
/// Maximal length of an object's name, and of a uid, in bytes.
pub const MAX_NAME: usize = 253;
/// Maximal number of addresses that a node reports for one pod; usually there is one per IP
/// version.
pub const MAX_ADDRESSES: usize = 8;
/// Maximal number of kinds in a message's versions, a few times as many as there are.
pub const MAX_KINDS: usize = 128;
/// Metadata of the status of a refused or closed stream: servers to try, separated by commas.
pub const SERVERS_METADATA: &str = "margay-servers";

/// Change of a record that a node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets the value of a record.
    Upsert(RecordId, Record),
    /// Removes a record from the view.
    Remove(RecordId),
    /// Adds and removes members of a set that the node holds.
    Members(SetId, SetKind, MemberDelta),
}

/// A [`Change`] with borrowed parts.
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

/// Fields of a frame besides its changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trailer {
    /// Revision of the server that the node has after this frame.
    pub revision: u64,
    /// Buckets that are resent in full, ascending; at `in_sync` the node drops records in them that
    /// were not resent.
    pub restated_buckets: Vec<u32>,
    /// The node now has its whole view.
    pub in_sync: bool,
    /// Trace context of the latest event that contributed; may be empty.
    pub traceparent: String,
    /// Time at which the server received that event, in nanoseconds since the epoch; 0 if there is
    /// none.
    pub event_unix_ns: u64,
    /// Versions of the API that the view takes into account, of the kinds of which something was
    /// applied: all of these with `in_sync`, else since the last frame.
    pub versions: Versions,
    /// Ready replicas as `ADDRESS:PORT`, in the order in which the node is to try them; empty: as
    /// before.
    pub servers: Vec<String>,
}

/// Resource versions of the API by kind of object, as typha names the kind.
pub type Versions = BTreeMap<String, u64>;

/// A frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// Changes in the order in which they must be applied.
    pub changes: Vec<Change>,
    /// The other fields.
    pub trailer: Trailer,
}

/// Acknowledges that a revision, and all before it, are committed to the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// The revision.
    pub revision: u64,
    /// Records that could not be enforced, with the reason.
    pub errors: Vec<(RecordId, String)>,
    /// Time to compute the wanted kernel state, in microseconds.
    pub plan_us: u64,
    /// Time to commit it to the kernel, in microseconds.
    pub commit_us: u64,
    /// Trace context of the node's work; may be empty.
    pub traceparent: String,
    /// Time from the commit to the sending of the ack, in microseconds.
    pub waited_us: u64,
}

/// Addresses that a node assigned to one of its pods, before they are in the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// The pod.
    pub key: EndpointKey,
    /// Its addresses; empty: the pod has none any more.
    pub addresses: Vec<IpAddr>,
    /// Uid of the pod, to distinguish it from a later pod of the same name.
    pub uid: String,
}

/// Error of a message that the model cannot hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A required field is missing, or is of a kind that this version does not know.
    #[error("{field}: missing, or of a kind that this version does not know")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A number is out of range.
    #[error("{field}: {value} is not within {rule}")]
    Number {
        /// The field.
        field: &'static str,
        /// The number.
        value: u64,
        /// Its range.
        rule: &'static str,
    },
    /// A string is malformed.
    #[error("{field}: {value:?} is not {rule}")]
    Text {
        /// The field.
        field: &'static str,
        /// The string, cut to a length that can be logged.
        value: String,
        /// Its required form.
        rule: &'static str,
    },
    /// A byte field has the wrong length.
    #[error("{field}: {length} bytes, which is not {rule}")]
    Length {
        /// The field.
        field: &'static str,
        /// The actual length.
        length: usize,
        /// The required length.
        rule: &'static str,
    },
    /// Id and value of a record are of different kinds.
    #[error("record {id}: its value is of another kind than its id")]
    Kind {
        /// The id.
        id: String,
    },
}
