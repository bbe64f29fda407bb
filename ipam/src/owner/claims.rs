//! Blocks that come and go: claimed when there is no room, released when they are not needed; and
//! loans where no block can be claimed.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::search::shuffled;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;

use super::events::{Event, Waiting};
use super::{Owner, Slot};
use crate::borrow::{Borrowed, borrow};
use crate::claim;
use crate::commit::{AssignReply, Part, commit};
use crate::constraints::Constraints;
use crate::idle_blocks::{BlockFacts, BlockRelease, Need, release_block};
use crate::node_objects::{NodeObjects, Stored};
use crate::pools::{PoolChoice, can_serve};
use crate::request::{AddressRequest, NoAddress};
use crate::store::{Store, StoreError};

/// Number of free addresses below which, if it is also less than a quarter of a block, a spare
/// block is claimed. A quarter, because the spare block of a node whose only block is half full
/// could be another node's first one.
const SPARE: usize = 8;

impl<S: Store> Owner<S> {
    /// Reason why this node may claim no other block of the IP version, if so. Only blocks that can
    /// serve the node count.
    pub(super) fn claim_refusal(&self, version: IpVersion) -> Option<String> {
        let pools = self.pools();
        let map = self.inputs.map.borrow();
        let known = map
            .iter()
            .flat_map(|map| map.iter())
            .filter(|(_, node)| **node == self.node);
        let own: BTreeSet<&IpNet> = known
            .map(|(cidr, _)| cidr)
            .chain(self.blocks.keys())
            .collect();
        let own = own
            .into_iter()
            .filter(|cidr| IpVersion::of(cidr.addr()) == version && can_serve(&pools, **cidr))
            .count();
        self.limits().refuse_claim(&self.node, own)
    }

    /// Claims a spare block before it is needed, so that no pod waits for the claim.
    pub(super) fn claim_spare(&mut self) {
        let limits = self.limits();
        if limits.is_locked || !self.is_ready() {
            return;
        }
        let (known, any) = (self.known(), PoolChoice::default());
        for version in IpVersion::ALL {
            let serving: Vec<(&IpNet, &super::Slot)> = self
                .blocks
                .iter()
                .filter(|(cidr, _)| {
                    IpVersion::of(cidr.addr()) == version && self.allows(&any, **cidr)
                })
                .collect();
            let free: usize = serving
                .iter()
                .map(|(cidr, slot)| slot.room(&self.constraints(&known, **cidr)))
                .sum();
            let size = serving
                .iter()
                .map(|(_, slot)| slot.stored.value.spec().allocations.len())
                .max();
            let low = size.map_or(0, |size| SPARE.min(size / 4));
            if free < low && !self.without_spare.contains(&version) {
                self.claim(version, any.clone());
            }
        }
    }

    pub(super) fn claim(&mut self, version: IpVersion, choice: PoolChoice) {
        if !self.claiming.insert(version) {
            return;
        }
        let (context, store) = (self.claim_context(), self.store.clone());
        let constraints = Constraints {
            limits: self.limits(),
            shared: BTreeSet::new(),
            now: context.now.clone(),
        };
        let refusal = self
            .claim_refusal(version)
            .filter(|_| context.serving(version, &choice).next().is_some());
        let want = claim::ClaimRequest {
            version,
            choice,
            constraints,
        };
        self.spawn(async move {
            let result = match refusal {
                Some(why) => Err(NoAddress::Exhausted(why)),
                None => claim::claim(&*store, &context, &want).await,
            };
            Event::Claimed(version, want.choice, result)
        });
    }

    /// Finishes a claim. Waiting requests are retried; those that needed the failed claim borrow,
    /// or get its error.
    pub(super) fn finish_claim(
        &mut self,
        version: IpVersion,
        choice: &PoolChoice,
        result: Result<Stored<Block>, NoAddress>,
    ) {
        self.claiming.remove(&version);
        let failure = match result {
            Ok(block) => {
                self.insert_block(block);
                None
            }
            Err(error) => {
                self.without_spare.insert(version);
                Some(error)
            }
        };
        for waiting in std::mem::take(&mut self.waiting) {
            match &failure {
                Some(error) if self.waits_for(&waiting, version, choice) => {
                    self.fall_back(waiting, error.clone())
                }
                _ => self.retry_one(waiting),
            }
        }
    }

