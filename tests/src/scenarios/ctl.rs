//! The command line against a real API server, with an administrator's kubeconfig and with a user's
//! who has no rights.

mod network;
mod removal;

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use margay_api::ipam::block::Block;
use margay_api::storage::Mode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Environment;
use super::policy::all_open;
use crate::cluster::process::wait_for;
use crate::demo::OBEY;
use crate::install::beside;
use crate::suite::Suite;

/// Name of the program.
const PROGRAM: &str = "kubectl-margay";
/// Account without any rights.
const STRANGER: &str = "stranger";

/// Runs them.
pub fn run(suite: &mut Suite, environment: &Environment) {
    let ctl = Ctl::new(environment);
    suite.case("the_command_line_shows_objects_in_every_form", || {
        forms(&ctl)
    });
    suite.case("the_command_line_creates_changes_and_deletes", || {
        life(&ctl)
    });
    suite.case("what_would_not_be_enforced_is_not_written", || {
        refusals(&ctl)
    });
    suite.case("the_status_is_that_of_the_installation", || status(&ctl));
    suite.case("a_live_verdict_is_that_of_packets", || {
        network::verdicts(&ctl)
    });
    suite.case(
        "a_policy_is_waited_for_until_every_node_enforces_it",
        || network::waiting(&ctl),
    );
    suite.case("a_change_is_traced_to_every_node", || {
        network::tracing(&ctl)
    });
    suite.case("packets_of_a_pod_are_captured_within_bounds", || {
        network::capture(&ctl)
    });
    suite.case("agents_and_their_kernels_are_shown", || {
        network::agents(&ctl)
    });
    suite.case("addresses_are_shown_checked_and_released", || {
        addresses(&ctl)
    });
    suite.case("settings_of_addresses_are_changed", || settings(&ctl));
    suite.case("a_pool_is_split_while_the_data_is_locked", || split(&ctl));
    suite.case("connections_are_tried_and_failures_have_a_cause", || {
        network::connectivity(&ctl)
    });
    suite.case("a_sysdump_has_what_helps_and_no_secret", || sysdump(&ctl));
    suite.case("who_has_no_rights_learns_which", || strangers(&ctl));
}

/// Takes Margay out of the cluster.
pub fn remove(suite: &mut Suite, environment: Environment) {
    removal::run(suite, environment);
}

/// The program as a user runs it.
struct Ctl<'a> {
    environment: &'a Environment,
}

/// What it answered.
#[derive(Debug)]
struct Answer {
    status: Option<i32>,
    out: String,
    err: String,
}

impl<'a> Ctl<'a> {
    fn new(environment: &'a Environment) -> Self {
        Self { environment }
    }

    fn folder(&self) -> &Path {
        self.environment.stage.cluster.folder()
    }

    fn ask(&self, arguments: &[&str]) -> Result<Answer> {
        self.ask_as(&self.environment.stage.cluster.kubeconfig(), arguments)
    }

    fn ask_as(&self, kubeconfig: &Path, arguments: &[&str]) -> Result<Answer> {
        let mut command = Command::new(beside(PROGRAM)?);
        let output = command
            .args(arguments)
            .env("KUBECONFIG", kubeconfig)
            .current_dir(self.folder())
            .output()?;
        Ok(Answer {
            status: output.status.code(),
            out: String::from_utf8(output.stdout)?,
            err: String::from_utf8(output.stderr)?,
        })
    }

    /// Standard output of what must succeed.
    fn run(&self, arguments: &[&str]) -> Result<String> {
        let answer = self.ask(arguments)?;
        ensure!(answer.status == Some(0), "{arguments:?}: {answer:?}");
        Ok(answer.out)
    }

