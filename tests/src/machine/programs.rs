//! The test programs of the kernel layers: which they are, how cargo builds them, and the script
//! that runs them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::results::{BEGIN, END};
use crate::install;
use crate::probe::SLOWNESS;

/// Which suites, built how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// All, with our own code compiled to run faster than in `cargo test`: emulation makes the rest
    /// slow enough.
    All,
    /// Suites that depend most on the kernel, with the programs of `cargo test`.
    Quick,
}

/// A test program that can be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its name.
    pub suite: &'static str,
    /// The program.
    pub path: PathBuf,
    /// Working folder, as with cargo: that of its package.
    pub folder: PathBuf,
    /// Parts of the names of its cases that are run, or behind `--skip` of those that are not; all
    /// when empty.
    pub only: &'static [&'static str],
    /// True if it runs before anything has loaded the modules that others need.
    pub is_first: bool,
    /// About how long it takes.
    pub weight: Duration,
    /// Time limit: many times its duration on an idle machine.
    pub limit: Duration,
}

/// A suite of the kernel layers.
struct Suite {
    name: &'static str,
    /// Name of cargo's target; the parts of one that takes long are suites of their own.
    target: &'static str,
    package: &'static str,
    /// Seconds that it took on Linux 6.1.
    seconds: u64,
    /// Parts of the names of its cases that are run, or behind `--skip` of those that are not; all
    /// when empty.
    only: &'static [&'static str],
    /// Those of [`Selection::Quick`]; none: it is not among them.
    quick: Option<&'static [&'static str]>,
}

