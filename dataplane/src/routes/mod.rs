//! Links, addresses, routes, neighbours and forwarding entries of a node, by rtnetlink.
//!
//! ```text
//!  records, local pods --plan--> Plan --diff--> RouteOp --exec--> kernel
//!                                       ^ present, read back at start and after changes by others
//!  BGP speaker --LearnedRoutes--> Learned ----exec--> kernel
//! ```

pub mod addresses;
pub mod conntrack;
mod devices;
pub mod diff;
pub mod driver;
mod ethtool;
pub mod hint;
pub mod learned;
pub mod message;
pub mod monitor;
mod netconf;
pub mod next_hop;
pub mod parameters;
pub mod plan;
pub mod pod;
pub mod present;
pub mod removal;
pub mod sysctl;
pub mod tunnel;
pub mod underlay;
pub mod worker;
