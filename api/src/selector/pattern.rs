//! The selector language as a condition in CEL, so that the API server refuses at write what is not a selector.
//!
//! Without its parentheses the language is regular: operands and operators take turns, `!` and `(` stand before an operand, `)` behind one.
//! What is left to check is that parentheses are balanced; those in values do not count. Everything that [`Selector::parse`](super::Selector::parse)
//! takes meets the condition. What it refuses does not, but for parentheses that are out of order inside others, [`PASSES`] deep.
//!
//! An expression may cost a million units in Kubernetes 1.37 (`PerCallLimit` of apiserver/pkg/apis/cel), and a match costs a tenth of the text's length times a
//! quarter of the pattern's. So most selectors, which compare one label with one value, are tried with a short pattern first.

use super::MAX_LABEL;

/// Times that pairs of parentheses are taken out of each other.
const PASSES: usize = 8;

/// Blanks, of which there may be any number between two symbols.
const BLANKS: &str = r"[ \t]*";
/// A value in quotes, which are written by number, as the whole stands in quotes itself.
const VALUE: &str = r"(?:\x27[^\x27]*\x27|\x22[^\x22]*\x22)";

fn label() -> String {
    format!("[A-Za-z0-9_./-]{{1,{MAX_LABEL}}}")
}

/// A regular expression for the comparison of one label with one value.
fn comparison() -> String {
    let (w, label, value) = (BLANKS, label(), VALUE);
    format!("^{w}{label}{w}[=!]={w}{value}{w}$")
}

/// A regular expression in RE2's syntax for the language without the balance of parentheses.
fn expression() -> String {
    let (w, label, value) = (BLANKS, label(), VALUE);
    let set = format!(r"\{{{w}(?:{value}{w}(?:,{w}{value}{w})*(?:,{w})?)?\}}");
    let word = format!(r"(?:not{w})?in{w}{set}|(?:contains|starts{w}with|ends{w}with){w}{value}");
    // Names of labels are as long as can be, so that a word stands behind a blank.
    let operation = format!(r"{label}(?:{w}[=!]={w}{value}|[ \t]+(?:{word}))");
    let operand = format!(r"(?:(?:all|global)\({w}\)|has\({w}{label}{w}\)|{operation})");
    let term = format!(r"(?:[!(]{w})*{operand}{w}(?:\){w})*");
    format!(r"^{w}(?:{term}(?:(?:&&|\|\|){w}{term})*)?$")
}

/// A condition in CEL, with the string extensions and `findAll` of the API server, that holds where the string `text`, a variable, is a selector.
pub fn cel(text: &str) -> String {
    let (comparison, expression) = (comparison(), expression());
    let pairs = ".replace('()', '')".repeat(PASSES);
    format!(
        "({text}.matches(r'{comparison}') || {text}.matches(r'{expression}') && \
         [{text}.findAll(r'{VALUE}|[()]').filter(t, t == '(' || t == ')').join(''){pairs}].all(p, p == '' || \
         p.startsWith('(') && p.endsWith(')') && p.split('(').size() == p.split(')').size()))"
    )
}
