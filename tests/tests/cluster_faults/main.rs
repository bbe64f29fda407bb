//! Faults on a real Kubernetes: components die while packets flow. Denied stays denied, allowed
//! stays allowed, and everything recovers.

mod observe;
mod reports;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use margay_tests::cluster::Cluster;
use margay_tests::cluster::process::{POLL, wait_for};
use margay_tests::demo::{self, Stage, flips};
use margay_tests::install;
use margay_tests::matrix::{self, Matrix};
use margay_tests::probe::Protocol;
use margay_tests::suite::Suite;
use margay_tests::world::{self, PODS, World};
use serde_json::{Value, json};

use crate::observe::{
    CLOSED, Watch, apply, churn, closed, delete, no_address_is_leaked, ready, wait_for_matrix,
    write,
};
use crate::reports::{bypassed, confined, not_followed, overlapping, put_back};

/// Time limit for a restarted component to recover.
const RECOVERY: Duration = Duration::from_secs(120);
/// A state without changes for this long is stable: kubelet retries a refused pod within a few
/// seconds.
const STILL: Duration = Duration::from_secs(4);
/// How long a Node is absent that comes back: longer than two leak scans, shorter than Kubernetes
/// keeps the pods of a missing node.
const ABSENCE: Duration = Duration::from_secs(26);
/// The smallest pool that holds the world: four blocks of eight addresses for three nodes, so that
/// exhausting it takes few pods.
const POOL: (&str, u8) = ("10.244.0.0/27", 29);
fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-faults");
    let options = install::Options {
        cidr: POOL.0.to_owned(),
        block_size: Some(POOL.1),
        ..install::Options::default()
    };
    // Several checkouts may run tests at the same time.
    let name = format!("mgy-faults-{}", std::process::id());
    let staged = demo::stage(&name, &folder, &options, &|line| println!("{line}"));
    let mut stage = match staged {
        Ok(stage) => stage,
        Err(error) => {
            suite.case("a_cluster_with_margay", || Err(error));
            return suite.finish();
        }
    };
    suite.case(
        "a_pods_first_packet_meets_the_policy_that_was_there_before_it",
        || first_packet(&stage),
    );
    suite.case("typha_killed", || typha_killed(&stage));
    suite.case("agent_killed_in_churn", || agent_killed(&stage));
    suite.case("api_server_restarted", || api_restarted(&mut stage));
    suite.case(
        "a_pool_that_overlaps_another_is_kept_out_and_reported",
        || overlapping(&stage.cluster),
    );
    suite.case("fields_without_effect_are_reported", || {
        not_followed(&stage.cluster)
    });
    suite.case("a_configuration_that_comes_before_ours_is_reported", || {
        bypassed(&stage.cluster)
    });
    suite.case("a_configuration_of_ours_that_is_gone_is_put_back", || {
        put_back(&stage.cluster)
    });
    suite.case(
        "typha_has_as_many_replicas_as_there_are_nodes_that_may_run_it",
        || confined(&stage.cluster),
    );
    suite.case("node_deleted_and_made_again", || made_again(&stage));
    suite.case("node_rebooted", || rebooted(&mut stage));
    suite.case("pool_exhausted", || exhausted(&stage));
    suite.finish()
}

// -- cases

fn first_packet(stage: &Stage) -> Result<()> {
    let target = stage.world.pod("x/b")?.address;
    let egress = |pod: &str, rules: Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": pod, "namespace": "y"},
            "spec": {
                "podSelector": {"matchLabels": {"pod": pod}},
                "policyTypes": ["Egress"],
                "egress": rules,
            },
        })
    };
    let allowed = json!([{"to": [{"namespaceSelector": {"matchLabels": {"ns": "x"}}}]}]);
    let policies = [
        egress("first-denied", json!([])),
        egress("first-allowed", allowed),
    ];
    apply(&stage.cluster, "first", &policies)?;
    let pods = ["first-denied", "first-allowed"]
        .iter()
        .map(|name| {
            world::program(
                &format!("y/{name}"),
                "n1",
                &["first".to_owned(), format!("{target}:80")],
            )
        })
        .collect::<Result<Vec<_>>>()?;
    // A policy does not show when nodes enforce it; the world's pods do.
    wait_for_matrix(&stage.world, &Matrix::open(&PODS, &[(Protocol::Tcp, 80)]))?;
    apply(&stage.cluster, "first-pods", &pods)?;
    let report = |name: &str| -> Result<Value> {
        stage.cluster.kubectl(&[
            "wait",
            "-n",
            "y",
            "--for=jsonpath={.status.phase}=Succeeded",
            &format!("pod/{name}"),
            "--timeout=60s",
        ])?;
        Ok(serde_json::from_str(
            &stage.cluster.kubectl(&["logs", "-n", "y", name])?,
        )?)
    };
    let (denied, allowed) = (report("first-denied")?, report("first-allowed")?);
    delete(&stage.cluster, &["first-pods", "first"])?;
    ensure!(
        denied["answered"] == 0 && denied["unanswered"].as_u64() > Some(100),
        "denied from its first packet: {denied}"
    );
    ensure!(
        allowed["answered"].as_u64() > Some(100),
        "allowed: {allowed}"
    );
    Ok(())
}

