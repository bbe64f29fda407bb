//! Rules of ARCHITECTURE.md, checked against cargo's metadata and the files.

#[path = "architecture/vocabulary.rs"]
mod vocabulary;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};
use margay_api::limits::{MAX_ENTRIES, MAX_REFERENCES};
use margay_proto::sync;

/// Our crates that each crate may use.
const MAY_USE: [(&str, &[&str]); 13] = [
    ("margay-api", &[]),
    ("margay-calc", &["margay-api"]),
    ("margay-proto", &["margay-api", "margay-calc"]),
    ("margay-runtime", &[]),
    ("margay-netlink", &[]),
    ("margay-nft", &["margay-netlink"]),
    ("margay-typha", &["margay-api", "margay-calc", "margay-proto", "margay-runtime"]),
    ("margay-dataplane", &["margay-api", "margay-calc", "margay-netlink", "margay-nft", "margay-runtime"]),
    (
        "margay-node",
        &["margay-api", "margay-calc", "margay-dataplane", "margay-netlink", "margay-proto", "margay-runtime"],
    ),
    ("margay-cni", &["margay-proto"]),
    ("margay-operator", &["margay-api", "margay-runtime"]),
    ("margay", &["margay-node", "margay-operator", "margay-runtime", "margay-typha"]),
    (
        "margay-tests",
        &[
            "margay-api",
            "margay-calc",
            "margay-dataplane",
            "margay-netlink",
            "margay-nft",
            "margay-node",
            "margay-operator",
            "margay-proto",
            "margay-runtime",
            "margay-typha",
        ],
    ),
];

/// Crates that a crate must not depend on, because of its purpose.
const MUST_NOT: [(&str, &[&str]); 6] = [
    ("margay-api", &["tokio", "tonic", "nix", "rand", "libc", "futures", "jiff", "tracing"]),
    ("margay-calc", &["tokio", "tonic", "kube", "nix", "rand", "libc", "futures", "jiff", "tracing", "serde_json"]),
    ("margay-netlink", &["tokio", "tonic", "kube", "serde"]),
    ("margay-nft", &["tokio", "tonic", "kube", "serde", "nix"]),
    ("margay-cni", &["tokio", "tonic", "kube", "clap"]),
    ("margay-typha", &["nix", "libc", "netlink-packet-route"]),
];

/// The longest file, in lines.
const MAX_LINES: usize = 600;

fn metadata() -> Metadata {
    MetadataCommand::new().no_deps().exec().expect("cargo metadata of the workspace")
}

fn normal_dependencies(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    let of = |package: &cargo_metadata::Package| {
        let normal = package.dependencies.iter().filter(|dependency| dependency.kind == DependencyKind::Normal);
        normal.map(|dependency| dependency.name.clone()).collect()
    };
    metadata.packages.iter().map(|package| (package.name.to_string(), of(package))).collect()
}

#[test]
fn crates_use_only_what_the_table_lets_them() {
    let dependencies = normal_dependencies(&metadata());
    let table: BTreeMap<&str, &[&str]> = MAY_USE.into();
    assert_eq!(
        dependencies.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        table.keys().copied().collect(),
        "a crate is missing in the table, or gone"
    );
    for (name, used) in &dependencies {
        let ours = used.iter().filter(|used| used.as_str() == "margay" || used.starts_with("margay-"));
        let outside: Vec<&String> = ours.filter(|used| !table[name.as_str()].contains(&used.as_str())).collect();
        assert!(outside.is_empty(), "{name} uses {outside:?}, which the table in ARCHITECTURE.md does not let it");
    }
}

#[test]
fn pure_and_small_crates_name_no_outside_world() {
    let dependencies = normal_dependencies(&metadata());
    for (name, forbidden) in MUST_NOT {
        let named: Vec<&&str> = forbidden.iter().filter(|crate_| dependencies[name].contains(**crate_)).collect();
        assert!(named.is_empty(), "{name} names {named:?}");
    }
}

#[test]
fn pure_crates_read_no_clock() {
    let root = metadata().workspace_root.into_std_path_buf();
    for folder in ["api/src", "calc/src"] {
        for path in rust_files(&root.join(folder)) {
            let text = fs::read_to_string(&path).expect("a source file");
            for clock in [
                "Instant::now",
                "SystemTime::now",
                "std::time::Instant",
                "std::fs::",
                "std::net::Tcp",
                "std::process::",
            ] {
                assert!(!text.contains(clock), "{} has {clock}", path.display());
            }
        }
    }
}

#[test]
fn files_can_be_read_at_once() {
    let root = metadata().workspace_root.into_std_path_buf();
    let long: Vec<String> = rust_files(&root)
        .into_iter()
        .filter_map(|path| {
            let lines = fs::read_to_string(&path).expect("a source file").lines().count();
            (lines > MAX_LINES).then(|| format!("{}: {lines} lines", path.display()))
        })
        .collect();
    assert!(long.is_empty(), "longer than {MAX_LINES} lines, split by noun: {long:#?}");
}

