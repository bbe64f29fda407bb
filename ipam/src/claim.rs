//! Claiming a new block: affinity pending, block, affinity confirmed, as Calico does it, so that two nodes can never both believe in a block.
//!
//! [`try_claim`] is the only way to a new block, whoever asks: no block is made but a `blockSize` subnet of a pool that takes new ones, and none
//! that has addresses in common with another block.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::future::try_join_all;
use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::search::candidates;
use margay_api::meta::{ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6};
use margay_api::rule::IpVersion;

use super::known::{Blocks, Heed, parents};
use super::node_objects::{NodeObjects, Stored};
use super::pools::{Choice, LARGEST_BLOCK, NodePool, Use};
use super::request::NoAddress;
use super::store::{AffinityState, Store, StoreError};

/// Blocks that somebody else turns out to have, before giving up. What the cluster knows of blocks lags by milliseconds, so a few are normal.
const COLLISIONS: usize = 100;

/// What a claim stands on.
#[derive(Clone, Debug)]
pub(super) struct Ground {
    /// Who claims.
    pub(super) node: String,
    /// All pools.
    pub(super) pools: Arc<Vec<NodePool>>,
    /// Blocks that are known.
    pub(super) known: Blocks,
    /// The time, in RFC 3339.
    pub(super) now: String,
}

impl Ground {
    /// Pools of an IP version that serve the choice, in order.
    pub(super) fn serving<'a>(&'a self, version: IpVersion, choice: &'a Choice) -> impl Iterator<Item = &'a NodePool> {
        self.pools.iter().filter(move |pool| IpVersion::of(pool.cidr.addr()) == version && pool.serves(choice))
    }

    /// Whether a block of the range may be made, as far as is known.
    fn allows(&self, cidr: IpNet) -> bool {
        let is_block = self.pools.iter().any(|pool| pool.closed.is_none() && pool.has_block(cidr));
        is_block && self.known.overlapping(cidr).is_empty()
    }
}

/// What is claimed for.
pub(super) struct Want {
    /// IP version.
    pub(super) version: IpVersion,
    /// Which pools it may be of.
    pub(super) choice: Choice,
    /// What is heeded.
    pub(super) heed: Heed,
}

/// Claims the first free block in this node's order.
pub(super) async fn claim<S: Store>(
    store: &NodeObjects<S>,
    ground: &Ground,
    want: &Want,
) -> Result<Stored<Block>, NoAddress> {
    let unavailable =
        |error: StoreError| NoAddress::Unavailable(format!("IPAM block claim: {error}; the runtime will try again"));
    let pools: Vec<&NodePool> = ground.serving(want.version, &want.choice).collect();
    if pools.is_empty() {
        return Err(no_pool(Some(want.version), &want.choice, &ground.pools));
    }
    let mut collisions = 0;
    for pool in &pools {
        for cidr in candidates(pool.cidr, pool.block_size, &ground.node) {
            if ground.known.contains(&cidr) || !ground.allows(cidr) || is_reserved(&want.heed, cidr) {
                continue;
            }
            match try_claim(store, ground, cidr).await.map_err(unavailable)? {
                Some(block) => return Ok(block),
                None if collisions < COLLISIONS => collisions += 1,
                None => {
                    return Err(NoAddress::Unavailable(format!(
                        "{COLLISIONS} blocks were taken by other nodes at the same time; the runtime will try again"
                    )));
                }
            }
        }
    }
    let names: Vec<String> = pools.iter().map(|pool| format!("{} ({})", pool.name, pool.cidr)).collect();
    Err(NoAddress::Exhausted(format!("every block of pool {} is taken", names.join(", "))))
}

/// The one guard before a block is made. `None`: the block, or one that has addresses in common with it, is somebody else's.
///
/// Of what the view may not have told yet, larger blocks around this one are looked for by name. Two nodes that make the same block at the same time
/// are told apart by its creation, which only one of them can do.
pub(super) async fn try_claim<S: Store>(
    store: &NodeObjects<S>,
    ground: &Ground,
    cidr: IpNet,
) -> Result<Option<Stored<Block>>, StoreError> {
    if !ground.allows(cidr) || has_larger(store, cidr).await? {
        return Ok(None);
    }
    store.put_affinity(cidr, AffinityState::Pending).await?;
    let block = match store.create_block(Block::new(cidr, &ground.node, ground.now.clone())).await {
        Ok(block) => block,
        Err(StoreError::Conflict) => match store.block(cidr).await? {
            Some(block) if block.value.node() == Some(ground.node.as_str()) => block,
            _ => {
                store.delete_affinity(cidr).await?;
                return Ok(None);
            }
        },
        Err(error) => return Err(error),
    };
    store.put_affinity(cidr, AffinityState::Confirmed).await?;
    Ok(Some(block))
}

async fn has_larger<S: Store>(store: &NodeObjects<S>, cidr: IpNet) -> Result<bool, StoreError> {
    let found = try_join_all(possible(parents(cidr)).map(|parent| store.block(parent))).await?;
    Ok(found.iter().any(Option::is_some))
}

/// Those of the ranges that are small enough to be blocks.
pub(super) fn possible(ranges: impl Iterator<Item = IpNet>) -> impl Iterator<Item = IpNet> {
    ranges.filter(|range| range.prefix_len() >= range.max_prefix_len() - LARGEST_BLOCK)
}

/// Whether the reservations leave nothing of the block.
fn is_reserved(heed: &Heed, cidr: IpNet) -> bool {
    let touches = |range: &IpNet| range.contains(&cidr) || cidr.contains(range);
    heed.limits.reserved.iter().any(touches)
        && Block::new(cidr, "", String::new()).available(|address| heed.limits.is_reserved(address)) == 0
}

/// `version`: none when any would have done.
pub(super) fn no_pool(version: Option<IpVersion>, choice: &Choice, pools: &[NodePool]) -> NoAddress {
    let of_version = |pool: &&NodePool| version.is_none_or(|version| IpVersion::of(pool.cidr.addr()) == version);
    let reasons: BTreeSet<String> = pools
        .iter()
        .filter(of_version)
        .filter_map(|pool| Some(format!("{} {}", pool.name, pool.refusal(choice)?)))
        .collect();
    let whose = match choice.usage {
        Use::Workload => "this pod",
        Use::Tunnel => "the tunnel of this node",
    };
    let of = version.map_or("", |version| match version {
        IpVersion::V4 => " of IPv4",
        IpVersion::V6 => " of IPv6",
    });
    let why = match reasons.len() {
        0 => "there is none".to_owned(),
        _ => reasons.into_iter().collect::<Vec<_>>().join("; "),
    };
    NoAddress::Exhausted(format!("no IPPool{of} may be used for {whose}: {why}; add or correct one"))
}

/// A pool that a request names, and that it cannot have.
pub(super) fn unknown_pool(version: IpVersion, name: &str, why: Option<&str>) -> NoAddress {
    let (of, field, annotation) = match version {
        IpVersion::V4 => ("IPv4", "ipv4_pools", ANNOTATION_POD_POOLS_V4),
        IpVersion::V6 => ("IPv6", "ipv6_pools", ANNOTATION_POD_POOLS_V6),
    };
    let why = why.map_or_else(|| format!("does not exist, or is not of {of}"), str::to_owned);
    NoAddress::Refused(format!(
        "IPPool {name:?} {why}; correct the pool, or the place that names it: annotation {annotation} of the pod or of its Namespace, or {field} of the \
         network configuration"
    ))
}
