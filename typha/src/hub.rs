//! Graph and sessions: distributes the records of a flush to the sessions of the nodes concerned,
//! in encoded form. No I/O except into the sessions' slots.
//!
//! A session has a slot for one frame. When the slot is free and the session has pending changes, a
//! frame is built from the current state. A change that many nodes get is encoded once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use margay_calc::digest;
use margay_calc::flush::{Audience, Change, MemberDelta, RecordChange};
use margay_calc::graph::Graph;
use margay_calc::model::{RecordId, SetKind};
use margay_proto::sync::{
    ChangeRef, SERVERS_METADATA, Trailer, Versions, encode_change, encode_compact, encode_trailer,
};
use margay_runtime::telemetry;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::Instant;
use tonic::Status;
use tracing::info_span;

use crate::cause::Cause;
use crate::codec::FrameBytes;
use crate::delivery::{Delivery, FlushPace};
use crate::hello::{Capabilities, Hello, Slot, WeakSlot};
use crate::metrics::Counters;
use crate::placement::{Placement, zone_of};
use crate::registry::{NodeSession, Registry, SentFrame};
use crate::session::{RecordSource, Session, SharedDelta, differing_buckets};

/// Maximal size of encoded values cached for other sessions, in bytes; beyond that the cache is
/// cleared.
const MAX_CACHED_BYTES: usize = 8 << 20;
/// Time after which a node that has not taken its view no longer delays others.
const STALLED: Duration = Duration::from_secs(1);

/// Owner of graph and sessions.
#[derive(Debug)]
pub struct Hub {
    /// Graph with the view of every node.
    pub graph: Graph,
    /// Which replica serves which node.
    pub placement: Placement,
    /// Versions of the API that the graph takes into account, by kind, each with the value of
    /// `version_changes` since which it is known.
    versions: BTreeMap<&'static str, (u64, u64)>,
    version_changes: u64,
    /// Slots of sessions that were opened lately, and when: their views may be under way.
    opening: Vec<(WeakSlot, Instant)>,
    revision: u64,
    live: BTreeMap<String, LiveSession>,
    encoded: EncodeCache,
    registry: Registry,
    counters: Counters,
    /// Frames of the last flush, and their number.
    delivery: (Arc<Delivery>, u64),
    pace: FlushPace,
}

#[derive(Debug)]
struct LiveSession {
    session: Session,
    id: u64,
    slot: Slot,
    blocked: Arc<AtomicBool>,
    node: Arc<NodeSession>,
    capabilities: Capabilities,
    /// Cause of the latest pending change; the frame carries it.
    cause: Cause,
    /// The registry knows that records are pending here.
    is_waiting: bool,
    /// Value of `version_changes` as of the last frame.
    versions_sent: u64,
    /// Generation of the placement as of the last frame.
    placement_sent: u64,
}

/// What a frame says besides its changes.
struct FrameContext<'a> {
    revision: u64,
    versions: &'a BTreeMap<&'static str, (u64, u64)>,
    version_changes: u64,
    placement: &'a Placement,
    counters: &'a Counters,
    delivery: &'a Arc<Delivery>,
    traced: bool,
}

impl Hub {
    /// Creates a hub without sessions.
    pub fn new(registry: Registry, counters: Counters) -> Self {
        Self {
            graph: Graph::default(),
            placement: Placement::default(),
            versions: BTreeMap::new(),
            version_changes: 0,
            opening: Vec::new(),
            revision: 0,
            live: BTreeMap::new(),
            encoded: EncodeCache::default(),
            registry,
            counters,
            delivery: (Arc::new(Delivery::new(Instant::now())), 0),
            pace: FlushPace::default(),
        }
    }

    /// Time between two flushes under load.
    pub fn tick(&self) -> Duration {
        self.pace.tick()
    }

