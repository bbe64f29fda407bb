//! What it means: the graph from objects to each node's view, the model, and the reference evaluator.
//!
//! Objects come in as [`update::Update`], what nodes enforce goes out as [`model::Record`], and [`graph`] has the drawing of what lies
//! between. It is pure: what comes out depends on the objects alone, not on order, time or chance, and the tests hold it to that.
//!
//! To read it, follow a change: `intake` (texts and selectors become numbers), `wiring` (every step of what follows from what), `index`
//! (which items a selector selects), `sets`, `policies`, `members` and `globals` (what each keeps and compares at a flush), `view` (a node's
//! part), `digest` (what two sides compare).

pub mod blocks;
mod claims;
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
mod node_sets;
mod policies;
mod port_names;
mod quota;
mod rules;
mod selector;
mod selectors;
mod sets;
mod settings;
pub mod staged;
mod store;
pub mod text;
mod texts;
pub mod update;
mod view;
mod wiring;
