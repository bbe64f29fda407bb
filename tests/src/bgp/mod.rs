//! Our BGP speaker on sockets of a network namespace, and daemons of the distribution to be its
//! peers.

mod daemon;
mod driver;
mod flow;
pub mod node;

pub use daemon::{Daemon, Kind, PACKAGES};
pub use driver::{Driver, Seen};
pub use flow::Flow;
