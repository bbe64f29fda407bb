//! Reasons of conditions and codes of problems: docs/src/reference/conditions.md has a line for
//! each, and for no other.

use std::collections::BTreeSet;
use std::fs;

use proc_macro2::TokenTree;

use crate::root;
use crate::source::{self, Source};

/// Calls whose first argument is a reason or a code, by what is before the name and in which crate.
const CALLS: [(&str, &str, &str); 4] = [
    ("margay-operator", "Finding", "new"),
    ("margay-operator", "PoolCondition", "not"),
    ("margay-node", "problems", "report"),
    ("margay-node", "problems", "set"),
];
/// Reasons that are made in other ways: where there is nothing to report, and of pools that are as
/// they should be.
const OTHERS: [&str; 2] = ["NotApplicable", "OK"];

#[test]
fn every_reason_has_its_line() {
    let page =
        fs::read_to_string(root().join("docs/src/reference/conditions.md")).expect("the page");
    let mut wanted: BTreeSet<String> = OTHERS.map(str::to_owned).into();
    for source in source::shipped() {
        wanted.extend(
            CALLS
                .iter()
                .filter(|(package, ..)| *package == source.package)
                .flat_map(|call| named(&source, call)),
        );
    }
    assert!(
        wanted.len() > 10,
        "reasons are not found any more: {wanted:?}"
    );
    assert_eq!(
        listed(&page),
        wanted,
        "reasons and codes of the page, and of the code"
    );
}

/// First arguments of a call, where they are texts.
fn named(source: &Source, (_, before, name): &(&str, &str, &str)) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    source.visit(&mut |level| {
        for (index, token) in level.iter().enumerate() {
            let is_before = matches!(token, TokenTree::Ident(ident) if ident == before);
            // `::` is two tokens, `.` is one.
            let end = level.len().min(index + 5);
            if is_before {
                let near = &level[index + 1..end];
                let arguments = source::calls(near, name).next();
                found.extend(
                    arguments.and_then(|group| source::text(source::parts(&group).first()?)),
                );
            }
        }
    });
    found
}

/// Names in code type of the first column of tables of reasons, and of the last one of the table of
/// other objects.
fn listed(page: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let (mut heading, mut column) = ("", None);
    for line in page.lines() {
        if line.starts_with("## ") {
            heading = line;
            column = match heading {
                "## Reasons" | "## Problems of nodes" => Some(1),
                "## Conditions of other objects" => Some(3),
                _ => None,
            };
        }
        let cell =
            column.and_then(|column| line.strip_prefix('|').and(line.split('|').nth(column)));
        found.extend(
            cell.into_iter()
                .flat_map(|cell| cell.split('`').skip(1).step_by(2))
                .map(str::to_owned),
        );
    }
    assert!(!heading.is_empty(), "the page has no sections");
    found
}
