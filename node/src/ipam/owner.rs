//! The one owner of this node's blocks: answers from a cache of them, and lets many pods share one write.
//!
//! While a block is being written, what is asked of it waits; when the write is done, all that waits goes into the next write. An address is
//! answered only after its write has succeeded. Everything is kept under a handle, so that an answer that got lost is found again, and given
//! back with the handle.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::limits::Limits;
use margay_api::rule::IpVersion;
use tokio::sync::{mpsc, oneshot};

use super::allocator::{AssignReply, Event, Part, ReleaseReply, Terms, Waiting, Wanted, join, stopping, whole};
use super::claim;
use super::commit::{self, Operation, Written};
use super::exact;
use super::store::{Store, StoreError, Stored, UsablePool};
use crate::cni::ports::{Demand, NoAddress};
use crate::net::plan::{VERSIONS, version_of};

/// With fewer free addresses than this, and than a quarter of a block, another block is claimed before it is needed. A quarter, because a spare of a node
/// that is half empty would be another node's first block.
const SPARE: usize = 8;

/// A block of this node and what waits for its next write.
struct Slot {
    stored: Stored<Block>,
    /// A write has failed that may have been done all the same.
    is_unsure: bool,
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

    /// Whether something may be under the handle here: a release has to look.
    fn may_hold(&self, handle: &str) -> bool {
        self.is_unsure || self.holds(handle)
    }

    /// Free addresses that nothing in the queue will take.
    fn room(&self, limits: &Limits) -> usize {
        let assigns = self.queue.iter().filter(|operation| matches!(operation, Operation::Assign(..))).count();
        let available = match limits.reserved.as_slice() {
            [] => self.stored.value.free(),
            _ => self.stored.value.available(|address| limits.is_reserved(address)),
        };
        available.saturating_sub(assigns)
    }
}

/// See the module.
pub(super) struct Owner<S> {
    node: String,
    store: Arc<S>,
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
}

