//! Request of a node to open a session.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use margay_proto::sync::Versions;
use tokio::sync::mpsc;
use tonic::Status;

use crate::codec::FrameBytes;

/// Sender for a session's next item: a frame, or the reason why the stream ends.
pub type Slot = mpsc::Sender<Result<FrameBytes, Status>>;

/// The same, without keeping the stream open.
pub type WeakSlot = mpsc::WeakSender<Result<FrameBytes, Status>>;

/// A node that requests its view.
#[derive(Debug)]
pub struct Hello {
    /// The node, by its certificate.
    pub node: String,
    /// Number of the session in this process.
    pub session: u64,
    /// Version reported by the agent.
    pub agent_version: String,
    /// Digests of what it holds.
    pub buckets: Vec<u64>,
    /// Versions of the API that its view takes into account.
    pub versions: Versions,
    /// It has other replicas to try.
    pub has_alternatives: bool,
    /// What the agent supports.
    pub capabilities: Capabilities,
    /// Takes its frames; of capacity one.
    pub slot: Slot,
    /// Set when a frame was due and the slot full: the receiver then sends an event once it is
    /// free.
    pub blocked: Arc<AtomicBool>,
}

/// Optional parts of the protocol that an agent supports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Host endpoints, which it enforces.
    pub host_endpoints: bool,
    /// A BGP speaker.
    pub bgp: bool,
    /// Shared port lists, sets in several changes, frames in parts.
    pub compact: bool,
}
