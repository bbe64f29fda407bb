//! A cluster and what happens to it: objects change, replicas and agents end and start, connections
//! suffer. In the end all faults stop, and everybody must come to the same.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::sleep;

use crate::api::Api;
use crate::judge;
use crate::network::Line;
use crate::node::Node;
use crate::objects;
use crate::oracle;
use crate::replica::{Place, Process};
use crate::run::Run;
use crate::serve::{Cut, ListFault};

/// Replicas of typha.
const REPLICAS: usize = 2;
/// Nodes.
const NODES: usize = 3;
/// Interval at which it is looked whether everybody has arrived.
const LOOK: Duration = Duration::from_millis(250);
/// Virtual time by which everybody must have arrived once faults have stopped: a silent watch is
/// noticed after 60 s, a request without an answer after 30 s.
const PATIENCE: Duration = Duration::from_secs(240);

/// What happens in one step; numbers are taken modulo what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Objects change.
    Change(u8),
    /// Watches of a replica are cut.
    CutWatches(u8, Cut),
    /// A replica cannot reach the API server, or can again.
    ShutDoor(u8, bool),
    /// The next list of a replica is bad, and it has to list.
    SpoilList(u8, ListFault),
    /// The API server forgets its past.
    Compact,
    /// Requests of a replica fail.
    Refuse(u8, u8),
    /// A node's connection breaks, or does in the middle of a frame.
    CutStream(u8, bool),
    /// A node and a replica are parted, or joined.
    Part(u8, u8, bool),
    /// A node stops reading, or goes on.
    Slow(u8, bool),
    /// A node goes to another replica.
    Switch(u8),
    /// A replica is killed.
    KillReplica(u8),
    /// A replica sends its nodes away and ends.
    DrainReplica(u8),
    /// A replica starts.
    StartReplica(u8),
    /// An agent is killed.
    KillAgent(u8),
    /// An agent starts.
    StartAgent(u8),
    /// A node boots.
    Reboot(u8),
    /// An agent saves its view.
    Save(u8),
    /// The clock jumps, in seconds.
    Jump(u8),
}

/// A step of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What happens.
    pub action: Action,
    /// What is random in it, so that it does not depend on other steps.
    pub seed: u64,
    /// Time until the next step, in milliseconds.
    pub wait: u64,
}

impl Step {
    /// A random step.
    pub fn random(dice: &mut fastrand::Rng) -> Self {
        let (one, other, is) = (dice.u8(..), dice.u8(..), dice.bool());
        let cuts = [Cut::End, Cut::Break, Cut::HalfLine, Cut::Expired];
        let lists = [
            ListFault::Old,
            ListFault::Empty,
            ListFault::Partial,
            ListFault::Unfinished,
        ];
        let action = match dice.u8(0..64) {
            0..30 => Action::Change(1 + other % 4),
            30..33 => Action::CutWatches(one, cuts[usize::from(other) % cuts.len()]),
            33..35 => Action::ShutDoor(one, is),
            35..38 => Action::SpoilList(one, lists[usize::from(other) % lists.len()]),
            38 => Action::Compact,
            39 => Action::Refuse(one, 1 + other % 4),
            40..44 => Action::CutStream(one, is),
            44..46 => Action::Part(one, other, is),
            46..49 => Action::Slow(one, is),
            49..51 => Action::Switch(one),
            51 => Action::KillReplica(one),
            52 => Action::DrainReplica(one),
            53..56 => Action::StartReplica(one),
            56 => Action::KillAgent(one),
            57..59 => Action::StartAgent(one),
            59 => Action::Reboot(one),
            60..62 => Action::Save(one),
            62 => Action::Jump(other % 70),
            _ => Action::Change(12),
        };
        let wait = match dice.u8(0..8) {
            0 => 0,
            1..6 => dice.u64(1..12),
            6 => dice.u64(10..60),
            _ => dice.u64(60..1500),
        };
        Self {
            action,
            seed: dice.u64(..),
            wait,
        }
    }
}

/// The cluster.
pub struct Cluster {
    run: Run,
    api: Api,
    names: Vec<String>,
    places: Vec<Place>,
    nodes: Vec<Node>,
    processes: u64,
}

