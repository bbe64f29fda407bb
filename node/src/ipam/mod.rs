//! The node's addresses: one resident allocator with the node's blocks cached, compare-and-swap on Calico's block objects.

pub mod addresses;
pub mod allocator;
mod claim;
mod commit;
mod exact;
pub mod objects;
pub mod pools;
pub mod store;
#[cfg(test)]
mod tests;
