//! Allocators of several nodes over one storage, and the runtimes that ask them. Agents end in the
//! middle of what they do, answers get lost, requests overtake each other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::ipam::block::Block;
use margay_ipam::allocator::Allocator;
use margay_ipam::check::overlaps;
use margay_ipam::inputs::{BlockMap, Inputs};
use margay_ipam::limits::KnownLimits;
use margay_ipam::pools::{NodePool, Pools};
use margay_ipam::request::AddressRequest;
use margay_ipam::store::memory::Memory;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::run::Run;
use crate::storage::{Life, Remote};

/// Nodes.
const NODES: usize = 3;
/// Sandboxes of each node.
const SANDBOXES: u8 = 9;
/// Range of the pool: four blocks of eight addresses.
const POOL: (&str, u8) = ("10.0.0.0/27", 29);
/// Time after which an idle block has been released.
const IDLE: Duration = Duration::from_secs(340);
/// Pause between attempts of a runtime to end a sandbox.
const AGAIN: Duration = Duration::from_millis(500);
/// Attempts after which it should have succeeded.
const ATTEMPTS: usize = 200;

/// What happens in one step; numbers are taken modulo what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A sandbox asks for an address.
    Ask(u8, u8),
    /// A sandbox asks for this one.
    Name(u8, u8, u8),
    /// A sandbox ends.
    End(u8, u8),
    /// Nodes come to know of all blocks.
    Tell,
    /// The agent ends, and another one starts.
    Restart(u8),
    /// One request in so many of a node fails; 0: none.
    Fail(u8, u8),
    /// Nothing happens for so long that idle blocks go back.
    Idle,
}

/// A step of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What happens.
    pub action: Action,
    /// Time until the next step, in milliseconds.
    pub wait: u64,
}

impl Step {
    /// A random step.
    pub fn random(dice: &mut fastrand::Rng) -> Self {
        let (one, other, third) = (dice.u8(..), dice.u8(..), dice.u8(..));
        let action = match dice.u8(0..32) {
            0..14 => Action::Ask(one, other),
            14..16 => Action::Name(one, other, third),
            16..24 => Action::End(one, other),
            24..28 => Action::Tell,
            28..30 => Action::Restart(one),
            30 => Action::Fail(one, other % 8),
            _ => Action::Idle,
        };
        let wait = if dice.bool() {
            dice.u64(0..4)
        } else {
            dice.u64(0..120)
        };
        Self { action, wait }
    }
}

/// A sandbox as its runtime knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Sandbox {
    /// It has asked, and was not answered yet.
    Asking,
    /// It has these.
    Holding(Vec<IpNet>),
    /// It is to end: it may have addresses.
    Ending,
}

type Sandboxes = Arc<Mutex<BTreeMap<String, Sandbox>>>;

struct Node {
    name: String,
    allocator: Allocator,
    life: Arc<Life>,
    map: watch::Sender<BlockMap>,
    _pools: watch::Sender<Pools>,
    _limits: watch::Sender<KnownLimits>,
    /// By handle.
    sandboxes: Sandboxes,
    dice: Arc<Mutex<fastrand::Rng>>,
}

/// All nodes.
pub struct Addresses {
    run: Run,
    storage: Memory,
    nodes: Vec<Node>,
}

impl Addresses {
    /// Creates nodes without blocks.
    pub fn new(run: &Run) -> Self {
        let storage = Memory::default();
        let nodes = (0..NODES).map(|number| {
            let name = format!("n{number}");
            let dice = Arc::new(Mutex::new(run.dice(&format!("ipam-{name}"))));
            Node::start(run, &storage, name, Sandboxes::default(), dice)
        });
        let nodes = nodes.collect();
        Self {
            run: run.clone(),
            storage,
            nodes,
        }
    }

    /// Takes the steps, then lets everything come to its end. Ends at the first violation.
    pub async fn play(&mut self, steps: &[Step]) {
        for step in steps {
            self.run.note("step", || format!("{:?}", step.action));
            self.act(step.action).await;
            sleep(Duration::from_millis(step.wait)).await;
            self.check();
            if self.run.violation().is_some() {
                return;
            }
        }
        self.finish().await;
    }