    /// Flushes the graph and sends frames to every session with a free slot.
    pub fn flush(&mut self, cause: Cause) {
        let flush = self.graph.flush();
        if !flush.records.is_empty() {
            self.revision += 1;
            self.registry.set_revision(self.revision);
            self.counters.flushes.inc();
            let records = flush.records.len() as f64;
            self.counters.flush_records.observe(records);
        }
        let span = info_span!(
            "calc.flush",
            revision = self.revision,
            records = flush.records.len()
        );
        if let Some(trace) = cause.trace {
            telemetry::set_parent(&span, trace);
        }
        let _entered = span.enter();
        for (id, change) in flush.records {
            // The cached encoding is that of the former value.
            self.encoded.remove(&id);
            self.distribute(Arc::new(id), change, cause);
        }
        self.pump(telemetry::of(&span).is_some());
    }

    /// Sends a frame to every session with pending changes and a free slot.
    fn pump(&mut self, traced: bool) {
        let mut closed = Vec::new();
        let (former, sent) = (&self.delivery.0, self.delivery.1);
        if sent > 0 {
            self.pace.record(former.duration(sent, Instant::now()));
            if let Some(mean) = former.mean() {
                self.counters.delivery_seconds.observe(mean.as_secs_f64());
            }
        }
        self.delivery = (Arc::new(Delivery::new(Instant::now())), 0);
        let context = FrameContext {
            revision: self.revision,
            versions: &self.versions,
            version_changes: self.version_changes,
            placement: &self.placement,
            counters: &self.counters,
            delivery: &self.delivery.0,
            traced,
        };
        let mut frames = 0;
        for (name, live) in &mut self.live {
            let compact = live.capabilities.compact;
            let mut source = ValueEncoder {
                node: name,
                graph: &self.graph,
                encoded: &mut self.encoded,
                compact,
            };
            let is_placed = live.placement_sent == context.placement.generation();
            if live.session.pending() == 0 && is_placed {
                record_pending(&live.node, &mut live.is_waiting, 0);
                continue;
            }
            match live.send(&mut source, &context) {
                Ok(sent) => frames += u64::from(sent),
                Err(SessionClosed) => closed.push((name.clone(), live.id)),
            }
        }
        self.delivery.1 = frames;
        for (name, id) in closed {
            self.close_session(&name, id);
        }
    }

    /// Number of records with pending changes for the node.
    pub fn pending(&self, node: &str) -> usize {
        self.live.get(node).map_or(0, |live| live.session.pending())
    }

    /// Returns true if the node has a session.
    pub fn has_session(&self, node: &str) -> bool {
        self.live.contains_key(node)
    }

    /// Returns true if a session has pending changes that could not be sent when they were due.
    pub fn is_waiting(&self, node: &str, session: u64) -> bool {
        self.live.get(node).is_some_and(|live| {
            let is_placed = live.placement_sent == self.placement.generation();
            live.id == session && (live.session.pending() > 0 || !is_placed)
        })
    }

