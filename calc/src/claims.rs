//! Conflicting claims of nodes to an address. A node's agent writes its Node object, so without
//! these rules one node could take over the address of another.
//!
//! A node's own address belongs to the node that kubelet reports with it, else to the older Node. A
//! tunnel address in a block, and an own address there that kubelet does not report, must be
//! allocated under the handle of the node's tunnel, or the block must be affine to the node; of
//! several such nodes the oldest wins.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::{NodeInfo, TunnelKind};

use crate::blocks::Blocks;

/// An address that a Node object claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Claim {
    /// As the node's own address.
    Own(IpAddr),
    /// As the address of a tunnel device.
    Tunnel(TunnelKind, IpAddr),
}

/// Priority among the claimants of an address; the smallest that may have it wins. Reported by
/// kubelet (false) first, then older, then by name.
type Rank = (bool, i64, String);

/// Claimants by address.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_address: BTreeMap<Claim, BTreeSet<Rank>>,
}

/// A claim that is rejected.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RejectedClaim {
    pub(crate) claim: Claim,
    /// The node that has the address, if any.
    pub(crate) winner: Option<String>,
}

impl Claims {
    /// Sets or removes a node. Returns the nodes whose claims may become accepted or rejected by
    /// that.
    pub(crate) fn set(
        &mut self,
        name: &str,
        former: Option<&NodeInfo>,
        info: Option<&NodeInfo>,
    ) -> BTreeSet<String> {
        let mut touched = BTreeSet::from([name.to_owned()]);
        for (claim, rank) in former.into_iter().flat_map(|info| ranks(name, info)) {
            if let Some(claimants) = self.by_address.get_mut(&claim) {
                claimants.remove(&rank);
                touched.extend(claimants.iter().map(|(_, _, name)| name.clone()));
                if claimants.is_empty() {
                    self.by_address.remove(&claim);
                }
            }
        }
        for (claim, rank) in info.into_iter().flat_map(|info| ranks(name, info)) {
            let claimants = self.by_address.entry(claim).or_default();
            claimants.insert(rank);
            touched.extend(claimants.iter().map(|(_, _, name)| name.clone()));
        }
        touched
    }

    /// Nodes that claim an address in the range.
    pub(crate) fn within(&self, range: IpNet) -> impl Iterator<Item = &String> {
        let (first, last) = (range.network(), range.broadcast());
        let tunnels =
            TunnelKind::ALL.map(|kind| Claim::Tunnel(kind, first)..=Claim::Tunnel(kind, last));
        let claims = [Claim::Own(first)..=Claim::Own(last)]
            .into_iter()
            .chain(tunnels)
            .flat_map(|claims| self.by_address.range(claims));
        claims.flat_map(|(_, claimants)| claimants.iter().map(|(_, _, name)| name))
    }

    /// The node without its rejected claims.
    pub(crate) fn accepted(&self, name: &str, info: &NodeInfo, blocks: &Blocks) -> NodeInfo {
        let mut info = info.clone();
        for RejectedClaim { claim, .. } in self.rejected(name, &info, blocks) {
            match claim {
                Claim::Own(IpAddr::V4(_)) => info.ipv4 = None,
                Claim::Own(IpAddr::V6(_)) => info.ipv6 = None,
                Claim::Tunnel(kind, _) => info.remove_tunnel(kind),
            }
        }
        NodeInfo {
            standing: Default::default(),
            ..info
        }
    }

    /// Rejected claims of the node.
    pub(crate) fn rejected(
        &self,
        name: &str,
        info: &NodeInfo,
        blocks: &Blocks,
    ) -> Vec<RejectedClaim> {
        let rejected = ranks(name, info).filter_map(|(claim, _)| {
            let winner = self.winner(claim, blocks);
            (winner != Some(name)).then(|| RejectedClaim {
                claim,
                winner: winner.map(str::to_owned),
            })
        });
        rejected.collect()
    }

    fn winner(&self, claim: Claim, blocks: &Blocks) -> Option<&str> {
        let mut claimants = self.by_address.get(&claim)?.iter();
        let is_eligible = |(is_unreported, _, name): &&Rank| match claim {
            Claim::Own(address) => !is_unreported || may_have(blocks, address, name),
            Claim::Tunnel(_, address) => may_have(blocks, address, name),
        };
        claimants
            .find(is_eligible)
            .map(|(_, _, name)| name.as_str())
    }
}

/// Returns true if the node, or its tunnel, may have the address, according to the blocks; an
/// address outside of all blocks is not restricted. What a node lends out of its block is not its
/// own.
pub(crate) fn may_have(blocks: &Blocks, address: IpAddr, node: &str) -> bool {
    blocks.containing(address).all(|block| {
        let is_under_handle = block
            .tunnels
            .iter()
            .any(|(end, of)| *end == address && of == node);
        let is_lent = block
            .borrowed
            .iter()
            .any(|(lent, user)| *lent == address && user != node);
        is_under_handle || block.node.as_deref() == Some(node) && !is_lent
    })
}

fn ranks<'a>(name: &'a str, info: &'a NodeInfo) -> impl Iterator<Item = (Claim, Rank)> + 'a {
    let standing = info.standing;
    let own = [
        info.ipv4
            .map(|net| (IpAddr::from(net.addr()), standing.ipv4_reported)),
        info.ipv6
            .map(|net| (IpAddr::from(net.addr()), standing.ipv6_reported)),
    ];
    let tunnels = TunnelKind::ALL.map(|kind| {
        info.tunnel_address(kind)
            .map(|address| Claim::Tunnel(kind, address))
    });
    let rank = move |is_reported: bool| (!is_reported, standing.created, name.to_owned());
    let own = own
        .into_iter()
        .flatten()
        .map(move |(address, reported)| (Claim::Own(address), rank(reported)));
    // Kubelet reports no tunnel addresses, so only age counts.
    let tunnels = tunnels
        .into_iter()
        .flatten()
        .map(move |claim| (claim, rank(true)));
    own.chain(tunnels)
}
