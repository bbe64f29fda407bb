//! Sessions of this replica and the progress of each node.
//!
//! Shared by the owner task (frames sent), the tasks that read from nodes (acks) and the debug
//! service. No decision about what to send depends on it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use dashmap::DashMap;
use margay_calc::model::RecordId;
use margay_proto::sync::{Ack, NodeProblem};
use margay_runtime::telemetry::Traceparent;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

/// Maximal number of frames without ack that are kept per node, for latencies and traces; the
/// oldest are dropped.
const MAX_IN_FLIGHT: usize = 256;
/// Number of acknowledged frames whose stages are kept per node.
const MAX_ACKED: usize = 16;
/// Maximal number of errors kept of one ack.
const MAX_ERRORS: usize = 256;
/// Maximal length of the reason of each, in characters.
const MAX_REASON: usize = 512;

/// Sessions of this replica; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    nodes: DashMap<String, Arc<NodeSession>>,
    /// Problems of nodes with the session that reported them: they may arrive before the owner task
    /// has handled the hello.
    problems: DashMap<String, (u64, Vec<NodeProblem>)>,
    revision: AtomicU64,
    in_sync: AtomicBool,
    cut_off: AtomicBool,
    /// Notified when a problem appears or disappears.
    problems_changed: watch::Sender<()>,
}

/// Session of a node.
#[derive(Debug)]
pub struct NodeSession {
    /// The node, by its certificate.
    pub name: String,
    /// Version reported by the agent.
    pub agent_version: String,
    /// Number of the session in this process.
    pub session: u64,
    /// Time of its hello.
    pub since: Instant,
    progress: Mutex<Progress>,
}

/// A frame that was sent.
#[derive(Debug, Clone)]
pub struct SentFrame {
    /// Revision of the node after it.
    pub revision: u64,
    /// Time at which it was passed to the stream.
    pub at: Instant,
    /// Time at which the event that caused it was received, in nanoseconds since the epoch; 0 for
    /// the first frame.
    pub event_unix_ns: u64,
    /// Trace that it belongs to.
    pub trace: Option<Traceparent>,
}

/// What became of a frame that was acknowledged. Times are in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameStages {
    /// Revision of the node after it.
    pub revision: u64,
    /// Time at which the event that caused it was received, in nanoseconds since the epoch; 0 for
    /// the first frame.
    pub event_unix_ns: u64,
    /// From the event to the stream.
    pub sent_us: u64,
    /// From the event to the ack, as if that had been sent at once.
    pub acked_us: u64,
    /// To compute the wanted kernel state.
    pub plan_us: u64,
    /// To commit it to the kernel.
    pub commit_us: u64,
}

impl FrameStages {
    /// Stages of a frame as of its ack, which arrives at this time.
    fn new(sent: &SentFrame, ack: &Ack, now: Instant, now_unix_ns: u64) -> Self {
        let since_sent = now.saturating_duration_since(sent.at).as_micros() as u64;
        // The clock may have been set meanwhile.
        let since_event = match sent.event_unix_ns {
            0 => 0,
            event => now_unix_ns.saturating_sub(event) / 1000,
        };
        Self {
            revision: sent.revision,
            event_unix_ns: sent.event_unix_ns,
            sent_us: since_event.saturating_sub(since_sent),
            acked_us: since_event.saturating_sub(ack.waited_us),
            plan_us: ack.plan_us,
            commit_us: ack.commit_us,
        }
    }
}

/// Result of recording an ack.
#[derive(Debug, Default)]
pub struct AckOutcome {
    /// Frames that it acknowledges, oldest first.
    pub done: Vec<SentFrame>,
    /// Records that the node cannot enforce, with the reason, unless reported before.
    pub new_errors: Vec<(RecordId, String)>,
    /// The set of errors differs from that of the previous ack.
    pub is_changed: bool,
}

/// Progress of a node.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Latest revision sent.
    pub sent: u64,
    /// Latest revision committed to the node's kernel.
    pub acked: u64,
    /// Number of records with changes that could not be sent yet.
    pub pending: usize,
    /// Bytes of frames sent.
    pub bytes: u64,
    /// Records that the node could not enforce, with the reason, as of its last ack; limited in
    /// number.
    pub errors: Vec<(RecordId, String)>,
    /// Time to compute the wanted kernel state, as of the last ack, in microseconds.
    pub plan_us: u64,
    /// Time to commit it to the kernel, as of the last ack, in microseconds.
    pub commit_us: u64,
    /// Frames without an ack, oldest first.
    pub in_flight: VecDeque<SentFrame>,
    /// The latest frames with one, oldest first; limited in number.
    pub done: VecDeque<FrameStages>,
}

impl Registry {
    /// Adds a session, replacing an earlier one of the node.
    pub fn add(&self, name: &str, session: u64, agent_version: String) -> Arc<NodeSession> {
        let node = Arc::new(NodeSession {
            name: name.to_owned(),
            agent_version,
            session,
            since: Instant::now(),
            progress: Mutex::default(),
        });
        self.0.nodes.insert(name.to_owned(), node.clone());
        node
    }

