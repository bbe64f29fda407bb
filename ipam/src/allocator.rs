//! What is asked of IPAM on a node, and the way to who answers: one task that owns this node's blocks.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;
use tokio::sync::{mpsc, oneshot, watch};

use super::back::Returned;
use super::borrow::Borrowed;
use super::commit::Written;
use super::limits::Known;
use super::node_objects::{NodeObjects, Stored};
use super::owner::Owner;
use super::pools::{Choice, NodePool};
use super::request::{AddressRequest, NoAddress};
use super::store::{Store, StoreError};

/// Requests that may wait for the owner; more wait in the callers, who are bounded by the CNI socket.
const QUEUE: usize = 256;

/// How long a request waits for what it depends on to become known. The runtime tries again; meanwhile others have its place at the socket.
const UNKNOWN: Duration = Duration::from_secs(10);

/// Which node has which block, as the cluster knows it. May lag behind; `None` until anything is known.
pub type BlockMap = Option<Arc<BTreeMap<IpNet, String>>>;

/// The pools as this node sees them, in the order of their names; `None` until they have been listed.
pub type Pools = Option<Arc<Vec<NodePool>>>;

/// What the cluster says, as it changes.
#[derive(Clone)]
pub struct Terms {
    /// Who has which block.
    pub map: watch::Receiver<BlockMap>,
    /// What addresses may come from.
    pub pools: watch::Receiver<Pools>,
    /// What bounds it.
    pub limits: watch::Receiver<Known>,
}

/// The part of a request that one block can serve.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Part {
    pub(super) attribute: AllocationAttribute,
    pub(super) version: IpVersion,
    /// Pools to take the address from.
    pub(super) choice: Choice,
    /// Blocks that the handle has to name once the address is claimed. One part of a request says it for all, so that it costs one write.
    pub(super) recorded: Vec<IpNet>,
}

impl Part {
    /// The handle.
    pub(super) fn handle(&self) -> &str {
        self.attribute.handle_id.as_deref().unwrap_or_default()
    }
}

/// Who waits for room.
pub(super) enum Waiting {
    Request(AddressRequest, AssignReply),
    /// A part whose block turned out to be full or lost.
    Part(Part, AssignReply),
    /// A handle that is not found, while not all blocks of this node are known.
    Release(String, ReleaseReply),
}

pub(super) type AssignReply = oneshot::Sender<Result<Vec<IpNet>, NoAddress>>;
pub(super) type ReleaseReply = oneshot::Sender<Result<(), NoAddress>>;

pub(super) enum Event {
    Assign(AddressRequest, AssignReply),
    Release(String, ReleaseReply),
    Written(Written),
    /// What the claim was for: IP version and choice of pools; and what came of it.
    Claimed(IpVersion, Choice, Result<Stored<Block>, NoAddress>),
    /// The blocks in which a handle has been looked for that may have an address from before a restart in another node's.
    Sought(AddressRequest, AssignReply, Result<Vec<Stored<Block>>, StoreError>),
    /// What was borrowed for a request that its own blocks serve in part, or not at all.
    Borrowed(AddressRequest, AssignReply, Result<Vec<Borrowed>, NoAddress>),
    /// A block was to be given back.
    Returned(IpNet, Returned),
    /// Addresses that a pod has named, with the blocks that they are in.
    Exact(Vec<IpNet>, AssignReply, Result<Vec<Stored<Block>>, NoAddress>),
    Located(String, ReleaseReply, Result<Vec<Stored<Block>>, StoreError>),
    /// Blocks that were read.
    Loaded(Loaded),
}

/// Blocks of this node that were read.
pub(super) struct Loaded {
    /// As they are.
    pub(super) found: Vec<Stored<Block>>,
    /// Those that could not be read.
    pub(super) unread: Vec<IpNet>,
    /// Those that this node has or had, and that the map does not give to it any more.
    pub(super) left: Vec<IpNet>,
}

/// A handle to the allocator. Cheap to clone.
#[derive(Clone)]
pub struct Allocator {
    events: mpsc::Sender<Event>,
    terms: Terms,
}

