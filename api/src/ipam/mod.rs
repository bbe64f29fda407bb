//! IPAM data: block arithmetic, names, limits, and the order in which a node looks for a new block.

pub mod block;
pub mod info;
pub mod limits;
pub mod names;
pub mod search;
