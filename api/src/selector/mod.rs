//! Calico's selector language: text to tree, tree to verdict, canonical text and id.

use std::collections::BTreeSet;

use crate::meta::Labels;

/// One operation of a selector.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// `all()`.
    All,
    /// `global()`: true; what it means for namespaces comes from the rewrite when a policy is parsed.
    Global,
    /// `has(label)`.
    Has(String),
    /// `label == "value"`.
    Equals(String, String),
    /// `label != "value"`; true when the label is absent.
    NotEquals(String, String),
    /// `label in {...}`.
    In(String, BTreeSet<String>),
    /// `label not in {...}`; true when the label is absent.
    NotIn(String, BTreeSet<String>),
    /// `label contains "text"`.
    Contains(String, String),
    /// `label starts with "text"`.
    StartsWith(String, String),
    /// `label ends with "text"`.
    EndsWith(String, String),
    /// `!operand`.
    Not(Box<Node>),
    /// `(a && b && ...)`.
    And(Vec<Node>),
    /// `(a || b || ...)`.
    Or(Vec<Node>),
}

/// A parsed selector.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// The tree, in canonical order where order has no meaning.
    pub root: Node,
}

impl Selector {
    /// The selector that matches everything.
    pub fn all() -> Self {
        Self { root: Node::All }
    }

    /// Whether something with these labels matches.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.root.matches(labels)
    }
}

impl Node {
    /// Whether something with these labels matches.
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = |label: &String| labels.get(label);
        match self {
            Self::All | Self::Global => true,
            Self::Has(label) => labels.contains_key(label),
            Self::Equals(label, wanted) => value(label) == Some(wanted),
            Self::NotEquals(label, wanted) => value(label) != Some(wanted),
            Self::In(label, wanted) => value(label).is_some_and(|found| wanted.contains(found)),
            Self::NotIn(label, wanted) => !value(label).is_some_and(|found| wanted.contains(found)),
            Self::Contains(label, text) => value(label).is_some_and(|found| found.contains(text.as_str())),
            Self::StartsWith(label, text) => value(label).is_some_and(|found| found.starts_with(text.as_str())),
            Self::EndsWith(label, text) => value(label).is_some_and(|found| found.ends_with(text.as_str())),
            Self::Not(operand) => !operand.matches(labels),
            Self::And(operands) => operands.iter().all(|operand| operand.matches(labels)),
            Self::Or(operands) => operands.iter().any(|operand| operand.matches(labels)),
        }
    }
}
