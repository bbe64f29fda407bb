//! Users of each selector: policies whose subject it is, and live sets with its content.

use std::collections::BTreeSet;

use margay_api::selector::Selector;

use crate::index::Index;
use crate::interner::{Interner, Marks, Symbol};
use crate::selector::compile;
use crate::store::{Column, Map};

#[derive(Debug)]
pub(crate) struct SelectorUsers {
    /// Id of the selector, derived from its canonical text: `s:...`.
    pub(crate) id: Symbol,
    /// Number of policies whose subject it is and sets with its content. At zero the selector is
    /// freed at the next flush.
    pub(crate) mentions: u32,
    /// Policies that apply to the items that it matches.
    pub(crate) subjects: Vec<u32>,
    /// Live sets with its content.
    pub(crate) sets: Vec<u32>,
    /// Number of BGPPeers whose local workloads it selects.
    pub(crate) peers: u32,
}

/// All selectors, by their handle in the index.
#[derive(Debug, Default)]
pub(crate) struct Selectors {
    users: Column<SelectorUsers>,
    by_id: Map<Symbol, u32>,
    /// Selectors that may have lost their last user.
    idle: BTreeSet<u32>,
}

impl Selectors {
    /// Takes a reference to a selector, adding it if it is new. Returns its handle.
    pub(crate) fn mention(
        &mut self,
        selector: &Selector,
        index: &mut Index,
        interner: &mut Interner,
    ) -> u32 {
        let id = interner.intern(&selector.id());
        let number = *self
            .by_id
            .entry(id)
            .or_insert_with(|| index.add_selector(compile(selector, interner)));
        if self.users.get(number).is_none() {
            self.users.put(
                number,
                Some(SelectorUsers {
                    id,
                    mentions: 0,
                    subjects: Vec::new(),
                    sets: Vec::new(),
                    peers: 0,
                }),
            );
        }
        self.users_mut(number).mentions += 1;
        number
    }

    /// Drops a reference.
    pub(crate) fn unmention(&mut self, selector: u32) {
        self.users_mut(selector).mentions -= 1;
        self.idle.insert(selector);
    }

    pub(crate) fn users(&self, selector: u32) -> &SelectorUsers {
        let users = self.users.get(selector);
        users.expect("a selector is kept while a handle refers to it")
    }

    /// Users, for adding one; the caller makes the selector live in the index.
    pub(crate) fn users_mut(&mut self, selector: u32) -> &mut SelectorUsers {
        self.users
            .get_mut(selector)
            .expect("a selector is kept while a handle refers to it")
    }

    pub(crate) fn remove_subject(&mut self, selector: u32, policy: u32) {
        self.users_mut(selector)
            .subjects
            .retain(|subject| *subject != policy);
        self.idle.insert(selector);
    }

    pub(crate) fn remove_set(&mut self, selector: u32, set: u32) {
        self.users_mut(selector).sets.retain(|known| *known != set);
        self.idle.insert(selector);
    }

    /// Deactivates selectors without users in the index, and frees those without references.
    pub(crate) fn flush(&mut self, index: &mut Index, interner: &Interner) {
        for selector in std::mem::take(&mut self.idle) {
            let Some(users) = self.users.get(selector) else {
                continue;
            };
            // It may have found a user since it became idle.
            if users.subjects.is_empty() && users.sets.is_empty() && users.peers == 0 {
                index.deactivate(selector, interner);
            }
            if users.mentions == 0 {
                self.by_id.remove(&users.id);
                self.users.put(selector, None);
                index.remove_selector(selector);
            }
        }
    }

    /// Marks the symbols in use.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        marks.mark_all(self.by_id.keys().copied());
    }
}
