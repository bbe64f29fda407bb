//! Global records, which every node holds: settings, pools, nodes and routes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::{BgpAnnotations, BlockInfo, Encapsulation, NodeBgp, NodeInfo, Pool};
use margay_api::settings::FelixOverrides;

use crate::blocks::{BlockRefusal, Blocks, Excess};
use crate::claims::{self, Claims, RejectedClaim};
use crate::digest::{self, Buckets};
use crate::flush::Flush;
use crate::model::{PoolRecord, Record, RecordId, RouteRecord};
use crate::refcount::{Digested, change_for_all};
use crate::settings::EffectiveSettings;

/// Reason for a route; the smallest one wins, so a borrowed address takes precedence over its
/// block.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum RouteReason {
    Borrowed(IpNet),
    Block(IpNet),
}

/// Change of a node's accepted addresses and labels.
#[derive(Debug)]
pub(crate) struct NodeChange {
    pub(crate) name: String,
    pub(crate) before: Option<NodeInfo>,
    pub(crate) after: Option<NodeInfo>,
}

/// Effect of a pool or block.
#[derive(Debug, Default)]
pub(crate) struct BlockChange {
    /// Nodes whose accepted addresses changed.
    pub(crate) nodes: Vec<NodeChange>,
    /// Blocks that are accepted, changed or refused by it.
    pub(crate) ranges: Vec<IpNet>,
}

/// Objects that every node needs, and the records made of them.
#[derive(Debug)]
pub(crate) struct Globals {
    blocks: Blocks,
    /// Accepted blocks, which have routes.
    routed: BTreeMap<IpNet, BlockInfo>,
    /// As written.
    nodes: BTreeMap<String, NodeInfo>,
    claims: Claims,
    /// Without rejected addresses.
    accepted: BTreeMap<String, NodeInfo>,
    /// Per destination, the reasons for a route with the node of each.
    routes: BTreeMap<IpNet, BTreeMap<RouteReason, String>>,
    /// As of the last flush.
    held: BTreeMap<RecordId, Digested>,
    /// Sum of the digests in `held`, per bucket.
    buckets: Buckets,
    dirty: BTreeSet<RecordId>,
    settings: EffectiveSettings,
    /// BGP speakers of nodes.
    speakers: BTreeMap<String, NodeBgp>,
}

impl Default for Globals {
    fn default() -> Self {
        Self {
            blocks: Blocks::default(),
            routed: BTreeMap::new(),
            nodes: BTreeMap::new(),
            claims: Claims::default(),
            accepted: BTreeMap::new(),
            routes: BTreeMap::new(),
            held: BTreeMap::new(),
            buckets: [0; digest::BUCKETS],
            dirty: BTreeSet::new(),
            settings: EffectiveSettings::default(),
            speakers: BTreeMap::new(),
        }
    }
}

impl Globals {
    pub(crate) fn set_pool(&mut self, name: String, pool: Option<Pool>) -> BlockChange {
        let before = self.blocks.pools().get(&name);
        if before == pool.as_ref() {
            return BlockChange::default();
        }
        for pool in before.into_iter().chain(&pool) {
            self.dirty.insert(RecordId::Pool(pool.cidr.trunc()));
            let within = self.routes.keys().filter(|net| pool.cidr.contains(*net));
            self.dirty.extend(within.map(|net| RecordId::Route(*net)));
        }
        let touched = self.blocks.set_pool(name, pool);
        self.update_routes(touched)
    }

    pub(crate) fn set_node(&mut self, name: String, node: Option<NodeInfo>) -> Vec<NodeChange> {
        // Before the node is replaced: claims and settings need the former value.
        let touched = self.claims.set(&name, self.nodes.get(&name), node.as_ref());
        self.settings
            .update_node(self.nodes.get(&name), node.as_ref());
        match node {
            Some(node) => self.nodes.insert(name, node),
            None => self.nodes.remove(&name),
        };
        self.update_accepted(touched)
    }

    pub(crate) fn set_block(&mut self, net: IpNet, block: Option<BlockInfo>) -> BlockChange {
        let touched = self.blocks.set_block(net, block);
        self.update_routes(touched)
    }

