//! The targets of `tests/tests/fuzz`, for libFuzzer.

#[path = "../../tests/tests/fuzz/targets.rs"]
pub mod targets;
