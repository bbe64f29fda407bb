//! Addresses borrowed from blocks of other nodes, where this node has no room and can claim no
//! block. Calico does so while `strictAffinity` is off.
//!
//! The block stays its owner's: only the address is written there, by compare-and-swap, as for an
//! address that a pod names. Its attributes name the borrowing node, so typha routes the address
//! there.

use ipnet::IpNet;
use margay_api::v3::ipam::AllocationAttribute;

use super::claim::ClaimContext;
use super::constraints::Constraints;
use super::node_objects::{NodeObjects, Stored};
use super::store::{Store, StoreError};

/// Maximum number of blocks that are tried for one request.
const MOST: usize = 100;
/// Maximum number of conflicts on one block before the next one is tried.
const TRIES: usize = 5;

/// A borrowed address, and its block.
pub(super) type Borrowed = (IpNet, IpNet);

/// Borrows an address from the first of these blocks that has room; none if no block that was tried
/// has. An address that the handle has in one of them already is found again.
pub(super) async fn borrow<S: Store>(
    store: &NodeObjects<S>,
    context: &ClaimContext,
    blocks: &[IpNet],
    constraints: &Constraints,
    attribute: &AllocationAttribute,
) -> Result<Option<Borrowed>, StoreError> {
    for cidr in blocks.iter().take(MOST) {
        let constraints = Constraints::new(
            constraints.limits.clone(),
            &context.known,
            *cidr,
            constraints.now.clone(),
        );
        if let Some(address) =
            borrow_from(store, &context.node, *cidr, &constraints, attribute).await?
        {
            return Ok(Some((address, *cidr)));
        }
    }
    Ok(None)
}

async fn borrow_from<S: Store>(
    store: &NodeObjects<S>,
    node: &str,
    cidr: IpNet,
    constraints: &Constraints,
    attribute: &AllocationAttribute,
) -> Result<Option<IpNet>, StoreError> {
    let handle = attribute.handle_id.clone().unwrap_or_default();
    for _ in 0..TRIES {
        let Stored {
            value: mut block,
            revision,
        } = match store.block(cidr).await {
            Ok(Some(block)) => block,
            Ok(None) | Err(StoreError::Damaged(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        if let Some(had) = block.of_handle(&handle).first() {
            return Ok(Some(IpNet::from(*had)));
        }
        // It is being deleted, or is this node's own by now: the caller finds that out by its map.
        if block.node().is_none_or(|owner| owner == node) {
            return Ok(None);
        }
        // Only the one address changes. Addresses in cooldown are the owner's to free.
        let Some(address) = block.assign(attribute, |address| constraints.is_reserved(address))
        else {
            return Ok(None);
        };
        // Before the block: if the agent ends in between, or the write of the block gets no answer,
        // the handle already tells where the address may be.
        store.put_handle(handle.clone(), vec![cidr]).await?;
        match store
            .update_block(Stored {
                value: block,
                revision,
            })
            .await
        {
            Ok(_) => return Ok(Some(IpNet::from(address))),
            Err(StoreError::Conflict) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
