//! Peers of each node from BGPPeers: which nodes have which, and what a session is like.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use margay_api::bgp::{BgpFilter, BgpPeer, Filters, NodePeers, PeerTarget};
use margay_api::network::{NodeBgp, NodeInfo};

use super::common_addresses;
use crate::conflict::Conflict;
use crate::model::BgpPeerRecord;

/// Port of a peer that is no node, if none is given (RFC 4271).
const DEFAULT_PORT: u16 = 179;

/// A BGPPeer.
#[derive(Debug)]
pub(crate) struct StoredPeer {
    pub(crate) peer: BgpPeer,
    /// Handle of the selector of local workloads.
    pub(crate) workloads: Option<u32>,
}

/// Addresses of a node's workloads that a BGPPeer selects, by the peer's name.
pub(crate) type LocalPeers = BTreeMap<String, BTreeSet<IpAddr>>;

/// Nodes of the cluster and their speakers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cluster<'a> {
    pub(super) nodes: &'a BTreeMap<String, NodeInfo>,
    pub(super) speakers: &'a BTreeMap<String, NodeBgp>,
    pub(super) filters: &'a BTreeMap<String, BgpFilter>,
}

impl<'a> Cluster<'a> {
    /// Speaker of the node with that address.
    fn speaker_at(&self, address: IpAddr, by_address: &ByAddress) -> Option<&'a NodeBgp> {
        self.speakers.get(by_address.get(&address)?)
    }
}

type ByAddress = BTreeMap<IpAddr, String>;

/// BGPPeers with the nodes that they are about, in order of precedence: of peers with one address
/// the first has effect.
#[derive(Debug, Default)]
pub(super) struct ResolvedPeers {
    peers: Vec<ResolvedPeer>,
    /// Nodes by their addresses.
    by_address: ByAddress,
}

#[derive(Debug)]
struct ResolvedPeer {
    name: String,
    peer: BgpPeer,
    import: Filters,
    export: Filters,
    /// Nodes that have the peer.
    from: BTreeSet<String>,
    /// Nodes that are the peers, and have the session too if it is reversed.
    to: BTreeSet<String>,
}

impl ResolvedPeers {
    pub(super) fn new(peers: &BTreeMap<String, StoredPeer>, cluster: Cluster<'_>) -> Self {
        let addresses = cluster.nodes.iter().flat_map(|(name, node)| {
            let addresses = super::addresses(node).into_iter().flatten();
            addresses.map(move |address| (address, name.clone()))
        });
        let by_address: ByAddress = addresses.collect();
        let mut resolved: Vec<ResolvedPeer> = peers
            .iter()
            .map(|(name, stored)| ResolvedPeer::new(name, &stored.peer, cluster, &by_address))
            .collect();
        // As with Calico those of all nodes come first. Stable: the order of names within.
        resolved.sort_by_key(|each| match each.peer.nodes {
            NodePeers::All => 0,
            NodePeers::Node(_) => 1,
            NodePeers::Selected(_) => 2,
        });
        Self {
            peers: resolved,
            by_address,
        }
    }

    /// Peers of a node, at most one per address, in the order of addresses.
    pub(super) fn of(
        &self,
        name: &str,
        own: NodeBgp,
        local_addresses: [Option<IpAddr>; 2],
        workloads: &LocalPeers,
        cluster: Cluster<'_>,
    ) -> Vec<BgpPeerRecord> {
        let Some(node) = cluster.nodes.get(name) else {
            return Vec::new();
        };
        let mut chosen: BTreeMap<IpAddr, BgpPeerRecord> = BTreeMap::new();
        let mut add = |record: BgpPeerRecord| {
            chosen.entry(record.address.ip()).or_insert(record);
        };
        let has_peer = |each: &&ResolvedPeer| each.from.contains(name);
        for each in self.peers.iter().filter(has_peer) {
            match &each.peer.target {
                PeerTarget::Address(address) => {
                    let of_node = cluster.speaker_at(address.ip(), &self.by_address);
                    each.external(*address, node, own, of_node)
                        .into_iter()
                        .for_each(&mut add);
                }
                PeerTarget::Nodes(_) => each.nodes(name, node, own, cluster, &mut add),
                PeerTarget::LocalWorkloads(_) => {
                    for address in workloads.get(&each.name).into_iter().flatten() {
                        let source = local_addresses[usize::from(address.is_ipv6())];
                        add(each.workload(*address, source, own));
                    }
                }
            }
        }
        let is_reversed = |each: &&ResolvedPeer| each.peer.is_reversed && each.to.contains(name);
        for each in self.peers.iter().filter(is_reversed) {
            each.reversed(name, node, own, cluster, &mut add);
        }
        chosen.into_values().collect()
    }

