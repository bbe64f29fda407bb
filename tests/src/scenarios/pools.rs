//! Pools for some namespaces, annotations of namespaces, borrowed addresses, and released blocks.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use serde_json::json;

use super::Environment;
use crate::cluster::process::wait_for;
use crate::demo::OBEY;
use crate::probe::{Protocol, Target, Verdict, ask};
use crate::suite::Suite;
use crate::world::{Pod, server};

/// The one block of the pool, so that all nodes but one borrow.
const RANGE: &str = "10.250.0.0/29";

/// Runs all of them.
pub fn run(suite: &mut Suite, environment: &Environment) {
    suite.case(
        "a_pool_of_one_namespace_serves_it_on_every_node_and_nobody_else",
        || of_one_namespace(environment),
    );
    suite.case(
        "a_pool_that_is_deleted_goes_when_its_pods_have_gone",
        || deleted_in_use(environment),
    );
}

/// Pods with an address of a deleted pool keep it and are reached, no other pod gets one, and the
/// pool's status reports what keeps it.
fn deleted_in_use(environment: &Environment) -> Result<()> {
    const POOL: &str = "ippools.projectcalico.org/leaving";
    let cluster = &environment.stage.cluster;
    environment.apply("leaving", LEAVING)?;
    let start = |name: &str, node: &str| -> Result<()> {
        let mut pod = server(name, node)?;
        pod["metadata"]["annotations"] =
            json!({"cni.projectcalico.org/ipv4pools": r#"["leaving"]"#});
        let path = cluster.folder().join("leaving-pod.json");
        std::fs::write(&path, pod.to_string())?;
        cluster
            .kubectl(&["apply", "-f", &path.display().to_string()])
            .map(drop)
    };
    start("leaving/one", "n1")?;
    start("leaving/two", "n3")?;
    let pods = [
        Pod::find(cluster, "leaving/one")?,
        Pod::find(cluster, "leaving/two")?,
    ];
    cluster.kubectl(&["delete", POOL, "--wait=false"])?;
    let state = |path: &str| {
        cluster
            .kubectl(&["get", POOL, "-o", &format!("jsonpath={path}")])
            .unwrap_or_default()
    };
    let message = || state(r#"{.status.conditions[?(@.type=="Allocatable")].message}"#);
    wait_for(
        Duration::from_secs(30),
        || {
            format!(
                "the pool to report what keeps it; it reports {:?}",
                message()
            )
        },
        || message().contains("until its IPAMBlocks (2) are unused"),
    )?;
    start("leaving/late", "n2")?;
    let events = || {
        let late = "--field-selector=involvedObject.name=late";
        cluster
            .kubectl(&["get", "events", "-n", "leaving", late])
            .unwrap_or_default()
    };
    wait_for(
        Duration::from_secs(30),
        || format!("a pod that names the pool to be refused; {}", events()),
        || events().contains("is being deleted"),
    )?;
    for pod in &pods {
        for from in ["x/a", "x/b", "x/c"] {
            let place = &environment.stage.world.pod(from)?.place;
            let verdicts = ask(place, &[Target::new(Protocol::Tcp, pod.address, 80)])?;
            ensure!(
                verdicts == [Verdict::Answered],
                "{from} asks {} at {}: {verdicts:?}",
                pod.name,
                pod.address
            );
        }
    }
    cluster.kubectl(&["delete", "namespace", "leaving"])?;
    // Agents look for empty blocks every 30 s.
    cluster.kubectl(&["wait", "--for=delete", POOL, "--timeout=90s"])?;
    let ranges = environment.objects("IPAMBlock")?;
    let left = ranges.values().filter(|block| {
        block["spec"]["cidr"]
            .as_str()
            .is_some_and(|range| range.starts_with("10.251."))
    });
    ensure!(left.count() == 0, "blocks of the pool are left");
    Ok(())
}

fn of_one_namespace(environment: &Environment) -> Result<()> {
    let cluster = &environment.stage.cluster;
    environment.apply("pools", MANIFEST)?;
    let names = [
        ("pools-a/one", "n1"),
        ("pools-a/two", "n2"),
        ("pools-a/three", "n3"),
        ("pools-b/other", "n2"),
    ];
    let items = names
        .iter()
        .map(|(name, node)| server(name, node))
        .collect::<Result<Vec<_>>>()?;
    let path = cluster.folder().join("pools-pods.json");
    std::fs::write(
        &path,
        json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string(),
    )?;
    cluster.kubectl(&["apply", "-f", &path.display().to_string()])?;
    let range: IpNet = RANGE.parse()?;
    let mut addresses = Vec::new();
    for (name, _) in names {
        let pod = Pod::find(cluster, name)?;
        let is_in = range.contains(&IpAddr::V4(pod.address));
        ensure!(
            is_in == name.starts_with("pools-a/"),
            "{name} has {}",
            pod.address
        );
        addresses.push((name, pod.address));
    }
    for (name, address) in &addresses {
        for from in ["x/a", "x/b", "x/c"] {
            let place = &environment.stage.world.pod(from)?.place;
            let target = Target::new(Protocol::Tcp, *address, 80);
            let answers =
                || ask(place, &[target]).is_ok_and(|verdicts| verdicts == [Verdict::Answered]);
            wait_for(
                OBEY,
                || format!("{from} to be answered by {name} at {address}"),
                answers,
            )?;
        }
    }
    let blocks = || -> Result<usize> {
        Ok(environment
            .objects("IPAMBlock")?
            .values()
            .filter(|block| block["spec"]["cidr"] == RANGE)
            .count())
    };
    ensure!(blocks()? == 1, "the block of the pool");
    cluster.kubectl(&["delete", "namespace", "pools-a", "pools-b"])?;
    environment.delete("IPPool", "of-one-namespace")?;
    let gone = || blocks().is_ok_and(|count| count == 0);
    wait_for(
        Duration::from_secs(60),
        || "the block of a pool that is gone to go back".to_owned(),
        gone,
    )
    .context("after the pool was deleted")
}

const MANIFEST: &str = r#"
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: of-one-namespace}
spec:
  cidr: 10.250.0.0/29
  blockSize: 29
  vxlanMode: CrossSubnet
  allowedUses: [Workload]
  namespaceSelector: team == 'a'
---
apiVersion: v1
kind: Namespace
metadata:
  name: pools-a
  labels: {team: a}
  annotations: {cni.projectcalico.org/ipv4pools: '["of-one-namespace"]'}
---
apiVersion: v1
kind: Namespace
metadata: {name: pools-b, labels: {team: b}}
"#;

const LEAVING: &str = r#"
apiVersion: projectcalico.org/v3
kind: IPPool
metadata: {name: leaving}
spec: {cidr: 10.251.0.0/26, blockSize: 28, vxlanMode: CrossSubnet, assignmentMode: Manual}
---
apiVersion: v1
kind: Namespace
metadata: {name: leaving}
"#;
