//! Records of the speakers: which nodes need theirs computed anew, and what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::bgp::{BgpFilter, BgpSettings};
use margay_api::endpoint::ServiceAddresses;
use margay_api::meta::NamespacedName;
use margay_api::network::{NodeBgp, NodeInfo, Pool};

use super::announcements::{Affected, Announcements};
use super::peers::{Cluster, LocalPeers, ResolvedPeers, StoredPeer};
use super::settings::AllSettings;
use crate::conflict::Conflict;
use crate::digest;
use crate::flush::{Audience, Change, NodeSet, RecordChange};
use crate::model::{BgpRecord, Record, RecordId};
use crate::refcount::Digested;
use crate::update::Backend;

/// What of the rest of the graph the records depend on.
pub(crate) struct Around<'a> {
    /// Nodes by name, without rejected addresses.
    pub(crate) nodes: &'a BTreeMap<String, NodeInfo>,
    /// Pools by name.
    pub(crate) pools: &'a BTreeMap<String, Pool>,
    /// Returns true if other nodes have a route to the block.
    pub(crate) is_routed: &'a dyn Fn(&IpNet) -> bool,
    /// Addresses of the node's workloads that the selector matches.
    pub(crate) workloads: &'a dyn Fn(&str, u32) -> BTreeSet<IpAddr>,
}

/// Speakers whose changes were flushed, and how others see them now.
pub(crate) type SpeakerChanges = Vec<(String, Option<NodeBgp>)>;

/// Objects of BGP, and the record of each node's speaker.
#[derive(Debug, Default)]
pub(crate) struct Speakers {
    is_on: bool,
    settings: AllSettings,
    peers: BTreeMap<String, StoredPeer>,
    filters: BTreeMap<String, BgpFilter>,
    announcements: Announcements,
    /// Nodes that blocks are affine to.
    owners: BTreeMap<IpNet, String>,
    blocks: BTreeMap<String, BTreeSet<IpNet>>,
    /// As of the last flush.
    resolved: ResolvedPeers,
    speakers: BTreeMap<String, NodeBgp>,
    held: BTreeMap<String, Digested>,
    dirty: Dirty,
}

/// Nodes whose records may have changed.
#[derive(Debug, Default)]
struct Dirty {
    all: bool,
    nodes: BTreeSet<String>,
}

impl Speakers {
    /// Turns BGP on or off for the cluster.
    pub(crate) fn set_on(&mut self, is_on: bool) {
        self.dirty.all |= self.is_on != is_on;
        self.is_on = is_on;
    }

    pub(crate) fn set_settings(&mut self, name: String, settings: Option<BgpSettings>) {
        self.dirty.all |= self.settings.set(name, settings);
    }

    pub(crate) fn set_filter(&mut self, name: String, filter: Option<BgpFilter>) {
        if self.filters.get(&name) == filter.as_ref() {
            return;
        }
        match filter {
            Some(filter) => self.filters.insert(name, filter),
            None => self.filters.remove(&name),
        };
        self.dirty.all |= !self.peers.is_empty();
    }

    /// Sets or removes a peer. Returns the former one.
    pub(crate) fn set_peer(
        &mut self,
        name: String,
        peer: Option<StoredPeer>,
    ) -> Option<StoredPeer> {
        self.dirty.all = true;
        match peer {
            Some(peer) => self.peers.insert(name, peer),
            None => self.peers.remove(&name),
        }
    }

    /// Returns true if workloads are peers.
    pub(crate) fn has_local_peers(&self) -> bool {
        self.peers.values().any(|stored| stored.workloads.is_some())
    }

    /// Sets or removes the addresses of a Service.
    pub(crate) fn set_service(
        &mut self,
        name: &NamespacedName,
        addresses: Option<ServiceAddresses>,
    ) {
        let affected = self.announcements.set_service(name, addresses);
        self.mark_announcers(affected);
    }

