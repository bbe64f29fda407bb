//! Figures of a real cluster, beside the anchors that they are measured against: from the API to the packets, pods at once, memory.
//!
//! Anchors are Calico's on a cluster of the same harness, with the same probes; they were measured on another day, so only their size
//! compares, not a percent. API server, kubelets and probes share the cores with what is measured.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::cluster::process::wait_for;
use crate::demo::flips;
use crate::demo::{self, Stage};
use crate::install;
use crate::world;

/// Pods on the node whose packets are watched, with the three of the usual world.
const LOCAL: usize = 100;
/// Writes per measurement of obedience.
const FLIPS: usize = 120;
/// Other policies.
const BACKGROUND: usize = 1000;
/// Pods at once.
const BURST: usize = 60;
/// How long a crowd of pods may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// What is measured, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder of everything the cluster writes.
    pub state: PathBuf,
    /// Prefix of the cluster's namespaces.
    pub name: String,
}

/// Measures everything and prints it.
pub fn run(options: &Options) -> Result<()> {
    let stage = demo::stage(&options.name, &options.state, &install::Options::default(), &|line| eprintln!("{line}"))?;
    let cluster = &stage.cluster;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load of the machine at the start: {}", load.trim());
    memory(cluster, "idle, 3 pods a node")?;
    burst(cluster)?;
    crowd(cluster)?;
    obey(&stage, 0, "send 31 / 145 ms, answer 20 / 102 ms")?;
    background(cluster)?;
    obey(&stage, BACKGROUND, "send 54 / 309 ms, answer 36 / 247 ms")?;
    memory(cluster, "100 pods on n1, 1000 policies")
}

fn obey(stage: &Stage, policies: usize, anchor: &str) -> Result<()> {
    for (from, to, way) in [("x/a", "x/d", "same node"), ("x/b", "x/d", "across nodes")] {
        let times = flips::measure(&stage.cluster, &stage.world, from, to, FLIPS)?;
        println!(
            "policy to packets, {LOCAL} local pods, {policies} other policies, {way}; Calico, same node, p50 / p99: {anchor}"
        );
        println!("  from the request    {}", times.from_send);
        println!("  from the answer     {}", times.from_answer);
    }
    Ok(())
}

/// Pods created at once on n2, until all are Ready; each from its creation to the condition's own time, which has whole seconds.
fn burst(cluster: &Cluster) -> Result<()> {
    let begin = Instant::now();
    crowd_of(cluster, "burst", "n2", BURST)?;
    println!(
        "{BURST} pods at once on one node, all Ready after {:.1} s; Calico: 35.6 s",
        begin.elapsed().as_secs_f32()
    );
    let begin = Instant::now();
    cluster.kubectl(&["delete", "namespace", "burst", "--wait=true"])?;
    println!("their namespace deleted after {:.1} s", begin.elapsed().as_secs_f32());
    Ok(())
}

fn crowd(cluster: &Cluster) -> Result<()> {
    crowd_of(cluster, "crowd", "n1", LOCAL - 3)
}

fn crowd_of(cluster: &Cluster, namespace: &str, node: &str, count: usize) -> Result<()> {
    let mut items = vec![json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})];
    for index in 0..count {
        items.push(world::server(&format!("{namespace}/p{index}"), node)?);
    }
    apply(cluster, namespace, items)?;
    wait_for(
        PATIENCE,
        || format!("{count} pods of {namespace}"),
        || {
            let path = r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#;
            let said = cluster.kubectl(&["get", "pods", "-n", namespace, "-o", path]);
            said.is_ok_and(|said| said.split_whitespace().filter(|word| *word == "True").count() == count)
        },
    )
}

/// Policies of one rule each, every one about a pod of its own among the crowd.
fn background(cluster: &Cluster) -> Result<()> {
    let policy = |index: usize| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": format!("background-{index}"), "namespace": "crowd"},
            "spec": {
                "podSelector": {"matchLabels": {"pod": format!("p{}", index % (LOCAL - 3))}},
                "ingress": [{
                    "from": [{"podSelector": {"matchLabels": {"pod": format!("p{}", (index / 7) % (LOCAL - 3))}}}],
                    "ports": [{"protocol": "TCP", "port": 1000 + index}],
                }],
            },
        })
    };
    apply(cluster, "background", (0..BACKGROUND).map(policy).collect())
}

fn apply(cluster: &Cluster, name: &str, items: Vec<Value>) -> Result<()> {
    let path = cluster.folder().join(format!("{name}.json"));
    std::fs::write(&path, json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string())?;
    cluster.kubectl(&["apply", "--server-side", "-f", &path.display().to_string()]).map(|_| ())
}

fn memory(cluster: &Cluster, when: &str) -> Result<()> {
    let anchors = BTreeMap::from([
        ("node", "130 MiB idle, 139 to 168 with 100 pods and 1000 policies"),
        ("typha", "129 MiB idle"),
    ]);
    for component in ["node", "typha", "operator"] {
        let mut sizes = Vec::new();
        for node in cluster.nodes()? {
            for pid in install::processes(&node, component) {
                sizes.push(format!("{} {:.1} MiB", node.host.name, resident(pid)?));
            }
        }
        println!(
            "memory of {component}, {when}: {}; Calico: {}",
            sizes.join(", "),
            anchors.get(component).unwrap_or(&"-")
        );
    }
    Ok(())
}

/// Resident memory in MiB.
fn resident(pid: i32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS of a process")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}
