//! The walls of ARCHITECTURE.md, checked over cargo's metadata and the tree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};
use margay_api::limits::{MAX_ENTRIES, MAX_REFERENCES};
use margay_proto::sync;

/// Which of our crates each may use.
const MAY_USE: [(&str, &[&str]); 15] = [
    ("margay-api", &[]),
    ("margay-bgp", &["margay-api"]),
    ("margay-calc", &["margay-api"]),
    ("margay-proto", &["margay-api", "margay-calc"]),
    ("margay-runtime", &[]),
    ("margay-netlink", &[]),
    ("margay-nft", &["margay-netlink"]),
    ("margay-typha", &["margay-api", "margay-calc", "margay-proto", "margay-runtime"]),
    ("margay-dataplane", &["margay-api", "margay-calc", "margay-netlink", "margay-nft", "margay-runtime"]),
    ("margay-ipam", &["margay-api"]),
    (
        "margay-node",
        &[
            "margay-api",
            "margay-calc",
            "margay-dataplane",
            "margay-ipam",
            "margay-netlink",
            "margay-proto",
            "margay-runtime",
        ],
    ),
    ("margay-cni", &["margay-proto"]),
    ("margay-operator", &["margay-api", "margay-ipam", "margay-runtime"]),
    ("margay", &["margay-node", "margay-operator", "margay-runtime", "margay-typha"]),
    (
        "margay-tests",
        &[
            "margay-api",
            "margay-bgp",
            "margay-calc",
            "margay-dataplane",
            "margay-ipam",
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

/// What a crate must not even name, because of what it is for.
const MUST_NOT: [(&str, &[&str]); 8] = [
    ("margay-api", &["tokio", "tonic", "nix", "rand", "libc", "futures", "jiff", "tracing"]),
    ("margay-bgp", &["tokio", "tonic", "kube", "nix", "rand", "libc", "futures", "jiff", "tracing", "serde"]),
    ("margay-calc", &["tokio", "tonic", "kube", "nix", "rand", "libc", "futures", "jiff", "tracing", "serde_json"]),
    ("margay-ipam", &["tonic", "nix", "libc"]),
    ("margay-netlink", &["tokio", "tonic", "kube", "serde"]),
    ("margay-nft", &["tokio", "tonic", "kube", "serde", "nix"]),
    ("margay-cni", &["tokio", "tonic", "kube", "clap"]),
    ("margay-typha", &["nix", "libc", "netlink-packet-route"]),
];

/// Where alone IPAM has a client of the API server: all else of it works on a trait.
const IPAM_CLIENT: &str = "ipam/src/store/api_server.rs";

/// Floors of the modules in a folder, the lowest first: a module uses modules of its own floor and of lower ones.
const FLOORS: [(&str, &[&[&str]]); 7] = [
    (
        "bgp/src",
        &[
            &["attributes", "error", "notification", "table"],
            &["message"],
            &["codec"],
            &["config", "filter"],
            &["export", "rib"],
            &["adj_out", "route_policy", "session"],
            &["speaker"],
        ],
    ),
    (
        "calc/src",
        &[
            &["interner", "model", "quota", "store", "update"],
            &["blocks", "digest", "evaluate", "flush", "ingest", "port_names", "rules", "selector", "services"],
            &["claims", "conflict", "index", "refcount", "selectors", "sets", "settings", "text"],
            &["globals", "items", "node_sets", "policies"],
            &["graph"],
            &["explain"],
        ],
    ),
    (
        "typha/src",
        &[
            &[
                "cause", "codec", "config", "feed", "hello", "metrics", "object", "overlay", "pace", "registry",
                "services", "session",
            ],
            &["cache", "event", "hub"],
            &["debug", "kinds", "object_events", "reporter", "server", "watch"],
            &["compute"],
            &["app"],
        ],
    ),
    ("dataplane/src", &[&["dirty", "links"], &["routes"], &["nftables"], &["conformance", "probe"]]),
    (
        "dataplane/src/nftables",
        &[
            &["names", "simulate", "stage"],
            &["demands", "elements", "kernel", "model", "origin", "rule"],
            &["base", "class", "host", "ipvs", "merge", "sample", "union"],
            &["compiler"],
            &["dataplane"],
        ],
    ),
    (
        "dataplane/src/routes",
        &[
            &["ethtool", "plan"],
            &["conntrack", "diff", "hint", "message", "sysctl"],
            &["parameters", "present"],
            &["addresses", "driver", "monitor", "netconf", "pod", "removal"],
            &["underlay", "worker"],
        ],
    ),
    (
        "nft/src",
        &[
            &["constants", "rule", "ruleset", "set"],
            &["check", "encode", "text", "transaction"],
            &["exec"],
            &["diff", "listing", "monitor", "present"],
        ],
    ),
];

/// Crates whose modules use each other in one direction.
const ONE_WAY: [&str; 10] =
    ["api", "bgp", "calc", "dataplane", "netlink", "nft", "operator", "proto", "runtime", "typha"];

/// Modules that use each other both ways, because they are one recursive type.
const RECURSIVE: [(&str, &[&str]); 1] = [("nft/src", &["rule", "ruleset", "set"])];

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
fn ipam_has_a_client_in_one_place() {
    let root = metadata().workspace_root.into_std_path_buf();
    for path in rust_files(&root.join("ipam/src")).into_iter().filter(|path| *path != root.join(IPAM_CLIENT)) {
        let text = fs::read_to_string(&path).expect("a source file");
        let client = ["kube::Client", "kube::Api", "kube::api", "kube::runtime", "kube::{"];
        let named: Vec<&str> = client.into_iter().filter(|name| text.contains(name)).collect();
        assert!(named.is_empty(), "{} names {named:?}", path.display());
    }
}

#[test]
fn pure_crates_read_no_clock() {
    let root = metadata().workspace_root.into_std_path_buf();
    for folder in ["api/src", "bgp/src", "calc/src"] {
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
fn modules_use_only_their_own_and_lower_floors() {
    let root = metadata().workspace_root.into_std_path_buf();
    for (folder, floors) in FLOORS {
        let (modules, uses) = siblings(&root, folder);
        let of = |module: &str| floors.iter().position(|floor| floor.contains(&module));
        let listed: BTreeSet<&str> = floors.iter().flat_map(|floor| floor.iter().copied()).collect();
        assert_eq!(modules.iter().map(String::as_str).collect::<BTreeSet<_>>(), listed, "modules of {folder}");
        let upward: Vec<String> = uses
            .iter()
            .filter(|((user, used), _)| of(user) < of(used))
            .map(|((user, used), path)| format!("{user} uses {used}: {path}"))
            .collect();
        assert!(upward.is_empty(), "modules of {folder} use higher floors: {upward:#?}");
    }
}

#[test]
fn modules_use_each_other_in_one_direction() {
    let root = metadata().workspace_root.into_std_path_buf();
    for crate_ in ONE_WAY {
        let sources = root.join(crate_).join("src");
        let folders: BTreeSet<PathBuf> =
            rust_files(&sources).into_iter().filter_map(|file| Some(file.parent()?.to_owned())).collect();
        for folder in folders {
            let folder = folder.strip_prefix(&root).expect("below the root").to_str().expect("a name in UTF-8");
            let recursive =
                RECURSIVE.iter().find(|(place, _)| *place == folder).map_or(&[][..], |(_, together)| *together);
            let is_within = |module: &String| recursive.contains(&module.as_str());
            let (mut rest, mut uses) = siblings(&root, folder);
            uses.retain(|(user, used), _| !(is_within(user) && is_within(used)));
            // What uses nothing of the rest is in no circle, and neither is what uses only such modules.
            loop {
                let is_free = |module: &String| !uses.keys().any(|(user, used)| user == module && rest.contains(used));
                let (free, kept): (BTreeSet<String>, BTreeSet<String>) = rest.iter().cloned().partition(is_free);
                rest = kept;
                if free.is_empty() {
                    break;
                }
            }
            uses.retain(|(user, used), _| rest.contains(user) && rest.contains(used));
            assert!(uses.is_empty(), "modules of {folder} use each other in circles, or lead to some: {uses:#?}");
        }
    }
}

/// The modules in a folder, and which of them uses which, with a path by which it does.
fn siblings(root: &Path, folder: &str) -> (BTreeSet<String>, BTreeMap<(String, String), String>) {
    let (crate_, below) = folder.split_once("/src").expect("a folder of sources");
    let sources = root.join(crate_).join("src");
    let parent: Vec<&str> = below.split('/').filter(|name| !name.is_empty()).collect();
    let files: BTreeMap<Vec<String>, PathBuf> = rust_files(&sources)
        .into_iter()
        .map(|file| (module_of(file.strip_prefix(&sources).expect("below the sources")), file))
        .filter(|(module, _)| !module.iter().any(|name| name == "tests" || name.ends_with("_tests")))
        .collect();
    let child = |module: &[String]| match module.split_at_checked(parent.len()) {
        Some((before, [child, ..])) if before == parent => Some(child.clone()),
        _ => None,
    };
    let modules = files.keys().filter_map(|module| child(module)).collect();
    let mut uses = BTreeMap::new();
    for (module, file) in &files {
        let Some(user) = child(module) else { continue };
        let text = fs::read_to_string(file).expect("a source file");
        for path in paths(&text) {
            let Some(mut target) = resolve(module, &path) else { continue };
            while !target.is_empty() && !files.contains_key(&target) {
                target.pop();
            }
            if let Some(used) = child(&target).filter(|used| *used != user) {
                uses.entry((user.clone(), used)).or_insert(format!("{path} in {}", file.display()));
            }
        }
    }
    (modules, uses)
}

/// The module that a file below the sources is.
fn module_of(file: &Path) -> Vec<String> {
    let file = file.with_extension("");
    let names = file.iter().map(|name| name.to_string_lossy().into_owned());
    names.filter(|name| !["lib", "main", "mod"].contains(&name.as_str())).collect()
}

/// Every path of a source that begins with `crate` or `super`, but for those of its tests and comments.
fn paths(text: &str) -> BTreeSet<String> {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code = lines.collect::<Vec<_>>().join("\n");
    let opens = |at: &usize| code[at + 1..].lines().nth(1).is_some_and(|line| line.ends_with('{'));
    let tests = code.match_indices("\n#[cfg(test)]\nmod ").map(|(at, _)| at).find(opens);
    let code = &code[..tests.unwrap_or(code.len())];
    let is_path = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let starts = ["crate::", "super::"].into_iter().flat_map(|start| code.match_indices(start));
    let starts = starts.filter(|(at, _)| !code[..*at].ends_with(is_path)).map(|(at, _)| &code[at..]);
    let mut paths = BTreeSet::new();
    for rest in starts {
        let (path, after) = rest.split_at(rest.find(|c: char| !is_path(c)).unwrap_or(rest.len()));
        if let Some(group) = after.strip_prefix('{') {
            expand_group(path, group, &mut paths);
        } else {
            paths.insert(path.to_owned());
        }
    }
    paths
}

/// The paths of a group in a `use`, which begins behind its brace; returns what comes behind its end.
fn expand_group<'a>(prefix: &str, group: &'a str, paths: &mut BTreeSet<String>) -> &'a str {
    let mut rest = group;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
        if rest.is_empty() {
            return rest;
        }
        if let Some(behind) = rest.strip_prefix('}') {
            return behind;
        }
        let (item, after) = rest.split_at(rest.find([',', '{', '}']).unwrap_or(rest.len()));
        let path = format!("{prefix}{}", item.split(" as ").next().unwrap_or_default().trim());
        rest = match after.strip_prefix('{') {
            Some(inner) => expand_group(&path, inner, paths),
            None => {
                paths.insert(path);
                after
            }
        };
    }
}

/// The path from the crate's root; none if it leads out of it.
fn resolve(module: &[String], path: &str) -> Option<Vec<String>> {
    let names: Vec<&str> = path.split("::").filter(|name| !name.is_empty()).collect();
    let ups = names.iter().take_while(|name| **name == "super").count();
    let base = if ups == 0 { &[][..] } else { &module[..module.len().checked_sub(ups)?] };
    Some(base.iter().cloned().chain(names.into_iter().skip(ups.max(1)).map(str::to_owned)).collect())
}

#[test]
fn paths_of_a_source_are_found() {
    let text = "use super::{\n    a::{self, b},\n    c as d, // super::not\n};\nuse crate::e;\nfn f() { super::super::g::h(my_crate::i) }\n\
                #[cfg(test)]\nmod tests {\n    use crate::j;\n}\n";
    let module = ["x", "y"].map(str::to_owned);
    let found: Vec<String> = paths(text).iter().filter_map(|path| Some(resolve(&module, path)?.join("/"))).collect();
    assert_eq!(found, ["e", "x/a/b", "x/a/self", "x/c", "g/h"]);
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

/// What CONTRIBUTING.md says is shown by a test is shown by one of that name.
#[test]
fn tests_that_are_named_exist() {
    let root = metadata().workspace_root.into_std_path_buf();
    let text = fs::read_to_string(root.join("CONTRIBUTING.md")).expect("the page is there");
    let table = text.lines().skip_while(|line| *line != "| Hole | Shown by |").skip(2);
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

/// Files and folders that a page names in code type are there: those below a folder of the tree, and bare names of files.
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

/// `a/{b,c}.rs` is `a/b.rs` and `a/c.rs`; of `a/*.rs` the folder is meant.
fn expand(name: &str) -> Vec<String> {
    if let Some((folder, _)) = name.split_once('*') {
        return folder.rsplit_once('/').map(|(folder, _)| folder.to_owned()).into_iter().collect();
    }
    match name.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?))) {
        Some((before, (inside, after))) => inside.split(',').map(|part| format!("{before}{part}{after}")).collect(),
        None => vec![name.to_owned()],
    }
}

/// The limits that the pages give are those of the code, and so are those that the definitions give.
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

/// Files below a folder whose names are asked for, but for what is built and what is hidden.
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
