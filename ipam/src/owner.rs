//! The one owner of this node's blocks: answers from a cache of them, and lets many pods share one write.
//!
//! While a block is being written, what is asked of it waits; when the write is done, all that waits goes into the next write. An address is
//! answered only after its write has succeeded. Everything is kept under a handle, so that an answer that got lost is found again, and given
//! back with the handle.
//!
//! What an agent writes to others' objects, for whoever guards them: one address at a time in a block of another node, which it takes (named by the pod, or
//! borrowed) or releases; nothing else of that block changes. Everything else is of its own blocks, affinities and handles.

mod assign;
mod claims;
mod release;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::limits::Limits;
use margay_api::rule::IpVersion;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::allocator::{Event, Loaded, Terms, Waiting};
use super::back::{self, Idle, Returned};
use super::commit::{self, Operation, Written};
use super::known::{Blocks, Heed};
use super::node_objects::{NodeObjects, Stored};
use super::pools::NodePool;
use super::request::NoAddress;
use super::store::Store;

/// A block of this node and what waits for its next write.
struct Slot {
    stored: Stored<Block>,
    /// A write has failed that may have been done all the same.
    is_unsure: bool,
    is_writing: bool,
    /// It is being given back: nothing new goes into it.
    is_leaving: bool,
    /// The map has given it to this node.
    is_listed: bool,
    /// Handles of the write that is under way.
    writing: BTreeSet<String>,
    queue: Vec<Operation>,
}

impl Slot {
    fn new(stored: Stored<Block>) -> Self {
        Self {
            stored,
            is_unsure: false,
            is_writing: false,
            is_leaving: false,
            is_listed: false,
            writing: BTreeSet::new(),
            queue: Vec::new(),
        }
    }

    /// Whether something is, or is about to be, under the handle here.
    fn holds(&self, handle: &str) -> bool {
        !self.stored.value.of_handle(handle).is_empty()
            || self.queue.iter().any(|operation| operation.handle() == handle)
            || self.writing.contains(handle)
    }

    /// Whether something may be under the handle here: a release has to look.
    fn may_hold(&self, handle: &str) -> bool {
        self.is_unsure || self.holds(handle)
    }

    /// Whether nothing is in it, but for what has rested for long enough, and nothing is about to be.
    fn is_empty(&self, heed: &Heed) -> bool {
        let is_idle = !self.is_writing && !self.is_unsure && self.queue.is_empty();
        is_idle && heed.is_empty(&self.stored.value)
    }

    /// Addresses that nothing in the queue will take.
    fn room(&self, heed: &Heed) -> usize {
        let assigns = self.queue.iter().filter(|operation| matches!(operation, Operation::Assign(..))).count();
        if self.is_leaving { 0 } else { heed.room(&self.stored.value).saturating_sub(assigns) }
    }
}

/// See the module.
pub(super) struct Owner<S> {
    node: String,
    store: Arc<NodeObjects<S>>,
    terms: Terms,
    clock: fn() -> String,
    events: mpsc::WeakSender<Event>,
    blocks: BTreeMap<IpNet, Slot>,
    /// Requests that no block of ours has room for, until a claim succeeds, and those that came before it was known what this node has.
    waiting: VecDeque<Waiting>,
    /// Claims that are under way; there is one at a time for each IP version.
    claiming: BTreeSet<IpVersion>,
    /// Reads of this node's blocks that are under way.
    loading: usize,
    /// Blocks of this node that could not be read.
    unread: BTreeSet<IpNet>,
    /// No spare block was to be had for these; not asked for again until the terms change.
    spare_refused: BTreeSet<IpVersion>,
    /// Handles whose addresses are in this node's own blocks, as this process has seen to it: of all others their object tells.
    local: BTreeSet<String>,
    /// Blocks of other nodes that handles have borrowed from.
    borrowed: BTreeMap<String, BTreeSet<IpNet>>,
    /// Searches of others' blocks that found nothing: the next one looks in another order.
    fruitless: u64,
    idle: Idle,
    started: Instant,
}

impl<S: Store> Owner<S> {
    /// An owner that knows nothing yet.
    pub(super) fn new(
        node: String,
        store: Arc<NodeObjects<S>>,
        terms: Terms,
        clock: fn() -> String,
        events: mpsc::WeakSender<Event>,
    ) -> Self {
        Self {
            node,
            store,
            terms,
            clock,
            events,
            blocks: BTreeMap::new(),
            waiting: VecDeque::new(),
            claiming: BTreeSet::new(),
            loading: 0,
            unread: BTreeSet::new(),
            spare_refused: BTreeSet::new(),
            local: BTreeSet::new(),
            borrowed: BTreeMap::new(),
            fruitless: 0,
            idle: Idle::default(),
            started: Instant::now(),
        }
    }

