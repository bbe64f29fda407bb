//! The owner task: everything that changes the graph or asks it comes here as an [`Event`].
//!
//! It never waits for a client and never does I/O. Under load it computes once per [`TICK`]; when it has been idle it computes
//! at once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use margay_api::report::{Entry, Listing};
use margay_calc::graph::Problem;
use margay_calc::update::Update;
use margay_proto::sync::LocalEndpoint;
use margay_runtime::ready::Gate;
use margay_runtime::shutdown::Shutdown;
use margay_runtime::telemetry::{self, Traceparent};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tonic::Status;
use tracing::{debug, info, info_span, warn};

use crate::cache::{Cache, Missing, ObjectKey, Observed};
use crate::hub::{Cause, Hello, Hub};
use crate::metrics::{Counters, Kind};
use crate::notices::{Notice, Notices};
use crate::registry::Registry;

/// Between two computations under load.
pub const TICK: Duration = Duration::from_millis(5);
/// So long after a change it is looked whether objects are at odds with others: what is written together has come by then.
const LOOK: Duration = Duration::from_secs(1);
/// Events that may wait: a few per watch and per node; whoever produces more waits, and loses nothing.
pub const EVENTS: usize = 1024;
/// Events taken in one go before looking at the clock.
const BURST: usize = 256;
/// How long the words of a node count when its stream has ended: it may be back soon, and if it speaks to another replica now, the API shows by then
/// what it said.
const GRACE: Duration = Duration::from_secs(30);
/// Nodes that must find another replica are told over this time, so that they do not all arrive there at once.
const DRAIN: Duration = Duration::from_secs(5);
/// The longest pause between two of them.
const DRAIN_STEP: Duration = Duration::from_millis(100);

