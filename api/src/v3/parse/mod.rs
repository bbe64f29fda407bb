//! Conversion of Calico's kinds to the parsed forms: validate, default, rewrite selectors.

pub mod bgp;
pub mod controllers;
pub mod felix;
pub mod host;
pub mod netset;
pub mod policy;
pub mod pool;
mod reserved;
mod rule;
mod scope;
pub mod staged;
pub mod tier;
