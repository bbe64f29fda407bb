//! The selector language as a CEL expression, by which the API server refuses text that is not a
//! selector when it is written.
//!
//! Without parentheses the language is regular: operands and operators alternate, `!` and `(`
//! precede an operand, `)` follows one. What remains is that parentheses must balance, except those
//! in values. Every text that [`Selector::parse`](super::Selector::parse) accepts meets the
//! condition. Text that it refuses does not, except for parentheses in the wrong order that are
//! nested more than [`PASSES`] deep.
//!
//! An expression may cost a million units in Kubernetes 1.37 (`PerCallLimit` of
//! apiserver/pkg/apis/cel), and a match costs a tenth of the text's length times a quarter of the
//! pattern's. Most selectors compare one label with one value, so a short pattern is tried first.

use super::MAX_LABEL;

/// Number of times that innermost pairs of parentheses are removed.
const PASSES: usize = 8;

/// Blanks, any number of which may stand between two symbols.
const BLANKS: &str = r"[ \t]*";
/// A quoted value. Quotes are written by number, because the whole expression is quoted itself.
const VALUE: &str = r"(?:\x27[^\x27]*\x27|\x22[^\x22]*\x22)";

/// Returns a regular expression for a label name.
fn label() -> String {
    format!("[A-Za-z0-9_./-]{{1,{MAX_LABEL}}}")
}

/// Returns a regular expression for the comparison of one label with one value.
fn comparison() -> String {
    let (w, label, value) = (BLANKS, label(), VALUE);
    format!("^{w}{label}{w}[=!]={w}{value}{w}$")
}

/// Returns a regular expression in RE2's syntax for the language without the balance of
/// parentheses.
fn expression() -> String {
    let (w, label, value) = (BLANKS, label(), VALUE);
    let set = format!(r"\{{{w}(?:{value}{w}(?:,{w}{value}{w})*(?:,{w})?)?\}}");
    let keyword =
        format!(r"(?:not{w})?in{w}{set}|(?:contains|starts{w}with|ends{w}with){w}{value}");
    // Label names are greedy, so a keyword must follow a blank.
    let operation = format!(r"{label}(?:{w}[=!]={w}{value}|[ \t]+(?:{keyword}))");
    let operand = format!(r"(?:(?:all|global)\({w}\)|has\({w}{label}{w}\)|{operation})");
    let term = format!(r"(?:[!(]{w})*{operand}{w}(?:\){w})*");
    format!(r"^{w}(?:{term}(?:(?:&&|\|\|){w}{term})*)?$")
}

/// Returns a CEL condition, with the string extensions and `findAll` of the API server, that holds
/// when the variable `text` is a selector.
pub fn cel(text: &str) -> String {
    let (comparison, expression) = (comparison(), expression());
    let pairs = ".replace('()', '')".repeat(PASSES);
    format!(
        "({text}.matches(r'{comparison}') || {text}.matches(r'{expression}') && \
         [{text}.findAll(r'{VALUE}|[()]').filter(t, t == '(' || t == ')').join(''){pairs}].all(p, \
         p == '' || p.startsWith('(') && p.endsWith(')') && p.split('(').size() == \
         p.split(')').size()))"
    )
}
