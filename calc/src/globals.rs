//! Records that every node holds: settings, pools, nodes and routes.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use margay_api::network::{BlockInfo, Encapsulation, NodeInfo, Pool};
use margay_api::settings::FelixOverrides;

use crate::blocks::{Blocks, Excess, Refused};
use crate::claims::{Claims, Denied};
use crate::digest::{self, Buckets};
use crate::flush::{Audience, Change, Flush, NodeSet, RecordChange};
use crate::model::{PoolRecord, Record, RecordId, RouteRecord};
use crate::settings::Settings;

/// Why there is a route; the smallest reason wins. A borrowed address is known better than the block around it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    Borrowed(IpNet),
    Block(IpNet),
}

/// A record and its digest.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) record: Record,
    pub(crate) digest: u64,
}

/// A node as it was believed and as it is, where these differ.
pub(crate) type Belief = (Option<NodeInfo>, Option<NodeInfo>);

/// Objects that every node has to know, and the records made of them.
#[derive(Debug)]
pub(crate) struct Globals {
    blocks: Blocks,
    /// Blocks that count, and so have routes.
    routed: BTreeMap<IpNet, BlockInfo>,
    /// As they are written.
    nodes: BTreeMap<String, NodeInfo>,
    claims: Claims,
    /// Without the addresses that they are not believed to have.
    believed: BTreeMap<String, NodeInfo>,
    /// Per destination, the nodes that hold it and why.
    routes: BTreeMap<IpNet, BTreeMap<Reason, String>>,
    /// As of the last flush.
    held: BTreeMap<RecordId, Held>,
    /// Sum of what is in `held`.
    buckets: Buckets,
    dirty: BTreeSet<RecordId>,
    settings: Settings,
}

impl Default for Globals {
    fn default() -> Self {
        Self {
            blocks: Blocks::default(),
            routed: BTreeMap::new(),
            nodes: BTreeMap::new(),
            claims: Claims::default(),
            believed: BTreeMap::new(),
            routes: BTreeMap::new(),
            held: BTreeMap::new(),
            buckets: [0; digest::BUCKETS],
            dirty: BTreeSet::new(),
            settings: Settings::default(),
        }
    }
}

impl Globals {
    pub(crate) fn set_pool(&mut self, name: String, pool: Option<Pool>) -> Vec<Belief> {
        let before = self.blocks.pools().get(&name);
        if before == pool.as_ref() {
            return Vec::new();
        }
        for pool in before.into_iter().chain(&pool) {
            self.dirty.insert(RecordId::Pool(pool.cidr.trunc()));
            let within = self.routes.keys().filter(|net| pool.cidr.contains(*net));
            self.dirty.extend(within.map(|net| RecordId::Route(*net)));
        }
        let touched = self.blocks.set_pool(name, pool);
        self.route(touched)
    }

    pub(crate) fn set_node(&mut self, name: String, node: Option<NodeInfo>) -> Vec<Belief> {
        let touched = self.claims.set(&name, self.nodes.get(&name), node.as_ref());
        self.settings.touch_node(self.nodes.get(&name), node.as_ref());
        match node {
            Some(node) => self.nodes.insert(name, node),
            None => self.nodes.remove(&name),
        };
        self.believe(touched)
    }

    pub(crate) fn set_block(&mut self, net: IpNet, block: Option<BlockInfo>) -> Vec<Belief> {
        let touched = self.blocks.set_block(net, block);
        self.route(touched)
    }

    /// These blocks may count now, or no longer.
    fn route(&mut self, blocks: BTreeSet<IpNet>) -> Vec<Belief> {
        let mut touched = BTreeSet::new();
        for net in blocks {
            let block = self.blocks.get(&net);
            if self.routed.get(&net) != block.as_ref() {
                self.set_routes(net, block);
                touched.extend(self.claims.within(net).cloned());
            }
        }
        self.believe(touched)
    }

    /// These nodes may be believed something else. Answers with what changed by that.
    fn believe(&mut self, nodes: BTreeSet<String>) -> Vec<Belief> {
        let mut changes = Vec::new();
        for name in nodes {
            let info = self.nodes.get(&name);
            let after = info.map(|info| self.claims.believed(&name, info, &self.blocks));
            let before = match after.clone() {
                Some(after) => self.believed.insert(name.clone(), after),
                None => self.believed.remove(&name),
            };
            if before != after {
                self.dirty.insert(RecordId::Node(name));
                changes.push((before, after));
            }
        }
        changes
    }

    fn set_routes(&mut self, net: IpNet, block: Option<BlockInfo>) {
        for (destination, reason, _) in self.routed.remove(&net).iter().flat_map(|block| routes(net, block)) {
            let reasons = self.routes.entry(destination).or_default();
            reasons.remove(&reason);
            if reasons.is_empty() {
                self.routes.remove(&destination);
            }
            self.dirty.insert(RecordId::Route(destination));
        }
        for (destination, reason, node) in block.iter().flat_map(|block| routes(net, block)) {
            self.routes.entry(destination).or_default().entry(reason).or_insert(node);
            self.dirty.insert(RecordId::Route(destination));
        }
        self.routed.extend(block.map(|block| (net, block)));
    }

