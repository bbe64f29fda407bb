//! Sets of items: of a few as a tree, of many as bits, which cost next to nothing per item.

use std::collections::BTreeSet;

/// Number of items from which on a set is kept as bits.
const MANY: usize = 4096;
/// Bits of a word.
const WORD: usize = 64;

/// Handles of items, ascending.
#[derive(Debug)]
pub(crate) enum ItemSet {
    Few(BTreeSet<u32>),
    Many(Bits),
}

/// Handles of items as bits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bits {
    words: Vec<u64>,
    count: usize,
}

impl Default for ItemSet {
    fn default() -> Self {
        Self::Few(BTreeSet::new())
    }
}

impl From<Bits> for ItemSet {
    fn from(bits: Bits) -> Self {
        match bits.count < MANY {
            true => Self::Few(bits.iter().collect()),
            false => Self::Many(bits),
        }
    }
}

impl FromIterator<u32> for ItemSet {
    fn from_iter<T: IntoIterator<Item = u32>>(items: T) -> Self {
        let few: BTreeSet<u32> = items.into_iter().collect();
        match few.len() < MANY {
            true => Self::Few(few),
            false => Self::Many(few.into_iter().collect()),
        }
    }
}

impl ItemSet {
    /// Returns true if the set is kept as bits.
    pub(crate) fn is_broad(&self) -> bool {
        matches!(self, Self::Many(_))
    }

    pub(crate) fn contains(&self, item: u32) -> bool {
        match self {
            Self::Few(few) => few.contains(&item),
            Self::Many(bits) => bits.contains(item),
        }
    }

    /// Adds an item, which may make the set broad.
    pub(crate) fn insert(&mut self, item: u32) {
        match self {
            Self::Few(few) => {
                few.insert(item);
                if few.len() >= MANY {
                    *self = Self::Many(few.iter().copied().collect());
                }
            }
            Self::Many(bits) => bits.insert(item),
        }
    }

    /// Removes an item. A broad set stays broad until it has half as many as make one.
    pub(crate) fn remove(&mut self, item: u32) {
        match self {
            Self::Few(few) => drop(few.remove(&item)),
            Self::Many(bits) => {
                bits.remove(item);
                if bits.count < MANY / 2 {
                    *self = Self::Few(bits.iter().collect());
                }
            }
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let (few, many) = match self {
            Self::Few(few) => (Some(few.iter().copied()), None),
            Self::Many(bits) => (None, Some(bits.iter())),
        };
        few.into_iter().flatten().chain(many.into_iter().flatten())
    }
}

impl FromIterator<u32> for Bits {
    fn from_iter<T: IntoIterator<Item = u32>>(items: T) -> Self {
        let mut bits = Self::default();
        items.into_iter().for_each(|item| bits.insert(item));
        bits
    }
}

impl Bits {
    pub(crate) fn contains(&self, item: u32) -> bool {
        let (word, bit) = place(item);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    pub(crate) fn insert(&mut self, item: u32) {
        let (word, bit) = place(item);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let is_new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.count += usize::from(is_new);
    }

    fn remove(&mut self, item: u32) {
        let (word, bit) = place(item);
        if let Some(word) = self.words.get_mut(word)
            && *word & bit != 0
        {
            *word &= !bit;
            self.count -= 1;
        }
    }

    /// Items of either set.
    pub(crate) fn or(mut self, other: &Self) -> Self {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        let words = self.words.iter_mut().zip(&other.words);
        words.for_each(|(word, other)| *word |= other);
        self.counted()
    }

    /// Items of both sets.
    pub(crate) fn and(mut self, other: &Self) -> Self {
        self.words.truncate(other.words.len());
        let words = self.words.iter_mut().zip(&other.words);
        words.for_each(|(word, other)| *word &= other);
        self.counted()
    }

    /// Items of this set that are not in the other.
    pub(crate) fn without(mut self, other: &Self) -> Self {
        let words = self.words.iter_mut().zip(&other.words);
        words.for_each(|(word, other)| *word &= !other);
        self.counted()
    }

    fn counted(mut self) -> Self {
        let ones = self.words.iter().map(|word| word.count_ones() as usize);
        self.count = ones.sum();
        self
    }

    fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(index, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    (index * WORD) as u32 + bit
                })
            })
        })
    }
}

/// Word and bit of an item.
fn place(item: u32) -> (usize, u64) {
    (item as usize / WORD, 1 << (item as usize % WORD))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn items() -> impl Strategy<Value = BTreeSet<u32>> {
        proptest::collection::btree_set(0..300_u32, 0..60)
    }

    proptest! {
        #[test]
        fn bits_are_sets(one in items(), other in items()) {
            let bits = |items: &BTreeSet<u32>| items.iter().copied().collect::<Bits>();
            let list = |bits: &Bits| bits.iter().collect::<BTreeSet<u32>>();
            let (first, second) = (bits(&one), bits(&other));
            prop_assert_eq!(list(&first), one.clone());
            let cases = [
                (first.clone().or(&second), &one | &other),
                (first.clone().and(&second), &one & &other),
                (first.without(&second), &one - &other),
            ];
            for (bits, wanted) in cases {
                prop_assert_eq!(bits.count, wanted.len());
                prop_assert_eq!(list(&bits), wanted);
            }
        }
    }

    #[test]
    fn a_set_grows_into_bits_and_shrinks_out_of_them() {
        let (mut set, mut wanted) = (ItemSet::default(), BTreeSet::new());
        for item in 0..MANY as u32 + 10 {
            set.insert(3 * item);
            wanted.insert(3 * item);
            assert_eq!(set.is_broad(), wanted.len() >= MANY);
        }
        assert!(set.iter().eq(wanted.iter().copied()));
        assert!(set.contains(3) && !set.contains(4));
        for item in 0..MANY as u32 {
            set.remove(3 * item);
            set.remove(3 * item + 1);
            wanted.remove(&(3 * item));
        }
        assert!(!set.is_broad());
        assert!(set.iter().eq(wanted.iter().copied()));
    }
}