/// One of the harness's crate.
const fn suite(name: &'static str, seconds: u64, quick: Option<&'static [&'static str]>) -> Suite {
    Suite {
        name,
        target: name,
        package: "margay-tests",
        seconds,
        only: &[],
        quick,
    }
}

/// The suite that finds its kernel as it has booted.
const FIRST: &str = "machine";

/// The target of two suites, which no machine runs alone in time.
const CONFORMANCE: &str = "conformance";

const SUITES: [Suite; 14] = [
    suite(FIRST, 10, Some(&[])),
    // Unit tests have the name of their crate. These compare rulesets with the kernel,
    Suite {
        package: "margay-nft",
        ..suite(
            "margay_nft",
            300,
            Some(&["messages_and_text", "what_was_written_is_read_back"]),
        )
    },
    // and these ask it for connections, routes and what it lacks.
    Suite {
        package: "margay-dataplane",
        only: &["conntrack::", "worker::", "probe::"],
        ..suite("margay_dataplane", 20, Some(&["conntrack::", "worker::"]))
    },
    suite("routing", 90, Some(&[])),
    suite("cni", 110, None),
    // But for a set so large that a program which is built for debugging takes a minute over it in
    // emulation.
    suite(
        "enforcement",
        35,
        Some(&["packets", "nobody", "ipv6", "router", "agent", "others"]),
    ),
    suite("spoof", 25, Some(&[])),
    suite("ipvs", 40, Some(&[])),
    suite("connections", 20, Some(&[])),
    suite("host", 125, None),
    suite("host_ports", 60, Some(&["everywhere"])),
    suite("lab", 70, Some(&["ipv6_alone"])),
    Suite {
        target: CONFORMANCE,
        only: &["network_policies", "runner"],
        ..suite("conformance", 250, None)
    },
    Suite {
        target: CONFORMANCE,
        only: &["--skip", "network_policies", "--skip", "runner"],
        ..suite("conformance beyond NetworkPolicy", 250, None)
    },
];

const LIMIT: Duration = Duration::from_secs(1200);

/// What a node has loaded long before a test begins, and a machine that has just booted loads over
/// 9p, in emulation, while a test waits. A kernel need not have each.
const MODULES: &str = "veth vxlan dummy nf_tables nft_ct nft_chain_nat nft_masq nft_fib_inet \
                       nft_log nft_limit nf_conntrack_netlink sctp ip_vs \
                       ipip";

/// What [`SLOWNESS`] is. Emulation is 10 to 20 times slower in everything, but most answers need
/// not come one after the other.
const SLOW: u32 = 5;

/// The suites whose names have one of `names` in them, all when there are none, after cargo has
/// built them.
pub fn built(
    selection: Selection,
    names: &[String],
    progress: &dyn Fn(&str),
) -> Result<Vec<Program>> {
    let of_names = |suite: &&Suite| {
        names.is_empty() || names.iter().any(|name| suite.name.contains(name.as_str()))
    };
    let of_selection = |suite: &&Suite| selection == Selection::All || suite.quick.is_some();
    let chosen: Vec<&Suite> = SUITES
        .iter()
        .filter(of_selection)
        .filter(of_names)
        .collect();
    ensure!(
        !chosen.is_empty(),
        "no suite has a name with one of {names:?}"
    );
    progress("building the test programs");
    let built = build(selection, &chosen)?;
    let program = |suite: &&Suite| {
        let found = built
            .get(suite.target)
            .with_context(|| format!("cargo built no test program {}", suite.target));
        let (path, folder) = found?;
        let only = suite
            .quick
            .filter(|_| selection == Selection::Quick)
            .unwrap_or(suite.only);
        let (path, folder, weight) = (
            path.clone(),
            folder.clone(),
            Duration::from_secs(suite.seconds),
        );
        Ok(Program {
            suite: suite.name,
            path,
            folder,
            only,
            is_first: suite.name == FIRST,
            weight,
            limit: LIMIT,
        })
    };
    chosen.iter().map(program).collect()
}

/// The test programs of suites, each with the folder of its package, by name.
fn build(selection: Selection, suites: &[&Suite]) -> Result<BTreeMap<String, (PathBuf, PathBuf)>> {
    // With a test beside it: cargo gives the same packages other features where no test is built,
    // and would compile everything once more.
    cargo(
        selection,
        &[
            "build",
            "--workspace",
            "--bin",
            "margay-cni",
            "--test",
            FIRST,
        ],
    )?;
    let of = |suite: &&Suite| {
        if suite.package == "margay-tests" {
            vec!["--test", suite.target]
        } else {
            vec!["--lib"]
        }
    };
    let targets: Vec<&str> = suites
        .iter()
        .map(of)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .flatten()
        .collect();
    let test = [
        "test",
        "--workspace",
        "--no-run",
        "--message-format=json-render-diagnostics",
    ];
    let output = cargo(selection, &[&test[..], &targets[..]].concat())?;
    Ok(output.lines().filter_map(artifact).collect())
}

/// Runs cargo in the checkout and returns its output. With another level for our own code, and the
/// same selection of packages, what we depend on is that of the other tests: nothing of it is
/// compiled again.
fn cargo(selection: Selection, arguments: &[&str]) -> Result<String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo
        .current_dir(install::checkout())
        .args(arguments)
        .stderr(Stdio::inherit());
    if selection == Selection::All {
        cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
    }
    let output = cargo.output().context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "cargo {} failed",
        arguments.join(" ")
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A test program in cargo's messages.
fn artifact(line: &str) -> Option<(String, (PathBuf, PathBuf))> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_test = message["profile"]["test"].as_bool()?;
    let path = message["executable"].as_str().filter(|_| is_test)?;
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
    Some((
        message["target"]["name"].as_str()?.to_owned(),
        (path.into(), folder.to_owned()),
    ))
}

