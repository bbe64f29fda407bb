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
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;
use tokio::sync::{mpsc, oneshot, watch};

use super::claim;
use super::commit::{self, Operation, Written};
use super::exact;
use super::store::{Store, StoreError, Stored, UsablePool};
use crate::cni::ports::{Demand, NoAddress};
use crate::net::plan::{VERSIONS, version_of};

/// Requests that may wait for the owner; more wait in the callers, who are bounded by the CNI socket.
const QUEUE: usize = 256;
/// With fewer free addresses than this, and than a quarter of a block, another block is claimed before it is needed. A quarter, because a spare of a node
/// that is half empty would be another node's first block.
const SPARE: usize = 8;

/// Which node has which block, as the cluster knows it. May lag behind; `None` until anything is known.
pub type BlockMap = Option<Arc<BTreeMap<IpNet, String>>>;

/// The pools that this node may use for workloads, in the order of their names; `None` until they have been listed.
pub type Pools = Option<Arc<Vec<UsablePool>>>;

/// What is asked for: an address of each IP version that is needed, all of them or none.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Handle and attributes to keep the addresses under.
    pub attribute: AllocationAttribute,
    /// Whether an IPv4 address is needed.
    pub ipv4: Demand,
    /// Whether an IPv6 address is needed.
    pub ipv6: Demand,
    /// Exactly these addresses instead; empty: any.
    pub exact: Vec<IpAddr>,
}

/// The part of a request that one block can serve.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) attribute: AllocationAttribute,
    version: IpVersion,
    /// Names or ranges of pools to take the address from; empty: any pool that need not be named.
    pools: Vec<String>,
    /// Blocks that the handle has to name once the address is claimed. One part of a request says it for all, so that it costs one write.
    pub(super) recorded: Vec<IpNet>,
}

impl Part {
    /// The handle.
    pub(super) fn handle(&self) -> &str {
        self.attribute.handle_id.as_deref().unwrap_or_default()
    }
}

/// Who waits for room.
enum Waiting {
    Request(Wanted, AssignReply),
    /// A part whose block turned out to be full or lost.
    Part(Part, AssignReply),
}

pub(super) type AssignReply = oneshot::Sender<Result<Vec<IpNet>, NoAddress>>;
pub(super) type ReleaseReply = oneshot::Sender<Result<(), NoAddress>>;

