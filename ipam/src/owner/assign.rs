//! Assigning: out of a block of this node that has the handle or has room, or else what a claim or a loan brings.

use ipnet::IpNet;
use margay_api::rule::IpVersion;
use tokio::sync::oneshot;

use super::Owner;
use crate::allocator::{AssignReply, Event, Part, Waiting, join, whole};
use crate::claim::{self, Ground};
use crate::commit::{self, Operation};
use crate::exact;
use crate::known::{Blocks, Heed};
use crate::node_objects::Stored;
use crate::pools::{Choice, Use};
use crate::request::{AddressRequest, Demand, NoAddress};
use crate::store::{Store, StoreError};
use margay_api::ipam::block::Block;

impl<S: Store> Owner<S> {
    /// A tunnel keeps its address over restarts, so its handle is looked for first: it may have been borrowed.
    pub(super) fn seek(&mut self, wanted: AddressRequest, reply: AssignReply) {
        if wanted.usage != Use::Tunnel {
            return self.assign(wanted, reply);
        }
        let store = self.store.clone();
        self.background(async move {
            let found = commit::locate(&*store, wanted.handle()).await;
            Event::Sought(wanted, reply, found)
        });
    }

    pub(super) fn sought(
        &mut self,
        wanted: AddressRequest,
        reply: AssignReply,
        found: Result<Vec<Stored<Block>>, StoreError>,
    ) {
        let blocks = match found {
            Ok(blocks) => blocks,
            Err(error) => return drop(reply.send(Err(NoAddress::Unavailable(format!("IPAM handle: {error}"))))),
        };
        let foreign = blocks.iter().filter(|block| block.value.node().is_some_and(|node| node != self.node));
        let with = foreign.filter(|block| !block.value.of_handle(wanted.handle()).is_empty());
        let with: Vec<IpNet> = with.map(|block| block.value.cidr()).collect();
        if !with.is_empty() {
            self.borrowed.entry(wanted.handle().to_owned()).or_default().extend(with);
        }
        self.assign(wanted, reply);
    }

    /// Nothing is written before every part of the request has a block with room.
    pub(super) fn assign(&mut self, wanted: AddressRequest, reply: AssignReply) {
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
        let parts = self.parts(&wanted);
        if let Some(unknown) = parts.iter().find_map(|part| self.unknown_pool(part)) {
            return drop(reply.send(Err(unknown)));
        }
        if parts.is_empty() {
            return drop(reply.send(Err(claim::no_pool(None, &wanted.choice(Vec::new()), &self.pools()))));
        }
        if self.borrowed.contains_key(wanted.handle()) {
            return self.borrow(wanted, parts, reply, String::new());
        }
        let blocks: Vec<Option<IpNet>> = parts.iter().map(|part| self.block_for(part)).collect();
        let Some(blocks) = blocks.iter().copied().collect::<Option<Vec<IpNet>>>() else {
            let lacking = parts.into_iter().zip(blocks).filter(|(_, block)| block.is_none());
            let lacking: Vec<Part> = lacking.map(|(part, _)| part).collect();
            self.waiting.push_back(Waiting::Request(wanted, reply));
            return lacking.into_iter().for_each(|part| self.claim(part.version, part.choice));
        };
        self.local.insert(wanted.handle().to_owned());
        self.assign_from(parts, blocks, Vec::new(), reply);
    }

