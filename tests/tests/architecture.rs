//! Rules of ARCHITECTURE.md, checked against cargo's metadata and the files.

#[path = "architecture/modules.rs"]
mod modules;
#[path = "architecture/pages.rs"]
mod pages;
#[path = "architecture/vocabulary.rs"]
mod vocabulary;
#[path = "architecture/width.rs"]
mod width;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// Our crates that each crate may use.
const MAY_USE: [(&str, &[&str]); 16] = [
    ("margay-api", &[]),
    ("margay-bgp", &["margay-api"]),
    ("margay-calc", &["margay-api"]),
    ("margay-proto", &["margay-api", "margay-calc"]),
    ("margay-runtime", &[]),
    ("margay-netlink", &[]),
    ("margay-nft", &["margay-netlink"]),
    (
        "margay-typha",
        &[
            "margay-api",
            "margay-calc",
            "margay-proto",
            "margay-runtime",
        ],
    ),
    (
        "margay-dataplane",
        &[
            "margay-api",
            "margay-calc",
            "margay-netlink",
            "margay-nft",
            "margay-runtime",
        ],
    ),
    ("margay-ipam", &["margay-api"]),
    (
        "margay-node",
        &[
            "margay-api",
            "margay-bgp",
            "margay-calc",
            "margay-dataplane",
            "margay-ipam",
            "margay-netlink",
            "margay-proto",
            "margay-runtime",
        ],
    ),
    ("margay-cni", &["margay-proto"]),
    (
        "margay-operator",
        &["margay-api", "margay-ipam", "margay-runtime"],
    ),
    (
        "margay-ctl",
        &["margay-api", "margay-calc", "margay-ipam", "margay-proto"],
    ),
    (
        "margay",
        &[
            "margay-node",
            "margay-operator",
            "margay-runtime",
            "margay-typha",
        ],
    ),
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

/// Crates that a crate must not depend on, because of its purpose.
const MUST_NOT: [(&str, &[&str]); 9] = [
    (
        "margay-api",
        &[
            "tokio", "tonic", "nix", "rand", "libc", "futures", "jiff", "tracing",
        ],
    ),
    (
        "margay-bgp",
        &[
            "tokio", "tonic", "kube", "nix", "rand", "libc", "futures", "jiff", "tracing", "serde",
        ],
    ),
    (
        "margay-calc",
        &[
            "tokio",
            "tonic",
            "kube",
            "nix",
            "rand",
            "libc",
            "futures",
            "jiff",
            "tracing",
            "serde_json",
        ],
    ),
    ("margay-ipam", &["tonic", "nix", "libc"]),
    ("margay-netlink", &["tokio", "tonic", "kube", "serde"]),
    ("margay-nft", &["tokio", "tonic", "kube", "serde", "nix"]),
    ("margay-cni", &["tokio", "tonic", "kube", "clap"]),
    ("margay-ctl", &["nix", "libc", "netlink-packet-route"]),
    ("margay-typha", &["nix", "libc", "netlink-packet-route"]),
];

/// Where alone IPAM has a client of the API server: all else of it works on a trait.
const IPAM_CLIENT: &str = "ipam/src/store/api_server.rs";

/// Floors of the modules in a folder, the lowest first: a module uses modules of its own floor and
/// of lower ones.
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
            &[
                "interner", "item_set", "model", "postings", "quota", "store", "update",
            ],
            &[
                "blocks",
                "digest",
                "evaluate",
                "flush",
                "ingest",
                "port_names",
                "rules",
                "selector",
                "services",
            ],
            &[
                "claims",
                "conflict",
                "index",
                "kinds",
                "refcount",
                "selectors",
                "sets",
                "settings",
                "text",
            ],
            &[
                "auto_hosts",
                "bgp",
                "globals",
                "items",
                "node_sets",
                "policies",
            ],
            &["graph"],
            &["explain"],
        ],
    ),
    (
        "typha/src",
        &[
            &[
                "cause",
                "codec",
                "config",
                "delivery",
                "feed",
                "freshness",
                "hello",
                "metrics",
                "object",
                "overlay",
                "pace",
                "packed",
                "placement",
                "registry",
                "services",
                "session",
            ],
            &["body", "cache", "event", "hub"],
            &[
                "debug",
                "kinds",
                "object_events",
                "replicas",
                "reporter",
                "server",
                "watch",
            ],
            &["compute"],
            &["app"],
        ],
    ),
    (
        "dataplane/src",
        &[
            &["dirty", "links"],
            &["routes"],
            &["nftables"],
            &["conformance", "probe"],
        ],
    ),
    (
        "dataplane/src/nftables",
        &[
            &["names", "simulate", "stage"],
            &["demands", "elements", "kernel", "model", "origin", "rule"],
            &[
                "base",
                "class",
                "host",
                "host_ports",
                "ipvs",
                "merge",
                "sample",
                "union",
            ],
            &["compiler"],
            &["dataplane"],
        ],
    ),
    (
        "dataplane/src/routes",
        &[
            &["ethtool", "plan", "tunnel"],
            &["conntrack", "diff", "hint", "learned", "message", "sysctl"],
            &["parameters", "present"],
            &[
                "addresses",
                "devices",
                "driver",
                "monitor",
                "netconf",
                "next_hop",
                "pod",
                "removal",
            ],
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

/// The longest file, in lines.
const MAX_LINES: usize = 600;

fn metadata() -> Metadata {
    MetadataCommand::new()
        .no_deps()
        .exec()
        .expect("cargo metadata of the workspace")
}

fn normal_dependencies(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    let of = |package: &cargo_metadata::Package| {
        let normal = package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind == DependencyKind::Normal);
        normal.map(|dependency| dependency.name.clone()).collect()
    };
    metadata
        .packages
        .iter()
        .map(|package| (package.name.to_string(), of(package)))
        .collect()
}

#[test]
fn crates_use_only_what_the_table_lets_them() {
    let dependencies = normal_dependencies(&metadata());
    let table: BTreeMap<&str, &[&str]> = MAY_USE.into();
    assert_eq!(
        dependencies
            .keys()
            .map(String::as_str)
            .collect::<BTreeSet<_>>(),
        table.keys().copied().collect(),
        "a crate is missing in the table, or gone"
    );
    for (name, used) in &dependencies {
        let ours = used
            .iter()
            .filter(|used| used.as_str() == "margay" || used.starts_with("margay-"));
        let outside: Vec<&String> = ours
            .filter(|used| !table[name.as_str()].contains(&used.as_str()))
            .collect();
        assert!(
            outside.is_empty(),
            "{name} uses {outside:?}, which the table in ARCHITECTURE.md does not let it"
        );
    }
}

#[test]
fn pure_and_small_crates_name_no_outside_world() {
    let dependencies = normal_dependencies(&metadata());
    for (name, forbidden) in MUST_NOT {
        let named: Vec<&&str> = forbidden
            .iter()
            .filter(|crate_| dependencies[name].contains(**crate_))
            .collect();
        assert!(named.is_empty(), "{name} names {named:?}");
    }
}

#[test]
fn ipam_has_a_client_in_one_place() {
    let root = metadata().workspace_root.into_std_path_buf();
    for path in rust_files(&root.join("ipam/src"))
        .into_iter()
        .filter(|path| *path != root.join(IPAM_CLIENT))
    {
        let text = fs::read_to_string(&path).expect("a source file");
        let client = [
            "kube::Client",
            "kube::Api",
            "kube::api",
            "kube::runtime",
            "kube::{",
        ];
        let named: Vec<&str> = client
            .into_iter()
            .filter(|name| text.contains(name))
            .collect();
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
fn files_can_be_read_at_once() {
    let root = metadata().workspace_root.into_std_path_buf();
    let long: Vec<String> = rust_files(&root)
        .into_iter()
        .filter_map(|path| {
            let lines = fs::read_to_string(&path)
                .expect("a source file")
                .lines()
                .count();
            (lines > MAX_LINES).then(|| format!("{}: {lines} lines", path.display()))
        })
        .collect();
    assert!(
        long.is_empty(),
        "longer than {MAX_LINES} lines, split by noun: {long:#?}"
    );
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    files(folder, &|name| name.ends_with(".rs"))
}

/// Files below a folder that match, without build output and hidden files.
fn files(folder: &Path, is_wanted: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder of the tree") {
        let path = entry.expect("an entry").path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            found.extend(files(&path, is_wanted));
        } else if is_wanted(name) {
            found.push(path);
        }
    }
    found
}
