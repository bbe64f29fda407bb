//! The width of code, comments and prose.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{files, metadata};

/// The widest line, in columns: rustfmt's `max_width`.
const WIDTH: usize = 100;

/// A word of this length, such as an address or a hash, may make a line wider: it cannot be broken.
const LONG_WORD: usize = 60;

/// Files that are searched, by their ends, and the lines of them to which the rule applies.
const KINDS: [(&str, Lines); 9] = [
    (".rs", Lines::OutsideRawStrings),
    (".md", Lines::Prose),
    (".proto", Lines::All),
    (".toml", Lines::Comments),
    (".sh", Lines::Comments),
    ("Makefile", Lines::Comments),
    (".ci/run", Lines::Comments),
    (".ci/fuzz", Lines::Comments),
    (".ci/tool", Lines::Comments),
];

/// Files that are exempt: generated, golden, or not ours.
const EXCEPT: [&str; 7] = [
    "docs/src/reference/crds/",
    "docs/src/reference/logs.md",
    "docs/src/reference/metrics.md",
    "docs/src/reference/settings.md",
    "findings/",
    "tests/data/",
    "tests/kubernetes/",
];

#[derive(Clone, Copy)]
enum Lines {
    All,
    /// Raw strings are texts in other languages and expected output.
    OutsideRawStrings,
    /// All but tables and lines with links.
    Prose,
    /// Comments that begin with `#`: commands, and tables of TOML, may have no other form.
    Comments,
}

impl Lines {
    /// The numbers of the lines that are too wide, from 1.
    fn too_wide(self, text: &str) -> Vec<usize> {
        let exempt = match self {
            Self::OutsideRawStrings => lines_of_raw_strings(text),
            _ => BTreeSet::new(),
        };
        text.lines()
            .zip(1..)
            .filter(|(line, number)| {
                is_too_wide(line) && self.applies_to(line) && !exempt.contains(number)
            })
            .map(|(_, number)| number)
            .collect()
    }

    fn applies_to(self, line: &str) -> bool {
        match self {
            Self::All | Self::OutsideRawStrings => true,
            Self::Prose => !line.trim_start().starts_with('|') && !line.contains("]("),
            Self::Comments => line.trim_start().starts_with("# "),
        }
    }
}

fn is_too_wide(line: &str) -> bool {
    let is_long = |word: &str| word.chars().count() >= LONG_WORD;
    line.chars().count() > WIDTH && !line.split_whitespace().any(is_long)
}

/// The numbers of the lines that raw strings are on, from 1.
fn lines_of_raw_strings(text: &str) -> BTreeSet<usize> {
    let mut lines = BTreeSet::new();
    let mut rest = text;
    let line_at = |rest: &str| 1 + text[..text.len() - rest.len()].matches('\n').count();
    while let Some(start) = rest.find(['"', '/', '\'']) {
        let (before, token) = rest.split_at(start);
        let opening = before.trim_end_matches('#');
        let is_raw = token.starts_with('"')
            && opening
                .strip_suffix('r')
                .is_some_and(|before| !before.ends_with(is_of_word));
        let end = if is_raw {
            let close = format!("\"{}", "#".repeat(before.len() - opening.len()));
            token[1..]
                .find(&close)
                .map_or(token.len(), |end| 1 + end + close.len())
        } else {
            end_of_token(token)
        };
        if is_raw {
            lines.extend(line_at(token)..=line_at(&token[end..]));
        }
        rest = &token[end..];
    }
    lines
}

/// The end of the comment, string or character that this begins with.
fn end_of_token(token: &str) -> usize {
    if token.starts_with("//") {
        return token.find('\n').unwrap_or(token.len());
    }
    if token.starts_with('"') {
        return end_of_string(token);
    }
    // A character, unless it is a lifetime or a label. Nothing else can hide a quotation mark.
    ["'\"'", "'\\\"'", "'\\''", "'/'"]
        .into_iter()
        .find(|character| token.starts_with(character))
        .map_or(1, str::len)
}

fn end_of_string(token: &str) -> usize {
    let mut is_escaped = true;
    for (at, c) in token.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    token.len()
}

fn is_of_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

#[test]
fn lines_are_at_most_100_columns_wide() {
    let root = metadata().workspace_root.into_std_path_buf();
    let mut found = files(&root, &|_| true);
    found.extend(files(&root.join(".ci"), &|_| true));
    let hits: Vec<String> = found.iter().flat_map(|path| search(&root, path)).collect();
    assert!(
        hits.is_empty(),
        "{} lines are wider than {WIDTH} columns; wrap them:\n{}",
        hits.len(),
        hits.join("\n")
    );
}

fn search(root: &Path, path: &Path) -> Vec<String> {
    let name = path
        .strip_prefix(root)
        .unwrap_or(path)
        .display()
        .to_string();
    let kind = KINDS.iter().find(|(end, _)| name.ends_with(end));
    let Some((_, lines)) = kind.filter(|_| !EXCEPT.iter().any(|place| name.starts_with(place)))
    else {
        return Vec::new();
    };
    let text = fs::read_to_string(path).expect("a text file");
    lines
        .too_wide(&text)
        .into_iter()
        .map(|number| format!("{name}:{number}"))
        .collect()
}

#[test]
fn exceptions_are_the_lines_that_cannot_be_broken() {
    let wide = "word ".repeat(21);
    let long = "x".repeat(WIDTH);
    let raw =
        format!("let a = \"\\\"\";\nf('\"', r#\"\n{wide}\"\n\"#, r\"{wide}\");\n// r\"\n{wide}\n");
    for (lines, text, expected) in [
        (Lines::All, wide.clone(), vec![1]),
        (Lines::All, format!("see {long}"), vec![]),
        (
            Lines::Prose,
            format!("| {wide}\n[a](b) {wide}\n{wide}"),
            vec![3],
        ),
        (Lines::Comments, format!("echo {wide}\n# {wide}\n"), vec![2]),
        (Lines::OutsideRawStrings, raw, vec![6]),
    ] {
        assert_eq!(lines.too_wide(&text), expected, "{text}");
    }
}
