//! Which pools this node may use, kept up to date by a watch of IPPools.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use kube::Client;
use margay_api::meta::Labels;
use margay_api::selector::Selector;
use margay_api::storage::Mode;
use margay_api::v3::IPPool;
use margay_api::v3::pool::IPPoolSpec;
use tokio::sync::watch;

use super::allocator::Pools;
use super::collection::{Collection, Listed};
use super::store::UsablePool;

/// Block sizes of a pool that names none.
const BLOCK_SIZE_V4: u8 = 26;
const BLOCK_SIZE_V6: u8 = 122;
/// Bits of the addresses in the largest block: 4096 of them.
const LARGEST_BLOCK: u8 = 12;

/// Starts the watch. There are none until they have been listed and the node's own `labels` are known.
pub fn watch(client: &Client, mode: Mode, labels: watch::Receiver<Option<Labels>>) -> watch::Receiver<Pools> {
    let (sender, receiver) = watch::channel(Pools::default());
    tokio::spawn(run(Collection::new(client, mode, "IPPool").follow(), labels, sender));
    receiver
}

async fn run(
    mut listed: watch::Receiver<Listed<IPPool>>,
    mut labels: watch::Receiver<Option<Labels>>,
    sender: watch::Sender<Pools>,
) {
    loop {
        let changed = tokio::select! {
            changed = listed.changed() => changed,
            changed = labels.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        let known = listed.borrow_and_update().clone();
        let labels = labels.borrow_and_update().clone();
        let pools = known.zip(labels).map(|(known, labels)| {
            let specs = known.iter().map(|(name, pool)| (name.clone(), pool.spec.clone())).collect();
            Arc::new(usable(&specs, &labels))
        });
        sender.send_if_modified(|present| {
            let differs = *present != pools;
            *present = pools;
            differs
        });
    }
}

/// Those of the pools that workloads may use, and whether a node with these labels is meant. A pool with a selector that does not parse serves
/// nobody.
pub fn usable(pools: &BTreeMap<String, IPPoolSpec>, labels: &Labels) -> Vec<UsablePool> {
    let usable = |(name, spec): (&String, &IPPoolSpec)| {
        let cidr: IpNet = spec.cidr.parse().ok()?;
        let selector = Selector::parse(spec.node_selector.as_deref().unwrap_or("all()")).ok()?;
        let for_workloads =
            spec.allowed_uses.as_ref().is_none_or(|uses| uses.is_empty() || uses.iter().any(|used| used == "Workload"));
        let default = if cidr.addr().is_ipv4() { BLOCK_SIZE_V4 } else { BLOCK_SIZE_V6 };
        let block_size = spec.block_size.map_or(Some(default), |size| u8::try_from(size).ok()).filter(|size| {
            (cidr.max_prefix_len() - LARGEST_BLOCK..=cidr.max_prefix_len()).contains(size) && *size >= cidr.prefix_len()
        })?;
        let is_usable = !spec.disabled.unwrap_or(false) && for_workloads;
        is_usable.then(|| UsablePool {
            name: name.clone(),
            cidr: cidr.trunc(),
            block_size,
            manual: spec.assignment_mode.as_deref() == Some("Manual"),
            selected: selector.matches(labels),
        })
    };
    pools.iter().filter_map(usable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_serves_where_its_selector_and_its_uses_allow() {
        let spec = |change: fn(&mut IPPoolSpec)| {
            let mut spec = IPPoolSpec { cidr: "10.0.0.0/16".to_owned(), ..IPPoolSpec::default() };
            change(&mut spec);
            spec
        };
        let pools = BTreeMap::from([
            ("default".to_owned(), spec(|_| {})),
            ("disabled".to_owned(), spec(|spec| spec.disabled = Some(true))),
            ("elsewhere".to_owned(), spec(|spec| spec.node_selector = Some("rack == 'two'".to_owned()))),
            ("here".to_owned(), spec(|spec| spec.node_selector = Some("rack == 'one'".to_owned()))),
            ("manual".to_owned(), spec(|spec| spec.assignment_mode = Some("Manual".to_owned()))),
            (
                "huge".to_owned(),
                IPPoolSpec { cidr: "fd00::/48".to_owned(), block_size: Some(64), ..IPPoolSpec::default() },
            ),
            ("six".to_owned(), IPPoolSpec { cidr: "fd01::/48".to_owned(), ..IPPoolSpec::default() }),
            ("tiny".to_owned(), spec(|spec| spec.block_size = Some(12))),
            ("tunnels".to_owned(), spec(|spec| spec.allowed_uses = Some(vec!["Tunnel".to_owned()]))),
            ("wrong".to_owned(), spec(|spec| spec.node_selector = Some("rack ==".to_owned()))),
        ]);
        let labels = Labels::from([("rack".to_owned(), "one".to_owned())]);
        let found: Vec<(String, bool, bool)> =
            usable(&pools, &labels).into_iter().map(|pool| (pool.name, pool.manual, pool.selected)).collect();
        assert_eq!(
            found,
            [
                ("default", false, true),
                ("elsewhere", false, false),
                ("here", false, true),
                ("manual", true, true),
                ("six", false, true)
            ]
            .map(|(name, manual, selected)| (name.to_owned(), manual, selected))
        );
    }
}
