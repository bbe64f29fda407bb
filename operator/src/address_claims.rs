//! Decides which of the addresses that nodes claim are accepted, before policies select nodes by
//! them. Pure.
//!
//! An agent writes the addresses, tunnels and interfaces of its Node, so a compromised node could
//! claim addresses of another node or of a pod. As in typha, an address belongs to the node that
//! kubelet reports it for, else to the older node. An address of a pool belongs to a pod, unless it
//! is a tunnel address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::inputs::{NodeFacts, PoolFacts};

/// Precedence of claims of one address; lower wins: not reported by kubelet, creation time, name.
type Rank<'a> = (bool, &'a str, &'a str);

/// Returns the nodes with their accepted addresses, and a problem for each rejected address.
pub fn resolve(nodes: &[NodeFacts], pools: &[PoolFacts]) -> (Vec<NodeFacts>, Vec<String>) {
    let mut claims: BTreeMap<IpAddr, BTreeSet<Rank<'_>>> = BTreeMap::new();
    for node in nodes {
        for address in node.claimed.union(&node.reported) {
            claims
                .entry(*address)
                .or_default()
                .insert(rank(node, *address));
        }
    }
    let pools: Vec<IpNet> = pools
        .iter()
        .filter_map(|pool| pool.cidr().parse().ok())
        .collect();
    let rejection = |node: &NodeFacts, address: IpAddr| {
        let first = claims.get(&address).and_then(BTreeSet::first);
        match first {
            Some(first @ (_, _, winner))
                if *winner != node.name && *first < rank(node, address) =>
            {
                Some(format!("it belongs to node {winner}"))
            }
            _ if node.reported.contains(&address) || node.tunnels.contains(&address) => None,
            _ => pools
                .iter()
                .any(|pool| pool.contains(&address))
                .then(|| "it belongs to a pod".to_owned()),
        }
    };
    let mut problems = Vec::new();
    let mut accepted = nodes.to_vec();
    for node in &mut accepted {
        let on_interfaces = node
            .interfaces
            .iter()
            .flatten()
            .flatten()
            .flat_map(|interface| &interface.addresses);
        let all: BTreeSet<IpAddr> = node
            .addresses
            .iter()
            .chain(on_interfaces)
            .copied()
            .collect();
        let rejected: BTreeMap<IpAddr, String> = all
            .into_iter()
            .filter_map(|address| Some((address, rejection(node, address)?)))
            .collect();
        node.addresses
            .retain(|address| !rejected.contains_key(address));
        for interface in node.interfaces.iter_mut().flatten().flatten() {
            interface
                .addresses
                .retain(|address| !rejected.contains_key(address));
        }
        problems.extend(rejected.into_iter().map(|(address, why)| {
            format!(
                "Node {}: its annotations claim {address}, but {why}, so its host endpoints do not \
                 have it; if the node's address has changed, delete the annotation and restart its \
                 agent, otherwise find out who wrote it",
                node.name
            )
        }));
    }
    (accepted, problems)
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

    /// Returns a node with the addresses that kubelet reports, the own and tunnel addresses that
    /// its agent claims, and those on its interface.
    fn node(
        name: &str,
        age: &str,
        reported: &[&str],
        own: &[&str],
        tunnels: &[&str],
        on: &[&str],
    ) -> NodeFacts {
        let eth0 = NodeInterface {
            name: "eth0".to_owned(),
            addresses: set(on),
        };
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
    fn addresses_of_other_nodes_are_in_no_host_endpoint() {
        let n1 = || {
            node(
                "n1",
                "2",
                &["192.0.2.1"],
                &["192.0.2.1"],
                &["10.0.0.1"],
                &["192.0.2.1", "172.17.0.1"],
            )
        };
        let pools = [PoolFacts {
            spec: json!({ "cidr": "10.0.0.0/16" }),
            ..PoolFacts::default()
        }];
        // Claims of the other node (own, tunnels, interface), and its accepted addresses; it is
        // older than n1, and kubelet reports 192.0.2.9 for it.
        let table: [([&[&str]; 3], &[&str]); 7] = [
            (
                [&["192.0.2.9"], &["10.0.0.9"], &["192.0.2.9"]],
                &["10.0.0.9", "192.0.2.9"],
            ),
            ([&["192.0.2.1"], &[], &[]], &["192.0.2.9"]),
            ([&[], &["192.0.2.1"], &[]], &["192.0.2.9"]),
            ([&[], &[], &["192.0.2.1"]], &["192.0.2.9"]),
            ([&["10.0.0.7"], &[], &["10.0.0.8"]], &["192.0.2.9"]),
            (
                [&["198.51.100.1"], &[], &["fd00::9"]],
                &["192.0.2.9", "198.51.100.1", "fd00::9"],
            ),
            ([&[], &[], &["172.17.0.1"]], &["172.17.0.1", "192.0.2.9"]),
        ];
        for ([own, tunnels, on], wanted) in table {
            let n9 = node("n9", "1", &["192.0.2.9"], own, tunnels, on);
            let claimed = n9.addresses.len();
            let (nodes, problems) = resolve(&[n1(), n9], &pools);
            assert_eq!(nodes[0], n1(), "{own:?} {tunnels:?} {on:?}");
            assert_eq!(
                nodes[1].addresses,
                set(wanted),
                "{own:?} {tunnels:?} {on:?}"
            );
            let on: BTreeSet<IpAddr> = set(on).intersection(&set(wanted)).copied().collect();
            assert_eq!(
                nodes[1].interfaces.as_ref().unwrap().as_ref().unwrap()[0].addresses,
                on
            );
            assert_eq!(problems.len(), claimed - wanted.len(), "{problems:?}");
        }
        let (_, problems) = resolve(
            &[n1(), node("n9", "3", &[], &[], &["10.0.0.1"], &[])],
            &pools,
        );
        assert!(
            problems[0]
                .starts_with("Node n9: its annotations claim 10.0.0.1, but it belongs to node n1")
        );
    }
}
