//! The owner's loop: it applies events to the state, updates and commits the dataplane, and reports
//! the result to those who wait for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use margay_calc::model::RecordId;
use margay_dataplane::routes::plan;
use margay_dataplane::{CommitError, Committed, Dataplane};
use margay_proto::sync::{Ack, Frame};
use margay_runtime::backoff::{Backoff, jitter};
use margay_runtime::telemetry;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::Span;

use super::acks::Acks;
use super::linked::LinkedPods;
use super::routing::Routing;
use super::{AgentEvent, AgentParts, Inspection, Status};
use crate::bgp::InputsSender;
use crate::bgp::config::BgpInputs;
use crate::cni::ports::NotEnforced;
use crate::metrics::Metrics;
use crate::state::{State, ViewError};
use crate::store::ViewStore;
use deadlines::{Deadlines, now};

/// Maximal number of events per commit, so that a flood of frames cannot keep a pod from its
/// commit.
const MAX_BATCH: usize = 64;
/// Delay until a comparison that could not read the table is repeated.
const RECHECK_DELAY: Duration = Duration::from_secs(10);
/// Delay from the first unsaved change of the view until it is saved.
const SAVE_DELAY: Duration = Duration::from_secs(2);
/// Minimal and maximal delay between attempts at a commit that failed.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(500));
/// Failed attempts in a row before the agent exits: it starts with fresh state, and what is
/// enforced stays enforced.
const MAX_ATTEMPTS: u32 = 20;

/// nftables could not be programmed.
#[derive(Debug, thiserror::Error)]
#[error(
    "nftables could not be programmed in {attempts} attempts: {reason}; the agent restarts, and \
     what was enforced before stays enforced"
)]
pub struct RetriesExhausted {
    attempts: u32,
    reason: String,
}

type Waiters = BTreeMap<String, Vec<oneshot::Sender<Result<(), NotEnforced>>>>;

/// See [`super`].
pub(super) struct StateOwner {
    state: State,
    dataplane: Box<dyn Dataplane>,
    routing: Routing,
    bgp: InputsSender,
    node: String,
    store: Option<ViewStore>,
    /// Thread of the last save, which may still run: only one save runs at a time.
    saving: Option<JoinHandle<()>>,
    metrics: Metrics,
    status: watch::Sender<Status>,
    acks: Acks,
    stream: Option<Stream>,
    /// The kernel may be written: a complete view was received, or a saved one is enforced after
    /// boot. Never reset.
    active: bool,
    waiters: Waiters,
    committed_waiters: Vec<oneshot::Sender<bool>>,
    linked: LinkedPods,
    /// Run after the commit of their batch, so that they see what is in force.
    inspections: Vec<Inspection>,
    /// What the next commit covers.
    batch: Batch,
    retry: Backoff,
    due: Deadlines,
}

struct Stream {
    number: u64,
    fault: Option<oneshot::Sender<ViewError>>,
}

/// Events since the last commit.
struct Batch {
    span: Option<Span>,
    planning: Duration,
    event_unix_ns: u64,
    frames: bool,
    /// Records that routes are planned from changed.
    is_rerouted: bool,
    /// Pods' links were created or removed.
    is_relinked: bool,
}

impl StateOwner {
    pub(super) fn new(
        parts: AgentParts,
        status: watch::Sender<Status>,
        acks: watch::Sender<Option<Arc<Ack>>>,
    ) -> Self {
        let AgentParts {
            node,
            view,
            attached,
            links,
            mut dataplane,
            routes,
            bgp,
            store,
            metrics,
        } = parts;
        let state = State::with_records(view);
        dataplane.set_links(links);
        let linked = LinkedPods::from_attached(&attached);
        for (interface, pod) in attached {
            dataplane.attach(interface, pod, state.records());
        }
        Self {
            state,
            dataplane,
            routing: Routing::new(routes),
            bgp,
            node,
            store,
            saving: None,
            metrics,
            status,
            acks: Acks::new(acks),
            stream: None,
            active: false,
            waiters: Waiters::new(),
            committed_waiters: Vec::new(),
            linked,
            inspections: Vec::new(),
            batch: Batch::new(),
            retry: Backoff::new(RETRY.0, RETRY.1),
            due: Deadlines::new(now()),
        }
    }

