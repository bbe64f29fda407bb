//! Recursive descent parser without a token list: the meaning of a keyword depends on whether a
//! label precedes it.

use std::collections::BTreeSet;
use std::str::FromStr;

use super::{Node, Selector};

/// Maximum length of a label name, in characters.
pub const MAX_LABEL: usize = 512;
/// Maximum nesting of parentheses, which bounds the stack that hostile text can use.
pub const MAX_DEPTH: usize = 128;

/// Syntax error of a selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at character {position}: {rule}; {remedy}")]
pub struct SelectorError {
    /// Position in characters, counted from 1.
    pub position: usize,
    /// Expected syntax, and what was found instead.
    pub rule: String,
    /// Correction for the user.
    pub remedy: &'static str,
}

impl Selector {
    /// Parses a selector; empty or blank text is `all()`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut parser = Parser {
            text,
            at: 0,
            depth: 0,
        };
        parser.skip_blanks();
        if parser.rest().is_empty() {
            return Ok(Self::all());
        }
        let root = parser.parse_or()?;
        if !parser.rest().is_empty() {
            return Err(parser.error(
                "expected `&&`, `||` or the end",
                "join operations with && or ||, and close only what was opened",
            ));
        }
        Ok(Self { root })
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        Self::parse(text)
    }
}

/// An operator that stands between a label and its operand.
#[derive(Clone, Copy)]
enum Operator {
    Equals,
    NotEquals,
    In,
    NotIn,
    Contains,
    StartsWith,
    EndsWith,
}

/// Operators that are keywords; their parts may be written with or without blanks in between.
const KEYWORD_OPERATORS: [(&[&str], Operator); 5] = [
    (&["not", "in"], Operator::NotIn),
    (&["in"], Operator::In),
    (&["contains"], Operator::Contains),
    (&["starts", "with"], Operator::StartsWith),
    (&["ends", "with"], Operator::EndsWith),
];

