//! The graph and the sessions that it feeds: who is told what, as which bytes. No I/O except into the sessions' slots.
//!
//! A session has a slot for one frame. When the slot is free and the session has news, a frame is made from what is true
//! now. A change that many nodes are told is encoded once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use margay_calc::digest;
use margay_calc::flush::{Audience, Change, MemberDelta, RecordChange};
use margay_calc::graph::Graph;
use margay_calc::model::{RecordId, SetKind};
use margay_proto::sync::{ChangeRef, Trailer, encode_change, encode_compact, encode_trailer};
use margay_runtime::telemetry::{self, Traceparent};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tonic::Status;
use tracing::info_span;

use crate::codec::FrameBytes;
use crate::metrics::Counters;
use crate::registry::{Node, Registry, Sent};
use crate::session::{Records, Session, SharedDelta, differing};

/// Encoded values that are kept for the next stream that needs them; beyond that all are forgotten and made again.
const KEPT: usize = 8 << 20;

/// What fills a session's slot: a frame, or why the stream ends.
pub type Slot = mpsc::Sender<Result<FrameBytes, Status>>;

/// A node that wants its view.
#[derive(Debug)]
pub struct Hello {
    /// The node, by its certificate.
    pub node: String,
    /// Number of the session in this process.
    pub session: u64,
    /// What the agent calls its version.
    pub agent_version: String,
    /// Digests of what it holds.
    pub buckets: Vec<u64>,
    /// What it can read.
    pub reads: Reads,
    /// Where its frames go; of capacity one.
    pub slot: Slot,
    /// Set when a frame could not be put into the slot: whoever empties the slot then says so.
    pub blocked: Arc<AtomicBool>,
}

/// What an agent can read, by its hello.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reads {
    /// Host endpoints, which it enforces.
    pub host_endpoints: bool,
    /// Shared lists of ports, sets in several changes, frames in parts.
    pub compact: bool,
}

/// The newest event behind a change.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cause {
    /// When typha saw it, in nanoseconds since the epoch.
    pub seen_unix_ns: u64,
    /// The trace that it belongs to.
    pub trace: Option<Traceparent>,
}

/// Owner of graph and sessions.
#[derive(Debug)]
pub struct Hub {
    /// What every node must enforce.
    pub graph: Graph,
    revision: u64,
    live: BTreeMap<String, Live>,
    encoded: Encoded,
    registry: Registry,
    counters: Counters,
}

#[derive(Debug)]
struct Live {
    session: Session,
    id: u64,
    slot: Slot,
    blocked: Arc<AtomicBool>,
    node: Arc<Node>,
    reads: Reads,
    /// Cause of the newest news not sent yet; the frame carries it.
    cause: Cause,
    /// The registry knows that records wait here.
    is_waiting: bool,
}

impl Hub {
    /// A hub without sessions.
    pub fn new(registry: Registry, counters: Counters) -> Self {
        Self {
            graph: Graph::default(),
            revision: 0,
            live: BTreeMap::new(),
            encoded: Encoded::default(),
            registry,
            counters,
        }
    }

    /// Computes what changed and tells every session that can be told.
    pub fn flush(&mut self, cause: Cause) {
        let flush = self.graph.flush();
        if !flush.records.is_empty() {
            self.revision += 1;
            self.registry.set_revision(self.revision);
            self.counters.flushes.inc();
        }
        let span = info_span!("calc.flush", revision = self.revision, records = flush.records.len());
        if let Some(trace) = cause.trace {
            telemetry::set_parent(&span, trace);
        }
        let _entered = span.enter();
        for (id, change) in flush.records {
            self.encoded.forget(&id);
            self.distribute(Arc::new(id), change, cause);
        }
        self.pump(telemetry::of(&span).is_some());
    }

    /// Gives a frame to every session that has news and a free slot.
    fn pump(&mut self, traced: bool) {
        let mut closed = Vec::new();
        for (name, live) in &mut self.live {
            let compact = live.reads.compact;
            let mut source = Source { node: name, graph: &self.graph, encoded: &mut self.encoded, compact };
            if live.session.pending() == 0 {
                wait(&live.node, &mut live.is_waiting, 0);
            } else if !live.send(&mut source, self.revision, &self.counters, traced) {
                closed.push((name.clone(), live.id));
            }
        }
        for (name, id) in closed {
            self.leave(&name, id);
        }
    }

    /// Records that the node does not know the latest of.
    pub fn pending(&self, node: &str) -> usize {
        self.live.get(node).map_or(0, |live| live.session.pending())
    }

