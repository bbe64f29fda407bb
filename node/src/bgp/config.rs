//! What the speaker is to be, computed from the node's records. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use margay_api::bgp::{BgpNextHopMode, SecretKey};
use margay_bgp::config::{DEFAULT_RESTART_TIME, NextHopMode, Password, PeerConfig, SpeakerConfig};
use margay_bgp::export::ExportPolicy;
use margay_bgp::rib::LocalRoute;
use margay_bgp::table::NetMap;
use margay_calc::bgp::mesh_peers;
use margay_calc::model::{BgpPeerRecord, BgpRecord, Record, RecordId, globals};
use margay_dataplane::routes::plan::LocalPods;

/// Longest wait for routes of all peers after a restart. It is shorter than the time for which
/// peers keep routes to this node, as it announces nothing until then: one peer that is away must
/// not cost the others.
const SELECTION_DEFERRAL: Duration = Duration::from_secs(60);

/// What the node's BGP follows from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BgpInputs {
    /// The node's record; `None`: it has no BGP.
    pub record: Option<BgpRecord>,
    /// Its peers in the mesh of nodes.
    pub mesh: Vec<BgpPeerRecord>,
    /// The node's own addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Pods of the node.
    pub pods: LocalPods,
}

impl BgpInputs {
    /// Takes the inputs of node `own` from its records.
    pub fn new(own: &str, records: &BTreeMap<RecordId, Record>, pods: &LocalPods) -> Self {
        let Some(Record::Bgp(record)) = records.get(&RecordId::Bgp) else {
            return Self::default();
        };
        let info = match records.get(&RecordId::Node(own.to_owned())) {
            Some(Record::Node(info)) => Some(info),
            _ => None,
        };
        let nodes = globals(records).filter_map(|(id, record)| match (id, record) {
            (RecordId::Node(name), Record::Node(info)) => Some((name.as_str(), info)),
            _ => None,
        });
        let ipv4 = info.and_then(|info| info.ipv4).map(|net| net.addr().into());
        let ipv6 = info.and_then(|info| info.ipv6).map(|net| net.addr().into());
        Self {
            mesh: mesh_peers(own, record, nodes),
            record: Some((**record).clone()),
            addresses: ipv4.into_iter().chain(ipv6).collect(),
            pods: pods.clone(),
        }
    }

    /// Secrets that passwords of peers are in.
    pub fn secrets(&self) -> BTreeSet<SecretKey> {
        self.peers()
            .filter_map(|peer| peer.password.clone())
            .collect()
    }

    /// All peers. One of a BGPPeer comes before one of the mesh with its address.
    fn peers(&self) -> impl Iterator<Item = &BgpPeerRecord> {
        let explicit = self.record.iter().flat_map(|record| &record.peers);
        explicit.chain(&self.mesh)
    }
}

/// A peer as it is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedPeer {
    /// Name of the BGPPeer, or of the node in the mesh.
    pub name: String,
    /// For the speaker.
    pub config: PeerConfig,
}

/// Everything that the speaker's thread is to bring about.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedSpeaker {
    /// What it is. Whether it restarts, the thread knows itself.
    pub speaker: SpeakerConfig,
    /// Where it listens.
    pub listen: BTreeSet<SocketAddr>,
    /// Peers by address.
    pub peers: BTreeMap<SocketAddr, WantedPeer>,
    /// What is announced where no filter decides.
    pub policy: ExportPolicy,
    /// Routes that begin here.
    pub local: BTreeMap<IpNet, LocalRoute>,
    /// Gateways to peers (`reachableBy`), by the peer's address.
    pub gateways: BTreeMap<IpAddr, IpAddr>,
    /// Patterns of interfaces over which nothing is sent (`ignoredInterfaces`).
    pub ignored_interfaces: BTreeSet<String>,
}

/// Peers that have no session, with the reason: they have a password that cannot be read.
pub type WithoutPassword = BTreeMap<SocketAddr, String>;

