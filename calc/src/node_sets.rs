//! Sets of node addresses. Nodes are few and not in the label index, where selectors for endpoints
//! would match them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use margay_api::network::NodeInfo;
use margay_api::selector::Selector;

use crate::model::Member;
use crate::sets::address;

/// Live sets of node addresses, with the selectors of their nodes.
#[derive(Debug, Default)]
pub(crate) struct NodeSets(BTreeMap<u32, Selector>);

impl NodeSets {
    /// Starts maintaining the set.
    pub(crate) fn activate(&mut self, set: u32, canonical: &str) {
        self.0.insert(set, parse(canonical));
    }

    /// Stops maintaining the set.
    pub(crate) fn deactivate(&mut self, set: u32) {
        self.0.remove(&set);
    }

    pub(crate) fn live(&self) -> impl Iterator<Item = (u32, &Selector)> {
        self.0.iter().map(|(set, selector)| (*set, selector))
    }
}

/// Members of the set of a selector.
pub(crate) fn members(canonical: &str, nodes: &BTreeMap<String, NodeInfo>) -> Vec<Member> {
    let selector = parse(canonical);
    nodes
        .values()
        .flat_map(|node| added(&selector, node))
        .collect()
}

/// Members that a node contributes to the set of a selector.
pub(crate) fn added(selector: &Selector, node: &NodeInfo) -> impl Iterator<Item = Member> + use<> {
    let ipv4 = node.ipv4.map(|net| IpAddr::V4(net.addr()));
    let ipv6 = node.ipv6.map(|net| IpAddr::V6(net.addr()));
    let selected = selector.matches(&node.labels);
    ipv4.into_iter()
        .chain(ipv6)
        .filter(move |_| selected)
        .map(address)
}

fn parse(canonical: &str) -> Selector {
    Selector::parse(canonical).expect("a printed selector parses")
}
