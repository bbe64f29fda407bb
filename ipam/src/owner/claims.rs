//! Blocks that come and go: claimed when there is no room, given back when they are not needed; and loans where none is to be had.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::search::shuffled;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;

use super::{Owner, Slot};
use crate::allocator::{AssignReply, Event, Part, Waiting};
use crate::back::{Facts, Returned, Standing, give_back};
use crate::borrow::{Borrowed, borrow};
use crate::claim;
use crate::commit::commit;
use crate::known::Heed;
use crate::node_objects::{NodeObjects, Stored};
use crate::pools::Choice;
use crate::request::{AddressRequest, NoAddress};
use crate::store::{Store, StoreError};

/// With fewer free addresses than this, and than a quarter of a block, another block is claimed before it is needed. A quarter, because a spare of a node
/// that is half empty would be another node's first block.
const SPARE: usize = 8;

impl<S: Store> Owner<S> {
    /// Why this node may claim no other block of the IP version, if so. Only blocks that serve the node count.
    pub(super) fn claim_refusal(&self, version: IpVersion) -> Option<String> {
        let pools = self.pools();
        let serves =
            |cidr: &IpNet| pools.iter().any(|pool| pool.closed.is_none() && pool.selected && pool.cidr.contains(cidr));
        let map = self.terms.map.borrow();
        let known = map.iter().flat_map(|map| map.iter()).filter(|(_, node)| **node == self.node);
        let own: BTreeSet<&IpNet> = known.map(|(cidr, _)| cidr).chain(self.blocks.keys()).collect();
        let own = own.into_iter().filter(|cidr| IpVersion::of(cidr.addr()) == version && serves(cidr)).count();
        self.limits().refuse_claim(&self.node, own)
    }

    /// Claims another block before it is needed, off anybody's path.
    pub(super) fn keep_spare(&mut self) {
        let limits = self.limits();
        if limits.is_locked || !self.is_oriented() {
            return;
        }
        let (known, any) = (self.known(), Choice::default());
        for version in IpVersion::ALL {
            let serving: Vec<(&IpNet, &super::Slot)> = self
                .blocks
                .iter()
                .filter(|(cidr, _)| IpVersion::of(cidr.addr()) == version && self.allows(&any, **cidr))
                .collect();
            let free: usize = serving.iter().map(|(cidr, slot)| slot.room(&self.heed(&known, **cidr))).sum();
            let size = serving.iter().map(|(_, slot)| slot.stored.value.spec().allocations.len()).max();
            let low = size.map_or(0, |size| SPARE.min(size / 4));
            if free < low && !self.spare_refused.contains(&version) {
                self.claim(version, any.clone());
            }
        }
    }

    pub(super) fn claim(&mut self, version: IpVersion, choice: Choice) {
        if !self.claiming.insert(version) {
            return;
        }
        let (ground, store) = (self.ground(), self.store.clone());
        let heed = Heed { limits: self.limits(), shared: BTreeSet::new(), now: ground.now.clone() };
        let refusal = self.claim_refusal(version).filter(|_| ground.serving(version, &choice).next().is_some());
        let want = claim::Want { version, choice, heed };
        self.background(async move {
            let result = match refusal {
                Some(why) => Err(NoAddress::Exhausted(why)),
                None => claim::claim(&*store, &ground, &want).await,
            };
            Event::Claimed(version, want.choice, result)
        });
    }

