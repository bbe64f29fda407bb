//! Conversion of Calico's kinds to the parsed forms: validate, default, rewrite selectors.

pub(super) mod controllers;
pub(super) mod felix;
pub(super) mod host;
pub(super) mod netset;
pub(super) mod policy;
pub(super) mod pool;
mod reserved;
mod rule;
mod scope;
pub(super) mod staged;
pub(super) mod tier;
