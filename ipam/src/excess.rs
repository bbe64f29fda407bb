//! Nodes with more blocks than `maxBlocksPerHost` allows: the limit has been lowered, or somebody
//! else has claimed some. Blocks with addresses are not taken from a node, so it is reported.

use std::collections::BTreeMap;

use ipnet::IpNet;
use margay_api::ipam::limits::Limits;
use margay_api::rule::IpVersion;

use super::inputs::Inputs;
use super::pools::{self, NodePool};

/// Calls `report` at first and on each change of the inputs with the problem, or with `None`, until
/// the inputs end.
pub async fn watch(node: String, mut inputs: Inputs, report: impl Fn(Option<&str>)) {
    loop {
        let (map, pools) = (
            inputs.map.borrow_and_update().clone(),
            inputs.pools.borrow_and_update().clone(),
        );
        let limits = inputs.limits.borrow_and_update().clone();
        if let (Some(map), Some(pools), Some(limits)) = (map, pools, limits) {
            report(find(&node, &map, &pools, &limits).as_deref());
        }
        let changed = tokio::select! {
            changed = inputs.map.changed() => changed,
            changed = inputs.pools.changed() => changed,
            changed = inputs.limits.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
    }
}

/// The problem, of both IP versions if need be. Blocks that cannot serve the node do not count, as
/// in its claims.
fn find(
    node: &str,
    map: &BTreeMap<IpNet, String>,
    pools: &[NodePool],
    limits: &Limits,
) -> Option<String> {
    let own = || {
        map.iter()
            .filter(|(cidr, owner)| *owner == node && pools::can_serve(pools, **cidr))
    };
    let count = |version| {
        own()
            .filter(|(cidr, _)| IpVersion::of(cidr.addr()) == version)
            .count()
    };
    let texts: Vec<String> = IpVersion::ALL
        .into_iter()
        .filter_map(|version| limits.excess(node, version, count(version)))
        .collect();
    (!texts.is_empty()).then(|| texts.join("; "))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::{mpsc, watch};

    use super::*;

    fn pool(cidr: &str, selected: bool) -> NodePool {
        NodePool {
            name: cidr.to_owned(),
            cidr: cidr.parse().unwrap(),
            block_size: if cidr.contains(':') { 122 } else { 26 },
            manual: false,
            selected,
            namespaces: None,
            workloads: true,
            tunnels: true,
            closed: None,
            is_terminating: false,
        }
    }

    #[tokio::test]
    async fn more_blocks_than_the_limit_allows_are_reported_until_they_are_not() {
        let blocks = |cidrs: &[(&str, &str)]| {
            let pairs = cidrs
                .iter()
                .map(|(cidr, node)| (cidr.parse::<IpNet>().unwrap(), (*node).to_owned()));
            Some(Arc::new(pairs.collect::<BTreeMap<_, _>>()))
        };
        let of_n1 = [
            ("10.0.0.0/26", "n1"),
            ("10.0.0.64/26", "n1"),
            ("10.0.0.128/26", "n2"),
            ("10.9.0.0/26", "n1"),
            ("10.8.0.0/26", "n1"),
            ("fd00::/122", "n1"),
            ("fd00::40/122", "n1"),
        ];
        let pools = vec![
            pool("10.0.0.0/16", true),
            pool("10.9.0.0/16", false),
            pool("fd00::/64", true),
        ];
        let limit = |max_blocks| {
            Some(Arc::new(Limits {
                max_blocks,
                ..Limits::default()
            }))
        };
        let (map, map_seen) = watch::channel(blocks(&of_n1));
        let (_pools, pools_seen) = watch::channel(Some(Arc::new(pools)));
        let (limits, limits_seen) = watch::channel(limit(2));
        let (sender, mut reports) = mpsc::unbounded_channel();
        let report = move |problem: Option<&str>| sender.send(problem.map(str::to_owned)).unwrap();
        let inputs = Inputs {
            map: map_seen,
            pools: pools_seen,
            limits: limits_seen,
            no_namespace_names_pools: watch::channel(false).1,
        };
        let watching = tokio::spawn(watch("n1".to_owned(), inputs, report));
        assert_eq!(
            reports.recv().await,
            Some(None),
            "two that serve it of each version"
        );
        limits.send_replace(limit(1));
        let problem = reports.recv().await.flatten().expect("a problem");
        for part in [
            "node n1 has 2 blocks of IPv4",
            "2 blocks of IPv6",
            "maxBlocksPerHost",
            "raise the limit",
        ] {
            assert!(problem.contains(part), "{problem}");
        }
        map.send_replace(blocks(&of_n1[1..6]));
        assert_eq!(
            reports.recv().await,
            Some(None),
            "one of each version is left"
        );
        drop((map, limits));
        watching.await.expect("it ends with its inputs");
    }
}
