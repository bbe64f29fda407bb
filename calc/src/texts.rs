//! Texts as small numbers: names, label keys and values are kept once and compared as numbers.
//!
//! Numbers are never counted; [`Texts::sweep`] finds out from everybody who keeps some which are still used.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher, Hasher};
use std::sync::Arc;

/// A hash map whose order depends on nothing random. It is never iterated where order can show.
pub(crate) type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

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
        self.texts[text.0 as usize]
            .as_deref()
            .expect("whoever has a number keeps its text from being swept")
    }

    /// The text, to keep.
    pub(crate) fn share(&self, text: Text) -> Arc<str> {
        let text = self.texts[text.0 as usize].as_ref();
        text.expect("whoever has a number keeps its text from being swept")
            .clone()
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

/// Mixes a few small numbers. For keys made of numbers that are ours; texts of users have a better one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        // The table takes its buckets from the low bits and its tags from the high ones.
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }
}

/// Values under small numbers that are reused.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    values: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        match self.free.pop() {
            Some(index) => {
                self.values[index as usize] = Some(value);
                index
            }
            None => {
                self.values.push(Some(value));
                u32::try_from(self.values.len() - 1)
                    .expect("memory ends before four billion values")
            }
        }
    }

    pub(crate) fn remove(&mut self, index: u32) -> Option<T> {
        let value = self.values[index as usize].take();
        if value.is_some() {
            self.free.push(index);
        }
        value
    }

    /// All values, in the order of their numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let values = self.values.iter().enumerate();
        values.filter_map(|(index, value)| Some((index as u32, value.as_ref()?)))
    }
}

impl<T> std::ops::Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, index: u32) -> &T {
        self.values[index as usize]
            .as_ref()
            .expect("numbers of values that are gone are kept by nobody")
    }
}

impl<T> std::ops::IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, index: u32) -> &mut T {
        self.values[index as usize]
            .as_mut()
            .expect("numbers of values that are gone are kept by nobody")
    }
}
