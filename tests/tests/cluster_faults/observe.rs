//! Observation of packets and addresses during faults, and the objects for it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use margay_tests::cluster::Cluster;
use margay_tests::cluster::process::wait_for;
use margay_tests::demo::{OBEY, Stage};
use margay_tests::matrix::{self, Matrix};
use margay_tests::probe::flow::Flow;
use margay_tests::probe::paced::PacedProbe;
use margay_tests::probe::{Protocol, Target, Verdict};
use margay_tests::world::{self, PODS, World};
use serde_json::{Value, json};

use crate::RECOVERY;

/// Denies all ingress to these pods for the duration of a case.
pub const CLOSED: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed, namespace: x}
spec:
  podSelector: {matchLabels: {pod: b}}
  policyTypes: [Ingress]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed-d, namespace: x}
spec:
  podSelector: {matchLabels: {pod: d}}
  policyTypes: [Ingress]
"#;

/// Packets of a denied pair and an established connection of an allowed one, observed during a
/// fault. The denied pair is on two nodes; the client is on n1.
pub struct Watch {
    denied: [PacedProbe; 2],
    flow: Flow,
    policy: String,
}

impl Watch {
    /// Applies [`CLOSED`], waits until packets obey, and starts to observe.
    pub fn begin(stage: &Stage) -> Result<Self> {
        let policy = write(&stage.cluster, "closed", CLOSED)?;
        stage.cluster.kubectl(&["apply", "-f", &policy])?;
        wait_for_matrix(&stage.world, &closed())?;
        let probe = |to: &str| -> Result<PacedProbe> {
            let target = Target::new(Protocol::Tcp, stage.world.pod(to)?.address, 80);
            PacedProbe::start(
                &stage.world.pod("x/a")?.place,
                target,
                Duration::from_millis(2),
                Duration::from_millis(200),
            )
        };
        let allowed = stage.world.pod("y/c")?.address;
        Ok(Self {
            denied: [probe("x/b")?, probe("x/d")?],
            flow: Flow::start(
                &stage.world.pod("x/a")?.place,
                std::net::SocketAddrV4::new(allowed, 80),
            )?,
            policy,
        })
    }

    /// Fails if a denied connect was answered or the allowed connection suffered; deletes the
    /// policies.
    pub fn end(self, stage: &Stage) -> Result<()> {
        let report = self.flow.finish();
        for probe in self.denied {
            let records = probe.finish()?;
            let passed = records
                .iter()
                .filter(|record| record.verdict != Verdict::Silent)
                .count();
            ensure!(
                passed == 0 && records.len() > 100,
                "{passed} of {} connects of a denied pair were answered",
                records.len()
            );
        }
        ensure!(
            report.broken.is_none() && report.echoed > 20,
            "an allowed connection suffered: {report:?}"
        );
        ensure!(
            report.longest_gap < Duration::from_secs(2),
            "an allowed connection stood still: {report:?}"
        );
        stage.cluster.kubectl(&["delete", "-f", &self.policy])?;
        wait_for_matrix(&stage.world, &Matrix::open(&PODS, &[(Protocol::Tcp, 80)]))
    }
}

/// Expected matrix under [`CLOSED`].
pub fn closed() -> Matrix {
    let mut expected = Matrix::open(&PODS, &[(Protocol::Tcp, 80)]);
    for ((_, _, to), verdict) in &mut expected.cells {
        if to == "x/b" || to == "x/d" {
            *verdict = Verdict::Silent;
        }
    }
    expected
}

/// Creates and deletes pods on n1, and policies with them, until stopped.
pub fn churn(stage: &Stage, end: &AtomicBool) -> Result<()> {
    let mut round = 0;
    while !end.load(Ordering::Relaxed) {
        round += 1;
        let name = format!("churn-{}", round % 3);
        let pod = world::server(&format!("y/{name}"), "n1")?;
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "y"},
            "spec": {"podSelector": {"matchLabels": {"pod": name}}, "policyTypes": ["Ingress"]},
        });
        apply(&stage.cluster, "churn", &[pod, policy])?;
        delete(&stage.cluster, &["churn"])?;
    }
    ensure!(round > 0, "there was no churn");
    Ok(())
}