    async fn act(&mut self, action: Action) {
        let place = |node: u8| usize::from(node) % NODES;
        let sandbox = |node: u8, number: u8| {
            format!("net.{}-{}", usize::from(node) % NODES, number % SANDBOXES)
        };
        match action {
            Action::Ask(node, number) => self.ask(place(node), sandbox(node, number), None),
            Action::Name(node, number, host) => {
                let address = format!("10.0.0.{}", host % 32);
                self.ask(place(node), sandbox(node, number), Some(&address));
            }
            Action::End(node, number) => self.end(place(node), &sandbox(node, number)),
            Action::Tell => self.tell(),
            Action::Restart(node) => self.restart(place(node)),
            Action::Fail(node, failing) => *self.nodes[place(node)].life.failing.lock() = failing,
            Action::Idle => sleep(IDLE).await,
        }
    }

    fn ask(&self, node: usize, handle: String, exact: Option<&str>) {
        let (run, node) = (self.run.clone(), &self.nodes[node]);
        if node.sandboxes.lock().contains_key(&handle) {
            return;
        }
        node.sandboxes
            .lock()
            .insert(handle.clone(), Sandbox::Asking);
        let exact = exact
            .iter()
            .filter_map(|address| address.parse().ok())
            .collect();
        let request = AddressRequest {
            exact,
            ..AddressRequest::of_pod(handle.clone(), &EndpointKey::new("x", &*handle))
        };
        let (allocator, sandboxes, life, name) = (
            node.allocator.clone(),
            node.sandboxes.clone(),
            node.life.clone(),
            node.name.clone(),
        );
        tokio::spawn(async move {
            let answer = allocator.assign(request).await;
            if life.is_over.load(Ordering::SeqCst) {
                return;
            }
            run.note(&name, || format!("{handle}: {answer:?}"));
            let state = answer.map_or(Sandbox::Ending, Sandbox::Holding);
            if let Some(sandbox) = sandboxes
                .lock()
                .get_mut(&handle)
                .filter(|sandbox| **sandbox == Sandbox::Asking)
            {
                *sandbox = state;
            }
        });
    }

    /// Ends a sandbox: its addresses go back, however often that has to be tried.
    fn end(&self, node: usize, handle: &str) {
        let node = &self.nodes[node];
        // Nobody ends a sandbox whose start goes on.
        let ends = node
            .sandboxes
            .lock()
            .get(handle)
            .is_some_and(|sandbox| *sandbox != Sandbox::Asking);
        if !ends {
            return;
        }
        node.sandboxes
            .lock()
            .insert(handle.to_owned(), Sandbox::Ending);
        let (allocator, sandboxes, life) = (
            node.allocator.clone(),
            node.sandboxes.clone(),
            node.life.clone(),
        );
        let (run, name, handle) = (self.run.clone(), node.name.clone(), handle.to_owned());
        tokio::spawn(async move {
            let answer = allocator.release(handle.clone()).await;
            if life.is_over.load(Ordering::SeqCst) {
                return;
            }
            run.note(&name, || format!("{handle} ends: {answer:?}"));
            if answer.is_ok() {
                sandboxes.lock().remove(&handle);
            }
        });
    }

    fn restart(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        self.run.note(&node.name, || {
            "the agent is killed and starts again".to_owned()
        });
        node.life.is_over.store(true, Ordering::SeqCst);
        // Whoever waits for an answer gets none, and the runtime ends the sandbox.
        for sandbox in node
            .sandboxes
            .lock()
            .values_mut()
            .filter(|sandbox| **sandbox == Sandbox::Asking)
        {
            *sandbox = Sandbox::Ending;
        }
        let (name, sandboxes, dice) =
            (node.name.clone(), node.sandboxes.clone(), node.dice.clone());
        *node = Node::start(&self.run, &self.storage, name, sandboxes, dice);
        self.tell();
    }

    fn tell(&self) {
        let blocks = self.storage.lock().blocks();
        let owned = blocks
            .into_iter()
            .filter_map(|(cidr, block)| Some((cidr, block.node()?.to_owned())));
        let all: Arc<BTreeMap<IpNet, String>> = Arc::new(owned.collect());
        self.nodes
            .iter()
            .for_each(|node| drop(node.map.send_replace(Some(all.clone()))));
    }

    /// Handles with the addresses that their sandboxes have.
    fn held(&self) -> BTreeMap<String, Vec<IpNet>> {
        let mut held = BTreeMap::new();
        for node in &self.nodes {
            for (handle, sandbox) in &*node.sandboxes.lock() {
                if let Sandbox::Holding(addresses) = sandbox {
                    held.insert(handle.clone(), addresses.clone());
                }
            }
        }
        held
    }