    /// Answers a hello with the difference between the node's records and its view. The graph must
    /// be flushed.
    pub fn open_session(&mut self, hello: Hello) {
        let view = self.graph.view(&hello.node);
        let supports = |id: &RecordId| supports(hello.capabilities, id);
        let mut buckets = view.buckets();
        // An agent without support holds none of these, so its digests lack them too.
        let bgp = view.digest(&RecordId::Bgp);
        let optional = view
            .host_endpoints()
            .chain(bgp.map(|digest| (RecordId::Bgp, digest)));
        for (id, digest) in optional.filter(|(id, _)| !supports(id)) {
            digest::subtract(&mut buckets, &id, digest);
        }
        let differing = differing_buckets(&hello.buckets, &buckets);
        let node = self
            .registry
            .add(&hello.node, hello.session, hello.agent_version);
        let compact = hello.capabilities.compact;
        let mut source = ValueEncoder {
            node: &hello.node,
            graph: &self.graph,
            encoded: &mut self.encoded,
            compact,
        };
        let wanted = view
            .ids()
            .filter(|id| supports(id) && differing.contains(&digest::bucket(id)));
        let mut chunks: Vec<Bytes> = wanted.filter_map(|id| source.encode_value(&id)).collect();
        self.counters.sessions_opened.inc();
        self.counters.resent_buckets.inc_by(differing.len() as u64);
        // A node at revision 0 would never count as current.
        self.revision = self.revision.max(1);
        self.registry.set_revision(self.revision);
        let zone = zone_of(&self.graph, &hello.node);
        // What the node holds is in the view too, or the hello would not be answered.
        let mut versions = newer_than(&self.versions, 0);
        for (kind, held) in hello.versions {
            let version = versions.entry(kind).or_default();
            *version = held.max(*version);
        }
        chunks.push(encode_trailer(&Trailer {
            revision: self.revision,
            restated_buckets: differing,
            in_sync: true,
            versions,
            servers: self.placement.servers(&hello.node, zone),
            ..Trailer::default()
        }));
        let frame = FrameBytes::new(chunks, compact);
        let sent = SentFrame {
            revision: self.revision,
            at: Instant::now().into_std(),
            event_unix_ns: 0,
            trace: None,
        };
        self.counters.frames.inc();
        self.counters.bytes.inc_by(frame.len() as u64);
        node.record_sent(sent, frame.len());
        // The slot is new, so it can only be closed: the node has disconnected, and its reader
        // sends an event.
        let _ = hello.slot.try_send(Ok(frame));
        self.opening.push((hello.slot.downgrade(), Instant::now()));
        let live = LiveSession {
            session: Session::default(),
            id: hello.session,
            slot: hello.slot,
            blocked: hello.blocked,
            node,
            capabilities: hello.capabilities,
            cause: Cause::default(),
            is_waiting: false,
            versions_sent: self.version_changes,
            placement_sent: self.placement.generation(),
        };
        if let Some(former) = self.live.insert(hello.node, live) {
            // If its slot is full, the stream ends after the frame in it.
            let reason = "the node has opened another stream";
            let _ = former.slot.try_send(Err(Status::aborted(reason)));
        }
    }

    /// Closes a session.
    pub fn close_session(&mut self, node: &str, session: u64) {
        if self.live.get(node).is_some_and(|live| live.id == session) {
            self.live.remove(node);
        }
        self.registry.remove(node, session);
    }

    /// Closes one session for this reason; returns true if there are more.
    pub fn close_next(&mut self, reason: &str) -> bool {
        if let Some(node) = self.live.keys().next().cloned() {
            let status = self.away(&node, reason);
            self.close_with(&node, status);
        }
        !self.live.is_empty()
    }

    /// Closes the session of a node with this status; returns false if it has none.
    pub fn close_with(&mut self, node: &str, status: Status) -> bool {
        let Some(live) = self.live.remove(node) else {
            return false;
        };
        // If the slot holds a frame, the stream ends after it, because its sender is dropped here.
        let _ = live.slot.try_send(Err(status));
        self.registry.remove(node, live.id);
        true
    }

    /// Status that sends a node to another replica, with those that it is to try.
    pub fn away(&self, node: &str, reason: &str) -> Status {
        let servers = self.placement.others(node, zone_of(&self.graph, node));
        let mut status = Status::unavailable(reason);
        if let (false, Ok(servers)) = (servers.is_empty(), servers.join(",").parse()) {
            status.metadata_mut().insert(SERVERS_METADATA, servers);
        }
        status
    }

    /// Records the version of a kind that the graph takes into account.
    pub fn set_version(&mut self, kind: &'static str, version: u64) {
        self.version_changes += 1;
        let (known, changed) = self.versions.entry(kind).or_default();
        *known = version.max(*known);
        *changed = self.version_changes;
    }

    /// Number of sessions whose view is under way, except those that do not take it.
    pub fn count_opening(&mut self, now: Instant) -> usize {
        self.opening.retain(|(slot, since)| {
            let is_full = || slot.upgrade().is_some_and(|slot| slot.capacity() == 0);
            now < *since + STALLED && is_full()
        });
        self.opening.len()
    }

    /// Nodes with a session.
    pub fn nodes(&self) -> Vec<String> {
        self.live.keys().cloned().collect()
    }

