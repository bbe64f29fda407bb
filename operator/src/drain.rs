//! Pools that are deleted while addresses of theirs are in use stay until their last block is gone, by Calico's finalizer: their packets travel as ever, and
//! nothing new is taken from them. Calico has it in the newer storage only, and so has this.
//!
//! Blocks are many, so they are watched only while a pool is being deleted, and only their names are kept, which are their ranges.

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

/// The finalizer, of Calico's kube-controllers.
pub const FINALIZER: &str = "projectcalico.org/ippool-finalizer";

/// Ranges of all blocks; none while they are not followed or not listed yet.
pub type Blocks = Option<Arc<BTreeSet<IpNet>>>;

/// Objects of which nothing is read but their metadata.
type Names = PartialObjectMeta<DynamicObject>;

/// A pool that is to have these finalizers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finalizers {
    /// Name of the pool.
    pub pool: String,
    /// Its version when that was decided.
    pub version: String,
    /// All of them.
    pub finalizers: Vec<String>,
}

/// Pools whose finalizers are to change. `shadowed` are those whose ranges another one has, so that blocks there are no reason to keep them; while nothing is
/// installed there is none, because nobody would be left to take it away.
pub fn plan(
    pools: &[PoolFacts],
    shadowed: &BTreeSet<String>,
    blocks: Option<&BTreeSet<IpNet>>,
    is_installed: bool,
) -> Vec<Finalizers> {
    let change = |pool: &PoolFacts| {
        let has = holds(pool);
        let wants = is_installed
            && match pool.terminating {
                // Nobody may add one then.
                true => has && blocks.is_none_or(|blocks| left(pool, blocks) > 0),
                false => !shadowed.contains(&pool.name),
            };
        let others = pool.finalizers.iter().filter(|finalizer| *finalizer != FINALIZER).cloned();
        let own = wants.then(|| FINALIZER.to_owned());
        (has != wants).then(|| Finalizers {
            pool: pool.name.clone(),
            version: pool.version.clone(),
            finalizers: others.chain(own).collect(),
        })
    };
    pools.iter().filter_map(change).collect()
}

/// How many of the blocks are of the pool's range.
pub fn left(pool: &PoolFacts, blocks: &BTreeSet<IpNet>) -> usize {
    let range: Option<IpNet> = pool.cidr().parse().ok();
    range.map_or(0, |range| blocks.iter().filter(|block| range.contains(*block)).count())
}

/// Whether blocks have to be known.
pub fn is_waiting(pools: &[PoolFacts]) -> bool {
    pools.iter().any(|pool| pool.terminating && holds(pool))
}

fn holds(pool: &PoolFacts) -> bool {
    pool.finalizers.iter().any(|finalizer| finalizer == FINALIZER)
}

/// Follows blocks while `wanted`. Ends with whoever wants them.
pub async fn follow(client: Client, mode: Mode, mut wanted: watch::Receiver<bool>, blocks: watch::Sender<Blocks>) {
    let kind = Kind::of("IPAMBlock").expect("a kind of Calico");
    let api: Api<Names> = Api::all_with(client, &kind.resource(mode));
    while wanted.wait_for(|wanted| *wanted).await.is_ok() {
        tokio::select! {
            () = stream(api.clone(), &blocks) => {}
            _ = wanted.wait_for(|wanted| !wanted) => {}
        }
        blocks.send_replace(None);
    }
}

async fn stream(api: Api<Names>, blocks: &watch::Sender<Blocks>) {
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
                warn!(%error, "watch of blocks interrupted, trying again");
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

    /// The finalizers that the pool gets, if others than it has.
    fn change(pool: PoolFacts, shadowed: bool, blocks: Option<&[&str]>, is_installed: bool) -> Option<Vec<String>> {
        let shadowed = shadowed.then(|| pool.name.clone()).into_iter().collect();
        let blocks = blocks.map(|blocks| blocks.iter().map(|text| text.parse().unwrap()).collect());
        let mut changes = plan(&[pool], &shadowed, blocks.as_ref(), is_installed);
        assert!(changes.iter().all(|change| change.version == "7"));
        changes.pop().map(|change| change.finalizers)
    }

    #[test]
    fn a_pool_is_kept_until_its_last_block_is_gone() {
        let inside: Option<&[&str]> = Some(&["10.0.0.64/26", "10.1.0.0/26"]);
        let outside: Option<&[&str]> = Some(&["10.1.0.0/26"]);
        let own = [FINALIZER];
        let both = ["other.org/a", FINALIZER];
        // The pool, whether another one has its range, the blocks, whether anything is installed; and what comes of it.
        let table: [(&str, PoolFacts, bool, Option<&[&str]>, bool, Option<&[&str]>); 12] = [
            ("a new one gets it", pool("p", &[], false), false, None, true, Some(&own)),
            ("beside those of others", pool("p", &["other.org/a"], false), false, None, true, Some(&both)),
            ("and keeps it", pool("p", &own, false), false, outside, true, None),
            ("not for others' blocks", pool("p", &own, false), true, inside, true, Some(&[])),
            ("nor gets it for them", pool("p", &[], false), true, inside, true, None),
            ("while blocks are left", pool("p", &own, true), false, inside, true, None),
            ("while they are not known", pool("p", &own, true), false, None, true, None),
            ("until none is left", pool("p", &both, true), false, outside, true, Some(&["other.org/a"])),
            ("too late", pool("p", &["other.org/a"], true), false, inside, true, None),
            ("nothing is installed", pool("p", &both, false), false, None, false, Some(&["other.org/a"])),
            ("nor was", pool("p", &[], false), false, None, false, None),
            ("and it is being deleted", pool("p", &own, true), false, inside, false, Some(&[])),
        ];
        for (what, pool, shadowed, blocks, is_installed, wanted) in table {
            let wanted = wanted.map(|wanted| wanted.iter().map(|text| (*text).to_owned()).collect());
            assert_eq!(change(pool, shadowed, blocks, is_installed), wanted, "{what}");
        }
        assert!(is_waiting(&[pool("p", &own, true)]));
        assert!(!is_waiting(&[pool("p", &own, false), pool("q", &["other.org/a"], true)]));
    }
}
