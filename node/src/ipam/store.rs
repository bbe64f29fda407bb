//! What IPAM needs of storage, as a trait: compare-and-swap on blocks, and the objects around them.

use std::future::Future;

use ipnet::IpNet;
use margay_api::ipam::block::Block;

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
    /// It may or may not have been done.
    #[error("{0}")]
    Failed(String),
}

/// A pool as far as claiming depends on it: one that workloads may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsablePool {
    /// Name of the object.
    pub name: String,
    /// Range.
    pub cidr: IpNet,
    /// Prefix length of its blocks.
    pub block_size: u8,
    /// Whether only those who name it may use it (`assignmentMode: Manual`).
    pub manual: bool,
    /// Whether its node selector selects this node; elsewhere it is used by those only who name it.
    pub selected: bool,
}

impl UsablePool {
    /// Whether a request that names these pools, by name or range, may use this one. Naming none means any that need not be named.
    pub fn serves(&self, named: &[String]) -> bool {
        match named {
            [] => !self.manual && self.selected,
            named => named.iter().any(|name| self.is_named(name)),
        }
    }

    /// Whether that is its name or its range.
    pub fn is_named(&self, name: &str) -> bool {
        name == self.name || name.parse() == Ok(self.cidr)
    }
}

/// State of a claim on a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AffinityState {
    /// About to make the block.
    Pending,
    /// The block is made.
    Confirmed,
}

/// Storage of IPAM objects.
pub trait Store: Send + Sync + 'static {
    /// A block, if it exists.
    fn block(&self, cidr: IpNet) -> impl Future<Output = Result<Option<Stored<Block>>, StoreError>> + Send;
    /// Makes a block that does not exist.
    fn create_block(&self, block: Block) -> impl Future<Output = Result<Stored<Block>, StoreError>> + Send;
    /// Replaces a block that has not changed since.
    fn update_block(&self, block: Stored<Block>) -> impl Future<Output = Result<Stored<Block>, StoreError>> + Send;
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
}