fn typha_killed(stage: &Stage) -> Result<()> {
    let watch = Watch::begin(stage)?;
    for node in stage.cluster.nodes()? {
        if !install::processes(&node, "typha").is_empty() {
            install::kill(&node, "typha")?;
        }
    }
    resumed_with_the_difference_only(&stage.cluster)?;
    flips::measure(&stage.cluster, &stage.world, "x/a", "x/c", 2)
        .context("changes are enforced again")?;
    watch.end(stage)
}

/// Nodes hold everything that the new typhas send, so almost nothing is resent; an address or a
/// heartbeat may have changed meanwhile.
fn resumed_with_the_difference_only(cluster: &Cluster) -> Result<()> {
    let nodes = cluster.nodes()?;
    let sum = |metric: &str| -> f64 {
        let of = |node| install::metric(node, install::TYPHA_ADMIN, metric).unwrap_or_default();
        nodes.iter().map(of).sum()
    };
    let back = || sum("margay_typha_sessions_opened_total") >= nodes.len() as f64;
    wait_for(RECOVERY, || "every node to be back at a typha".into(), back)?;
    let restated = sum("margay_typha_resent_buckets_total");
    ensure!(
        restated <= 3.0,
        "{restated} buckets were resent to nodes that held them"
    );
    Ok(())
}

fn agent_killed(stage: &Stage) -> Result<()> {
    let watch = Watch::begin(stage)?;
    let end = AtomicBool::new(false);
    let n1 = stage.cluster.node("n1")?;
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| churn(stage, &end));
        let kills = (0..3).try_for_each(|_| {
            install::kill(&n1, "node")?;
            ready(&stage.cluster, "n1")
        });
        end.store(true, Ordering::Relaxed);
        let churned = churn
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        kills.and(churned)
    })?;
    watch.end(stage)?;
    no_address_is_leaked(&stage.cluster)
}

fn api_restarted(stage: &mut Stage) -> Result<()> {
    let watch = Watch::begin(stage)?;
    stage.cluster.restart_apiserver()?;
    flips::measure(&stage.cluster, &stage.world, "x/a", "x/c", 2)
        .context("changes are enforced again")?;
    watch.end(stage)
}

fn rebooted(stage: &mut Stage) -> Result<()> {
    let policy = write(&stage.cluster, "closed", CLOSED)?;
    stage.cluster.kubectl(&["apply", "-f", &policy])?;
    wait_for_matrix(&stage.world, &closed())?;
    stage.cluster.reboot("n1")?;
    ready(&stage.cluster, "n1")?;
    let begin = Instant::now();
    // Pods of the node get new networks, and perhaps new addresses.
    let matched = loop {
        let found = World::find(&stage.cluster, &PODS).and_then(|world| {
            let outcome = matrix::wait_for_match(&world, &closed(), Duration::from_secs(2))?;
            Ok((world, outcome))
        });
        match found {
            Ok((world, outcome)) if outcome.matched.is_some() => {
                stage.world = world;
                break Ok(());
            }
            Ok((_, outcome)) if begin.elapsed() > RECOVERY => {
                break Err(anyhow::anyhow!("{}", outcome.measured.beside(&closed())));
            }
            Err(error) if begin.elapsed() > RECOVERY => break Err(error),
            _ => std::thread::sleep(POLL),
        }
    };
    matched.context("after the reboot of n1")?;
    stage.cluster.kubectl(&["delete", "-f", &policy])?;
    wait_for_matrix(&stage.world, &Matrix::open(&PODS, &[(Protocol::Tcp, 80)]))
}

