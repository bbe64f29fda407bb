//! Claims of new blocks, in Calico's order: affinity pending, block, affinity confirmed. So no two
//! nodes ever both believe that a block is theirs.
//!
//! [`try_claim`] is the only way to a new block: each is a `blockSize` subnet of a pool that may be
//! assigned from, and overlaps no other block.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::future::try_join_all;
use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::search::candidates;
use margay_api::meta::{ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6};
use margay_api::rule::IpVersion;

use super::constraints::{Constraints, KnownBlocks, parents};
use super::node_objects::{NodeObjects, Stored};
use super::pools::{LARGEST_BLOCK, NodePool, PoolChoice, Use};
use super::request::NoAddress;
use super::store::{AffinityState, Store, StoreError};

/// Maximum number of blocks of one claim that turn out to be another node's. The map of blocks lags
/// by milliseconds, so a few are normal.
const COLLISIONS: usize = 100;

/// State that a claim is based on.
#[derive(Clone, Debug)]
pub(super) struct ClaimContext {
    /// Name of the node.
    pub(super) node: String,
    /// All pools.
    pub(super) pools: Arc<Vec<NodePool>>,
    /// Blocks that are known.
    pub(super) known: KnownBlocks,
    /// The time, in RFC 3339.
    pub(super) now: String,
}

impl ClaimContext {
    /// Pools of an IP version that serve the choice, in order.
    pub(super) fn serving<'a>(
        &'a self,
        version: IpVersion,
        choice: &'a PoolChoice,
    ) -> impl Iterator<Item = &'a NodePool> {
        self.pools
            .iter()
            .filter(move |pool| IpVersion::of(pool.cidr.addr()) == version && pool.serves(choice))
    }

    /// Returns true when a block of the range may be created, as far as is known.
    fn allows(&self, cidr: IpNet) -> bool {
        let is_block = self
            .pools
            .iter()
            .any(|pool| pool.closed.is_none() && pool.has_block(cidr));
        is_block && self.known.overlapping(cidr).is_empty()
    }
}

/// Demand for a block.
pub(super) struct ClaimRequest {
    /// IP version.
    pub(super) version: IpVersion,
    /// Pools that it may come from.
    pub(super) choice: PoolChoice,
    /// Limits and reservations.
    pub(super) constraints: Constraints,
}

/// Claims the first free block in this node's order of search.
pub(super) async fn claim<S: Store>(
    store: &NodeObjects<S>,
    context: &ClaimContext,
    want: &ClaimRequest,
) -> Result<Stored<Block>, NoAddress> {
    let unavailable = |error: StoreError| {
        NoAddress::Unavailable(format!(
            "IPAM block claim: {error}; the runtime will try again"
        ))
    };
    let pools: Vec<&NodePool> = context.serving(want.version, &want.choice).collect();
    if pools.is_empty() {
        return Err(no_pool(Some(want.version), &want.choice, &context.pools));
    }
    let mut collisions = 0;
    for pool in &pools {
        for cidr in candidates(pool.cidr, pool.block_size, &context.node) {
            if context.known.contains(&cidr)
                || !context.allows(cidr)
                || is_reserved(&want.constraints, cidr)
            {
                continue;
            }
            match try_claim(store, context, cidr).await.map_err(unavailable)? {
                Some(block) => return Ok(block),
                None if collisions < COLLISIONS => collisions += 1,
                None => {
                    return Err(NoAddress::Unavailable(format!(
                        "{COLLISIONS} blocks were taken by other nodes at the same time; the \
                         runtime will try again"
                    )));
                }
            }
        }
    }
    let names: Vec<String> = pools
        .iter()
        .map(|pool| format!("{} ({})", pool.name, pool.cidr))
        .collect();
    Err(NoAddress::Exhausted(format!(
        "every block of pool {} is taken",
        names.join(", ")
    )))
}

/// Claims a block if no block overlaps it; none if it, or one that overlaps it, is another node's.
/// Blocks that the map does not list yet are ruled out in storage: larger ones by a read of each
/// possible name, and the same one by its creation, in which only one of two nodes succeeds.
pub(super) async fn try_claim<S: Store>(
    store: &NodeObjects<S>,
    context: &ClaimContext,
    cidr: IpNet,
) -> Result<Option<Stored<Block>>, StoreError> {
    if !context.allows(cidr) || has_larger(store, cidr).await? {
        return Ok(None);
    }
    store.put_affinity(cidr, AffinityState::Pending).await?;
    let block = match store
        .create_block(Block::new(cidr, &context.node, context.now.clone()))
        .await
    {
        Ok(block) => block,
        Err(StoreError::Conflict) => match store.block(cidr).await {
            Ok(Some(block)) if block.value.node() == Some(context.node.as_str()) => block,
            // Another node's, or nobody's until it is repaired, which the view cannot tell.
            Ok(_) | Err(StoreError::Damaged(_)) => {
                store.delete_affinity(cidr).await?;
                return Ok(None);
            }
            Err(error) => return Err(error),
        },
        Err(error) => return Err(error),
    };
    store.put_affinity(cidr, AffinityState::Confirmed).await?;
    Ok(Some(block))
}

async fn has_larger<S: Store>(store: &NodeObjects<S>, cidr: IpNet) -> Result<bool, StoreError> {
    let exists = |parent| async move {
        match store.block(parent).await {
            Ok(block) => Ok(block.is_some()),
            Err(StoreError::Damaged(_)) => Ok(true),
            Err(error) => Err(error),
        }
    };
    let found = try_join_all(possible(parents(cidr)).map(exists)).await?;
    Ok(found.contains(&true))
}

/// Keeps the ranges that are small enough for a block.
pub(super) fn possible(ranges: impl Iterator<Item = IpNet>) -> impl Iterator<Item = IpNet> {
    ranges.filter(|range| range.prefix_len() >= range.max_prefix_len() - LARGEST_BLOCK)
}

/// Returns true when every address of the block is reserved.
fn is_reserved(constraints: &Constraints, cidr: IpNet) -> bool {
    let touches = |range: &IpNet| range.contains(&cidr) || cidr.contains(range);
    constraints.limits.reserved.iter().any(touches)
        && Block::new(cidr, "", String::new())
            .available(|address| constraints.limits.is_reserved(address))
            == 0
}

/// Error of a choice that no pool serves. `version` is none if any IP version would have done.
pub(super) fn no_pool(
    version: Option<IpVersion>,
    choice: &PoolChoice,
    pools: &[NodePool],
) -> NoAddress {
    let of_version =
        |pool: &&NodePool| version.is_none_or(|version| IpVersion::of(pool.cidr.addr()) == version);
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
    NoAddress::Exhausted(format!(
        "no IPPool{of} may be used for {whose}: {why}; add or correct one"
    ))
}

/// Error of a request that names a pool it cannot have; `why` is none if the pool does not exist.
pub(super) fn unknown_pool(version: IpVersion, name: &str, why: Option<&str>) -> NoAddress {
    let (of, field, annotation) = match version {
        IpVersion::V4 => ("IPv4", "ipv4_pools", ANNOTATION_POD_POOLS_V4),
        IpVersion::V6 => ("IPv6", "ipv6_pools", ANNOTATION_POD_POOLS_V6),
    };
    let why = why.map_or_else(
        || format!("does not exist, or is not of {of}"),
        str::to_owned,
    );
    NoAddress::Refused(format!(
        "IPPool {name:?} {why}; correct the pool, or the place that names it: annotation \
         {annotation} of the pod or of its Namespace, or {field} of the network configuration"
    ))
}
