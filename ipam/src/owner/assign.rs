//! Assignment: from a block of this node that has the handle or room, else from a claimed or
//! another node's block.

use ipnet::IpNet;
use margay_api::rule::IpVersion;
use tokio::sync::oneshot;

use super::Owner;
use super::events::{Event, Waiting};
use crate::claim::{self, ClaimContext};
use crate::commit::{self, AssignReply, Operation, Part, whole};
use crate::constraints::{Constraints, KnownBlocks};
use crate::exact;
use crate::node_objects::Stored;
use crate::pools::{PoolChoice, Use};
use crate::request::{AddressRequest, Demand, NoAddress};
use crate::store::{Store, StoreError};
use margay_api::ipam::block::Block;

impl<S: Store> Owner<S> {
    /// Assigns; for a tunnel, after a look at its handle: it keeps its address over restarts, and
    /// may have borrowed it.
    pub(super) fn find_and_assign(&mut self, wanted: AddressRequest, reply: AssignReply) {
        if wanted.usage != Use::Tunnel {
            return self.assign(wanted, reply);
        }
        let store = self.store.clone();
        self.spawn(async move {
            let found = commit::locate(&*store, wanted.handle()).await;
            Event::Found(wanted, reply, found)
        });
    }

    pub(super) fn finish_find(
        &mut self,
        wanted: AddressRequest,
        reply: AssignReply,
        found: Result<Vec<Stored<Block>>, StoreError>,
    ) {
        let blocks = match found {
            Ok(blocks) => blocks,
            Err(error) => {
                return drop(
                    reply.send(Err(NoAddress::Unavailable(format!("IPAM handle: {error}")))),
                );
            }
        };
        let foreign = blocks
            .iter()
            .filter(|block| block.value.node().is_some_and(|node| node != self.node));
        let with = foreign.filter(|block| !block.value.of_handle(wanted.handle()).is_empty());
        let with: Vec<IpNet> = with.map(|block| block.value.cidr()).collect();
        if !with.is_empty() {
            self.borrowed
                .entry(wanted.handle().to_owned())
                .or_default()
                .extend(with);
        }
        self.assign(wanted, reply);
    }

    /// Assigns, or queues the request. Nothing is written before every part of the request has a
    /// block with room, so that a pod without one of its addresses leaves nothing behind.
    pub(super) fn assign(&mut self, wanted: AddressRequest, reply: AssignReply) {
        if reply.is_closed() {
            return;
        }
        if !self.is_ready() || self.deletions.contains(wanted.handle()) {
            return self.waiting.push_back(Waiting::Request(wanted, reply));
        }
        if let Some(locked) = self.locked() {
            return drop(reply.send(Err(locked)));
        }
        if !wanted.exact.is_empty() {
            return self.assign_exact(wanted, reply);
        }
        let parts = self.parts(&wanted);
        if let Some(unknown) = parts.iter().find_map(|part| self.unknown_pool(part)) {
            return drop(reply.send(Err(unknown)));
        }
        if parts.is_empty() {
            return drop(reply.send(Err(claim::no_pool(
                None,
                &wanted.choice(Vec::new()),
                &self.pools(),
            ))));
        }
        if self.borrowed.contains_key(wanted.handle()) {
            return self.borrow(wanted, parts, reply, String::new());
        }
        let blocks: Vec<Option<IpNet>> = parts.iter().map(|part| self.block_for(part)).collect();
        let Some(blocks) = blocks.iter().copied().collect::<Option<Vec<IpNet>>>() else {
            let lacking = parts
                .into_iter()
                .zip(blocks)
                .filter(|(_, block)| block.is_none());
            let lacking: Vec<Part> = lacking.map(|(part, _)| part).collect();
            self.waiting.push_back(Waiting::Request(wanted, reply));
            return lacking
                .into_iter()
                .for_each(|part| self.claim(part.version, part.choice));
        };
        self.local.insert(wanted.handle().to_owned());
        self.assign_from(parts, blocks, Vec::new(), reply);
    }

    /// Assigns every part from its block; `had` are addresses that the request has already.
    pub(super) fn assign_from(
        &mut self,
        mut parts: Vec<Part>,
        blocks: Vec<IpNet>,
        had: Vec<IpNet>,
        reply: AssignReply,
    ) {
        if let Some(first) = parts.first_mut() {
            first.recorded.clone_from(&blocks);
        }
        let mut answers = Vec::new();
        for (part, block) in parts.into_iter().zip(blocks) {
            let (reply, answer) = oneshot::channel();
            answers.push(answer);
            self.enqueue(block, Operation::Assign(part, reply));
        }
        tokio::spawn(join(had, answers, reply));
    }

