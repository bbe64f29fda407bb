//! What it means: the graph from objects to each node's view, the model, and the reference evaluator.

pub mod digest;
pub mod flush;
pub mod graph;
pub mod model;
pub mod rules;
mod simple;
pub mod update;
