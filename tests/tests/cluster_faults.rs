//! On a real Kubernetes: parts die while packets flow. What was denied stays denied, what was allowed stays allowed, and all of it recovers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use margay_tests::cluster::Cluster;
use margay_tests::cluster::process::{POLL, wait_for};
use margay_tests::demo::{self, OBEY, Stage, flips};
use margay_tests::install;
use margay_tests::matrix::{self, Matrix};
use margay_tests::probe::flow::Flow;
use margay_tests::probe::knock::Knock;
use margay_tests::probe::{Protocol, Target, Verdict};
use margay_tests::suite::Suite;
use margay_tests::world::{self, PODS, World};
use serde_json::{Value, json};

/// How long a restarted part may take to be of use again.
const RECOVERY: Duration = Duration::from_secs(120);
/// What has not changed for so long has settled: kubelet tries a pod that was refused again within a few seconds.
const STILL: Duration = Duration::from_secs(4);
/// How long a Node is absent that comes back: longer than it takes to look at what nodes have twice, shorter than Kubernetes keeps the pods of one.
const ABSENCE: Duration = Duration::from_secs(26);
/// The smallest pool that holds the world: four blocks of eight addresses for three nodes, so that exhausting it takes few pods.
const POOL: (&str, u8) = ("10.244.0.0/27", 29);
/// Denies everybody's way to these pods, for as long as a case lasts.
const CLOSED: &str = r#"
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

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-faults");
    let options = install::Options { cidr: POOL.0.to_owned(), block_size: Some(POOL.1), ..install::Options::default() };
    // Checkouts side by side test at the same time.
    let name = format!("mgy-faults-{}", std::process::id());
    let staged = demo::stage(&name, &folder, &options, &|line| println!("{line}"));
    let mut stage = match staged {
        Ok(stage) => stage,
        Err(error) => {
            suite.case("a_cluster_with_margay", || Err(error));
            return suite.finish();
        }
    };
    suite.case("a_pods_first_packet_meets_the_policy_that_was_there_before_it", || first_packet(&stage));
    suite.case("typha_killed", || typha_killed(&stage));
    suite.case("agent_killed_in_churn", || agent_killed(&stage));
    suite.case("api_server_restarted", || api_restarted(&mut stage));
    suite.case("a_pool_that_overlaps_another_is_kept_out_and_told", || overlapping(&stage.cluster));
    suite.case("fields_without_effect_are_reported", || not_followed(&stage.cluster));
    suite.case("a_configuration_that_comes_before_ours_is_told", || bypassed(&stage.cluster));
    suite.case("a_configuration_of_ours_that_is_gone_is_put_back", || put_back(&stage.cluster));
    suite.case("typha_has_as_many_replicas_as_there_are_nodes_that_may_run_it", || confined(&stage.cluster));
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
            "spec": {"podSelector": {"matchLabels": {"pod": pod}}, "policyTypes": ["Egress"], "egress": rules},
        })
    };
    let allowed = json!([{"to": [{"namespaceSelector": {"matchLabels": {"ns": "x"}}}]}]);
    let policies = [egress("first-denied", json!([])), egress("first-allowed", allowed)];
    apply(&stage.cluster, "first", &policies)?;
    let pods = ["first-denied", "first-allowed"]
        .iter()
        .map(|name| world::program(&format!("y/{name}"), "n1", &["first".to_owned(), format!("{target}:80")]))
        .collect::<Result<Vec<_>>>()?;
    // A policy says nothing about when nodes know it; the world's own pods show it.
    settle(&stage.world, &Matrix::open(&PODS, &[(Protocol::Tcp, 80)]))?;
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
        Ok(serde_json::from_str(&stage.cluster.kubectl(&["logs", "-n", "y", name])?)?)
    };
    let (denied, allowed) = (report("first-denied")?, report("first-allowed")?);
    delete(&stage.cluster, &["first-pods", "first"])?;
    ensure!(
        denied["answered"] == 0 && denied["unanswered"].as_u64() > Some(100),
        "denied from its first packet: {denied}"
    );
    ensure!(allowed["answered"].as_u64() > Some(100), "allowed: {allowed}");
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
    flips::measure(&stage.cluster, &stage.world, "x/a", "x/c", 2).context("changes are enforced again")?;
    watch.end(stage)
}

