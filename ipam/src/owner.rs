//! The one owner of this node's blocks. It answers from a cache of them, and many pods share one
//! write.
//!
//! Requests for a block that is being written wait, and all go into the next write. A caller gets
//! its address only after the write has succeeded. Every address has a handle: by the handle an
//! address is found again if the answer got lost, and released.
//!
//! Writes to objects of other nodes, which admission must allow: a single address in another node's
//! block, which this node takes (named by a pod, or borrowed) or releases. Everything else is
//! written to the node's own blocks, affinities and handles.

mod assign;
mod claims;
mod events;
mod handles;
mod release;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::limits::Limits;
use margay_api::rule::IpVersion;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::commit::{self, Operation, WriteOutcome};
use super::constraints::{Constraints, KnownBlocks};
use super::idle_blocks::{self, BlockRelease, IdleBlocks};
use super::inputs::Inputs;
use super::node_objects::{NodeObjects, Stored};
use super::pools::NodePool;
use super::request::NoAddress;
use super::store::{Store, StoreError};
use events::{Loaded, Waiting};
use handles::Deletions;

pub(super) use events::Event;

/// Block of this node, with the operations that wait for its next write.
struct Slot {
    stored: Stored<Block>,
    /// True after a write without an answer: it may have been done.
    is_uncertain: bool,
    is_writing: bool,
    /// True while it is being released: nothing is assigned from it.
    is_releasing: bool,
    /// True once the map has listed it for this node.
    is_listed: bool,
    /// Handles in the current write.
    writing: BTreeSet<String>,
    queue: Vec<Operation>,
}

impl Slot {
    fn new(stored: Stored<Block>) -> Self {
        Self {
            stored,
            is_uncertain: false,
            is_writing: false,
            is_releasing: false,
            is_listed: false,
            writing: BTreeSet::new(),
            queue: Vec::new(),
        }
    }

    /// Returns true when the handle has an address here, or will have after the queued operations.
    fn holds(&self, handle: &str) -> bool {
        !self.stored.value.of_handle(handle).is_empty()
            || self
                .queue
                .iter()
                .any(|operation| operation.handle() == handle)
            || self.writing.contains(handle)
    }

    /// Returns true when the handle may have an address here, so that a release must look.
    fn may_hold(&self, handle: &str) -> bool {
        self.is_uncertain || self.holds(handle)
    }

    /// Returns true when no address is assigned, in cooldown or about to be assigned.
    fn is_empty(&self, constraints: &Constraints) -> bool {
        let is_idle = !self.is_writing && !self.is_uncertain && self.queue.is_empty();
        is_idle && constraints.is_empty(&self.stored.value)
    }

    /// Number of addresses that the queued operations leave.
    fn room(&self, constraints: &Constraints) -> usize {
        let assigns = self
            .queue
            .iter()
            .filter(|operation| matches!(operation, Operation::Assign(..)))
            .count();
        if self.is_releasing {
            0
        } else {
            constraints.room(&self.stored.value).saturating_sub(assigns)
        }
    }
}

/// Owner of a node's blocks.
pub(super) struct Owner<S> {
    node: String,
    store: Arc<NodeObjects<S>>,
    inputs: Inputs,
    clock: fn() -> String,
    events: mpsc::WeakSender<Event>,
    blocks: BTreeMap<IpNet, Slot>,
    /// Requests that no block has room for, until a claim succeeds, those from before the inputs
    /// were known, and those whose handle is being deleted.
    waiting: VecDeque<Waiting>,
    /// IP versions with a claim in progress; one at a time each.
    claiming: BTreeSet<IpVersion>,
    /// Number of reads of this node's blocks in progress.
    loading: usize,
    /// Blocks of this node that could not be read.
    unread: BTreeSet<IpNet>,
    /// IP versions without a spare block: a claim has failed, and is not tried again until the
    /// inputs change.
    without_spare: BTreeSet<IpVersion>,
    /// Handles that this process has seen get all their addresses from this node's blocks. For
    /// others, the handle's object has to be read.
    local: BTreeSet<String>,
    /// Blocks of other nodes that handles have borrowed from.
    borrowed: BTreeMap<String, BTreeSet<IpNet>>,
    /// Number of searches for a loan that found nothing; each next one uses another order.
    fruitless: u64,
    idle: IdleBlocks,
    deletions: Deletions,
    started: Instant,
}

