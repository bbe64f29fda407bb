//! Which hellos are answered and when, and which nodes are sent to another replica.
//!
//! A hello waits while this replica is not in sync, while it may catch up with what the node holds,
//! and while many others are being answered. It is refused if another replica should answer it.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use margay_runtime::ready::Gate;
use tokio::time::Instant;
use tracing::{info, warn};

use super::GraphOwner;
use crate::freshness::{CATCH_UP, Comparison, CutOff, Freshness};
use crate::hello::Hello;
use crate::placement::Replica;

/// Views under way to their nodes; further hellos wait, so that a herd of nodes does not fill the
/// memory.
const MAX_OPENING: usize = 64;
/// Time between attempts to answer hellos that wait.
const LOOK: Duration = Duration::from_millis(10);
/// Time from a change of the replicas until nodes are moved, so that a rollout moves each once.
const SETTLE: Duration = Duration::from_secs(10);
/// Time between two nodes that are moved.
const MOVE_STEP: Duration = Duration::from_millis(50);

/// Hellos that wait, nodes that are to move, and when.
#[derive(Debug)]
pub(super) struct Admissions {
    /// In order of arrival, with the time of it.
    pub(super) waiting: VecDeque<(Hello, Instant)>,
    look_at: Option<Instant>,
    pub(super) freshness: Freshness,
    pub(super) gate: Gate,
    cut_off: Option<CutOff>,
    /// Nodes to send elsewhere, and when the next one is.
    moves: VecDeque<String>,
    move_at: Option<Instant>,
    /// When nodes whose place is elsewhere are looked for.
    settle_at: Option<Instant>,
    /// Nodes that were sent elsewhere since the replicas changed. One that comes back stays.
    moved: BTreeSet<String>,
}

enum Verdict {
    Answer,
    Wait,
    Refuse(String),
}

impl Admissions {
    /// Creates the state of a replica that is not in sync.
    pub(super) fn new(gate: Gate) -> Self {
        Self {
            waiting: VecDeque::new(),
            look_at: None,
            freshness: Freshness::default(),
            gate,
            cut_off: None,
            moves: VecDeque::new(),
            move_at: None,
            settle_at: None,
            moved: BTreeSet::new(),
        }
    }

    /// Time of the next thing to do.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let times = [
            self.look_at,
            self.move_at,
            self.settle_at,
            self.freshness.next_cut_off(now),
        ];
        times.into_iter().flatten().min()
    }
}

impl GraphOwner {
    /// Handles a new hello.
    pub(super) fn receive(&mut self, hello: Hello) {
        // A node has one stream: dropping the former hello ends the former stream.
        let waiting = &mut self.admissions.waiting;
        waiting.retain(|(early, _)| early.node != hello.node);
        let now = Instant::now();
        self.admit(hello, now, now);
    }

    /// Answers a hello, refuses it, or lets it wait.
    fn admit(&mut self, mut hello: Hello, since: Instant, now: Instant) {
        match self.judge(&mut hello, since, now) {
            Verdict::Answer => {
                // The digests of the view must be those of the current state.
                self.flush();
                info!(node = %hello.node, version = %hello.agent_version, "node connected");
                let node = hello.has_alternatives.then(|| hello.node.clone());
                self.hub.open_session(hello);
                if let Some(node) = node {
                    self.move_later(node, now);
                }
            }
            Verdict::Wait => {
                self.admissions.waiting.push_back((hello, since));
                // Before that, being in sync is what they wait for.
                if self.in_sync {
                    self.admissions.look_at.get_or_insert(now + LOOK);
                }
            }
            Verdict::Refuse(reason) => {
                info!(node = %hello.node, reason, "node sent to another replica");
                self.counters.refused_hellos.inc();
                let status = self.hub.away(&hello.node, &reason);
                // The slot is new, so it can only be closed: the node has disconnected.
                let _ = hello.slot.try_send(Err(status));
            }
        }
    }

    /// Looks at the hellos that wait, as far as there is room for views.
    fn admit_waiting(&mut self, now: Instant) {
        let mut waiting = std::mem::take(&mut self.admissions.waiting);
        while self.hub.count_opening(now) < MAX_OPENING
            && let Some((hello, since)) = waiting.pop_front()
        {
            self.admit(hello, since, now);
        }
        self.admissions.waiting.extend(waiting);
        if !self.admissions.waiting.is_empty() {
            self.admissions.look_at.get_or_insert(now + LOOK);
        }
    }