    /// Returns true when it needs a new block of this IP version from these pools.
    fn waits_for(&self, waiting: &Waiting, version: IpVersion, choice: &PoolChoice) -> bool {
        let lacks = |part: &Part| {
            part.version == version && part.choice == *choice && self.block_for(part).is_none()
        };
        match waiting {
            Waiting::Request(wanted, _) => {
                !self.deletions.contains(wanted.handle()) && self.parts(wanted).iter().any(lacks)
            }
            Waiting::Part(part, _) => lacks(part),
            Waiting::Release(..) => false,
        }
    }

    /// Borrows for a request whose claim has failed, if that can help; otherwise replies with the
    /// error.
    fn fall_back(&mut self, waiting: Waiting, error: NoAddress) {
        let NoAddress::Exhausted(why) = error else {
            return waiting.fail(error);
        };
        let serves = |part: &Part| {
            self.claim_context()
                .serving(part.version, &part.choice)
                .next()
                .is_some()
        };
        match waiting {
            Waiting::Request(wanted, reply) => {
                let parts = self.parts(&wanted);
                let is_claimed_for = |part: &Part| {
                    self.claiming.contains(&part.version) && self.block_for(part).is_none()
                };
                if parts.iter().any(is_claimed_for) {
                    // A claim for another part may still succeed; only then is it known what must
                    // be borrowed.
                    return self.waiting.push_back(Waiting::Request(wanted, reply));
                }
                match parts.iter().all(serves) {
                    true => self.borrow(wanted, parts, reply, why),
                    false => drop(reply.send(Err(NoAddress::Exhausted(why)))),
                }
            }
            // Another part has been written already. The caller releases both and asks again.
            Waiting::Part(part, reply) => {
                let text = format!(
                    "the block that had room for handle {} has none any more, and {why}; the \
                     runtime will try again",
                    part.handle()
                );
                drop(reply.send(Err(NoAddress::Unavailable(text))));
            }
            Waiting::Release(..) => self.retry_one(waiting),
        }
    }

    /// Borrows the addresses that the request lacks. `why` tells why no block could be claimed.
    pub(super) fn borrow(
        &mut self,
        wanted: AddressRequest,
        parts: Vec<Part>,
        reply: AssignReply,
        why: String,
    ) {
        let had = self
            .borrowed
            .get(wanted.handle())
            .cloned()
            .unwrap_or_default();
        let has = |part: &Part| {
            had.iter()
                .any(|cidr| IpVersion::of(cidr.addr()) == part.version)
        };
        let lacking: Vec<Part> = parts
            .into_iter()
            .filter(|part| has(part) || self.block_for(part).is_none())
            .collect();
        let context = self.claim_context();
        let strict = self.limits().strict_affinity;
        let mut asked = Vec::new();
        for part in lacking {
            let of_version = had
                .iter()
                .copied()
                .filter(|cidr| IpVersion::of(cidr.addr()) == part.version);
            let mut blocks: Vec<IpNet> = of_version.collect();
            if !strict {
                blocks.extend(self.lenders(&part));
            }
            let refusal = self.exhausted(&part, &why);
            asked.push((part, blocks, refusal));
        }
        self.local.remove(wanted.handle());
        let constraints = Constraints {
            limits: self.limits(),
            shared: BTreeSet::new(),
            now: context.now.clone(),
        };
        let store = self.store.clone();
        self.spawn(async move {
            let mut taken: Vec<Borrowed> = Vec::new();
            for (part, blocks, refusal) in asked {
                match borrow(&*store, &context, &blocks, &constraints, &part.attribute).await {
                    Ok(Some(borrowed)) => taken.push(borrowed),
                    Ok(None) => return Event::Borrowed(wanted, reply, Err(refusal)),
                    Err(error) => return Event::Borrowed(wanted, reply, Err(unavailable(error))),
                }
            }
            Event::Borrowed(wanted, reply, Ok(taken))
        });
    }

