//! The command line: `kubectl margay`, and `calicoctl` by its other name.
//!
//! Questions about policy work on a cluster in memory: [`manifest`] reads documents and [`live`] an
//! API server, [`objects`] makes of them what policy depends on, [`cluster`] adds what an API
//! server would and computes with the graph that typha has. [`explain`], [`diff`] and [`validate`]
//! ask it, [`report`] and [`tree`] show answers. [`calico`] shows and changes Calico's objects,
//! [`status`] the installation; [`remote`] asks typha and the agents.

pub mod address;
pub mod calico;
pub mod classes;
pub mod cli;
pub mod cluster;
pub mod connectivity;
pub mod diff;
pub mod explain;
pub mod live;
pub mod manifest;
pub mod objects;
pub mod output;
pub mod pages;
pub mod party;
pub mod ports;
pub mod remote;
pub mod report;
pub mod service;
pub mod source;
pub mod status;
pub mod sysdump;
pub mod tree;
pub mod uninstall;
pub mod unused;
pub mod validate;
pub mod workload;

pub use cli::run;
