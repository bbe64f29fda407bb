//! Reference counts per node: which nodes hold a record, and until when.

use crate::flush::{Audience, Change, NodeSet, RecordChange};
use crate::interner::{Interner, Symbol};
use crate::model::Record;

/// Reference counts, sorted by the symbol of the node.
#[derive(Clone, Debug, Default)]
pub(crate) struct RefCounts(Vec<(Symbol, u32)>);

impl RefCounts {
    /// Counts one more reference. Returns true if it is the node's first.
    pub(crate) fn add(&mut self, node: Symbol) -> bool {
        match self.0.binary_search_by_key(&node, |(node, _)| *node) {
            Ok(position) => {
                self.0[position].1 += 1;
                false
            }
            Err(position) => {
                self.0.insert(position, (node, 1));
                true
            }
        }
    }

    /// Drops a reference. Returns true if it was the node's last.
    pub(crate) fn remove(&mut self, node: Symbol) -> bool {
        let Ok(position) = self.0.binary_search_by_key(&node, |(node, _)| *node) else {
            return false;
        };
        self.0[position].1 -= 1;
        let is_last = self.0[position].1 == 0;
        if is_last {
            self.0.remove(position);
        }
        is_last
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Nodes, in the order of their symbols.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = Symbol> + '_ {
        self.0.iter().map(|(node, _)| *node)
    }
}

/// Digest and nodes of a record as last flushed.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) digest: u64,
    /// In the order of their symbols.
    pub(crate) nodes: Box<[Symbol]>,
}

/// Compares the nodes at the last flush with the current ones; `None` if nothing changed. `change`
/// is for nodes that keep the record.
pub(crate) fn transition(
    was: &[Symbol],
    is: &[Symbol],
    change: Change,
    interner: &Interner,
) -> Option<RecordChange> {
    if was == is && change == Change::Same {
        return None;
    }
    let missing = |from: &[Symbol], nodes: &[Symbol]| -> NodeSet {
        let missing = nodes
            .iter()
            .filter(|node| from.binary_search(node).is_err());
        missing.map(|node| interner.share(*node)).collect()
    };
    let kept: NodeSet = is
        .iter()
        .filter(|node| was.binary_search(node).is_ok())
        .map(|node| interner.share(*node))
        .collect();
    Some(RecordChange {
        gained: Audience::Nodes(missing(was, is)),
        change: if kept.is_empty() {
            Change::Same
        } else {
            change
        },
        kept: Audience::Nodes(kept),
        lost: Audience::Nodes(missing(is, was)),
    })
}

/// Audience of these nodes.
pub(crate) fn audience(nodes: impl IntoIterator<Item = Symbol>, interner: &Interner) -> Audience {
    Audience::Nodes(nodes.into_iter().map(|node| interner.share(node)).collect())
}

/// A record and its digest.
#[derive(Debug)]
pub(crate) struct Digested {
    pub(crate) record: Record,
    pub(crate) digest: u64,
}

/// Change of a record that every node holds or none.
pub(crate) fn change_for_all(had: bool, has: bool) -> RecordChange {
    let all = |is: bool| if is { Audience::All } else { no_nodes() };
    RecordChange {
        gained: all(!had && has),
        kept: all(had && has),
        change: if had && has {
            Change::Value
        } else {
            Change::Same
        },
        lost: all(had && !has),
    }
}

/// Change of a record for the nodes that held it and still do, who are all.
pub(crate) fn change_for_kept(nodes: NodeSet, change: Change) -> RecordChange {
    RecordChange {
        gained: no_nodes(),
        change,
        kept: Audience::Nodes(nodes),
        lost: no_nodes(),
    }
}

/// Empty audience.
pub(crate) fn no_nodes() -> Audience {
    Audience::Nodes(NodeSet::new())
}