    /// What keeps BGPPeers from having the effect that they describe.
    pub(super) fn conflicts(&self, cluster: Cluster<'_>) -> impl Iterator<Item = Conflict> {
        let missing = self.peers.iter().flat_map(move |each| {
            let unknown = each.peer.filters.iter();
            let unknown = unknown.filter(move |name| !cluster.filters.contains_key(*name));
            unknown.map(|filter| Conflict::BgpFilterMissing {
                peer: each.name.clone(),
                filter: filter.clone(),
            })
        });
        let nodes = self
            .peers
            .iter()
            .filter_map(move |each| match &each.peer.nodes {
                NodePeers::Node(node) if !cluster.nodes.contains_key(node) => {
                    Some(Conflict::BgpNodeMissing {
                        peer: each.name.clone(),
                        node: node.clone(),
                    })
                }
                _ => None,
            });
        let without_asn = self.peers.iter().filter(move |each| {
            matches!(each.peer.target, PeerTarget::Address(address)
                if each.peer.asn.is_none()
                    && cluster.speaker_at(address.ip(), &self.by_address).is_none())
        });
        let without_asn = without_asn.map(|each| Conflict::BgpAsnMissing {
            peer: each.name.clone(),
        });
        missing
            .chain(nodes)
            .chain(without_asn)
            .chain(self.shadowed())
    }

    /// Peers of a fixed address that another BGPPeer has on every node.
    fn shadowed(&self) -> impl Iterator<Item = Conflict> {
        let address_of = |each: &ResolvedPeer| match each.peer.target {
            PeerTarget::Address(address) => Some(address.ip()),
            PeerTarget::Nodes(_) | PeerTarget::LocalWorkloads(_) => None,
        };
        self.peers
            .iter()
            .enumerate()
            .filter_map(move |(index, each)| {
                let address = address_of(each)?;
                let is_before = |other: &&ResolvedPeer| {
                    address_of(other) == Some(address) && !each.from.is_disjoint(&other.from)
                };
                let winner = self.peers[..index].iter().find(is_before)?;
                Some(Conflict::BgpPeerShadowed {
                    peer: each.name.clone(),
                    winner: winner.name.clone(),
                    address,
                })
            })
    }
}

impl ResolvedPeer {
    fn new(name: &str, peer: &BgpPeer, cluster: Cluster<'_>, by_address: &ByAddress) -> Self {
        let selected = |is_selected: &dyn Fn(&str, &NodeInfo) -> bool| -> BTreeSet<String> {
            let selected = cluster.nodes.iter();
            selected
                .filter(|(name, node)| is_selected(name, node))
                .map(|(name, _)| name.clone())
                .collect()
        };
        let from = match &peer.nodes {
            NodePeers::All => selected(&|_, _| true),
            NodePeers::Node(name) => selected(&|node, _| node == name),
            NodePeers::Selected(selector) => selected(&|_, node| selector.matches(&node.labels)),
        };
        let to = match &peer.target {
            PeerTarget::Nodes(selector) => selected(&|_, node| selector.matches(&node.labels)),
            PeerTarget::Address(address) => node_at(*address, peer.asn, cluster, by_address)
                .into_iter()
                .collect(),
            PeerTarget::LocalWorkloads(_) => BTreeSet::new(),
        };
        let (mut import, mut export) = (Filters::default(), Filters::default());
        for filter in &peer.filters {
            // A filter that is missing lets nothing pass: it may be one that denies.
            let filter = cluster.filters.get(filter).cloned();
            let filter = filter.unwrap_or_else(BgpFilter::closed);
            import.ipv4.extend(filter.import.ipv4);
            import.ipv6.extend(filter.import.ipv6);
            export.ipv4.extend(filter.export.ipv4);
            export.ipv6.extend(filter.export.ipv6);
        }
        Self {
            name: name.to_owned(),
            peer: peer.clone(),
            import,
            export,
            from,
            to,
        }
    }

    /// The peer at a fixed address; `None` if that is the node's own or its AS is not known.
    fn external(
        &self,
        address: SocketAddr,
        node: &NodeInfo,
        own: NodeBgp,
        of_node: Option<&NodeBgp>,
    ) -> Option<BgpPeerRecord> {
        let own_addresses = super::addresses(node);
        if own_addresses.contains(&Some(address.ip())) {
            return None;
        }
        let asn = self.peer.asn.or(of_node.map(|speaker| speaker.asn))?;
        let port = match address.port() {
            0 => of_node.map_or(DEFAULT_PORT, |speaker| speaker.listen_port),
            port => port,
        };
        let source = own_addresses[usize::from(address.is_ipv6())];
        let cluster_id = of_node.and_then(|speaker| speaker.cluster_id);
        Some(BgpPeerRecord {
            local_asn: self.peer.local_asn,
            is_reflector_client: is_client(own, self.peer.local_asn, asn, cluster_id),
            ..self.session(SocketAddr::new(address.ip(), port), asn, source)
        })
    }

