//! Addresses that a pod names itself: each from the block that contains it, whatever its owner and
//! size, as Calico's AssignIP does it.
//!
//! The owner's cache is not used, and gets nothing but new blocks: a concurrent write of a block
//! notices by the version.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use futures::future::try_join_all;
use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::meta::ANNOTATION_POD_ADDRESSES;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;

use super::claim::{ClaimContext, possible, try_claim};
use super::constraints::{Constraints, parents};
use super::node_objects::{NodeObjects, Stored};
use super::pools::PoolChoice;
use super::request::NoAddress;
use super::store::{Store, StoreError};

/// Maximum number of conflicts on one block before the runtime is asked to retry.
const TRIES: u32 = 10;

/// Limits of a node for such addresses.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    /// State that a claim is based on.
    pub(super) context: ClaimContext,
    /// Overlaps and cooldown; a pod that names an address may have a reserved one.
    pub(super) constraints: Constraints,
    /// Reason why it may claim no block of an IP version, if so.
    pub(super) no_claim: BTreeMap<IpVersion, String>,
}

/// Returns each address with the range that a new block around it would have, IPv4 first. An
/// address outside this node's pools is an error.
pub(super) fn targets(
    addresses: &[IpAddr],
    choice: &PoolChoice,
    context: &ClaimContext,
) -> Result<BTreeMap<IpAddr, IpNet>, NoAddress> {
    let target = |address: &IpAddr| {
        let around = context
            .pools
            .iter()
            .filter(|pool| pool.cidr.contains(address));
        // A pod that names the address names its pool. Only the nodeSelector still counts.
        let choice = |name: &str| PoolChoice {
            named: vec![name.to_owned()],
            ..choice.clone()
        };
        let mut why = "is in no IPPool; choose one that is, or add a pool".to_owned();
        for pool in around {
            match pool.refusal(&choice(&pool.name)) {
                None if pool.selected => {
                    let block = IpNet::new(*address, pool.block_size);
                    let wrong = |_| {
                        refused(
                            *address,
                            "is in a pool whose blockSize is wrong; correct the pool",
                        )
                    };
                    return Ok((*address, block.map_err(wrong)?.trunc()));
                }
                None => {
                    why = format!(
                        "is in IPPool {}, whose nodeSelector does not select this node; choose \
                         another",
                        pool.name
                    )
                }
                Some(refusal) => {
                    why = format!(
                        "is in IPPool {}, which {refusal}; choose another",
                        pool.name
                    )
                }
            }
        }
        Err(refused(*address, &why))
    };
    addresses.iter().map(target).collect()
}

/// Assigns all of them and returns their blocks. After an error, the addresses assigned before it
/// have the handle.
pub(super) async fn assign<S: Store>(
    store: &NodeObjects<S>,
    bounds: &Bounds,
    attribute: AllocationAttribute,
    targets: &BTreeMap<IpAddr, IpNet>,
) -> Result<Vec<Stored<Block>>, NoAddress> {
    let mut blocks = Vec::new();
    for (address, cidr) in targets {
        blocks.push(assign_one(store, bounds, &attribute, *address, *cidr).await?);
    }
    Ok(blocks)
}

async fn assign_one<S: Store>(
    store: &NodeObjects<S>,
    bounds: &Bounds,
    attribute: &AllocationAttribute,
    address: IpAddr,
    new: IpNet,
) -> Result<Stored<Block>, NoAddress> {
    let handle = attribute.handle_id.clone().unwrap_or_default();
    for _ in 0..TRIES {
        let mut around = around(store, bounds, address, new)
            .await
            .map_err(unavailable)?;
        let block = match around.pop() {
            Some(block) if around.is_empty() => block,
            Some(block) => return shared(block, around, address, &handle),
            None => match bounds.no_claim.get(&IpVersion::of(address)) {
                Some(why) => return Err(refused(address, &format!("is in no block yet; {why}"))),
                None => match try_claim(store, &bounds.context, new)
                    .await
                    .map_err(unavailable)?
                {
                    Some(block) => block,
                    None => continue,
                },
            },
        };
        let Taken {
            block: wanted,
            former,
        } = match taken(bounds, &block, address, attribute)? {
            Some(taken) => taken,
            None => return Ok(block),
        };
        // Before the block: if the agent ends in between, or the write of the block gets no answer,
        // the handle already tells where the address may be.
        store
            .put_handle(handle.clone(), vec![block.value.cidr()])
            .await
            .map_err(unavailable)?;
        match store.update_block(wanted).await {
            Ok(block) => {
                forget(store, former).await;
                return Ok(block);
            }
            Err(StoreError::Conflict) => {}
            Err(error) => return Err(unavailable(error)),
        }
    }
    Err(unavailable(StoreError::Conflict))
}

/// Reads the blocks that contain the address: those that are known. If they lack the block that a
/// new one would be, a block of every possible size is read too.
async fn around<S: Store>(
    store: &NodeObjects<S>,
    bounds: &Bounds,
    address: IpAddr,
    new: IpNet,
) -> Result<Vec<Stored<Block>>, StoreError> {
    let mut names: BTreeSet<IpNet> = bounds.context.known.around(address);
    if !names.contains(&new) {
        names.extend(possible(
            parents(IpNet::from(address)).chain([IpNet::from(address)]),
        ));
    }
    let found = try_join_all(names.into_iter().map(|cidr| store.block(cidr))).await?;
    Ok(found.into_iter().flatten().collect())
}