    /// Standard error of what must be refused.
    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let answer = self.ask(arguments)?;
        ensure!(answer.status == Some(2), "{arguments:?}: {answer:?}");
        Ok(answer.err)
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| text)
    }

    /// A manifest in the cluster's folder.
    fn file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.folder().join(format!("{name}.yaml"));
        std::fs::write(&path, text)?;
        Ok(path)
    }

    fn mode(&self) -> Mode {
        self.environment.mode
    }
}

/// A policy of namespace x that denies all ingress of a pod.
const DENY: &str = "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\n\
                    metadata: {name: ctl-deny, namespace: x, labels: {made: here}}\n\
                    spec: {selector: pod == 'b', order: 10, types: [Ingress]}\n";

fn forms(ctl: &Ctl<'_>) -> Result<()> {
    let pool = "default-ipv4-ippool";
    let table = ctl.run(&["get", "ippool"])?;
    ensure!(
        table.starts_with("NAME") && table.contains(pool) && table.contains("10.244.0.0/16"),
        "{table}"
    );
    let wide = ctl.run(&["get", "pools", "-o", "wide"])?;
    ensure!(
        wide.contains("VXLANMODE") && wide.contains("true"),
        "{wide}"
    );
    let chosen = ctl.run(&["get", "ippool", pool, "-o", "custom-columns=NAME,NAT"])?;
    ensure!(
        chosen == format!("NAME                  NAT\n{pool}   true\n"),
        "{chosen}"
    );
    ensure!(ctl.run(&["get", "ippool", "-o", "name"])? == format!("ippool/{pool}\n"));
    let one = ctl.json(&["get", "ippool", pool])?;
    ensure!(
        one["kind"] == "IPPool" && one["apiVersion"] == "projectcalico.org/v3",
        "{one}"
    );
    let yaml: Value = serde_yaml_ng::from_str(&ctl.run(&["get", "ippool", pool, "-o", "yaml"])?)?;
    ensure!(yaml["spec"] == one["spec"], "{yaml}");
    let exported = ctl.json(&["get", "ippool", pool, "--export"])?;
    ensure!(exported["metadata"].get("uid").is_none(), "{exported}");
    let list = ctl.json(&["get", "tier"])?;
    let tiers: Vec<&Value> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|tier| &tier["metadata"]["name"])
        .collect();
    ensure!(
        tiers == ["kube-admin", "default", "kube-baseline"],
        "{tiers:?}"
    );
    for kind in [
        "felixconfig",
        "clusterinfo",
        "ipamblock",
        "blockaffinity",
        "ipamhandle",
    ] {
        ensure!(ctl.run(&["get", kind])?.lines().count() > 1, "no {kind}");
    }
    ensure!(ctl.run(&["version"])?.contains("Cluster Version:   v"));
    let missing = ctl.refused(&["get", "ippool", "nope"])?;
    ensure!(missing.contains("there is no IPPool nope"), "{missing}");
    Ok(())
}

