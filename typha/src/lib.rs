//! Watches the API once, computes what each node must enforce, and streams deltas.
//!
//! A change passes through:
//!
//! 1. [`kinds`]: table of the watched kinds; [`watch`] and [`feed`]: list and watch of each;
//! 2. [`cache`]: latest state in parsed form ([`packed`]: of pods), and its changes; [`overlay`]:
//!    pod addresses that nodes report ahead of the API; `services`: EndpointSlices merged per
//!    Service;
//! 3. [`compute`]: the owner task, which applies changes to the graph and flushes once per tick;
//!    [`freshness`]: whether it knows what a node holds already; [`placement`] of nodes on replicas
//!    (`replicas`);
//! 4. [`hub`]: from a flush to the sessions that it concerns; [`session`]: pending changes of a
//!    node;
//! 5. [`server`], [`codec`], [`body`]: the stream to a node; [`delivery`]: how often frames are
//!    sent; [`registry`]: progress of each node.
//!
//! [`object`], [`cause`], [`hello`] and [`event`] are the messages between these. [`object_events`]
//! and [`reporter`] report problems, [`debug`] answers questions, [`metrics`] counts, [`app`]
//! starts all.

pub mod app;
pub mod body;
pub mod cache;
pub mod cause;
pub mod codec;
pub mod compute;
pub mod config;
pub mod debug;
pub mod delivery;
pub mod event;
pub mod feed;
pub mod freshness;
pub mod hello;
pub mod hub;
pub mod kinds;
pub mod metrics;
pub mod object;
pub mod object_events;
pub mod overlay;
pub mod pace;
pub mod packed;
pub mod placement;
pub mod registry;
mod replicas;
pub mod reporter;
pub mod server;
mod services;
pub mod session;
pub mod watch;

pub use app::run;
pub use config::Args;
