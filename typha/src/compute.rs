//! GraphOwner task: every change and query of the graph arrives here as an [`Event`].
//!
//! It never waits for a client and does no I/O. Under load it flushes once per [`Hub::tick`]; after
//! being idle it flushes at once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use margay_calc::conflict::Conflict;
use margay_calc::update::Update;
use margay_proto::sync::LocalEndpoint;
use margay_runtime::alive::Pulse;
use margay_runtime::clock::unix_ns;
use margay_runtime::ready::Gate;
use margay_runtime::shutdown::Shutdown;
use margay_runtime::telemetry::{self, Traceparent};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, info, info_span, warn};

use crate::cache::Cache;
use crate::cause::Cause;
use crate::event::{Event, Snapshot};
use crate::hello::Hello;
use crate::hub::Hub;
use crate::metrics::{Counters, Kind};
use crate::object::{ObjectKey, Observed, POD};
use crate::object_events::{ObjectWarning, WarningQueue};
use crate::registry::Registry;
use admit::Admissions;

mod admit;

/// Delay from a change to the check for conflicts, so that objects applied together have all
/// arrived.
const CONFLICT_CHECK: Duration = Duration::from_secs(1);
/// Capacity of the event queue: a few per watch and per node. A full queue makes senders wait.
pub const EVENT_QUEUE: usize = 1024;
/// Maximal number of events handled before looking at the clock.
const BURST: usize = 256;
/// Time for which a node's reports remain valid after its stream has ended. It may reconnect soon,
/// and if it is connected to another replica, the API has caught up by then.
const GRACE: Duration = Duration::from_secs(30);
/// Time over which connected nodes are sent to other replicas at shutdown, so that they do not
/// arrive there all at once.
const DRAIN: Duration = Duration::from_secs(5);
/// Maximal pause between two of them.
const DRAIN_STEP: Duration = Duration::from_millis(100);
/// Reason that nodes get then.
const SHUTS_DOWN: &str = "this replica shuts down; connect to another one";

/// GraphOwner of cache, graph and sessions.
pub struct GraphOwner {
    /// Latest state of the API.
    pub cache: Cache,
    /// Graph and sessions.
    pub hub: Hub,
    counters: Counters,
    registry: Registry,
    /// Queue of Events on objects.
    pub warnings: WarningQueue,
    admissions: Admissions,
    in_sync: bool,
    /// There are changes to flush, or a slot became free.
    dirty: bool,
    /// Conflicts as of the last check.
    conflicts: BTreeSet<Conflict>,
    /// Time of the next check for conflicts; set when a change may affect them.
    check_at: Option<Instant>,
    cause: Cause,
    first_cause: Option<Instant>,
    /// Validity of a node's reports after its stream has ended.
    pub grace: Duration,
    /// Nodes without a stream, and since when.
    disconnected: BTreeMap<String, Instant>,
    /// Time at which the reports of the first of them expire.
    expiry_due: Option<Instant>,
    /// Signs of life, for the liveness probe.
    pub pulse: Option<Pulse>,
    /// Kinds with updates since their last known version.
    unversioned: BTreeSet<&'static str>,
}

impl GraphOwner {
    /// Creates an owner that opens `gate` once every kind of `cache` is in sync.
    pub fn new(cache: Cache, counters: Counters, registry: Registry, gate: Gate) -> Self {
        let mut owner = Self {
            cache,
            hub: Hub::new(registry.clone(), counters.clone()),
            counters,
            registry,
            warnings: WarningQueue::default(),
            admissions: Admissions::new(gate),
            in_sync: false,
            dirty: false,
            conflicts: BTreeSet::new(),
            check_at: None,
            cause: Cause::default(),
            first_cause: None,
            grace: GRACE,
            disconnected: BTreeMap::new(),
            expiry_due: None,
            pulse: None,
            unversioned: BTreeSet::new(),
        };
        owner.check_sync();
        owner
    }

