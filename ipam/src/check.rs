//! Check of IPAM data: [`overlaps`] of blocks, and [`inconsistencies`] between blocks, affinities,
//! handles and pods, as `calicoctl ipam check` reports them. Overlaps are not repaired, because a
//! person must decide which pods move. Margay never creates any; a cluster that is taken over may
//! have some.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::ipam::block::Block;

use crate::leak_scan::IpamState;

/// Returns one text for each pair of overlapping blocks, in order: both blocks with their nodes,
/// the consequence and the remedy.
pub fn overlaps<'a>(blocks: impl IntoIterator<Item = &'a Block>) -> Vec<String> {
    let mut ordered: Vec<&Block> = blocks
        .into_iter()
        .filter(|block| !block.spec().deleted)
        .collect();
    ordered.sort_by_key(|block| (block.cidr().network(), block.cidr().prefix_len()));
    let mut texts = Vec::new();
    // Ranges are nested or disjoint, so those that may contain the next one form a stack.
    let mut around: Vec<&Block> = Vec::new();
    for block in ordered {
        while around
            .last()
            .is_some_and(|outer| !outer.cidr().contains(&block.cidr()))
        {
            around.pop();
        }
        texts.extend(around.iter().map(|outer| text(outer, block)));
        around.push(block);
    }
    texts
}

/// Returns one text for each inconsistency, in order of blocks, affinities, handles and pods.
/// Agents and the collector repair most of them in minutes, so only those that stay are problems.
pub fn inconsistencies(state: &IpamState) -> Vec<String> {
    let blocks: Vec<&Block> = state
        .blocks
        .iter()
        .filter(|block| !block.spec().deleted)
        .collect();
    let owners: BTreeMap<IpNet, Option<&str>> = blocks
        .iter()
        .map(|block| (block.cidr(), block.node()))
        .collect();
    let affinities: BTreeSet<(IpNet, &str)> = state
        .affinities
        .iter()
        .map(|affinity| (affinity.cidr, affinity.node.as_str()))
        .collect();
    let handles: BTreeMap<&str, &BTreeSet<IpNet>> = state
        .handles
        .iter()
        .map(|handle| (handle.id.as_str(), &handle.blocks))
        .collect();
    let mut texts = Vec::new();
    let mut assigned: BTreeSet<IpAddr> = BTreeSet::new();
    let mut used: BTreeSet<(&str, IpNet)> = BTreeSet::new();
    for block in blocks {
        let cidr = block.cidr();
        if let Some(node) = block
            .node()
            .filter(|node| !affinities.contains(&(cidr, node)))
        {
            texts.push(format!(
                "IPAMBlock {cidr} of node {node} has no BlockAffinity"
            ));
        }
        if state
            .pools
            .as_ref()
            .is_some_and(|pools| !pools.iter().any(|pool| pool.contains(&cidr)))
        {
            texts.push(format!("IPAMBlock {cidr} is in no IPPool"));
        }
        for (address, attribute) in block.allocated() {
            assigned.insert(address);
            let Some(handle) = attribute.handle_id.as_deref() else {
                continue;
            };
            used.insert((handle, cidr));
            if !handles
                .get(handle)
                .is_some_and(|blocks| blocks.contains(&cidr))
            {
                texts.push(format!(
                    "IPAMHandle {handle} of address {address} does not list IPAMBlock {cidr}"
                ));
            }
        }
    }
    for (cidr, node) in affinities {
        if owners.get(&cidr) != Some(&Some(node)) {
            texts.push(format!(
                "BlockAffinity of node {node} has no IPAMBlock {cidr} of that node"
            ));
        }
    }
    for (handle, blocks) in handles {
        let unused = blocks
            .iter()
            .filter(|cidr| !used.contains(&(handle, **cidr)));
        texts.extend(unused.map(|cidr| {
            format!("IPAMHandle {handle} lists IPAMBlock {cidr}, which has no address of it")
        }));
    }
    let is_pooled = |address: &IpAddr| {
        state
            .pools
            .iter()
            .flatten()
            .any(|pool| pool.contains(address))
    };
    for (name, pod) in state.pods.iter().filter(|(_, pod)| !pod.is_finished) {
        let missing = pod
            .addresses
            .iter()
            .filter(|address| is_pooled(address) && !assigned.contains(address));
        texts.extend(
            missing.map(|address| {
                format!("address {address} of pod {name} is assigned in no IPAMBlock")
            }),
        );
    }
    texts
}

