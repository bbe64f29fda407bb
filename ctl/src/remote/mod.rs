//! What typha and the agents know and the API server does not: which nodes enforce a change, how
//! long it took, and how each agent is.

pub mod follow;
pub mod link;
pub mod node;
pub mod trace;
pub mod wait;
