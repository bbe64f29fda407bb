//! The one owner of this node's blocks: answers from a cache of them, and lets many pods share one write.
//!
//! While a block is being written, what is asked of it waits; when the write is done, all that waits goes into the next write. An address is
//! answered only after its write has succeeded. Everything is kept under a handle, so that an answer that got lost is found again, and given
//! back with the handle.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::v3::ipam::AllocationAttribute;
use tokio::sync::{mpsc, oneshot, watch};

use super::claim;
use super::commit::{self, Operation, Written};
use super::store::{Store, StoreError, Stored, UsablePool};
use crate::cni::ports::NoAddress;

/// Requests that may wait for the owner; more wait in the callers, who are bounded by the CNI socket.
const QUEUE: usize = 256;
/// With fewer free addresses than this, and than a quarter of a block, another block is claimed before it is needed. A quarter, because a spare of a node
/// that is half empty would be another node's first block.
const SPARE: usize = 8;

/// Which node has which block, as the cluster knows it. May lag behind; `None` until anything is known.
pub type BlockMap = Option<Arc<BTreeMap<IpNet, String>>>;

/// The pools that this node may use for workloads, in the order of their names; `None` until they have been listed.
pub type Pools = Option<Arc<Vec<UsablePool>>>;

/// What is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Handle and attributes to keep the address under.
    pub attribute: AllocationAttribute,
    /// Names or ranges of pools to take it from; empty: any pool that need not be named.
    pub pools: Vec<String>,
}

impl Wanted {
    /// The handle.
    pub fn handle(&self) -> &str {
        self.attribute.handle_id.as_deref().unwrap_or_default()
    }
}

pub(super) type AssignReply = oneshot::Sender<Result<Vec<IpNet>, NoAddress>>;
pub(super) type ReleaseReply = oneshot::Sender<Result<(), NoAddress>>;

pub(super) enum Event {
    Assign(Wanted, AssignReply),
    Release(String, ReleaseReply),
    Written(Written),
    /// Pools named by the request that the claim was for, and what came of it.
    Claimed(Vec<String>, Result<Stored<Block>, NoAddress>),
    Located(String, ReleaseReply, Result<Vec<Stored<Block>>, StoreError>),
    Loaded(Vec<Stored<Block>>),
}

/// A handle to the allocator. Cheap to clone.
#[derive(Clone)]
pub struct Allocator {
    events: mpsc::Sender<Event>,
}

impl Allocator {
    /// Starts the owner task. Blocks that `map` gives to this node are loaded at once and as they appear.
    pub fn spawn<S: Store>(
        node: String,
        store: Arc<S>,
        map: watch::Receiver<BlockMap>,
        pools: watch::Receiver<Pools>,
        clock: fn() -> String,
    ) -> Self {
        let (events, received) = mpsc::channel(QUEUE);
        let owner = Owner {
            node,
            store,
            map,
            pools,
            clock,
            events: events.downgrade(),
            blocks: BTreeMap::new(),
            waiting: VecDeque::new(),
            is_claiming: false,
            loading: 0,
            spare_refused: false,
        };
        tokio::spawn(owner.run(received));
        Self { events }
    }

    /// Assigns one address; asked again with the same handle, the same address.
    pub async fn assign(&self, wanted: Wanted) -> Result<Vec<IpNet>, NoAddress> {
        let (reply, answer) = oneshot::channel();
        self.ask(Event::Assign(wanted, reply), answer).await
    }

    /// Releases everything under a handle; an unknown handle is a success.
    pub async fn release(&self, handle: String) -> Result<(), NoAddress> {
        let (reply, answer) = oneshot::channel();
        self.ask(Event::Release(handle, reply), answer).await
    }

    async fn ask<T>(&self, event: Event, answer: oneshot::Receiver<Result<T, NoAddress>>) -> Result<T, NoAddress> {
        let stopping = || NoAddress::Unavailable("the agent is stopping; the runtime will try again".to_owned());
        self.events.send(event).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }
}

/// A block of this node and what waits for its next write.
struct Slot {
    stored: Stored<Block>,
    is_writing: bool,
    /// Handles of the write that is under way.
    writing: BTreeSet<String>,
    queue: Vec<Operation>,
}

impl Slot {
    /// Whether something is, or is about to be, under the handle here.
    fn holds(&self, handle: &str) -> bool {
        !self.stored.value.of_handle(handle).is_empty()
            || self.queue.iter().any(|operation| operation.handle() == handle)
            || self.writing.contains(handle)
    }

    /// Free addresses that nothing in the queue will take.
    fn room(&self) -> usize {
        let assigns = self.queue.iter().filter(|operation| matches!(operation, Operation::Assign(..))).count();
        self.stored.value.free().saturating_sub(assigns)
    }
}

