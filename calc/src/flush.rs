//! Result of a flush: per changed record, the nodes that gain, keep or lose it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::{Member, RecordId};

/// Nodes, by name; cheap to clone. Names are shared, as a flush may list the nodes of a hundred
/// thousand records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeSet(Arc<[Arc<str>]>);

impl NodeSet {
    /// Returns the empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns true if the node is in the set.
    pub fn contains(&self, node: &str) -> bool {
        self.0.binary_search_by(|known| (**known).cmp(node)).is_ok()
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if the set is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names, ascending.
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
    type IntoIter = std::vec::IntoIter<String>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
            .into_iter()
    }
}

/// Nodes that hold a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Every node: global records.
    All,
    /// These nodes.
    Nodes(NodeSet),
}

impl Audience {
    /// Returns true if the node holds the record.
    pub fn contains(&self, node: &str) -> bool {
        match self {
            Self::All => true,
            Self::Nodes(nodes) => nodes.contains(node),
        }
    }

    /// Returns true if no node holds the record.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Nodes(nodes) if nodes.is_empty())
    }
}

/// Members added and removed since the last flush.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberDelta {
    /// Members that are new.
    pub added: BTreeSet<Member>,
    /// Members that are gone.
    pub removed: BTreeSet<Member>,
}

/// Change of a record for the nodes that already held it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Unchanged value.
    Same,
    /// The whole new value.
    Value,
    /// Only these members of a set changed.
    Members(MemberDelta),
}

/// One record whose value or audience changed since the last flush.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordChange {
    /// Nodes that did not hold it and now need its whole value.
    pub gained: Audience,
    /// Nodes that held it and still do.
    pub kept: Audience,
    /// Change for those in `kept`.
    pub change: Change,
    /// Nodes that held it and must drop it.
    pub lost: Audience,
}

/// Everything that changed since the last flush, in dependency order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flush {
    /// The changed records.
    pub records: BTreeMap<RecordId, RecordChange>,
}
