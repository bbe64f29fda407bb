//! The node agent: it receives the node's view from typha, programs policy and routes through the
//! dataplane, and serves the CNI plugin with IPAM.
//!
//! ```text
//!  typha <--stream--> upstream --AgentEvent--> agent (thread) --commit--> dataplane --> nftables
//!                         ^                     |   |
//!                         +--acks, problems-----+   +--plan--> route worker (thread) --> netlink
//!                                               |                  ^
//!                                               +--inputs--> bgp (thread) --> sockets of peers
//!
//!  CNI plugin --socket--> cni::server --> cni::service --attach, detach--> agent
//!                                              |
//!                                              +--> margay_ipam --> API server
//! ```

pub mod agent;
pub mod app;
pub mod bgp;
mod calico_metrics;
pub mod capture;
pub mod clean;
pub mod cni;
pub mod config;
pub mod debug;
pub mod identity;
pub mod metrics;
mod metrics_port;
mod node_annotations;
pub mod pods;
pub mod problems;
pub mod requests;
pub mod state;
pub mod store;
pub mod upstream;

pub use app::run;
pub use config::Args;
