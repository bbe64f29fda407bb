//! Warnings and errors that programs log.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use proc_macro2::TokenTree;

use crate::source::{self, Source};
use crate::{cell, code};

const INTRODUCTION: &str = "<!-- Generated from the sources by `make bless`. -->

# Log messages

Every warning and error, by crate. A line of JSON has the message as `message` beside its fields;
braces stand for a value inside the message.
";

/// A statement that logs.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    message: String,
    level: &'static str,
    fields: String,
    path: String,
}

/// The page.
pub fn page() -> String {
    let mut crates: BTreeMap<String, BTreeSet<Line>> = BTreeMap::new();
    for source in source::shipped() {
        let lines = lines(&source);
        crates.entry(source.package).or_default().extend(lines);
    }
    crates.retain(|_, lines| !lines.is_empty());
    assert!(
        crates.values().map(BTreeSet::len).sum::<usize>() > 20,
        "log statements are not found any more"
    );
    let mut page = INTRODUCTION.to_owned();
    for (name, lines) in crates {
        let _ = write!(
            page,
            "\n## {name}\n\n| Message | Level | Fields | Source |\n|---|---|---|---|\n"
        );
        for Line {
            message,
            level,
            fields,
            path,
        } in lines
        {
            let _ = writeln!(
                page,
                "| {} | {level} | {} | {} |",
                code(&message),
                cell(&fields),
                code(&path)
            );
        }
    }
    page
}

fn lines(source: &Source) -> Vec<Line> {
    let mut found = Vec::new();
    source.visit(&mut |level| {
        for (name, shown) in [("warn", "warning"), ("error", "error")] {
            for arguments in source::macros(level, name) {
                let parts = source::parts(&arguments);
                let message = parts.iter().position(|part| source::text(part).is_some());
                let fields = &parts[..message.unwrap_or(parts.len())];
                let fields: Vec<String> = fields.iter().filter_map(|part| field(part)).collect();
                let message = match message {
                    Some(index) => source::text(&parts[index]).unwrap_or_default(),
                    None if fields.is_empty() => continue,
                    None => format!("{{{}}}", fields.join(" ")),
                };
                let (fields, path) = (fields.join(", "), source.path.clone());
                found.push(Line {
                    message,
                    level: shown,
                    fields,
                    path,
                });
            }
        }
    });
    found
}

/// Name of a field: what is before `=`, or the variable itself. A target is none.
fn field(part: &[TokenTree]) -> Option<String> {
    let is = |token: &TokenTree, sign: char| {
        matches!(
            token,
            TokenTree::Punct(punct) if punct.as_char() == sign,
        )
    };
    let name = part.split(|token| is(token, '=')).next()?;
    if name.iter().any(|token| is(token, ':')) {
        return None;
    }
    Some(
        name.iter()
            .filter(|token| !is(token, '%') && !is(token, '?'))
            .map(ToString::to_string)
            .collect(),
    )
}
