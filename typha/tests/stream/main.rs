//! Streams to simulated nodes, from objects to the records of a node; [`held`] applies frames.

mod behaviour;
mod convergence;
mod debug;
mod held;
mod peers;
mod reached;
mod replicas;
mod server;
