//! Network namespaces, the `nft` program, and comparison of its listings.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use nix::sched::{CloneFlags, unshare};

use crate::{ChainName, IfName, Ruleset, Selector, SetName, SetRef, Statement, TableName};

/// A lookup of a protocol among ranges, as the `nft` program may not be able to load it.
const RANGES_WITH_PROTOCOL: &str =
    "table inet t-1 { chain c-1 { meta l4proto . th dport { tcp . 80-90 } accept; }; }";
/// What it says of a kernel that refuses something.
const REFUSED: &str = "Operation not supported";

/// Runs the test in a network namespace of its own.
pub fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .expect("these tests make network namespaces: run them as root");
            test()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs a program of this host in the namespace of the calling thread and returns what it prints.
pub fn run(program: &str, arguments: &[&str], input: &str) -> String {
    try_run(program, arguments, input).unwrap_or_else(|errors| {
        panic!("{program} {arguments:?} failed: {errors}\ninput:\n{input}")
    })
}

/// The same; the error is what it prints if it fails.
fn try_run(program: &str, arguments: &[&str], input: &str) -> Result<String, String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program} must be installed for these tests: {error}"));
    child
        .stdin
        .take()
        .expect("it is piped")
        .write_all(input.as_bytes())
        .expect("the program reads its input");
    let output = child.wait_with_output().expect("the program ends");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8(output.stdout).expect("it prints text"))
}

/// Loads text with the `nft` program.
pub fn load(text: &str) {
    run("nft", &["-f", "-"], text);
}

/// The ruleset without the rules that `nft` cannot load on this kernel. Its version 1.0.6 swaps the
/// bytes of a protocol, which has one, before a lookup among ranges, and Linux 6.12.117 refuses
/// that; our messages have no such step.
pub fn loadable(mut ruleset: Ruleset) -> Ruleset {
    static LOADS_ALL: OnceLock<bool> = OnceLock::new();
    let loads_all = LOADS_ALL.get_or_init(|| {
        let loaded = in_namespace(|| try_run("nft", &["-f", "-"], RANGES_WITH_PROTOCOL));
        let errors = loaded.err();
        assert!(
            errors
                .as_ref()
                .is_none_or(|errors| errors.contains(REFUSED)),
            "{errors:?}"
        );
        errors.is_none()
    });
    if !loads_all {
        let Ruleset { sets, chains, .. } = &mut ruleset;
        let has_ranges = |set: &SetRef| match set {
            SetRef::Named(name) => sets.get(name).is_some_and(|set| set.kind.interval),
            SetRef::Anonymous(set) => set.kind.interval,
        };
        let is_swapped = |(key, set): (&[Selector], &SetRef)| {
            key.len() > 1 && key.contains(&Selector::L4proto) && has_ranges(set)
        };
        for chain in chains.values_mut() {
            let rules = &mut Arc::make_mut(chain).rules;
            rules.retain(|rule| {
                !rule
                    .statements
                    .iter()
                    .filter_map(Statement::lookup)
                    .any(is_swapped)
            });
        }
    }
    ruleset
}

/// What the `nft` program prints of our table, without counts.
pub fn list() -> String {
    run("nft", &["-s", "list", "table", "inet", "t-1"], "")
}

/// What the `nft` program prints of everything, as JSON without handles.
pub fn list_json() -> serde_json::Value {
    let mut json =
        serde_json::from_str(&run("nft", &["-j", "list", "ruleset"], "")).expect("it prints JSON");
    forget_handles(&mut json);
    json
}

fn forget_handles(json: &mut serde_json::Value) {
    match json {
        serde_json::Value::Object(object) => {
            object.remove("handle");
            object.values_mut().for_each(forget_handles);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(forget_handles),
        _ => {}
    }
}

/// Normalises a listing: sorts sets and chains, and puts every list of elements on one line,
/// sorted.
pub fn normal(text: &str) -> String {
    let body = text
        .strip_prefix("table inet t-1 {\n")
        .and_then(|text| text.strip_suffix("}\n"));
    let blocks = body.expect("one table").split_inclusive("\n\t}\n");
    let mut blocks: Vec<String> = blocks
        .map(|block| normal_lists(block.trim_start_matches('\n')))
        .collect();
    blocks.sort_unstable();
    blocks.concat()
}

fn normal_lists(text: &str) -> String {
    let mut normal = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(" { ") {
        let (list, after) = after.split_once(" }").expect("every list ends");
        let mut elements: Vec<&str> = list.split(',').map(str::trim).collect();
        elements.sort_unstable();
        normal.extend([before, " { ", &elements.join(", "), " }"]);
        rest = after;
    }
    normal + rest
}

/// Fails with the lines that are only in one of the two.
pub fn assert_same_lines(ours: &str, theirs: &str) {
    let (ours, theirs): (Vec<&str>, Vec<&str>) = (ours.lines().collect(), theirs.lines().collect());
    let only = |these: &[&str], those: &[&str]| -> Vec<String> {
        these
            .iter()
            .filter(|line| !those.contains(line))
            .map(ToString::to_string)
            .collect()
    };
    let difference = (only(&ours, &theirs), only(&theirs, &ours));
    assert!(
        ours == theirs,
        "ours: {:#?}\ntheirs: {:#?}",
        difference.0,
        difference.1
    );
}

pub fn table() -> TableName {
    TableName::new("t-1").expect("a name")
}

pub fn chain_name(name: &str) -> ChainName {
    ChainName::new(name).expect("a name")
}

pub fn set_name(name: &str) -> SetName {
    SetName::new(name).expect("a name")
}

pub fn ifname(name: &str) -> IfName {
    IfName::new(name).expect("a name")
}
