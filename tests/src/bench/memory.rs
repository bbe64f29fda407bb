//! Resident memory of every component.

use anyhow::{Context, Result};

use super::{Bench, machine, policy};
use crate::install;

/// After the installation, with three pods a node.
pub fn idle(bench: &mut Bench) -> Result<()> {
    bench.calm()?;
    take(bench, "node", "memory.agent.idle")?;
    take(bench, "typha", "memory.typha.idle")?;
    take(bench, "operator", "memory.operator")
}

/// With 100 pods on the first node and 1000 policies.
pub fn full(bench: &mut Bench) -> Result<()> {
    policy::fill_node(bench)?;
    policy::background(bench, 1_000)?;
    bench.calm()?;
    take(bench, "node", "memory.agent.full")?;
    take(bench, "typha", "memory.typha.full")
}

/// With 100 pods on the first node and 10,000 policies.
pub fn with_many_policies(bench: &mut Bench) -> Result<()> {
    policy::fill_node(bench)?;
    policy::background(bench, 10_000)?;
    bench.calm()?;
    take(bench, "node", "memory.agent.10k")?;
    take(bench, "typha", "memory.typha.10k")
}

/// The largest process of a component, with all of them as detail.
fn take(bench: &mut Bench, component: &str, key: &str) -> Result<()> {
    let mut sizes = Vec::new();
    for node in bench.cluster()?.nodes()? {
        for pid in install::processes(&node, component) {
            sizes.push((
                machine::resident(pid)?,
                machine::anonymous(pid)?,
                node.host.name.clone(),
            ));
        }
    }
    let largest = sizes.iter().map(|size| size.0).max_by(f64::total_cmp);
    let largest = largest.with_context(|| format!("no {component} runs"))?;
    let each: Vec<String> = sizes
        .iter()
        .map(|(rss, own, node)| format!("{node} {rss:.1}, of it anonymous {own:.1}"))
        .collect();
    bench.sheet.put(key, largest, each.join("; "))
}
