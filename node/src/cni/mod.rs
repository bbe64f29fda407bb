//! The agent's side of the CNI plugin: a unix socket with one request and one response per
//! connection.

pub mod announce;
pub mod attachment;
pub mod conf;
pub mod host_file;
pub mod plugin;
pub mod ports;
pub mod request;
pub mod server;
pub mod service;
