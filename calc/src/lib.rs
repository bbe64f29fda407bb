//! What it means: the graph from objects to each node's view, the model, and the reference evaluator.

mod counts;
pub mod digest;
pub mod evaluate;
pub mod flush;
mod globals;
pub mod graph;
mod index;
mod intake;
mod members;
pub mod model;
mod policies;
mod rules;
mod selector;
mod selectors;
mod sets;
mod store;
pub mod text;
mod texts;
pub mod update;
mod view;
mod wiring;