impl Allocator {
    /// Starts the owner task. Blocks that the map gives to this node are loaded at once and as they appear.
    pub fn spawn<S: Store>(node: String, store: Arc<S>, terms: Terms, clock: fn() -> String) -> Self {
        let (events, received) = mpsc::channel(QUEUE);
        let owner =
            Owner::new(node.clone(), Arc::new(NodeObjects::new(node, store)), terms.clone(), clock, events.downgrade());
        tokio::spawn(owner.run(received));
        Self { events, terms }
    }

    /// Assigns an address of each IP version that is needed, or none; asked again with the same handle, the same addresses.
    pub async fn assign(&self, wanted: AddressRequest) -> Result<Vec<IpNet>, NoAddress> {
        tokio::time::timeout(UNKNOWN, self.terms.clone().known()).await.map_err(|_| self.terms.unknown())??;
        let (reply, answer) = oneshot::channel();
        self.ask(Event::Assign(wanted, reply), answer).await
    }

    /// The pools as this node sees them, as they change.
    pub(super) fn watch_pools(&self) -> watch::Receiver<Pools> {
        self.terms.pools.clone()
    }

    /// The pools as this node sees them, once they are known.
    pub(super) async fn pools(&self) -> Result<Arc<Vec<NodePool>>, NoAddress> {
        let mut pools = self.terms.pools.clone();
        let known = tokio::time::timeout(UNKNOWN, pools.wait_for(Option::is_some)).await;
        let known = known.map_err(|_| self.terms.unknown())?.map_err(|_| stopping())?;
        Ok(known.clone().unwrap_or_default())
    }

    /// Releases everything under a handle; an unknown handle is a success.
    pub async fn release(&self, handle: String) -> Result<(), NoAddress> {
        let (reply, answer) = oneshot::channel();
        let mut asked = std::pin::pin!(self.ask(Event::Release(handle, reply), answer));
        match tokio::time::timeout(UNKNOWN, &mut asked).await {
            Ok(released) => released,
            Err(_) if self.terms.is_known() => asked.await,
            Err(_) => Err(self.terms.unknown()),
        }
    }

    async fn ask<T>(&self, event: Event, answer: oneshot::Receiver<Result<T, NoAddress>>) -> Result<T, NoAddress> {
        self.events.send(event).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }
}

impl Terms {
    /// Returns once everything is known.
    async fn known(mut self) -> Result<(), NoAddress> {
        self.map.wait_for(Option::is_some).await.map_err(|_| stopping())?;
        self.pools.wait_for(Option::is_some).await.map_err(|_| stopping())?;
        self.limits.wait_for(Option::is_some).await.map_err(|_| stopping())?;
        Ok(())
    }

    /// Whether everything is known.
    pub(super) fn is_known(&self) -> bool {
        self.map.borrow().is_some() && self.pools.borrow().is_some() && self.limits.borrow().is_some()
    }

    /// What is not known yet.
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
        // Whoever asked may have gone.
        match self {
            Self::Request(_, reply) | Self::Part(_, reply) => drop(reply.send(Err(error))),
            Self::Release(_, reply) => drop(reply.send(Err(error))),
        }
    }
}

pub(super) fn stopping() -> NoAddress {
    NoAddress::Unavailable("the agent is stopping; the runtime will try again".to_owned())
}

/// Answers with what is there already and all the parts, IPv4 first, or with the first failure; what the other parts have claimed then is given back with the handle.
pub(super) async fn join(
    had: Vec<IpNet>,
    parts: Vec<oneshot::Receiver<Result<Vec<IpNet>, NoAddress>>>,
    reply: AssignReply,
) {
    let mut addresses = Ok(had);
    for part in parts {
        match (part.await.unwrap_or_else(|_| Err(stopping())), &mut addresses) {
            (Ok(more), Ok(addresses)) => addresses.extend(more),
            (Err(error), Ok(_)) => addresses = Err(error),
            (_, Err(_)) => {}
        }
    }
    let ordered = addresses.map(|mut addresses| {
        addresses.sort_by_key(|address| address.addr().is_ipv6());
        addresses
    });
    // Whoever asked may have gone.
    let _ = reply.send(ordered);
}

/// The address with its full prefix length.
pub(super) fn whole(addresses: Vec<IpAddr>) -> Vec<IpNet> {
    addresses.into_iter().map(IpNet::from).collect()
}
