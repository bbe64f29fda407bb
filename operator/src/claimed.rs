//! What of the addresses that nodes claim is believed, before policies select nodes by them. Pure.
//!
//! An agent writes what its Node says of addresses, tunnels and interfaces, so one node could claim another's addresses, or a pod's. As in typha, an address is the
//! node's for whom kubelet reports it, then the older one's. One of a pool is a pod's, unless it is the end of a tunnel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::inputs::{NodeFacts, PoolFacts};

/// The order of those who claim one address: whether kubelet does not report it, age, and name.
type Rank<'a> = (bool, &'a str, &'a str);

/// The nodes with the addresses that they are believed to have, and what is not believed.
pub fn believed(nodes: &[NodeFacts], pools: &[PoolFacts]) -> (Vec<NodeFacts>, Vec<String>) {
    let mut claims: BTreeMap<IpAddr, BTreeSet<Rank<'_>>> = BTreeMap::new();
    for node in nodes {
        for address in node.claimed.union(&node.reported) {
            claims.entry(*address).or_default().insert(rank(node, *address));
        }
    }
    let pools: Vec<IpNet> = pools.iter().filter_map(|pool| pool.cidr().parse().ok()).collect();
    let denial = |node: &NodeFacts, address: IpAddr| {
        let first = claims.get(&address).and_then(BTreeSet::first);
        match first {
            Some(first @ (_, _, winner)) if *winner != node.name && *first < rank(node, address) => {
                Some(format!("node {winner} has that address"))
            }
            _ if node.reported.contains(&address) || node.tunnels.contains(&address) => None,
            _ => pools.iter().any(|pool| pool.contains(&address)).then(|| "it is one of pods".to_owned()),
        }
    };
    let mut problems = Vec::new();
    let mut believed = nodes.to_vec();
    for node in &mut believed {
        let named = node.interfaces.iter().flatten().flatten().flat_map(|interface| &interface.addresses);
        let all: BTreeSet<IpAddr> = node.addresses.iter().chain(named).copied().collect();
        let denied: BTreeMap<IpAddr, String> =
            all.into_iter().filter_map(|address| Some((address, denial(node, address)?))).collect();
        node.addresses.retain(|address| !denied.contains_key(address));
        for interface in node.interfaces.iter_mut().flatten().flatten() {
            interface.addresses.retain(|address| !denied.contains_key(address));
        }
        problems.extend(denied.into_iter().map(|(address, why)| {
            format!(
                "Node {}: its annotations claim {address}, but {why}, so its host endpoints go without; if the node has changed, delete the annotation \
                 and restart its agent, and find out who has written it",
                node.name
            )
        }));
    }
    (believed, problems)
}

fn rank(node: &NodeFacts, address: IpAddr) -> Rank<'_> {
    (!node.reported.contains(&address), &node.created, &node.name)
}

#[cfg(test)]
mod tests {
    use margay_api::hosts::NodeInterface;
    use serde_json::json;

    use super::*;

    fn set(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// A node with what kubelet reports, what its agent claims as its own address and as its tunnel's, and what is on its interfaces.
    fn node(name: &str, age: &str, reported: &[&str], own: &[&str], tunnels: &[&str], on: &[&str]) -> NodeFacts {
        let eth0 = NodeInterface { name: "eth0".to_owned(), addresses: set(on) };
        NodeFacts {
            name: name.to_owned(),
            created: age.to_owned(),
            reported: set(reported),
            claimed: set(&[own, tunnels].concat()),
            tunnels: set(tunnels),
            addresses: set(&[reported, own, tunnels, on].concat()),
            interfaces: Some(Ok(vec![eth0])),
            ..NodeFacts::default()
        }
    }

    #[test]
    fn what_nodes_claim_of_each_other_is_in_no_host_endpoint() {
        let n1 = || node("n1", "2", &["192.0.2.1"], &["192.0.2.1"], &["10.0.0.1"], &["192.0.2.1", "172.17.0.1"]);
        let pools = [PoolFacts { spec: json!({ "cidr": "10.0.0.0/16" }), ..PoolFacts::default() }];
        // What the other node says, and what of it is believed; it is older than n1 and reports 192.0.2.9.
        let table: [([&[&str]; 3], &[&str]); 7] = [
            ([&["192.0.2.9"], &["10.0.0.9"], &["192.0.2.9"]], &["10.0.0.9", "192.0.2.9"]),
            ([&["192.0.2.1"], &[], &[]], &["192.0.2.9"]),
            ([&[], &["192.0.2.1"], &[]], &["192.0.2.9"]),
            ([&[], &[], &["192.0.2.1"]], &["192.0.2.9"]),
            ([&["10.0.0.7"], &[], &["10.0.0.8"]], &["192.0.2.9"]),
            ([&["198.51.100.1"], &[], &["fd00::9"]], &["192.0.2.9", "198.51.100.1", "fd00::9"]),
            ([&[], &[], &["172.17.0.1"]], &["172.17.0.1", "192.0.2.9"]),
        ];
        for ([own, tunnels, on], wanted) in table {
            let n9 = node("n9", "1", &["192.0.2.9"], own, tunnels, on);
            let said = n9.addresses.len();
            let (nodes, problems) = believed(&[n1(), n9], &pools);
            assert_eq!(nodes[0], n1(), "{own:?} {tunnels:?} {on:?}");
            assert_eq!(nodes[1].addresses, set(wanted), "{own:?} {tunnels:?} {on:?}");
            let on: BTreeSet<IpAddr> = set(on).intersection(&set(wanted)).copied().collect();
            assert_eq!(nodes[1].interfaces.as_ref().unwrap().as_ref().unwrap()[0].addresses, on);
            assert_eq!(problems.len(), said - wanted.len(), "{problems:?}");
        }
        let (_, problems) = believed(&[n1(), node("n9", "3", &[], &[], &["10.0.0.1"], &[])], &pools);
        assert!(problems[0].starts_with("Node n9: its annotations claim 10.0.0.1, but node n1 has that address"));
    }
}