pub(super) enum Event {
    Assign(Wanted, AssignReply),
    Release(String, ReleaseReply),
    Written(Written),
    /// What the claim was for: IP version and the pools that the request named; and what came of it.
    Claimed(IpVersion, Vec<String>, Result<Stored<Block>, NoAddress>),
    /// Addresses that a pod has named, with the blocks that they are in.
    Exact(Vec<IpNet>, AssignReply, Result<Vec<Stored<Block>>, NoAddress>),
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
            claiming: BTreeSet::new(),
            loading: 0,
            spare_refused: BTreeSet::new(),
        };
        tokio::spawn(owner.run(received));
        Self { events }
    }

    /// Assigns an address of each IP version that is needed, or none; asked again with the same handle, the same addresses.
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
    waiting: VecDeque<Waiting>,
    /// Claims that are under way; there is one at a time for each IP version.
    claiming: BTreeSet<IpVersion>,
    /// Reads of this node's blocks that are under way.
    loading: usize,
    /// No spare block was to be had for these; not asked for again until the cluster's blocks or pools change.
    spare_refused: BTreeSet<IpVersion>,
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
                        self.spare_refused.clear();
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
            Event::Claimed(version, named, result) => self.claimed(version, &named, result),
            Event::Exact(addresses, reply, taken) => {
                let answer = taken.map(|blocks| blocks.into_iter().for_each(|block| self.keep(block)));
                // Whoever asked may have gone.
                let _ = reply.send(answer.map(|()| addresses));
            }
            Event::Located(handle, reply, Ok(blocks)) => self.release_from(handle, reply, blocks),
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
        self.spare_refused.clear();
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

    /// Nothing is written before every part of the request has a block with room.
    fn assign(&mut self, wanted: Wanted, reply: AssignReply) {
        if reply.is_closed() {
            return;
        }
        if !self.is_oriented() {
            return self.waiting.push_back(Waiting::Request(wanted, reply));
        }
        if !wanted.exact.is_empty() {
            return self.assign_exact(wanted, reply);
        }
        let mut parts = self.parts(&wanted);
        if parts.is_empty() {
            return drop(reply.send(Err(claim::no_pool(None, &[]))));
        }
        let blocks: Vec<Option<IpNet>> = parts.iter().map(|part| self.block_for(part)).collect();
        let Some(blocks) = blocks.iter().copied().collect::<Option<Vec<IpNet>>>() else {
            let lacking = parts.into_iter().zip(blocks).filter(|(_, block)| block.is_none());
            let lacking: Vec<Part> = lacking.map(|(part, _)| part).collect();
            self.waiting.push_back(Waiting::Request(wanted, reply));
            return lacking.into_iter().for_each(|part| self.claim(part.version, part.pools));
        };
        parts[0].recorded.clone_from(&blocks);
        let mut answers = Vec::new();
        for (part, block) in parts.into_iter().zip(blocks) {
            let (told, answer) = oneshot::channel();
            answers.push(answer);
            self.enqueue(block, Operation::Assign(part, told));
        }
        tokio::spawn(join(answers, reply));
    }

    fn assign_exact(&self, wanted: Wanted, reply: AssignReply) {
        let pools = self.pools.borrow().clone().unwrap_or_default();
        let targets = match exact::targets(&wanted.exact, &pools) {
            Ok(targets) => targets,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let (store, node, now) = (self.store.clone(), self.node.clone(), (self.clock)());
        self.background(async move {
            let taken = exact::assign(&*store, &node, wanted.attribute, &targets, &now).await;
            Event::Exact(whole(targets.into_keys().collect()), reply, taken)
        });
    }

    /// What the request comes to: what it demands of each IP version, and what it has already.
    fn parts(&self, wanted: &Wanted) -> Vec<Part> {
        let handle = wanted.attribute.handle_id.as_deref().unwrap_or_default();
        let part = |(version, demand): (IpVersion, &Demand)| {
            let pools = match demand {
                Demand::Always(pools) => pools.clone(),
                Demand::IfPooled if self.has_pool(version) || self.holder(version, handle).is_some() => Vec::new(),
                Demand::Never | Demand::IfPooled => return None,
            };
            Some(Part { attribute: wanted.attribute.clone(), version, pools, recorded: Vec::new() })
        };
        [(IpVersion::V4, &wanted.ipv4), (IpVersion::V6, &wanted.ipv6)].into_iter().filter_map(part).collect()
    }

    /// A part that lost its block.
    fn assign_part(&mut self, mut part: Part, reply: AssignReply) {
        if reply.is_closed() {
            return;
        }
        match self.block_for(&part).filter(|_| self.is_oriented()) {
            Some(block) => {
                part.recorded = vec![block];
                self.enqueue(block, Operation::Assign(part, reply));
            }
            None => {
                let (version, pools) = (part.version, part.pools.clone());
                self.waiting.push_back(Waiting::Part(part, reply));
                if self.is_oriented() {
                    self.claim(version, pools);
                }
            }
        }
    }

    /// The block that has the part already, or one with room.
    fn block_for(&self, part: &Part) -> Option<IpNet> {
        let has_room = |(cidr, slot): &(&IpNet, &Slot)| {
            version_of(cidr.addr()) == part.version && slot.room() > 0 && self.allows(&part.pools, **cidr)
        };
        let with_room = || self.blocks.iter().find(has_room).map(|(cidr, _)| *cidr);
        self.holder(part.version, part.handle()).or_else(with_room)
    }

    fn holder(&self, version: IpVersion, handle: &str) -> Option<IpNet> {
        let mut of_version = self.blocks.iter().filter(|(cidr, _)| version_of(cidr.addr()) == version);
        of_version.find(|(_, slot)| slot.holds(handle)).map(|(cidr, _)| *cidr)
    }

    /// Whether there is a pool of this IP version that need not be named.
    fn has_pool(&self, version: IpVersion) -> bool {
        let pools = self.pools.borrow();
        let mut pools = pools.iter().flat_map(|pools| pools.iter());
        pools.any(|pool| version_of(pool.cidr.addr()) == version && pool.serves(&[]))
    }

    /// Whether it is known what this node has: before that a claim could be for what is there already.
    fn is_oriented(&self) -> bool {
        self.loading == 0 && self.map.borrow().is_some() && self.pools.borrow().is_some()
    }

    /// Those who wait try again.
    fn retry(&mut self) {
        if self.is_oriented() {
            std::mem::take(&mut self.waiting).into_iter().for_each(|waiting| self.again(waiting));
        }
    }

    fn again(&mut self, waiting: Waiting) {
        match waiting {
            Waiting::Request(wanted, reply) => self.assign(wanted, reply),
            Waiting::Part(part, reply) => self.assign_part(part, reply),
        }
    }

    /// Whether a request that names these pools may take an address of the block. A block whose pool is gone or disabled serves nobody.
    fn allows(&self, named: &[String], block: IpNet) -> bool {
        let pools = self.pools.borrow();
        let mut pools = pools.iter().flat_map(|pools| pools.iter());
        pools.any(|pool| pool.cidr.contains(&block) && pool.serves(named))
    }

    /// A handle may have addresses in several blocks. While not all blocks of this node are here, and where a pod has named its addresses, its
    /// object tells which.
    fn release(&mut self, handle: String, reply: ReleaseReply) {
        let is_requested = |slot: &Slot| exact::is_requested(&slot.stored.value, &handle);
        let is_here = self.blocks.values().any(|slot| slot.holds(&handle)) && !self.blocks.values().any(is_requested);
        if is_here && self.loading == 0 && self.map.borrow().is_some() {
            return self.release_from(handle, reply, Vec::new());
        }
        let store = self.store.clone();
        self.background(async move {
            let found = commit::locate(&*store, &handle).await;
            Event::Located(handle, reply, found)
        });
    }

    /// Releases from blocks in the cache that have the handle, and from those of `located` that are not in it; then the handle goes.
    fn release_from(&mut self, handle: String, reply: ReleaseReply, located: Vec<Stored<Block>>) {
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            located.into_iter().partition(|block| self.blocks.contains_key(&block.value.cidr()));
        let mut here: BTreeSet<IpNet> = here.iter().map(|block| block.value.cidr()).collect();
        here.extend(self.blocks.iter().filter(|(_, slot)| slot.holds(&handle)).map(|(cidr, _)| *cidr));
        let mut answers = Vec::new();
        for block in here {
            let (told, answer) = oneshot::channel();
            answers.push(answer);
            self.enqueue(block, Operation::Release(handle.clone(), told));
        }
        let store = self.store.clone();
        tokio::spawn(async move {
            let failed = |error: StoreError| NoAddress::Unavailable(format!("IPAM release of {handle}: {error}"));
            let released = async {
                for answer in answers {
                    answer.await.map_err(|_| stopping())??;
                }
                commit::release_from(&*store, &handle, elsewhere).await.map_err(failed)?;
                store.delete_handle(handle.clone()).await.map_err(failed)
            };
            reply.send(released.await)
        });
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
                Operation::Assign(part, reply) => self.assign_part(part, reply),
                Operation::Release(handle, reply) => self.release(handle, reply),
            }
        }
        self.write(cidr);
        self.keep_spare();
    }

    /// Claims another block before it is needed, off anybody's path.
    fn keep_spare(&mut self) {
        for version in VERSIONS {
            let of_version = || self.blocks.iter().filter(|(cidr, _)| version_of(cidr.addr()) == version);
            let free: usize = of_version().map(|(_, slot)| slot.room()).sum();
            let size = of_version().map(|(_, slot)| slot.stored.value.spec().allocations.len()).max();
            let low = size.map_or(0, |size| SPARE.min(size / 4));
            if free < low && !self.spare_refused.contains(&version) {
                self.claim(version, Vec::new());
            }
        }
    }

    fn claim(&mut self, version: IpVersion, named: Vec<String>) {
        if !self.claiming.insert(version) {
            return;
        }
        let pools: Vec<UsablePool> = self
            .pools
            .borrow()
            .iter()
            .flat_map(|pools| pools.iter())
            .filter(|pool| version_of(pool.cidr.addr()) == version && pool.serves(&named))
            .cloned()
            .collect();
        let taken: BTreeSet<IpNet> =
            self.map.borrow().iter().flat_map(|map| map.keys()).chain(self.blocks.keys()).copied().collect();
        let (store, node, now) = (self.store.clone(), self.node.clone(), (self.clock)());
        self.background(async move {
            let result = claim::claim(&*store, &node, version, &pools, &named, taken, now).await;
            Event::Claimed(version, named, result)
        });
    }

    /// Those who waited try again; those for whom nothing could be claimed are told.
    fn claimed(&mut self, version: IpVersion, named: &[String], result: Result<Stored<Block>, NoAddress>) {
        self.claiming.remove(&version);
        let failure = match result {
            Ok(block) => {
                self.keep(block);
                None
            }
            Err(error) => {
                self.spare_refused.insert(version);
                Some(error)
            }
        };
        for waiting in std::mem::take(&mut self.waiting) {
            match &failure {
                Some(error) if self.waits_for(&waiting, version, named) => waiting.fail(error.clone()),
                _ => self.again(waiting),
            }
        }
    }

    /// Whether it cannot go on without a new block of this IP version, of one of these pools.
    fn waits_for(&self, waiting: &Waiting, version: IpVersion, named: &[String]) -> bool {
        let lacks = |part: &Part| part.version == version && part.pools == named && self.block_for(part).is_none();
        match waiting {
            Waiting::Request(wanted, _) => self.parts(wanted).iter().any(lacks),
            Waiting::Part(part, _) => lacks(part),
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

impl Waiting {
    fn fail(self, error: NoAddress) {
        let (Self::Request(_, reply) | Self::Part(_, reply)) = self;
        // Whoever asked may have gone.
        let _ = reply.send(Err(error));
    }
}

fn stopping() -> NoAddress {
    NoAddress::Unavailable("the agent is stopping; the runtime will try again".to_owned())
}

/// Answers with all the parts, or with the first failure; what the other parts have claimed then is given back with the handle.
async fn join(parts: Vec<oneshot::Receiver<Result<Vec<IpNet>, NoAddress>>>, reply: AssignReply) {
    let mut addresses = Ok(Vec::new());
    for part in parts {
        match (part.await.unwrap_or_else(|_| Err(stopping())), &mut addresses) {
            (Ok(more), Ok(addresses)) => addresses.extend(more),
            (Err(error), Ok(_)) => addresses = Err(error),
            (_, Err(_)) => {}
        }
    }
    // Whoever asked may have gone.
    let _ = reply.send(addresses);
}

/// The address with its full prefix length.
pub(super) fn whole(addresses: Vec<IpAddr>) -> Vec<IpNet> {
    addresses.into_iter().map(IpNet::from).collect()
}