    pub(super) async fn run(
        mut self,
        mut queue: mpsc::Receiver<AgentEvent>,
    ) -> Result<(), RetriesExhausted> {
        self.enforce_saved_view();
        self.commit()?;
        loop {
            let due = self
                .dataplane
                .next_retry()
                .map_or_else(|| self.due.next(), |retry| retry.min(self.due.next()));
            let deadline = tokio::time::Instant::from_std(due);
            match tokio::time::timeout_at(deadline, queue.recv()).await {
                Ok(None) => return Ok(()),
                Ok(Some(event)) => {
                    self.handle_event(event);
                    for _ in 1..MAX_BATCH {
                        let Ok(event) = queue.try_recv() else { break };
                        self.handle_event(event);
                    }
                }
                Err(_) => {}
            }
            self.run_due();
            self.commit()?;
            for look in std::mem::take(&mut self.inspections) {
                look(&self.state, &*self.dataplane);
            }
        }
    }

    /// Enforces a saved view at once if the kernel holds nothing of ours, which means that the node
    /// has booted. Otherwise what is enforced is newer than what was saved.
    fn enforce_saved_view(&mut self) {
        if self.state.records().is_empty() {
            return;
        }
        match self.dataplane.is_programmed() {
            Ok(programmed) => self.active = !programmed,
            Err(error) => {
                tracing::warn!(
                    %error,
                    "nftables cannot be read; the saved view is not enforced, waiting for the view \
                     from typha",
                )
            }
        }
    }

    fn handle_event(&mut self, event: AgentEvent) {
        match event {
            AgentEvent::Connected {
                stream,
                hello,
                fault,
                server,
            } => {
                self.metrics.streams.inc();
                self.state.disconnect();
                // Revisions belong to one stream: this server must not get one of the last
                // server's.
                self.batch.frames = false;
                self.acks.reset();
                self.stream = Some(Stream {
                    number: stream,
                    fault: Some(fault),
                });
                self.status
                    .send_modify(|status| (status.in_sync, status.server) = (false, server));
                // The stream may have ended while this event was queued.
                let _ = hello.send(self.state.held());
            }
            AgentEvent::Frame { stream, frame } => self.apply_frame(stream, *frame),
            AgentEvent::Disconnected { stream } => {
                if self.stream.take_if(|own| own.number == stream).is_some() {
                    self.state.disconnect();
                    self.metrics.in_sync.set(0);
                    self.status.send_modify(|status| {
                        (status.in_sync, status.server) = (false, String::new())
                    });
                }
            }
            AgentEvent::Attach {
                interface,
                pod,
                done,
            } => {
                // Records before the pod: its policy may be in the frames of this batch.
                self.update_dataplane();
                let started = now();
                self.batch.is_relinked |= self.linked.ensure(&interface, &pod);
                self.dataplane
                    .attach(interface.clone(), pod, self.state.records());
                self.batch.planning += started.elapsed();
                self.waiters.entry(interface).or_default().push(done);
            }
            AgentEvent::Detach {
                interface,
                endpoint,
                done,
            } => {
                if self
                    .dataplane
                    .attached()
                    .get(&interface)
                    .is_some_and(|pod| pod.endpoint == endpoint)
                {
                    self.update_dataplane();
                    let started = now();
                    self.dataplane.detach(&interface, self.state.records());
                    self.batch.planning += started.elapsed();
                    // An ADD that still waits fails: its pod is being removed.
                    self.waiters.remove(&interface);
                }
                self.committed_waiters.push(done);
            }
            AgentEvent::LinkMade {
                interface,
                index,
                pod,
                done,
            } => {
                self.linked.add(interface, index, pod);
                self.batch.is_relinked = true;
                self.committed_waiters.push(done);
            }
            AgentEvent::LinkGone { interface, index } => {
                self.batch.is_relinked |= self.linked.remove(&interface, index)
            }
            AgentEvent::Links(links) => {
                self.update_dataplane();
                let started = now();
                self.dataplane.set_links(links);
                self.batch.planning += started.elapsed();
                // Wakes those that publish the interfaces: they read them whenever the status
                // changes.
                self.status.send_modify(|_| ());
            }
            AgentEvent::Drift => self.dataplane.invalidate(),
            // The commit below publishes what the routes have reached.
            AgentEvent::Routed => {}
            AgentEvent::Inspect(look) => self.inspections.push(look),
        }
    }

