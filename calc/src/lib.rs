//! What it means: the graph from objects to each node's view, the model, and the reference evaluator.

pub mod flush;
pub mod model;
pub mod update;
