//! CNI ADD and DEL without Kubernetes: the real plugin, agent and typha on one node of the lab,
//! with a policy that selects every pod, and IPAM on blocks in memory; CPU per ADD with the routes
//! of few and of many nodes. Agent and typha run in this process, so it has to be of the release
//! build.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use margay_api::ipam::{block::Block, names};
use margay_api::meta::{ANNOTATION_NODE_IPV4, ANNOTATION_VXLAN_IPV4, ANNOTATION_VXLAN_MAC};
use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::json;

use super::Bench;
use crate::demo::flips::Quantiles;
use crate::lab::{Lab, Options, check_enforced};
use crate::namespace::Namespace;
use crate::plugin::Call;

/// Pods one by one.
const SERIAL: usize = 100;
/// Pods of the concurrent run.
const BURST: usize = 320;
/// Calls at once.
const WIDTH: usize = 16;
const NODE: &str = "n1";
/// Other nodes in the view, first few and then many, with the figure of each.
const VIEWS: [(u32, &str); 2] = [(2, "local.add.cpu.3"), (4_999, "local.add.cpu.5000")];
/// Pods per figure of CPU.
const COUNTED: usize = 60;

/// A pod that the API knows, with a namespace and no link.
struct Waiting {
    call: Call,
    /// Held open: the call names it.
    _namespace: Namespace,
}

/// One by one, then sixteen at a time.
pub fn run(bench: &mut Bench) -> Result<()> {
    let lab = mk_lab(&Options::default().pool)?;
    let serial = wait(&lab, "serial", SERIAL)?;
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    for (command, key) in [("ADD", "local.add.p50"), ("DEL", "local.del.p50")] {
        let times = serial
            .iter()
            .map(|pod| exec(pod, command))
            .collect::<Result<_>>()?;
        let times = Quantiles::new(times);
        bench
            .sheet
            .put(key, ms(times.at(0.5)), format!("{times}"))?;
    }
    let burst = wait(&lab, "burst", BURST)?;
    for (command, key) in [("ADD", "local.add.burst"), ("DEL", "local.del.burst")] {
        let begin = Instant::now();
        let times = Quantiles::new(at_once(&burst, command)?);
        let each = begin.elapsed() / BURST as u32;
        let detail = format!("{:.0} per s; one call {times}", 1.0 / each.as_secs_f64());
        bench.sheet.put(key, ms(each), detail)?;
        check_enforced(&lab)?;
    }
    drop(lab);
    cpu(bench)
}

/// CPU per ADD with the routes of few and of many nodes in the view.
fn cpu(bench: &mut Bench) -> Result<()> {
    let lab = mk_lab(&json!({"cidr": "10.64.0.0/10", "vxlanMode": "Always"}))?;
    let mut present = 0;
    let mut figures = Vec::new();
    for (nodes, key) in VIEWS {
        for number in present..nodes {
            add_node(&lab, number)?;
        }
        present = nodes;
        lab.wait_enforced()?;
        let pods = wait(&lab, &format!("view-{nodes}"), COUNTED)?;
        lab.wait_enforced()?;
        let before = cpu_time()?;
        for pod in &pods {
            exec(pod, "ADD")?;
        }
        let each = (cpu_time()? - before).as_secs_f64() * 1e3 / COUNTED as f64;
        bench.sheet.put(
            key,
            each,
            format!("plugin, agent and typha, {COUNTED} pods one by one"),
        )?;
        figures.push(each);
    }
    let [few, many] = figures[..] else {
        unreachable!("two views")
    };
    bench
        .sheet
        .put("local.add.cpu.ratio", many / few, String::new())
}

/// CPU time of this process and of the plugins that it has waited for.
fn cpu_time() -> Result<Duration> {
    let total = |usage: Usage| {
        let micros = |time: TimeVal| Duration::from_micros(time.num_microseconds().unsigned_abs());
        micros(usage.user_time()) + micros(usage.system_time())
    };
    Ok(total(getrusage(UsageWho::RUSAGE_SELF)?) + total(getrusage(UsageWho::RUSAGE_CHILDREN)?))
}

/// A node elsewhere, with a block and a tunnel.
fn add_node(lab: &Lab, number: u32) -> Result<()> {
    let name = format!("far-{number}");
    let [_, _, high, low] = (number + 1).to_be_bytes();
    // Behind the blocks that this node takes: the pool is divided into ranges of 64 addresses.
    let first = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 0)) + number * 64);
    let block = Block::new(format!("{first}/26").parse()?, &name, String::new());
    let address = format!("172.28.{high}.{low}");
    lab.apply(&json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "annotations": {
            ANNOTATION_NODE_IPV4: format!("{address}/16"),
            ANNOTATION_VXLAN_IPV4: block.cidr().addr(),
            ANNOTATION_VXLAN_MAC: format!("66:00:00:01:{high:02x}:{low:02x}"),
        }},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }))?;
    lab.apply(&json!({
        "apiVersion": "projectcalico.org/v3", "kind": "IPAMBlock",
        "metadata": {"name": names::block(block.cidr())}, "spec": block.spec(),
    }))?;
    Ok(())
}

fn mk_lab(pool: &serde_json::Value) -> Result<Lab> {
    let lab = Lab::new(&Options {
        nodes: 1,
        pool: pool.clone(),
        ..Options::default()
    })?;
    lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}))?;
    let from = json!([{"podSelector": {"matchLabels": {"friend": "yes"}}}]);
    let problems = lab.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {
            "namespace": "x",
            "name": "friends",
        },
        "spec": {
            "podSelector": {},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": from, "ports": [{"port": 80}]}],
        },
    }))?;
    ensure!(
        problems.is_empty(),
        "the policy is as it should be: {problems:?}"
    );
    lab.wait_enforced()?;
    Ok(lab)
}

/// Pods whose objects are there, as when kubelet calls the plugin.
fn wait(lab: &Lab, name: &str, count: usize) -> Result<Vec<Waiting>> {
    let socket = lab.node(NODE)?.socket();
    (0..count)
        .map(|index| {
            let pod = format!("{name}-{index}");
            let uid = format!("{pod}-uid");
            lab.apply(&json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": {
                    "namespace": "x",
                    "name": pod,
                    "uid": uid,
                },
                "spec": {"nodeName": NODE, "serviceAccountName": "default", "containers": []},
            }))?;
            let namespace = Namespace::new()?;
            let mut call = Call::new(&socket, &format!("x/{pod}"), &pod, &namespace.path())?;
            call.arguments = format!("{};K8S_POD_UID={uid}", call.arguments);
            Ok(Waiting {
                call,
                _namespace: namespace,
            })
        })
        .collect()
}

fn exec(pod: &Waiting, command: &str) -> Result<Duration> {
    let begin = Instant::now();
    let answer = pod.call.exec(command)?;
    let took = begin.elapsed();
    answer
        .success()
        .with_context(|| format!("{command} of {}", pod.call.container))?;
    Ok(took)
}

/// Every pod once, [`WIDTH`] calls at a time.
fn at_once(pods: &[Waiting], command: &str) -> Result<Vec<Duration>> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        while let Some(pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
            times.push(exec(pod, command)?);
        }
        Ok(times)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WIDTH).map(|_| scope.spawn(work)).collect();
        let times = workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| anyhow!("a caller panicked"))?);
        Ok(times.collect::<Result<Vec<_>>>()?.concat())
    })
}
