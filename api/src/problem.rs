//! Problems of an object: field, value, rule and remedy, for status, logs and counters.

use std::fmt;

use crate::policy::Policy;
use crate::selector::{Selector, SelectorError};

/// One problem of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Path of the field, such as `spec.ingress[0].protocol`.
    pub field: String,
    /// The value found.
    pub value: String,
    /// The violated rule, as a phrase that follows the value.
    pub rule: String,
    /// Action for the user.
    pub remedy: String,
}

impl Problem {
    /// Creates a problem of a field.
    pub fn new(
        field: impl Into<String>,
        value: impl Into<String>,
        rule: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            field: field.into(),
            value: value.into(),
            rule: rule.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            field,
            value,
            rule,
            remedy,
        } = self;
        write!(f, "{field}: {value:?}: {rule}; {remedy}")
    }
}

/// A refused object, and what is enforced in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal<T = Policy> {
    /// Every problem, in order of the fields.
    pub problems: Vec<Problem>,
    /// Replacement that is enforced, so that a bad object never opens what it meant to close: if it
    /// is not known what the object selects, it applies to everything that its readable parts
    /// leave. `None`: it applies to nothing.
    pub closed: Option<T>,
    /// True when the last valid version of the object, if known, stays in force rather than
    /// `closed`: the unreadable part is the selection, or leaving it out could open something.
    pub prefers_former: bool,
}

impl<T> Refusal<T> {
    /// A refusal without a replacement.
    pub(crate) fn without_replacement(problems: Problems) -> Self {
        Self {
            problems: problems.into_vec(),
            closed: None,
            prefers_former: false,
        }
    }

    /// Marks the refusal as preferring the last valid version if the condition holds.
    pub(crate) fn or_former(self, condition: bool) -> Self {
        Self {
            prefers_former: self.prefers_former || condition,
            ..self
        }
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

/// Limits of the problems that are listed for one object, and of the bytes of a value: a mistake
/// that is repeated a thousand times need be reported once.
const LISTED: usize = 100;
const VALUE: usize = 96;

/// Collects problems while an object is read.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    listed: Vec<Problem>,
    /// Problems beyond these.
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
        if self.listed.len() >= LISTED {
            self.more += 1;
            return;
        }
        let mut value = value.to_string();
        if value.len() > VALUE {
            value.truncate(value.floor_char_boundary(VALUE));
            value += "…";
        }
        self.listed.push(Problem {
            field: field.into(),
            value,
            rule: rule.into(),
            remedy: remedy.into(),
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.listed.len() + self.more
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    pub(crate) fn into_vec(mut self) -> Vec<Problem> {
        if self.more > 0 {
            let rule = format!("not listed, beyond the first {LISTED}");
            self.listed.push(Problem::new(
                "spec",
                format!("{} more problems", self.more),
                rule,
                "correct the listed ones first",
            ));
        }
        self.listed
    }

    /// Returns the object if there are no problems, else the refusal with the replacement that
    /// `closed` makes.
    pub(crate) fn finish<T>(
        self,
        value: T,
        closed: impl FnOnce(T) -> Option<T>,
    ) -> Result<T, Refusal<T>> {
        if self.is_empty() {
            return Ok(value);
        }
        Err(Refusal {
            problems: self.into_vec(),
            closed: closed(value),
            prefers_former: false,
        })
    }

    /// Parses a selector; `None` if it does not parse, with the problem recorded.
    pub(crate) fn selector(&mut self, field: &str, text: &str) -> Option<Selector> {
        match Selector::parse(text) {
            Ok(selector) => Some(selector),
            Err(SelectorError {
                position,
                rule,
                remedy,
            }) => {
                self.add(
                    field,
                    text,
                    format!("not a selector: at character {position}: {rule}"),
                    remedy,
                );
                None
            }
        }
    }
}