    /// Sets the backends of a Service. Without BGP they are not kept: a cluster has many.
    pub(crate) fn set_backends(&mut self, name: &NamespacedName, backends: &[Backend]) {
        if self.is_on {
            let affected = self.announcements.set_backends(name, backends);
            self.mark_announcers(affected);
        }
    }

    /// Marks the nodes that announce a changed Service.
    fn mark_announcers(&mut self, affected: Affected) {
        if self.settings.announces_services() {
            self.dirty.nodes.extend(affected.nodes);
            self.dirty.all |= affected.is_wide && self.settings.announces_single_addresses();
        }
    }

    /// Sets the node that a block is affine to.
    pub(crate) fn set_block(&mut self, range: IpNet, owner: Option<&str>) {
        if let Some(former) = self.owners.remove(&range) {
            if let Some(blocks) = self.blocks.get_mut(&former) {
                blocks.remove(&range);
                if blocks.is_empty() {
                    self.blocks.remove(&former);
                }
            }
            self.dirty.nodes.insert(former);
        }
        if let Some(owner) = owner {
            self.owners.insert(range, owner.to_owned());
            let blocks = self.blocks.entry(owner.to_owned()).or_default();
            blocks.insert(range);
            self.dirty.nodes.insert(owner.to_owned());
        }
    }

    /// Marks the owners of blocks that have been accepted or refused.
    pub(crate) fn mark_blocks(&mut self, ranges: &[IpNet]) {
        let owners = ranges.iter().filter_map(|range| self.owners.get(range));
        self.dirty.nodes.extend(owners.cloned());
    }

    /// Marks a node whose addresses, labels or annotations changed: other nodes may have it for a
    /// peer.
    pub(crate) fn mark_node(&mut self, name: &str) {
        if self.peers.is_empty() {
            self.dirty.nodes.insert(name.to_owned());
        } else {
            self.dirty.all = true;
        }
    }

    /// Marks a node of which a workload that may be a peer changed.
    pub(crate) fn mark_workload(&mut self, node: &str) {
        self.dirty.nodes.insert(node.to_owned());
    }

    /// Marks all nodes: a pool changed.
    pub(crate) fn mark_all(&mut self) {
        self.dirty.all = true;
    }

    /// Record of a node, as of the last flush.
    pub(crate) fn get(&self, node: &str) -> Option<&Digested> {
        self.held.get(node)
    }