    /// The selected nodes as peers of a node.
    fn nodes(
        &self,
        name: &str,
        node: &NodeInfo,
        own: NodeBgp,
        cluster: Cluster<'_>,
        add: &mut impl FnMut(BgpPeerRecord),
    ) {
        for (other, speaker) in speakers(&self.to, name, cluster) {
            for (source, address) in common_addresses(node, other) {
                let address = SocketAddr::new(address, speaker.listen_port);
                let (asn, local_asn) = (speaker.asn, self.peer.local_asn);
                add(BgpPeerRecord {
                    local_asn,
                    is_reflector_client: is_client(own, local_asn, asn, speaker.cluster_id),
                    ..self.session(address, asn, Some(source))
                });
            }
        }
    }

    /// The other ends of the sessions of a node that is one of the peers.
    fn reversed(
        &self,
        name: &str,
        node: &NodeInfo,
        own: NodeBgp,
        cluster: Cluster<'_>,
        add: &mut impl FnMut(BgpPeerRecord),
    ) {
        for (other, speaker) in speakers(&self.from, name, cluster) {
            // That end has this number towards us.
            let asn = self.peer.local_asn.unwrap_or(speaker.asn);
            for (source, address) in common_addresses(node, other) {
                if matches!(self.peer.target, PeerTarget::Address(end) if end.ip() != source) {
                    continue;
                }
                let address = SocketAddr::new(address, speaker.listen_port);
                add(BgpPeerRecord {
                    is_reflector_client: is_client(own, None, asn, speaker.cluster_id),
                    ..self.session(address, asn, Some(source))
                });
            }
        }
    }

    /// A workload of the node, which connects to the address that is configured for that.
    fn workload(&self, address: IpAddr, source: Option<IpAddr>, own: NodeBgp) -> BgpPeerRecord {
        let asn = self.peer.asn.unwrap_or(own.asn);
        BgpPeerRecord {
            local_asn: self.peer.local_asn,
            source,
            ..self.session(SocketAddr::new(address, DEFAULT_PORT), asn, source)
        }
    }

    fn session(&self, address: SocketAddr, asn: u32, source: Option<IpAddr>) -> BgpPeerRecord {
        let peer = &self.peer;
        BgpPeerRecord {
            allowed_local_asn: peer.allowed_local_asn,
            import: self.import.clone(),
            export: self.export.clone(),
            next_hop_mode: peer.next_hop_mode,
            password: peer.password.clone(),
            source: source.filter(|_| peer.uses_node_address),
            restart_time: peer.restart_time,
            keepalive: peer.keepalive,
            ttl_security: peer.ttl_security,
            reachable_by: peer.reachable_by,
            ..BgpPeerRecord::new(&self.name, address, asn)
        }
    }
}

/// The node that a BGPPeer with this address means, if its AS number and port are that node's.
fn node_at(
    address: SocketAddr,
    asn: Option<u32>,
    cluster: Cluster<'_>,
    by_address: &ByAddress,
) -> Option<String> {
    let name = by_address.get(&address.ip())?;
    let speaker = cluster.speakers.get(name)?;
    let is_asn = asn.is_none_or(|asn| asn == speaker.asn);
    let is_port = [0, speaker.listen_port].contains(&address.port());
    (is_asn && is_port).then(|| name.clone())
}

/// A route reflector has every internal peer outside of its cluster for a client.
fn is_client(
    own: NodeBgp,
    local_asn: Option<u32>,
    asn: u32,
    cluster_of_peer: Option<std::net::Ipv4Addr>,
) -> bool {
    own.cluster_id.is_some()
        && local_asn.unwrap_or(own.asn) == asn
        && cluster_of_peer != own.cluster_id
}

/// Nodes with speakers, without the node itself.
fn speakers<'a>(
    names: &'a BTreeSet<String>,
    own: &'a str,
    cluster: Cluster<'a>,
) -> impl Iterator<Item = (&'a NodeInfo, &'a NodeBgp)> {
    let others = names.iter().filter(move |name| *name != own);
    others.filter_map(move |name| Some((cluster.nodes.get(name)?, cluster.speakers.get(name)?)))
}
