//! What pages name exists, and their figures are those of the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use margay_api::limits::{MAX_ENTRIES, MAX_REFERENCES};
use margay_proto::sync;

use super::{files, metadata, rust_files};

/// Every test that CONTRIBUTING.md names exists.
#[test]
fn tests_that_are_named_exist() {
    let root = metadata().workspace_root.into_std_path_buf();
    let text = fs::read_to_string(root.join("CONTRIBUTING.md")).expect("the page is there");
    let tables = ["| Failure | Tests |", "| Behaviour | Tests |"].map(|head| {
        let table = text.lines().skip_while(|line| *line != head).skip(2);
        let cells = table
            .take_while(|line| line.starts_with('|'))
            .filter_map(|line| line.split('|').nth(2));
        cells
            .map(|cell| {
                let names = cell.split('`').skip(1).step_by(2);
                names.filter(|name| !name.is_empty()).collect()
            })
            .collect::<Vec<Vec<&str>>>()
    });
    for rows in &tables {
        assert!(rows.len() > 10, "the table is not where it was: {rows:?}");
        assert!(
            rows.iter().all(|row| !row.is_empty()),
            "a row without a test"
        );
    }
    let named: BTreeSet<&str> = tables.iter().flatten().flatten().copied().collect();
    let sources: Vec<String> = rust_files(&root)
        .into_iter()
        .map(|path| fs::read_to_string(path).expect("a source file"))
        .collect();
    let exists = |name: &&str| {
        let ways = [format!("fn {name}("), format!("\"{name}\"")];
        sources
            .iter()
            .any(|source| ways.iter().any(|way| source.contains(way)))
    };
    let missing: Vec<&str> = named.into_iter().filter(|name| !exists(name)).collect();
    assert!(
        missing.is_empty(),
        "CONTRIBUTING.md names tests that do not exist: {missing:?}"
    );
}

/// Files and folders that a page names in code type exist: paths below a folder of the tree, and
/// bare names of files.
#[test]
fn files_that_are_named_exist() {
    let root = metadata().workspace_root.into_std_path_buf();
    let all = files(&root, &|_| true);
    let mut missing = Vec::new();
    for page in ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"] {
        let text = fs::read_to_string(root.join(page)).expect("the page is there");
        let outside_blocks = text.split("```").step_by(2);
        let named = outside_blocks.flat_map(|block| block.split('`').skip(1).step_by(2));
        let paths: BTreeSet<String> = named
            .flat_map(expand)
            .filter(|name| is_path(&root, name))
            .collect();
        assert!(
            page == "README.md" || paths.len() > 10,
            "paths of {page} are not found any more: {paths:?}"
        );
        let is_there =
            |path: &String| root.join(path).exists() || all.iter().any(|file| file.ends_with(path));
        missing.extend(
            paths
                .into_iter()
                .filter(|path| !is_there(path))
                .map(|path| format!("{page}: {path}")),
        );
    }
    assert!(
        missing.is_empty(),
        "files that do not exist are named: {missing:#?}"
    );
}

fn is_path(root: &Path, name: &str) -> bool {
    let is_plain = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    let is_file = ["rs", "md", "proto", "toml", "tsv", "yaml"]
        .iter()
        .any(|end| name.ends_with(&format!(".{end}")));
    let is_below = name
        .split_once('/')
        .is_some_and(|(first, _)| !first.is_empty() && root.join(first).is_dir());
    is_plain && (is_file || is_below) && !name.starts_with("target/") && !name.starts_with("/")
}

/// Expands `a/{b,c}.rs` to `a/b.rs` and `a/c.rs`, and `a/*.rs` to the folder.
fn expand(name: &str) -> Vec<String> {
    if let Some((folder, _)) = name.split_once('*') {
        return folder
            .rsplit_once('/')
            .map(|(folder, _)| folder.to_owned())
            .into_iter()
            .collect();
    }
    match name
        .split_once('{')
        .and_then(|(before, rest)| Some((before, rest.split_once('}')?)))
    {
        Some((before, (inside, after))) => inside
            .split(',')
            .map(|part| format!("{before}{part}{after}"))
            .collect(),
        None => vec![name.to_owned()],
    }
}

/// The limits in the pages and in the CRDs are those of the code.
#[test]
fn limits_in_the_pages_are_those_of_the_code() {
    let root = metadata().workspace_root.into_std_path_buf();
    let read = |name: &str| fs::read_to_string(root.join(name)).expect("the page is there");
    let of_policies = [
        ("rules, ranges and ports", MAX_ENTRIES),
        ("selectors, Services and named ports", MAX_REFERENCES),
    ];
    let all = [
        ("rules, ranges and ports of a policy", MAX_ENTRIES),
        (
            "selectors, Services and named ports of a policy",
            MAX_REFERENCES,
        ),
        ("bytes of a part of a frame", sync::PART_SIZE),
        ("bytes of a message of a node", sync::MAX_UP),
        ("errors in an Ack", sync::MAX_ERRORS),
        ("bytes of the reason of one", sync::MAX_REASON),
        ("addresses of a pod that a node sends", sync::MAX_ADDRESSES),
    ];
    for (page, rows) in [
        ("docs/src/operate/policy.md", &of_policies[..]),
        ("ARCHITECTURE.md", &all[..]),
    ] {
        let text = read(page);
        for (what, limit) in rows {
            let row = format!("| {what} | {} |", thousands(*limit));
            assert!(
                text.contains(&row),
                "{page} has no row that begins with {row}"
            );
        }
    }
    for kind in [
        "networkpolicies",
        "globalnetworkpolicies",
        "stagednetworkpolicies",
        "stagedkubernetesnetworkpolicies",
    ] {
        let text = read(&format!("deploy/crds/projectcalico.org_{kind}.yaml"));
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for (what, limit) in of_policies {
            let phrase = format!("{} {what}", thousands(limit));
            assert!(
                text.contains(&phrase),
                "the definition of {kind} does not have {phrase:?}"
            );
        }
    }
}

/// The number with commas.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| String::from_utf8_lossy(group).into_owned());
    groups.collect::<Vec<_>>().join(",")
}