    /// Blocks of other nodes that the part may borrow from, in the order of the search. It depends
    /// on the node's name, so that nodes spread, and stays the same for all its pods until a search
    /// finds nothing.
    fn lenders(&self, part: &Part) -> Vec<IpNet> {
        let known = self.known();
        let others = known
            .of_others(&self.node, part.version)
            .filter(|cidr| self.allows(&part.choice, *cidr));
        shuffled(others, &format!("{} {}", self.node, self.fruitless))
    }

    /// Error for the case that no block of another node has room either.
    fn exhausted(&self, part: &Part, why: &str) -> NoAddress {
        let known = self.known();
        let own: Vec<(&IpNet, &super::Slot)> = self
            .blocks
            .iter()
            .filter(|(cidr, _)| {
                IpVersion::of(cidr.addr()) == part.version && self.allows(&part.choice, **cidr)
            })
            .collect();
        let resting: usize = own
            .iter()
            .map(|(cidr, slot)| self.constraints(&known, **cidr).resting(&slot.stored.value))
            .sum();
        let limits = self.limits();
        let blocks = match (own.len(), resting) {
            (0, _) => format!("node {} has no block for it", self.node),
            (count, 0) => format!("the {count} blocks for it of node {} are full", self.node),
            (count, _) => format!(
                "the {count} blocks for it of node {} are full, with {resting} addresses that rest \
                 for the {} seconds of ipCooldownSeconds",
                self.node, limits.cooldown
            ),
        };
        let others = match limits.strict_affinity {
            true => {
                "IPAMConfiguration default has strictAffinity, so none is taken out of another \
                 node's block"
            }
            false => "none was found in blocks of other nodes",
        };
        NoAddress::Exhausted(format!(
            "no address is free: {blocks}, {why}, and {others}; add an IPPool, or free addresses"
        ))
    }

    /// Finishes a loan: the remaining parts are assigned from the node's own blocks.
    pub(super) fn finish_borrow(
        &mut self,
        wanted: AddressRequest,
        reply: AssignReply,
        result: Result<Vec<Borrowed>, NoAddress>,
    ) {
        let borrowed = match result {
            Ok(borrowed) => borrowed,
            Err(error) => {
                self.fruitless += 1;
                return drop(reply.send(Err(error)));
            }
        };
        let blocks = borrowed.iter().map(|(_, block)| *block);
        self.borrowed
            .entry(wanted.handle().to_owned())
            .or_default()
            .extend(blocks);
        let is_left = |part: &Part| {
            borrowed
                .iter()
                .all(|(address, _)| IpVersion::of(address.addr()) != part.version)
        };
        let parts: Vec<Part> = self.parts(&wanted).into_iter().filter(is_left).collect();
        let own: Option<Vec<IpNet>> = parts.iter().map(|part| self.block_for(part)).collect();
        let had = borrowed.into_iter().map(|(address, _)| address).collect();
        match own {
            Some(own) => self.assign_from(parts, own, had, reply),
            // The room has gone meanwhile: that part is borrowed too, and the first loan is found
            // again by its handle.
            None => {
                let parts = self.parts(&wanted);
                self.borrow(wanted, parts, reply, "another pod was faster".to_owned());
            }
        }
    }

