//! Lists of named ports. Rules that list the same names share one list, and for each selector one
//! set, so that many names cost a lookup like a single one.

use crate::interner::{Interner, Marks, Symbol};
use crate::store::Map;

/// Separator of the names in the text of a list. No port name contains it.
const SEPARATOR: &str = ",";

/// Lists that sets refer to, by their text.
#[derive(Debug, Default)]
pub(crate) struct PortNames(Map<Symbol, NameList>);

#[derive(Debug)]
struct NameList {
    ref_count: u32,
    /// Sorted by symbol, for binary search.
    names: Box<[Symbol]>,
}

impl PortNames {
    /// Takes a reference to the list of these names, in any order, and returns its symbol.
    pub(crate) fn acquire(&mut self, names: &[&str], interner: &mut Interner) -> Symbol {
        let mut sorted = names.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let text = interner.intern(&sorted.join(SEPARATOR));
        let list = self.0.entry(text).or_insert_with(|| {
            let mut names: Box<[Symbol]> =
                sorted.iter().map(|name| interner.intern(name)).collect();
            names.sort_unstable();
            NameList {
                ref_count: 0,
                names,
            }
        });
        list.ref_count += 1;
        text
    }

    /// Drops a reference, and with the last one the list.
    pub(crate) fn release(&mut self, list: Symbol) {
        if let Some(known) = self.0.get_mut(&list) {
            known.ref_count -= 1;
            if known.ref_count == 0 {
                self.0.remove(&list);
            }
        }
    }

    /// Returns true if the list contains the name.
    pub(crate) fn contains(&self, list: Symbol, name: Symbol) -> bool {
        self.0
            .get(&list)
            .is_some_and(|list| list.names.binary_search(&name).is_ok())
    }

    /// Marks every symbol in use.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for (text, list) in &self.0 {
            marks.mark(*text);
            marks.mark_all(list.names.iter().copied());
        }
    }
}
