//! Names of ports that rules list: a list is kept once, and is one set for each selector, so that many names are looked up like one.

use crate::store::Map;
use crate::texts::{Marks, Text, Texts};

/// What stands between the names in the text of a list; no name contains it.
const SEPARATOR: &str = ",";

/// All lists that some set is of, by their text.
#[derive(Debug, Default)]
pub(crate) struct PortNames(Map<Text, List>);

#[derive(Debug)]
struct List {
    /// How often it is held.
    held: u32,
    /// The names, in the order of their numbers.
    names: Box<[Text]>,
}

impl PortNames {
    /// The list of these names in any order, held once more.
    pub(crate) fn hold(&mut self, names: &[&str], texts: &mut Texts) -> Text {
        let mut sorted = names.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let text = texts.intern(&sorted.join(SEPARATOR));
        let list = self.0.entry(text).or_insert_with(|| {
            let mut names: Box<[Text]> = sorted.iter().map(|name| texts.intern(name)).collect();
            names.sort_unstable();
            List { held: 0, names }
        });
        list.held += 1;
        text
    }

    /// Held once less.
    pub(crate) fn release(&mut self, list: Text) {
        if let Some(known) = self.0.get_mut(&list) {
            known.held -= 1;
            if known.held == 0 {
                self.0.remove(&list);
            }
        }
    }

    /// Whether the list has this name.
    pub(crate) fn has(&self, list: Text, name: Text) -> bool {
        self.0.get(&list).is_some_and(|list| list.names.binary_search(&name).is_ok())
    }

    /// Marks every text that is kept here.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for (text, list) in &self.0 {
            marks.mark(*text);
            marks.all(list.names.iter().copied());
        }
    }
}
