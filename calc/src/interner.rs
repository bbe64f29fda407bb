//! String interner: names, label keys and values as `u32` symbols, reclaimed by
//! [`Interner::sweep`].
//!
//! Symbols are not reference counted; a sweep marks those in use, as a garbage collector does.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::sync::Arc;

use margay_api::meta::NamespacedName;

/// Handle of an interned string. The order of symbols is not that of their strings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Symbol(u32);

/// Namespace and name.
pub(crate) type NamePair = (Symbol, Symbol);

/// All interned strings.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    // SipHash with fixed keys: users choose these strings, so a weak hash would let them provoke
    // collisions.
    by_string: HashMap<Arc<str>, Symbol, BuildHasherDefault<DefaultHasher>>,
    strings: Vec<Option<Arc<str>>>,
    free: Vec<u32>,
    /// Number of strings after the last sweep.
    len_after_sweep: usize,
}

impl Interner {
    /// Returns the symbol of a string, adding it if it is new.
    pub(crate) fn intern(&mut self, text: &str) -> Symbol {
        if let Some(known) = self.by_string.get(text) {
            return *known;
        }
        let text: Arc<str> = text.into();
        let index = match self.free.pop() {
            Some(index) => {
                self.strings[index as usize] = Some(text.clone());
                index
            }
            None => {
                self.strings.push(Some(text.clone()));
                u32::try_from(self.strings.len() - 1)
                    .expect("fewer than 2^32 strings fit into memory")
            }
        };
        self.by_string.insert(text, Symbol(index));
        Symbol(index)
    }

    /// Interns namespace and name.
    pub(crate) fn intern_pair(&mut self, name: &NamespacedName) -> NamePair {
        (self.intern(&name.namespace), self.intern(&name.name))
    }

    /// Symbols of namespace and name, if both are interned.
    pub(crate) fn find_pair(&self, namespace: &str, name: &str) -> Option<NamePair> {
        Some((self.find(namespace)?, self.find(name)?))
    }

    /// Symbol of a string, if it is interned.
    pub(crate) fn find(&self, text: &str) -> Option<Symbol> {
        self.by_string.get(text).copied()
    }

    /// String of a symbol.
    pub(crate) fn get(&self, symbol: Symbol) -> &str {
        self.strings[symbol.0 as usize]
            .as_deref()
            .expect("a symbol in use is marked in every sweep")
    }

    /// Shared string of a symbol.
    pub(crate) fn share(&self, symbol: Symbol) -> Arc<str> {
        let string = self.strings[symbol.0 as usize].as_ref();
        string
            .expect("a symbol in use is marked in every sweep")
            .clone()
    }

    /// Returns true if a sweep is worth its cost: the number of strings has doubled since the last
    /// one.
    pub(crate) fn is_sweep_due(&self) -> bool {
        self.by_string.len() > 2 * self.len_after_sweep + 65_536
    }

    /// Frees every string that `mark` does not mark.
    pub(crate) fn sweep(&mut self, mark: impl FnOnce(&mut Marks)) {
        let mut marks = Marks(vec![false; self.strings.len()]);
        mark(&mut marks);
        for (index, used) in marks.0.into_iter().enumerate() {
            if let (false, Some(text)) = (used, self.strings[index].take_if(|_| !used)) {
                self.by_string.remove(&text);
                self.free.push(index as u32);
            }
        }
        self.len_after_sweep = self.by_string.len();
    }
}

/// Symbols in use.
#[derive(Debug)]
pub(crate) struct Marks(Vec<bool>);

impl Marks {
    /// Marks a symbol as in use.
    pub(crate) fn mark(&mut self, symbol: Symbol) {
        self.0[symbol.0 as usize] = true;
    }

    /// Marks several symbols as in use.
    pub(crate) fn mark_all(&mut self, symbols: impl IntoIterator<Item = Symbol>) {
        symbols.into_iter().for_each(|symbol| self.mark(symbol));
    }
}
