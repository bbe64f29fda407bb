//! The allocator of a node: a handle to the one task that owns the node's blocks, and its messages.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;
use tokio::sync::{mpsc, oneshot, watch};

use super::borrow::Borrowed;
use super::commit::WriteOutcome;
use super::idle_blocks::BlockRelease;
use super::limits::KnownLimits;
use super::node_objects::{NodeObjects, Stored};
use super::owner::Owner;
use super::pools::{NodePool, PoolChoice};
use super::request::{AddressRequest, NoAddress};
use super::store::{Store, StoreError};

/// Requests that may wait for the owner task; more wait in the callers, whose number the CNI socket
/// limits.
const QUEUE: usize = 256;

/// How long a request waits until the inputs are known. The runtime retries; meanwhile others have
/// its place at the socket.
const UNKNOWN: Duration = Duration::from_secs(10);

/// Node of each block, as the cluster knows it. It may lag behind; `None` until anything is known.
pub type BlockMap = Option<Arc<BTreeMap<IpNet, String>>>;

/// The pools as this node sees them, by name; `None` until they have been listed.
pub type Pools = Option<Arc<Vec<NodePool>>>;

/// Watched inputs of the allocator.
#[derive(Clone)]
pub struct Inputs {
    /// Node of each block.
    pub map: watch::Receiver<BlockMap>,
    /// Pools to assign from.
    pub pools: watch::Receiver<Pools>,
    /// Limits and reservations.
    pub limits: watch::Receiver<KnownLimits>,
    /// No Namespace names pools for its pods; false as long as that is not certain.
    pub no_namespace_names_pools: watch::Receiver<bool>,
}

/// Part of a request that one block can serve: the address of one IP version.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) attribute: AllocationAttribute,
    pub(super) version: IpVersion,
    /// Pools to take the address from.
    pub(super) choice: PoolChoice,
    /// Blocks that the handle must list once the address is claimed. Only one part of a request has
    /// all of them, so that recording them is one write.
    pub(super) recorded: Vec<IpNet>,
}

impl Part {
    /// The handle.
    pub(super) fn handle(&self) -> &str {
        self.attribute.handle_id.as_deref().unwrap_or_default()
    }
}

/// Requests that wait for room, or for the blocks of this node to be read.
pub(super) enum Waiting {
    Request(AddressRequest, AssignReply),
    /// A part whose block turned out to be full or lost.
    Part(Part, AssignReply),
    /// The release of a handle that was not found while not all blocks of this node have been read.
    Release(String, ReleaseReply),
}

pub(super) type AssignReply = oneshot::Sender<Result<Vec<IpNet>, NoAddress>>;
pub(super) type ReleaseReply = oneshot::Sender<Result<(), NoAddress>>;

pub(super) enum Event {
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
pub(super) struct Loaded {
    /// Blocks that exist.
    pub(super) found: Vec<Stored<Block>>,
    /// Blocks that could not be read.
    pub(super) unread: Vec<IpNet>,
    /// Blocks that the map does not list for this node any more.
    pub(super) left: Vec<IpNet>,
}

/// Handle to the allocator of a node; cheap to clone.
#[derive(Clone)]
pub struct Allocator {
    events: mpsc::Sender<Event>,
    inputs: Inputs,
}

impl Allocator {
    /// Starts the owner task. Blocks that the map lists for this node are read at once, and later
    /// ones as they appear.
    pub fn spawn<S: Store>(
        node: String,
        store: Arc<S>,
        inputs: Inputs,
        clock: fn() -> String,
    ) -> Self {
        let (events, received) = mpsc::channel(QUEUE);
        let owner = Owner::new(
            node.clone(),
            Arc::new(NodeObjects::new(node, store)),
            inputs.clone(),
            clock,
            events.downgrade(),
        );
        tokio::spawn(owner.run(received));
        Self { events, inputs }
    }

    /// Assigns an address of each IP version that is needed, or none. A second request with the
    /// same handle gets the same addresses.
    pub async fn assign(&self, wanted: AddressRequest) -> Result<Vec<IpNet>, NoAddress> {
        tokio::time::timeout(UNKNOWN, self.inputs.clone().known())
            .await
            .map_err(|_| self.inputs.unknown())??;
        let (reply, answer) = oneshot::channel();
        self.ask(Event::Assign(wanted, reply), answer).await
    }