impl<S: Store> Owner<S> {
    /// Creates an owner that has read no block yet.
    pub(super) fn new(
        node: String,
        store: Arc<NodeObjects<S>>,
        inputs: Inputs,
        clock: fn() -> String,
        events: mpsc::WeakSender<Event>,
    ) -> Self {
        Self {
            node,
            store,
            inputs,
            clock,
            events,
            blocks: BTreeMap::new(),
            waiting: VecDeque::new(),
            claiming: BTreeSet::new(),
            loading: 0,
            unread: BTreeSet::new(),
            without_spare: BTreeSet::new(),
            local: BTreeSet::new(),
            borrowed: BTreeMap::new(),
            fruitless: 0,
            idle: IdleBlocks::default(),
            deletions: Deletions::default(),
            started: Instant::now(),
        }
    }

    /// Runs until all handles to the allocator are gone.
    pub(super) async fn run(mut self, mut received: mpsc::Receiver<Event>) {
        self.load();
        let mut looks = tokio::time::interval(idle_blocks::SCAN_INTERVAL);
        loop {
            // In this order, not at random: requests may come without end, so they are last.
            tokio::select! {
                biased;
                changed = self.inputs.map.changed() => match changed {
                    Ok(()) => self.load(),
                    Err(_) => return,
                },
                changed = self.inputs.pools.changed() => match changed {
                    Ok(()) => self.retry_refused(),
                    Err(_) => return,
                },
                changed = self.inputs.limits.changed() => match changed {
                    Ok(()) => self.retry_refused(),
                    Err(_) => return,
                },
                _ = looks.tick() => self.release_idle_blocks(),
                event = received.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
            }
        }
    }

