//! Computes from API objects what each node must enforce: the graph, the record model and the
//! reference evaluator.
//!
//! Objects enter as [`update::Update`], nodes receive [`model::Record`]s, and [`graph`] has a
//! drawing of what lies between. The crate is pure: its output depends on the current objects
//! alone, not on order, time or randomness, and its tests check that.
//!
//! To read it, follow a change: `graph/ingest` (names and labels become symbols, selectors and sets
//! become handles), `graph/update` (propagates a change through the indexes), `index` (items by
//! selector), `sets`, `policies`, `items` and `globals` (what each holds and compares at a flush),
//! `graph/view` (the records of one node), `digest` (what server and agent compare).

mod auto_hosts;
pub mod bgp;
pub mod blocks;
mod claims;
pub mod conflict;
pub mod digest;
pub mod evaluate;
pub mod explain;
pub mod flush;
mod globals;
pub mod graph;
mod index;
pub mod ingest;
mod interner;
mod item_set;
mod items;
pub mod kinds;
pub mod model;
mod node_sets;
mod policies;
mod port_names;
mod postings;
mod quota;
mod refcount;
mod rules;
mod selector;
mod selectors;
mod services;
mod sets;
mod settings;
mod store;
pub mod text;
pub mod update;
