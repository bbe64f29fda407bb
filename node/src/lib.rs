//! The node agent: upstream session, policy compiler, netlink drivers, IPAM and the CNI service.

pub mod cni;
pub mod digest;
pub mod ipam;
pub mod net;
pub mod nft;
pub mod policy;
pub mod state;
