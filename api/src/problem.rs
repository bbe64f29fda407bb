//! Why an object is not taken as it is: field, value, rule and remedy, for status, logs and counters.

use std::fmt;

use crate::policy::Policy;
use crate::selector::{Selector, SelectorError};

/// One thing that is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where: a path like `spec.ingress[0].protocol`.
    pub field: String,
    /// What is there.
    pub value: String,
    /// What is demanded, as a phrase that follows the value.
    pub rule: String,
    /// What to do.
    pub remedy: String,
}

impl Problem {
    /// A problem of a field.
    pub fn new(
        field: impl Into<String>,
        value: impl Into<String>,
        rule: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { field: field.into(), value: value.into(), rule: rule.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, value, rule, remedy } = self;
        write!(f, "{field}: {value:?}: {rule}; {remedy}")
    }
}

/// An object that is refused, and what holds in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal<T = Policy> {
    /// Everything that is wrong, in order of the fields.
    pub problems: Vec<Problem>,
    /// What is enforced instead, so that a bad object never opens what it meant to close: where it is not known what the object selects, everything
    /// that its readable parts leave. `None`: it applies to nothing.
    pub closed: Option<T>,
    /// What the object said before it was refused, if that is known, is to stay in force rather than `closed`: what cannot be read is whom it is
    /// about, or what it would be without its bad part could open something.
    pub prefers_former: bool,
}

impl<T> Refusal<T> {
    /// An object of which nothing is in force.
    pub(crate) fn of_nothing(problems: Problems) -> Self {
        Self { problems: problems.into_vec(), closed: None, prefers_former: false }
    }

    /// The same for an object whose former meaning is to stay, if the condition holds.
    pub(crate) fn or_former(self, condition: bool) -> Self {
        Self { prefers_former: self.prefers_former || condition, ..self }
    }
}

impl<T> fmt::Display for Refusal<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

impl<T: fmt::Debug> std::error::Error for Refusal<T> {}

/// The most problems that are told of one object, and the most bytes of a value: what is wrong a thousand times in one way need be said once.
const TOLD: usize = 100;
const VALUE: usize = 96;

/// Collects problems while an object is read.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    told: Vec<Problem>,
    /// Problems beyond those.
    more: usize,
}

impl Problems {
    pub(crate) fn add(
        &mut self,
        field: impl Into<String>,
        value: impl fmt::Display,
        rule: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        if self.told.len() >= TOLD {
            self.more += 1;
            return;
        }
        let mut value = value.to_string();
        if value.len() > VALUE {
            value.truncate(value.floor_char_boundary(VALUE));
            value += "…";
        }
        self.told.push(Problem { field: field.into(), value, rule: rule.into(), remedy: remedy.into() });
    }

    pub(crate) fn len(&self) -> usize {
        self.told.len() + self.more
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    pub(crate) fn into_vec(mut self) -> Vec<Problem> {
        if self.more > 0 {
            let rule = format!("not told, beyond the first {TOLD}");
            self.told.push(Problem::new("spec", format!("{} more problems", self.more), rule, "mend the others first"));
        }
        self.told
    }

    /// The object as read if nothing was wrong, or the refusal with what to enforce instead.
    pub(crate) fn finish<T>(self, value: T, closed: impl FnOnce(T) -> Option<T>) -> Result<T, Refusal<T>> {
        if self.is_empty() {
            return Ok(value);
        }
        Err(Refusal { problems: self.into_vec(), closed: closed(value), prefers_former: false })
    }

    /// Parses a selector; `None` if it does not parse, with the reason noted.
    pub(crate) fn selector(&mut self, field: &str, text: &str) -> Option<Selector> {
        match Selector::parse(text) {
            Ok(selector) => Some(selector),
            Err(SelectorError { position, rule, remedy }) => {
                self.add(field, text, format!("not a selector: at character {position}: {rule}"), remedy);
                None
            }
        }
    }
}
