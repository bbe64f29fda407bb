//! The node agent: upstream session, policy compiler, netlink drivers, IPAM and the CNI service.

pub mod net;
pub mod nft;
