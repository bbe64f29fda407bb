//! What a flush hands over: per changed record, who must be told what.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::{Member, RecordId};

/// Nodes, by name. Names are shared: a flush may say who holds each of a hundred thousand records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSet(Box<[Arc<str>]>);

impl NodeSet {
    /// No nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the node is one of them.
    pub fn contains(&self, node: &str) -> bool {
        self.0.binary_search_by(|known| (**known).cmp(node)).is_ok()
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their names, ascending.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|node| &**node)
    }
}

impl<T: Into<Arc<str>>> FromIterator<T> for NodeSet {
    fn from_iter<I: IntoIterator<Item = T>>(nodes: I) -> Self {
        let mut nodes: Vec<Arc<str>> = nodes.into_iter().map(Into::into).collect();
        nodes.sort_unstable();
        nodes.dedup();
        Self(nodes.into())
    }
}

impl<'a> IntoIterator for &'a NodeSet {
    type Item = &'a str;
    type IntoIter = std::iter::Map<std::slice::Iter<'a, Arc<str>>, fn(&Arc<str>) -> &str>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter().map(|node| &**node)
    }
}

impl IntoIterator for NodeSet {
    type Item = String;
    type IntoIter = std::iter::Map<std::vec::IntoIter<Arc<str>>, fn(Arc<str>) -> String>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_vec().into_iter().map(|node| node.as_ref().to_owned())
    }
}

/// Who holds a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Every node: global records.
    All,
    /// These nodes.
    Nodes(NodeSet),
}

impl Audience {
    /// Whether the node is in it.
    pub fn contains(&self, node: &str) -> bool {
        match self {
            Self::All => true,
            Self::Nodes(nodes) => nodes.contains(node),
        }
    }

    /// Whether nobody is in it.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Nodes(nodes) if nodes.is_empty())
    }
}

/// Members that came and went since the last flush.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberDelta {
    /// Members that are new.
    pub added: BTreeSet<Member>,
    /// Members that are gone.
    pub removed: BTreeSet<Member>,
}

/// What a node that already held a record must be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing: the value is as it was.
    Same,
    /// The whole new value.
    Value,
    /// Only these members of a set.
    Members(MemberDelta),
}

/// One record whose value or audience changed since the last flush.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordChange {
    /// Nodes that did not hold it and now need its whole value.
    pub gained: Audience,
    /// Nodes that held it and still do.
    pub kept: Audience,
    /// What those in `kept` must be told.
    pub change: Change,
    /// Nodes that held it and must drop it.
    pub lost: Audience,
}

/// Everything that changed since the last flush, in order of dependency.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flush {
    /// The changed records.
    pub records: BTreeMap<RecordId, RecordChange>,
}
