//! Parses blocks, as far as routes depend on them.

use ipnet::IpNet;

use super::block::{Block, BlockError};
use super::names;
use crate::meta;
use crate::network::BlockInfo;
use crate::v3::ipam::{AllocationAttribute, IPAMBlock};

/// Key of an allocation's attribute with the node that uses the address (libcalico-go's ipam
/// package).
const ATTRIBUTE_NODE: &str = "node";

/// Parses what routes need of a block: range, node, borrowers, and tunnel endpoints. `Ok(None)`:
/// the block is being deleted.
pub fn block_info(object: &IPAMBlock) -> Result<Option<(IpNet, BlockInfo)>, BlockError> {
    if object.spec.deleted {
        return Ok(None);
    }
    let block = Block::parse(object.spec.clone())?;
    // Two objects of one range would replace each other in turn.
    let (name, wanted) = (
        object.metadata.name.as_deref().unwrap_or_default(),
        names::block(block.cidr().trunc()),
    );
    if name != wanted {
        return Err(BlockError::Name {
            name: name.to_owned(),
            wanted,
        });
    }
    let node = block.node().map(str::to_owned);
    let borrowed = block
        .allocated()
        .filter_map(|(address, attribute)| {
            let user = attribute.secondary.as_ref()?.get(ATTRIBUTE_NODE)?;
            (attribute.released_at.is_none() && node.as_ref() != Some(user))
                .then(|| (address, user.clone()))
        })
        .collect();
    let tunnels = block
        .allocated()
        .filter_map(|(address, attribute)| Some((address, tunnel_of(attribute)?.to_owned())));
    let tunnels = tunnels.collect();
    let cidr = block.cidr();
    Ok(Some((
        cidr,
        BlockInfo {
            node,
            borrowed,
            tunnels,
            created: meta::created(&object.metadata),
        },
    )))
}

/// Returns the node whose tunnel's handle the allocation is under.
fn tunnel_of(attribute: &AllocationAttribute) -> Option<&str> {
    let handle = attribute
        .handle_id
        .as_deref()
        .filter(|_| attribute.released_at.is_none())?;
    [
        "vxlan-tunnel-addr-",
        "vxlan-v6-tunnel-addr-",
        "ipip-tunnel-addr-",
    ]
    .iter()
    .find_map(|prefix| handle.strip_prefix(prefix))
}
