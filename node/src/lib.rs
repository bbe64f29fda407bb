//! The node agent: upstream session, state, the loop that enforces it, and the CNI service.

pub mod agent;
pub mod app;
pub mod cni;
pub mod config;
pub mod debug;
pub mod identity;
pub mod metrics;
pub mod pods;
pub mod problems;
pub mod requests;
pub mod state;
pub mod store;
pub mod upstream;

pub use app::run;
pub use config::Args;