impl<S: Store> Owner<S> {
    /// An owner that knows nothing yet.
    pub(super) fn new(
        node: String,
        store: Arc<S>,
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
        }
    }

    /// Answers until nobody can ask any more.
    pub(super) async fn run(mut self, mut received: mpsc::Receiver<Event>) {
        self.load();
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
            }
        }
    }

    /// What was refused may be had now.
    fn anew(&mut self) {
        self.spare_refused.clear();
        self.retry();
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
            Event::Located(handle, reply, Ok(blocks)) => self.located(handle, reply, blocks),
            Event::Located(_, reply, Err(error)) => {
                drop(reply.send(Err(NoAddress::Unavailable(format!("IPAM handle: {error}")))))
            }
            Event::Loaded(blocks, unread) => {
                self.loading -= 1;
                self.unread.extend(unread);
                blocks.into_iter().for_each(|block| self.keep(block));
                self.retry();
            }
        }
    }

    /// Reads the blocks of this node that are not here yet.
    fn load(&mut self) {
        self.spare_refused.clear();
        let missing: Vec<IpNet> = {
            let map = self.terms.map.borrow_and_update();
            let ours = |(cidr, node): &(&IpNet, &String)| **node == self.node && !self.blocks.contains_key(*cidr);
            let known = map.iter().flat_map(|map| map.iter());
            known.filter(ours).map(|(cidr, _)| *cidr).collect()
        };
        if missing.is_empty() {
            return self.retry();
        }
        self.loading += 1;
        self.unread.clear();
        let store = self.store.clone();
        self.background(async move {
            let (mut found, mut unread) = (Vec::new(), Vec::new());
            for cidr in missing {
                match store.block(cidr).await {
                    Ok(block) => found.extend(block),
                    Err(error) => {
                        tracing::warn!(%cidr, %error, "a block of this node could not be read; it is read again when it is needed");
                        unread.push(cidr);
                    }
                }
            }
            Event::Loaded(found, unread)
        });
    }

    fn keep(&mut self, stored: Stored<Block>) {
        if stored.value.node() == Some(self.node.as_str()) {
            self.blocks.entry(stored.value.cidr()).or_insert_with(|| Slot {
                stored,
                is_unsure: false,
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
        if let Some(locked) = self.locked() {
            return drop(reply.send(Err(locked)));
        }
        if !wanted.exact.is_empty() {
            return self.assign_exact(wanted, reply);
        }
        let mut parts = self.parts(&wanted);
        if let Some(unknown) = parts.iter().find_map(|part| self.unknown_pool(part)) {
            return drop(reply.send(Err(unknown)));
        }
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
        let pools = self.terms.pools.borrow().clone().unwrap_or_default();
        let targets = match exact::targets(&wanted.exact, &pools) {
            Ok(targets) => targets,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let refusal = |version| Some((version, self.claim_refusal(version)?));
        let bounds = exact::Bounds {
            node: self.node.clone(),
            strict: self.limits().strict_affinity,
            no_claim: VERSIONS.into_iter().filter_map(refusal).collect(),
        };
        let (store, now) = (self.store.clone(), (self.clock)());
        self.background(async move {
            let taken = exact::assign(&*store, &bounds, wanted.attribute, &targets, &now).await;
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

    /// A pool that the part names, and that there is not.
    fn unknown_pool(&self, part: &Part) -> Option<NoAddress> {
        let pools = self.terms.pools.borrow();
        let of_version = |pool: &&UsablePool| version_of(pool.cidr.addr()) == part.version;
        let pools: Vec<&UsablePool> = pools.iter().flat_map(|pools| pools.iter()).filter(of_version).collect();
        let unknown = part.pools.iter().find(|name| !pools.iter().any(|pool| pool.is_named(name)));
        unknown.map(|name| claim::unknown_pool(part.version, name))
    }

    /// The block that has the part already, or one with room.
    fn block_for(&self, part: &Part) -> Option<IpNet> {
        let limits = self.limits();
        let has_room = |(cidr, slot): &(&IpNet, &Slot)| {
            version_of(cidr.addr()) == part.version && slot.room(&limits) > 0 && self.allows(&part.pools, **cidr)
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
        let pools = self.terms.pools.borrow();
        let mut pools = pools.iter().flat_map(|pools| pools.iter());
        pools.any(|pool| version_of(pool.cidr.addr()) == version && pool.serves(&[]))
    }

    /// Whether it is known what this node has, and what it may have: before that a claim could be for what is there already.
    fn is_oriented(&self) -> bool {
        self.loading == 0 && self.terms.is_known()
    }

    fn limits(&self) -> Arc<Limits> {
        self.terms.limits.borrow().clone().unwrap_or_default()
    }

    /// Why nothing may be written now, if so.
    fn locked(&self) -> Option<NoAddress> {
        let text = "the cluster's addresses are locked: ClusterInformation default has datastoreReady false, as while data is moved or repaired; \
                    the runtime will try again";
        self.limits().is_locked.then(|| NoAddress::Unavailable(text.to_owned()))
    }

    /// Why this node may claim no other block of the IP version, if so.
    fn claim_refusal(&self, version: IpVersion) -> Option<String> {
        let map = self.terms.map.borrow();
        let known = map.iter().flat_map(|map| map.iter()).filter(|(_, node)| **node == self.node);
        let own: BTreeSet<&IpNet> = known.map(|(cidr, _)| cidr).chain(self.blocks.keys()).collect();
        let own = own.into_iter().filter(|cidr| version_of(cidr.addr()) == version).count();
        self.limits().refuse_claim(&self.node, own)
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

    /// Whether a request that names these pools may take an address of the block. A block whose pool is gone or disabled serves nobody.
    fn allows(&self, named: &[String], block: IpNet) -> bool {
        let pools = self.terms.pools.borrow();
        let mut pools = pools.iter().flat_map(|pools| pools.iter());
        pools.any(|pool| pool.cidr.contains(&block) && pool.serves(named))
    }

    /// A handle may have addresses in several blocks. While not all blocks of this node are here, and where a pod has named its addresses, its
    /// object tells which.
    fn release(&mut self, handle: String, reply: ReleaseReply) {
        if let Some(locked) = self.locked() {
            return drop(reply.send(Err(locked)));
        }
        let is_requested = |slot: &Slot| exact::is_requested(&slot.stored.value, &handle);
        let is_here = self.blocks.values().any(|slot| slot.holds(&handle)) && !self.blocks.values().any(is_requested);
        if is_here && self.loading == 0 && self.terms.map.borrow().is_some() {
            return self.release_from(handle, reply, Vec::new());
        }
        let store = self.store.clone();
        self.background(async move {
            let found = commit::locate(&*store, &handle).await;
            Event::Located(handle, reply, found)
        });
    }

    /// A handle that names no blocks may still have addresses: its object and the block are written at the same time. So what is not found counts as released
    /// once all of this node's blocks have been read.
    fn located(&mut self, handle: String, reply: ReleaseReply, blocks: Vec<Stored<Block>>) {
        if blocks.is_empty() && !self.is_oriented() {
            return self.waiting.push_back(Waiting::Release(handle, reply));
        }
        if blocks.is_empty() && self.unread.iter().any(|cidr| !self.blocks.contains_key(cidr)) {
            drop(reply.send(Err(self.terms.unknown())));
            return self.load();
        }
        self.release_from(handle, reply, blocks);
    }

    /// Releases from blocks in the cache that have the handle, and from those of `located` that are not in it; then the handle goes.
    fn release_from(&mut self, handle: String, reply: ReleaseReply, located: Vec<Stored<Block>>) {
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            located.into_iter().partition(|block| self.blocks.contains_key(&block.value.cidr()));
        let mut here: BTreeSet<IpNet> = here.iter().map(|block| block.value.cidr()).collect();
        here.extend(self.blocks.iter().filter(|(_, slot)| slot.may_hold(&handle)).map(|(cidr, _)| *cidr));
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
        let (stored, queue) = (slot.stored.clone(), std::mem::take(&mut slot.queue));
        let (store, limits) = (self.store.clone(), self.limits());
        self.background(async move { Event::Written(commit::commit(&*store, stored, queue, &limits).await) });
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
        let limits = self.limits();
        if limits.is_locked {
            return;
        }
        for version in VERSIONS {
            let of_version = || self.blocks.iter().filter(|(cidr, _)| version_of(cidr.addr()) == version);
            let free: usize = of_version().map(|(_, slot)| slot.room(&limits)).sum();
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
            .terms
            .pools
            .borrow()
            .iter()
            .flat_map(|pools| pools.iter())
            .filter(|pool| version_of(pool.cidr.addr()) == version && pool.serves(&named))
            .cloned()
            .collect();
        let taken: BTreeSet<IpNet> =
            self.terms.map.borrow().iter().flat_map(|map| map.keys()).chain(self.blocks.keys()).copied().collect();
        let (store, node, now) = (self.store.clone(), self.node.clone(), (self.clock)());
        let refusal = self.claim_refusal(version);
        let want = claim::Want { version, named, pools, limits: self.limits() };
        self.background(async move {
            let result = match refusal {
                Some(why) if !want.pools.is_empty() => Err(NoAddress::Exhausted(why)),
                _ => claim::claim(&*store, &node, &want, taken, now).await,
            };
            Event::Claimed(version, want.named, result)
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
            Waiting::Release(..) => false,
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