    /// The pools as this node sees them, as they change.
    pub(super) fn watch_pools(&self) -> watch::Receiver<Pools> {
        self.inputs.pools.clone()
    }

    /// Returns true when no Namespace names pools for its pods.
    pub(super) fn no_namespace_names_pools(&self) -> bool {
        *self.inputs.no_namespace_names_pools.borrow()
    }

    /// The pools as this node sees them, once they are known.
    pub(super) async fn pools(&self) -> Result<Arc<Vec<NodePool>>, NoAddress> {
        let mut pools = self.inputs.pools.clone();
        let known = tokio::time::timeout(UNKNOWN, pools.wait_for(Option::is_some)).await;
        let known = known
            .map_err(|_| self.inputs.unknown())?
            .map_err(|_| stopping())?;
        Ok(known.clone().unwrap_or_default())
    }

    /// Releases all addresses of a handle. An unknown handle is a success.
    pub async fn release(&self, handle: String) -> Result<(), NoAddress> {
        let (reply, answer) = oneshot::channel();
        let mut asked = std::pin::pin!(self.ask(Event::Release(handle, reply), answer));
        match tokio::time::timeout(UNKNOWN, &mut asked).await {
            Ok(released) => released,
            Err(_) if self.inputs.is_known() => asked.await,
            Err(_) => Err(self.inputs.unknown()),
        }
    }

    async fn ask<T>(
        &self,
        event: Event,
        answer: oneshot::Receiver<Result<T, NoAddress>>,
    ) -> Result<T, NoAddress> {
        self.events.send(event).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }
}

impl Inputs {
    /// Returns once all inputs are known.
    async fn known(mut self) -> Result<(), NoAddress> {
        self.map
            .wait_for(Option::is_some)
            .await
            .map_err(|_| stopping())?;
        self.pools
            .wait_for(Option::is_some)
            .await
            .map_err(|_| stopping())?;
        self.limits
            .wait_for(Option::is_some)
            .await
            .map_err(|_| stopping())?;
        Ok(())
    }

    /// Returns true when all inputs are known.
    pub(super) fn is_known(&self) -> bool {
        self.map.borrow().is_some()
            && self.pools.borrow().is_some()
            && self.limits.borrow().is_some()
    }

    /// Error that names the input that is not known yet.
    pub(super) fn unknown(&self) -> NoAddress {
        let what = if self.map.borrow().is_none() {
            "the node's view has not come from margay-typha, or does not have the node"
        } else if self.pools.borrow().is_none() {
            "IPPools have not been listed"
        } else {
            "what bounds IPAM, or a block of this node, has not been read"
        };
        NoAddress::Unavailable(format!(
            "what addresses this node has is not known yet: {what}; the runtime will try again"
        ))
    }
}

impl Waiting {
    pub(super) fn fail(self, error: NoAddress) {
        // The caller may have gone.
        match self {
            Self::Request(_, reply) | Self::Part(_, reply) => drop(reply.send(Err(error))),
            Self::Release(_, reply) => drop(reply.send(Err(error))),
        }
    }
}

pub(super) fn stopping() -> NoAddress {
    NoAddress::Unavailable("the agent is stopping; the runtime will try again".to_owned())
}

/// Replies with the addresses of `had` and of all parts, IPv4 first, or with the first error. The
/// caller then releases what other parts have claimed, with the handle.
pub(super) async fn join(
    had: Vec<IpNet>,
    parts: Vec<oneshot::Receiver<Result<Vec<IpNet>, NoAddress>>>,
    reply: AssignReply,
) {
    let mut addresses = Ok(had);
    for part in parts {
        match (
            part.await.unwrap_or_else(|_| Err(stopping())),
            &mut addresses,
        ) {
            (Ok(more), Ok(addresses)) => addresses.extend(more),
            (Err(error), Ok(_)) => addresses = Err(error),
            (_, Err(_)) => {}
        }
    }
    let ordered = addresses.map(|mut addresses| {
        addresses.sort_by_key(|address| address.addr().is_ipv6());
        addresses
    });
    // The caller may have gone.
    let _ = reply.send(ordered);
}

/// Addresses with their full prefix length.
pub(super) fn whole(addresses: Vec<IpAddr>) -> Vec<IpNet> {
    addresses.into_iter().map(IpNet::from).collect()
}
