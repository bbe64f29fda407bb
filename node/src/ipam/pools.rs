//! Which pools this node may use, kept up to date by a watch of IPPools.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::TryStreamExt;
use ipnet::IpNet;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use margay_api::meta::Labels;
use margay_api::selector::Selector;
use margay_api::v3::IPPool;
use margay_api::v3::pool::IPPoolSpec;
use tokio::sync::watch;

use super::allocator::Pools;
use super::store::UsablePool;

/// Block sizes of a pool that names none.
const BLOCK_SIZE_V4: u8 = 26;
const BLOCK_SIZE_V6: u8 = 122;
/// Bits of the addresses in the largest block: 4096 of them.
const LARGEST_BLOCK: u8 = 12;

/// Starts the watch. The first value is empty until the pools have been listed; `labels` are the node's own.
pub fn watch(client: Client, labels: watch::Receiver<Labels>) -> watch::Receiver<Pools> {
    let (sender, receiver) = watch::channel(Pools::default());
    tokio::spawn(run(Api::all(client), labels, sender));
    receiver
}

async fn run(api: Api<IPPool>, mut labels: watch::Receiver<Labels>, sender: watch::Sender<Pools>) {
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    let mut known = None::<BTreeMap<String, IPPoolSpec>>;
    let mut listed = BTreeMap::new();
    loop {
        tokio::select! {
            event = events.try_next() => match event {
                Ok(Some(watcher::Event::Init)) => listed.clear(),
                Ok(Some(watcher::Event::InitApply(pool))) => drop(listed.insert(name(&pool), pool.spec)),
                Ok(Some(watcher::Event::InitDone)) => known = Some(std::mem::take(&mut listed)),
                Ok(Some(watcher::Event::Apply(pool))) => drop(known.get_or_insert_default().insert(name(&pool), pool.spec)),
                Ok(Some(watcher::Event::Delete(pool))) => drop(known.get_or_insert_default().remove(&name(&pool))),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "watch of IPPools; what is known stays in use");
                    continue;
                }
            },
            changed = labels.changed() => if changed.is_err() { return },
        }
        let labels = labels.borrow_and_update();
        let pools = known.as_ref().map(|known| Arc::new(usable(known, &labels)));
        drop(labels);
        sender.send_if_modified(|present| {
            let differs = *present != pools;
            *present = pools;
            differs
        });
    }
}

fn name(pool: &IPPool) -> String {
    pool.metadata.name.clone().unwrap_or_default()
}

/// Those of the pools that a node with these labels may use for workloads. A pool with a selector that does not parse serves nobody.
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
        let is_usable = !spec.disabled.unwrap_or(false) && for_workloads && selector.matches(labels);
        is_usable.then(|| UsablePool {
            name: name.clone(),
            cidr: cidr.trunc(),
            block_size,
            manual: spec.assignment_mode.as_deref() == Some("Manual"),
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
        let found: Vec<(String, bool)> =
            usable(&pools, &labels).into_iter().map(|pool| (pool.name, pool.manual)).collect();
        assert_eq!(
            found,
            [("default", false), ("here", false), ("manual", true), ("six", false)]
                .map(|(name, manual)| (name.to_owned(), manual))
        );
    }
}
