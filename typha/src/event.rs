//! Messages to the owner task.

use std::collections::BTreeSet;

use margay_api::report::{Entry, Listing};
use margay_calc::conflict::Conflict;
use margay_proto::sync::LocalEndpoint;
use tokio::sync::oneshot;

use crate::cache::Cache;
use crate::cause::Cause;
use crate::freshness::Freshness;
use crate::hello::Hello;
use crate::hub::Hub;
use crate::object::{Missing, ObjectKey, Observed, subject};
use crate::placement::Replica;

/// State of the owner task as a query sees it.
#[derive(Clone, Copy)]
pub struct Snapshot<'a> {
    /// Latest state of the API.
    pub cache: &'a Cache,
    /// Graph and sessions.
    pub hub: &'a Hub,
    /// Conflicts as of the last check.
    pub conflicts: &'a BTreeSet<Conflict>,
    /// Versions of the API that this replica knows.
    pub freshness: &'a Freshness,
}

impl Snapshot<'_> {
    /// Objects that are refused or conflict with others.
    pub fn problems(&self) -> Listing {
        let refused = self
            .cache
            .problems()
            .map(|(kind, key, reasons)| (subject(kind, key), reasons.join("; ")));
        let conflicts = self
            .conflicts
            .iter()
            .map(|conflict| (conflict.object(), conflict.reason()));
        Listing::of(refused.chain(conflicts), |(subject, reason)| {
            Entry::new(&subject, &reason)
        })
    }
}

/// A function to call with the current state.
pub type Query = Box<dyn for<'a> FnOnce(Snapshot<'a>) + Send>;

/// A message to the owner task.
pub enum Event {
    /// A list of the kind starts.
    ListStarted(&'static str),
    /// Objects of the kind were received.
    Observed {
        /// The kind.
        kind: &'static str,
        /// The objects.
        objects: Vec<Observed>,
        /// Time and trace.
        cause: Cause,
    },
    /// An object of the kind was deleted.
    Deleted {
        /// The kind.
        kind: &'static str,
        /// The object.
        key: ObjectKey,
        /// Time.
        cause: Cause,
    },
    /// A list of the kind is complete; the reply is what it lacks. Nothing is removed yet.
    ListCompleted {
        /// The kind.
        kind: &'static str,
        /// Maximal number of missing objects in the reply.
        limit: usize,
        /// Receives the reply.
        reply: oneshot::Sender<Missing>,
    },
    /// Removes what the latest list of the kind lacks, which is then complete.
    Sweep {
        /// The kind.
        kind: &'static str,
        /// Version of the list; 0 if it is not a number.
        version: u64,
        /// Version of the newest object in it.
        newest: u64,
    },
    /// The API server answers the watch of the kind: it has begun, or nothing has changed up to a
    /// version.
    Answered {
        /// The kind.
        kind: &'static str,
        /// Version of the kind; 0 if it is not a number.
        version: u64,
    },
    /// The API server does not answer the watch of the kind.
    Unanswered {
        /// The kind.
        kind: &'static str,
        /// Why not.
        reason: String,
    },
    /// These replicas are ready.
    Replicas(Vec<Replica>),
    /// A node opens a session.
    Hello(Hello),
    /// A node's slot, which was full when a frame was due, is free.
    SlotFree {
        /// The node.
        node: String,
        /// Its session.
        session: u64,
    },
    /// A node reports the addresses of one of its pods.
    LocalEndpoint {
        /// The node, by its certificate.
        node: String,
        /// The report.
        report: LocalEndpoint,
    },
    /// A session has ended.
    Disconnected {
        /// The node.
        node: String,
        /// Its session.
        session: u64,
    },
    /// Calls a function with the current state.
    Query(Query),
}