/// What the owner task is told.
pub enum Event {
    /// A list of the kind begins.
    Begin(&'static str),
    /// Objects of the kind were seen.
    Observed {
        /// The kind.
        kind: &'static str,
        /// The objects.
        objects: Vec<Observed>,
        /// When they were seen, and the trace that their writer began.
        cause: Cause,
    },
    /// An object of the kind is gone.
    Deleted {
        /// The kind.
        kind: &'static str,
        /// The object.
        key: ObjectKey,
        /// When it was seen.
        cause: Cause,
    },
    /// A list of the kind is complete; the answer is what it lacks. Nothing is removed yet.
    Listed {
        /// The kind.
        kind: &'static str,
        /// How many of the missing are to be named.
        limit: usize,
        /// Where to answer.
        reply: oneshot::Sender<Missing>,
    },
    /// What the newest list of the kind lacks is gone.
    Sweep(&'static str),
    /// A node wants its view.
    Hello(Hello),
    /// A node's slot was full when it had news, and is free now.
    Ready {
        /// The node.
        node: String,
        /// Its session.
        session: u64,
    },
    /// A node tells the addresses of a pod of its own.
    Local {
        /// The node, by its certificate.
        node: String,
        /// What it says.
        said: LocalEndpoint,
    },
    /// A session is over.
    Gone {
        /// The node.
        node: String,
        /// Its session.
        session: u64,
    },
    /// Somebody asks something of the current state.
    Query(Box<dyn FnOnce(&Owner) + Send>),
}

/// Owner of cache, graph and sessions.
pub struct Owner {
    /// The latest state of the API.
    pub cache: Cache,
    /// What it means, and who is told.
    pub hub: Hub,
    counters: Counters,
    registry: Registry,
    gate: Gate,
    /// What is told about single objects, as events on them.
    pub notices: Notices,
    /// Nodes that came before the whole API was seen.
    early: Vec<Hello>,
    in_sync: bool,
    /// Something was applied or a slot became free.
    dirty: bool,
    /// Objects that were at odds with others when that was looked at last.
    odds: BTreeSet<Problem>,
    /// When it is to be looked at again: something was applied that may have changed it.
    look: Option<Instant>,
    cause: Cause,
    first_cause: Option<Instant>,
    /// What a node has said of its pods counts so long after its stream has ended.
    pub grace: Duration,
    /// When the stream of a node ended last.
    silent: BTreeMap<String, Instant>,
    /// When the first of them has been silent for so long.
    silence_due: Option<Instant>,
}

impl Owner {
    /// An owner that is ready, and opens `gate`, once every kind of `cache` is in sync.
    pub fn new(cache: Cache, counters: Counters, registry: Registry, gate: Gate) -> Self {
        let mut owner = Self {
            cache,
            hub: Hub::new(registry.clone(), counters.clone()),
            counters,
            registry,
            gate,
            notices: Notices::default(),
            early: Vec::new(),
            in_sync: false,
            dirty: false,
            odds: BTreeSet::new(),
            look: None,
            cause: Cause::default(),
            first_cause: None,
            grace: GRACE,
            silent: BTreeMap::new(),
            silence_due: None,
        };
        owner.look_at_sync();
        owner
    }

    /// Takes events until shutdown, then sends the nodes away and ends when all have gone.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>, shutdown: Shutdown) {
        let mut last = Instant::now() - TICK;
        loop {
            let due = last + TICK;
            tokio::select! {
                () = tokio::time::sleep_until(due), if self.dirty && self.in_sync => {}
                () = tokio::time::sleep_until(self.silence_due.unwrap_or(due)), if self.silence_due.is_some() => {
                    self.silence();
                }
                () = tokio::time::sleep_until(self.look.unwrap_or(due)), if self.look.is_some() && self.in_sync => {
                    self.report_odds();
                }
                event = events.recv() => {
                    let Some(event) = event else { return };
                    self.handle(event);
                    for _ in 0..BURST {
                        let Ok(event) = events.try_recv() else { break };
                        self.handle(event);
                    }
                }
                () = shutdown.wait() => break,
            }
            if self.dirty && self.in_sync && Instant::now() >= due {
                self.flush();
                last = Instant::now();
            }
        }
        self.drain(events).await;
    }

    /// Takes one event. What follows from it is computed by the next [`Owner::flush`].
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Begin(kind) => self.cache.begin(kind),
            Event::Observed { kind, objects, cause } => self.observed(kind, objects, cause),
            Event::Deleted { kind, key, cause } => {
                self.counters.events.get_or_create(&Kind { kind }).inc();
                if !self.cache.problems_of(kind, &key).is_empty() {
                    self.registry.ring();
                }
                let news = self.cache.delete(kind, &key);
                self.apply(kind, news, cause);
            }
            Event::Listed { kind, limit, reply } => {
                // Whoever asked may have been told to stop meanwhile.
                let _ = reply.send(self.cache.missing(kind, limit));
            }
            Event::Sweep(kind) => {
                let news = self.cache.sweep(kind);
                if !news.is_empty() {
                    info!(kind, objects = news.len(), "gone while they were not watched");
                }
                self.apply(kind, news, Cause::default());
                self.registry.ring();
                self.look_at_sync();
            }
            Event::Hello(hello) if !self.in_sync => {
                // A node has one stream; dropping the former hello ends the former stream.
                self.early.retain(|early| early.node != hello.node);
                self.early.push(hello);
            }
            Event::Hello(hello) => {
                self.flush();
                info!(node = %hello.node, version = %hello.agent_version, "node connected");
                self.hub.hello(hello);
            }
            Event::Ready { node, session } => self.dirty |= self.hub.is_waiting(&node, session),
            Event::Local { node, said } => self.local(&node, said),
            Event::Gone { node, session } => {
                self.early.retain(|hello| hello.session != session);
                self.hub.leave(&node, session);
                info!(%node, "node disconnected");
                let now = Instant::now();
                self.silent.insert(node, now);
                self.silence_due.get_or_insert(now + self.grace);
            }
            Event::Query(ask) => {
                self.flush();
                ask(self);
            }
        }
    }

    /// Computes what follows from everything that was handled, and tells the nodes.
    pub fn flush(&mut self) {
        if !self.dirty || !self.in_sync {
            return;
        }
        self.dirty = false;
        self.hub.flush(std::mem::take(&mut self.cause));
        if let Some(first) = self.first_cause.take() {
            self.counters.flush_seconds.observe(first.elapsed().as_secs_f64());
        }
        for (kind, count, refused) in self.cache.counts() {
            let label = Kind { kind };
            self.counters.objects.get_or_create(&label).set(count as i64);
            self.counters.refused.get_or_create(&label).set(refused as i64);
        }
    }

    fn observed(&mut self, kind: &'static str, objects: Vec<Observed>, cause: Cause) {
        let events = self.counters.events.get_or_create(&Kind { kind }).clone();
        events.inc_by(objects.len() as u64);
        for observed in objects {
            let key = observed.key.clone();
            let known = self.cache.problems_of(kind, &key).to_vec();
            let news = self.cache.apply(kind, observed);
            self.report(kind, &key, &known);
            self.apply(kind, news, cause);
        }
    }

    fn report(&self, kind: &'static str, key: &ObjectKey, known: &[String]) {
        let problems = self.cache.problems_of(kind, key);
        if known == problems {
            return;
        }
        self.registry.ring();
        if problems.is_empty() {
            info!(kind, object = %key, "object is used as it is written again");
            return;
        }
        self.notices.put(Notice::new(kind, key, self.cache.uid_of(kind, key), problems));
        warn!(kind, object = %key, ?problems, "object is not used as it is written");
    }

    /// Tells of objects that have come to be at odds with others, or are so no more.
    fn report_odds(&mut self) {
        self.look = None;
        let now = self.hub.graph.problems();
        if now != self.odds {
            self.registry.ring();
        }
        for problem in now.difference(&self.odds) {
            warn!(object = problem.object(), problem = problem.reason(), "object does not do what it may seem to");
        }
        for problem in self.odds.difference(&now) {
            info!(object = problem.object(), "object does what it seems to again");
        }
        self.odds = now;
    }

    /// Objects that are not used as they are written, or at odds with others.
    pub fn refused(&self) -> Listing {
        let refused = self.cache.problems().map(|(kind, key, reasons)| (subject(kind, key), reasons.join("; ")));
        let odds = self.odds.iter().map(|problem| (problem.object(), problem.reason()));
        Listing::of(refused.chain(odds), |(subject, reason)| Entry::new(&subject, &reason))
    }

    fn apply(&mut self, kind: &'static str, news: impl IntoIterator<Item = Update>, cause: Cause) {
        for update in news {
            self.counters.updates.get_or_create(&Kind { kind }).inc();
            if self.in_sync {
                self.first_cause.get_or_insert_with(Instant::now);
                self.cause = Cause { trace: change_span(&update, cause.trace).or(cause.trace), ..cause };
            }
            // Pods are at odds with nobody, and they come and go all the time.
            if !matches!(update, Update::Endpoint(..)) {
                self.look.get_or_insert_with(|| Instant::now() + LOOK);
            }
            self.hub.graph.apply(update);
            self.dirty = true;
        }
    }

    fn local(&mut self, node: &str, said: LocalEndpoint) {
        debug!(node, endpoint = %said.key, addresses = ?said.addresses, "node tells addresses");
        match self.cache.local(node, said) {
            Ok(news) => {
                let seen_unix_ns = crate::watch::unix_ns();
                let cause = Cause { seen_unix_ns, trace: None };
                self.apply(crate::kinds::POD, news, cause);
            }
            Err(error) => warn!(%error, "addresses not taken"),
        }
    }

    /// Nodes that have had no stream here for so long do not take back here what they said.
    fn silence(&mut self) {
        let (now, grace) = (Instant::now(), self.grace);
        let over = self.silent.extract_if(.., |_, since| *since + grace <= now);
        let over: Vec<String> = over.map(|(node, _)| node).collect();
        self.silence_due = self.silent.values().min().map(|since| *since + grace);
        for node in over {
            let is_early = self.early.iter().any(|hello| hello.node == node);
            if !is_early && !self.hub.has(&node) {
                let news = self.cache.silence(&node);
                self.apply(crate::kinds::POD, news, Cause::default());
            }
        }
    }

    fn look_at_sync(&mut self) {
        if self.in_sync {
            return;
        }
        if !self.cache.is_synced() {
            let unsynced = self.cache.unsynced().join(", ");
            self.gate.close(format!("not listed yet: {unsynced}"));
            return;
        }
        self.in_sync = true;
        self.dirty = true;
        self.flush();
        self.registry.set_in_sync();
        self.gate.open();
        let objects: usize = self.cache.counts().map(|(_, count, _)| count).sum();
        info!(objects, "in sync with the API");
        for hello in std::mem::take(&mut self.early) {
            self.handle(Event::Hello(hello));
        }
    }

    async fn drain(mut self, mut events: mpsc::Receiver<Event>) {
        self.gate.close("shutting down");
        let away = || Status::unavailable("this replica goes away; say hello to another one");
        for hello in self.early.drain(..) {
            let _ = hello.slot.try_send(Err(away()));
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
                _ = steps.tick() => if !self.hub.dismiss(away()) { return },
                event = events.recv() => match event {
                    None => return,
                    Some(Event::Hello(hello)) => {
                        let _ = hello.slot.try_send(Err(away()));
                    }
                    Some(event) => self.handle(event),
                },
            }
        }
    }
}

/// An object as people name it.
pub fn subject(kind: &str, key: &ObjectKey) -> String {
    match key.namespace.as_str() {
        "" => format!("{kind} {}", key.name),
        _ => format!("{kind} {key}"),
    }
}

/// The first span of a change's trace; it continues the trace that the object's writer began.
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
