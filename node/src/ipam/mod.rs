//! The node's addresses: one resident allocator with the node's blocks cached, compare-and-swap on Calico's block objects.

pub mod addresses;
pub mod allocator;
mod back;
mod borrow;
mod bounded;
mod claim;
pub mod collection;
mod commit;
mod exact;
mod known;
pub mod limits;
pub mod objects;
mod owner;
pub mod pools;
pub mod spaces;
pub mod store;
#[cfg(test)]
mod tests;
