//! What is wrong with a configuration.

use std::fmt;

use margay_api::bgp::InvalidFilterRule;

/// A value of the configuration that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value}, but it {rule}; {remedy}")]
pub struct ConfigError {
    /// Name of the field.
    pub field: &'static str,
    /// What it has.
    pub value: String,
    /// What it must be.
    pub rule: &'static str,
    /// What helps.
    pub remedy: &'static str,
}

pub(crate) fn invalid(
    field: &'static str,
    value: impl fmt::Display,
    rule: &'static str,
    remedy: &'static str,
) -> ConfigError {
    ConfigError {
        field,
        value: value.to_string(),
        rule,
        remedy,
    }
}

impl From<InvalidFilterRule> for ConfigError {
    fn from(error: InvalidFilterRule) -> Self {
        let InvalidFilterRule {
            field,
            value,
            rule: _,
            remedy,
        } = error;
        Self {
            field,
            value,
            rule: "is within the limits of BGPFilter",
            remedy,
        }
    }
}