/// Nodes hold all that the new typhas know, so nearly nothing is told again; an address or a heartbeat may have changed meanwhile.
fn resumed_with_the_difference_only(cluster: &Cluster) -> Result<()> {
    let nodes = cluster.nodes()?;
    let sum = |metric: &str| -> f64 {
        let of = |node| install::metric(node, install::TYPHA_ADMIN, metric).unwrap_or_default();
        nodes.iter().map(of).sum()
    };
    let back = || sum("margay_typha_sessions_opened_total") >= nodes.len() as f64;
    wait_for(RECOVERY, || "every node to be back at a typha".into(), back)?;
    let restated = sum("margay_typha_resent_buckets_total");
    ensure!(restated <= 3.0, "{restated} buckets were told again to nodes that held them");
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
        let churned = churn.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        kills.and(churned)
    })?;
    watch.end(stage)?;
    no_address_is_leaked(&stage.cluster)
}

fn api_restarted(stage: &mut Stage) -> Result<()> {
    let watch = Watch::begin(stage)?;
    stage.cluster.restart_apiserver()?;
    flips::measure(&stage.cluster, &stage.world, "x/a", "x/c", 2).context("changes are enforced again")?;
    watch.end(stage)
}

fn rebooted(stage: &mut Stage) -> Result<()> {
    let policy = write(&stage.cluster, "closed", CLOSED)?;
    stage.cluster.kubectl(&["apply", "-f", &policy])?;
    settle(&stage.world, &closed())?;
    stage.cluster.reboot("n1")?;
    ready(&stage.cluster, "n1")?;
    let begin = Instant::now();
    // Pods of the node get new networks, and perhaps new addresses.
    let matched = loop {
        let found = World::find(&stage.cluster, &PODS).and_then(|world| {
            let outcome = matrix::settle(&world, &closed(), Duration::from_secs(2))?;
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
    settle(&stage.world, &Matrix::open(&PODS, &[(Protocol::Tcp, 80)]))
}

fn overlapping(cluster: &Cluster) -> Result<()> {
    let pool = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
        "metadata": {"name": "overlaps"}, "spec": {"cidr": "10.244.0.0/28", "blockSize": 29},
    });
    apply(cluster, "overlaps", &[pool])?;
    let condition = |pool: &str| {
        let path = r#"jsonpath={.status.conditions[?(@.type=="Allocatable")]}"#;
        cluster.kubectl(&["get", "ippools.projectcalico.org", pool, "-o", path]).unwrap_or_default()
    };
    let told = told_of(cluster, "ippools", |said| said.contains("IPPool overlaps: its range 10.244.0.0/28 overlaps"));
    let (new, old) = (condition("overlaps"), condition("default-ipv4-ippool"));
    delete(cluster, &["overlaps"])?;
    told?;
    ensure!(new.contains(r#""status":"False""#) && new.contains("CIDROverlap"), "the new pool: {new}");
    ensure!(old.contains(r#""status":"True""#), "the pool that is in use: {old}");
    told_of(cluster, "ippools", |said| !said.contains("overlaps"))
}

fn not_followed(cluster: &Cluster) -> Result<()> {
    let set = |fields: Value| {
        let patch = json!({ "spec": fields }).to_string();
        let object = "felixconfigurations.projectcalico.org";
        cluster.kubectl(&["patch", object, "default", "--type=merge", "-p", &patch]).map(drop)
    };
    set(json!({"wireguardEnabled": true, "natPortRange": "1000:2000"}))?;
    let is_told = |said: &str| {
        let clear = "FelixConfiguration default, spec.wireguardEnabled is true: there is no WireGuard";
        said.contains(clear)
            && said.contains("without effect: FelixConfiguration default, spec.natPortRange is 1000:2000")
    };
    let told = told_of(cluster, "calico", is_told);
    set(json!({"wireguardEnabled": null, "natPortRange": null}))?;
    told?;
    told_of(cluster, "calico", |said| !said.contains("FelixConfiguration"))
}

fn bypassed(cluster: &Cluster) -> Result<()> {
    let (n3, file) = (cluster.node("n3")?, "/etc/cni/net.d/05-other.conflist");
    let other = r#"{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"bridge","ipam":{"type":"host-local"}}]}"#;
    n3.exec(&["sh", "-c", &format!("echo '{other}' > {file}")])?;
    let is_told =
        |said: &str| said.contains("n3") && said.contains("uses 05-other.conflist") && said.contains("bridge");
    let told = told_of(cluster, "calico", is_told);
    n3.exec(&["rm", file])?;
    told?;
    told_of(cluster, "calico", |said| !said.contains("05-other"))
}

fn put_back(cluster: &Cluster) -> Result<()> {
    let n3 = cluster.node("n3")?;
    for file in ["/etc/cni/net.d/10-margay.conflist", "/opt/cni/bin/margay"] {
        let before = n3.exec(&["sha256sum", file])?;
        n3.exec(&["rm", file])?;
        let is_back = || n3.exec(&["sha256sum", file]).is_ok_and(|now| now == before);
        wait_for(Duration::from_secs(30), || format!("{file} of n3 to be there again"), is_back)?;
    }
    Ok(())
}

/// One node may run typha, of three: one replica, which is available, and the rollouts there and back come to their end.
fn confined(cluster: &Cluster) -> Result<()> {
    let select = |node: Value| {
        let selector = json!({"spec": {"controlPlaneNodeSelector": {"kubernetes.io/hostname": node}}});
        cluster.kubectl(&["patch", "installation", "default", "--type=merge", "-p", &selector.to_string()]).map(drop)
    };
    let state = || -> Result<(Value, BTreeSet<String>)> {
        let get = ["get", "deployment", "margay-typha", "-n", "margay-system", "-o", "json"];
        let found: Value = serde_json::from_str(&cluster.kubectl(&get)?)?;
        let status = &found["status"];
        let is_over = status["observedGeneration"] == found["metadata"]["generation"]
            && ["replicas", "updatedReplicas", "availableReplicas"]
                .iter()
                .all(|field| status[*field] == found["spec"]["replicas"]);
        let nodes = cluster.kubectl(&[
            "get",
            "pods",
            "-n",
            "margay-system",
            "-l",
            "app.kubernetes.io/name=margay-typha",
            "-o",
            "jsonpath={.items[*].spec.nodeName}",
        ])?;
        let replicas = if is_over { found["spec"]["replicas"].clone() } else { Value::Null };
        Ok((replicas, nodes.split_whitespace().map(str::to_owned).collect()))
    };
    let (before, _) = state()?;
    ensure!(before == 2, "replicas for three nodes: {before}");
    select(json!("n1"))?;
    let waited = wait_for(
        RECOVERY,
        || format!("one replica, on n1: {:?}", state()),
        || state().is_ok_and(|(replicas, nodes)| replicas == 1 && nodes.iter().eq(["n1"])),
    );
    select(Value::Null)?;
    waited?;
    wait_for(
        RECOVERY,
        || format!("two replicas again: {:?}", state()),
        || state().is_ok_and(|(replicas, nodes)| replicas == 2 && nodes.len() == 2),
    )
}

/// Waits until the messages of a TigeraStatus are like that.
fn told_of(cluster: &Cluster, status: &str, is_told: impl Fn(&str) -> bool) -> Result<()> {
    let messages =
        || cluster.kubectl(&["get", "tigerastatus", status, "-o", "jsonpath={.status.conditions[*].message}"]);
    let mut said = String::new();
    let waited = wait_for(
        Duration::from_secs(60),
        || format!("TigeraStatus {status} to say it"),
        || {
            said = messages().unwrap_or_default();
            !said.is_empty() && is_told(&said)
        },
    );
    waited.with_context(|| format!("it says: {said}"))
}

/// Somebody deletes the Node of a machine that works, and kubelet makes it again when it is restarted: as a label is changed, or by mistake of a cloud.
fn made_again(stage: &Stage) -> Result<()> {
    let before = allocations(&stage.cluster)?;
    stage.cluster.kubectl(&["delete", "node", "n2"])?;
    let since = Instant::now();
    while since.elapsed() < ABSENCE {
        let now = allocations(&stage.cluster)?;
        ensure!(now == before, "{:?} after n2 left: {now:#?}\nbefore: {before:#?}", since.elapsed());
        std::thread::sleep(POLL);
    }
    install::restart_kubelet(&stage.cluster.node("n2")?)?;
    stage.cluster.kubectl(&["wait", "--for=create", "node/n2", "--timeout=60s"])?;
    ready(&stage.cluster, "n2")?;
    settle(&stage.world, &Matrix::open(&PODS, &[(Protocol::Tcp, 80)]))?;
    let now = allocations(&stage.cluster)?;
    ensure!(now == before, "after n2 came back: {now:#?}\nbefore: {before:#?}");
    let annotations = stage.cluster.kubectl(&["get", "node", "n2", "-o", "jsonpath={.metadata.annotations}"])?;
    let all = ["IPv4Address", "IPv4VXLANTunnelAddr", "VXLANTunnelMACAddr", "Interfaces"];
    let lacks = all.iter().find(|name| !annotations.contains(&format!("projectcalico.org/{name}\"")));
    ensure!(lacks.is_none(), "the new Node lacks {lacks:?}: {annotations}");
    Ok(())
}

/// Which node owns a block, and what is allocated in it, by range of blocks.
fn allocations(cluster: &Cluster) -> Result<BTreeMap<String, Value>> {
    let list: Value =
        serde_json::from_str(&cluster.kubectl(&["get", "ipamblocks.projectcalico.org", "-o", "json"])?)?;
    let blocks = list["items"].as_array().cloned().unwrap_or_default().into_iter();
    let facts = |spec: &Value| json!([spec["affinity"], spec["allocations"], spec["attributes"]]);
    Ok(blocks.map(|block| (block["spec"]["cidr"].to_string(), facts(&block["spec"]))).collect())
}

/// More pods than addresses: what has none waits and says why, and starts when others go.
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
    let mut said = String::new();
    let refused = wait_for(
        RECOVERY,
        || "a pod to be refused an address".into(),
        || {
            said = events().unwrap_or_default();
            said.contains(POOL.0)
        },
    );
    refused.with_context(|| format!("kubelet's events: {said}"))?;
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
        Ok(names.split_whitespace().filter(|name| name.starts_with("many-")).map(str::to_owned).collect())
    };
    let first = settled(&running)?;
    ensure!(!first.is_empty() && first.len() < PODS, "{} of {PODS} pods run in a pool without space", first.len());
    for name in &first {
        stage.cluster.kubectl(&["delete", "pod", "-n", "y", name, "--wait=false"])?;
    }
    let others = || running().is_ok_and(|now| now.difference(&first).next().is_some());
    wait_for(RECOVERY, || "a waiting pod to start where addresses came back".into(), others)?;
    delete(&stage.cluster, &["many"])?;
    no_address_is_leaked(&stage.cluster)
}

/// What does not change any more for a while.
fn settled<T: PartialEq>(look: &dyn Fn() -> Result<T>) -> Result<T> {
    let (mut known, mut since, begin) = (look()?, Instant::now(), Instant::now());
    while since.elapsed() < STILL {
        std::thread::sleep(POLL);
        let now = look()?;
        if now != known {
            (known, since) = (now, Instant::now());
        }
        ensure!(begin.elapsed() < RECOVERY, "nothing settles");
    }
    Ok(known)
}

// -- what they share

/// Packets of a denied pair and a held connection of an allowed one, watched during a fault. The denied pair is on two nodes, n1 asks.
struct Watch {
    denied: [Knock; 2],
    flow: Flow,
    policy: String,
}

impl Watch {
    fn begin(stage: &Stage) -> Result<Self> {
        let policy = write(&stage.cluster, "closed", CLOSED)?;
        stage.cluster.kubectl(&["apply", "-f", &policy])?;
        settle(&stage.world, &closed())?;
        let knock = |to: &str| -> Result<Knock> {
            let target = Target::new(Protocol::Tcp, stage.world.pod(to)?.address, 80);
            Knock::start(&stage.world.pod("x/a")?.place, target, Duration::from_millis(2), Duration::from_millis(200))
        };
        let allowed = stage.world.pod("y/c")?.address;
        Ok(Self {
            denied: [knock("x/b")?, knock("x/d")?],
            flow: Flow::start(&stage.world.pod("x/a")?.place, std::net::SocketAddrV4::new(allowed, 80))?,
            policy,
        })
    }

    fn end(self, stage: &Stage) -> Result<()> {
        let report = self.flow.finish();
        for knock in self.denied {
            let records = knock.finish()?;
            let passed = records.iter().filter(|record| record.verdict != Verdict::Silent).count();
            ensure!(
                passed == 0 && records.len() > 100,
                "{passed} of {} connects of a denied pair were answered",
                records.len()
            );
        }
        ensure!(report.broken.is_none() && report.echoed > 20, "an allowed connection suffered: {report:?}");
        ensure!(report.longest_gap < Duration::from_secs(2), "an allowed connection stood still: {report:?}");
        stage.cluster.kubectl(&["delete", "-f", &self.policy])?;
        settle(&stage.world, &Matrix::open(&PODS, &[(Protocol::Tcp, 80)]))
    }
}

/// What [`CLOSED`] has to end in.
fn closed() -> Matrix {
    let mut expected = Matrix::open(&PODS, &[(Protocol::Tcp, 80)]);
    for ((_, _, to), verdict) in &mut expected.cells {
        if to == "x/b" || to == "x/d" {
            *verdict = Verdict::Silent;
        }
    }
    expected
}

/// Pods come and go on n1, and policies with them, until told to end.
fn churn(stage: &Stage, end: &AtomicBool) -> Result<()> {
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

fn settle(world: &World, expected: &Matrix) -> Result<()> {
    let outcome = matrix::settle(world, expected, OBEY)?;
    ensure!(outcome.matched.is_some(), "packets do not obey\n{}", outcome.measured.beside(expected));
    Ok(())
}

/// Every address that a block gives out belongs to a pod that exists, or is a node's own.
fn no_address_is_leaked(cluster: &Cluster) -> Result<()> {
    let mut said = String::new();
    let agree = || {
        let compared = given_and_used(cluster);
        said = format!("{compared:?}");
        compared.is_ok_and(|(given, used)| given == used)
    };
    let waited = wait_for(Duration::from_secs(30), || "blocks and pods to agree on addresses".into(), agree);
    waited.with_context(|| format!("given and used: {said}"))
}

fn given_and_used(cluster: &Cluster) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let get = |what: &[&str]| -> Result<Vec<Value>> {
        let text = cluster.kubectl(&[&["get"], what, &["-o", "json"]].concat())?;
        let list: Value = serde_json::from_str(&text)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    };
    let mut given = BTreeSet::new();
    for block in get(&["ipamblocks.projectcalico.org"])? {
        let cidr: ipnet::Ipv4Net = block["spec"]["cidr"].as_str().context("spec.cidr of a block")?.parse()?;
        let allocations = block["spec"]["allocations"].as_array().cloned().unwrap_or_default();
        let taken = allocations.iter().zip(cidr.network().to_bits()..).filter(|(index, _)| !index.is_null());
        for (index, address) in taken {
            let attributes = &block["spec"]["attributes"][index.as_u64().context("an index")? as usize];
            let tunnel = attributes["secondary"]["type"] == "vxlanTunnelAddress"
                || attributes["handle_id"].as_str().is_some_and(|id| id.starts_with("vxlan-tunnel-addr-"));
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

fn ready(cluster: &Cluster, node: &str) -> Result<()> {
    let agent = || {
        let path = r#"jsonpath={.items[0].status.conditions[?(@.type=="Ready")].status}"#;
        let node = format!("--field-selector=spec.nodeName={node}");
        let said = cluster.kubectl(&[
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
        said.is_ok_and(|said| said == "True")
    };
    wait_for(RECOVERY, || format!("the agent of {node} to be ready"), agent)
}

fn write(cluster: &Cluster, name: &str, text: &str) -> Result<String> {
    let path = cluster.folder().join(format!("{name}.manifest"));
    std::fs::write(&path, text)?;
    Ok(path.display().to_string())
}

fn apply(cluster: &Cluster, name: &str, items: &[Value]) -> Result<()> {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    let path = write(cluster, name, &list.to_string())?;
    cluster.kubectl(&["apply", "-f", &path]).map(|_| ())
}

fn delete(cluster: &Cluster, names: &[&str]) -> Result<()> {
    for name in names {
        let path = cluster.folder().join(format!("{name}.manifest"));
        cluster.kubectl(&["delete", "-f", &path.display().to_string(), "--ignore-not-found"])?;
    }
    Ok(())
}