    /// Nodes with a record, as of the last flush, ascending.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &String> {
        self.held.keys()
    }

    /// BGPPeers that have no effect as written.
    pub(crate) fn conflicts<'a>(
        &'a self,
        nodes: &'a BTreeMap<String, NodeInfo>,
    ) -> Box<dyn Iterator<Item = Conflict> + 'a> {
        if self.is_on {
            Box::new(self.resolved.conflicts(self.cluster(nodes)))
        } else {
            let peers = self.peers.keys();
            Box::new(peers.map(|peer| Conflict::BgpDisabled { peer: peer.clone() }))
        }
    }

    /// Computes what is dirty. Returns the change since the last flush, and the speakers that
    /// others see differently.
    pub(crate) fn flush(&mut self, around: &Around<'_>) -> (Option<RecordChange>, SpeakerChanges) {
        let Dirty { all, nodes } = std::mem::take(&mut self.dirty);
        let names: BTreeSet<String> = match all {
            true => around
                .nodes
                .keys()
                .chain(self.held.keys())
                .cloned()
                .collect(),
            false => nodes,
        };
        let changes = self.update_speakers(&names, around);
        if all && self.is_on {
            self.resolved = ResolvedPeers::new(&self.peers, self.cluster(around.nodes));
        }
        let mut change = NodeChanges::default();
        for name in names {
            let record = self.record(&name, around);
            let held = self.held.get(&name);
            let now = record.map(|record| {
                let record = Record::Bgp(Box::new(record));
                let digest = digest::digest(&RecordId::Bgp, &record);
                Digested { record, digest }
            });
            change.add(&name, held, now.as_ref());
            match now {
                Some(now) => self.held.insert(name, now),
                None => self.held.remove(&name),
            };
        }
        (change.finish(), changes)
    }

    fn cluster<'a>(&'a self, nodes: &'a BTreeMap<String, NodeInfo>) -> Cluster<'a> {
        Cluster {
            nodes,
            speakers: &self.speakers,
            filters: &self.filters,
        }
    }

    fn update_speakers(&mut self, names: &BTreeSet<String>, around: &Around<'_>) -> SpeakerChanges {
        let mut changes = Vec::new();
        for name in names {
            let speaker = around
                .nodes
                .get(name)
                .filter(|node| self.is_on && (node.ipv4.is_some() || node.ipv6.is_some()))
                .map(|node| self.settings.of(name).node_bgp(node));
            if self.speakers.get(name) != speaker.as_ref() {
                match speaker {
                    Some(speaker) => self.speakers.insert(name.clone(), speaker),
                    None => self.speakers.remove(name),
                };
                changes.push((name.clone(), speaker));
            }
        }
        changes
    }

    fn record(&self, name: &str, around: &Around<'_>) -> Option<BgpRecord> {
        let (node, speaker) = (around.nodes.get(name)?, *self.speakers.get(name)?);
        let settings = self.settings.of(name);
        let written = settings.written();
        let mut pools = BTreeMap::new();
        for pool in around.pools.values() {
            // Of pools with one range the first by name has effect.
            pools.entry(pool.cidr.trunc()).or_insert(pool.is_exported);
        }
        let blocks = self.blocks.get(name).into_iter().flatten();
        let blocks = blocks.map(|range| (range.trunc(), (around.is_routed)(range)));
        let workloads: LocalPeers = self
            .peers
            .iter()
            .filter_map(|(peer, stored)| {
                let selected = (around.workloads)(name, stored.workloads?);
                Some((peer.clone(), selected))
            })
            .collect();
        let peers = self.resolved.of(
            name,
            speaker,
            written.local_workload_addresses,
            &workloads,
            self.cluster(around.nodes),
        );
        Some(BgpRecord {
            asn: speaker.asn,
            router_id: super::router_id(name, node),
            cluster_id: speaker.cluster_id,
            listen_port: speaker.listen_port,
            binds_node_address: written.binds_node_address.unwrap_or(false),
            ignored_interfaces: written.ignored_interfaces.clone(),
            priorities: settings.priorities(),
            mesh: settings.mesh().filter(|_| speaker.cluster_id.is_none()),
            blocks: blocks.collect(),
            pools,
            services: self.announcements.of(name, &node.labels, &settings),
            service_ranges: settings.service_ranges().copied().collect(),
            communities: written.communities.clone(),
            peers,
        })
    }
}

/// Nodes whose record came, changed or went.
#[derive(Debug, Default)]
struct NodeChanges {
    gained: Vec<String>,
    kept: Vec<String>,
    lost: Vec<String>,
}

impl NodeChanges {
    fn add(&mut self, node: &str, before: Option<&Digested>, now: Option<&Digested>) {
        let list = match (before, now) {
            (None, Some(_)) => &mut self.gained,
            (Some(_), None) => &mut self.lost,
            (Some(before), Some(now)) if before.digest != now.digest => &mut self.kept,
            _ => return,
        };
        list.push(node.to_owned());
    }

    fn finish(self) -> Option<RecordChange> {
        let Self { gained, kept, lost } = self;
        if gained.is_empty() && kept.is_empty() && lost.is_empty() {
            return None;
        }
        let audience = |nodes: Vec<String>| Audience::Nodes(nodes.into_iter().collect::<NodeSet>());
        Some(RecordChange {
            change: match kept.is_empty() {
                true => Change::Same,
                false => Change::Value,
            },
            gained: audience(gained),
            kept: audience(kept),
            lost: audience(lost),
        })
    }
}
