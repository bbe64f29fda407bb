//! The policy compiler: it renders the node's view and its attached pods to one nftables table.
//! Pure, except for [`kernel`].
//!
//! ```text
//!  prerouting -300   guard          a pod sends from its own addresses only
//!  input      0      to-host        egress policy to the own node; tunnel packets from nodes only
//!  forward    0      from-workload  egress policy of the sender
//!  forward    1      to-workload    ingress policy of the receiver
//!  postrouting 110   masquerade     packets that leave the pools
//! ```
//!
//! and, where the node has host endpoints (`host.rs`),
//!
//! ```text
//!  prerouting -299   host-untracked-in    doNotTrack policy, before connection tracking
//!  prerouting -150   host-pre-dnat        preDNAT policy, before destinations are translated
//!  input      2      host-in              policy of packets to the host
//!  forward    -1, 2  host-forward-in/out  applyOnForward policy of input and output interface
//!  output     -300   host-untracked-out   doNotTrack policy
//!  output     0      host-out             policy of packets from the host
//!  postrouting 0     host-leave           the same for translated packets, by their interface
//! ```
//!
//! and, where a pod has host ports, those of `host_ports.rs`; where kube-proxy is in IPVS mode,
//! those of `ipvs.rs`.
//!
//! Egress and ingress are separate base chains, so that Allow is `accept` at any depth: it ends one
//! decision, and the packet goes on to the other. Both begin with the connection state, so that an
//! established packet crosses one rule of each.
//!
//! A verdict map leads from interface to **class**: endpoints with the same tiers, policies and
//! default action share their chains. Chains are named by a hash of their list of policies, not of
//! the rules, so a changed rule rewrites its chain in place and nothing else. Set members never
//! appear in rules. Packets from or to a `cali*` interface that the maps do not contain are
//! dropped.

mod base;
mod class;
mod compiler;
pub mod dataplane;
mod demands;
mod elements;
mod host;
mod host_ports;
mod ipvs;
pub mod kernel;
mod merge;
#[cfg(any(test, feature = "testing"))]
#[allow(missing_docs, reason = "for tests")]
pub mod model;
mod names;
mod origin;
mod rule;
#[cfg(any(test, feature = "testing"))]
#[allow(missing_docs, reason = "for tests")]
pub mod sample;
pub mod simulate;
mod stage;
mod union;

pub use class::Class;
pub use compiler::{Compiler, TablePart};
pub use dataplane::Nftables;
pub use ipvs::ipvs_advice;
pub use kernel::{Kernel, Netfilter, TableWatch};
pub use names::table;
pub use origin::RuleOrigin;
pub use stage::{Direction, Stage};