    /// Removes a session; a later one of the same node stays.
    pub fn remove(&self, name: &str, session: u64) {
        let node = self
            .0
            .nodes
            .remove_if(name, |_, node| node.session == session);
        let problems = self.0.problems.remove_if(name, |_, (of, _)| *of == session);
        if problems.is_some() || node.is_some_and(|(_, node)| !node.lock().errors.is_empty()) {
            self.notify_problems();
        }
    }

    /// Notifies subscribers that a problem appeared or disappeared, of a node or an object.
    pub fn notify_problems(&self) {
        self.0.problems_changed.send_replace(());
    }

    /// Subscribes to changes of problems.
    pub fn subscribe(&self) -> watch::Receiver<()> {
        self.0.problems_changed.subscribe()
    }

    /// Replaces the problems that a node reported on this stream; returns those that it did not
    /// report before.
    pub fn set_problems(
        &self,
        name: &str,
        session: u64,
        problems: Vec<NodeProblem>,
    ) -> Vec<NodeProblem> {
        let former = self.0.problems.get(name).map(|known| known.value().clone());
        let (newest, former) = former.unwrap_or_default();
        // A late report of a session that has been replaced.
        if session < newest {
            return Vec::new();
        }
        self.0
            .problems
            .insert(name.to_owned(), (session, problems.clone()));
        if former != problems {
            self.notify_problems();
        }
        problems
            .into_iter()
            .filter(|problem| !former.contains(problem))
            .collect()
    }

    /// Problems of nodes as a whole, by node.
    pub fn problems(&self) -> BTreeMap<String, Vec<NodeProblem>> {
        self.0
            .problems
            .iter()
            .map(|node| (node.key().clone(), node.value().1.clone()))
            .collect()
    }

    /// Records that nodes cannot enforce, with the reason, by node.
    pub fn errors(&self) -> BTreeMap<String, Vec<(RecordId, String)>> {
        let errors = self
            .0
            .nodes
            .iter()
            .map(|node| (node.name.clone(), node.lock().errors.clone()));
        errors.filter(|(_, errors)| !errors.is_empty()).collect()
    }

    /// Problems of the node as a whole, as of its last report.
    pub fn problems_of(&self, name: &str) -> Vec<NodeProblem> {
        self.0
            .problems
            .get(name)
            .map(|known| known.1.clone())
            .unwrap_or_default()
    }

    /// Looks up a session; `None` if the node has a later one.
    pub fn get(&self, name: &str, session: u64) -> Option<Arc<NodeSession>> {
        let node = self.0.nodes.get(name)?;
        (node.session == session).then(|| node.clone())
    }

    /// All sessions, by name of the node.
    pub fn sessions(&self) -> Vec<Arc<NodeSession>> {
        let mut nodes: Vec<_> = self.0.nodes.iter().map(|node| node.clone()).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    /// Revision of this replica.
    pub fn revision(&self) -> u64 {
        self.0.revision.load(Ordering::Relaxed)
    }

    /// Sets the revision of this replica.
    pub fn set_revision(&self, revision: u64) {
        self.0.revision.store(revision, Ordering::Relaxed);
    }

    /// Returns true if this replica is in sync with the API.
    pub fn in_sync(&self) -> bool {
        self.0.in_sync.load(Ordering::Relaxed)
    }

    /// Marks this replica as in sync with the API.
    pub fn set_in_sync(&self) {
        self.0.in_sync.store(true, Ordering::Relaxed);
    }

    /// Returns true if the API server has not answered this replica for a while.
    pub fn is_cut_off(&self) -> bool {
        self.0.cut_off.load(Ordering::Relaxed)
    }

    /// Sets whether the API server answers.
    pub fn set_cut_off(&self, is_cut_off: bool) {
        self.0.cut_off.store(is_cut_off, Ordering::Relaxed);
    }

    /// Number of nodes with a session, and of those that enforce the latest revision.
    pub fn count_current(&self) -> (usize, usize) {
        let counts = self.0.nodes.iter().map(|node| node.progress().is_current());
        counts.fold((0, 0), |(all, current), is| {
            (all + 1, current + usize::from(is))
        })
    }
}

impl NodeSession {
    /// Progress of the node.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    /// Records that a frame was passed to the stream.
    pub fn record_sent(&self, sent: SentFrame, bytes: usize) {
        let mut progress = self.lock();
        progress.sent = sent.revision;
        progress.bytes += bytes as u64;
        progress.pending = 0;
        if progress.in_flight.len() >= MAX_IN_FLIGHT {
            progress.in_flight.pop_front();
        }
        progress.in_flight.push_back(sent);
    }

    /// Records the number of pending records of a node that does not read.
    pub fn set_pending(&self, pending: usize) {
        self.lock().pending = pending;
    }

