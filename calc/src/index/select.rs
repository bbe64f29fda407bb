//! The items that a selector matches: each candidate is tested, or, where they are most of all
//! items, sets of items by label are combined as the selector's operations say.

use std::collections::BTreeMap;

use super::Index;
use crate::interner::{Interner, Symbol};
use crate::item_set::{Bits, ItemSet};
use crate::postings::Postings;
use crate::selector::{Requirement, Test, is_inherited};

/// Candidates from which on sets are combined instead of testing each.
const COMBINED: usize = 4096;

impl Index {
    /// Computes the items that a selector matches, live or not, ascending.
    pub(crate) fn matching_items(&self, selector: u32, interner: &Interner) -> Vec<u32> {
        self.select(selector, interner).iter().collect()
    }

    /// Computes the items that a selector matches, live or not.
    pub(super) fn select(&self, selector: u32, interner: &Interner) -> ItemSet {
        match self.candidates(selector) {
            Some(group) if group.size(self) < COMBINED => group
                .items(self)
                .filter(|item| self.is_match(selector, *item, interner))
                .collect(),
            _ => {
                let all = self.items.iter().map(|(item, _)| item).collect();
                let test = &self.selectors[selector].test;
                self.combine(test, &all, interner).into()
            }
        }
    }

    /// Items of `all` that pass the test.
    fn combine(&self, test: &Test, all: &Bits, interner: &Interner) -> Bits {
        match test {
            Test::All => all.clone(),
            Test::Not(operand) => all.clone().without(&self.combine(operand, all, interner)),
            Test::And(operands) => operands.iter().fold(all.clone(), |items, operand| {
                items.and(&self.combine(operand, all, interner))
            }),
            Test::Or(operands) => operands.iter().fold(Bits::default(), |items, operand| {
                items.or(&self.combine(operand, all, interner))
            }),
            Test::Has(key)
            | Test::Is(key, _)
            | Test::In(key, _)
            | Test::NotIn(key, _)
            | Test::Contains(key, _)
            | Test::StartsWith(key, _)
            | Test::EndsWith(key, _) => self.items_that_pass(*key, test, all, interner),
        }
    }

    /// Items that pass a test of one label.
    fn items_that_pass(&self, key: Symbol, test: &Test, all: &Bits, interner: &Interner) -> Bits {
        // Of several parents with the label the first one counts, which only the item knows.
        if is_inherited(interner.get(key)) || !self.is_indexed(key) {
            let items = self.items.iter().map(|(item, _)| item);
            return items
                .filter(|item| self.passes(test, *item, interner))
                .collect();
        }
        let Some(by_value) = self.items_by_label.get(&key) else {
            return match test {
                Test::NotIn(..) => all.clone(),
                _ => Bits::default(),
            };
        };
        let with = |values: &[Symbol]| -> Bits {
            let found = values.iter().filter_map(|value| by_value.get(value));
            found.flat_map(Postings::iter).collect()
        };
        match test {
            Test::Is(_, value) => with(&[*value]),
            Test::In(_, values) => with(values),
            Test::NotIn(_, values) => all.clone().without(&with(values)),
            _ => by_value
                .iter()
                .filter(|(value, _)| test.matches(interner, &|_| Some(**value)))
                .flat_map(|(_, items)| items.iter())
                .collect(),
        }
    }

    /// Superset of the items that a selector matches: the smallest group that its requirements
    /// give; `None`: all.
    fn candidates(&self, selector: u32) -> Option<Candidates<'_>> {
        let mut best: Option<(usize, Candidates<'_>)> = None;
        for (key, requirement) in &self.selectors[selector].test.requirements() {
            if let Some(group) = self.items_with(*key, requirement) {
                let size = group.size(self);
                if best.as_ref().is_none_or(|(smallest, _)| size < *smallest) {
                    best = Some((size, group));
                }
            }
        }
        best.map(|(_, group)| group)
    }

    /// Items that meet one requirement; `None` if the index cannot tell.
    fn items_with(&self, key: Symbol, requirement: &Requirement) -> Option<Candidates<'_>> {
        if key == self.well_known.namespace {
            return match requirement {
                Requirement::OneOf(values) => {
                    let parents = values
                        .iter()
                        .filter_map(|value| self.parent_by_name.get(&(*value, None)));
                    Some(Candidates::Children(parents.copied().collect()))
                }
                Requirement::Present => None,
            };
        }
        // An inherited label has a prefix, which no item's own label has.
        if let Some(by_value) = self.parents_by_label.get(&key) {
            return Some(Candidates::Children(
                matching_values(by_value, requirement)
                    .flat_map(Postings::iter)
                    .collect(),
            ));
        }
        if !self.is_indexed(key) {
            return None;
        }
        let by_value = self.items_by_label.get(&key);
        Some(Candidates::Items(
            by_value
                .into_iter()
                .flat_map(|by_value| matching_values(by_value, requirement))
                .collect(),
        ))
    }
}

/// Items that meet a requirement. An item occurs once, unless it has several parents of a kind, as
/// host endpoints may.
enum Candidates<'a> {
    Items(Vec<&'a Postings>),
    Children(Vec<u32>),
}

impl<'a> Candidates<'a> {
    fn size(&self, index: &Index) -> usize {
        match self {
            Self::Items(groups) => groups.iter().map(|group| group.len()).sum(),
            Self::Children(parents) => parents
                .iter()
                .map(|parent| index.parents[*parent].items.len())
                .sum(),
        }
    }

    fn items(self, index: &'a Index) -> Box<dyn Iterator<Item = u32> + 'a> {
        match self {
            Self::Items(groups) => Box::new(groups.into_iter().flat_map(Postings::iter)),
            Self::Children(parents) => Box::new(
                parents
                    .into_iter()
                    .flat_map(|parent| index.parents[parent].items.iter().copied()),
            ),
        }
    }
}

fn matching_values<'a>(
    by_value: &'a BTreeMap<Symbol, Postings>,
    requirement: &Requirement,
) -> Box<dyn Iterator<Item = &'a Postings> + 'a> {
    match requirement {
        Requirement::Present => Box::new(by_value.values()),
        Requirement::OneOf(values) => {
            let found: Vec<_> = values
                .iter()
                .filter_map(|value| by_value.get(value))
                .collect();
            Box::new(found.into_iter())
        }
    }
}
