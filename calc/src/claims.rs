//! Whose an address is that more than one node says to be its own. A node's agent writes what its Node says, so one node could take another's place.
//!
//! Of a node's own address the one counts for whom kubelet reports it, then the older Node. The end of a tunnel in a block, and an own address there that
//! kubelet does not report, has to be under the handle of the node's tunnel, or the block be the node's; then the older Node counts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::network::NodeInfo;

use crate::blocks::Blocks;

/// What a node says of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Claim {
    /// It is the node's own.
    Own(IpAddr),
    /// It is the end of the node's tunnel.
    Tunnel(IpAddr),
}

/// The order of those who claim one address, of which the first has it that may: first for whom kubelet reports it (false), then by age, then by name.
type Rank = (bool, i64, String);

/// Who claims which address.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    by_address: BTreeMap<Claim, BTreeSet<Rank>>,
}

/// An address that a node says to have and is not believed to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Denied {
    pub(crate) claim: Claim,
    /// The node that has it, if any.
    pub(crate) winner: Option<String>,
}

impl Claims {
    /// The node is this one now, or none. Answers with the nodes of which it may depend what is believed of them.
    pub(crate) fn set(&mut self, name: &str, former: Option<&NodeInfo>, info: Option<&NodeInfo>) -> BTreeSet<String> {
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

    /// Nodes that say that they, or their tunnels, have an address in the range.
    pub(crate) fn within(&self, range: IpNet) -> impl Iterator<Item = &String> {
        let claims = [Claim::Own, Claim::Tunnel]
            .into_iter()
            .flat_map(move |claim| self.by_address.range(claim(range.network())..=claim(range.broadcast())));
        claims.flat_map(|(_, claimants)| claimants.iter().map(|(_, _, name)| name))
    }

    /// The node without what it is not believed.
    pub(crate) fn believed(&self, name: &str, info: &NodeInfo, blocks: &Blocks) -> NodeInfo {
        let mut info = info.clone();
        for Denied { claim, .. } in self.denied(name, &info, blocks) {
            match claim {
                Claim::Own(IpAddr::V4(_)) => info.ipv4 = None,
                Claim::Own(IpAddr::V6(_)) => info.ipv6 = None,
                Claim::Tunnel(IpAddr::V4(_)) => info.vtep = None,
                Claim::Tunnel(IpAddr::V6(_)) => info.vtep6 = None,
            }
        }
        NodeInfo { standing: Default::default(), ..info }
    }

    /// What the node is not believed.
    pub(crate) fn denied(&self, name: &str, info: &NodeInfo, blocks: &Blocks) -> Vec<Denied> {
        let denied = ranks(name, info).filter_map(|(claim, _)| {
            let winner = self.winner(claim, blocks);
            (winner != Some(name)).then(|| Denied { claim, winner: winner.map(str::to_owned) })
        });
        denied.collect()
    }

    fn winner(&self, claim: Claim, blocks: &Blocks) -> Option<&str> {
        let mut claimants = self.by_address.get(&claim)?.iter();
        let may_have = |(is_unreported, _, name): &&Rank| match claim {
            Claim::Own(address) => !is_unreported || may_be_in(blocks, address, name),
            Claim::Tunnel(address) => may_be_in(blocks, address, name),
        };
        claimants.find(may_have).map(|(_, _, name)| name.as_str())
    }
}

/// Whether a node, or its tunnel, may have the address, as far as blocks tell: one outside of all is nobody else's.
fn may_be_in(blocks: &Blocks, address: IpAddr, node: &str) -> bool {
    blocks.around(address).all(|block| {
        let is_under_handle = block.tunnels.iter().any(|(end, of)| *end == address && of == node);
        is_under_handle || block.node.as_deref() == Some(node)
    })
}

fn ranks<'a>(name: &'a str, info: &'a NodeInfo) -> impl Iterator<Item = (Claim, Rank)> + 'a {
    let standing = info.standing;
    let own = [
        info.ipv4.map(|net| (IpAddr::from(net.addr()), standing.ipv4_reported)),
        info.ipv6.map(|net| (IpAddr::from(net.addr()), standing.ipv6_reported)),
    ];
    let tunnels = [info.vtep.map(|vtep| IpAddr::from(vtep.address)), info.vtep6.map(|vtep| vtep.address.into())];
    let rank = move |is_reported: bool| (!is_reported, standing.created, name.to_owned());
    let own = own.into_iter().flatten().map(move |(address, reported)| (Claim::Own(address), rank(reported)));
    let tunnels = tunnels.into_iter().flatten().map(move |address| (Claim::Tunnel(address), rank(true)));
    own.chain(tunnels)
}
