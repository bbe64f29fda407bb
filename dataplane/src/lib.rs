//! Brings a node's kernel to what it must enforce: policy, routes, tunnels and conntrack.
//!
//! ```text
//!  records, dirty --update--> Dataplane --commit--> kernel
//!                                 ^ resync after a start, a failure, or a change by others
//! ```
//!
//! [`Dataplane`] is the seam: the agent's loop knows what to enforce and when, but not how.
//! [`nftables`] is its only implementation; another one passes the same tests (those of
//! `conformance`). [`routes`] brings links, routes and tunnels to a plan, on a thread of its own,
//! and [`probe`] tests the kernel's features before anything depends on them.

#[cfg(any(test, feature = "testing"))]
#[allow(missing_docs, reason = "for tests")]
pub mod conformance;
mod dirty;
mod links;
pub mod nftables;
pub mod probe;
pub mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Instant;

use margay_api::endpoint::EndpointKey;
use margay_api::host_port::HostPort;
use margay_calc::model::{Record, RecordId};

pub use dirty::Dirty;

/// A node's view: the records that concern it, as computed by typha.
pub type Records = BTreeMap<RecordId, Record>;

/// The node's interfaces by name, with their addresses.
pub type Links = BTreeMap<String, BTreeSet<IpAddr>>;

/// A pod whose link is on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The pod.
    pub endpoint: EndpointKey,
    /// UID of the pod from the runtime; empty: not known.
    pub uid: String,
    /// Addresses that it may send from.
    pub addresses: Vec<IpAddr>,
    /// Ports of the node that lead to it.
    pub host_ports: Vec<HostPort>,
}

/// Result of a commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Number of operations; 0 if the kernel was up to date.
    pub operations: usize,
    /// How often the kernel differed from what it should hold.
    pub repairs: u64,
    /// The requested comparison failed, as other programs kept changing nftables.
    pub is_unread: bool,
}

/// A commit failed; what the kernel held before stays in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct CommitError {
    /// Reason, with the operation that the kernel refused.
    pub reason: String,
    /// Number of failures in a row.
    pub attempts: u32,
}

/// One node's enforcement of policy. Used from one thread. Only [`Dataplane::is_programmed`] and
/// [`Dataplane::commit`] do I/O, and block while the kernel works.
///
/// Starts with the wanted state of an empty view, and its first commit reads the kernel back.
pub trait Dataplane: Send {
    /// Whether the kernel holds the state of an earlier run.
    fn is_programmed(&mut self) -> io::Result<bool>;
    /// Updates the wanted state; `dirty` names what changed in `records` since the last call.
    fn update(&mut self, records: &Records, dirty: &Dirty);
    /// Attaches a pod to an interface, or changes its addresses.
    fn attach(&mut self, interface: String, pod: Attached, records: &Records);
    /// Detaches the pod of an interface.
    fn detach(&mut self, interface: &str, records: &Records);
    /// Replaces the node's own interfaces and addresses.
    fn set_links(&mut self, links: Links);
    /// Marks the kernel's state unknown: the next commit reads it back.
    fn invalidate(&mut self);
    /// Has the next commit compare everything with the kernel, even if no change was noticed.
    fn request_comparison(&mut self);
    /// Includes parts again that the kernel refused, once their retry is due.
    fn retry_refused(&mut self, records: &Records, now: Instant);
    /// When [`Dataplane::retry_refused`] has something to do.
    fn next_retry(&self) -> Option<Instant>;
    /// Programs the wanted state, all of it or nothing. A part that the kernel refuses is left out,
    /// what depends on it is denied, and [`Dataplane::errors`] names it.
    fn commit(&mut self, records: &Records, now: Instant) -> Result<Committed, CommitError>;
    /// The node's own interfaces, as set last.
    fn links(&self) -> &Links;
    /// The pods of this node by interface.
    fn attached(&self) -> &BTreeMap<String, Attached>;
    /// Whether the policy of the interface's pod is in the wanted state.
    fn has_policy(&self, interface: &str) -> bool;
    /// Why the interface's pod is cut off instead of under its policy, if so.
    fn refusal(&self, interface: &str) -> Option<String>;
    /// Records that are not enforced as written, with the reason.
    fn errors(&self) -> BTreeMap<RecordId, String>;
    /// Renders the wanted state as text for debugging, with the policy rules that it comes from.
    fn dump(&self, records: &Records) -> String;
}