    /// Releases the blocks that this node does not need, and ends cooldowns that are over.
    pub(super) fn release_idle_blocks(&mut self) {
        if !self.is_ready() || self.limits().is_locked {
            return;
        }
        let (pools, known) = (self.pools(), self.known());
        let need = |cidr: &IpNet| {
            let mut around = pools
                .iter()
                .filter(|pool| pool.cidr.contains(cidr) && !pool.is_terminating)
                .peekable();
            match (
                around.peek().is_some(),
                around.find(|pool| pool.is_for_node()),
            ) {
                (_, Some(pool)) => Need::Used(pool.name.clone()),
                (true, None) => Need::Unused,
                (false, None) => Need::NoPool,
            }
        };
        let facts: Vec<BlockFacts> = self
            .blocks
            .iter()
            .map(|(cidr, slot)| {
                let constraints = self.constraints(&known, *cidr);
                let (is_empty, room) = (slot.is_empty(&constraints), slot.room(&constraints));
                BlockFacts {
                    cidr: *cidr,
                    need: need(cidr),
                    is_empty,
                    room,
                }
            })
            .collect();
        for cidr in self.idle.find_due(&facts, self.started.elapsed()) {
            self.start_block_release(cidr, &self.constraints(&known, cidr));
        }
        for facts in facts {
            if facts.need == Need::NoPool && !facts.is_empty {
                self.look_for_loans(facts.cidr, self.constraints(&known, facts.cidr));
            }
            self.end_cooldowns(facts.cidr, self.constraints(&known, facts.cidr));
        }
    }

    /// Reads a block without a pool, in which only other nodes have addresses as far as the cache
    /// knows. They release them without notifying this node, so only a read shows that the block is
    /// empty.
    fn look_for_loans(&mut self, cidr: IpNet, constraints: Constraints) {
        let is_lent = |attribute: &AllocationAttribute| {
            let node = attribute
                .secondary
                .as_ref()
                .and_then(|secondary| secondary.get("node"));
            node.is_some_and(|node| *node != self.node)
        };
        let is_idle = |slot: &&mut Slot| {
            !slot.is_writing
                && slot.queue.is_empty()
                && slot
                    .stored
                    .value
                    .allocated()
                    .all(|(_, holder)| is_lent(holder))
        };
        if self.blocks.get_mut(&cidr).filter(is_idle).is_none() {
            return;
        }
        self.set_aside(cidr, |known, store, node| async move {
            match store.block(cidr).await {
                Ok(Some(block)) if block.value.node() != Some(node.as_str()) => BlockRelease::Done,
                Ok(Some(block)) if constraints.is_empty(&block.value) => {
                    release_block(&*store, block, &node).await
                }
                Ok(Some(block)) => BlockRelease::Kept(Some(block)),
                Ok(None) => BlockRelease::Done,
                Err(_) => BlockRelease::Kept(Some(known)),
            }
        });
    }

    fn start_block_release(&mut self, cidr: IpNet, constraints: &Constraints) {
        self.set_aside(cidr, |mut stored, store, node| {
            stored
                .value
                .end_cooldown(|since| constraints.is_over(since));
            async move { release_block(&*store, stored, &node).await }
        });
    }

    /// Assigns nothing from a block, and queues its operations, until `work` has decided if it is
    /// released. `work` gets the cached block, the storage and this node's name.
    fn set_aside<W>(
        &mut self,
        cidr: IpNet,
        work: impl FnOnce(Stored<Block>, Arc<NodeObjects<S>>, String) -> W,
    ) where
        W: Future<Output = BlockRelease> + Send + 'static,
    {
        let Some(slot) = self.blocks.get_mut(&cidr) else {
            return;
        };
        (slot.is_writing, slot.is_releasing) = (true, true);
        let work = work(slot.stored.clone(), self.store.clone(), self.node.clone());
        self.spawn(async move { Event::BlockReleased(cidr, work.await) });
    }

    /// Frees addresses whose cooldown is over in a block that is not being written, so that others
    /// can borrow them.
    fn end_cooldowns(&mut self, cidr: IpNet, constraints: Constraints) {
        let Some(slot) = self.blocks.get_mut(&cidr).filter(|slot| !slot.is_writing) else {
            return;
        };
        if !slot
            .stored
            .value
            .cooling_down()
            .any(|(_, since)| constraints.is_over(since))
        {
            return;
        }
        slot.is_writing = true;
        let (stored, store) = (slot.stored.clone(), self.store.clone());
        self.spawn(async move {
            Event::Written(commit(&*store, stored, Vec::new(), &constraints).await)
        });
    }
}

fn unavailable(error: StoreError) -> NoAddress {
    NoAddress::Unavailable(format!(
        "IPAM loan of an address: {error}; the runtime will try again"
    ))
}
