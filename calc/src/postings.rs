//! Sets of handles of which most hold one: the items with a label that is unique, such as the name
//! of a pod.

use std::collections::BTreeSet;

/// Handles, ascending. A single one takes no memory of its own.
#[derive(Debug, Default)]
pub(crate) enum Postings {
    #[default]
    None,
    One(u32),
    #[expect(
        clippy::box_collection,
        reason = "there are many, and few have more than one"
    )]
    Many(Box<BTreeSet<u32>>),
}

impl Postings {
    /// Adds a handle.
    pub(crate) fn insert(&mut self, handle: u32) {
        match self {
            Self::None => *self = Self::One(handle),
            Self::One(first) if *first == handle => {}
            Self::One(first) => *self = Self::Many(Box::new(BTreeSet::from([*first, handle]))),
            Self::Many(all) => {
                all.insert(handle);
            }
        }
    }

    /// Removes a handle.
    pub(crate) fn remove(&mut self, handle: u32) {
        match self {
            Self::One(first) if *first == handle => *self = Self::None,
            Self::None | Self::One(_) => {}
            Self::Many(all) => {
                all.remove(&handle);
                match (all.len(), all.first()) {
                    (0, _) => *self = Self::None,
                    (1, Some(last)) => *self = Self::One(*last),
                    _ => {}
                }
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::None)
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::One(_) => 1,
            Self::Many(all) => all.len(),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let (one, many) = match self {
            Self::None => (None, None),
            Self::One(first) => (Some(*first), None),
            Self::Many(all) => (None, Some(all)),
        };
        one.into_iter()
            .chain(many.into_iter().flat_map(|all| all.iter().copied()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn postings_are_a_set(
            steps in proptest::collection::vec((any::<bool>(), 0..5_u32), 0..40),
        ) {
            let (mut postings, mut wanted) = (Postings::default(), BTreeSet::new());
            for (is_added, handle) in steps {
                if is_added {
                    postings.insert(handle);
                    wanted.insert(handle);
                } else {
                    postings.remove(handle);
                    wanted.remove(&handle);
                }
                prop_assert!(postings.iter().eq(wanted.iter().copied()));
                prop_assert_eq!(
                    (postings.len(), postings.is_empty()),
                    (wanted.len(), wanted.is_empty()),
                );
            }
        }
    }
}