    /// Retries after a change of the inputs: what was refused may succeed now.
    fn retry_refused(&mut self) {
        self.without_spare.clear();
        self.retry();
        self.release_idle_blocks();
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Assign(wanted, reply) => self.find_and_assign(wanted, reply),
            Event::Release(handle, reply) => self.release(handle, reply),
            Event::Written(written) => self.finish_write(written),
            Event::Claimed(version, choice, result) => self.finish_claim(version, &choice, result),
            Event::Found(wanted, reply, found) => self.finish_find(wanted, reply, found),
            Event::Borrowed(wanted, reply, result) => self.finish_borrow(wanted, reply, result),
            Event::Exact(addresses, reply, taken) => {
                let answer = taken.map(|blocks| {
                    blocks
                        .into_iter()
                        .for_each(|block| self.insert_block(block))
                });
                // Whoever asked may have gone.
                let _ = reply.send(answer.map(|()| addresses));
            }
            Event::Located(handle, reply, Ok(blocks)) => self.finish_locate(handle, reply, blocks),
            Event::Located(_, reply, Err(error)) => {
                drop(reply.send(Err(NoAddress::Unavailable(format!("IPAM handle: {error}")))))
            }
            Event::Released(handle) => {
                if self.deletions.end(&handle) {
                    self.retry();
                }
            }
            Event::Loaded(loaded) => self.finish_load(loaded),
            Event::BlockReleased(cidr, returned) => self.finish_block_release(cidr, returned),
        }
    }

    /// Reads the blocks that the map lists for this node and that are not cached, and again those
    /// that it has stopped listing: only storage tells if another node has taken them.
    fn load(&mut self) {
        self.without_spare.clear();
        let mut left = Vec::new();
        let missing: Vec<IpNet> = {
            let map = self.inputs.map.borrow_and_update();
            for (cidr, slot) in &mut self.blocks {
                let is_listed = map
                    .as_ref()
                    .is_some_and(|map| map.get(cidr) == Some(&self.node));
                if slot.is_listed && !is_listed {
                    left.push(*cidr);
                }
                slot.is_listed = is_listed;
            }
            let ours = |(cidr, node): &(&IpNet, &String)| {
                **node == self.node && !self.blocks.contains_key(*cidr)
            };
            let known = map.iter().flat_map(|map| map.iter());
            known.filter(ours).map(|(cidr, _)| *cidr).collect()
        };
        if missing.is_empty() && left.is_empty() {
            return self.retry();
        }
        self.loading += 1;
        self.unread.clear();
        let (store, node) = (self.store.clone(), self.node.clone());
        self.spawn(async move { Event::Loaded(read(&*store, &node, missing, left).await) });
    }

    fn finish_load(&mut self, loaded: Loaded) {
        self.loading -= 1;
        // Removed only if storage says so: a block that the map does not list may just be too new
        // for it.
        for cidr in &loaded.left {
            let is_found = loaded
                .found
                .iter()
                .any(|block| block.value.cidr() == *cidr && self.is_ours(block));
            if !is_found && !loaded.unread.contains(cidr) {
                self.remove_block(*cidr);
            }
        }
        self.unread.extend(loaded.unread);
        loaded
            .found
            .into_iter()
            .for_each(|block| self.insert_block(block));
        self.retry();
    }

    fn is_ours(&self, block: &Stored<Block>) -> bool {
        block.value.node() == Some(self.node.as_str())
    }

    fn insert_block(&mut self, stored: Stored<Block>) {
        if self.is_ours(&stored) {
            let cidr = stored.value.cidr();
            let is_listed = self
                .inputs
                .map
                .borrow()
                .as_ref()
                .is_some_and(|map| map.get(&cidr) == Some(&self.node));
            self.blocks.entry(cidr).or_insert_with(|| Slot {
                is_listed,
                ..Slot::new(stored)
            });
        }
    }

    /// Removes a block that is not this node's any more; its queue goes to other blocks.
    fn remove_block(&mut self, cidr: IpNet) {
        if self.blocks.get(&cidr).is_some_and(|slot| slot.is_writing) {
            // The write in progress finds out by the version.
            return;
        }
        let queue = self
            .blocks
            .remove(&cidr)
            .map(|slot| slot.queue)
            .unwrap_or_default();
        self.requeue(queue);
    }

    fn requeue(&mut self, operations: impl IntoIterator<Item = Operation>) {
        for operation in operations {
            match operation {
                Operation::Assign(part, reply) => self.assign_part(part, reply),
                Operation::Release(handle, reply) => self.release(handle, reply),
            }
        }
    }

    /// Returns true when this node's blocks have been read and all inputs are known. Before, a
    /// claim could be for a block that exists already, so nothing is assigned.
    fn is_ready(&self) -> bool {
        self.loading == 0 && self.inputs.is_known()
    }

    fn limits(&self) -> Arc<Limits> {
        self.inputs.limits.borrow().clone().unwrap_or_default()
    }

    fn pools(&self) -> Arc<Vec<NodePool>> {
        self.inputs.pools.borrow().clone().unwrap_or_default()
    }

    fn known(&self) -> KnownBlocks {
        let map = self.inputs.map.borrow().clone().unwrap_or_default();
        KnownBlocks {
            map,
            own: self.blocks.keys().copied().collect(),
        }
    }

    fn constraints(&self, known: &KnownBlocks, cidr: IpNet) -> Constraints {
        Constraints::new(self.limits(), known, cidr, (self.clock)())
    }

    /// Reason why nothing may be written now, if so.
    fn locked(&self) -> Option<NoAddress> {
        let text = "the cluster's addresses are locked: ClusterInformation default has \
                    datastoreReady false, as while data is moved or repaired; the runtime will try \
                    again";
        self.limits()
            .is_locked
            .then(|| NoAddress::Unavailable(text.to_owned()))
    }

    /// Retries all waiting requests.
    fn retry(&mut self) {
        if self.is_ready() {
            std::mem::take(&mut self.waiting)
                .into_iter()
                .for_each(|waiting| self.retry_one(waiting));
        }
    }

    fn retry_one(&mut self, waiting: Waiting) {
        match waiting {
            Waiting::Request(wanted, reply) => self.assign(wanted, reply),
            Waiting::Part(part, reply) => self.assign_part(part, reply),
            Waiting::Release(_, reply) if reply.is_closed() => {}
            Waiting::Release(handle, reply) => self.release(handle, reply),
        }
    }

    fn enqueue(&mut self, cidr: IpNet, operation: Operation) {
        if let Some(slot) = self.blocks.get_mut(&cidr) {
            slot.queue.push(operation);
        }
        self.write(cidr);
    }

    /// Starts the next write of a block with all queued operations, unless one is in progress.
    fn write(&mut self, cidr: IpNet) {
        let constraints = self.constraints(&self.known(), cidr);
        let Some(slot) = self.blocks.get_mut(&cidr) else {
            return;
        };
        if slot.is_writing || slot.queue.is_empty() {
            return;
        }
        slot.is_writing = true;
        slot.writing = slot
            .queue
            .iter()
            .map(|operation| operation.handle().to_owned())
            .collect();
        let (stored, queue) = (slot.stored.clone(), std::mem::take(&mut slot.queue));
        let store = self.store.clone();
        self.spawn(async move {
            Event::Written(commit::commit(&*store, stored, queue, &constraints).await)
        });
    }

    fn finish_write(&mut self, written: WriteOutcome) {
        let cidr = written.cidr;
        let Some(slot) = self.blocks.get_mut(&cidr) else {
            return;
        };
        slot.is_writing = false;
        // Without an answer the cache may be older than the block: releases look here for any
        // handle, and the next write finds out by its version.
        slot.is_uncertain = written.block.is_none();
        slot.writing.clear();
        let mut orphans = Vec::new();
        match written.block {
            Some(block) if block.value.node() == Some(self.node.as_str()) => slot.stored = block,
            Some(_) => {
                orphans = self
                    .blocks
                    .remove(&cidr)
                    .map(|slot| slot.queue)
                    .unwrap_or_default()
            }
            None => {}
        }
        self.requeue(written.unfinished.into_iter().chain(orphans));
        self.write(cidr);
        self.claim_spare();
    }

    fn finish_block_release(&mut self, cidr: IpNet, returned: BlockRelease) {
        let Some(slot) = self.blocks.get_mut(&cidr) else {
            return;
        };
        (slot.is_writing, slot.is_releasing) = (false, false);
        match returned {
            BlockRelease::Done => {
                tracing::info!(%cidr, "an empty block was given back");
                self.remove_block(cidr);
            }
            BlockRelease::Kept(block) => {
                slot.is_uncertain = block.is_none();
                slot.stored = block.unwrap_or_else(|| slot.stored.clone());
                self.write(cidr);
            }
        }
        self.retry();
    }

    fn spawn(&self, work: impl Future<Output = Event> + Send + 'static) {
        let events = self.events.clone();
        tokio::spawn(async move {
            let event = work.await;
            if let Some(events) = events.upgrade() {
                // Sending fails only if the owner is stopping, and then nobody waits.
                let _ = events.send(event).await;
            }
        });
    }
}