struct Parser<'a> {
    text: &'a str,
    /// Byte offset of the next character, never inside blanks between calls.
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn parse_or(&mut self) -> Result<Node, SelectorError> {
        self.parse_chain("||", Self::parse_and, Node::Or)
    }

    fn parse_and(&mut self) -> Result<Node, SelectorError> {
        self.parse_chain("&&", Self::parse_unary, Node::And)
    }

    fn parse_chain(
        &mut self,
        operator: &str,
        operand: fn(&mut Self) -> Result<Node, SelectorError>,
        group: fn(Vec<Node>) -> Node,
    ) -> Result<Node, SelectorError> {
        let first = operand(self)?;
        if !self.rest().starts_with(operator) {
            return Ok(first);
        }
        let mut operands = vec![first];
        while self.take(operator) {
            operands.push(operand(self)?);
        }
        Ok(group(operands))
    }

    fn parse_unary(&mut self) -> Result<Node, SelectorError> {
        let mut negated = false;
        while self.take("!") {
            negated = !negated;
        }
        Ok(match (self.parse_primary()?, negated) {
            (node, false) => node,
            (Node::Not(operand), true) => *operand,
            (node, true) => Node::Not(Box::new(node)),
        })
    }

    fn parse_primary(&mut self) -> Result<Node, SelectorError> {
        if self.rest().starts_with('(') {
            return self.parse_group();
        }
        for (keyword, node) in [("all(", Node::All), ("global(", Node::Global)] {
            if self.take(keyword) {
                self.expect_close()?;
                return Ok(node);
            }
        }
        if self.take("has(") {
            let label = self.parse_label()?;
            self.expect_close()?;
            return Ok(Node::Has(label));
        }
        self.parse_operation()
    }

    fn parse_group(&mut self) -> Result<Node, SelectorError> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(
                &format!("parentheses nest at most {MAX_DEPTH} deep"),
                "remove parentheses that are not needed",
            ));
        }
        self.take("(");
        self.depth += 1;
        let node = self.parse_or()?;
        self.expect_close()?;
        self.depth -= 1;
        Ok(node)
    }

    fn parse_operation(&mut self) -> Result<Node, SelectorError> {
        let label = self.parse_label()?;
        Ok(match self.parse_operator()? {
            Operator::Equals => Node::Equals(label, self.parse_literal()?),
            Operator::NotEquals => Node::NotEquals(label, self.parse_literal()?),
            Operator::Contains => Node::Contains(label, self.parse_literal()?),
            Operator::StartsWith => Node::StartsWith(label, self.parse_literal()?),
            Operator::EndsWith => Node::EndsWith(label, self.parse_literal()?),
            Operator::In => Node::In(label, self.parse_set()?),
            Operator::NotIn => Node::NotIn(label, self.parse_set()?),
        })
    }

    fn parse_label(&mut self) -> Result<String, SelectorError> {
        let rest = self.rest();
        let length = rest.find(|c: char| !is_of_label(c)).unwrap_or(rest.len());
        if length == 0 {
            return Err(self.error(
                "expected a label, `has(label)`, `all()`, `global()`, `!` or `(`",
                "label names have letters, digits, `_`, `.`, `/` and `-`; values are in quotes",
            ));
        }
        if length > MAX_LABEL {
            return Err(self.error(
                &format!("label names have at most {MAX_LABEL} characters"),
                "shorten the label name",
            ));
        }
        self.advance(length);
        Ok(rest[..length].to_owned())
    }

    fn parse_operator(&mut self) -> Result<Operator, SelectorError> {
        if self.take("==") {
            return Ok(Operator::Equals);
        }
        if self.take("!=") {
            return Ok(Operator::NotEquals);
        }
        for (keywords, operator) in KEYWORD_OPERATORS {
            if self.take_keywords(keywords) {
                return Ok(operator);
            }
        }
        Err(self.error(
            "expected an operator after a label",
            "use ==, !=, in, not in, contains, starts with or ends with, or has(label)",
        ))
    }

    fn parse_set(&mut self) -> Result<BTreeSet<String>, SelectorError> {
        let remedy = "write a set as {\"one\", \"other\"}";
        if !self.take("{") {
            return Err(self.error("expected `{` after `in`", remedy));
        }
        let mut values = BTreeSet::new();
        while !self.take("}") {
            values.insert(self.parse_literal()?);
            if !self.take(",") && !self.rest().starts_with('}') {
                return Err(self.error("expected `,` or `}` in a set", remedy));
            }
        }
        Ok(values)
    }

    fn parse_literal(&mut self) -> Result<String, SelectorError> {
        let rest = self.rest();
        let remedy = "put values in single or double quotes; there are no escapes";
        let quote = match rest.chars().next() {
            Some(quote @ ('"' | '\'')) => quote,
            _ => return Err(self.error("expected a quoted value", remedy)),
        };
        let Some(length) = rest[1..].find(quote) else {
            return Err(self.error("this quoted value does not end", remedy));
        };
        self.advance(length + 2);
        Ok(rest[1..=length].to_owned())
    }

    fn expect_close(&mut self) -> Result<(), SelectorError> {
        if self.take(")") {
            return Ok(());
        }
        Err(self.error("expected `)`", "close every parenthesis that was opened"))
    }

    /// Consumes the keywords if they stand here, with any blanks in between and no further letter,
    /// digit or underscore behind.
    fn take_keywords(&mut self, keywords: &[&str]) -> bool {
        let mut rest = self.rest();
        for keyword in keywords {
            match rest.trim_start_matches(is_blank).strip_prefix(keyword) {
                Some(behind) => rest = behind,
                None => return false,
            }
        }
        if rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            return false;
        }
        self.advance(self.rest().len() - rest.len());
        true
    }

    fn take(&mut self, symbol: &str) -> bool {
        let found = self.rest().starts_with(symbol);
        if found {
            self.advance(symbol.len());
        }
        found
    }

    fn advance(&mut self, length: usize) {
        self.at += length;
        self.skip_blanks();
    }

    fn skip_blanks(&mut self) {
        self.at = self.text.len() - self.rest().trim_start_matches(is_blank).len();
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn error(&self, rule: &str, remedy: &'static str) -> SelectorError {
        let found = match self.rest().chars().next() {
            Some(c) => format!("found {c:?}"),
            None => "found the end".to_owned(),
        };
        SelectorError {
            position: self.text[..self.at].chars().count() + 1,
            rule: format!("{rule}, {found}"),
            remedy,
        }
    }
}

/// Returns true when the language allows a label of this name.
pub fn is_label_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_LABEL && text.chars().all(is_of_label)
}

fn is_of_label(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_./-".contains(c)
}

fn is_blank(c: char) -> bool {
    matches!(c, ' ' | '\t')
}
