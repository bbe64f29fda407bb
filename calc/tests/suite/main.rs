//! Properties over random objects and golden texts for the graph and the evaluator.

mod bgp;
mod claims;
mod containment;
mod converge;
mod digests;
mod golden;
mod hosts;
mod large;
mod members;
mod naive;
mod naive_host;
mod notation;
mod oracle;
mod reference;
mod staged;
mod tables;
mod world;
