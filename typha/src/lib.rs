//! Watches the API once, computes what each node must enforce, and streams deltas.
//!
//! In the order in which a change passes through:
//!
//! 1. [`kinds`]: the table of what is watched; [`feed`] and [`watch`]: one watch for every line of it;
//! 2. [`cache`]: the latest state in parsed form, what of it is news; [`overlay`]: what nodes know earlier than the API;
//! 3. [`compute`]: the owner task, which feeds the graph and computes at most once per tick;
//! 4. [`hub`]: from what changed to who is told; [`session`]: what one node still has to be told;
//! 5. [`server`], [`codec`]: the stream to a node; [`registry`]: how far each node has come.
//!
//! [`notices`] and [`reporter`] tell people what is wrong, [`debug`] and [`explain`] answer questions, [`metrics`] counts, [`app`] puts it together.

pub mod app;
pub mod cache;
pub mod codec;
pub mod compute;
pub mod config;
pub mod debug;
pub mod explain;
pub mod feed;
pub mod hub;
pub mod kinds;
pub mod metrics;
pub mod notices;
pub mod overlay;
pub mod pace;
pub mod registry;
pub mod reporter;
pub mod server;
mod services;
pub mod session;
pub mod watch;

pub use app::run;
pub use config::Args;
