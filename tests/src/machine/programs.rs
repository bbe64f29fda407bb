//! The test programs of the kernel layers: which they are, how cargo builds them, and the script that runs them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::results::{BEGIN, END};
use crate::install;

/// Which suites, built how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// All, with programs that are built for the purpose.
    All,
    /// What fits into a run of the CI, with the programs of `cargo test`.
    Quick,
}

/// A test program that can be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// What it is called.
    pub suite: &'static str,
    /// The program.
    pub path: PathBuf,
    /// Where cargo would run it: the folder of its package.
    pub folder: PathBuf,
    /// Parts of the names of its cases that are run; all when empty.
    pub only: &'static [&'static str],
    /// How long it may take: many times what it takes on a quiet machine.
    pub limit: Duration,
}

/// A suite of the kernel layers.
struct Suite {
    name: &'static str,
    package: &'static str,
    /// Cases of [`Selection::Quick`]; none: it is not among them.
    quick: Option<&'static [&'static str]>,
}

const fn suite(name: &'static str, package: &'static str, quick: Option<&'static [&'static str]>) -> Suite {
    Suite { name, package, quick }
}

/// The unit tests of a package have its name. Those of the agent compare rulesets and routes with the kernel.
const SUITES: [Suite; 9] = [
    suite("margay_node", "margay-node", Some(&["features::", "messages_and_text", "what_was_written_is_read_back"])),
    suite("routing", "margay-tests", Some(&[])),
    suite("cni", "margay-tests", None),
    // But for a set so large that a program which is built for debugging takes minutes over it in emulation.
    suite("enforcement", "margay-tests", Some(&["packets", "nobody", "ipv6", "router", "agent", "others"])),
    suite("spoof", "margay-tests", Some(&[])),
    suite("ipvs", "margay-tests", Some(&[])),
    suite("host", "margay-tests", None),
    suite("lab", "margay-tests", None),
    suite("conformance", "margay-tests", None),
];

const LIMIT: Duration = Duration::from_secs(900);

/// What a node has loaded long before a test begins, and a machine that has just booted loads over 9p, in emulation, while a test waits. A kernel need
/// not have each.
const MODULES: &str = "veth vxlan dummy nf_tables nft_ct nft_chain_nat nft_masq nft_fib_inet nft_log nft_limit nf_conntrack_netlink sctp ip_vs";

/// The suites whose names have one of `names` in them, all when there are none, after cargo has built them.
pub fn built(selection: Selection, names: &[String], tell: &dyn Fn(&str)) -> Result<Vec<Program>> {
    let of_names = |suite: &&Suite| names.is_empty() || names.iter().any(|name| suite.name.contains(name.as_str()));
    let of_selection = |suite: &&Suite| selection == Selection::All || suite.quick.is_some();
    let chosen: Vec<&Suite> = SUITES.iter().filter(of_selection).filter(of_names).collect();
    ensure!(!chosen.is_empty(), "no suite has a name with one of {names:?}");
    tell("building the test programs");
    let built = build(selection, &chosen)?;
    let program = |suite: &&Suite| {
        let found = built.get(suite.name).with_context(|| format!("cargo built no test program {}", suite.name));
        let (path, folder) = found?;
        let only = suite.quick.filter(|_| selection == Selection::Quick).unwrap_or_default();
        Ok(Program { suite: suite.name, path: path.clone(), folder: folder.clone(), only, limit: LIMIT })
    };
    chosen.iter().map(program).collect()
}

/// The test programs of suites, each with the folder of its package, by name.
fn build(selection: Selection, suites: &[&Suite]) -> Result<BTreeMap<String, (PathBuf, PathBuf)>> {
    // A selection of packages decides about features of what they depend on: that of the other tests compiles nothing again.
    let packages: &[&str] = match selection {
        Selection::Quick => &["--workspace"],
        Selection::All => &["--profile", "kernels", "-p", "margay-cni", "-p", "margay-node", "-p", "margay-tests"],
    };
    cargo(&[&["build", "--bin", "margay-cni"][..], packages].concat())?;
    let of = |suite: &&Suite| if suite.package == "margay-tests" { vec!["--test", suite.name] } else { vec!["--lib"] };
    let targets: Vec<&str> = suites.iter().flat_map(of).collect();
    let test = ["test", "--no-run", "--message-format=json-render-diagnostics"];
    let said = cargo(&[&test[..], packages, &targets[..]].concat())?;
    Ok(said.lines().filter_map(artifact).collect())
}

/// Runs cargo in the checkout and gives back what it printed.
fn cargo(words: &[&str]) -> Result<String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(install::checkout()).args(words).stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo {} failed", words.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A test program in cargo's messages.
fn artifact(line: &str) -> Option<(String, (PathBuf, PathBuf))> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_test = message["profile"]["test"].as_bool()?;
    let path = message["executable"].as_str().filter(|_| is_test)?;
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
    Some((message["target"]["name"].as_str()?.to_owned(), (path.into(), folder.to_owned())))
}

/// A script that runs them one after the other, each as cargo would, and says what begins and how it ended.
pub fn script(programs: &[Program]) -> String {
    let mut script = String::from("export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=0\n");
    let _ = writeln!(script, "modprobe -a {MODULES} 2>/dev/null");
    for Program { suite, path, folder, only, limit } in programs {
        let (path, folder) = (path.display(), folder.display());
        let _ = writeln!(script, "cd {folder}; echo '{BEGIN}{suite}'");
        let (limit, only) = (limit.as_secs(), only.join(" "));
        let _ = writeln!(
            script,
            "CARGO_MANIFEST_DIR={folder} timeout {limit} {path} --test-threads=1 --color=never {only} 2>&1"
        );
        let _ = writeln!(script, "echo '{END}{suite}' $?");
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_in_what_cargo_says() {
        let line = |test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/node/Cargo.toml","target":{{"name":"cni"}},
                "profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let found = Some(("cni".to_owned(), (PathBuf::from("/t/cni-1"), PathBuf::from("/w/node"))));
        assert_eq!(artifact(&line(true, "\"/t/cni-1\"")), found);
        assert_eq!(artifact(&line(false, "\"/t/cni-1\"")), None);
        assert_eq!(artifact(&line(true, "null")), None);
        assert_eq!(artifact("not JSON"), None);
    }
}