/// Divides programs among machines that run at once so that these end at about the same time. Each
/// share is in the order of the programs.
pub fn shares(programs: &[Program], machines: usize) -> Vec<Vec<Program>> {
    let mut longest: Vec<usize> = (0..programs.len()).collect();
    longest.sort_by_key(|index| std::cmp::Reverse(programs[*index].weight));
    let mut shares = vec![(Duration::ZERO, BTreeSet::new()); machines];
    for index in longest {
        if let Some((weight, share)) = shares.iter_mut().min_by_key(|(weight, _)| *weight) {
            *weight += programs[index].weight;
            share.insert(index);
        }
    }
    let of = |share: BTreeSet<usize>| {
        share
            .into_iter()
            .map(|index| programs[index].clone())
            .collect::<Vec<_>>()
    };
    shares
        .into_iter()
        .filter(|(_, share)| !share.is_empty())
        .map(|(_, share)| of(share))
        .collect()
}

/// A script that runs them one after the other, each as cargo would, and prints the start and the
/// result of each.
pub fn script(programs: &[Program]) -> String {
    let mut script = format!(
        "export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=0 {SLOWNESS}={SLOW}\n"
    );
    let (first, others): (Vec<_>, Vec<_>) = programs.iter().partition(|program| program.is_first);
    first
        .into_iter()
        .for_each(|program| run(&mut script, program));
    let _ = writeln!(script, "modprobe -a {MODULES} 2>/dev/null");
    others
        .into_iter()
        .for_each(|program| run(&mut script, program));
    script
}

fn run(script: &mut String, program: &Program) {
    let Program {
        suite,
        path,
        folder,
        only,
        limit,
        ..
    } = program;
    let (path, folder) = (path.display(), folder.display());
    let _ = writeln!(script, "cd {folder}; echo '{BEGIN}{suite}'");
    let (limit, only) = (limit.as_secs(), only.join(" "));
    let _ = writeln!(
        script,
        "CARGO_MANIFEST_DIR={folder} timeout {limit} {path} --test-threads=1 --color=never {only} \
         2>&1"
    );
    let _ = writeln!(script, "echo '{END}{suite}' $?");
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A program that takes so many seconds.
    pub(in crate::machine) fn mk_program(suite: &'static str, seconds: u64) -> Program {
        let weight = Duration::from_secs(seconds);
        let (path, folder) = (PathBuf::from(format!("/{suite}-1")), PathBuf::from("/w"));
        Program {
            suite,
            path,
            folder,
            only: &[],
            is_first: suite == FIRST,
            weight,
            limit: 2 * weight,
        }
    }

    #[test]
    fn machines_end_at_about_the_same_time() {
        let programs = [("a", 1), ("b", 5), ("c", 9), ("d", 2), ("e", 3)]
            .map(|(suite, time)| mk_program(suite, time));
        let names = |machines| {
            let names = |share: Vec<Program>| {
                share
                    .into_iter()
                    .map(|program| program.suite)
                    .collect::<String>()
            };
            shares(&programs, machines)
                .into_iter()
                .map(names)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(1), ["abcde"]);
        assert_eq!(names(2), ["ac", "bde"]);
        assert_eq!(
            names(9),
            ["c", "b", "e", "d", "a"],
            "no machine without a program"
        );
    }

    #[test]
    fn modules_are_loaded_after_the_suite_that_comes_first() {
        let script = script(&[mk_program("a", 1), mk_program(FIRST, 1)]);
        let places = ["/machine-1", "modprobe", "/a-1"].map(|word| script.find(word));
        assert!(
            places.iter().all(Option::is_some) && places.is_sorted(),
            "{script}"
        );
    }

    #[test]
    fn test_programs_are_found_in_cargos_output() {
        let line = |test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/node/Cargo.toml","target":{{"name":"cni"}},
                "profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let found = Some((
            "cni".to_owned(),
            (PathBuf::from("/t/cni-1"), PathBuf::from("/w/node")),
        ));
        assert_eq!(artifact(&line(true, "\"/t/cni-1\"")), found);
        assert_eq!(artifact(&line(false, "\"/t/cni-1\"")), None);
        assert_eq!(artifact(&line(true, "null")), None);
        assert_eq!(artifact("not JSON"), None);
    }
}