    fn assign_exact(&mut self, wanted: AddressRequest, reply: AssignReply) {
        let context = self.claim_context();
        let targets = match exact::targets(&wanted.exact, &wanted.choice(Vec::new()), &context) {
            Ok(targets) => targets,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.local.remove(wanted.handle());
        let refusal = |version| Some((version, self.claim_refusal(version)?));
        let bounds = exact::Bounds {
            context,
            constraints: Constraints {
                limits: self.limits(),
                shared: Default::default(),
                now: (self.clock)(),
            },
            no_claim: IpVersion::ALL.into_iter().filter_map(refusal).collect(),
        };
        let store = self.store.clone();
        self.spawn(async move {
            let taken = exact::assign(&*store, &bounds, wanted.attribute, &targets).await;
            Event::Exact(whole(targets.into_keys().collect()), reply, taken)
        });
    }

    /// Parts of the request: its demand of each IP version that has a pool, or of which the handle
    /// has an address already.
    pub(super) fn parts(&self, wanted: &AddressRequest) -> Vec<Part> {
        let handle = wanted.handle();
        let part = |(version, demand): (IpVersion, &Demand)| {
            let choice = wanted.choice(match demand {
                Demand::Always(pools) => pools.clone(),
                Demand::Never | Demand::IfPooled => Vec::new(),
            });
            let is_wanted = match demand {
                Demand::Never => false,
                Demand::Always(_) => true,
                Demand::IfPooled => self.has_pool(version, &choice) || self.has(version, handle),
            };
            is_wanted.then(|| Part {
                attribute: wanted.attribute.clone(),
                version,
                choice,
                recorded: Vec::new(),
            })
        };
        wanted.demands().into_iter().filter_map(part).collect()
    }

    /// Assigns a part whose block was full or lost, from another block.
    pub(super) fn assign_part(&mut self, mut part: Part, reply: AssignReply) {
        if reply.is_closed() {
            return;
        }
        match self.block_for(&part).filter(|_| self.is_ready()) {
            Some(block) => {
                part.recorded = vec![block];
                self.enqueue(block, Operation::Assign(part, reply));
            }
            None => {
                let (version, choice) = (part.version, part.choice.clone());
                self.waiting.push_back(Waiting::Part(part, reply));
                if self.is_ready() {
                    self.claim(version, choice);
                }
            }
        }
    }

    /// Error of a part that names a pool it cannot have, if so.
    fn unknown_pool(&self, part: &Part) -> Option<NoAddress> {
        let pools = self.pools();
        let refusal = |name: &String| {
            let named = |pool: &&crate::pools::NodePool| {
                IpVersion::of(pool.cidr.addr()) == part.version && pool.is_named(name)
            };
            let found = pools.iter().find(named);
            let why = found.map(|pool| pool.refusal(&part.choice));
            match why {
                Some(None) => None,
                why => Some(claim::unknown_pool(part.version, name, why.flatten())),
            }
        };
        part.choice.named.iter().find_map(refusal)
    }

    /// Block that has an address of the part already, else one with room.
    pub(super) fn block_for(&self, part: &Part) -> Option<IpNet> {
        let known = self.known();
        let has_room = |cidr: &&IpNet| {
            IpVersion::of(cidr.addr()) == part.version
                && self.allows(&part.choice, **cidr)
                && self.blocks[*cidr].room(&self.constraints(&known, **cidr)) > 0
        };
        self.holder(part.version, part.handle())
            .or_else(|| self.blocks.keys().find(has_room).copied())
    }

    fn holder(&self, version: IpVersion, handle: &str) -> Option<IpNet> {
        let mut of_version = self
            .blocks
            .iter()
            .filter(|(cidr, _)| IpVersion::of(cidr.addr()) == version);
        of_version
            .find(|(_, slot)| slot.holds(handle))
            .map(|(cidr, _)| *cidr)
    }

    fn has(&self, version: IpVersion, handle: &str) -> bool {
        let mut borrowed = self.borrowed.get(handle).into_iter().flatten();
        borrowed.any(|cidr| IpVersion::of(cidr.addr()) == version)
            || self.holder(version, handle).is_some()
    }

    /// Returns true when a pool of this IP version serves the choice.
    fn has_pool(&self, version: IpVersion, choice: &PoolChoice) -> bool {
        self.claim_context_with(KnownBlocks::default())
            .serving(version, choice)
            .next()
            .is_some()
    }

    /// Returns true when the choice may take an address of the block. A block without a pool, or of
    /// a closed one, serves nobody.
    pub(super) fn allows(&self, choice: &PoolChoice, block: IpNet) -> bool {
        self.pools()
            .iter()
            .any(|pool| pool.cidr.contains(&block) && pool.serves(choice))
    }

    /// Present state that a claim is based on.
    pub(super) fn claim_context(&self) -> ClaimContext {
        self.claim_context_with(self.known())
    }

    fn claim_context_with(&self, known: KnownBlocks) -> ClaimContext {
        ClaimContext {
            node: self.node.clone(),
            pools: self.pools(),
            known,
            now: (self.clock)(),
        }
    }
}

/// Replies with the addresses of `had` and of all parts, IPv4 first, or with the first error. The
/// caller then releases what other parts have claimed, with the handle.
async fn join(
    had: Vec<IpNet>,
    parts: Vec<oneshot::Receiver<Result<Vec<IpNet>, NoAddress>>>,
    reply: AssignReply,
) {
    let mut addresses = Ok(had);
    for part in parts {
        match (
            part.await.unwrap_or_else(|_| Err(NoAddress::stopping())),
            &mut addresses,
        ) {
            (Ok(more), Ok(addresses)) => addresses.extend(more),
            (Err(error), Ok(_)) => addresses = Err(error),
            (_, Err(_)) => {}
        }
    }
    let ordered = addresses.map(|mut addresses| {
        addresses.sort_by_key(|address| address.addr().is_ipv6());
        addresses
    });
    // The caller may have gone.
    let _ = reply.send(ordered);
}