    /// Updates the routes of blocks that may have been accepted or refused.
    fn update_routes(&mut self, blocks: BTreeSet<IpNet>) -> BlockChange {
        let (mut touched, mut ranges) = (BTreeSet::new(), Vec::new());
        for net in blocks {
            let block = self.blocks.get(&net);
            if self.routed.get(&net) != block.as_ref() {
                self.set_routes(net, block);
                touched.extend(self.claims.within(net).cloned());
                ranges.push(net);
            }
        }
        BlockChange {
            nodes: self.update_accepted(touched),
            ranges,
        }
    }

    /// Updates nodes whose claims may have been accepted or rejected. Returns those that changed.
    fn update_accepted(&mut self, nodes: BTreeSet<String>) -> Vec<NodeChange> {
        let mut changes = Vec::new();
        for name in nodes {
            let info = self.nodes.get(&name);
            let after = info.map(|info| self.claims.accepted(&name, info, &self.blocks));
            let before = match after.clone() {
                Some(after) => self.accepted.insert(name.clone(), after),
                None => self.accepted.remove(&name),
            };
            if before != after {
                self.dirty.insert(RecordId::Node(name.clone()));
                changes.push(NodeChange {
                    name,
                    before,
                    after,
                });
            }
        }
        changes
    }

    fn set_routes(&mut self, net: IpNet, block: Option<BlockInfo>) {
        for (destination, reason, _) in self
            .routed
            .remove(&net)
            .iter()
            .flat_map(|block| routes(net, block))
        {
            let reasons = self.routes.entry(destination).or_default();
            reasons.remove(&reason);
            if reasons.is_empty() {
                self.routes.remove(&destination);
            }
            self.dirty.insert(RecordId::Route(destination));
        }
        for (destination, reason, node) in block.iter().flat_map(|block| routes(net, block)) {
            self.routes
                .entry(destination)
                .or_default()
                .entry(reason)
                .or_insert(node);
            self.dirty.insert(RecordId::Route(destination));
        }
        self.routed.extend(block.map(|block| (net, block)));
    }

    /// Records if a namespace names pools for its pods.
    pub(crate) fn set_names_pools(&mut self, namespace: &str, names_pools: bool) {
        self.settings.set_names_pools(namespace, names_pools);
    }

    pub(crate) fn set_settings(&mut self, name: String, overrides: Option<FelixOverrides>) {
        self.settings.set(name, overrides);
    }

    /// Sets or removes the BGP speaker of a node.
    pub(crate) fn set_speaker(&mut self, node: String, speaker: Option<NodeBgp>) {
        match speaker {
            Some(speaker) => self.speakers.insert(node.clone(), speaker),
            None => self.speakers.remove(&node),
        };
        self.dirty.insert(RecordId::Node(node));
    }

    /// Pools by name.
    pub(crate) fn pools(&self) -> &BTreeMap<String, Pool> {
        self.blocks.pools()
    }

    /// Returns true if the block is accepted, so that nodes have a route to it.
    pub(crate) fn is_routed(&self, block: &IpNet) -> bool {
        self.routed.contains_key(block)
    }

    /// Adds what changed to the flush.
    pub(crate) fn flush(&mut self, flush: &mut Flush) {
        for id in std::mem::take(&mut self.dirty) {
            let record = self.compute(&id);
            let held = self.held.get(&id);
            if held.map(|held| &held.record) == record.as_ref() {
                continue;
            }
            let had = held.map(|held| held.digest);
            had.into_iter()
                .for_each(|digest| digest::subtract(&mut self.buckets, &id, digest));
            let has = record.map(|record| Digested {
                digest: digest::digest(&id, &record),
                record,
            });
            has.iter()
                .for_each(|held| digest::add(&mut self.buckets, &id, held.digest));
            flush
                .records
                .insert(id.clone(), change_for_all(had.is_some(), has.is_some()));
            match has {
                Some(has) => self.held.insert(id, has),
                None => self.held.remove(&id),
            };
        }
        flush.records.extend(
            self.settings
                .flush(&self.nodes)
                .map(|change| (RecordId::Settings, change)),
        );
    }

    /// Nodes by name, without rejected addresses.
    pub(crate) fn accepted_nodes(&self) -> &BTreeMap<String, NodeInfo> {
        &self.accepted
    }