fn life(ctl: &Ctl<'_>) -> Result<()> {
    let file = ctl.file("ctl-deny", DENY)?;
    let file = file.display().to_string();
    let policy = ["networkpolicy", "ctl-deny", "-n", "x"];
    let get = || ctl.json(&[&["get"], &policy[..]].concat());
    ensure!(
        ctl.run(&["create", "-f", &file])?
            .contains("NetworkPolicy ctl-deny: created")
    );
    let written = get()?;
    ensure!(written["metadata"]["labels"]["made"] == "here", "{written}");
    let again = ctl.refused(&["create", "-f", &file])?;
    ensure!(again.contains("exists already"), "{again}");
    ensure!(
        ctl.run(&["create", "-f", &file, "--skip-exists"])?
            .contains("left as it is")
    );
    ensure!(ctl.run(&["apply", "-f", &file])?.contains("replaced"));
    ensure!(ctl.run(&["replace", "-f", &file])?.contains("replaced"));
    let patch = r#"{"spec": {"order": 20}, "metadata": {"labels": {"made": null}}}"#;
    ctl.run(&["patch", "networkpolicy", "ctl-deny", "-n", "x", "-p", patch])?;
    let patched = get()?;
    ensure!(
        patched["spec"]["order"] == 20 && patched["metadata"]["labels"].get("made").is_none(),
        "{patched}"
    );
    ctl.run(&["label", "np", "ctl-deny", "team=red", "-n", "x"])?;
    ensure!(get()?["metadata"]["labels"]["team"] == "red");
    let other = ctl.refused(&["label", "np", "ctl-deny", "team=blue", "-n", "x"])?;
    ensure!(other.contains("--overwrite"), "{other}");
    ctl.run(&[
        "label",
        "np",
        "ctl-deny",
        "team=blue",
        "--overwrite",
        "-n",
        "x",
    ])?;
    ctl.run(&["label", "np", "ctl-deny", "team", "--remove", "-n", "x"])?;
    let former = written.to_string();
    let stale = ctl.file("ctl-stale", &former)?;
    let conflict = ctl.refused(&["replace", "-f", &stale.display().to_string()])?;
    ensure!(conflict.contains("try again"), "{conflict}");
    let all = ctl.run(&["get", "np", "-A"])?;
    ensure!(
        all.contains("NAMESPACE") && all.contains("ctl-deny"),
        "{all}"
    );
    ctl.run(&["delete", "np", "ctl-deny", "-n", "x"])?;
    let gone = ctl.refused(&["delete", "-f", &file])?;
    ensure!(
        gone.contains("there is no NetworkPolicy x/ctl-deny"),
        "{gone}"
    );
    ctl.run(&["delete", "-f", &file, "--skip-not-exists"])?;
    Ok(())
}

fn refusals(ctl: &Ctl<'_>) -> Result<()> {
    let bad = DENY
        .replace("ctl-deny", "ctl-bad")
        .replace("pod == 'b'", "pod =");
    let file = ctl
        .file("ctl-bad", &format!("{DENY}---\n{bad}"))?
        .display()
        .to_string();
    let error = ctl.refused(&["apply", "-f", &file])?;
    ensure!(
        error.contains("nothing is written") && error.contains("spec.selector"),
        "{error}"
    );
    ctl.refused(&["get", "np", "ctl-deny", "-n", "x"])?;
    let found = ctl.ask(&["validate", "-f", &file])?;
    ensure!(
        found.status == Some(1) && found.out.contains("refused"),
        "{found:?}"
    );
    // What only the API server knows: it has its own say.
    let nowhere = DENY.replace("namespace: x", "namespace: nowhere");
    let file = ctl.file("ctl-nowhere", &nowhere)?.display().to_string();
    let error = ctl.refused(&["create", "-f", &file])?;
    ensure!(error.contains("nowhere"), "{error}");
    Ok(())
}

fn status(ctl: &Ctl<'_>) -> Result<()> {
    let text = ctl.run(&["status", "--wait", "60"])?;
    ensure!(
        text.contains("margay-node: 3 of 3 ready") && text.contains("part calico: available"),
        "{text}"
    );
    let answer = ctl.json(&["status"])?;
    let storage = ctl.mode().to_string();
    ensure!(
        answer["isAvailable"] == true && answer["storage"] == *storage,
        "{answer}"
    );
    Ok(())
}