    /// Nodes with a session whose first choice is another replica.
    pub fn misplaced(&self) -> Vec<String> {
        let nodes = self.live.keys();
        nodes
            .filter(|node| self.is_misplaced(node))
            .cloned()
            .collect()
    }

    /// Returns true if another replica is the first choice of the node.
    pub fn is_misplaced(&self, node: &str) -> bool {
        self.placement
            .is_misplaced(node, zone_of(&self.graph, node))
    }

    /// Number of sessions.
    pub fn sessions(&self) -> usize {
        self.live.len()
    }

    /// Revision: incremented by every flush with changes.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    fn distribute(&mut self, id: Arc<RecordId>, change: RecordChange, cause: Cause) {
        let RecordChange {
            gained,
            kept,
            change,
            lost,
        } = change;
        self.for_each(&id, &lost, cause, |session| session.mark_lost(&id));
        self.for_each(&id, &gained, cause, |session| session.mark_gained(&id));
        match change {
            Change::Same => {}
            Change::Value => self.for_each(&id, &kept, cause, |session| session.mark_changed(&id)),
            Change::Members(delta) => {
                if let RecordId::IpSet(set) = &*id
                    && let Some((kind, _)) = self.graph.ip_set(set)
                {
                    // An agent that applies a change of members also applies several of them.
                    let bytes = encode_compact(ChangeRef::Members(set, kind, &delta));
                    let shared = Arc::new(SharedDelta { kind, delta, bytes });
                    self.for_each(&id, &kept, cause, |session| {
                        session.add_members(&id, &shared)
                    });
                }
            }
        }
    }

    fn for_each(
        &mut self,
        id: &RecordId,
        audience: &Audience,
        cause: Cause,
        mut apply: impl FnMut(&mut Session),
    ) {
        let mut apply = |live: &mut LiveSession| {
            if supports(live.capabilities, id) {
                live.cause = cause;
                apply(&mut live.session);
            }
        };
        match audience {
            Audience::All => self.live.values_mut().for_each(apply),
            // Of the many nodes of a large cluster, some are connected here.
            Audience::Nodes(nodes) if nodes.len() > self.live.len() => {
                let concerned = self
                    .live
                    .iter_mut()
                    .filter(|(node, _)| nodes.contains(node));
                concerned.for_each(|(_, live)| apply(live));
            }
            Audience::Nodes(nodes) => {
                for node in nodes {
                    if let Some(live) = self.live.get_mut(node) {
                        apply(live);
                    }
                }
            }
        }
    }
}

/// The stream has ended.
struct SessionClosed;

impl LiveSession {
    /// Sends pending changes if the slot is free; returns true if a frame was sent.
    fn send(
        &mut self,
        source: &mut ValueEncoder<'_>,
        context: &FrameContext<'_>,
    ) -> Result<bool, SessionClosed> {
        let (revision, counters) = (context.revision, context.counters);
        let permit = match self.slot.try_reserve() {
            Err(TrySendError::Full(())) => {
                // The receiver checks the flag after emptying the slot, and this checks the slot
                // after setting the flag, so one of the two notices.
                self.blocked.store(true, Ordering::SeqCst);
                self.slot.try_reserve()
            }
            outcome => outcome,
        };
        let permit = match permit {
            Ok(permit) => permit,
            Err(TrySendError::Full(())) => {
                record_pending(&self.node, &mut self.is_waiting, self.session.pending());
                return Ok(false);
            }
            Err(TrySendError::Closed(())) => return Err(SessionClosed),
        };
        let mut chunks = self.session.drain(source);
        let is_placed = self.placement_sent == context.placement.generation();
        if chunks.is_empty() && is_placed {
            record_pending(&self.node, &mut self.is_waiting, 0);
            return Ok(false);
        }
        counters.frame_changes.observe(chunks.len() as f64);
        let span = context
            .traced
            .then(|| info_span!("session.send", node = %self.node.name, revision));
        let trace = span.as_ref().and_then(telemetry::of).or(self.cause.trace);
        chunks.push(encode_trailer(&Trailer {
            revision,
            traceparent: trace.map(|trace| trace.to_string()).unwrap_or_default(),
            event_unix_ns: self.cause.seen_unix_ns,
            versions: newer_than(context.versions, self.versions_sent),
            servers: match is_placed {
                true => Vec::new(),
                false => {
                    let zone = zone_of(source.graph, &self.node.name);
                    context.placement.servers(&self.node.name, zone)
                }
            },
            ..Trailer::default()
        }));
        self.versions_sent = context.version_changes;
        self.placement_sent = context.placement.generation();
        let frame =
            FrameBytes::new(chunks, self.capabilities.compact).of_flush(context.delivery.clone());
        counters.frames.inc();
        counters.bytes.inc_by(frame.len() as u64);
        let sent = SentFrame {
            revision,
            at: Instant::now().into_std(),
            event_unix_ns: self.cause.seen_unix_ns,
            trace,
        };
        self.node.record_sent(sent, frame.len());
        self.is_waiting = false;
        permit.send(Ok(frame));
        Ok(true)
    }
}