/// Reads blocks of this node, and confirms the affinities to those that are new to it: the agent
/// may have ended between the block and its affinity.
async fn read<S: Store>(
    store: &NodeObjects<S>,
    node: &str,
    missing: Vec<IpNet>,
    left: Vec<IpNet>,
) -> Loaded {
    let mut loaded = Loaded {
        found: Vec::new(),
        unread: Vec::new(),
        left: left.clone(),
    };
    for cidr in missing.iter().chain(&left) {
        match store.block(*cidr).await {
            Ok(block) => loaded.found.extend(block),
            // Whose addresses are in it says so when they are released; nobody else waits for it.
            Err(StoreError::Damaged(error)) => {
                tracing::error!(%cidr, error, "a block of this node cannot be used")
            }
            Err(error) => {
                tracing::warn!(
                    %cidr,
                    %error,
                    "a block of this node could not be read; it is read again when it is needed",
                );
                loaded.unread.push(*cidr);
            }
        }
    }
    let new = loaded
        .found
        .iter()
        .filter(|block| block.value.node() == Some(node) && missing.contains(&block.value.cidr()));
    for block in new {
        let cidr = block.value.cidr();
        if let Err(error) = idle_blocks::confirm(store, cidr).await {
            tracing::warn!(
                %cidr,
                %error,
                "the claim on a block of this node could not be confirmed",
            );
        }
    }
    loaded
}