    /// Every part out of its block, beside what is there already.
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
            let (told, answer) = oneshot::channel();
            answers.push(answer);
            self.enqueue(block, Operation::Assign(part, told));
        }
        tokio::spawn(join(had, answers, reply));
    }

    fn assign_exact(&mut self, wanted: AddressRequest, reply: AssignReply) {
        let ground = self.ground();
        let targets = match exact::targets(&wanted.exact, &wanted.choice(Vec::new()), &ground) {
            Ok(targets) => targets,
            Err(error) => return drop(reply.send(Err(error))),
        };
        self.local.remove(wanted.handle());
        let refusal = |version| Some((version, self.claim_refusal(version)?));
        let bounds = exact::Bounds {
            ground,
            heed: Heed { limits: self.limits(), shared: Default::default(), now: (self.clock)() },
            no_claim: IpVersion::ALL.into_iter().filter_map(refusal).collect(),
        };
        let store = self.store.clone();
        self.background(async move {
            let taken = exact::assign(&*store, &bounds, wanted.attribute, &targets).await;
            Event::Exact(whole(targets.into_keys().collect()), reply, taken)
        });
    }

    /// What the request comes to: what it demands of each IP version, and what it has already.
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
            is_wanted.then(|| Part { attribute: wanted.attribute.clone(), version, choice, recorded: Vec::new() })
        };
        wanted.demands().into_iter().filter_map(part).collect()
    }

    /// A part that lost its block.
    pub(super) fn assign_part(&mut self, mut part: Part, reply: AssignReply) {
        if reply.is_closed() {
            return;
        }
        match self.block_for(&part).filter(|_| self.is_oriented()) {
            Some(block) => {
                part.recorded = vec![block];
                self.enqueue(block, Operation::Assign(part, reply));
            }
            None => {
                let (version, choice) = (part.version, part.choice.clone());
                self.waiting.push_back(Waiting::Part(part, reply));
                if self.is_oriented() {
                    self.claim(version, choice);
                }
            }
        }
    }

    /// A pool that the part names, and that it cannot have.
    fn unknown_pool(&self, part: &Part) -> Option<NoAddress> {
        let pools = self.pools();
        let refusal = |name: &String| {
            let named =
                |pool: &&crate::pools::NodePool| IpVersion::of(pool.cidr.addr()) == part.version && pool.is_named(name);
            let found = pools.iter().find(named);
            let why = found.map(|pool| pool.refusal(&part.choice));
            match why {
                Some(None) => None,
                why => Some(claim::unknown_pool(part.version, name, why.flatten())),
            }
        };
        part.choice.named.iter().find_map(refusal)
    }

    /// The block that has the part already, or one with room.
    pub(super) fn block_for(&self, part: &Part) -> Option<IpNet> {
        let known = self.known();
        let has_room = |cidr: &&IpNet| {
            IpVersion::of(cidr.addr()) == part.version
                && self.allows(&part.choice, **cidr)
                && self.blocks[*cidr].room(&self.heed(&known, **cidr)) > 0
        };
        self.holder(part.version, part.handle()).or_else(|| self.blocks.keys().find(has_room).copied())
    }

    fn holder(&self, version: IpVersion, handle: &str) -> Option<IpNet> {
        let mut of_version = self.blocks.iter().filter(|(cidr, _)| IpVersion::of(cidr.addr()) == version);
        of_version.find(|(_, slot)| slot.holds(handle)).map(|(cidr, _)| *cidr)
    }

    fn has(&self, version: IpVersion, handle: &str) -> bool {
        let mut borrowed = self.borrowed.get(handle).into_iter().flatten();
        borrowed.any(|cidr| IpVersion::of(cidr.addr()) == version) || self.holder(version, handle).is_some()
    }

    /// Whether there is a pool of this IP version for the choice.
    fn has_pool(&self, version: IpVersion, choice: &Choice) -> bool {
        self.ground_with(Blocks::default()).serving(version, choice).next().is_some()
    }

    /// Whether a request may take an address of the block. A block whose pool is gone or closed serves nobody.
    pub(super) fn allows(&self, choice: &Choice, block: IpNet) -> bool {
        self.pools().iter().any(|pool| pool.cidr.contains(&block) && pool.serves(choice))
    }

    /// What a claim stands on now.
    pub(super) fn ground(&self) -> Ground {
        self.ground_with(self.known())
    }

    fn ground_with(&self, known: Blocks) -> Ground {
        Ground { node: self.node.clone(), pools: self.pools(), known, now: (self.clock)() }
    }
}
