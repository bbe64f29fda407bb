//! Harness and scenarios: namespaces as nodes and pods, the real cluster, probers, conformance,
//! benches.

pub mod admission;
pub mod bench;
pub mod bgp;
pub mod canary;
pub mod cluster;
pub mod conformance;
pub mod demo;
pub mod e2e;
pub mod fanout;
pub mod image;
pub mod install;
pub mod lab;
pub mod machine;
pub mod matrix;
pub mod namespace;
pub mod plugin;
pub mod probe;
pub mod raw;
pub mod rights;
pub mod scenarios;
pub mod suite;
pub mod trace;
pub mod world;