    fn judge(&mut self, hello: &mut Hello, since: Instant, now: Instant) -> Verdict {
        if !self.in_sync {
            return Verdict::Wait;
        }
        let freshness = &mut self.admissions.freshness;
        match freshness.compare(&hello.node, &hello.versions, now) {
            Comparison::Current => {}
            Comparison::Behind(_) if now < since + CATCH_UP => return Verdict::Wait,
            Comparison::Behind(kind) => {
                return Verdict::Refuse(format!(
                    "this replica does not know yet what the node holds of {kind}; connect to \
                     another one"
                ));
            }
            Comparison::Reverted(kind) => {
                warn!(
                    node = %hello.node,
                    kind,
                    "the API server is at an older state than the node; the node follows it",
                );
                hello.versions.clear();
            }
        }
        if hello.has_alternatives {
            if let Some(CutOff { kind, .. }) = &self.admissions.cut_off {
                return Verdict::Refuse(format!(
                    "this replica is cut off from the API server (watch of {kind}); connect to \
                     another one"
                ));
            }
            let limit = self.hub.placement.limit(self.hub.graph.node_count());
            if limit.is_some_and(|limit| self.hub.sessions() >= limit) {
                return Verdict::Refuse(
                    "this replica has its share of the nodes; connect to another one".to_owned(),
                );
            }
        }
        if self.hub.count_opening(now) >= MAX_OPENING {
            return Verdict::Wait;
        }
        Verdict::Answer
    }

    /// Sets the ready replicas.
    pub(super) fn set_replicas(&mut self, replicas: Vec<Replica>) {
        if self.hub.placement.set(replicas) {
            self.dirty = true;
            self.admissions.moved.clear();
            self.admissions.moves.clear();
            self.admissions.settle_at = Some(Instant::now() + SETTLE);
        }
    }

    /// Does what is due.
    pub(super) fn run_admissions(&mut self, now: Instant) {
        self.update_cut_off(now);
        if self.admissions.look_at.is_some_and(|due| due <= now) {
            self.admissions.look_at = None;
            self.admit_waiting(now);
        }
        if self.admissions.settle_at.is_some_and(|due| due <= now) {
            self.admissions.settle_at = None;
            self.plan_moves(self.hub.misplaced(), now);
        }
        if self.admissions.move_at.is_some_and(|due| due <= now) {
            self.move_next(now);
        }
    }

    /// Closes the gate while this replica is cut off from the API, and then sends its nodes to
    /// others, once: if these are cut off too, the nodes come back and stay.
    pub(super) fn update_cut_off(&mut self, now: Instant) {
        let cut_off = self.admissions.freshness.cut_off(now);
        if !self.in_sync || self.admissions.cut_off == cut_off {
            return;
        }
        let was_cut_off = self.admissions.cut_off.is_some();
        self.registry.set_cut_off(cut_off.is_some());
        match &cut_off {
            Some(CutOff { kind, reason }) => {
                self.admissions
                    .gate
                    .close(format!("cut off from the API, watch of {kind}: {reason}"));
                if !was_cut_off {
                    warn!(
                        kind,
                        reason, "cut off from the API; the last known state is served"
                    );
                    if self.hub.placement.has_others() {
                        self.admissions.moved.clear();
                        self.plan_moves(self.hub.nodes(), now);
                    }
                }
            }
            None => {
                info!("the API server answers again");
                self.admissions.gate.open();
                self.admissions.moves.clear();
            }
        }
        self.admissions.cut_off = cut_off;
    }

    /// Lets a node that came by the Service, behind which is any replica, go on to its place.
    fn move_later(&mut self, node: String, now: Instant) {
        let admissions = &self.admissions;
        // After a change of the replicas all are looked at.
        if admissions.settle_at.is_none()
            && !admissions.moved.contains(&node)
            && self.hub.is_misplaced(&node)
        {
            self.admissions.moves.push_back(node);
            self.admissions.move_at.get_or_insert(now + MOVE_STEP);
        }
    }

    fn plan_moves(&mut self, nodes: Vec<String>, now: Instant) {
        if !nodes.is_empty() {
            info!(
                nodes = nodes.len(),
                "sending nodes to the replicas that are to serve them"
            );
        }
        self.admissions.moves = nodes.into();
        self.admissions.move_at = Some(now);
    }

    fn move_next(&mut self, now: Instant) {
        self.admissions.move_at = None;
        while let Some(node) = self.admissions.moves.pop_front() {
            let is_cut_off = self.admissions.cut_off.is_some();
            if !(is_cut_off || self.hub.is_misplaced(&node))
                || !self.admissions.moved.insert(node.clone())
            {
                continue;
            }
            let reason = "another replica is to serve this node; connect to it";
            let status = self.hub.away(&node, reason);
            if self.hub.close_with(&node, status) {
                self.counters.moved_nodes.inc();
                self.admissions.move_at = Some(now + MOVE_STEP);
                return;
            }
        }
    }
}