    fn apply_frame(&mut self, stream: u64, frame: Frame) {
        let Some(own) = self
            .stream
            .as_mut()
            .filter(|own| own.number == stream && own.fault.is_some())
        else {
            return;
        };
        let span = self.batch.span.get_or_insert_with(|| {
            tracing::info_span!("node.frame", revision = frame.trailer.revision)
        });
        if let Ok(parent) = frame.trailer.traceparent.parse() {
            telemetry::set_parent(span, parent);
        }
        self.batch.event_unix_ns = self.batch.event_unix_ns.max(frame.trailer.event_unix_ns);
        self.metrics.frames.inc();
        match self.state.apply(frame) {
            Ok(()) => self.batch.frames = true,
            Err(fault) => {
                tracing::warn!(
                    %fault,
                    "a frame cannot be applied; the stream is reopened and the view compared",
                );
                if let Some(sender) = own.fault.take() {
                    // The stream may have ended already.
                    let _ = sender.send(fault);
                }
            }
        }
    }

    /// Updates the dataplane with changed records, without I/O. Call it before attaching, detaching
    /// or setting links: the dataplane resolves pods and interfaces by the records that it has
    /// seen.
    fn update_dataplane(&mut self) {
        if !self.active && !self.state.is_in_sync() {
            return;
        }
        let started = now();
        let dirty = self.state.take_dirty();
        if dirty.is_empty() {
            return;
        }
        let span = self.batch.span.clone().unwrap_or_else(Span::none);
        let _planning = tracing::info_span!(
            parent: &span,
            "node.plan",
            records = dirty.records.len(),
            sets = dirty.members.len(),
        )
        .entered();
        let routes = |id: &RecordId| id.is_global() || *id == RecordId::Bgp;
        self.batch.is_rerouted |= dirty.records.iter().any(routes);
        self.dataplane.update(self.state.records(), &dirty);
        self.batch.planning += started.elapsed();
        self.due
            .save
            .get_or_insert_with(|| (now() + SAVE_DELAY).max(self.due.next_save));
    }

    /// Commits the dataplane and answers those who wait for it.
    fn commit(&mut self) -> Result<(), RetriesExhausted> {
        self.update_dataplane();
        if !self.active {
            if !self.state.is_in_sync() {
                // Nothing is written yet, and an earlier run's rules may still let the pod's
                // packets pass: the CNI service has to remove the link first.
                for waiter in self.committed_waiters.drain(..) {
                    let _ = waiter.send(false);
                }
                return Ok(());
            }
            self.active = true;
            // The kernel may hold the table of an earlier run, and pods that run must not lose it:
            // reading it back makes the first commit a difference.
            self.dataplane.invalidate();
            // The first plan is due even if no frame has brought a record of routing.
            self.batch.is_rerouted = true;
        }
        let started = now();
        if self.due.retry.is_some_and(|due| started < due) {
            return Ok(());
        }
        let span = self.batch.span.clone().unwrap_or_else(Span::none);
        let result = span.in_scope(|| self.dataplane.commit(self.state.records(), started));
        match result {
            Ok(committed) => {
                self.handle_committed(committed, started.elapsed());
                Ok(())
            }
            Err(error) => self.handle_failure(error),
        }
    }

    fn handle_committed(&mut self, committed: Committed, took: Duration) {
        let Committed {
            operations,
            repairs,
            is_unread,
        } = committed;
        if self.status.borrow().enforcing {
            self.metrics.repairs.inc_by(repairs);
        }
        if is_unread {
            self.due.check = now() + RECHECK_DELAY;
        }
        self.retry.reset();
        self.due.retry = None;
        let batch = std::mem::replace(&mut self.batch, Batch::new());
        if operations > 0 {
            self.metrics.record_commit(operations, batch.planning, took);
        }
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        if batch.event_unix_ns > 0 {
            self.metrics
                .record_lag(since_epoch.saturating_sub(Duration::from_nanos(batch.event_unix_ns)));
        }
        if batch.is_rerouted {
            let (linked, records) = (&self.linked, self.state.records());
            self.routing
                .set_plan(|| plan::plan(&self.node, records, &linked.local_pods()));
        } else if batch.is_relinked {
            // Planning only the node's own pods: the cluster has thousands of routes where a node
            // has dozens of pods.
            self.routing.set_pods(self.linked.local_pods());
        }
        if batch.is_rerouted || batch.is_relinked {
            self.send_bgp_inputs();
        }
        self.metrics
            .pods
            .set(self.dataplane.attached().len() as i64);
        if batch.frames {
            let traceparent = batch
                .span
                .as_ref()
                .and_then(telemetry::of)
                .map(|context| context.to_string());
            let ack = Ack {
                revision: self.state.revision(),
                errors: Vec::new(),
                plan_us: micros(batch.planning),
                commit_us: micros(took),
                traceparent: traceparent.unwrap_or_default(),
                waited_us: 0,
            };
            // After the plan was set: the acknowledgement waits for the generation that contains
            // it.
            self.acks.push(ack, self.routing.generation());
        }
        self.publish_status();
        self.answer_waiters();
    }

