//! What IPAM needs of storage, as a trait: compare-and-swap on blocks, and the objects around them.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::meta::Labels;
use margay_api::rule::IpVersion;
use margay_api::selector::Selector;

/// A value with the revision under which it was read or written.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored<T> {
    /// The value.
    pub value: T,
    /// Opaque; a write with an old revision is refused.
    pub revision: String,
}

/// Why a request did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It exists already, or was changed since it was read.
    #[error("changed by somebody else")]
    Conflict,
    /// The API server does not let this node do it.
    #[error("{0}")]
    Refused(String),
    /// It may or may not have been done.
    #[error("{0}")]
    Failed(String),
}

/// A pool as a node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePool {
    /// Name of the object.
    pub name: String,
    /// Range.
    pub cidr: IpNet,
    /// Prefix length of its blocks.
    pub block_size: u8,
    /// Whether only those who name it may use it (`assignmentMode: Manual`).
    pub manual: bool,
    /// Whether its nodeSelector selects this node; elsewhere it is used by those only who name it.
    pub selected: bool,
    /// Namespaces whose pods it serves, whether they name it or not; none: all.
    pub namespaces: Option<Selector>,
    /// Whether workloads may use it.
    pub workloads: bool,
    /// Whether tunnels may use it.
    pub tunnels: bool,
    /// Why nothing new is taken from it, if so; follows its name. What has been taken stays in use.
    pub closed: Option<String>,
    /// It is being deleted: what is empty of it is given back at once, and a tunnel's address moves to another pool.
    pub is_leaving: bool,
}

/// What an address is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Use {
    /// A pod.
    #[default]
    Workload,
    /// A tunnel device of the node.
    Tunnel,
}

/// Which pools an address may come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// What it is for.
    pub usage: Use,
    /// Names or ranges of pools; empty: any pool that need not be named.
    pub named: Vec<String>,
    /// Pools with a namespaceSelector that selects the namespace of the pod.
    pub admitted: BTreeSet<String>,
}

impl NodePool {
    /// Why the pool does not serve the choice, if so; follows the pool's name.
    pub fn refusal(&self, choice: &Choice) -> Option<&str> {
        let is_named = choice.named.iter().any(|name| self.is_named(name));
        let for_use = match choice.usage {
            Use::Workload => self.workloads,
            Use::Tunnel => self.tunnels,
        };
        match (&self.closed, choice.usage) {
            (Some(why), _) => Some(why),
            (None, Use::Workload) if !for_use => Some("is not for workloads (allowedUses)"),
            (None, Use::Tunnel) if !for_use => Some("is not for tunnels (allowedUses)"),
            _ if self.namespaces.is_some() && !choice.admitted.contains(&self.name) => {
                Some("has a namespaceSelector that does not select the pod's namespace")
            }
            _ if is_named => None,
            _ if !choice.named.is_empty() => Some("is not among the pools that are named"),
            _ if self.manual => Some("has to be named (assignmentMode Manual)"),
            _ if !self.selected => Some("has a nodeSelector that does not select this node"),
            _ => None,
        }
    }

    /// Whether an address of that choice may come from it.
    pub fn serves(&self, choice: &Choice) -> bool {
        self.refusal(choice).is_none()
    }

    /// Whether this node uses it without being told to: what its blocks are kept for.
    pub fn is_for_node(&self) -> bool {
        self.closed.is_none() && self.selected && !self.manual
    }

    /// Whether that is its name or its range.
    pub fn is_named(&self, name: &str) -> bool {
        name == self.name || name.parse() == Ok(self.cidr)
    }

    /// Whether the range is a block of it as blocks are now.
    pub fn has_block(&self, cidr: IpNet) -> bool {
        self.cidr.contains(&cidr) && cidr.prefix_len() == self.block_size && cidr.trunc() == cidr
    }
}

/// A namespace as far as addresses of its pods depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its labels.
    pub labels: Labels,
    /// Its annotations that name pools, as they are written.
    pub pools: BTreeMap<IpVersion, String>,
}

/// State of a claim on a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AffinityState {
    /// About to make the block.
    Pending,
    /// The block is made.
    Confirmed,
    /// The block is about to be given back.
    PendingDeletion,
}

/// Storage of IPAM objects.
pub trait Store: Send + Sync + 'static {
    /// A block, if it exists.
    fn block(&self, cidr: IpNet) -> impl Future<Output = Result<Option<Stored<Block>>, StoreError>> + Send;
    /// Makes a block that does not exist.
    fn create_block(&self, block: Block) -> impl Future<Output = Result<Stored<Block>, StoreError>> + Send;
    /// Replaces a block that has not changed since.
    fn update_block(&self, block: Stored<Block>) -> impl Future<Output = Result<Stored<Block>, StoreError>> + Send;
    /// Deletes a block that has not changed since.
    fn delete_block(&self, block: Stored<Block>) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Writes this node's claim on a block.
    fn put_affinity(&self, cidr: IpNet, state: AffinityState) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Takes this node's claim back; one that does not exist is a success.
    fn delete_affinity(&self, cidr: IpNet) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Records that one address of each of these blocks is under the handle; what is recorded already is a success.
    fn put_handle(&self, handle: String, blocks: Vec<IpNet>) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Blocks that a handle has addresses in; none if there is no such handle.
    fn handle_blocks(&self, handle: String) -> impl Future<Output = Result<Vec<IpNet>, StoreError>> + Send;
    /// Forgets a handle; one that does not exist is a success.
    fn delete_handle(&self, handle: String) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// A namespace; one that does not exist has no labels and no annotations.
    fn namespace(&self, name: String) -> impl Future<Output = Result<Namespace, StoreError>> + Send;
}