/// Deletes the Node of a working machine, which kubelet creates again when it is restarted: people
/// do so to change a label, and clouds by mistake.
fn made_again(stage: &Stage) -> Result<()> {
    let before = allocations(&stage.cluster)?;
    stage.cluster.kubectl(&["delete", "node", "n2"])?;
    let since = Instant::now();
    while since.elapsed() < ABSENCE {
        let now = allocations(&stage.cluster)?;
        ensure!(
            now == before,
            "{:?} after n2 left: {now:#?}\nbefore: {before:#?}",
            since.elapsed()
        );
        std::thread::sleep(POLL);
    }
    install::restart_kubelet(&stage.cluster.node("n2")?)?;
    stage
        .cluster
        .kubectl(&["wait", "--for=create", "node/n2", "--timeout=60s"])?;
    ready(&stage.cluster, "n2")?;
    wait_for_matrix(&stage.world, &Matrix::open(&PODS, &[(Protocol::Tcp, 80)]))?;
    let now = allocations(&stage.cluster)?;
    ensure!(
        now == before,
        "after n2 came back: {now:#?}\nbefore: {before:#?}"
    );
    let annotations = stage.cluster.kubectl(&[
        "get",
        "node",
        "n2",
        "-o",
        "jsonpath={.metadata.annotations}",
    ])?;
    let all = [
        "IPv4Address",
        "IPv4VXLANTunnelAddr",
        "VXLANTunnelMACAddr",
        "Interfaces",
    ];
    let lacks = all
        .iter()
        .find(|name| !annotations.contains(&format!("projectcalico.org/{name}\"")));
    ensure!(
        lacks.is_none(),
        "the new Node lacks {lacks:?}: {annotations}"
    );
    Ok(())
}

/// Which node owns a block, and what is allocated in it, by range of blocks.
fn allocations(cluster: &Cluster) -> Result<BTreeMap<String, Value>> {
    let list: Value = serde_json::from_str(&cluster.kubectl(&[
        "get",
        "ipamblocks.projectcalico.org",
        "-o",
        "json",
    ])?)?;
    let blocks = list["items"]
        .as_array()
        .cloned()
        .unwrap_or_default()
        .into_iter();
    let facts = |spec: &Value| json!([spec["affinity"], spec["allocations"], spec["attributes"]]);
    Ok(blocks
        .map(|block| (block["spec"]["cidr"].to_string(), facts(&block["spec"])))
        .collect())
}

/// More pods than addresses: a pod without one waits, its events have the reason, and it starts
/// when others are deleted.
fn exhausted(stage: &Stage) -> Result<()> {
    const PODS: usize = 24;
    let pod = |index: usize| world::server(&format!("y/many-{index:02}"), "n3");
    let pods = (0..PODS).map(pod).collect::<Result<Vec<_>>>()?;
    apply(&stage.cluster, "many", &pods)?;
    let events = || {
        stage.cluster.kubectl(&[
            "get",
            "events",
            "-n",
            "y",
            "--field-selector=reason=FailedCreatePodSandBox",
            "-o",
            "jsonpath={.items[*].message}",
        ])
    };
    let mut text = String::new();
    let refused = wait_for(
        RECOVERY,
        || "a pod to be refused an address".into(),
        || {
            text = events().unwrap_or_default();
            text.contains(POOL.0)
        },
    );
    refused.with_context(|| format!("kubelet's events: {text}"))?;
    let running = || -> Result<BTreeSet<String>> {
        let names = stage.cluster.kubectl(&[
            "get",
            "pods",
            "-n",
            "y",
            "--field-selector=status.phase=Running",
            "-o",
            "jsonpath={.items[*].metadata.name}",
        ])?;
        Ok(names
            .split_whitespace()
            .filter(|name| name.starts_with("many-"))
            .map(str::to_owned)
            .collect())
    };
    let first = wait_until_stable(&running)?;
    ensure!(
        !first.is_empty() && first.len() < PODS,
        "{} of {PODS} pods run in a pool without space",
        first.len()
    );
    for name in &first {
        stage
            .cluster
            .kubectl(&["delete", "pod", "-n", "y", name, "--wait=false"])?;
    }
    let others = || running().is_ok_and(|now| now.difference(&first).next().is_some());
    wait_for(
        RECOVERY,
        || "a waiting pod to start where addresses came back".into(),
        others,
    )?;
    delete(&stage.cluster, &["many"])?;
    no_address_is_leaked(&stage.cluster)
}

/// Waits until a value stops changing.
fn wait_until_stable<T: PartialEq>(look: &dyn Fn() -> Result<T>) -> Result<T> {
    let (mut known, mut since, begin) = (look()?, Instant::now(), Instant::now());
    while since.elapsed() < STILL {
        std::thread::sleep(POLL);
        let now = look()?;
        if now != known {
            (known, since) = (now, Instant::now());
        }
        ensure!(begin.elapsed() < RECOVERY, "a value keeps changing");
    }
    Ok(known)
}
