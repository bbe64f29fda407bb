//! Addresses that a pod names itself: each out of the block that it is in, whoever has that, as Calico's AssignIP does it.
//!
//! Nothing is taken from the owner's cache and nothing is put there but new blocks: whatever else is written to a block at the same time finds out by
//! its revision.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::meta::ANNOTATION_POD_ADDRESSES;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;

use super::claim::try_claim;
use super::store::{Store, StoreError, Stored, UsablePool};
use crate::cni::ports::NoAddress;
use crate::net::plan::version_of;

/// Conflicts on one block before the runtime is asked to try again.
const TRIES: u32 = 10;
/// Attribute of such an address: its handle may have addresses in blocks of other nodes.
const REQUESTED: &str = "requested";

/// Each address with the block that it is in, IPv4 first. All of them lie in pools of this node, or it is an error.
pub(super) fn targets(addresses: &[IpAddr], pools: &[UsablePool]) -> Result<BTreeMap<IpAddr, IpNet>, NoAddress> {
    let target = |address: &IpAddr| {
        let pool = pools.iter().find(|pool| pool.selected && pool.cidr.contains(address)).ok_or_else(|| {
            refused(
                *address,
                "is in no IPPool that may be used for pods on this node; choose one that is, or add a pool",
            )
        })?;
        let block = IpNet::new(*address, pool.block_size);
        Ok((
            *address,
            block.map_err(|_| refused(*address, "is in a pool whose blockSize is wrong; correct the pool"))?.trunc(),
        ))
    };
    addresses.iter().map(target).collect()
}

/// Whether the handle is of a pod that named its addresses.
pub(super) fn is_requested(block: &Block, handle: &str) -> bool {
    let marked = |attribute: &AllocationAttribute| {
        attribute.handle_id.as_deref() == Some(handle)
            && attribute.secondary.as_ref().is_some_and(|secondary| secondary.contains_key(REQUESTED))
    };
    block.allocated().any(|(_, attribute)| marked(attribute))
}

/// What a node may do for such an address.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    /// Its name.
    pub(super) node: String,
    /// It takes addresses of its own blocks only.
    pub(super) strict: bool,
    /// Why it may claim no block of an IP version, if so.
    pub(super) no_claim: BTreeMap<IpVersion, String>,
}

/// Takes them all; returns the blocks as they are now. On an error, what was taken before it is under the handle.
pub(super) async fn assign<S: Store>(
    store: &S,
    bounds: &Bounds,
    mut attribute: AllocationAttribute,
    targets: &BTreeMap<IpAddr, IpNet>,
    now: &str,
) -> Result<Vec<Stored<Block>>, NoAddress> {
    let unavailable = |error: StoreError| {
        NoAddress::Unavailable(format!("addresses of {ANNOTATION_POD_ADDRESSES}: {error}; the runtime will try again"))
    };
    let handle = attribute.handle_id.clone().unwrap_or_default();
    let list: Vec<String> = targets.keys().map(IpAddr::to_string).collect();
    attribute.secondary.get_or_insert_default().insert(REQUESTED.to_owned(), list.join(","));
    // Before any address: whatever happens then, the handle tells where they may be.
    store.put_handle(handle.clone(), targets.values().copied().collect()).await.map_err(unavailable)?;
    let mut blocks = Vec::new();
    for (address, cidr) in targets {
        let mut tries = 0..TRIES;
        let block = loop {
            if tries.next().is_none() {
                return Err(unavailable(StoreError::Conflict));
            }
            let present = match store.block(*cidr).await.map_err(unavailable)? {
                Some(block) => block,
                None => match bounds.no_claim.get(&version_of(*address)) {
                    Some(why) => return Err(refused(*address, &format!("is in no block yet; {why}"))),
                    None => match try_claim(store, &bounds.node, *cidr, now.to_owned()).await.map_err(unavailable)? {
                        Some(block) => block,
                        None => continue,
                    },
                },
            };
            let Some(wanted) = taken(bounds, &present, *address, &attribute)? else { break present };
            match store.update_block(wanted).await {
                Ok(block) => break block,
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(unavailable(error)),
            }
        };
        blocks.push(block);
    }
    Ok(blocks)
}

/// The block with the address taken; none if the handle has it already.
fn taken(
    bounds: &Bounds,
    present: &Stored<Block>,
    address: IpAddr,
    attribute: &AllocationAttribute,
) -> Result<Option<Stored<Block>>, NoAddress> {
    let block = &present.value;
    let holder = block.allocated().find(|(other, _)| *other == address).map(|(_, attribute)| attribute);
    match holder {
        Some(holder) if holder.handle_id == attribute.handle_id => return Ok(None),
        Some(holder) => {
            return Err(refused(address, &format!("is taken by {}; choose another, or delete that", name(holder))));
        }
        None => {}
    }
    if block.node() != Some(bounds.node.as_str()) {
        let owner = block.spec().affinity.as_deref().unwrap_or("nobody");
        if block.spec().deleted {
            let text = format!("block {} of {address} is being given back; the runtime will try again", block.cidr());
            return Err(NoAddress::Unavailable(text));
        }
        if bounds.strict {
            let text = format!(
                "is in block {} of {owner}, and IPAMConfiguration default has strictAffinity; choose one of this node's blocks",
                block.cidr()
            );
            return Err(refused(address, &text));
        }
    }
    let mut wanted = present.clone();
    if !wanted.value.assign_address(address, attribute) {
        return Err(refused(address, "is reserved in its block; choose another"));
    }
    Ok(Some(wanted))
}

/// Who has an address, as far as its attributes tell.
fn name(holder: &AllocationAttribute) -> String {
    let secondary = |key: &str| holder.secondary.as_ref().and_then(|secondary| secondary.get(key));
    match (secondary("namespace"), secondary("pod")) {
        (Some(namespace), Some(pod)) => format!("pod {namespace}/{pod}"),
        _ => format!("handle {}", holder.handle_id.as_deref().unwrap_or("(none)")),
    }
}

fn refused(address: IpAddr, why: &str) -> NoAddress {
    NoAddress::Refused(format!("annotation {ANNOTATION_POD_ADDRESSES}: {address} {why}"))
}