struct Owner<S> {
    node: String,
    store: Arc<S>,
    map: watch::Receiver<BlockMap>,
    pools: watch::Receiver<Pools>,
    clock: fn() -> String,
    events: mpsc::WeakSender<Event>,
    blocks: BTreeMap<IpNet, Slot>,
    /// Requests that no block of ours has room for, until a claim succeeds.
    waiting: VecDeque<(Wanted, AssignReply)>,
    /// Whether a claim is under way; there is one at a time.
    is_claiming: bool,
    /// Reads of this node's blocks that are under way.
    loading: usize,
    /// No spare block was to be had; not asked for again until the cluster's blocks or pools change.
    spare_refused: bool,
}

impl<S: Store> Owner<S> {
    async fn run(mut self, mut received: mpsc::Receiver<Event>) {
        self.load();
        loop {
            tokio::select! {
                event = received.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                changed = self.map.changed() => match changed {
                    Ok(()) => self.load(),
                    Err(_) => return,
                },
                changed = self.pools.changed() => match changed {
                    Ok(()) => {
                        self.spare_refused = false;
                        self.retry();
                    }
                    Err(_) => return,
                },
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Assign(wanted, reply) => self.assign(wanted, reply),
            Event::Release(handle, reply) => self.release(handle, reply),
            Event::Written(written) => self.written(written),
            Event::Claimed(named, result) => self.claimed(&named, result),
            Event::Located(handle, reply, Ok(blocks)) => self.release_elsewhere(handle, reply, blocks),
            Event::Located(_, reply, Err(error)) => {
                drop(reply.send(Err(NoAddress::Unavailable(format!("IPAM handle: {error}")))))
            }
            Event::Loaded(blocks) => {
                self.loading -= 1;
                blocks.into_iter().for_each(|block| self.keep(block));
                self.retry();
            }
        }
    }

    /// Reads the blocks of this node that are not here yet.
    fn load(&mut self) {
        self.spare_refused = false;
        let missing: Vec<IpNet> = {
            let map = self.map.borrow_and_update();
            let ours = |(cidr, node): &(&IpNet, &String)| **node == self.node && !self.blocks.contains_key(*cidr);
            let known = map.iter().flat_map(|map| map.iter());
            known.filter(ours).map(|(cidr, _)| *cidr).collect()
        };
        if missing.is_empty() {
            return self.retry();
        }
        self.loading += 1;
        let store = self.store.clone();
        self.background(async move {
            let mut found = Vec::new();
            for cidr in missing {
                match store.block(cidr).await {
                    Ok(block) => found.extend(block),
                    Err(error) => tracing::warn!(%cidr, %error, "a block of this node could not be read; it is read again when it is needed"),
                }
            }
            Event::Loaded(found)
        });
    }

    fn keep(&mut self, stored: Stored<Block>) {
        if stored.value.node() == Some(self.node.as_str()) {
            self.blocks.entry(stored.value.cidr()).or_insert_with(|| Slot {
                stored,
                is_writing: false,
                writing: BTreeSet::new(),
                queue: Vec::new(),
            });
        }
    }

    fn assign(&mut self, wanted: Wanted, reply: AssignReply) {
        if reply.is_closed() {
            return;
        }
        let holder = self.blocks.iter().find(|(_, slot)| slot.holds(wanted.handle()));
        let is_oriented = self.is_oriented();
        let chosen = holder.or_else(|| {
            let has_room = |(cidr, slot): &(&IpNet, &Slot)| slot.room() > 0 && self.allows(&wanted.pools, **cidr);
            self.blocks.iter().find(has_room).filter(|_| is_oriented)
        });
        match chosen.map(|(cidr, _)| *cidr) {
            None if !is_oriented => self.waiting.push_back((wanted, reply)),
            Some(cidr) => self.enqueue(cidr, Operation::Assign(wanted, reply)),
            None => {
                let named = wanted.pools.clone();
                self.waiting.push_back((wanted, reply));
                self.claim(named);
            }
        }
    }

    /// Whether it is known what this node has: before that a claim could be for what is there already.
    fn is_oriented(&self) -> bool {
        self.loading == 0 && self.map.borrow().is_some() && self.pools.borrow().is_some()
    }

    /// Those who wait try again.
    fn retry(&mut self) {
        if self.is_oriented() {
            for (wanted, reply) in std::mem::take(&mut self.waiting) {
                self.assign(wanted, reply);
            }
        }
    }

    /// Whether a request that names these pools may take an address of the block. A block whose pool is gone or disabled serves nobody.
    fn allows(&self, named: &[String], block: IpNet) -> bool {
        let pools = self.pools.borrow();
        let mut pools = pools.iter().flat_map(|pools| pools.iter());
        pools.any(|pool| pool.cidr.contains(&block) && pool.serves(named))
    }

    fn release(&mut self, handle: String, reply: ReleaseReply) {
        if let Some(cidr) = self.blocks.iter().find(|(_, slot)| slot.holds(&handle)).map(|(cidr, _)| *cidr) {
            return self.enqueue(cidr, Operation::Release(handle, reply));
        }
        let store = self.store.clone();
        self.background(async move {
            let found = commit::locate(&*store, &handle).await;
            Event::Located(handle, reply, found)
        });
    }

    /// Releases from blocks that the handle's object names and that are not in the cache, or were not when it was looked for.
    fn release_elsewhere(&mut self, handle: String, reply: ReleaseReply, blocks: Vec<Stored<Block>>) {
        let Some(first) = blocks.iter().map(|block| block.value.cidr()).find(|cidr| self.blocks.contains_key(cidr))
        else {
            let store = self.store.clone();
            tokio::spawn(async move {
                let result = commit::release_from(&*store, &handle, blocks).await;
                reply.send(result.map_err(|error| NoAddress::Unavailable(format!("IPAM release of {handle}: {error}"))))
            });
            return;
        };
        self.enqueue(first, Operation::Release(handle, reply));
    }

    fn enqueue(&mut self, cidr: IpNet, operation: Operation) {
        if let Some(slot) = self.blocks.get_mut(&cidr) {
            slot.queue.push(operation);
        }
        self.write(cidr);
    }

    /// Starts the next write of a block, with everything that waits for it.
    fn write(&mut self, cidr: IpNet) {
        let Some(slot) = self.blocks.get_mut(&cidr) else {
            return;
        };
        if slot.is_writing || slot.queue.is_empty() {
            return;
        }
        slot.is_writing = true;
        slot.writing = slot.queue.iter().map(|operation| operation.handle().to_owned()).collect();
        let (stored, queue, store) = (slot.stored.clone(), std::mem::take(&mut slot.queue), self.store.clone());
        self.background(async move { Event::Written(commit::commit(&*store, stored, queue).await) });
    }

    fn written(&mut self, written: Written) {
        let cidr = written.cidr;
        let Some(slot) = self.blocks.get_mut(&cidr) else {
            return;
        };
        slot.is_writing = false;
        slot.writing.clear();
        let mut orphans = Vec::new();
        match written.block {
            Some(block) if block.value.node() == Some(self.node.as_str()) => slot.stored = block,
            Some(_) => orphans = self.blocks.remove(&cidr).map(|slot| slot.queue).unwrap_or_default(),
            None => {}
        }
        for operation in written.unfinished.into_iter().chain(orphans) {
            match operation {
                Operation::Assign(wanted, reply) => self.assign(wanted, reply),
                Operation::Release(handle, reply) => self.release(handle, reply),
            }
        }
        self.write(cidr);
        self.keep_spare();
    }

    /// Claims another block before it is needed, off anybody's path.
    fn keep_spare(&mut self) {
        let free: usize = self.blocks.values().map(Slot::room).sum();
        let sizes = self.blocks.values().map(|slot| slot.stored.value.spec().allocations.len());
        let low = sizes.max().map_or(0, |size| SPARE.min(size / 4));
        if free < low && !self.spare_refused {
            self.claim(Vec::new());
        }
    }

    fn claim(&mut self, named: Vec<String>) {
        if self.is_claiming {
            return;
        }
        self.is_claiming = true;
        let pools: Vec<UsablePool> = self
            .pools
            .borrow()
            .iter()
            .flat_map(|pools| pools.iter())
            .filter(|pool| pool.serves(&named))
            .cloned()
            .collect();
        let taken: BTreeSet<IpNet> =
            self.map.borrow().iter().flat_map(|map| map.keys()).chain(self.blocks.keys()).copied().collect();
        let (store, node, now) = (self.store.clone(), self.node.clone(), (self.clock)());
        self.background(async move {
            let result = claim::claim(&*store, &node, &pools, &named, taken, now).await;
            Event::Claimed(named, result)
        });
    }

    /// Those who waited try again; those for whom nothing could be claimed are told.
    fn claimed(&mut self, named: &[String], result: Result<Stored<Block>, NoAddress>) {
        self.is_claiming = false;
        let failure = match result {
            Ok(block) => {
                self.keep(block);
                None
            }
            Err(error) => {
                self.spare_refused = true;
                Some(error)
            }
        };
        for (wanted, reply) in std::mem::take(&mut self.waiting) {
            let has_room = self.blocks.iter().any(|(cidr, slot)| slot.room() > 0 && self.allows(&wanted.pools, *cidr));
            match &failure {
                Some(error) if wanted.pools == named && !has_room => drop(reply.send(Err(error.clone()))),
                _ => self.assign(wanted, reply),
            }
        }
    }

    fn background(&self, work: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        tokio::spawn(async move {
            let event = work.await;
            if let Some(events) = events.upgrade() {
                // The owner outlives its handles' last event only if it is stopping, and then nobody waits.
                let _ = events.send(event).await;
            }
        });
    }
}

/// The address with its full prefix length.
pub(super) fn whole(addresses: Vec<IpAddr>) -> Vec<IpNet> {
    addresses.into_iter().map(IpNet::from).collect()
}
