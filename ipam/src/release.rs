//! Release of a single address, as a person asks for it.

use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::names;
use margay_api::v3::ipam::{IPAMBlock, IPAMHandle};

use crate::store::{Objects, Store, StoreError};

/// Releases an address of a block, and takes the block out of the handle if it was the last one
/// there. Only the allocation with that sequence number is released: a later one of the same
/// address is somebody else's. Returns false if there is no such allocation.
pub async fn release_address<S: Store>(
    store: &S,
    cidr: IpNet,
    address: IpAddr,
    sequence: Option<u64>,
) -> Result<bool, StoreError> {
    let found = Objects::<IPAMBlock>::get(store, names::block(cidr)).await?;
    let Some(mut object) = found else {
        return Ok(false);
    };
    let mut block = Block::parse(object.spec.clone())
        .map_err(|error| StoreError::Failed(format!("{error}; repair or delete it")))?;
    let handle = block
        .allocated()
        .find(|(known, _)| *known == address)
        .and_then(|(_, attribute)| attribute.handle_id.clone());
    if !block.release_address(address, sequence) {
        return Ok(false);
    }
    object.spec = block.spec().clone();
    store.replace(object).await?;
    if let Some(handle) = handle.filter(|handle| block.of_handle(handle).is_empty()) {
        remove_block_from_handle(store, &handle, cidr).await?;
    }
    Ok(true)
}

/// Removes a block from a handle; the handle is deleted with its last block.
pub(crate) async fn remove_block_from_handle<S: Store>(
    store: &S,
    handle: &str,
    cidr: IpNet,
) -> Result<(), StoreError> {
    let found = Objects::<IPAMHandle>::get(store, names::handle(handle)).await?;
    let Some(mut object) = found else {
        return Ok(());
    };
    object.spec.block.remove(&cidr.to_string());
    object.spec.deleted = object.spec.block.is_empty();
    let object = store.replace(object).await?;
    if object.spec.deleted {
        // If it has been used again meanwhile, it stays.
        Objects::<IPAMHandle>::delete(store, object.metadata).await?;
    }
    Ok(())
}