/// An allocation that nobody needs is planted, found, and released; one in use is not.
fn addresses(ctl: &Ctl<'_>) -> Result<()> {
    let pod = ctl.environment.stage.world.pod("x/a")?;
    let (address, name) = (pod.address.to_string(), pod.name.clone());
    let shown = ctl.run(&["ipam", "show", "--ip", &address])?;
    ensure!(
        shown.contains("is in use") && shown.contains("pod: a"),
        "{name}: {shown}"
    );
    let blocks = ctl.run(&["ipam", "show", "--show-blocks"])?;
    ensure!(
        blocks.contains("| IP Pool") && blocks.contains("| Block"),
        "{blocks}"
    );
    let kept = ctl.refused(&["ipam", "release", "--ip", &address])?;
    ensure!(kept.contains("in use by pod x/a"), "{kept}");
    let planted = plant(ctl, &pod.node)?;
    let report = ctl.folder().join("ctl-report.json").display().to_string();
    let check = ctl.ask(&["ipam", "check", "--show-all-ips", "-o", &report])?;
    ensure!(
        check.status == Some(1) && check.out.contains(&format!("address {planted}")),
        "{check:?}"
    );
    let released = ctl.run(&["ipam", "release", "--from-report", &report])?;
    ensure!(
        released.contains(&format!("{planted}: released")),
        "{released}"
    );
    let shown = ctl.run(&["ipam", "show", "--ip", &planted])?;
    ensure!(
        shown.contains("is not assigned") || shown.contains("Released at"),
        "{shown}"
    );
    let again = ctl.run(&["ipam", "release", "--from-report", &report])?;
    ensure!(
        again.is_empty(),
        "it has no such allocation any more: {again}"
    );
    Ok(())
}

/// Writes an allocation for a pod that never was into a block of that node.
fn plant(ctl: &Ctl<'_>, node: &str) -> Result<String> {
    let cluster = &ctl.environment.stage.cluster;
    let resource = format!("ipamblocks.{}", ctl.mode().group());
    let mut planted = String::new();
    // Its owner may write the block meanwhile.
    wait_for(
        OBEY,
        || format!("an allocation in a block of {node}"),
        || {
            let write = || -> Result<String> {
                let text = cluster.kubectl(&["get", &resource, "-o", "json"])?;
                let list: Value = serde_json::from_str(&text)?;
                let blocks = list["items"].as_array().cloned().unwrap_or_default();
                let of_node = blocks.into_iter().find_map(|object| {
                    let spec = Deserialize::deserialize(&object["spec"]).ok()?;
                    let block = Block::parse(spec).ok()?;
                    (block.node() == Some(node)).then_some((object, block))
                });
                let (mut object, block) = of_node.context("no block")?;
                let attribute = json!({
                    "handle_id": "k8s-pod-network.planted",
                    "secondary": {"node": node, "namespace": "x", "pod": "never"},
                });
                let address = add(&mut object["spec"], &block, attribute)?;
                let file = ctl.file("ctl-block", &object.to_string())?;
                cluster.kubectl(&["replace", "-f", &file.display().to_string()])?;
                Ok(address)
            };
            planted = write().unwrap_or_default();
            !planted.is_empty()
        },
    )?;
    Ok(planted)
}

/// Adds an allocation of the first address that is free; returns it.
fn add(spec: &mut Value, block: &Block, attribute: Value) -> Result<String> {
    let free = spec["unallocated"].as_array_mut().context("unallocated")?;
    let ordinal = free.pop().context("a free address")?;
    let ordinal = ordinal.as_u64().context("an ordinal")? as usize;
    let attributes = spec["attributes"].as_array_mut().context("attributes")?;
    attributes.push(attribute);
    let index = attributes.len() - 1;
    spec["allocations"][ordinal] = index.into();
    let IpAddr::V4(base) = block.cidr().network() else {
        bail!("{}: not a block of IPv4", block.cidr());
    };
    Ok(Ipv4Addr::from(u32::from(base) + ordinal as u32).to_string())
}

fn settings(ctl: &Ctl<'_>) -> Result<()> {
    ctl.run(&["ipam", "configure", "--max-blocks-per-host", "31"])?;
    ctl.run(&["ipam", "configure", "--strictaffinity", "false"])?;
    let shown = ctl.run(&["ipam", "show", "--show-configuration"])?;
    ensure!(
        shown.contains("maxBlocksPerHost") && shown.contains("31"),
        "{shown}"
    );
    ctl.run(&["ipam", "configure", "--max-blocks-per-host", "0"])?;
    Ok(())
}

