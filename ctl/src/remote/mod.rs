//! What typha and the agents know and the API server does not: which nodes enforce a change, how
//! long it took, how each agent is, and the packets of a pod.

pub mod capture;
pub mod follow;
pub mod link;
pub mod node;
pub mod trace;
pub mod wait;
