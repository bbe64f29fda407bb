//! The node's addresses: one resident allocator with the node's blocks cached, compare-and-swap on Calico's block objects.

pub mod allocator;
mod claim;
mod commit;
pub mod store;
#[cfg(test)]
mod tests;
