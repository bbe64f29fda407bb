//! Claiming a new block: affinity pending, block, affinity confirmed, as Calico does it, so that two nodes can never both believe in a block.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::limits::Limits;
use margay_api::ipam::search::candidates;
use margay_api::meta::{ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6};
use margay_api::rule::IpVersion;

use super::store::{AffinityState, Store, StoreError, Stored, UsablePool};
use crate::cni::ports::NoAddress;

/// Blocks that somebody else turns out to have, before giving up. What the cluster knows of blocks lags by milliseconds, so a few are normal.
const COLLISIONS: usize = 100;

/// What is claimed for.
pub(super) struct Want {
    /// IP version.
    pub(super) version: IpVersion,
    /// The pools that the request names.
    pub(super) named: Vec<String>,
    /// Those of the IP version that serve it.
    pub(super) pools: Vec<UsablePool>,
    /// What bounds it.
    pub(super) limits: Arc<Limits>,
}

/// Claims the first free block in this node's order.
pub(super) async fn claim<S: Store>(
    store: &S,
    node: &str,
    want: &Want,
    mut taken: BTreeSet<IpNet>,
    now: String,
) -> Result<Stored<Block>, NoAddress> {
    let Want { version, named, pools, limits } = want;
    let unavailable =
        |error: StoreError| NoAddress::Unavailable(format!("IPAM block claim: {error}; the runtime will try again"));
    if pools.is_empty() {
        return Err(no_pool(Some(*version), named));
    }
    let mut collisions = 0;
    for pool in pools {
        for cidr in candidates(pool.cidr, pool.block_size, node) {
            if overlaps(&taken, cidr) || is_reserved(limits, cidr) {
                continue;
            }
            match try_claim(store, node, cidr, now.clone()).await.map_err(unavailable)? {
                Some(block) => return Ok(block),
                None if collisions < COLLISIONS => {
                    collisions += 1;
                    taken.insert(cidr);
                }
                None => {
                    return Err(NoAddress::Unavailable(format!(
                        "{COLLISIONS} blocks were taken by other nodes at the same time; the runtime will try again"
                    )));
                }
            }
        }
    }
    let names: Vec<String> = pools.iter().map(|pool| format!("{} ({})", pool.name, pool.cidr)).collect();
    Err(NoAddress::Exhausted(format!(
        "no address is free: every block of pool {} is taken and those of node {node} are full; add an IPPool, or free addresses",
        names.join(", ")
    )))
}

/// `version`: none when any would have done.
pub(super) fn no_pool(version: Option<IpVersion>, named: &[String]) -> NoAddress {
    let (of, field) = match version {
        None => ("", "ipv4_pools"),
        Some(IpVersion::V4) => (" of IPv4", "ipv4_pools"),
        Some(IpVersion::V6) => (" of IPv6", "ipv6_pools"),
    };
    NoAddress::Exhausted(match named {
        [] => format!(
            "no IPPool{of} may be used for pods on this node: there is none, or all are disabled, or their nodeSelector leaves the node out; add one"
        ),
        named => {
            format!("none of the pools {}{of} exists and may be used; correct {field}", named.join(", "))
        }
    })
}

/// A pool that a request names, and that there is not.
pub(super) fn unknown_pool(version: IpVersion, name: &str) -> NoAddress {
    let (of, field, annotation) = match version {
        IpVersion::V4 => ("IPv4", "ipv4_pools", ANNOTATION_POD_POOLS_V4),
        IpVersion::V6 => ("IPv6", "ipv6_pools", ANNOTATION_POD_POOLS_V6),
    };
    NoAddress::Refused(format!(
        "IPPool {name:?} does not exist, or is disabled, not of {of} or not for workloads; correct the pool, or the place that names it: annotation \
         {annotation} of the pod, or {field} of the network configuration"
    ))
}

/// Whether the reservations leave nothing of the block.
fn is_reserved(limits: &Limits, cidr: IpNet) -> bool {
    let touches = |range: &IpNet| range.contains(&cidr) || cidr.contains(range);
    limits.reserved.iter().any(touches)
        && Block::new(cidr, "", String::new()).available(|address| limits.is_reserved(address)) == 0
}

fn overlaps(taken: &BTreeSet<IpNet>, cidr: IpNet) -> bool {
    taken.contains(&cidr) || taken.iter().any(|other| other.contains(&cidr) || cidr.contains(other))
}

/// `None`: the block is somebody else's.
pub(super) async fn try_claim<S: Store>(
    store: &S,
    node: &str,
    cidr: IpNet,
    now: String,
) -> Result<Option<Stored<Block>>, StoreError> {
    store.put_affinity(cidr, AffinityState::Pending).await?;
    let block = match store.create_block(Block::new(cidr, node, now)).await {
        Ok(block) => block,
        Err(StoreError::Conflict) => match store.block(cidr).await? {
            Some(block) if block.value.node() == Some(node) => block,
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