/// Waits until packets obey, and fails if they do not.
pub fn wait_for_matrix(world: &World, expected: &Matrix) -> Result<()> {
    let outcome = matrix::wait_for_match(world, expected, OBEY)?;
    ensure!(
        outcome.matched.is_some(),
        "packets do not obey\n{}",
        outcome.measured.beside(expected)
    );
    Ok(())
}

/// Every allocated address belongs to an existing pod or to a node's tunnel.
pub fn no_address_is_leaked(cluster: &Cluster) -> Result<()> {
    let mut text = String::new();
    let agree = || {
        let compared = given_and_used(cluster);
        text = format!("{compared:?}");
        compared.is_ok_and(|(given, used)| given == used)
    };
    let waited = wait_for(
        Duration::from_secs(30),
        || "blocks and pods to agree on addresses".into(),
        agree,
    );
    waited.with_context(|| format!("given and used: {text}"))
}

fn given_and_used(cluster: &Cluster) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let get = |what: &[&str]| -> Result<Vec<Value>> {
        let text = cluster.kubectl(&[&["get"], what, &["-o", "json"]].concat())?;
        let list: Value = serde_json::from_str(&text)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    };
    let mut given = BTreeSet::new();
    for block in get(&["ipamblocks.projectcalico.org"])? {
        let cidr: ipnet::Ipv4Net = block["spec"]["cidr"]
            .as_str()
            .context("spec.cidr of a block")?
            .parse()?;
        let allocations = block["spec"]["allocations"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let taken = allocations
            .iter()
            .zip(cidr.network().to_bits()..)
            .filter(|(index, _)| !index.is_null());
        for (index, address) in taken {
            let attributes =
                &block["spec"]["attributes"][index.as_u64().context("an index")? as usize];
            let tunnel = attributes["secondary"]["type"] == "vxlanTunnelAddress"
                || attributes["handle_id"]
                    .as_str()
                    .is_some_and(|id| id.starts_with("vxlan-tunnel-addr-"));
            if !tunnel {
                given.insert(std::net::Ipv4Addr::from_bits(address).to_string());
            }
        }
    }
    let pods = get(&["pods", "-A"])?;
    let used = pods
        .iter()
        .filter(|pod| pod["spec"]["hostNetwork"] != true)
        .filter_map(|pod| pod["status"]["podIP"].as_str().map(str::to_owned))
        .collect();
    Ok((given, used))
}

/// Waits until the agent of a node is ready.
pub fn ready(cluster: &Cluster, node: &str) -> Result<()> {
    let agent = || {
        let path = r#"jsonpath={.items[0].status.conditions[?(@.type=="Ready")].status}"#;
        let node = format!("--field-selector=spec.nodeName={node}");
        let text = cluster.kubectl(&[
            "get",
            "pods",
            "-n",
            "margay-system",
            "-l",
            "app.kubernetes.io/name=margay-node",
            &node,
            "-o",
            path,
        ]);
        text.is_ok_and(|text| text == "True")
    };
    wait_for(
        RECOVERY,
        || format!("the agent of {node} to be ready"),
        agent,
    )
}

/// Writes a manifest into the folder of the cluster and returns its path.
pub fn write(cluster: &Cluster, name: &str, text: &str) -> Result<String> {
    let path = cluster.folder().join(format!("{name}.manifest"));
    std::fs::write(&path, text)?;
    Ok(path.display().to_string())
}

/// Applies objects as one manifest.
pub fn apply(cluster: &Cluster, name: &str, items: &[Value]) -> Result<()> {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    let path = write(cluster, name, &list.to_string())?;
    cluster.kubectl(&["apply", "-f", &path]).map(|_| ())
}

/// Deletes the objects of manifests.
pub fn delete(cluster: &Cluster, names: &[&str]) -> Result<()> {
    for name in names {
        let path = cluster.folder().join(format!("{name}.manifest"));
        cluster.kubectl(&[
            "delete",
            "-f",
            &path.display().to_string(),
            "--ignore-not-found",
        ])?;
    }
    Ok(())
}