    /// Records an ack that arrives at this time.
    pub fn record_ack(&self, ack: &Ack, now: Instant, now_unix_ns: u64) -> AckOutcome {
        let mut progress = self.lock();
        // Never beyond what was sent, whatever the node reports.
        progress.acked = progress.acked.max(ack.revision).min(progress.sent);
        progress.plan_us = ack.plan_us;
        progress.commit_us = ack.commit_us;
        let errors = ack.errors.iter().take(MAX_ERRORS);
        let errors: Vec<_> = errors
            .map(|(id, reason)| (id.clone(), reason.chars().take(MAX_REASON).collect()))
            .collect();
        let is_changed = progress.errors != errors;
        let former: BTreeSet<_> = std::mem::replace(&mut progress.errors, errors.clone())
            .into_iter()
            .collect();
        let new_errors = errors
            .into_iter()
            .filter(|error| !former.contains(error))
            .collect();
        let done = progress
            .in_flight
            .partition_point(|sent| sent.revision <= ack.revision);
        let done: Vec<SentFrame> = progress.in_flight.drain(..done).collect();
        let stages = done
            .iter()
            .map(|sent| FrameStages::new(sent, ack, now, now_unix_ns));
        progress.done.extend(stages);
        let excess = progress.done.len().saturating_sub(MAX_ACKED);
        progress.done.drain(..excess);
        AckOutcome {
            done,
            new_errors,
            is_changed,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock()
    }
}

impl Progress {
    /// Returns true if the node enforces everything that it should.
    pub fn is_current(&self) -> bool {
        self.sent > 0 && self.acked == self.sent && self.pending == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(errors: &[(RecordId, String)]) -> Ack {
        Ack {
            errors: errors.to_vec(),
            ..Ack::default()
        }
    }

    fn acked(node: &NodeSession, ack: &Ack) -> AckOutcome {
        node.record_ack(ack, Instant::now(), 0)
    }

    #[test]
    fn stages_of_acknowledged_frames_are_kept_and_add_up() {
        let node = Registry::default().add("n1", 1, String::new());
        let at = Instant::now();
        let event_unix_ns = 5_000_000_000;
        for revision in 1..=20 {
            let sent = SentFrame {
                revision,
                at,
                event_unix_ns,
                trace: None,
            };
            node.record_sent(sent, 0);
        }
        let ack = Ack {
            revision: 19,
            plan_us: 2,
            commit_us: 3,
            waited_us: 100,
            ..Ack::default()
        };
        let later = at + std::time::Duration::from_micros(700);
        node.record_ack(&ack, later, event_unix_ns + 1_000_000);
        let done = node.progress().done;
        assert_eq!(done.len(), MAX_ACKED);
        assert_eq!(
            done.back(),
            Some(&FrameStages {
                revision: 19,
                event_unix_ns,
                sent_us: 300,
                acked_us: 900,
                plan_us: 2,
                commit_us: 3,
            })
        );
    }

    #[test]
    fn problems_of_a_node_end_with_its_session() {
        let registry = Registry::default();
        let problem = |code: &str| NodeProblem::new(code, "no route", true);
        assert_eq!(
            registry.set_problems("n1", 1, vec![problem("a")]),
            [problem("a")],
            "before its hello has been seen"
        );
        registry.add("n1", 1, String::new());
        assert_eq!(
            registry.set_problems("n1", 1, vec![problem("a"), problem("b")]),
            [problem("b")]
        );
        registry.add("n1", 2, String::new());
        assert_eq!(registry.set_problems("n1", 2, vec![problem("b")]), []);
        assert_eq!(
            registry.set_problems("n1", 1, vec![problem("c")]),
            [],
            "a session that is over"
        );
        registry.remove("n1", 1);
        assert_eq!(registry.problems_of("n1"), [problem("b")]);
        registry.remove("n1", 2);
        assert_eq!(registry.problems_of("n1"), []);
    }

    #[test]
    fn errors_of_a_node_are_new_once_and_limited_in_size() {
        let node = Registry::default().add("n1", 1, String::new());
        let error =
            |name: &str, reason: &str| (RecordId::HostEndpoint(name.to_owned()), reason.to_owned());
        let first = [error("a", "x"), error("b", "x")];
        assert_eq!(acked(&node, &ack(&first)).new_errors, first);
        assert_eq!(acked(&node, &ack(&first)).new_errors, []);
        let second = [error("b", "y"), error("a", "x")];
        assert_eq!(
            acked(&node, &ack(&second)).new_errors,
            [error("b", "y")],
            "for another reason"
        );
        assert_eq!(acked(&node, &ack(&[])).new_errors, []);
        assert_eq!(acked(&node, &ack(&second)).new_errors, second, "again");

        let long = "ä".repeat(10_000);
        let many: Vec<_> = (0..5000)
            .map(|number| error(&number.to_string(), &long))
            .collect();
        assert_eq!(acked(&node, &ack(&many)).new_errors.len(), MAX_ERRORS);
        assert_eq!(acked(&node, &ack(&many)).new_errors, []);
        let kept = node.progress().errors;
        assert_eq!(
            (kept.len(), kept[0].1.chars().count()),
            (MAX_ERRORS, MAX_REASON)
        );
    }
}