/// Computes what the speaker is to be; `None`: the node has no BGP. A peer whose password is not
/// known has no session, rather than one without a password.
pub fn wanted_speaker(
    inputs: &BgpInputs,
    password: &dyn Fn(&SecretKey) -> Result<Password, String>,
) -> Option<(WantedSpeaker, WithoutPassword)> {
    let record = inputs.record.as_ref()?;
    let (mut peers, mut without) = (BTreeMap::new(), WithoutPassword::new());
    let mut gateways = BTreeMap::new();
    for peer in inputs.peers() {
        if peers.contains_key(&peer.address) || without.contains_key(&peer.address) {
            continue;
        }
        match peer.password.as_ref().map(password).transpose() {
            Ok(password) => {
                let name = peer.name.clone();
                let config = peer_config(peer, password);
                peers.insert(peer.address, WantedPeer { name, config });
                let gateway = peer.reachable_by.map(|via| (peer.address.ip(), via));
                gateways.extend(gateway);
            }
            Err(reason) => {
                without.insert(peer.address, format!("{}: {reason}", peer.name));
            }
        }
    }
    let wanted = WantedSpeaker {
        speaker: speaker_config(record),
        listen: listen_addresses(record, &inputs.addresses),
        peers,
        policy: export_policy(record),
        local: local_routes(record, &inputs.pods),
        gateways,
        ignored_interfaces: record.ignored_interfaces.clone(),
    };
    Some((wanted, without))
}

fn speaker_config(record: &BgpRecord) -> SpeakerConfig {
    let [ipv4_priority, ipv6_priority] = record.priorities;
    SpeakerConfig {
        cluster_id: record.cluster_id,
        selection_deferral: SELECTION_DEFERRAL,
        ipv4_priority,
        ipv6_priority,
        ..SpeakerConfig::new(record.asn, record.router_id)
    }
}

fn peer_config(peer: &BgpPeerRecord, password: Option<Password>) -> PeerConfig {
    let mut config = PeerConfig::new(peer.address, peer.asn);
    config.local_asn = peer.local_asn;
    config.allowed_local_asn = peer.allowed_local_asn;
    config.keepalive = peer.keepalive;
    config.restart_time = Some(peer.restart_time.unwrap_or(DEFAULT_RESTART_TIME));
    config.is_reflector_client = peer.is_reflector_client;
    config.next_hop_mode = match peer.next_hop_mode {
        BgpNextHopMode::Auto => NextHopMode::Auto,
        BgpNextHopMode::Own => NextHopMode::Own,
        BgpNextHopMode::Keep => NextHopMode::Keep,
    };
    config.import = peer.import.clone();
    config.export = peer.export.clone();
    config.transport.source = peer.source;
    config.transport.password = password;
    config.transport.ttl_security = peer.ttl_security;
    config.transport.reachable_by = peer.reachable_by;
    config
}

fn listen_addresses(record: &BgpRecord, own: &BTreeSet<IpAddr>) -> BTreeSet<SocketAddr> {
    let all = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let addresses = if record.binds_node_address {
        own.clone()
    } else {
        all.into()
    };
    let port = record.listen_port;
    addresses
        .into_iter()
        .map(|address| SocketAddr::new(address, port))
        .collect()
}

fn export_policy(record: &BgpRecord) -> ExportPolicy {
    fn map<T: Clone>(values: &BTreeMap<IpNet, T>) -> NetMap<T> {
        let mut map = NetMap::default();
        for (net, value) in values {
            map.insert(*net, value.clone());
        }
        map
    }
    let set = |nets: &BTreeSet<IpNet>| map(&nets.iter().map(|net| (*net, ())).collect());
    ExportPolicy {
        blocks: map(&record.blocks),
        pools: map(&record.pools),
        services: set(&record.services),
        communities: map(&record.communities),
        service_ranges: set(&record.service_ranges),
    }
}

/// Blocks, Services and pods. Which of them go to peers is for the filters and the export policy:
/// of pods, those with addresses borrowed from other nodes' blocks.
fn local_routes(record: &BgpRecord, pods: &LocalPods) -> BTreeMap<IpNet, LocalRoute> {
    let route = |net: IpNet, interface: Option<&String>| {
        let route = LocalRoute {
            net,
            interface: interface.cloned(),
            priority: None,
        };
        (net, route)
    };
    let ranges = record.blocks.keys().chain(&record.services);
    let pods = pods
        .iter()
        .map(|(address, link)| route(IpNet::from(*address), Some(link)));
    ranges
        .map(|net| route(net.trunc(), None))
        .chain(pods)
        .collect()
}

#[cfg(test)]
mod tests;
