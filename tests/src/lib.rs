//! Harness and scenarios: namespaces as nodes and pods, the real cluster, probers, conformance, benches.

pub mod cluster;
pub mod image;
