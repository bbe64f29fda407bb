//! Packets while the agent of a node is killed and comes back.

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Bench;
use crate::cluster::process::wait_for;
use crate::demo::flips;
use crate::install;
use crate::probe::flow::Flow;
use crate::probe::paced::PacedProbe;
use crate::probe::{Protocol, Target, Verdict};
use crate::world::Pod;

const NAMESPACE: &str = "restart";
/// Port of the servers.
const PORT: u16 = 80;
/// Interval between connects of a pair.
const PACE: Duration = Duration::from_millis(2);
/// A connect without an answer for this long counts as denied.
const SILENT: Duration = Duration::from_millis(200);
/// Observation time before the agent is killed, and after it is back.
const AROUND: Duration = Duration::from_secs(3);
/// Time limit for it to come back.
const BACK: Duration = Duration::from_secs(60);
/// Port of the agent's admin server, on its node's loopback.
const ADMIN: u16 = 9099;

/// Four pairs and two held connections.
pub fn run(bench: &mut Bench) -> Result<()> {
    let wanted = [
        ("open", "n1"),
        ("shut", "n1"),
        ("same", "n1"),
        ("cross", "n2"),
    ];
    let wanted: Vec<(String, String)> = wanted
        .iter()
        .map(|(name, node)| ((*name).to_owned(), (*node).to_owned()))
        .collect();
    let objects = bench.objects()?;
    objects.namespace(NAMESPACE)?;
    objects.pods(NAMESPACE, &wanted, false)?;
    objects.policies(
        NAMESPACE,
        vec![policy("shut", json!([])), policy("open", open_rules())],
    )?;
    let stage = bench.stage()?;
    flips::measure(&stage.cluster, &stage.world, "x/a", "x/d", 2)?;
    bench.calm()?;
    let cluster = bench.cluster()?;
    let node = cluster.node("n1")?;
    let pod = |name: &str| Pod::find(cluster, &format!("{NAMESPACE}/{name}"));
    let (open, shut) = (pod("open")?, pod("shut")?);
    let clients = [pod("same")?, pod("cross")?];
    let mut probes = Vec::new();
    let mut flows = Vec::new();
    for client in &clients {
        for (server, right) in [(&open, Verdict::Answered), (&shut, Verdict::Silent)] {
            let target = Target::new(Protocol::Tcp, server.address, PORT);
            probes.push((
                PacedProbe::start(&client.place, target, PACE, SILENT)?,
                right,
            ));
        }
        flows.push(Flow::start(
            &client.place,
            SocketAddrV4::new(open.address, PORT),
        )?);
    }
    std::thread::sleep(AROUND);
    let killed = Instant::now();
    install::kill(&node, "node")?;
    let is_back =
        || install::metric(&node, ADMIN, "margay_node_in_sync").is_ok_and(|value| value == 1.0);
    wait_for(BACK, || "the agent to be in sync again".to_owned(), is_back)?;
    let away = killed.elapsed();
    std::thread::sleep(AROUND);
    let (mut passed, mut failed, mut tried) = (0, 0, 0);
    for (probe, right) in probes {
        let records = probe.finish()?;
        tried += records.len();
        let wrong = records
            .iter()
            .filter(|record| record.verdict != right)
            .count();
        if right == Verdict::Silent {
            passed += wrong
        } else {
            failed += wrong
        }
    }
    let reports: Vec<_> = flows.into_iter().map(Flow::finish).collect();
    let broken = reports
        .iter()
        .filter(|report| report.broken.is_some())
        .count();
    let gap = reports
        .iter()
        .map(|report| report.longest_gap)
        .max()
        .context("two flows")?;
    let detail = format!(
        "{tried} connects in all; the agent was back and in sync after {:.1} s",
        away.as_secs_f32()
    );
    bench
        .sheet
        .put("restart.denied", f64::from(passed as u32), detail)?;
    bench
        .sheet
        .put("restart.allowed", f64::from(failed as u32), "")?;
    let detail = format!(
        "longest gap between echoes {} ms, at 20 ms between bytes",
        gap.as_millis()
    );
    bench
        .sheet
        .put("restart.held", f64::from(broken as u32), detail)?;
    bench.objects()?.drop_namespace(NAMESPACE).map(|_| ())
}

fn policy(server: &str, ingress: Value) -> Value {
    json!({
        "metadata": {"name": server},
        "spec": {
            "podSelector": {"matchLabels": {"pod": server}},
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    })
}

fn open_rules() -> Value {
    let clients = json!({
        "matchExpressions": [{"key": "pod", "operator": "In", "values": ["same", "cross"]}],
    });
    json!([{"from": [{"podSelector": clients}], "ports": [{"protocol": "TCP", "port": PORT}]}])
}