    /// Those who waited try again; those for whom nothing could be claimed borrow, or are told.
    pub(super) fn claimed(&mut self, version: IpVersion, choice: &Choice, result: Result<Stored<Block>, NoAddress>) {
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
                Some(error) if self.waits_for(&waiting, version, choice) => self.fall_back(waiting, error.clone()),
                _ => self.again(waiting),
            }
        }
    }

    /// Whether it cannot go on without a new block of this IP version, of one of these pools.
    fn waits_for(&self, waiting: &Waiting, version: IpVersion, choice: &Choice) -> bool {
        let lacks = |part: &Part| part.version == version && part.choice == *choice && self.block_for(part).is_none();
        match waiting {
            Waiting::Request(wanted, _) => self.parts(wanted).iter().any(lacks),
            Waiting::Part(part, _) => lacks(part),
            Waiting::Release(..) => false,
        }
    }

    /// Whoever waits in vain for a block borrows, if that may help.
    fn fall_back(&mut self, waiting: Waiting, error: NoAddress) {
        let NoAddress::Exhausted(why) = error else { return waiting.fail(error) };
        let serves = |part: &Part| self.ground().serving(part.version, &part.choice).next().is_some();
        match waiting {
            Waiting::Request(wanted, reply) => {
                let parts = self.parts(&wanted);
                let is_claimed_for =
                    |part: &Part| self.claiming.contains(&part.version) && self.block_for(part).is_none();
                if parts.iter().any(is_claimed_for) {
                    // What can be had otherwise is not borrowed.
                    return self.waiting.push_back(Waiting::Request(wanted, reply));
                }
                match parts.iter().all(serves) {
                    true => self.borrow(wanted, parts, reply, why),
                    false => drop(reply.send(Err(NoAddress::Exhausted(why)))),
                }
            }
            // Its other part has been written: what is not whole is taken back whole, and asked for again.
            Waiting::Part(part, reply) => {
                let text = format!(
                    "the block that had room for handle {} has none any more, and {why}; the runtime will try again",
                    part.handle()
                );
                drop(reply.send(Err(NoAddress::Unavailable(text))));
            }
            Waiting::Release(..) => self.again(waiting),
        }
    }

    /// Takes what the request lacks out of blocks of other nodes. `why`: no block could be claimed.
    pub(super) fn borrow(&mut self, wanted: AddressRequest, parts: Vec<Part>, reply: AssignReply, why: String) {
        let had = self.borrowed.get(wanted.handle()).cloned().unwrap_or_default();
        let has = |part: &Part| had.iter().any(|cidr| IpVersion::of(cidr.addr()) == part.version);
        let lacking: Vec<Part> = parts.into_iter().filter(|part| has(part) || self.block_for(part).is_none()).collect();
        let ground = self.ground();
        let strict = self.limits().strict_affinity;
        let mut asked = Vec::new();
        for part in lacking {
            let of_version = had.iter().copied().filter(|cidr| IpVersion::of(cidr.addr()) == part.version);
            let mut blocks: Vec<IpNet> = of_version.collect();
            if !strict {
                blocks.extend(self.lenders(&part));
            }
            let refusal = self.exhausted(&part, &why);
            asked.push((part, blocks, refusal));
        }
        self.local.remove(wanted.handle());
        let heed = Heed { limits: self.limits(), shared: BTreeSet::new(), now: ground.now.clone() };
        let store = self.store.clone();
        self.background(async move {
            let mut taken: Vec<Borrowed> = Vec::new();
            for (part, blocks, refusal) in asked {
                match borrow(&*store, &ground, &blocks, &heed, &part.attribute).await {
                    Ok(Some(borrowed)) => taken.push(borrowed),
                    Ok(None) => return Event::Borrowed(wanted, reply, Err(refusal)),
                    Err(error) => return Event::Borrowed(wanted, reply, Err(unavailable(error))),
                }
            }
            Event::Borrowed(wanted, reply, Ok(taken))
        });
    }

    /// Others' blocks that the part may borrow from, in the order in which they are looked at: the same one for every pod of a node until nothing was found.
    fn lenders(&self, part: &Part) -> Vec<IpNet> {
        let known = self.known();
        let others = known.of_others(&self.node, part.version).filter(|cidr| self.allows(&part.choice, *cidr));
        shuffled(others, &format!("{} {}", self.node, self.fruitless))
    }

    /// Why there is no address, if no block of another node has one either.
    fn exhausted(&self, part: &Part, why: &str) -> NoAddress {
        let known = self.known();
        let own: Vec<(&IpNet, &super::Slot)> = self
            .blocks
            .iter()
            .filter(|(cidr, _)| IpVersion::of(cidr.addr()) == part.version && self.allows(&part.choice, **cidr))
            .collect();
        let resting: usize = own.iter().map(|(cidr, slot)| self.heed(&known, **cidr).resting(&slot.stored.value)).sum();
        let limits = self.limits();
        let blocks = match (own.len(), resting) {
            (0, _) => format!("node {} has no block for it", self.node),
            (count, 0) => format!("the {count} blocks for it of node {} are full", self.node),
            (count, _) => format!(
                "the {count} blocks for it of node {} are full, with {resting} addresses that rest for the {} seconds of ipCooldownSeconds",
                self.node, limits.cooldown
            ),
        };
        let others = match limits.strict_affinity {
            true => "IPAMConfiguration default has strictAffinity, so none is taken out of another node's block",
            false => "none was found in blocks of other nodes",
        };
        NoAddress::Exhausted(format!(
            "no address is free: {blocks}, {why}, and {others}; add an IPPool, or free addresses"
        ))
    }

    /// What was borrowed, and what the node's own blocks give beside it.
    pub(super) fn has_borrowed(
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
        self.borrowed.entry(wanted.handle().to_owned()).or_default().extend(blocks);
        let is_left = |part: &Part| borrowed.iter().all(|(address, _)| IpVersion::of(address.addr()) != part.version);
        let parts: Vec<Part> = self.parts(&wanted).into_iter().filter(is_left).collect();
        let own: Option<Vec<IpNet>> = parts.iter().map(|part| self.block_for(part)).collect();
        let had = borrowed.into_iter().map(|(address, _)| address).collect();
        match own {
            Some(own) => self.assign_from(parts, own, had, reply),
            // The room has gone meanwhile; what was borrowed is found again.
            None => {
                let parts = self.parts(&wanted);
                self.borrow(wanted, parts, reply, "another pod was faster".to_owned());
            }
        }
    }

    /// Gives back what this node does not need.
    pub(super) fn give_back(&mut self) {
        if !self.is_oriented() || self.limits().is_locked {
            return;
        }
        let (pools, known) = (self.pools(), self.known());
        let standing = |cidr: &IpNet| {
            let mut around = pools.iter().filter(|pool| pool.cidr.contains(cidr) && !pool.is_leaving).peekable();
            match (around.peek().is_some(), around.find(|pool| pool.is_for_node())) {
                (_, Some(pool)) => Standing::Used(pool.name.clone()),
                (true, None) => Standing::Idle,
                (false, None) => Standing::Gone,
            }
        };
        let facts: Vec<Facts> = self
            .blocks
            .iter()
            .map(|(cidr, slot)| {
                let heed = self.heed(&known, *cidr);
                let (is_empty, room) = (slot.is_empty(&heed), slot.room(&heed));
                Facts { cidr: *cidr, standing: standing(cidr), is_empty, room }
            })
            .collect();
        for cidr in self.idle.due(&facts, self.started.elapsed()) {
            self.return_block(cidr, &self.heed(&known, cidr));
        }
        for facts in facts {
            if facts.standing == Standing::Gone && !facts.is_empty {
                self.look_for_loans(facts.cidr, self.heed(&known, facts.cidr));
            }
            self.wake_block(facts.cidr, self.heed(&known, facts.cidr));
        }
    }

    /// Reads a block of no pool, or of one that is being deleted, in which only other nodes have addresses, as far as is known here: they give them back without a word to this node.
    fn look_for_loans(&mut self, cidr: IpNet, heed: Heed) {
        let is_lent = |attribute: &AllocationAttribute| {
            let node = attribute.secondary.as_ref().and_then(|secondary| secondary.get("node"));
            node.is_some_and(|node| *node != self.node)
        };
        let is_idle = |slot: &&mut Slot| {
            !slot.is_writing
                && slot.queue.is_empty()
                && slot.stored.value.allocated().all(|(_, holder)| is_lent(holder))
        };
        if self.blocks.get_mut(&cidr).filter(is_idle).is_none() {
            return;
        }
        self.set_aside(cidr, |known, store, node| async move {
            match store.block(cidr).await {
                Ok(Some(block)) if block.value.node() != Some(node.as_str()) => Returned::Gone,
                Ok(Some(block)) if heed.is_empty(&block.value) => give_back(&*store, block, &node).await,
                Ok(Some(block)) => Returned::Kept(Some(block)),
                Ok(None) => Returned::Gone,
                Err(_) => Returned::Kept(Some(known)),
            }
        });
    }

    fn return_block(&mut self, cidr: IpNet, heed: &Heed) {
        self.set_aside(cidr, |mut stored, store, node| {
            stored.value.end_cooldown(|since| heed.is_over(since));
            async move { give_back(&*store, stored, &node).await }
        });
    }

    /// Lets nothing new into a block, and has what is asked of it wait, until `work` has found out whether it goes. That starts with the block as it is known,
    /// the storage and this node's name.
    fn set_aside<W>(&mut self, cidr: IpNet, work: impl FnOnce(Stored<Block>, Arc<NodeObjects<S>>, String) -> W)
    where
        W: Future<Output = Returned> + Send + 'static,
    {
        let Some(slot) = self.blocks.get_mut(&cidr) else { return };
        (slot.is_writing, slot.is_leaving) = (true, true);
        let work = work(slot.stored.clone(), self.store.clone(), self.node.clone());
        self.background(async move { Event::Returned(cidr, work.await) });
    }

    /// Frees what has rested for long enough in a block that nothing else is written to: others may borrow it then.
    fn wake_block(&mut self, cidr: IpNet, heed: Heed) {
        let Some(slot) = self.blocks.get_mut(&cidr).filter(|slot| !slot.is_writing) else { return };
        if !slot.stored.value.cooling_down().any(|(_, since)| heed.is_over(since)) {
            return;
        }
        slot.is_writing = true;
        let (stored, store) = (slot.stored.clone(), self.store.clone());
        self.background(async move { Event::Written(commit(&*store, stored, Vec::new(), &heed).await) });
    }
}

fn unavailable(error: StoreError) -> NoAddress {
    NoAddress::Unavailable(format!("IPAM loan of an address: {error}; the runtime will try again"))
}