    /// Whether the node has a session.
    pub fn has(&self, node: &str) -> bool {
        self.live.contains_key(node)
    }

    /// Whether a session waits for a frame that could not be sent when it was due.
    pub fn is_waiting(&self, node: &str, session: u64) -> bool {
        self.live.get(node).is_some_and(|live| live.id == session && live.session.pending() > 0)
    }

    /// Answers a hello with the difference between what the node holds and its view. The graph must be flushed.
    pub fn hello(&mut self, hello: Hello) {
        let view = self.graph.view(&hello.node);
        let knows = |id: &RecordId| knows(hello.reads, id);
        let mut buckets = view.buckets();
        for (id, digest) in view.host_endpoints().filter(|(id, _)| !knows(id)) {
            digest::subtract(&mut buckets, &id, digest);
        }
        let restated = differing(&hello.buckets, &buckets);
        let node = self.registry.enter(&hello.node, hello.session, hello.agent_version);
        let compact = hello.reads.compact;
        let mut source = Source { node: &hello.node, graph: &self.graph, encoded: &mut self.encoded, compact };
        let wanted = view.ids().filter(|id| knows(id) && restated.contains(&digest::bucket(id)));
        let mut pieces: Vec<Bytes> = wanted.filter_map(|id| source.value(&id)).collect();
        self.counters.hellos.inc();
        self.counters.restated.inc_by(restated.len() as u64);
        self.revision = self.revision.max(1);
        self.registry.set_revision(self.revision);
        pieces.push(encode_trailer(&Trailer {
            revision: self.revision,
            restated_buckets: restated,
            in_sync: true,
            ..Trailer::default()
        }));
        let frame = FrameBytes::new(pieces, compact);
        let sent = Sent { revision: self.revision, at: Instant::now(), event_unix_ns: 0, trace: None };
        self.counters.frames.inc();
        self.counters.bytes.inc_by(frame.len() as u64);
        node.sent(sent, frame.len());
        // The slot is new, so it is free unless the node has gone already; then its reader tells.
        let _ = hello.slot.try_send(Ok(frame));
        let live = Live {
            session: Session::default(),
            id: hello.session,
            slot: hello.slot,
            blocked: hello.blocked,
            node,
            reads: hello.reads,
            cause: Cause::default(),
            is_waiting: false,
        };
        if let Some(former) = self.live.insert(hello.node, live) {
            let reason = "the node has opened another stream";
            let _ = former.slot.try_send(Err(Status::aborted(reason)));
        }
    }

    /// The session is over.
    pub fn leave(&mut self, node: &str, session: u64) {
        if self.live.get(node).is_some_and(|live| live.id == session) {
            self.live.remove(node);
        }
        self.registry.leave(node, session);
    }

    /// Ends one session with this status, and says whether there are more.
    pub fn dismiss(&mut self, status: Status) -> bool {
        if let Some((node, live)) = self.live.pop_first() {
            // With a frame in the slot the stream ends behind it, for want of a sender.
            let _ = live.slot.try_send(Err(status));
            self.registry.leave(&node, live.id);
        }
        !self.live.is_empty()
    }

    /// Nodes with a session.
    pub fn sessions(&self) -> usize {
        self.live.len()
    }

    /// Number of the newest flush that changed something.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    fn distribute(&mut self, id: Arc<RecordId>, change: RecordChange, cause: Cause) {
        let RecordChange { gained, kept, change, lost } = change;
        self.each(&id, &lost, cause, |session| session.lost(&id));
        self.each(&id, &gained, cause, |session| session.gained(&id));
        match change {
            Change::Same => {}
            Change::Value => self.each(&id, &kept, cause, |session| session.changed(&id)),
            Change::Members(delta) => {
                if let RecordId::IpSet(set) = &*id
                    && let Some((kind, _)) = self.graph.ip_set(set)
                {
                    // Whoever reads members reads them in several changes.
                    let bytes = encode_compact(ChangeRef::Members(set, kind, &delta));
                    let shared = Arc::new(SharedDelta { kind, delta, bytes });
                    self.each(&id, &kept, cause, |session| session.members(&id, &shared));
                }
            }
        }
    }

    fn each(&mut self, id: &RecordId, audience: &Audience, cause: Cause, mut tell: impl FnMut(&mut Session)) {
        let mut tell = |live: &mut Live| {
            if knows(live.reads, id) {
                live.cause = cause;
                tell(&mut live.session);
            }
        };
        match audience {
            Audience::All => self.live.values_mut().for_each(tell),
            Audience::Nodes(nodes) => {
                for node in nodes {
                    if let Some(live) = self.live.get_mut(node) {
                        tell(live);
                    }
                }
            }
        }
    }
}

