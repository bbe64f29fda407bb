//! What the graph and the evaluator promise, as properties over random objects and as golden texts.

mod converge;
mod oracle;
mod reference;
mod world;
