//! Pods that are created and deleted, one by one and many at once. The plugin's calls are timed
//! where the runtime makes them.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::plugin::{self, Shim};
use super::{Bench, machine};
use crate::demo::flips::Quantiles;
use crate::install;

/// Pods one by one.
const SERIAL: usize = 40;
/// Pods at once.
const BURST: usize = 60;
/// Their node.
const NODE: &str = "n1";
/// The account of the agents.
const AGENT: (&str, &str) = ("margay-system", "margay-node");

/// One by one: each ADD runs alone on the machine.
pub fn serial(bench: &mut Bench) -> Result<()> {
    bench.calm()?;
    let (namespace, pods) = ("serial", mk_pods(SERIAL));
    let node = bench.cluster()?.node(NODE)?;
    let agent = install::processes(&node, "node");
    let shim = Shim::put(&node, &bench.program("margay-shim")?)?;
    plugin::count_requests(bench.cluster()?, AGENT)?;
    bench.objects()?.namespace(namespace)?;
    let requests = plugin::requests(bench.cluster()?)?;
    let cpu = machine::cpu(&agent)?;
    let ready = bench.objects()?.pods(namespace, &pods, true)?;
    let cpu = machine::cpu(&agent)? - cpu;
    // The annotation of the last pod is written after its ADD.
    let requests = plugin::requests_at_rest(bench.cluster()?)? - requests;
    let calls = shim.calls("ADD", namespace)?;
    let adds = Quantiles::new(calls.iter().map(|call| call.took).collect());
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let sheet = &mut bench.sheet;
    sheet.put("cni.add.p50", ms(adds.at(0.5)), format!("{adds}"))?;
    sheet.put("cni.add.p99", ms(adds.at(0.99)), "")?;
    let plugin = calls.iter().map(|call| call.cpu).sum::<Duration>() / calls.len().max(1) as u32;
    let agent = cpu / SERIAL as u32;
    let detail = format!(
        "plugin {:.2} ms, agent with everything else that it did {:.2} ms",
        ms(plugin),
        ms(agent)
    );
    sheet.put("cni.add.cpu", ms(plugin + agent), detail)?;
    sheet.put(
        "cni.add.requests",
        requests / SERIAL as f64,
        "address, handle and annotation",
    )?;
    let mut memory: Vec<u64> = calls.iter().map(|call| call.kib).collect();
    memory.sort_unstable();
    sheet.put(
        "memory.plugin",
        memory[memory.len() / 2] as f64 / 1024.0,
        format!("{} calls", memory.len()),
    )?;
    let ready = Quantiles::new(ready.into_values().collect());
    sheet.put("pods.serial.ready", ms(ready.at(0.5)), format!("{ready}"))?;
    bench.objects()?.drop_namespace(namespace)?;
    shim.remove(&node)
}

/// All at once, then all gone at once.
pub fn burst(bench: &mut Bench) -> Result<()> {
    bench.calm()?;
    let (namespace, pods) = ("burst", mk_pods(BURST));
    let node = bench.cluster()?.node(NODE)?;
    let shim = Shim::put(&node, &bench.program("margay-shim")?)?;
    let objects = bench.objects()?;
    objects.namespace(namespace)?;
    let begin = Instant::now();
    let ready = Quantiles::new(
        objects
            .pods(namespace, &pods, false)?
            .into_values()
            .collect(),
    );
    let all = begin.elapsed().as_secs_f64();
    let adds = Quantiles::new(
        shim.calls("ADD", namespace)?
            .iter()
            .map(|call| call.took)
            .collect(),
    );
    let deleted = objects.drop_namespace(namespace)?;
    let dels = Quantiles::new(
        shim.calls("DEL", namespace)?
            .iter()
            .map(|call| call.took)
            .collect(),
    );
    let sheet = &mut bench.sheet;
    sheet.put(
        "pods.burst.ready",
        all,
        format!("created to Ready: {ready}"),
    )?;
    sheet.put(
        "pods.burst.add",
        adds.at(0.5).as_secs_f64() * 1e3,
        format!("{adds}"),
    )?;
    let detail = format!(
        "{dels}; namespace gone after {:.1} s",
        deleted.as_secs_f32()
    );
    sheet.put("pods.delete.p50", dels.at(0.5).as_secs_f64(), detail)?;
    shim.remove(&node)
}

fn mk_pods(count: usize) -> Vec<(String, String)> {
    (0..count)
        .map(|index| (format!("p{index}"), NODE.to_owned()))
        .collect()
}
