//! What a node's kernel enforces, and how it is brought there: policy, routes and tunnels, connections.
//!
//! ```text
//!  records, dirty --update--> Dataplane --commit--> kernel
//!                                 ^ resync after a start, a failure, or a change by others
//! ```
//!
//! [`Dataplane`] is the seam: the agent's loop knows what to enforce and when, and nothing of how. [`nftables`] is
//! the one implementation there is; another passes the same cases, which are in `conformance`.
//! [`routes`] brings links, routes and tunnels to a plan of their own, on a thread of their own, and [`probe`] tries
//! what the kernel can do before anything depends on it.

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
use margay_calc::model::{Record, RecordId};

pub use dirty::Dirty;

/// A node's view: everything that concerns it, as typha computed it.
pub type Records = BTreeMap<RecordId, Record>;

/// The node's interfaces by name, with their addresses.
pub type Links = BTreeMap<String, BTreeSet<IpAddr>>;

/// A pod whose link is on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The pod.
    pub endpoint: EndpointKey,
    /// Its uid, as the runtime has it; empty: not known.
    pub uid: String,
    /// The addresses it may send from.
    pub addresses: Vec<IpAddr>,
}

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// Operations on the kernel; none if it held everything already.
    pub operations: usize,
    /// How often the kernel was found to hold something else than it should.
    pub repairs: u64,
    /// The comparison that was asked for could not be made: others keep changing what would be read.
    pub is_unread: bool,
}

/// The kernel does not hold what it should; what it held before stays in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct CommitError {
    /// Why, with the part that the kernel did not take.
    pub reason: String,
    /// Failures in a row.
    pub attempts: u32,
}

/// One node's enforcement of policy. Used from one thread; only [`Dataplane::is_programmed`] and
/// [`Dataplane::commit`] do I/O, and block as long as the kernel works.
///
/// A new one wants the state of an empty view, and its first commit reads back what the kernel holds.
pub trait Dataplane: Send {
    /// Whether the kernel holds something that an earlier run enforces.
    fn is_programmed(&mut self) -> io::Result<bool>;
    /// Follows the view: `dirty` names what changed in `records` since the last call.
    fn update(&mut self, records: &Records, dirty: &Dirty);
    /// A pod came to this interface, or has other addresses.
    fn attach(&mut self, interface: String, pod: Attached, records: &Records);
    /// The pod on this interface went.
    fn detach(&mut self, interface: &str, records: &Records);
    /// The node's own interfaces have these addresses now.
    fn set_links(&mut self, links: Links);
    /// The kernel may hold something else: the next commit reads it back.
    fn invalidate(&mut self);
    /// The next commit also compares everything, though nothing was noticed.
    fn request_comparison(&mut self);
    /// Tries again what the kernel refused a while ago.
    fn retry_refused(&mut self, records: &Records, now: Instant);
    /// When [`Dataplane::retry_refused`] has something to do.
    fn next_retry(&self) -> Option<Instant>;
    /// Brings the kernel to what is wanted, whole or not at all. A part that the kernel refuses is left out, what
    /// depends on it is denied, and [`Dataplane::errors`] names it.
    fn commit(&mut self, records: &Records, now: Instant) -> Result<Committed, CommitError>;
    /// The node's own interfaces, as they were set last.
    fn links(&self) -> &Links;
    /// The pods of this node by interface.
    fn attached(&self) -> &BTreeMap<String, Attached>;
    /// Whether the pod on this interface has its policy in what is wanted.
    fn decides(&self, interface: &str) -> bool;
    /// Why the pod on this interface is cut off instead of being under its policy, if that is so.
    fn refusal(&self, interface: &str) -> Option<String>;
    /// Records that are not enforced as they are written, and why.
    fn errors(&self) -> BTreeMap<RecordId, String>;
    /// What is wanted in the kernel, as text for people, with the rules of policies that it comes from.
    fn dump(&self, records: &Records) -> String;
}
