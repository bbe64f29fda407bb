//! What the graph and the evaluator promise, as properties over random objects and as golden texts.

mod containment;
mod converge;
mod golden;
mod naive;
mod notation;
mod oracle;
mod reference;
mod staged;
mod tables;
mod world;
