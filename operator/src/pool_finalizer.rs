//! Keeps pools that are deleted while their addresses are in use until their last block is gone, by
//! Calico's finalizer: their routes and tunnels stay, and no new addresses are assigned from them.
//! With the newer storage only, like Calico.
//!
//! There are many blocks, so they are watched only while a pool is being deleted, and only their
//! names are kept, which encode their ranges.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt;
use ipnet::IpNet;
use kube::api::{Api, DynamicObject};
use kube::core::PartialObjectMeta;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use margay_api::ipam::names;
use margay_api::storage::{Kind, Mode};
use tokio::sync::watch;
use tracing::warn;

use crate::inputs::PoolFacts;

/// Finalizer of Calico's kube-controllers.
pub const FINALIZER: &str = "projectcalico.org/ippool-finalizer";

/// Ranges of all blocks; none while they are not watched or not listed yet.
pub type BlockRanges = Option<Arc<BTreeSet<IpNet>>>;

/// Objects of which only the metadata is read.
type Metadata = PartialObjectMeta<DynamicObject>;

/// A change of a pool's finalizers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinalizerChange {
    /// Name of the pool.
    pub pool: String,
    /// Version of the pool that the change is based on.
    pub version: String,
    /// All finalizers of the pool after the change.
    pub finalizers: Vec<String>,
}

/// Returns the changes of finalizers. `shadowed` are pools whose range another pool serves, so that
/// blocks there do not keep them. While nothing is installed the finalizer is removed, because no
/// operator may be left to remove it later.
pub fn plan(
    pools: &[PoolFacts],
    shadowed: &BTreeSet<String>,
    blocks: Option<&BTreeSet<IpNet>>,
    is_installed: bool,
) -> Vec<FinalizerChange> {
    let change = |pool: &PoolFacts| {
        let has = has_finalizer(pool);
        let wants = is_installed
            && match pool.terminating {
                // The API refuses new finalizers on an object that is being deleted.
                true => has && blocks.is_none_or(|blocks| count_blocks(pool, blocks) > 0),
                false => !shadowed.contains(&pool.name),
            };
        let others = pool
            .finalizers
            .iter()
            .filter(|finalizer| *finalizer != FINALIZER)
            .cloned();
        let own = wants.then(|| FINALIZER.to_owned());
        (has != wants).then(|| FinalizerChange {
            pool: pool.name.clone(),
            version: pool.version.clone(),
            finalizers: others.chain(own).collect(),
        })
    };
    pools.iter().filter_map(change).collect()
}

/// Returns the number of blocks in the pool's range.
pub fn count_blocks(pool: &PoolFacts, blocks: &BTreeSet<IpNet>) -> usize {
    let range: Option<IpNet> = pool.cidr().parse().ok();
    range.map_or(0, |range| {
        blocks.iter().filter(|block| range.contains(*block)).count()
    })
}

/// Returns true when a pool is being deleted, so that blocks must be watched.
pub fn needs_blocks(pools: &[PoolFacts]) -> bool {
    pools
        .iter()
        .any(|pool| pool.terminating && has_finalizer(pool))
}

fn has_finalizer(pool: &PoolFacts) -> bool {
    pool.finalizers
        .iter()
        .any(|finalizer| finalizer == FINALIZER)
}

/// Watches blocks while `wanted` is true. Ends with the sender of `wanted`.
pub async fn watch_blocks(
    client: Client,
    mode: Mode,
    mut wanted: watch::Receiver<bool>,
    blocks: watch::Sender<BlockRanges>,
) {
    let kind = Kind::of("IPAMBlock").expect("a kind of Calico");
    let api: Api<Metadata> = Api::all_with(client, &kind.resource(mode));
    while wanted.wait_for(|wanted| *wanted).await.is_ok() {
        tokio::select! {
            () = follow_events(api.clone(), &blocks) => {}
            _ = wanted.wait_for(|wanted| !wanted) => {}
        }
        blocks.send_replace(None);
    }
}