/// Versions that have changed since the value `since` of `version_changes`.
fn newer_than(versions: &BTreeMap<&'static str, (u64, u64)>, since: u64) -> Versions {
    let newer = versions.iter().filter(|(_, (_, changed))| *changed > since);
    newer
        .map(|(kind, (version, _))| ((*kind).to_owned(), *version))
        .collect()
}

/// Records the number of pending records in the registry; zero only if it recorded more before, as
/// changes may have cancelled each other out.
fn record_pending(node: &NodeSession, is_known: &mut bool, pending: usize) {
    if pending > 0 || *is_known {
        *is_known = pending > 0;
        node.set_pending(pending);
    }
}

/// Returns true if the agent supports the record.
fn supports(capabilities: Capabilities, id: &RecordId) -> bool {
    match id {
        RecordId::HostEndpoint(_) => capabilities.host_endpoints,
        RecordId::Bgp => capabilities.bgp,
        _ => true,
    }
}

/// Cache of encoded values for sessions that need the same ones in the same form.
#[derive(Debug, Default)]
struct EncodeCache {
    /// In full, and compact.
    values: [HashMap<RecordId, Bytes>; 2],
    bytes: usize,
}

impl EncodeCache {
    fn remove(&mut self, id: &RecordId) {
        for values in &mut self.values {
            if let Some(value) = values.remove(id) {
                self.bytes -= value.len();
            }
        }
    }

    fn insert(&mut self, id: &RecordId, compact: bool, value: &Bytes) {
        if self.bytes + value.len() > MAX_CACHED_BYTES {
            *self = Self::default();
        }
        self.bytes += value.len();
        self.values[usize::from(compact)].insert(id.clone(), value.clone());
    }
}

/// Encodes values for one session.
struct ValueEncoder<'a> {
    node: &'a str,
    graph: &'a Graph,
    encoded: &'a mut EncodeCache,
    compact: bool,
}

impl RecordSource for ValueEncoder<'_> {
    fn encode_value(&mut self, id: &RecordId) -> Option<Bytes> {
        if let Some(value) = self.encoded.values[usize::from(self.compact)].get(id) {
            return Some(value.clone());
        }
        let record = self.graph.record_for(self.node, id)?;
        let change = ChangeRef::Upsert(id, &record);
        let value = if self.compact {
            encode_compact(change)
        } else {
            encode_change(change)
        };
        // Endpoints and speakers are of one node only, and settings may be.
        if !matches!(
            id,
            RecordId::Endpoint(_) | RecordId::HostEndpoint(_) | RecordId::Settings | RecordId::Bgp
        ) {
            self.encoded.insert(id, self.compact, &value);
        }
        Some(value)
    }

    fn encode_members(&mut self, id: &RecordId, kind: SetKind, delta: &MemberDelta) -> Bytes {
        match id {
            RecordId::IpSet(set) => encode_compact(ChangeRef::Members(set, kind, delta)),
            _ => Bytes::new(),
        }
    }

    fn encode_removal(&mut self, id: &RecordId) -> Bytes {
        encode_change(ChangeRef::Remove(id))
    }
}
