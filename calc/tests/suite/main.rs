//! What the graph and the evaluator promise, as properties over random objects and as golden texts.

mod belief;
mod containment;
mod converge;
mod golden;
mod hosts;
mod large;
mod naive;
mod naive_host;
mod notation;
mod oracle;
mod reference;
mod staged;
mod tables;
mod world;
