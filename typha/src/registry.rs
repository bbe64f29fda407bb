//! The nodes that have a stream to this replica, and how far each has come.
//!
//! Shared by the owner task (what was sent), the tasks that read from nodes (acks) and the debug service. Nothing here is
//! needed to decide what a node is sent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use dashmap::DashMap;
use margay_calc::model::RecordId;
use margay_proto::sync::{Ack, NodeProblem};
use margay_runtime::telemetry::Traceparent;
use tokio::sync::watch;

/// Frames without an ack that are remembered per node, for lag and traces; beyond that the oldest are forgotten.
const IN_FLIGHT: usize = 256;
/// Records that a node could not enforce that are remembered of one ack.
const ERRORS: usize = 256;
/// Characters of the reason that are remembered of each.
const REASON: usize = 512;

/// The sessions of this replica; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    nodes: DashMap<String, Arc<Node>>,
    /// What is wrong with nodes as a whole, with the session that said it: it may be said before the owner task has seen the hello.
    problems: DashMap<String, (u64, Vec<NodeProblem>)>,
    revision: AtomicU64,
    in_sync: AtomicBool,
    /// Rings when something has begun or ceased to be wrong.
    bell: watch::Sender<()>,
}

/// One node's stream.
#[derive(Debug)]
pub struct Node {
    /// The node, by its certificate.
    pub name: String,
    /// What the agent calls its version.
    pub agent_version: String,
    /// Number of the session in this process.
    pub session: u64,
    /// When it said hello.
    pub since: Instant,
    progress: Mutex<Progress>,
}

/// A frame that left.
#[derive(Debug, Clone)]
pub struct Sent {
    /// Revision that the node has with it.
    pub revision: u64,
    /// When it was handed to the stream.
    pub at: Instant,
    /// When the event that caused it was seen, in nanoseconds since the epoch; 0: a first frame.
    pub event_unix_ns: u64,
    /// The trace that it belongs to.
    pub trace: Option<Traceparent>,
}

/// What an ack brought.
#[derive(Debug, Default)]
pub struct Acked {
    /// Frames that are done with it, oldest first.
    pub done: Vec<Sent>,
    /// Records that the node cannot enforce, with why, that it did not say before.
    pub news: Vec<(RecordId, String)>,
    /// It cannot enforce others than before, or fewer.
    pub is_changed: bool,
}

/// How far a node has come.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Newest revision sent.
    pub sent: u64,
    /// Newest revision committed to the node's kernel.
    pub acked: u64,
    /// Changed records that could not be sent yet.
    pub pending: usize,
    /// Bytes of frames.
    pub bytes: u64,
    /// Records that the node could not enforce, with why, as of its last ack: the first of them, where they are very many.
    pub errors: Vec<(RecordId, String)>,
    /// Microseconds that the node planned, of its last ack.
    pub plan_us: u64,
    /// Microseconds that the kernel took, of its last ack.
    pub commit_us: u64,
    /// Frames without an ack, oldest first.
    pub in_flight: VecDeque<Sent>,
}

impl Registry {
    /// The node said hello; a former session of it is forgotten.
    pub fn enter(&self, name: &str, session: u64, agent_version: String) -> Arc<Node> {
        let node = Arc::new(Node {
            name: name.to_owned(),
            agent_version,
            session,
            since: Instant::now(),
            progress: Mutex::default(),
        });
        self.0.nodes.insert(name.to_owned(), node.clone());
        node
    }

    /// The session is over; a later one of the same node stays.
    pub fn leave(&self, name: &str, session: u64) {
        let node = self.0.nodes.remove_if(name, |_, node| node.session == session);
        let problems = self.0.problems.remove_if(name, |_, (of, _)| *of == session);
        if problems.is_some() || node.is_some_and(|(_, node)| !node.lock().errors.is_empty()) {
            self.ring();
        }
    }

    /// Something has begun or ceased to be wrong, here or with objects.
    pub fn ring(&self) {
        self.0.bell.send_replace(());
    }

    /// Tells when something has begun or ceased to be wrong.
    pub fn bell(&self) -> watch::Receiver<()> {
        self.0.bell.subscribe()
    }

    /// In this stream the node says what is wrong with it as a whole; the answer is what it did not say before.
    pub fn troubled(&self, name: &str, session: u64, problems: Vec<NodeProblem>) -> Vec<NodeProblem> {
        let former = self.0.problems.get(name).map(|known| known.value().clone());
        let (newest, former) = former.unwrap_or_default();
        if session < newest {
            return Vec::new();
        }
        self.0.problems.insert(name.to_owned(), (session, problems.clone()));
        if former != problems {
            self.ring();
        }
        problems.into_iter().filter(|problem| !former.contains(problem)).collect()
    }

    /// What is wrong with nodes as a whole, by node.
    pub fn problems(&self) -> BTreeMap<String, Vec<NodeProblem>> {
        self.0.problems.iter().map(|node| (node.key().clone(), node.value().1.clone())).collect()
    }

    /// Records that nodes cannot enforce, with why, by node.
    pub fn errors(&self) -> BTreeMap<String, Vec<(RecordId, String)>> {
        let errors = self.0.nodes.iter().map(|node| (node.name.clone(), node.lock().errors.clone()));
        errors.filter(|(_, errors)| !errors.is_empty()).collect()
    }