impl Live {
    /// Sends what is pending if the slot is free; false when the stream has ended.
    fn send(&mut self, source: &mut Source<'_>, revision: u64, counters: &Counters, traced: bool) -> bool {
        let permit = match self.slot.try_reserve() {
            Err(TrySendError::Full(())) => {
                // Whoever empties the slot looks at the flag afterwards, so one of the two sees the other.
                self.blocked.store(true, Ordering::SeqCst);
                self.slot.try_reserve()
            }
            outcome => outcome,
        };
        let permit = match permit {
            Ok(permit) => permit,
            Err(TrySendError::Full(())) => {
                wait(&self.node, &mut self.is_waiting, self.session.pending());
                return true;
            }
            Err(TrySendError::Closed(())) => return false,
        };
        let mut pieces = self.session.take(source);
        if pieces.is_empty() {
            wait(&self.node, &mut self.is_waiting, 0);
            return true;
        }
        let span = traced.then(|| info_span!("session.send", node = %self.node.name, revision));
        let trace = span.as_ref().and_then(telemetry::of).or(self.cause.trace);
        pieces.push(encode_trailer(&Trailer {
            revision,
            traceparent: trace.map(|trace| trace.to_string()).unwrap_or_default(),
            event_unix_ns: self.cause.seen_unix_ns,
            ..Trailer::default()
        }));
        let frame = FrameBytes::new(pieces, self.reads.compact);
        counters.frames.inc();
        counters.bytes.inc_by(frame.len() as u64);
        let sent = Sent { revision, at: Instant::now(), event_unix_ns: self.cause.seen_unix_ns, trace };
        self.node.sent(sent, frame.len());
        self.is_waiting = false;
        permit.send(Ok(frame));
        true
    }
}

/// Tells how many records wait, where that is not known: news that have cancelled each other out wait no more.
fn wait(node: &Node, is_known: &mut bool, pending: usize) {
    if pending > 0 || *is_known {
        *is_known = pending > 0;
        node.waiting(pending);
    }
}

/// Whether a node can read the record.
fn knows(reads: Reads, id: &RecordId) -> bool {
    reads.host_endpoints || !matches!(id, RecordId::HostEndpoint(_))
}

/// Values in encoded form, for sessions that need the same ones and read the same.
#[derive(Debug, Default)]
struct Encoded {
    /// In full, and compact.
    values: [HashMap<RecordId, Bytes>; 2],
    bytes: usize,
}

impl Encoded {
    fn forget(&mut self, id: &RecordId) {
        for values in &mut self.values {
            if let Some(value) = values.remove(id) {
                self.bytes -= value.len();
            }
        }
    }

    fn keep(&mut self, id: &RecordId, compact: bool, value: &Bytes) {
        if self.bytes + value.len() > KEPT {
            *self = Self::default();
        }
        self.bytes += value.len();
        self.values[usize::from(compact)].insert(id.clone(), value.clone());
    }
}

/// Gives sessions the bytes that they need.
struct Source<'a> {
    node: &'a str,
    graph: &'a Graph,
    encoded: &'a mut Encoded,
    compact: bool,
}

impl Records for Source<'_> {
    fn value(&mut self, id: &RecordId) -> Option<Bytes> {
        if let Some(value) = self.encoded.values[usize::from(self.compact)].get(id) {
            return Some(value.clone());
        }
        let record = self.graph.record_for(self.node, id)?;
        let change = ChangeRef::Upsert(id, &record);
        let value = if self.compact { encode_compact(change) } else { encode_change(change) };
        // An endpoint is for one node only, and settings may be.
        if !matches!(id, RecordId::Endpoint(_) | RecordId::HostEndpoint(_) | RecordId::Settings) {
            self.encoded.keep(id, self.compact, &value);
        }
        Some(value)
    }

    fn members(&mut self, id: &RecordId, kind: SetKind, delta: &MemberDelta) -> Bytes {
        match id {
            RecordId::IpSet(set) => encode_compact(ChangeRef::Members(set, kind, delta)),
            _ => Bytes::new(),
        }
    }

    fn removal(&mut self, id: &RecordId) -> Bytes {
        encode_change(ChangeRef::Remove(id))
    }
}
