//! Calico's selector language: parser, evaluation, canonical text and id.

mod parse;
mod pattern;
mod print;
mod restrict;

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha224};

use crate::meta::Labels;

pub use parse::{MAX_DEPTH, MAX_LABEL, SelectorError, is_label_name};
pub use pattern::cel;
pub use restrict::Restriction;

/// A node of a selector's expression tree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// `all()`.
    All,
    /// `global()`: always true; its meaning for namespaces comes from the rewrite when a policy is
    /// parsed.
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

/// A parsed selector. Its `Display` is the canonical text, which parses to the same selector.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// Expression tree as written: the order of operands is kept because ids depend on it.
    pub root: Node,
}

impl Selector {
    /// Returns the selector that matches everything.
    pub fn all() -> Self {
        Self { root: Node::All }
    }

    /// Returns the selector that matches nothing, used for references that cannot be resolved.
    pub fn none() -> Self {
        Self {
            root: Node::Not(Box::new(Node::All)),
        }
    }

    /// Returns true when an object with these labels matches.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.root.matches(labels)
    }

    /// Returns the id from which Calico derives names of IP sets: `s:` and SHA-224 of the canonical
    /// text, as unpadded URL-safe base64.
    pub fn id(&self) -> String {
        let hash = Sha224::digest(format!("s:{self}"));
        format!("s:{}", URL_SAFE_NO_PAD.encode(hash))
    }

    /// Returns the same selector over labels with `prefix`, as labels inherited from namespaces and
    /// service accounts have it.
    pub fn with_prefix(&self, prefix: &str) -> Self {
        Self {
            root: self.root.with_prefix(prefix),
        }
    }

    /// Returns the conjunction. `all()` is dropped and conjunctions are flattened, so that equal
    /// meanings share an id more often.
    pub fn and(parts: impl IntoIterator<Item = Selector>) -> Self {
        let mut operands: Vec<Node> = Vec::new();
        for part in parts {
            let nodes = match part.root {
                Node::All => vec![],
                Node::And(nodes) => nodes,
                node => vec![node],
            };
            for node in nodes {
                if !operands.contains(&node) {
                    operands.push(node);
                }
            }
        }
        let root = match operands.len() {
            0 => Node::All,
            1 => operands.remove(0),
            _ => Node::And(operands),
        };
        Self { root }
    }
}

impl From<Node> for Selector {
    fn from(root: Node) -> Self {
        Self { root }
    }
}

impl Node {
    /// Returns true when an object with these labels matches.
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = |label: &String| labels.get(label);
        match self {
            Self::All | Self::Global => true,
            Self::Has(label) => labels.contains_key(label),
            Self::Equals(label, wanted) => value(label) == Some(wanted),
            Self::NotEquals(label, wanted) => value(label) != Some(wanted),
            Self::In(label, wanted) => value(label).is_some_and(|found| wanted.contains(found)),
            Self::NotIn(label, wanted) => !value(label).is_some_and(|found| wanted.contains(found)),
            Self::Contains(label, text) => {
                value(label).is_some_and(|found| found.contains(text.as_str()))
            }
            Self::StartsWith(label, text) => {
                value(label).is_some_and(|found| found.starts_with(text.as_str()))
            }
            Self::EndsWith(label, text) => {
                value(label).is_some_and(|found| found.ends_with(text.as_str()))
            }
            Self::Not(operand) => !operand.matches(labels),
            Self::And(operands) => operands.iter().all(|operand| operand.matches(labels)),
            Self::Or(operands) => operands.iter().any(|operand| operand.matches(labels)),
        }
    }

    /// Returns true when `global()` occurs anywhere.
    pub fn uses_global(&self) -> bool {
        match self {
            Self::Global => true,
            Self::Not(operand) => operand.uses_global(),
            Self::And(operands) | Self::Or(operands) => operands.iter().any(Self::uses_global),
            _ => false,
        }
    }

    fn with_prefix(&self, prefix: &str) -> Self {
        let label = |label: &String| format!("{prefix}{label}");
        let list = |operands: &[Self]| {
            operands
                .iter()
                .map(|node| node.with_prefix(prefix))
                .collect()
        };
        match self {
            Self::All => Self::All,
            Self::Global => Self::Global,
            Self::Has(name) => Self::Has(label(name)),
            Self::Equals(name, value) => Self::Equals(label(name), value.clone()),
            Self::NotEquals(name, value) => Self::NotEquals(label(name), value.clone()),
            Self::In(name, values) => Self::In(label(name), values.clone()),
            Self::NotIn(name, values) => Self::NotIn(label(name), values.clone()),
            Self::Contains(name, text) => Self::Contains(label(name), text.clone()),
            Self::StartsWith(name, text) => Self::StartsWith(label(name), text.clone()),
            Self::EndsWith(name, text) => Self::EndsWith(label(name), text.clone()),
            Self::Not(operand) => Self::Not(Box::new(operand.with_prefix(prefix))),
            Self::And(operands) => Self::And(list(operands)),
            Self::Or(operands) => Self::Or(list(operands)),
        }
    }
}
