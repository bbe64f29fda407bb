//! How many reasons there are, per node: who holds a record, and until when.

use crate::flush::{Audience, Change, NodeSet, RecordChange};
use crate::texts::{Text, Texts};

/// Nodes with the number of reasons why each holds something.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(Vec<(Text, u32)>);

impl Counts {
    /// One more reason. True if it is the node's first.
    pub(crate) fn add(&mut self, node: Text) -> bool {
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

    /// One reason less. True if it was the node's last.
    pub(crate) fn remove(&mut self, node: Text) -> bool {
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

    /// The nodes, in the order of their numbers.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = Text> + '_ {
        self.0.iter().map(|(node, _)| *node)
    }
}

/// What was told of a record, and to whom.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) digest: u64,
    /// In the order of their numbers.
    pub(crate) nodes: Box<[Text]>,
}

/// What changed between what was told and what is now; none if nothing did. `Change` is for those who keep the record.
pub(crate) fn transition(was: &[Text], is: &[Text], change: Change, texts: &Texts) -> Option<RecordChange> {
    if was == is && change == Change::Same {
        return None;
    }
    let missing = |from: &[Text], nodes: &[Text]| -> NodeSet {
        let missing = nodes.iter().filter(|node| from.binary_search(node).is_err());
        missing.map(|node| texts.share(*node)).collect()
    };
    let kept: NodeSet =
        is.iter().filter(|node| was.binary_search(node).is_ok()).map(|node| texts.share(*node)).collect();
    Some(RecordChange {
        gained: Audience::Nodes(missing(was, is)),
        change: if kept.is_empty() { Change::Same } else { change },
        kept: Audience::Nodes(kept),
        lost: Audience::Nodes(missing(is, was)),
    })
}

/// These nodes, by name.
pub(crate) fn audience(nodes: impl IntoIterator<Item = Text>, texts: &Texts) -> Audience {
    Audience::Nodes(nodes.into_iter().map(|node| texts.share(node)).collect())
}
