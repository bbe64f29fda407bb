//! Messages of the task that owns a node's blocks.

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::rule::IpVersion;

use crate::borrow::Borrowed;
use crate::commit::{AssignReply, Part, ReleaseReply, WriteOutcome};
use crate::idle_blocks::BlockRelease;
use crate::node_objects::Stored;
use crate::pools::PoolChoice;
use crate::request::{AddressRequest, NoAddress};
use crate::store::StoreError;

/// Requests that wait for room, or for the blocks of this node to be read.
pub(crate) enum Waiting {
    Request(AddressRequest, AssignReply),
    /// A part whose block turned out to be full or lost.
    Part(Part, AssignReply),
    /// The release of a handle that was not found while not all blocks of this node have been read.
    Release(String, ReleaseReply),
}

pub(crate) enum Event {
    Assign(AddressRequest, AssignReply),
    Release(String, ReleaseReply),
    Written(WriteOutcome),
    /// Outcome of a claim, with the IP version and the pools it was for.
    Claimed(IpVersion, PoolChoice, Result<Stored<Block>, NoAddress>),
    /// Blocks that the handle of a tunnel lists: it may have borrowed its address before a restart.
    Found(
        AddressRequest,
        AssignReply,
        Result<Vec<Stored<Block>>, StoreError>,
    ),
    /// Addresses borrowed for a request that this node's blocks serve only in part, or not at all.
    Borrowed(
        AddressRequest,
        AssignReply,
        Result<Vec<Borrowed>, NoAddress>,
    ),
    /// Outcome of the release of a block.
    BlockReleased(IpNet, BlockRelease),
    /// Addresses that a pod names, with their blocks.
    Exact(
        Vec<IpNet>,
        AssignReply,
        Result<Vec<Stored<Block>>, NoAddress>,
    ),
    Located(String, ReleaseReply, Result<Vec<Stored<Block>>, StoreError>),
    /// A release has ended, and with it the deletion of the handle's object.
    Released(String),
    /// Blocks that have been read.
    Loaded(Loaded),
}

/// Blocks of this node that have been read.
pub(crate) struct Loaded {
    /// Blocks that exist.
    pub(crate) found: Vec<Stored<Block>>,
    /// Blocks that could not be read.
    pub(crate) unread: Vec<IpNet>,
    /// Blocks that the map does not list for this node any more.
    pub(crate) left: Vec<IpNet>,
}

impl Waiting {
    pub(crate) fn fail(self, error: NoAddress) {
        // The caller may have gone.
        match self {
            Self::Request(_, reply) | Self::Part(_, reply) => drop(reply.send(Err(error))),
            Self::Release(_, reply) => drop(reply.send(Err(error))),
        }
    }
}
