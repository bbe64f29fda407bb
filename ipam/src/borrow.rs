//! Addresses out of blocks of other nodes, where this node has no room and can claim no block, as Calico gives them while `strictAffinity` is off.
//!
//! The block stays its owner's: what is written there is the address alone, by compare-and-swap, as for an address that a pod names. Who has it is in the
//! attributes, so that typha makes a route to this node of it.

use ipnet::IpNet;
use margay_api::v3::ipam::AllocationAttribute;

use super::claim::Ground;
use super::known::Heed;
use super::node_objects::{NodeObjects, Stored};
use super::store::{Store, StoreError};

/// Most blocks that are looked at for one request.
const MOST: usize = 100;
/// Conflicts on one block before the next one is tried.
const TRIES: usize = 5;

/// An address that was taken, and the block that it is in.
pub(super) type Borrowed = (IpNet, IpNet);

/// Takes an address out of the first of these blocks that has room. None: none of those that were looked at has. What the handle has in one of them already is
/// found again.
pub(super) async fn borrow<S: Store>(
    store: &NodeObjects<S>,
    ground: &Ground,
    blocks: &[IpNet],
    heed: &Heed,
    attribute: &AllocationAttribute,
) -> Result<Option<Borrowed>, StoreError> {
    for cidr in blocks.iter().take(MOST) {
        let heed = Heed::new(heed.limits.clone(), &ground.known, *cidr, heed.now.clone());
        if let Some(address) = borrow_from(store, &ground.node, *cidr, &heed, attribute).await? {
            return Ok(Some((address, *cidr)));
        }
    }
    Ok(None)
}

async fn borrow_from<S: Store>(
    store: &NodeObjects<S>,
    node: &str,
    cidr: IpNet,
    heed: &Heed,
    attribute: &AllocationAttribute,
) -> Result<Option<IpNet>, StoreError> {
    let handle = attribute.handle_id.clone().unwrap_or_default();
    for _ in 0..TRIES {
        let Some(Stored { value: mut block, revision }) = store.block(cidr).await? else { return Ok(None) };
        if let Some(had) = block.of_handle(&handle).first() {
            return Ok(Some(IpNet::from(*had)));
        }
        // Being given back, or this node's own: whoever asked finds that out by its map.
        if block.node().is_none_or(|owner| owner == node) {
            return Ok(None);
        }
        // Nothing of the block changes but the one address: what rests there is its owner's to free.
        let Some(address) = block.assign(attribute, |address| heed.is_reserved(address)) else { return Ok(None) };
        // First: whatever happens then, the handle tells where the address may be.
        store.put_handle(handle.clone(), vec![cidr]).await?;
        match store.update_block(Stored { value: block, revision }).await {
            Ok(_) => return Ok(Some(IpNet::from(address))),
            Err(StoreError::Conflict) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
