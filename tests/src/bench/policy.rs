//! Time from the API's answer until packets obey, with and without other policies, and its cost to
//! the agents.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{Bench, machine};
use crate::demo::flips;

/// Pods on the node whose packets are watched, with the three of the usual world.
const LOCAL: usize = 100;
/// Further pods that fill the node up.
const CROWD: usize = LOCAL - 3;
/// Namespace of these and of the other policies.
const NAMESPACE: &str = "fill";
/// Writes per measurement.
const FLIPS: usize = 120;
/// Warm-up writes before it, so that earlier work is finished.
const SETTLE: usize = 4;

/// Same node and across, with so many other policies.
pub fn run(bench: &mut Bench, others: usize) -> Result<()> {
    fill_node(bench)?;
    background(bench, others)?;
    let agents = bench.agents()?;
    let mut used = Duration::ZERO;
    for (from, to, way) in [("x/a", "x/d", "same"), ("x/b", "x/d", "cross")] {
        let stage = bench.stage()?;
        flips::measure(&stage.cluster, &stage.world, from, to, SETTLE)?;
        bench.calm()?;
        let before = machine::cpu(&agents)?;
        let stage = bench.stage()?;
        let times = flips::measure(&stage.cluster, &stage.world, from, to, FLIPS)?;
        used += machine::cpu(&agents)? - before;
        let ms = |part: f64| times.from_answer.at(part).as_secs_f64() * 1e3;
        let detail = format!("from the request: {}", times.from_send);
        bench
            .sheet
            .put(&format!("policy.{way}.{others}.p50"), ms(0.5), detail)?;
        bench.sheet.put(
            &format!("policy.{way}.{others}.p99"),
            ms(0.99),
            format!("{}", times.from_answer),
        )?;
    }
    let each = used.as_secs_f64() * 1e3 / (2 * FLIPS) as f64;
    bench.sheet.put(
        &format!("policy.cpu.{others}"),
        each,
        "three agents, everything that they did meanwhile",
    )
}

/// Fills the first node up to `LOCAL` pods.
pub fn fill_node(bench: &mut Bench) -> Result<()> {
    let objects = bench.objects()?;
    objects.namespace(NAMESPACE)?;
    let pods: Vec<(String, String)> = (0..CROWD)
        .map(|index| (format!("p{index}"), "n1".to_owned()))
        .collect();
    let present = objects.names(NAMESPACE)?;
    let missing: Vec<_> = pods
        .into_iter()
        .filter(|(name, _)| !present.contains(name))
        .collect();
    if !missing.is_empty() {
        objects.pods(NAMESPACE, &missing, false)?;
    }
    Ok(())
}

/// Creates policies of one rule each, each for a different pod. Their number only grows.
pub fn background(bench: &mut Bench, count: usize) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let wanted = (0..count).map(other).collect();
    let present = bench.objects()?.policies(NAMESPACE, wanted)?;
    ensure!(
        present == count,
        "{present} other policies exist instead of {count}: measure fewer before more"
    );
    Ok(())
}

fn other(index: usize) -> Value {
    json!({
        "metadata": {"name": format!("other-{index}")},
        "spec": {
            "podSelector": {"matchLabels": {"pod": format!("p{}", index % CROWD)}},
            "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{
                    "podSelector": {"matchLabels": {"pod": format!("p{}", (index / 7) % CROWD)}},
                }],
                "ports": [{"protocol": "TCP", "port": 1000 + index % 30_000}],
            }],
        },
    })
}