    /// What storage has allocated, by handle.
    fn allocated(&self) -> BTreeMap<String, Vec<IpNet>> {
        let mut allocated: BTreeMap<String, Vec<IpNet>> = BTreeMap::new();
        for block in self.storage.lock().blocks().values() {
            for (address, attribute) in block.allocated() {
                allocated
                    .entry(attribute.handle_id.clone().unwrap_or_default())
                    .or_default()
                    .push(address.into());
            }
        }
        allocated
    }

    /// No address twice, none that a sandbox has is free, and no block over another.
    fn check(&self) {
        let held = self.held();
        let mut owners: BTreeMap<IpNet, &str> = BTreeMap::new();
        for (handle, addresses) in &held {
            for address in addresses {
                if let Some(other) = owners.insert(*address, handle) {
                    self.run.fail(
                        "addresses",
                        format_args!("{address} is given to {other} and to {handle}"),
                    );
                }
            }
        }
        let allocated = self.allocated();
        if let Some((handle, addresses)) = held
            .iter()
            .find(|(handle, addresses)| allocated.get(*handle) != Some(*addresses))
        {
            let known = allocated.get(handle);
            self.run.fail(
                "addresses",
                format_args!("{handle} has {addresses:?}, and storage says {known:?}"),
            );
        }
        let blocks: Vec<Block> = self.storage.lock().blocks().into_values().collect();
        overlaps(&blocks)
            .iter()
            .for_each(|text| self.run.fail("addresses", text));
    }

    /// Ends what is under way; then storage has what sandboxes have, and nothing else.
    async fn finish(&mut self) {
        self.run.note("addresses", || "faults stop".to_owned());
        self.nodes
            .iter()
            .for_each(|node| *node.life.failing.lock() = 0);
        self.tell();
        for _ in 0..ATTEMPTS {
            sleep(AGAIN).await;
            self.check();
            let mut open = Vec::new();
            for (number, node) in self.nodes.iter().enumerate() {
                let sandboxes = node.sandboxes.lock();
                let unfinished = sandboxes
                    .iter()
                    .filter(|(_, sandbox)| !matches!(sandbox, Sandbox::Holding(_)));
                open.extend(unfinished.map(|(handle, _)| (number, handle.clone())));
            }
            if open.is_empty() || self.run.violation().is_some() {
                break;
            }
            open.iter()
                .for_each(|(node, handle)| self.end(*node, handle));
        }
        sleep(AGAIN).await;
        let (held, allocated) = (self.held(), self.allocated());
        if held != allocated {
            self.run.fail(
                "addresses",
                format_args!("sandboxes have {held:?}, and storage says {allocated:?}"),
            );
        }
        let handles: BTreeSet<String> = self.storage.lock().handles().into_keys().collect();
        let wanted: BTreeSet<String> = held.into_keys().collect();
        if handles != wanted {
            self.run.fail(
                "addresses",
                format_args!("there are handles {handles:?} for {wanted:?}"),
            );
        }
    }
}

impl Node {
    fn start(
        run: &Run,
        storage: &Memory,
        name: String,
        sandboxes: Sandboxes,
        dice: Arc<Mutex<fastrand::Rng>>,
    ) -> Self {
        let life = Arc::<Life>::default();
        let remote = Remote {
            run: run.clone(),
            node: name.clone(),
            storage: storage.clone(),
            life: life.clone(),
            dice: dice.clone(),
        };
        let (map, blocks) = watch::channel(Some(Arc::default()));
        let (pools, seen_pools) = watch::channel(Some(Arc::new(vec![pool()])));
        let (limits, seen_limits) = watch::channel(Some(Arc::default()));
        let inputs = Inputs {
            map: blocks,
            pools: seen_pools,
            limits: seen_limits,
            no_namespace_names_pools: watch::channel(true).1,
        };
        let clock = || "2026-01-01T00:00:00Z".to_owned();
        let allocator = Allocator::spawn(name.clone(), Arc::new(remote), inputs, clock);
        Self {
            name,
            allocator,
            life,
            map,
            _pools: pools,
            _limits: limits,
            sandboxes,
            dice,
        }
    }
}

fn pool() -> NodePool {
    NodePool {
        name: "default".to_owned(),
        cidr: POOL.0.parse().expect("a range"),
        block_size: POOL.1,
        manual: false,
        selected: true,
        namespaces: None,
        workloads: true,
        tunnels: true,
        closed: None,
        is_terminating: false,
    }
}