impl Cluster {
    /// Creates a cluster in which everything runs.
    pub fn new(run: &Run) -> Self {
        let names: Vec<String> = (0..NODES).map(|number| format!("n{number}")).collect();
        let api = Api::default();
        objects::ground(&api, &names);
        let places: Vec<Place> = (0..REPLICAS).map(|_| Arc::new(Mutex::new(None))).collect();
        let nodes = names
            .iter()
            .enumerate()
            .map(|(number, name)| Node::new(run, name, number, &places))
            .collect();
        let mut cluster = Self {
            run: run.clone(),
            api,
            names,
            places,
            nodes,
            processes: 0,
        };
        (0..REPLICAS).for_each(|replica| cluster.start_replica(replica));
        cluster.nodes.iter_mut().for_each(Node::start);
        cluster
    }

    /// Takes the steps, then lets everybody arrive. Ends at the first violation.
    pub async fn play(&mut self, steps: &[Step]) {
        for step in steps {
            self.run.note("step", || format!("{:?}", step.action));
            self.act(*step).await;
            sleep(Duration::from_millis(step.wait)).await;
            self.check_kernels();
            if self.run.violation().is_some() {
                return;
            }
        }
        self.heal();
        self.arrive().await;
        self.check_resume().await;
    }

    async fn act(&mut self, step: Step) {
        let mut dice = fastrand::Rng::with_seed(step.seed);
        match step.action {
            Action::Change(changes) => {
                for _ in 0..changes {
                    let text = objects::change(&self.api, &self.names, &mut dice);
                    self.run.note("api", || text);
                }
            }
            Action::CutWatches(replica, cut) => {
                self.with_door(replica, |door| door.cut(cut, &mut dice))
            }
            Action::ShutDoor(replica, is_shut) => {
                self.with_door(replica, |door| door.set_shut(is_shut))
            }
            Action::SpoilList(replica, fault) => self.with_door(replica, |door| {
                door.spoil_list(fault);
                door.cut(Cut::Expired, &mut dice);
            }),
            Action::Compact => self
                .api
                .with(|contents| contents.compacted = contents.version),
            Action::Refuse(replica, requests) => {
                self.with_door(replica, |door| door.refuse(u32::from(requests)))
            }
            Action::CutStream(node, is_torn) => self.line(node).cut(None, is_torn),
            Action::Part(node, replica, is_apart) => self
                .line(node)
                .set_apart(usize::from(replica) % REPLICAS, is_apart),
            Action::Slow(node, is_slow) => self.line(node).set_slow(is_slow),
            Action::Switch(node) => self.line(node).switch(),
            Action::KillReplica(replica) => self.kill_replica(usize::from(replica) % REPLICAS),
            Action::DrainReplica(replica) => {
                let place = self.places[usize::from(replica) % REPLICAS].lock();
                place.iter().for_each(Process::drain);
            }
            Action::StartReplica(replica) => self.start_replica(usize::from(replica) % REPLICAS),
            Action::KillAgent(node) => self.node(node).kill(),
            Action::StartAgent(node) => self.node(node).start(),
            Action::Reboot(node) => {
                self.node(node).reboot();
                self.node(node).start();
            }
            Action::Save(node) => self.node(node).save(),
            Action::Jump(seconds) => {
                tokio::time::advance(Duration::from_secs(u64::from(seconds))).await
            }
        }
    }

    fn node(&mut self, node: u8) -> &mut Node {
        &mut self.nodes[usize::from(node) % NODES]
    }

    fn line(&self, node: u8) -> &Arc<Line> {
        &self.nodes[usize::from(node) % NODES].line
    }

    fn with_door(&self, replica: u8, work: impl FnOnce(&crate::serve::Door)) {
        let place = self.places[usize::from(replica) % REPLICAS].lock();
        if let Some(process) = &*place {
            work(&process.door);
        }
    }

    /// Starts a replica where none runs.
    fn start_replica(&mut self, replica: usize) {
        let mut place = self.places[replica].lock();
        if place.as_ref().is_none_or(|process| !process.is_running()) {
            self.processes += 1;
            *place = Some(Process::start(
                &self.run,
                self.processes,
                &self.api,
                &self.names,
            ));
        }
    }