    /// Returns true if an automatic host endpoint of the node may have the address: kubelet reports
    /// it for the node, or no block gives it to somebody else.
    pub(crate) fn may_have(&self, node: &str, address: IpAddr) -> bool {
        let is_reported = self.nodes.get(node).is_some_and(|info| {
            let (ipv4, ipv6) = (
                info.ipv4.map(|net| IpAddr::from(net.addr())),
                info.ipv6.map(|net| net.addr().into()),
            );
            ipv4 == Some(address) && info.standing.ipv4_reported
                || ipv6 == Some(address) && info.standing.ipv6_reported
        });
        is_reported || claims::may_have(&self.blocks, address, node)
    }

    /// Ids of the records except settings, as of the last flush.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &RecordId> {
        self.held.keys()
    }

    pub(crate) fn record(&self, id: &RecordId) -> Option<(&Record, u64)> {
        self.held.get(id).map(|held| (&held.record, held.digest))
    }

    /// Settings of a node, as of the last flush.
    pub(crate) fn settings(&self, node: &str) -> Option<(&Record, u64)> {
        self.settings
            .get(node)
            .map(|held| (&held.record, held.digest))
    }

    /// Digests of these records per bucket, without settings.
    pub(crate) fn buckets(&self) -> Buckets {
        self.buckets
    }

    /// Pools with the CIDR of another pool, which comes first by name; with that one.
    pub(crate) fn shadowed_pools(&self) -> impl Iterator<Item = (&String, &String)> {
        let pools = self.blocks.pools();
        pools.iter().filter_map(move |(name, pool)| {
            let (winner, _) = pools
                .iter()
                .find(|(_, other)| other.cidr.trunc() == pool.cidr.trunc())?;
            (winner != name).then_some((name, winner))
        })
    }

    /// Refused blocks, with the reason.
    pub(crate) fn refused_blocks(&self) -> impl Iterator<Item = (IpNet, &BlockInfo, BlockRefusal)> {
        self.blocks.refused()
    }

    /// Nodes that exceed their quota.
    pub(crate) fn excesses(&self) -> impl Iterator<Item = Excess> {
        self.blocks.excesses()
    }

    /// Addresses that nodes claim and do not have.
    pub(crate) fn rejected_claims(&self) -> impl Iterator<Item = (&String, RejectedClaim)> {
        self.nodes.iter().flat_map(move |(name, info)| {
            self.claims
                .rejected(name, info, &self.blocks)
                .into_iter()
                .map(move |rejected| (name, rejected))
        })
    }

    fn compute(&self, id: &RecordId) -> Option<Record> {
        match id {
            RecordId::Pool(net) => {
                let pool = self
                    .blocks
                    .pools()
                    .values()
                    .find(|pool| pool.cidr.trunc() == *net)?;
                Some(Record::Pool(PoolRecord {
                    nat_outgoing: pool.nat_outgoing,
                    encapsulation: pool.encapsulation,
                }))
            }
            RecordId::Node(name) => Some(Record::Node(NodeInfo {
                bgp: self.speakers.get(name).copied(),
                bgp_annotations: BgpAnnotations::default(),
                ..self.accepted.get(name)?.clone()
            })),
            RecordId::Route(net) => {
                let (_, node) = self.routes.get(net)?.first_key_value()?;
                Some(Record::Route(RouteRecord {
                    node: node.clone(),
                    encapsulation: self.encapsulation(net),
                }))
            }
            RecordId::Settings
            | RecordId::IpSet(_)
            | RecordId::Policy(_)
            | RecordId::Endpoint(_)
            | RecordId::HostEndpoint(_)
            | RecordId::Bgp => None,
        }
    }

    /// Encapsulation of the smallest pool around the destination; among equal ones the first by
    /// name.
    fn encapsulation(&self, net: &IpNet) -> Encapsulation {
        let covering = self
            .blocks
            .pools()
            .values()
            .rev()
            .filter(|pool| pool.cidr.contains(net));
        let smallest = covering.max_by_key(|pool| pool.cidr.prefix_len());
        smallest.map_or(Encapsulation::None, |pool| pool.encapsulation)
    }
}

/// Routes of a block: the block itself, and addresses that other nodes borrow from it.
fn routes(net: IpNet, block: &BlockInfo) -> impl Iterator<Item = (IpNet, RouteReason, String)> {
    let own = block
        .node
        .clone()
        .map(|node| (net.trunc(), RouteReason::Block(net), node));
    let borrowed = block.borrowed.iter().map(move |(address, node)| {
        (
            IpNet::from(*address),
            RouteReason::Borrowed(net),
            node.clone(),
        )
    });
    own.into_iter().chain(borrowed)
}