fn split(ctl: &Ctl<'_>) -> Result<()> {
    let pool = "apiVersion: projectcalico.org/v3\nkind: IPPool\nmetadata: {name: ctl-wide}\n\
                spec: {cidr: 10.99.0.0/20, nodeSelector: '!all()', vxlanMode: CrossSubnet}\n";
    let file = ctl.file("ctl-wide", pool)?.display().to_string();
    ctl.run(&["create", "-f", &file])?;
    let unlocked = ctl.refused(&["ipam", "split", "4", "--name", "ctl-wide"])?;
    ensure!(unlocked.contains("datastore migrate lock"), "{unlocked}");
    ctl.run(&["datastore", "migrate", "lock"])?;
    let split = ctl.run(&["ipam", "split", "4", "--cidr", "10.99.0.0/20"]);
    ctl.run(&["datastore", "migrate", "unlock"])?;
    let split = split?;
    ensure!(
        split.contains("split-ctl-wide-3 (10.99.12.0/22)"),
        "{split}"
    );
    let names = ctl.run(&["get", "ippool", "-o", "name"])?;
    ensure!(
        !names.contains("ippool/ctl-wide\n") && names.contains("ippool/split-ctl-wide-0"),
        "{names}"
    );
    let managed = ctl.refused(&["ipam", "split", "2", "--name", "default-ipv4-ippool"])?;
    ensure!(managed.contains("not locked"), "{managed}");
    let parts = ["0", "1", "2", "3"].map(|part| format!("split-ctl-wide-{part}"));
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    ctl.run(&[&["delete", "ippool"], &parts[..]].concat())?;
    all_open(ctl.environment)
}

fn sysdump(ctl: &Ctl<'_>) -> Result<()> {
    let folder = ctl.folder().join("ctl-dump");
    let shown = folder.display().to_string();
    ctl.run(&["cluster", "diags", &shown])?;
    let (mut names, mut dirty) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        let text = std::fs::read_to_string(&path)?;
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if text.contains("PRIVATE KEY") || text.contains("eyJhbGciOi") {
            dirty.push(name.clone());
        }
        names.push(name);
    }
    ensure!(dirty.is_empty(), "secrets are in {dirty:?}");
    let has = |part: &str| names.iter().any(|name| name.contains(part));
    ensure!(
        has("pools.yaml") && has("nodes.yaml") && has("installations.yaml"),
        "{names:?}"
    );
    for log in [
        ".margay-node.log",
        ".margay-typha.log",
        ".install-cni.log",
        ".margay-operator.log",
    ] {
        ensure!(has(log), "no {log} in {names:?}");
    }
    let full = ctl.refused(&["sysdump", &shown])?;
    ensure!(full.contains("must be empty"), "{full}");
    Ok(())
}

/// The message is the API server's, with what to ask for.
fn strangers(ctl: &Ctl<'_>) -> Result<()> {
    let cluster = &ctl.environment.stage.cluster;
    cluster.kubectl(&["create", "serviceaccount", STRANGER, "-n", "x"])?;
    let token = cluster.kubectl(&["create", "token", STRANGER, "-n", "x"])?;
    let text = std::fs::read_to_string(cluster.kubeconfig())?;
    let mut config: Value = serde_yaml_ng::from_str(&text)?;
    config["users"][0]["user"] = json!({"token": token.trim()});
    let path = ctl.file("ctl-stranger", &config.to_string())?;
    for arguments in [
        &["get", "ippool"][..],
        &["status"],
        &["explain", "x/a", "x/b"],
        &["node", "status"],
        &["ipam", "check"],
        &["patch", "felixconfig", "default", "-p", "{}"],
    ] {
        let answer = ctl.ask_as(&path, arguments)?;
        ensure!(
            answer.status == Some(2) && answer.err.contains("ask for this right"),
            "{arguments:?}: {answer:?}"
        );
    }
    Ok(())
}
