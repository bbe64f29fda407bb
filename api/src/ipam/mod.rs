//! IPAM as data: block arithmetic, names, and the order in which a node looks for a new block.

pub mod block;
pub mod names;
pub mod search;
