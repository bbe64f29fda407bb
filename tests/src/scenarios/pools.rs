//! Pools for some namespaces, annotations of namespaces, addresses out of others' blocks, and blocks that go back.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use serde_json::json;

use super::Ground;
use crate::cluster::process::wait_for;
use crate::demo::OBEY;
use crate::probe::{Protocol, Target, Verdict, ask};
use crate::suite::Suite;
use crate::world::{Pod, server};

/// The one block of the pool, so that all nodes but one borrow.
const RANGE: &str = "10.250.0.0/29";

/// Runs all of them.
pub fn run(suite: &mut Suite, ground: &Ground) {
    suite.case("a_pool_of_one_namespace_serves_it_on_every_node_and_nobody_else", || of_one_namespace(ground));
}

fn of_one_namespace(ground: &Ground) -> Result<()> {
    let cluster = &ground.stage.cluster;
    ground.apply("pools", MANIFEST)?;
    let names = [("pools-a/one", "n1"), ("pools-a/two", "n2"), ("pools-a/three", "n3"), ("pools-b/other", "n2")];
    let items = names.iter().map(|(name, node)| server(name, node)).collect::<Result<Vec<_>>>()?;
    let path = cluster.folder().join("pools-pods.json");
    std::fs::write(&path, json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string())?;
    cluster.kubectl(&["apply", "-f", &path.display().to_string()])?;
    let range: IpNet = RANGE.parse()?;
    let mut addresses = Vec::new();
    for (name, _) in names {
        let pod = Pod::find(cluster, name)?;
        let is_in = range.contains(&IpAddr::V4(pod.address));
        ensure!(is_in == name.starts_with("pools-a/"), "{name} has {}", pod.address);
        addresses.push((name, pod.address));
    }
    for (name, address) in &addresses {
        for from in ["x/a", "x/b", "x/c"] {
            let place = &ground.stage.world.pod(from)?.place;
            let target = Target::new(Protocol::Tcp, *address, 80);
            let answers = || ask(place, &[target]).is_ok_and(|verdicts| verdicts == [Verdict::Answered]);
            wait_for(OBEY, || format!("{from} to be answered by {name} at {address}"), answers)?;
        }
    }
    let blocks = || -> Result<usize> {
        Ok(ground.objects("IPAMBlock")?.values().filter(|block| block["spec"]["cidr"] == RANGE).count())
    };
    ensure!(blocks()? == 1, "the block of the pool");
    cluster.kubectl(&["delete", "namespace", "pools-a", "pools-b"])?;
    ground.delete("IPPool", "of-one-namespace")?;
    let gone = || blocks().is_ok_and(|count| count == 0);
    wait_for(Duration::from_secs(60), || "the block of a pool that is gone to go back".to_owned(), gone)
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
