//! IP address management: who owns an address.

pub mod addresses;
pub mod allocator;
mod back;
mod borrow;
pub mod check;
mod claim;
pub mod collector;
mod commit;
mod exact;
mod known;
pub mod leak_scan;
pub mod limits;
mod node_objects;
mod owner;
pub mod pools;
pub mod request;
pub mod spaces;
pub mod store;
#[cfg(test)]
mod tests;