/// Refuses an address that is in two blocks, unless the handle has it already.
fn shared(
    block: Stored<Block>,
    others: Vec<Stored<Block>>,
    address: IpAddr,
    handle: &str,
) -> Result<Stored<Block>, NoAddress> {
    let all: Vec<Stored<Block>> = others.into_iter().chain([block]).collect();
    let ranges: Vec<String> = all
        .iter()
        .map(|block| block.value.cidr().to_string())
        .collect();
    let has = |block: &Stored<Block>| block.value.of_handle(handle).contains(&address);
    all.into_iter().find(has).ok_or_else(|| {
        let text = format!(
            "is in the blocks {}, which overlap; choose another, or delete one of them",
            ranges.join(" and ")
        );
        refused(address, &text)
    })
}

struct Taken {
    block: Stored<Block>,
    /// Handle that had the address before.
    former: Option<String>,
}

/// Returns the block with the address assigned; none if the handle has it already.
fn taken(
    bounds: &Bounds,
    present: &Stored<Block>,
    address: IpAddr,
    attribute: &AllocationAttribute,
) -> Result<Option<Taken>, NoAddress> {
    let block = &present.value;
    let mut wanted = present.clone();
    // In another node's block, addresses after their cooldown are the owner's to free.
    let is_own = block.node() == Some(bounds.context.node.as_str());
    let holder = block
        .allocated()
        .find(|(other, _)| *other == address)
        .map(|(_, attribute)| attribute);
    let former = match holder {
        Some(holder) if holder.handle_id.is_some() && holder.handle_id == attribute.handle_id => {
            return Ok(None);
        }
        Some(holder) if is_same_pod(holder, attribute) => holder.handle_id.clone(),
        Some(AllocationAttribute {
            released_at: Some(since),
            ..
        }) if is_own && bounds.constraints.is_over(since) => None,
        Some(AllocationAttribute {
            released_at: Some(since),
            ..
        }) => {
            let text = format!(
                "{address} was released at {since} and rests for the {} seconds of \
                 ipCooldownSeconds; the runtime will try again",
                bounds.constraints.limits.cooldown
            );
            return Err(NoAddress::Unavailable(text));
        }
        Some(holder) => {
            return Err(refused(
                address,
                &format!(
                    "is taken by {}; choose another, or delete that",
                    name(holder)
                ),
            ));
        }
        None => None,
    };
    if !is_own {
        may_borrow(bounds, block, address)?;
    }
    if !wanted.value.reassign(address, attribute)
        && !wanted.value.assign_address(address, attribute)
    {
        return Err(refused(address, "is reserved in its block; choose another"));
    }
    Ok(Some(Taken {
        block: wanted,
        former,
    }))
}

/// Checks that this node may take an address of another node's block.
fn may_borrow(bounds: &Bounds, block: &Block, address: IpAddr) -> Result<(), NoAddress> {
    if block.spec().deleted {
        let text = format!(
            "block {} of {address} is being given back; the runtime will try again",
            block.cidr()
        );
        return Err(NoAddress::Unavailable(text));
    }
    if bounds.constraints.limits.strict_affinity {
        let owner = block.spec().affinity.as_deref().unwrap_or("nobody");
        let text = format!(
            "is in block {} of {owner}, and IPAMConfiguration default has strictAffinity; choose \
             one of this node's blocks",
            block.cidr()
        );
        return Err(refused(address, &text));
    }
    Ok(())
}

/// Returns true when an earlier sandbox of the same pod on the same node has the address. When a
/// pod asks, no earlier sandbox is attached any more: an ADD first removes those of its pod.
/// Another network of the same sandbox is not an earlier one.
fn is_same_pod(holder: &AllocationAttribute, wanted: &AllocationAttribute) -> bool {
    fn value<'a>(of: &'a AllocationAttribute, key: &str) -> Option<&'a String> {
        of.secondary.as_ref()?.get(key)
    }
    let container =
        |of: &AllocationAttribute| Some(of.handle_id.as_deref()?.rsplit('.').next()?.to_owned());
    ["namespace", "pod", "node"]
        .iter()
        .all(|key| value(holder, key).is_some() && value(holder, key) == value(wanted, key))
        && container(holder) != container(wanted)
}

/// Deletes the handle of an earlier sandbox if it has no addresses any more; otherwise the
/// collector finds it by its pod.
async fn forget<S: Store>(store: &NodeObjects<S>, former: Option<String>) {
    let Some(handle) = former else { return };
    let is_empty = async {
        let cidrs = store.handle_blocks(handle.clone()).await?;
        let blocks = try_join_all(cidrs.into_iter().map(|cidr| store.block(cidr))).await?;
        Ok::<_, StoreError>(
            blocks
                .into_iter()
                .flatten()
                .all(|block| block.value.of_handle(&handle).is_empty()),
        )
    };
    let forgotten = match is_empty.await {
        Ok(true) => store.delete_handle(handle.clone()).await,
        Ok(false) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = forgotten {
        tracing::warn!(
            %handle,
            %error,
            "the handle of an earlier sandbox of a pod stays; delete it if it names no address \
             that is in use",
        );
    }
}

/// Owner of an address, as far as its attributes tell.
fn name(holder: &AllocationAttribute) -> String {
    let secondary = |key: &str| {
        holder
            .secondary
            .as_ref()
            .and_then(|secondary| secondary.get(key))
    };
    match (secondary("namespace"), secondary("pod")) {
        (Some(namespace), Some(pod)) => format!("pod {namespace}/{pod}"),
        _ => format!("handle {}", holder.handle_id.as_deref().unwrap_or("(none)")),
    }
}

fn unavailable(error: StoreError) -> NoAddress {
    NoAddress::Unavailable(format!(
        "addresses of {ANNOTATION_POD_ADDRESSES}: {error}; the runtime will try again"
    ))
}

fn refused(address: IpAddr, why: &str) -> NoAddress {
    NoAddress::Refused(format!(
        "annotation {ANNOTATION_POD_ADDRESSES}: {address} {why}"
    ))
}