fn text(outer: &Block, inner: &Block) -> String {
    let named = |block: &Block| {
        let node = block
            .node()
            .map_or_else(|| "of no node".to_owned(), |node| format!("of node {node}"));
        format!(
            "{} {node} ({} addresses in use)",
            block.cidr(),
            block.allocated().count()
        )
    };
    format!(
        "IPAMBlock {} lies in IPAMBlock {}: an address can be assigned twice, and routes of the \
         larger one lead to the node of the smaller one; recreate the pods of one of the two \
         elsewhere, then delete its IPAMBlock and BlockAffinity",
        named(inner),
        named(outer)
    )
}

#[cfg(test)]
mod tests {
    use margay_api::v3::ipam::AllocationAttribute;

    use super::*;
    use crate::leak_scan::{Affinity, Handle, PodFacts};

    fn block(cidr: &str, node: &str) -> Block {
        Block::new(cidr.parse().unwrap(), node, String::new())
    }

    #[test]
    fn overlapping_blocks_are_reported_with_their_nodes() {
        let mut taken = block("10.244.82.192/28", "n1");
        taken
            .assign(&AllocationAttribute::default(), |_| false)
            .unwrap();
        let blocks = [
            taken,
            block("10.244.82.192/26", "n2"),
            block("10.244.83.0/26", "n2"),
            block("10.244.82.240/28", "n3"),
            block("fd00::/122", "n1"),
        ];
        let texts = overlaps(&blocks);
        assert_eq!(texts.len(), 2, "{texts:#?}");
        let first = "IPAMBlock 10.244.82.192/28 of node n1 (1 addresses in use) lies in IPAMBlock \
                     10.244.82.192/26 of node n2 (0 addresses in use): ";
        assert!(texts[0].starts_with(first), "{}", texts[0]);
        assert!(
            texts[1].starts_with("IPAMBlock 10.244.82.240/28 of node n3"),
            "{}",
            texts[1]
        );
    }

    #[test]
    fn a_block_that_is_being_deleted_is_ignored() {
        let mut spec = block("10.0.0.0/24", "n1").spec().clone();
        spec.deleted = true;
        assert_eq!(
            overlaps(&[Block::parse(spec).unwrap(), block("10.0.0.0/26", "n2")]),
            [""; 0]
        );
    }

    #[test]
    fn what_does_not_fit_together_is_reported() {
        let mut taken = block("10.0.0.0/28", "n1");
        let attribute = AllocationAttribute {
            handle_id: Some("h".to_owned()),
            ..Default::default()
        };
        let address = taken.assign(&attribute, |_| false).unwrap();
        let pod = |text: &str| PodFacts {
            addresses: [text.parse().unwrap()].into(),
            ..PodFacts::default()
        };
        let handle = |blocks: &[&str]| Handle {
            name: "h".to_owned(),
            id: "h".to_owned(),
            node: None,
            blocks: blocks.iter().map(|text| text.parse().unwrap()).collect(),
            version: "1".to_owned(),
        };
        let affinity = |cidr: &str| Affinity {
            name: cidr.to_owned(),
            node: "n1".to_owned(),
            cidr: cidr.parse().unwrap(),
            deleted: false,
            version: "1".to_owned(),
        };
        let sound = IpamState {
            pods: [
                ("x/a".to_owned(), pod(&address.to_string())),
                ("x/host".to_owned(), pod("192.0.2.1")),
            ]
            .into(),
            blocks: vec![taken],
            affinities: vec![affinity("10.0.0.0/28")],
            handles: vec![handle(&["10.0.0.0/28"])],
            pools: Some(vec!["10.0.0.0/24".parse().unwrap()]),
            ..IpamState::default()
        };
        assert_eq!(inconsistencies(&sound), [""; 0]);
        let broken = IpamState {
            pods: [("x/b".to_owned(), pod("10.1.0.9"))].into(),
            affinities: vec![affinity("10.0.0.16/28")],
            handles: vec![handle(&["10.0.0.16/28"])],
            pools: Some(vec!["10.1.0.0/24".parse().unwrap()]),
            ..sound
        };
        assert_eq!(
            inconsistencies(&broken),
            [
                "IPAMBlock 10.0.0.0/28 of node n1 has no BlockAffinity".to_owned(),
                "IPAMBlock 10.0.0.0/28 is in no IPPool".to_owned(),
                format!("IPAMHandle h of address {address} does not list IPAMBlock 10.0.0.0/28"),
                "BlockAffinity of node n1 has no IPAMBlock 10.0.0.16/28 of that node".to_owned(),
                "IPAMHandle h lists IPAMBlock 10.0.0.16/28, which has no address of it".to_owned(),
                "address 10.1.0.9 of pod x/b is assigned in no IPAMBlock".to_owned(),
            ]
        );
    }
}
