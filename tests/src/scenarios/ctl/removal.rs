//! Margay is taken out of a cluster whose pods are still there.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Ctl, Environment, PROGRAM};
use crate::cluster::process::wait_for;
use crate::install::beside;
use crate::scenarios::policy::all_open;
use crate::suite::Suite;

const PATIENCE: Duration = Duration::from_secs(120);

/// Runs it; nothing of Margay is left then.
pub(super) fn run(suite: &mut Suite, environment: Environment) {
    suite.case("a_removal_says_what_stands_in_its_way", || {
        checked(&Ctl::new(&environment))
    });
    suite.case("pods_outlive_a_removal_and_nothing_is_left_of_it", || {
        removed(environment)
    });
}

fn checked(ctl: &Ctl<'_>) -> Result<()> {
    let check = ctl.ask(&["uninstall", "--check"])?;
    ensure!(
        check.status == Some(1)
            && check.out.contains("9 pods are in the network")
            && check.out.contains("nodes to clean: n1, n2, n3"),
        "{check:?}"
    );
    let refused = ctl.refused(&["uninstall"])?;
    ensure!(refused.contains("9 pods are in the network"), "{refused}");
    Ok(())
}

/// The agents go while the pods are there: these keep their network, can be deleted, and the nodes
/// are clean after them.
fn removed(environment: Environment) -> Result<()> {
    let cluster = &environment.stage.cluster;
    let removal = Command::new(beside(PROGRAM)?)
        .args(["uninstall", "--force", "--crds", "--timeout", "180"])
        .env("KUBECONFIG", cluster.kubeconfig())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let is_marked = || {
        let nodes = cluster.nodes().unwrap_or_default();
        let marked = |node: &crate::cluster::node::Node| {
            node.exec(&["ls", "/var/lib/margay/removed"]).is_ok()
        };
        !nodes.is_empty() && nodes.iter().all(marked)
    };
    wait_for(PATIENCE, || "the cleaner on every node".into(), is_marked)?;
    all_open(&environment).context("pods while their nodes wait to be cleaned")?;
    // What is open of their networks would keep their links.
    drop(environment.stage.world);
    cluster.kubectl(&["delete", "namespace", "x", "y", "--timeout=120s"])?;
    let output = removal.wait_with_output()?;
    let (out, err) = (
        String::from_utf8(output.stdout)?,
        String::from_utf8(output.stderr)?,
    );
    ensure!(output.status.success(), "{out}\n{err}");
    for node in cluster.nodes()? {
        let name = &node.host.name;
        let table = node.exec(&["nft", "list", "tables"])?;
        ensure!(!table.contains("margay"), "{name}: {table}");
        let routes = node.exec(&["ip", "route", "show", "proto", "82"])?;
        ensure!(routes.trim().is_empty(), "{name}: {routes}");
        let links = node.exec(&["ls", "/sys/class/net"])?;
        ensure!(!links.contains("cali"), "{name}: {links}");
        for folder in [
            "/etc/cni/net.d",
            "/opt/cni/bin",
            "/var/lib/margay",
            "/var/run/margay",
        ] {
            let files = node.exec(&["ls", folder])?;
            ensure!(
                !files.contains("margay") && !files.contains("removed"),
                "{name}: {files}"
            );
        }
    }
    for list in [
        "crd",
        "clusterrole",
        "clusterrolebinding",
        "validatingadmissionpolicy",
        "mutatingadmissionpolicy",
        "namespace",
    ] {
        let names = cluster.kubectl(&["get", list, "-o", "name"])?;
        let of_ours = |name: &&str| name.contains("margay") || name.contains("projectcalico");
        let left: Vec<&str> = names.lines().filter(of_ours).collect();
        ensure!(left.is_empty(), "{list}: {left:?}");
    }
    let node = cluster.kubectl(&["get", "node", "n1", "-o", "json"])?;
    ensure!(!node.contains("\"projectcalico.org/"), "{node}");
    Ok(())
}