    pub(crate) fn set_settings(&mut self, name: String, overrides: Option<FelixOverrides>) {
        self.settings.set(name, overrides);
    }

    /// Puts what changed into the flush.
    pub(crate) fn flush(&mut self, flush: &mut Flush) {
        for id in std::mem::take(&mut self.dirty) {
            let record = self.compute(&id);
            let held = self.held.get(&id);
            if held.map(|held| &held.record) == record.as_ref() {
                continue;
            }
            let had = held.map(|held| held.digest);
            had.into_iter().for_each(|digest| digest::subtract(&mut self.buckets, &id, digest));
            let has = record.map(|record| Held { digest: digest::digest(&id, &record), record });
            has.iter().for_each(|held| digest::add(&mut self.buckets, &id, held.digest));
            flush.records.insert(id.clone(), for_all(had.is_some(), has.is_some()));
            match has {
                Some(has) => self.held.insert(id, has),
                None => self.held.remove(&id),
            };
        }
        flush.records.extend(self.settings.flush(&self.nodes).map(|change| (RecordId::Settings, change)));
    }

    /// The nodes by name, without the addresses that they are not believed to have.
    pub(crate) fn nodes(&self) -> &BTreeMap<String, NodeInfo> {
        &self.believed
    }

    /// The records but for the settings, as of the last flush.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &RecordId> {
        self.held.keys()
    }

    pub(crate) fn record(&self, id: &RecordId) -> Option<(&Record, u64)> {
        self.held.get(id).map(|held| (&held.record, held.digest))
    }

    /// The settings of a node, as of the last flush.
    pub(crate) fn settings(&self, node: &str) -> Option<(&Record, u64)> {
        self.settings.held(node).map(|held| (&held.record, held.digest))
    }

    /// Sums of the digests of these records, without settings.
    pub(crate) fn buckets(&self) -> Buckets {
        self.buckets
    }

    /// Pools whose range another pool has too, which wins by its name; with the other.
    pub(crate) fn shadowed_pools(&self) -> impl Iterator<Item = (&String, &String)> {
        let pools = self.blocks.pools();
        pools.iter().filter_map(move |(name, pool)| {
            let (winner, _) = pools.iter().find(|(_, other)| other.cidr.trunc() == pool.cidr.trunc())?;
            (winner != name).then_some((name, winner))
        })
    }

    /// Blocks that do not count, with why.
    pub(crate) fn refused_blocks(&self) -> impl Iterator<Item = (IpNet, &BlockInfo, Refused)> {
        self.blocks.refused()
    }

    /// Nodes that have more than counts.
    pub(crate) fn excesses(&self) -> impl Iterator<Item = Excess> {
        self.blocks.excesses()
    }

    /// Addresses that nodes say to have and are not believed to.
    pub(crate) fn denied_addresses(&self) -> impl Iterator<Item = (&String, Denied)> {
        self.nodes.iter().flat_map(move |(name, info)| {
            self.claims.denied(name, info, &self.blocks).into_iter().map(move |denied| (name, denied))
        })
    }

    fn compute(&self, id: &RecordId) -> Option<Record> {
        match id {
            RecordId::Pool(net) => {
                let pool = self.blocks.pools().values().find(|pool| pool.cidr.trunc() == *net)?;
                Some(Record::Pool(PoolRecord { nat_outgoing: pool.nat_outgoing, encapsulation: pool.encapsulation }))
            }
            RecordId::Node(name) => Some(Record::Node(self.believed.get(name)?.clone())),
            RecordId::Route(net) => {
                let (_, node) = self.routes.get(net)?.first_key_value()?;
                Some(Record::Route(RouteRecord { node: node.clone(), encapsulation: self.encapsulation(net) }))
            }
            RecordId::Settings
            | RecordId::IpSet(_)
            | RecordId::Policy(_)
            | RecordId::Endpoint(_)
            | RecordId::HostEndpoint(_) => None,
        }
    }

    /// By the smallest pool around the destination; among equal ones the first by name.
    fn encapsulation(&self, net: &IpNet) -> Encapsulation {
        let covering = self.blocks.pools().values().rev().filter(|pool| pool.cidr.contains(net));
        let smallest = covering.max_by_key(|pool| pool.cidr.prefix_len());
        smallest.map_or(Encapsulation::None, |pool| pool.encapsulation)
    }
}

/// The routes of a block: itself, and what others borrow from it.
fn routes(net: IpNet, block: &BlockInfo) -> impl Iterator<Item = (IpNet, Reason, String)> {
    let own = block.node.clone().map(|node| (net.trunc(), Reason::Block(net), node));
    let borrowed =
        block.borrowed.iter().map(move |(address, node)| (IpNet::from(*address), Reason::Borrowed(net), node.clone()));
    own.into_iter().chain(borrowed)
}

pub(crate) fn for_all(had: bool, has: bool) -> RecordChange {
    let all = |is: bool| if is { Audience::All } else { nobody() };
    RecordChange {
        gained: all(!had && has),
        kept: all(had && has),
        change: if had && has { Change::Value } else { Change::Same },
        lost: all(had && !has),
    }
}

pub(crate) fn nobody() -> Audience {
    Audience::Nodes(NodeSet::new())
}