/// Every test that CONTRIBUTING.md names exists.
#[test]
fn tests_that_are_named_exist() {
    let root = metadata().workspace_root.into_std_path_buf();
    let text = fs::read_to_string(root.join("CONTRIBUTING.md")).expect("the page is there");
    let table = text.lines().skip_while(|line| *line != "| Failure | Tests |").skip(2);
    let cells = table.take_while(|line| line.starts_with('|')).filter_map(|line| line.split('|').nth(2));
    let named: BTreeSet<&str> =
        cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).filter(|name| !name.is_empty()).collect();
    assert!(named.len() > 10, "the table is not where it was: {named:?}");
    let sources: Vec<String> =
        rust_files(&root).into_iter().map(|path| fs::read_to_string(path).expect("a source file")).collect();
    let exists = |name: &&str| {
        let ways = [format!("fn {name}("), format!("\"{name}\"")];
        sources.iter().any(|source| ways.iter().any(|way| source.contains(way)))
    };
    let missing: Vec<&str> = named.into_iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "CONTRIBUTING.md names tests that do not exist: {missing:?}");
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
        let paths: BTreeSet<String> = named.flat_map(expand).filter(|name| is_path(&root, name)).collect();
        assert!(page == "README.md" || paths.len() > 10, "paths of {page} are not found any more: {paths:?}");
        let is_there = |path: &String| root.join(path).exists() || all.iter().any(|file| file.ends_with(path));
        missing.extend(paths.into_iter().filter(|path| !is_there(path)).map(|path| format!("{page}: {path}")));
    }
    assert!(missing.is_empty(), "files that do not exist are named: {missing:#?}");
}

fn is_path(root: &Path, name: &str) -> bool {
    let is_plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
    let is_file = ["rs", "md", "proto", "toml", "tsv", "yaml"].iter().any(|end| name.ends_with(&format!(".{end}")));
    let is_below = name.split_once('/').is_some_and(|(first, _)| !first.is_empty() && root.join(first).is_dir());
    is_plain && (is_file || is_below) && !name.starts_with("target/") && !name.starts_with("/")
}

/// Expands `a/{b,c}.rs` to `a/b.rs` and `a/c.rs`, and `a/*.rs` to the folder.
fn expand(name: &str) -> Vec<String> {
    if let Some((folder, _)) = name.split_once('*') {
        return folder.rsplit_once('/').map(|(folder, _)| folder.to_owned()).into_iter().collect();
    }
    match name.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?))) {
        Some((before, (inside, after))) => inside.split(',').map(|part| format!("{before}{part}{after}")).collect(),
        None => vec![name.to_owned()],
    }
}

/// The limits in the pages and in the CRDs are those of the code.
#[test]
fn limits_in_the_pages_are_those_of_the_code() {
    let root = metadata().workspace_root.into_std_path_buf();
    let read = |name: &str| fs::read_to_string(root.join(name)).expect("the page is there");
    let of_policies =
        [("rules, ranges and ports", MAX_ENTRIES), ("selectors, Services and named ports", MAX_REFERENCES)];
    let all = [
        ("rules, ranges and ports of a policy", MAX_ENTRIES),
        ("selectors, Services and named ports of a policy", MAX_REFERENCES),
        ("bytes of a part of a frame", sync::PART_SIZE),
        ("bytes of a message of a node", sync::MAX_UP),
        ("errors in an Ack", sync::MAX_ERRORS),
        ("bytes of the reason of one", sync::MAX_REASON),
        ("addresses of a pod that a node sends", sync::MAX_ADDRESSES),
    ];
    for (page, rows) in [("docs/src/operate/policy.md", &of_policies[..]), ("ARCHITECTURE.md", &all[..])] {
        let text = read(page);
        for (what, limit) in rows {
            let row = format!("| {what} | {} |", thousands(*limit));
            assert!(text.contains(&row), "{page} has no row that begins with {row}");
        }
    }
    for kind in ["networkpolicies", "globalnetworkpolicies", "stagednetworkpolicies", "stagedkubernetesnetworkpolicies"]
    {
        let text = read(&format!("deploy/crds/projectcalico.org_{kind}.yaml"));
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for (what, limit) in of_policies {
            let phrase = format!("{} {what}", thousands(limit));
            assert!(text.contains(&phrase), "the definition of {kind} does not have {phrase:?}");
        }
    }
}

/// The number with commas.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group).into_owned());
    groups.collect::<Vec<_>>().join(",")
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    files(folder, &|name| name.ends_with(".rs"))
}

/// Files below a folder that match, without build output and hidden files.
fn files(folder: &Path, is_wanted: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder of the tree") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            found.extend(files(&path, is_wanted));
        } else if is_wanted(name) {
            found.push(path);
        }
    }
    found
}