    fn kill_replica(&mut self, replica: usize) {
        self.run
            .note("cluster", || format!("replica {replica} is killed"));
        *self.places[replica].lock() = None;
        self.nodes
            .iter()
            .for_each(|node| node.line.cut(Some(replica), false));
    }

    fn heal(&mut self) {
        self.run.note("cluster", || "faults stop".to_owned());
        for replica in 0..REPLICAS {
            self.start_replica(replica);
            self.places[replica]
                .lock()
                .iter()
                .for_each(|process| process.door.heal());
        }
        for node in &mut self.nodes {
            node.line.heal();
            node.start();
        }
    }

    /// Waits until everybody has everything, or reports who has not.
    async fn arrive(&self) {
        let graph = oracle::final_graph(&self.api);
        let wanted: Vec<oracle::Records> = self
            .names
            .iter()
            .map(|name| oracle::view(&graph, name))
            .collect();
        let mut late = None;
        for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
            sleep(LOOK).await;
            self.check_kernels();
            late = self.late(&wanted);
            if late.is_none() || self.run.violation().is_some() {
                break;
            }
        }
        if let Some(late) = late {
            self.run
                .fail("cluster", format_args!("does not converge: {late}"));
        }
    }

    /// Who has not got everything, and what is missing.
    fn late(&self, wanted: &[oracle::Records]) -> Option<String> {
        let is_there = |place: &Place| {
            place
                .lock()
                .as_ref()
                .is_some_and(|process| process.registry.in_sync())
        };
        if let Some(replica) = self.places.iter().position(|place| !is_there(place)) {
            return Some(format!("replica {replica} is not in sync"));
        }
        for (node, wanted) in self.nodes.iter().zip(wanted) {
            let kernel = node.kernel.lock();
            let records = kernel.records.clone().unwrap_or_default();
            if records != *wanted {
                return Some(format!(
                    "{}: {}",
                    node.name,
                    judge::difference(&records, Some(wanted))
                ));
            }
            if !node.is_in_sync() {
                return Some(format!("{} is not in sync", node.name));
            }
            if let Some(unknown) = self.unacknowledged(node) {
                return Some(unknown);
            }
        }
        None
    }

    /// What the node's replica does not know to be enforced.
    fn unacknowledged(&self, node: &Node) -> Option<String> {
        let Some((replica, _, _)) = node.line.connection() else {
            return Some(format!("{} has no stream", node.name));
        };
        let place = self.places[replica].lock();
        let sessions = place
            .as_ref()
            .map(|process| process.registry.sessions())
            .unwrap_or_default();
        let session = sessions.iter().find(|session| session.name == node.name);
        let progress = session.map(|session| session.progress());
        match progress {
            Some(progress) if progress.is_current() => None,
            Some(progress) => Some(format!(
                "{} acknowledges {} of {}",
                node.name, progress.acked, progress.sent
            )),
            None => Some(format!("replica {replica} has no session of {}", node.name)),
        }
    }

    /// Sends every node to another replica, which has nothing to tell it.
    async fn check_resume(&self) {
        if self.run.violation().is_some() {
            return;
        }
        self.nodes.iter().for_each(|node| node.line.switch());
        let before: Vec<_> = self
            .nodes
            .iter()
            .map(|node| node.line.connection().map(|(_, number, _)| number))
            .collect();
        for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
            sleep(LOOK).await;
            let now = self.nodes.iter().map(|node| node.line.connection());
            let arrived = now
                .zip(&before)
                .all(|(now, before)| now.is_some_and(|(_, number, _)| Some(number) > *before));
            if arrived {
                break;
            }
        }
        for (node, before) in self.nodes.iter().zip(before) {
            match node.line.connection() {
                Some((_, number, 0)) if Some(number) > before => {}
                Some((_, number, resent)) if Some(number) > before => {
                    self.run.fail(
                        &node.name,
                        format_args!("is resent {resent} records by a replica with the same state"),
                    );
                }
                _ => self
                    .run
                    .fail(&node.name, "has not come back after its stream was cut"),
            }
        }
    }

    fn check_kernels(&self) {
        for node in &self.nodes {
            if node.kernel.lock().is_emptied() {
                self.run.fail(
                    &node.name,
                    "what was enforced is gone, and everything passes",
                );
            }
        }
    }
}
