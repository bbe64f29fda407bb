//! Texts as small numbers: names, label keys and values are kept once and compared as numbers.
//!
//! Numbers are never counted; [`Texts::sweep`] finds out from everybody who keeps some which are still used.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::sync::Arc;

/// A text, by number. Numbers say nothing about the order of the texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Text(u32);

/// All texts in use.
#[derive(Debug, Default)]
pub(crate) struct Texts {
    // Keyed hashing with fixed keys: users choose these texts, so a weak mix would let them slow everybody down.
    by_text: HashMap<Arc<str>, Text, BuildHasherDefault<DefaultHasher>>,
    texts: Vec<Option<Arc<str>>>,
    free: Vec<u32>,
    /// Number of texts after the last sweep.
    swept: usize,
}

impl Texts {
    /// The number of a text, which is new if it was not there.
    pub(crate) fn intern(&mut self, text: &str) -> Text {
        if let Some(known) = self.by_text.get(text) {
            return *known;
        }
        let text: Arc<str> = text.into();
        let index = match self.free.pop() {
            Some(index) => {
                self.texts[index as usize] = Some(text.clone());
                index
            }
            None => {
                self.texts.push(Some(text.clone()));
                u32::try_from(self.texts.len() - 1).expect("memory ends before four billion texts")
            }
        };
        self.by_text.insert(text, Text(index));
        Text(index)
    }

    /// The number of a text that is there.
    pub(crate) fn find(&self, text: &str) -> Option<Text> {
        self.by_text.get(text).copied()
    }

    /// The text.
    pub(crate) fn get(&self, text: Text) -> &str {
        self.texts[text.0 as usize].as_deref().expect("whoever has a number keeps its text from being swept")
    }

    /// The text, to keep.
    pub(crate) fn share(&self, text: Text) -> Arc<str> {
        let text = self.texts[text.0 as usize].as_ref();
        text.expect("whoever has a number keeps its text from being swept").clone()
    }

    /// Whether a sweep would be worth its cost: as many texts came as were left by the last one.
    pub(crate) fn is_sweep_due(&self) -> bool {
        self.by_text.len() > 2 * self.swept + 65_536
    }

    /// Forgets every text that `mark` does not mark.
    pub(crate) fn sweep(&mut self, mark: impl FnOnce(&mut Marks)) {
        let mut marks = Marks(vec![false; self.texts.len()]);
        mark(&mut marks);
        for (index, used) in marks.0.into_iter().enumerate() {
            if let (false, Some(text)) = (used, self.texts[index].take_if(|_| !used)) {
                self.by_text.remove(&text);
                self.free.push(index as u32);
            }
        }
        self.swept = self.by_text.len();
    }
}

/// Which texts are in use.
#[derive(Debug)]
pub(crate) struct Marks(Vec<bool>);

impl Marks {
    /// This one is.
    pub(crate) fn mark(&mut self, text: Text) {
        self.0[text.0 as usize] = true;
    }

    /// These are.
    pub(crate) fn all(&mut self, texts: impl IntoIterator<Item = Text>) {
        texts.into_iter().for_each(|text| self.mark(text));
    }
}
