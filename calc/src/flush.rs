//! What a flush hands over: per changed record, who must be told what.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Member, RecordId};

/// Nodes, by name.
pub type NodeSet = BTreeSet<String>;

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