    /// Answers until nobody can ask any more.
    pub(super) async fn run(mut self, mut received: mpsc::Receiver<Event>) {
        self.load();
        let mut looks = tokio::time::interval(back::LOOK);
        loop {
            tokio::select! {
                event = received.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                changed = self.terms.map.changed() => match changed {
                    Ok(()) => self.load(),
                    Err(_) => return,
                },
                changed = self.terms.pools.changed() => match changed {
                    Ok(()) => self.anew(),
                    Err(_) => return,
                },
                changed = self.terms.limits.changed() => match changed {
                    Ok(()) => self.anew(),
                    Err(_) => return,
                },
                _ = looks.tick() => self.give_back(),
            }
        }
    }

    /// What was refused may be had now.
    fn anew(&mut self) {
        self.spare_refused.clear();
        self.retry();
        self.give_back();
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Assign(wanted, reply) => self.seek(wanted, reply),
            Event::Release(handle, reply) => self.release(handle, reply),
            Event::Written(written) => self.written(written),
            Event::Claimed(version, choice, result) => self.claimed(version, &choice, result),
            Event::Sought(wanted, reply, found) => self.sought(wanted, reply, found),
            Event::Borrowed(wanted, reply, result) => self.has_borrowed(wanted, reply, result),
            Event::Exact(addresses, reply, taken) => {
                let answer = taken.map(|blocks| blocks.into_iter().for_each(|block| self.keep(block)));
                // Whoever asked may have gone.
                let _ = reply.send(answer.map(|()| addresses));
            }
            Event::Located(handle, reply, Ok(blocks)) => self.located(handle, reply, blocks),
            Event::Located(_, reply, Err(error)) => {
                drop(reply.send(Err(NoAddress::Unavailable(format!("IPAM handle: {error}")))))
            }
            Event::Loaded(loaded) => self.loaded(loaded),
            Event::Returned(cidr, returned) => self.returned(cidr, returned),
        }
    }

    /// Reads the blocks of this node that are not here yet, and those again that the map does not give to it any more.
    fn load(&mut self) {
        self.spare_refused.clear();
        let mut left = Vec::new();
        let missing: Vec<IpNet> = {
            let map = self.terms.map.borrow_and_update();
            for (cidr, slot) in &mut self.blocks {
                let is_listed = map.as_ref().is_some_and(|map| map.get(cidr) == Some(&self.node));
                if slot.is_listed && !is_listed {
                    left.push(*cidr);
                }
                slot.is_listed = is_listed;
            }
            let ours = |(cidr, node): &(&IpNet, &String)| **node == self.node && !self.blocks.contains_key(*cidr);
            let known = map.iter().flat_map(|map| map.iter());
            known.filter(ours).map(|(cidr, _)| *cidr).collect()
        };
        if missing.is_empty() && left.is_empty() {
            return self.retry();
        }
        self.loading += 1;
        self.unread.clear();
        let (store, node) = (self.store.clone(), self.node.clone());
        self.background(async move { Event::Loaded(read(&*store, &node, missing, left).await) });
    }

    fn loaded(&mut self, loaded: Loaded) {
        self.loading -= 1;
        for cidr in &loaded.left {
            let is_found = loaded.found.iter().any(|block| block.value.cidr() == *cidr && self.is_ours(block));
            if !is_found && !loaded.unread.contains(cidr) {
                self.lose(*cidr);
            }
        }
        self.unread.extend(loaded.unread);
        loaded.found.into_iter().for_each(|block| self.keep(block));
        self.retry();
    }

    fn is_ours(&self, block: &Stored<Block>) -> bool {
        block.value.node() == Some(self.node.as_str())
    }

    fn keep(&mut self, stored: Stored<Block>) {
        if self.is_ours(&stored) {
            let cidr = stored.value.cidr();
            let is_listed = self.terms.map.borrow().as_ref().is_some_and(|map| map.get(&cidr) == Some(&self.node));
            self.blocks.entry(cidr).or_insert_with(|| Slot { is_listed, ..Slot::new(stored) });
        }
    }

    /// Forgets a block that is this node's no more; what waited for it is asked elsewhere.
    fn lose(&mut self, cidr: IpNet) {
        if self.blocks.get(&cidr).is_some_and(|slot| slot.is_writing) {
            // The write finds out itself.
            return;
        }
        let queue = self.blocks.remove(&cidr).map(|slot| slot.queue).unwrap_or_default();
        self.redo(queue);
    }

    fn redo(&mut self, operations: impl IntoIterator<Item = Operation>) {
        for operation in operations {
            match operation {
                Operation::Assign(part, reply) => self.assign_part(part, reply),
                Operation::Release(handle, reply) => self.release(handle, reply),
            }
        }
    }

    /// Whether it is known what this node has, and what it may have: before that a claim could be for what is there already.
    fn is_oriented(&self) -> bool {
        self.loading == 0 && self.terms.is_known()
    }

    fn limits(&self) -> Arc<Limits> {
        self.terms.limits.borrow().clone().unwrap_or_default()
    }

    fn pools(&self) -> Arc<Vec<NodePool>> {
        self.terms.pools.borrow().clone().unwrap_or_default()
    }

    fn known(&self) -> Blocks {
        let map = self.terms.map.borrow().clone().unwrap_or_default();
        Blocks { map, own: self.blocks.keys().copied().collect() }
    }

    fn heed(&self, known: &Blocks, cidr: IpNet) -> Heed {
        Heed::new(self.limits(), known, cidr, (self.clock)())
    }

    /// Why nothing may be written now, if so.
    fn locked(&self) -> Option<NoAddress> {
        let text = "the cluster's addresses are locked: ClusterInformation default has datastoreReady false, as while data is moved or repaired; \
                    the runtime will try again";
        self.limits().is_locked.then(|| NoAddress::Unavailable(text.to_owned()))
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

    /// Starts the next write of a block, with everything that waits for it.
    fn write(&mut self, cidr: IpNet) {
        let heed = self.heed(&self.known(), cidr);
        let Some(slot) = self.blocks.get_mut(&cidr) else {
            return;
        };
        if slot.is_writing || slot.queue.is_empty() {
            return;
        }
        slot.is_writing = true;
        slot.writing = slot.queue.iter().map(|operation| operation.handle().to_owned()).collect();
        let (stored, queue) = (slot.stored.clone(), std::mem::take(&mut slot.queue));
        let store = self.store.clone();
        self.background(async move { Event::Written(commit::commit(&*store, stored, queue, &heed).await) });
    }

    fn written(&mut self, written: Written) {
        let cidr = written.cidr;
        let Some(slot) = self.blocks.get_mut(&cidr) else {
            return;
        };
        slot.is_writing = false;
        slot.is_unsure = written.block.is_none();
        slot.writing.clear();
        let mut orphans = Vec::new();
        match written.block {
            Some(block) if block.value.node() == Some(self.node.as_str()) => slot.stored = block,
            Some(_) => orphans = self.blocks.remove(&cidr).map(|slot| slot.queue).unwrap_or_default(),
            None => {}
        }
        self.redo(written.unfinished.into_iter().chain(orphans));
        self.write(cidr);
        self.keep_spare();
    }

    fn returned(&mut self, cidr: IpNet, returned: Returned) {
        let Some(slot) = self.blocks.get_mut(&cidr) else { return };
        (slot.is_writing, slot.is_leaving) = (false, false);
        match returned {
            Returned::Gone => {
                tracing::info!(%cidr, "an empty block was given back");
                self.lose(cidr);
            }
            Returned::Kept(block) => {
                slot.is_unsure = block.is_none();
                slot.stored = block.unwrap_or_else(|| slot.stored.clone());
                self.write(cidr);
            }
        }
        self.retry();
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

/// Reads blocks of this node; the claims on those that are new to it are made what they should be.
async fn read<S: Store>(store: &NodeObjects<S>, node: &str, missing: Vec<IpNet>, left: Vec<IpNet>) -> Loaded {
    let mut loaded = Loaded { found: Vec::new(), unread: Vec::new(), left: left.clone() };
    for cidr in missing.iter().chain(&left) {
        match store.block(*cidr).await {
            Ok(block) => loaded.found.extend(block),
            Err(error) => {
                tracing::warn!(%cidr, %error, "a block of this node could not be read; it is read again when it is needed");
                loaded.unread.push(*cidr);
            }
        }
    }
    let new =
        loaded.found.iter().filter(|block| block.value.node() == Some(node) && missing.contains(&block.value.cidr()));
    for block in new {
        let cidr = block.value.cidr();
        if let Err(error) = back::confirm(store, cidr).await {
            tracing::warn!(%cidr, %error, "the claim on a block of this node could not be confirmed");
        }
    }
    loaded
}