    /// What is wrong with the node as a whole, as it said last.
    pub fn problems_of(&self, name: &str) -> Vec<NodeProblem> {
        self.0.problems.get(name).map(|known| known.1.clone()).unwrap_or_default()
    }

    /// The node, if this is still its session.
    pub fn get(&self, name: &str, session: u64) -> Option<Arc<Node>> {
        let node = self.0.nodes.get(name)?;
        (node.session == session).then(|| node.clone())
    }

    /// Every node, by name.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        let mut nodes: Vec<_> = self.0.nodes.iter().map(|node| node.clone()).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    /// Revision of this replica.
    pub fn revision(&self) -> u64 {
        self.0.revision.load(Ordering::Relaxed)
    }

    /// The replica has come to this revision.
    pub fn set_revision(&self, revision: u64) {
        self.0.revision.store(revision, Ordering::Relaxed);
    }

    /// Whether this replica has seen the whole API.
    pub fn in_sync(&self) -> bool {
        self.0.in_sync.load(Ordering::Relaxed)
    }

    /// This replica has seen the whole API.
    pub fn set_in_sync(&self) {
        self.0.in_sync.store(true, Ordering::Relaxed);
    }

    /// Nodes with a stream, and how many of them enforce everything that this replica knows.
    pub fn realised(&self) -> (usize, usize) {
        let counts = self.0.nodes.iter().map(|node| node.progress().is_current());
        counts.fold((0, 0), |(all, current), is| (all + 1, current + usize::from(is)))
    }
}

impl Node {
    /// How far the node has come.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    /// A frame was handed to the stream.
    pub fn sent(&self, sent: Sent, bytes: usize) {
        let mut progress = self.lock();
        progress.sent = sent.revision;
        progress.bytes += bytes as u64;
        progress.pending = 0;
        if progress.in_flight.len() >= IN_FLIGHT {
            progress.in_flight.pop_front();
        }
        progress.in_flight.push_back(sent);
    }

    /// The node does not take frames; so many records wait.
    pub fn waiting(&self, pending: usize) {
        self.lock().pending = pending;
    }

    /// The node has committed a revision.
    pub fn acked(&self, ack: &Ack) -> Acked {
        let mut progress = self.lock();
        progress.acked = progress.acked.max(ack.revision).min(progress.sent);
        progress.plan_us = ack.plan_us;
        progress.commit_us = ack.commit_us;
        let told = ack.errors.iter().take(ERRORS);
        let told: Vec<_> = told.map(|(id, reason)| (id.clone(), reason.chars().take(REASON).collect())).collect();
        let is_changed = progress.errors != told;
        let former: BTreeSet<_> = std::mem::replace(&mut progress.errors, told.clone()).into_iter().collect();
        let news = told.into_iter().filter(|error| !former.contains(error)).collect();
        let done = progress.in_flight.partition_point(|sent| sent.revision <= ack.revision);
        Acked { done: progress.in_flight.drain(..done).collect(), news, is_changed }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// Whether the node enforces everything that it should.
    pub fn is_current(&self) -> bool {
        self.sent > 0 && self.acked == self.sent && self.pending == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(errors: &[(RecordId, String)]) -> Ack {
        Ack { errors: errors.to_vec(), ..Ack::default() }
    }

    #[test]
    fn what_is_wrong_with_a_node_goes_with_its_session() {
        let registry = Registry::default();
        let problem = |code: &str| NodeProblem::new(code, "no route", true);
        assert_eq!(registry.troubled("n1", 1, vec![problem("a")]), [problem("a")], "before its hello has been seen");
        registry.enter("n1", 1, String::new());
        assert_eq!(registry.troubled("n1", 1, vec![problem("a"), problem("b")]), [problem("b")]);
        registry.enter("n1", 2, String::new());
        assert_eq!(registry.troubled("n1", 2, vec![problem("b")]), []);
        assert_eq!(registry.troubled("n1", 1, vec![problem("c")]), [], "a session that is over");
        registry.leave("n1", 1);
        assert_eq!(registry.problems_of("n1"), [problem("b")]);
        registry.leave("n1", 2);
        assert_eq!(registry.problems_of("n1"), []);
    }

    #[test]
    fn what_a_node_cannot_enforce_is_news_once_and_of_limited_size() {
        let node = Registry::default().enter("n1", 1, String::new());
        let error = |name: &str, reason: &str| (RecordId::HostEndpoint(name.to_owned()), reason.to_owned());
        let first = [error("a", "x"), error("b", "x")];
        assert_eq!(node.acked(&ack(&first)).news, first);
        assert_eq!(node.acked(&ack(&first)).news, []);
        let second = [error("b", "y"), error("a", "x")];
        assert_eq!(node.acked(&ack(&second)).news, [error("b", "y")], "for another reason");
        assert_eq!(node.acked(&ack(&[])).news, []);
        assert_eq!(node.acked(&ack(&second)).news, second, "again");

        let long = "ä".repeat(10_000);
        let many: Vec<_> = (0..5000).map(|number| error(&number.to_string(), &long)).collect();
        assert_eq!(node.acked(&ack(&many)).news.len(), ERRORS);
        assert_eq!(node.acked(&ack(&many)).news, []);
        let kept = node.progress().errors;
        assert_eq!((kept.len(), kept[0].1.chars().count()), (ERRORS, REASON));
    }
}
