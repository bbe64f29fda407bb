//! Who uses each selector: policies that apply to what it selects, and live sets that hold what it selects.

use std::collections::BTreeSet;

use margay_api::selector::Selector;

use crate::index::Index;
use crate::selector::compile;
use crate::store::{Column, Map};
use crate::texts::{Marks, Text, Texts};

#[derive(Debug)]
pub(crate) struct Users {
    /// Name of the selector, made from its canonical text: `s:...`.
    pub(crate) id: Text,
    /// Policies whose subject it is, and sets of its content. Without any the selector is forgotten at the next flush.
    pub(crate) mentions: u32,
    /// Policies that apply to what it selects.
    pub(crate) subjects: Vec<u32>,
    /// Live sets.
    pub(crate) sets: Vec<u32>,
}

/// All selectors, by their number in the index.
#[derive(Debug, Default)]
pub(crate) struct Selectors {
    users: Column<Users>,
    by_id: Map<Text, u32>,
    /// Those that may have lost their last user.
    idle: BTreeSet<u32>,
}

impl Selectors {
    /// The number of a selector, mentioned once more.
    pub(crate) fn mention(&mut self, selector: &Selector, index: &mut Index, texts: &mut Texts) -> u32 {
        let id = texts.intern(&selector.id());
        let number = *self.by_id.entry(id).or_insert_with(|| index.add_selector(compile(selector, texts)));
        if self.users.get(number).is_none() {
            self.users.put(number, Some(Users { id, mentions: 0, subjects: Vec::new(), sets: Vec::new() }));
        }
        self.users_mut(number).mentions += 1;
        number
    }

    /// One mention less.
    pub(crate) fn unmention(&mut self, selector: u32) {
        self.users_mut(selector).mentions -= 1;
        self.idle.insert(selector);
    }

    pub(crate) fn users(&self, selector: u32) -> &Users {
        let users = self.users.get(selector);
        users.expect("whoever has the number of a selector mentions it")
    }

    /// The users, to add some; the caller has the index enliven the selector.
    pub(crate) fn users_mut(&mut self, selector: u32) -> &mut Users {
        self.users.get_mut(selector).expect("whoever has the number of a selector mentions it")
    }

    pub(crate) fn remove_subject(&mut self, selector: u32, policy: u32) {
        self.users_mut(selector).subjects.retain(|subject| *subject != policy);
        self.idle.insert(selector);
    }

    pub(crate) fn remove_set(&mut self, selector: u32, set: u32) {
        self.users_mut(selector).sets.retain(|known| *known != set);
        self.idle.insert(selector);
    }

    /// Lets the index rest about selectors that nobody uses, and forgets those that nobody mentions.
    pub(crate) fn flush(&mut self, index: &mut Index, texts: &Texts) {
        for selector in std::mem::take(&mut self.idle) {
            let Some(users) = self.users.get(selector) else {
                continue;
            };
            if users.subjects.is_empty() && users.sets.is_empty() {
                index.retire(selector, texts);
            }
            if users.mentions == 0 {
                self.by_id.remove(&users.id);
                self.users.put(selector, None);
                index.remove_selector(selector);
            }
        }
    }

    /// Marks every text that is kept here.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        marks.all(self.by_id.keys().copied());
    }
}
