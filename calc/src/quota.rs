//! Quotas: of the things that a holder has, the first ones in order are within its quota, whatever
//! it writes.

use std::collections::{BTreeMap, BTreeSet};

/// Things of each holder, of which the first `most` are within its quota.
#[derive(Debug)]
pub(crate) struct Quota<H, T> {
    most: usize,
    holders: BTreeMap<H, Ranked<T>>,
}

/// All in `within` come before all in `beyond`, which is empty unless `within` is full.
#[derive(Debug)]
struct Ranked<T> {
    within: BTreeSet<T>,
    beyond: BTreeSet<T>,
}

impl<H: Ord, T: Ord + Clone> Quota<H, T> {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            holders: BTreeMap::new(),
        }
    }

    /// Adds a thing of the holder. Returns the one that this moved out of the quota, unless it is
    /// the thing itself.
    pub(crate) fn add(&mut self, holder: H, thing: T) -> Option<T> {
        let empty = || Ranked {
            within: BTreeSet::new(),
            beyond: BTreeSet::new(),
        };
        let Ranked { within, beyond } = self.holders.entry(holder).or_insert_with(empty);
        if within.len() == self.most && within.last().is_none_or(|last| *last < thing) {
            beyond.insert(thing);
            return None;
        }
        within.insert(thing);
        let last = if within.len() > self.most {
            within.pop_last()
        } else {
            None
        };
        beyond.extend(last.clone());
        last
    }

    /// Removes a thing of the holder. Returns the one that this moved into the quota.
    pub(crate) fn remove(&mut self, holder: &H, thing: &T) -> Option<T> {
        let Ranked { within, beyond } = self.holders.get_mut(holder)?;
        let next = if within.remove(thing) {
            beyond.pop_first()
        } else {
            beyond.remove(thing);
            None
        };
        within.extend(next.clone());
        if within.is_empty() && beyond.is_empty() {
            self.holders.remove(holder);
        }
        next
    }

    /// Returns true if the holder's thing is within its quota.
    pub(crate) fn is_within(&self, holder: &H, thing: &T) -> bool {
        self.holders
            .get(holder)
            .is_some_and(|ranked| ranked.within.contains(thing))
    }

    /// Holders that exceed their quota, with the number of their things.
    pub(crate) fn exceeded(&self) -> impl Iterator<Item = (&H, usize)> {
        let all = self
            .holders
            .iter()
            .filter(|(_, ranked)| !ranked.beyond.is_empty());
        all.map(|(holder, ranked)| (holder, ranked.within.len() + ranked.beyond.len()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// After any sequence of changes the first ones are within, and every one that moved is
        /// returned.
        #[test]
        fn the_first_are_within(
            steps in proptest::collection::vec((0..2_u8, 0..12_u8, any::<bool>()), 0..80),
            most in 0..5_usize,
        ) {
            let mut quota = Quota::new(most);
            let mut all: BTreeSet<(u8, u8)> = BTreeSet::new();
            let within = |all: &BTreeSet<(u8, u8)>| -> BTreeSet<(u8, u8)> {
                let of = |holder: u8| all
                    .iter()
                    .filter(move |(of, _)| *of == holder)
                    .take(most)
                    .copied();
                of(0).chain(of(1)).collect()
            };
            for (holder, thing, is_there) in steps {
                let before = within(&all);
                let moved = match is_there {
                    true if all.insert((holder, thing)) => quota.add(holder, thing),
                    true => None,
                    false => { all.remove(&(holder, thing)); quota.remove(&holder, &thing) }
                };
                let after = within(&all);
                let changed = before.symmetric_difference(&after).copied();
                let others: Vec<(u8, u8)> = changed.filter(|one| *one != (holder, thing)).collect();
                prop_assert_eq!(
                    others,
                    moved.map(|thing| (holder, thing)).into_iter().collect::<Vec<_>>(),
                );
                for one in &all {
                    prop_assert_eq!(quota.is_within(&one.0, &one.1), after.contains(one));
                }
                let exceeded: Vec<(u8, usize)> = quota
                    .exceeded()
                    .map(|(holder, count)| (*holder, count))
                    .collect();
                let counts = [0, 1].map(
                    |holder| (holder, all.iter().filter(|(of, _)| *of == holder).count()),
                );
                prop_assert_eq!(
                    exceeded,
                    counts.into_iter().filter(|(_, count)| *count > most).collect::<Vec<_>>(),
                );
            }
        }
    }
}