async fn follow_events(api: Api<Metadata>, blocks: &watch::Sender<BlockRanges>) {
    let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
    let (mut known, mut listed) = (BTreeSet::new(), BTreeSet::new());
    while let Some(event) = events.next().await {
        let is_changed = match event {
            Ok(watcher::Event::Init) => {
                listed.clear();
                false
            }
            Ok(watcher::Event::InitApply(block)) => {
                listed.extend(names::block_range(&block.name_any()));
                false
            }
            Ok(watcher::Event::InitDone) => {
                known = std::mem::take(&mut listed);
                true
            }
            Ok(watcher::Event::Apply(block)) => {
                names::block_range(&block.name_any()).is_some_and(|range| known.insert(range))
            }
            Ok(watcher::Event::Delete(block)) => {
                names::block_range(&block.name_any()).is_some_and(|range| known.remove(&range))
            }
            Err(error) => {
                warn!(%error, "watch of blocks interrupted, retrying");
                false
            }
        };
        if is_changed {
            blocks.send_replace(Some(Arc::new(known.clone())));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pool(name: &str, finalizers: &[&str], terminating: bool) -> PoolFacts {
        PoolFacts {
            name: name.to_owned(),
            spec: json!({ "cidr": "10.0.0.0/24" }),
            version: "7".to_owned(),
            finalizers: finalizers.iter().map(|text| (*text).to_owned()).collect(),
            terminating,
            ..PoolFacts::default()
        }
    }

    /// Returns the pool's new finalizers, if they change.
    fn change(
        pool: PoolFacts,
        shadowed: bool,
        blocks: Option<&[&str]>,
        is_installed: bool,
    ) -> Option<Vec<String>> {
        let shadowed = shadowed.then(|| pool.name.clone()).into_iter().collect();
        let blocks = blocks.map(|blocks| blocks.iter().map(|text| text.parse().unwrap()).collect());
        let mut changes = plan(&[pool], &shadowed, blocks.as_ref(), is_installed);
        assert!(changes.iter().all(|change| change.version == "7"));
        changes.pop().map(|change| change.finalizers)
    }

    /// Finalizers or ranges; none: unchanged, or not known.
    type Names<'a> = Option<&'a [&'a str]>;

    #[test]
    fn a_pool_is_kept_until_its_last_block_is_gone() {
        let inside: Names<'_> = Some(&["10.0.0.64/26", "10.1.0.0/26"]);
        let outside: Names<'_> = Some(&["10.1.0.0/26"]);
        let own = [FINALIZER];
        let both = ["other.org/a", FINALIZER];
        // Name, pool, shadowed, blocks, installed, and the new finalizers.
        let table: [(&str, PoolFacts, bool, Names<'_>, bool, Names<'_>); 12] = [
            (
                "a new pool gets it",
                pool("p", &[], false),
                false,
                None,
                true,
                Some(&own),
            ),
            (
                "in addition to others",
                pool("p", &["other.org/a"], false),
                false,
                None,
                true,
                Some(&both),
            ),
            (
                "and keeps it",
                pool("p", &own, false),
                false,
                outside,
                true,
                None,
            ),
            (
                "a shadowed pool loses it",
                pool("p", &own, false),
                true,
                inside,
                true,
                Some(&[]),
            ),
            (
                "and does not get it",
                pool("p", &[], false),
                true,
                inside,
                true,
                None,
            ),
            (
                "while blocks are left",
                pool("p", &own, true),
                false,
                inside,
                true,
                None,
            ),
            (
                "while blocks are not known",
                pool("p", &own, true),
                false,
                None,
                true,
                None,
            ),
            (
                "until none is left",
                pool("p", &both, true),
                false,
                outside,
                true,
                Some(&["other.org/a"]),
            ),
            (
                "the API would refuse it",
                pool("p", &["other.org/a"], true),
                false,
                inside,
                true,
                None,
            ),
            (
                "nothing is installed",
                pool("p", &both, false),
                false,
                None,
                false,
                Some(&["other.org/a"]),
            ),
            (
                "nor ever was",
                pool("p", &[], false),
                false,
                None,
                false,
                None,
            ),
            (
                "nothing is installed, deletion has begun",
                pool("p", &own, true),
                false,
                inside,
                false,
                Some(&[]),
            ),
        ];
        for (what, pool, shadowed, blocks, is_installed, wanted) in table {
            let wanted =
                wanted.map(|wanted| wanted.iter().map(|text| (*text).to_owned()).collect());
            assert_eq!(
                change(pool, shadowed, blocks, is_installed),
                wanted,
                "{what}"
            );
        }
        assert!(needs_blocks(&[pool("p", &own, true)]));
        assert!(!needs_blocks(&[
            pool("p", &own, false),
            pool("q", &["other.org/a"], true)
        ]));
    }
}
