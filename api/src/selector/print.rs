//! Canonical text of a selector. Ids are hashes of it, so it must never change.

use std::fmt;

use super::{Node, Selector};

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.root.fmt(f)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all()"),
            Self::Global => f.write_str("global()"),
            Self::Has(label) => write!(f, "has({label})"),
            Self::Equals(label, value) => write!(f, "{label} == {}", Quoted(value)),
            Self::NotEquals(label, value) => write!(f, "{label} != {}", Quoted(value)),
            Self::In(label, values) => {
                write!(f, "{label} in {{")?;
                joined(f, values.iter().map(|value| Quoted(value)), ", ")?;
                f.write_str("}")
            }
            Self::NotIn(label, values) => {
                write!(f, "{label} not in {{")?;
                joined(f, values.iter().map(|value| Quoted(value)), ", ")?;
                f.write_str("}")
            }
            Self::Contains(label, text) => write!(f, "{label} contains {}", Quoted(text)),
            Self::StartsWith(label, text) => write!(f, "{label} starts with {}", Quoted(text)),
            Self::EndsWith(label, text) => write!(f, "{label} ends with {}", Quoted(text)),
            Self::Not(operand) => write!(f, "!{operand}"),
            Self::And(operands) => group(f, operands, " && "),
            Self::Or(operands) => group(f, operands, " || "),
        }
    }
}

fn group(f: &mut fmt::Formatter<'_>, operands: &[Node], operator: &str) -> fmt::Result {
    f.write_str("(")?;
    joined(f, operands.iter(), operator)?;
    f.write_str(")")
}

fn joined<T: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    parts: impl Iterator<Item = T>,
    separator: &str,
) -> fmt::Result {
    for (index, part) in parts.enumerate() {
        if index > 0 {
            f.write_str(separator)?;
        }
        write!(f, "{part}")?;
    }
    Ok(())
}

/// A literal in double quotes, or in single quotes if it contains a double one; the language has no
/// escapes.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quote = if self.0.contains('"') { '\'' } else { '"' };
        write!(f, "{quote}{}{quote}", self.0)
    }
}