    fn send_bgp_inputs(&self) {
        let pods = self.linked.local_pods();
        let inputs = BgpInputs::new(&self.node, self.state.records(), &pods);
        self.bgp.send_if_modified(|known| {
            let is_new = known.as_deref() != Some(&inputs);
            *known = Some(Arc::new(inputs));
            is_new
        });
    }

    /// Publishes status, metrics and the acknowledgement that is due.
    fn publish_status(&mut self) {
        // Before the errors: they must be those of this generation or of a newer one.
        let applied = self.routing.applied_generation();
        let mut errors = self.dataplane.errors();
        let of_routing = self.routing.update_errors(&self.node, self.state.records());
        errors.extend(
            of_routing
                .iter()
                .map(|(id, reason)| (id.clone(), reason.clone())),
        );
        let (in_sync, revision) = (self.state.is_in_sync(), self.state.revision());
        self.metrics.errors.set(errors.len() as i64);
        self.metrics.in_sync.set(i64::from(in_sync));
        self.metrics
            .revision
            .set(i64::try_from(revision).unwrap_or(i64::MAX));
        let now = self::now();
        let routing = self.routing.check_fault(now);
        self.due.fault = self.routing.next_check(now);
        self.status.send_if_modified(|status| {
            for (id, reason) in errors
                .iter()
                .filter(|(id, reason)| status.errors.get(*id) != Some(*reason))
            {
                tracing::warn!(record = ?id, reason, "record is not enforced as written");
            }
            let server = std::mem::take(&mut status.server);
            let errors = errors.clone();
            let new = Status {
                in_sync,
                enforcing: true,
                revision,
                server,
                errors,
                failing: None,
                routing,
            };
            let changed = Status {
                server: new.server.clone(),
                ..status.clone()
            } != new;
            *status = new;
            changed
        });
        // After the status: whoever reads an acknowledgement finds the status that belongs to it.
        self.acks.publish(applied, &errors);
    }

    /// Answers the ADDs whose pods have their policy in the kernel, and the DELs.
    fn answer_waiters(&mut self) {
        let decided: Vec<String> = self
            .waiters
            .keys()
            .filter(|interface| self.dataplane.has_policy(interface))
            .cloned()
            .collect();
        for interface in decided {
            let result = self
                .dataplane
                .refusal(&interface)
                .map_or(Ok(()), |reason| Err(NotEnforced::Refused(reason)));
            for waiter in self.waiters.remove(&interface).into_iter().flatten() {
                // The caller may have timed out; it asks again.
                let _ = waiter.send(result.clone());
            }
        }
        self.waiters.retain(|_, waiters| {
            waiters.retain(|waiter| !waiter.is_closed());
            !waiters.is_empty()
        });
        for waiter in self.committed_waiters.drain(..) {
            let _ = waiter.send(true);
        }
    }

    fn handle_failure(&mut self, error: CommitError) -> Result<(), RetriesExhausted> {
        let CommitError { attempts, reason } = error;
        self.metrics.failures.inc();
        tracing::warn!(
            attempt = attempts,
            reason,
            "nftables could not be programmed; trying again"
        );
        self.status
            .send_modify(|status| status.failing = Some(reason.clone()));
        if attempts >= MAX_ATTEMPTS {
            return Err(RetriesExhausted { attempts, reason });
        }
        self.due.retry = Some(now() + self.retry.next(jitter()));
        Ok(())
    }
}

impl Batch {
    const fn new() -> Self {
        Self {
            span: None,
            planning: Duration::ZERO,
            event_unix_ns: 0,
            frames: false,
            is_rerouted: false,
            is_relinked: false,
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

mod deadlines;
mod saving;
#[cfg(test)]
mod tests;