    /// Turns BGP on or off; off by default.
    pub fn with_bgp(mut self, is_on: bool) -> Self {
        self.hub.graph.set_bgp(is_on);
        self
    }

    /// Handles events until shutdown, then disconnects all nodes and ends when the last one is
    /// gone.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>, shutdown: Shutdown) {
        let mut last = Instant::now() - self.hub.tick();
        loop {
            let due = last + self.hub.tick();
            let duty = self.admissions.next(Instant::now());
            if let Some(pulse) = &self.pulse {
                pulse.beat();
            }
            let beat = self.pulse.as_ref().map(|pulse| pulse.interval());
            // In this order, not at random: what is done depends on the events and the clock alone.
            tokio::select! {
                biased;
                () = shutdown.wait() => break,
                () = tokio::time::sleep_until(due), if self.dirty && self.in_sync => {}
                () = tokio::time::sleep_until(
                    self.expiry_due.unwrap_or(due),
                ), if self.expiry_due.is_some() => {
                    self.expire_reports();
                }
                () = tokio::time::sleep_until(
                    self.check_at.unwrap_or(due),
                ), if self.check_at.is_some() && self.in_sync => {
                    self.report_conflicts();
                }
                () = tokio::time::sleep_until(
                    duty.unwrap_or(due),
                ), if duty.is_some() => {
                    self.run_admissions(Instant::now());
                }
                () = tokio::time::sleep(beat.unwrap_or_default()), if beat.is_some() => {}
                event = events.recv() => {
                    let Some(event) = event else { return };
                    self.handle(event);
                    // Everything that is queued, so that a burst costs one flush.
                    for _ in 0..BURST {
                        let Ok(event) = events.try_recv() else { break };
                        self.handle(event);
                    }
                }
            }
            if self.dirty && self.in_sync && Instant::now() >= due {
                self.flush();
                last = Instant::now();
            }
        }
        self.drain(events).await;
    }

    /// Handles one event. Its consequences are computed by the next [`GraphOwner::flush`].
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::ListStarted(kind) => self.cache.start_list(kind),
            Event::Observed {
                kind,
                objects,
                cause,
            } => self.apply_observed(kind, objects, cause),
            Event::Deleted { kind, key, cause } => {
                self.counters.events.get_or_create(&Kind { kind }).inc();
                // Before the deletion, which forgets the problems.
                if !self.cache.problems_of(kind, &key).is_empty() {
                    self.registry.notify_problems();
                }
                let updates = self.cache.delete(kind, &key);
                self.apply(kind, updates, cause);
            }
            Event::ListCompleted { kind, limit, reply } => {
                // The receiver may have been dropped at shutdown.
                let _ = reply.send(self.cache.missing(kind, limit));
            }
            Event::Sweep {
                kind,
                version,
                newest,
            } => {
                let updates = self.cache.sweep(kind);
                if !updates.is_empty() {
                    info!(
                        kind,
                        objects = updates.len(),
                        "removed objects that were deleted while the watch was interrupted"
                    );
                }
                self.apply(kind, updates, Cause::default());
                self.record_answer(kind, version);
                self.record_version(kind, newest);
                self.registry.notify_problems();
                self.check_sync();
            }
            Event::Answered { kind, version } => self.record_answer(kind, version),
            Event::Unanswered { kind, reason } => {
                let now = Instant::now();
                self.admissions.freshness.record_failure(kind, reason, now);
            }
            Event::Replicas(replicas) => self.set_replicas(replicas),
            Event::Hello(hello) => self.receive(hello),
            Event::SlotFree { node, session } => self.dirty |= self.hub.is_waiting(&node, session),
            Event::LocalEndpoint { node, report } => self.apply_local(&node, report),
            Event::Disconnected { node, session } => {
                let waiting = &mut self.admissions.waiting;
                waiting.retain(|(hello, _)| hello.session != session);
                self.hub.close_session(&node, session);
                info!(%node, "node disconnected");
                let now = Instant::now();
                self.disconnected.insert(node, now);
                self.expiry_due.get_or_insert(now + self.grace);
            }
            Event::Query(query) => {
                self.flush();
                query(Snapshot {
                    cache: &self.cache,
                    hub: &self.hub,
                    conflicts: &self.conflicts,
                    freshness: &self.admissions.freshness,
                });
            }
        }
    }

    /// Computes the consequences of all handled events and sends them to the nodes.
    pub fn flush(&mut self) {
        if !self.dirty || !self.in_sync {
            return;
        }
        self.dirty = false;
        self.hub.flush(std::mem::take(&mut self.cause));
        if let Some(first) = self.first_cause.take() {
            self.counters
                .flush_seconds
                .observe(first.elapsed().as_secs_f64());
        }
        for (kind, count, refused) in self.cache.counts() {
            let label = Kind { kind };
            self.counters
                .objects
                .get_or_create(&label)
                .set(count as i64);
            self.counters
                .refused
                .get_or_create(&label)
                .set(refused as i64);
        }
    }

    fn apply_observed(&mut self, kind: &'static str, objects: Vec<Observed>, cause: Cause) {
        let events = self.counters.events.get_or_create(&Kind { kind }).clone();
        events.inc_by(objects.len() as u64);
        for observed in objects {
            let key = observed.key.clone();
            let known = self.cache.problems_of(kind, &key).to_vec();
            let updates = self.cache.apply(kind, observed);
            self.report(kind, &key, &known);
            self.apply(kind, updates, cause);
        }
    }

    fn report(&self, kind: &'static str, key: &ObjectKey, known: &[String]) {
        let problems = self.cache.problems_of(kind, key);
        if known == problems {
            return;
        }
        self.registry.notify_problems();
        if problems.is_empty() {
            info!(kind, object = %key, "object is enforced as written again");
            return;
        }
        self.warnings.push(ObjectWarning::new(
            kind,
            key,
            self.cache.uid_of(kind, key),
            problems,
        ));
        warn!(kind, object = %key, ?problems, "object is not enforced as written");
    }

    /// Logs conflicts that appeared or disappeared.
    fn report_conflicts(&mut self) {
        self.check_at = None;
        let now = self.hub.graph.conflicts();
        if now != self.conflicts {
            self.registry.notify_problems();
        }
        for conflict in now.difference(&self.conflicts) {
            warn!(
                object = conflict.object(),
                problem = conflict.reason(),
                "object has no effect as written: missing or conflicting reference"
            );
        }
        for conflict in self.conflicts.difference(&now) {
            info!(object = conflict.object(), "conflict of object resolved");
        }
        self.conflicts = now;
    }

    fn apply(
        &mut self,
        kind: &'static str,
        updates: impl IntoIterator<Item = Update>,
        cause: Cause,
    ) {
        for update in updates {
            self.unversioned.insert(kind);
            self.counters.updates.get_or_create(&Kind { kind }).inc();
            if self.in_sync {
                self.first_cause.get_or_insert_with(Instant::now);
                self.cause = Cause {
                    trace: change_span(&update, cause.trace).or(cause.trace),
                    ..cause
                };
            }
            // Pods have no conflicts, and change all the time.
            if !matches!(update, Update::Endpoint(..)) {
                self.check_at
                    .get_or_insert_with(|| Instant::now() + CONFLICT_CHECK);
            }
            self.hub.graph.apply(update);
            self.dirty = true;
        }
        if cause.version > 0 {
            self.record_answer(kind, cause.version);
            self.record_version(kind, cause.version);
        }
    }

    /// Records an answer of the API server, and the version of the kind that is known since.
    fn record_answer(&mut self, kind: &'static str, version: u64) {
        let now = Instant::now();
        self.admissions.freshness.record_answer(kind, version, now);
        self.update_cut_off(now);
    }

    /// Records the version of the newest object of a kind, which views take into account if it has
    /// changed anything. Versions of lists and bookmarks do not count: another replica that knows
    /// the same objects may not have had these yet.
    fn record_version(&mut self, kind: &'static str, version: u64) {
        if version > 0 && self.unversioned.remove(kind) {
            self.hub.set_version(kind, version);
        }
    }

    fn apply_local(&mut self, node: &str, report: LocalEndpoint) {
        debug!(
            node,
            endpoint = %report.key,
            addresses = ?report.addresses,
            "node reports addresses",
        );
        match self.cache.apply_local(node, report) {
            Ok(updates) => {
                let cause = Cause {
                    seen_unix_ns: unix_ns(),
                    ..Cause::default()
                };
                self.apply(POD, updates, cause);
            }
            Err(error) => warn!(%error, "reported addresses rejected"),
        }
    }

    /// Drops the reports of nodes without a stream for the whole grace period.
    fn expire_reports(&mut self) {
        let (now, grace) = (Instant::now(), self.grace);
        let over = self
            .disconnected
            .extract_if(.., |_, since| *since + grace <= now);
        let over: Vec<String> = over.map(|(node, _)| node).collect();
        self.expiry_due = self.disconnected.values().min().map(|since| *since + grace);
        for node in over {
            // A node that has reconnected meanwhile keeps its reports.
            let mut waiting = self.admissions.waiting.iter();
            if !waiting.any(|(hello, _)| hello.node == node) && !self.hub.has_session(&node) {
                let updates = self.cache.expire_reports(&node);
                self.apply(POD, updates, Cause::default());
            }
        }
    }

    fn check_sync(&mut self) {
        if self.in_sync {
            return;
        }
        if !self.cache.is_synced() {
            let unsynced = self.cache.unsynced().join(", ");
            self.admissions
                .gate
                .close(format!("not listed yet: {unsynced}"));
            return;
        }
        self.in_sync = true;
        self.dirty = true;
        self.flush();
        self.registry.set_in_sync();
        self.admissions.gate.open();
        let objects: usize = self.cache.counts().map(|(_, count, _)| count).sum();
        info!(objects, "in sync with the API");
        for (hello, _) in std::mem::take(&mut self.admissions.waiting) {
            self.receive(hello);
        }
    }

    async fn drain(mut self, mut events: mpsc::Receiver<Event>) {
        self.admissions.gate.close("shutting down");
        for (hello, _) in std::mem::take(&mut self.admissions.waiting) {
            self.send_away(&hello);
        }
        let count = self.hub.sessions();
        if count == 0 {
            return;
        }
        info!(nodes = count, "sending nodes to other replicas");
        let step = (DRAIN / u32::try_from(count).unwrap_or(u32::MAX)).min(DRAIN_STEP);
        let mut steps = tokio::time::interval(step.max(Duration::from_micros(1)));
        loop {
            tokio::select! {
                biased;
                _ = steps.tick() => if !self.hub.close_next(SHUTS_DOWN) { return },
                event = events.recv() => match event {
                    None => return,
                    Some(Event::Hello(hello)) => self.send_away(&hello),
                    Some(event) => self.handle(event),
                },
            }
        }
    }

    fn send_away(&self, hello: &Hello) {
        let status = self.hub.away(&hello.node, SHUTS_DOWN);
        // The slot is new, so it can only be closed: the node has disconnected.
        let _ = hello.slot.try_send(Err(status));
    }
}

/// First span of a change's trace; it continues the trace of the object's writer.
fn change_span(update: &Update, writer: Option<Traceparent>) -> Option<Traceparent> {
    let span = match update {
        Update::Policy(key, _) => info_span!("policy.change", policy = %key),
        Update::Endpoint(key, _) => info_span!("endpoint.change", endpoint = %key),
        Update::Namespace(name, _) => info_span!("namespace.change", namespace = %name),
        Update::NetworkSet(key, _) => info_span!("networkset.change", set = %key),
        _ => info_span!("object.change"),
    };
    if let Some(writer) = writer {
        telemetry::set_parent(&span, writer);
    }
    telemetry::of(&span)
}
