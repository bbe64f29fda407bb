//! BGP: from settings, peers and filters to what the speaker of each node does.
//!
//! The record of a node depends on the settings that apply to it, on BGPPeers and the nodes that
//! they select, on its own blocks, and on Services that it announces. The mesh of nodes is not in
//! it: agents compute it with [`mesh_peers`], or every node that joins would change the record of
//! all others.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use margay_api::network::NodeInfo;
use sha2::{Digest, Sha256};

use crate::model::{BgpPeerRecord, BgpRecord};

mod announcements;
mod peers;
mod settings;
mod speakers;

pub(crate) use peers::StoredPeer;
pub(crate) use speakers::{Around, Speakers};

/// Peers of a node in the mesh: one per other node and IP version that both have, in the order of
/// names. Route reflectors are in no mesh, and an address that the record has a peer for is left
/// to that.
pub fn mesh_peers<'a>(
    own: &str,
    record: &BgpRecord,
    nodes: impl IntoIterator<Item = (&'a str, &'a NodeInfo)>,
) -> Vec<BgpPeerRecord> {
    let Some(mesh) = record.mesh.as_ref().filter(|_| record.cluster_id.is_none()) else {
        return Vec::new();
    };
    let (of_own, others): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|(name, _)| *name == own);
    let Some((_, own)) = of_own.first() else {
        return Vec::new();
    };
    let configured: BTreeSet<IpAddr> = record.peers.iter().map(|peer| peer.address.ip()).collect();
    let mut peers = Vec::new();
    for (name, node) in others {
        let Some(bgp) = node.bgp.filter(|bgp| bgp.cluster_id.is_none()) else {
            continue;
        };
        for (source, address) in common_addresses(own, node) {
            if !configured.contains(&address) {
                let address = SocketAddr::new(address, bgp.listen_port);
                peers.push(BgpPeerRecord {
                    password: mesh.password.clone(),
                    restart_time: mesh.restart_time,
                    source: Some(source),
                    ..BgpPeerRecord::new(name, address, bgp.asn)
                });
            }
        }
    }
    peers.sort_by(|one, other| (&one.name, one.address).cmp(&(&other.name, other.address)));
    peers
}

/// Addresses of two nodes, of each IP version that both have.
pub(crate) fn common_addresses(
    own: &NodeInfo,
    other: &NodeInfo,
) -> impl Iterator<Item = (IpAddr, IpAddr)> + use<> {
    let (own, other) = (addresses(own), addresses(other));
    own.into_iter()
        .zip(other)
        .filter_map(|(own, other)| Some((own?, other?)))
}

/// Addresses of a node, of IPv4 and IPv6.
pub(crate) fn addresses(node: &NodeInfo) -> [Option<IpAddr>; 2] {
    [
        node.ipv4.map(|net| net.addr().into()),
        node.ipv6.map(|net| net.addr().into()),
    ]
}

/// BGP identifier of a node: its IPv4 address; without one, a number from its name, as Calico's
/// `CALICO_ROUTER_ID=hash` makes one.
pub(crate) fn router_id(name: &str, node: &NodeInfo) -> Ipv4Addr {
    node.ipv4.map_or_else(
        || {
            let hash = Sha256::digest(name);
            // In 1.0.0.0/8 to 127.0.0.0/8, so that it is never zero.
            Ipv4Addr::new(hash[0] % 127 + 1, hash[1], hash[2], hash[3])
        },
        |net| net.addr(),
    )
}

#[cfg(test)]
mod tests;
