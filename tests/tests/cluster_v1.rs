//! On a cluster that Calico has been on: Margay takes over its pool, its block and its policies
//! from `crd.projectcalico.org/v1`, and writes there what Calico reads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::Ipv4Net;
use margay_api::ipam::block::Block;
use margay_api::ipam::names::ANNOTATION_HANDLE_NODE;
use margay_api::meta::ANNOTATION_VXLAN_IPV4;
use margay_api::storage::{METADATA, Mode};
use margay_tests::cluster::Cluster;
use margay_tests::cluster::process::wait_for;
use margay_tests::demo::{self, Stage};
use margay_tests::install;
use margay_tests::matrix::Matrix;
use margay_tests::probe::Verdict;
use margay_tests::scenarios::{Environment, ctl, hosts, policy};
use margay_tests::suite::Suite;
use margay_tests::world::{self, PODS, World};
use serde_json::{Value, json};

const INSTALLED: &str = "an_installation_takes_over_what_calico_left";
/// The block that n1 had before, and its addresses that were in use: its tunnel's, and a pod's.
const BLOCK: &str = "10.244.7.0/26";
const TUNNEL: &str = "10.244.7.0";
const IN_USE: &str = "10.244.7.1";
/// Time limit on a busy machine.
const CONF_DIR: &str = "/etc/cni/net.d";
/// File that Calico leaves when its DaemonSet is deleted.
const CALICO_CONFLIST: &str = r#"{"cniVersion":"0.3.1","name":"k8s-pod-network","plugins":[{"type":"calico","ipam":{"type":"calico-ipam"}}]}"#;
const PATIENCE: Duration = Duration::from_secs(60);
/// Kubernetes keeps the pods of a node that left for up to a minute, and their addresses are kept
/// until after that.
const DEPARTURE: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    let mut suite = Suite::from_arguments();
    if suite.only_lists() {
        return ExitCode::SUCCESS;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-v1");
    let name = format!("mgy-v1-{}", std::process::id());
    let environment = match take_over(&name, &folder) {
        Ok(stage) => Environment {
            stage,
            mode: Mode::V1,
        },
        Err(error) => {
            suite.case(INSTALLED, || Err(error));
            return suite.finish();
        }
    };
    let cluster = &environment.stage.cluster;
    suite.case(INSTALLED, || install::check_status(cluster));
    suite.case("nothing_is_kept_in_the_other_storage", || {
        one_storage(cluster)
    });
    suite.case("what_calico_left_stays", || kept(cluster));
    suite.case("kinds_that_came_later_are_brought", || brought(cluster));
    suite.case("pods_get_addresses_of_the_block_that_was_there", || {
        addresses(&environment.stage)
    });
    suite.case("what_is_written_has_calicos_shape", || {
        shapes(&environment.stage)
    });
    suite.case("policies_that_calico_left_are_enforced", || {
        old_policies(&environment)
    });
    suite.case("while_the_data_is_locked_no_pod_starts", || locked(cluster));
    policy::run(&mut suite, &environment);
    hosts::run(&mut suite, &environment);
    ctl::run(&mut suite, &environment);
    suite.case("the_configuration_that_calico_left_is_set_aside", || {
        aside(cluster)
    });
    suite.case("what_a_node_had_that_left_is_given_back", || {
        departed(cluster)
    });
    suite.finish()
}

fn take_over(name: &str, folder: &Path) -> Result<Stage> {
    let progress = |line: &str| println!("{line}");
    let cluster = demo::bring_up(name, folder, &progress)?;
    let data = install::checkout().join("tests/data/calico-v1");
    let file = |name: &str| data.join(name).display().to_string();
    cluster.kubectl(&["apply", "-f", &file("crds.yaml")])?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Established",
        "crd",
        "--all",
        "--timeout=60s",
    ])?;
    cluster.kubectl(&["create", "-f", &file("data.yaml")])?;
    for node in cluster.nodes()? {
        let write = format!(
            "mkdir -p {CONF_DIR} && echo '{CALICO_CONFLIST}' > {CONF_DIR}/10-calico.conflist"
        );
        node.exec(&["sh", "-c", &write])?;
    }
    let options = install::Options {
        mode: Mode::V1,
        ..install::Options::default()
    };
    install::install(&cluster, &options, &progress)?;
    let world = World::create(&cluster).with_context(|| install::diagnosis(&cluster))?;
    Ok(Stage { cluster, world })
}

/// Objects of a kind as they are stored, by name.
fn stored(cluster: &Cluster, plural: &str) -> Result<BTreeMap<String, Value>> {
    let text = cluster.kubectl(&[
        "get",
        &format!("{plural}.crd.projectcalico.org"),
        "-A",
        "-o",
        "json",
    ])?;
    let list: Value = serde_json::from_str(&text)?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    Ok(items
        .into_iter()
        .map(|item| {
            (
                item["metadata"]["name"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                item,
            )
        })
        .collect())
}

fn one<'a>(objects: &'a BTreeMap<String, Value>, name: &str) -> Result<&'a Value> {
    objects
        .get(name)
        .with_context(|| format!("no {name} in {:?}", objects.keys()))
}

fn one_storage(cluster: &Cluster) -> Result<()> {
    let groups = cluster.kubectl(&["api-versions"])?;
    ensure!(
        !groups.lines().any(|group| group == "projectcalico.org/v3"),
        "the newer storage is served:\n{groups}"
    );
    Ok(())
}

fn kept(cluster: &Cluster) -> Result<()> {
    let information = stored(cluster, "clusterinformations")?;
    let spec = &one(&information, "default")?["spec"];
    ensure!(
        spec["clusterGUID"] == "a1b2c3d4e5f60718293a4b5c6d7e8f90"
            && spec["calicoVersion"] == "v3.28.0",
        "{spec}"
    );
    let felix = stored(cluster, "felixconfigurations")?;
    let spec = &one(&felix, "default")?["spec"];
    ensure!(
        spec["floatingIPs"] == "Disabled" && spec["vxlanVNI"] == 4097,
        "{spec}"
    );
    let vxlan = cluster
        .node("n1")?
        .exec(&["ip", "-d", "link", "show", "vxlan.calico"])?;
    ensure!(
        vxlan.contains("vxlan id 4097"),
        "the setting has no effect:\n{vxlan}"
    );
    // The Installation names the pool, so that it is followed from now on: it is labelled, and
    // users' own fields stay.
    let pools = stored(cluster, "ippools")?;
    ensure!(pools.len() == 1, "{:?}", pools.keys());
    let pool = one(&pools, "default-ipv4-ippool")?;
    let metadata: Value = serde_json::from_str(
        pool["metadata"]["annotations"][METADATA]
            .as_str()
            .unwrap_or_default(),
    )?;
    let labels = json!({"app.kubernetes.io/managed-by": "margay-operator", "team": "red"});
    ensure!(
        metadata["labels"] == labels && metadata["creationTimestamp"] == "2024-03-21T06:17:28Z",
        "{metadata}"
    );
    ensure!(
        pool["metadata"]["labels"].is_null()
            && pool["spec"]["allowedUses"] == json!(["Workload", "Tunnel"]),
        "{pool}"
    );
    Ok(())
}

fn brought(cluster: &Cluster) -> Result<()> {
    let tiers = stored(cluster, "tiers")?;
    ensure!(
        tiers.keys().eq(["default", "kube-admin", "kube-baseline"]),
        "{:?}",
        tiers.keys()
    );
    let tier = one(&tiers, "kube-admin")?;
    ensure!(
        tier["metadata"]["annotations"][METADATA] == "{}"
            && tier["spec"]["defaultAction"] == "Pass",
        "{tier}"
    );
    for plural in [
        "stagednetworkpolicies",
        "stagedglobalnetworkpolicies",
        "ipreservations",
    ] {
        ensure!(stored(cluster, plural)?.is_empty(), "{plural}");
    }
    Ok(())
}

fn addresses(stage: &Stage) -> Result<()> {
    let block: Ipv4Net = BLOCK.parse()?;
    let in_use: BTreeSet<Ipv4Addr> = [TUNNEL.parse()?, IN_USE.parse()?].into();
    let mut all = BTreeSet::new();
    for pod in &stage.world.pods {
        ensure!(
            !in_use.contains(&pod.address),
            "{} has {}, which is in use",
            pod.name,
            pod.address
        );
        ensure!(all.insert(pod.address), "{} is given twice", pod.address);
        ensure!(
            (pod.node == "n1") == block.contains(&pod.address),
            "{} of {} has {}",
            pod.name,
            pod.node,
            pod.address
        );
    }
    let path = format!(
        "jsonpath={{.metadata.annotations.{}}}",
        ANNOTATION_VXLAN_IPV4.replace('.', "\\.")
    );
    let tunnel = || {
        stage
            .cluster
            .kubectl(&["get", "node", "n1", "-o", &path])
            .unwrap_or_default()
    };
    wait_for(
        PATIENCE,
        || format!("n1's tunnel to keep its address; it has {:?}", tunnel()),
        || tunnel().trim() == TUNNEL,
    )
}

fn shapes(stage: &Stage) -> Result<()> {
    let (blocks, affinities) = (
        stored(&stage.cluster, "ipamblocks")?,
        stored(&stage.cluster, "blockaffinities")?,
    );
    let handles = stored(&stage.cluster, "ipamhandles")?;
    let mut held: BTreeMap<String, String> = BTreeMap::new();
    for (name, object) in &blocks {
        let block = Block::parse(serde_json::from_value(object["spec"].clone())?)?;
        let cidr = block.cidr().to_string();
        ensure!(
            *name == cidr.replace(['.', '/'], "-"),
            "block {cidr} is called {name}"
        );
        let node = block
            .node()
            .with_context(|| format!("{cidr} is nobody's"))?
            .to_owned();
        let affinity = one(&affinities, &format!("{node}-{name}"))?;
        ensure!(
            affinity["spec"]["deleted"] == "false" && affinity["spec"]["state"] == "confirmed",
            "{affinity}"
        );
        ensure!(affinity["metadata"]["annotations"].is_null(), "{affinity}");
        for (address, attribute) in block.allocated() {
            let handle = attribute.handle_id.clone().unwrap_or_default();
            let object = one(&handles, &handle.to_lowercase())?;
            ensure!(
                object["spec"]["handleID"] == handle && object["spec"]["block"][&cidr] == 1,
                "{object}"
            );
            let of = attribute.secondary.clone().unwrap_or_default();
            let node = of
                .get("node")
                .with_context(|| format!("{address} is of no node: {of:?}"))?;
            // Calico's too: the operator has found their nodes.
            ensure!(
                object["metadata"]["annotations"][ANNOTATION_HANDLE_NODE] == **node,
                "{node}: {object}"
            );
            if let (Some(namespace), Some(pod)) = (of.get("namespace"), of.get("pod")) {
                held.insert(format!("{namespace}/{pod}"), address.to_string());
            }
        }
    }
    ensure!(
        affinities.len() == blocks.len(),
        "{:?} for {:?}",
        affinities.keys(),
        blocks.keys()
    );
    for pod in &stage.world.pods {
        ensure!(
            held.get(&pod.name) == Some(&pod.address.to_string()),
            "{} is not in {held:?}",
            pod.name
        );
    }
    ensure!(
        held.get("gone/before-0").map(String::as_str) == Some(IN_USE),
        "Calico's own is lost: {held:?}"
    );
    Ok(())
}

fn old_policies(environment: &Environment) -> Result<()> {
    let mut expected = Matrix::open(&PODS, &demo::ports());
    for ((_, _, to), verdict) in &mut expected.cells {
        if to == "x/c" || to == "y/b" {
            *verdict = Verdict::Silent;
        }
    }
    policy::expect(environment, &expected)?;
    let cluster = &environment.stage.cluster;
    cluster.kubectl(&[
        "delete",
        "globalnetworkpolicies.crd.projectcalico.org",
        "default.closed",
    ])?;
    cluster.kubectl(&[
        "delete",
        "-n",
        "y",
        "networkpolicies.crd.projectcalico.org",
        "closed",
    ])?;
    policy::expect(environment, &Matrix::open(&PODS, &demo::ports()))
}

/// Pods of the world have started since, so it is ours that the runtime calls.
fn aside(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes()? {
        let files = node.exec(&["ls", CONF_DIR])?;
        let mut files: Vec<&str> = files.split_whitespace().collect();
        files.sort_unstable();
        ensure!(
            files == ["10-calico.conflist.margay-saved", "10-margay.conflist"],
            "{}: {files:?}",
            node.host.name
        );
    }
    Ok(())
}

/// The last case: its pods are lost with it.
fn departed(cluster: &Cluster) -> Result<()> {
    let left = || -> Result<Vec<String>> {
        let claims = stored(cluster, "blockaffinities")?
            .into_values()
            .filter(|claim| claim["spec"]["node"] == "n3");
        let mut left: Vec<String> = claims
            .map(|claim| claim["metadata"]["name"].to_string())
            .collect();
        for (name, object) in stored(cluster, "ipamblocks")? {
            let block = Block::parse(serde_json::from_value(object["spec"].clone())?)?;
            let of = |key: &str| key == "n3";
            let secondary = block
                .allocated()
                .filter_map(|(_, attribute)| attribute.secondary.clone());
            let holds = secondary
                .filter(|of_whom| of_whom.get("node").is_some_and(|node| of(node)))
                .count();
            if holds > 0 || block.node().is_some_and(of) {
                left.push(format!("block {name} with {holds} addresses"));
            }
        }
        let tunnels = stored(cluster, "ipamhandles")?
            .into_keys()
            .filter(|handle| handle == "vxlan-tunnel-addr-n3");
        left.extend(tunnels);
        Ok(left)
    };
    ensure!(
        left()?.len() >= 3,
        "n3 has a claim, a block and its tunnel's handle: {:?}",
        left()?
    );
    cluster.kubectl(&["delete", "node", "n3"])?;
    wait_for(
        DEPARTURE,
        || format!("what n3 had to be given back; left: {:?}", left()),
        || left().is_ok_and(|left| left.is_empty()),
    )?;
    let (blocks, claims) = (
        stored(cluster, "ipamblocks")?,
        stored(cluster, "blockaffinities")?,
    );
    ensure!(
        blocks.len() == claims.len() && blocks.contains_key("10-244-7-0-26"),
        "{:?} {:?}",
        blocks.keys(),
        claims.keys()
    );
    Ok(())
}

/// A pod that is created meanwhile waits, its events have the reason, and it starts when the lock
/// is gone.
fn locked(cluster: &Cluster) -> Result<()> {
    let lock = |ready: bool| {
        let patch = json!({"spec": {"datastoreReady": ready}}).to_string();
        let object = "clusterinformations.crd.projectcalico.org";
        cluster
            .kubectl(&["patch", object, "default", "--type=merge", "-p", &patch])
            .map(drop)
    };
    lock(false)?;
    let file = cluster.folder().join("late.json");
    std::fs::write(&file, world::server("x/late", "n2")?.to_string())?;
    cluster.kubectl(&["create", "-f", &file.display().to_string()])?;
    let has_event = || {
        let events = cluster.kubectl(&[
            "get",
            "events",
            "-n",
            "x",
            "--field-selector=involvedObject.name=late",
        ]);
        events.is_ok_and(|events| events.contains("datastoreReady false"))
    };
    let refused = wait_for(
        PATIENCE,
        || "an event with the reason why x/late does not start".into(),
        has_event,
    );
    lock(true)?;
    refused?;
    cluster.kubectl(&[
        "wait",
        "-n",
        "x",
        "--for=condition=Ready",
        "pod/late",
        "--timeout=60s",
    ])?;
    let handles = stored(cluster, "ipamhandles")?.len();
    cluster.kubectl(&["delete", "pod", "-n", "x", "late", "--wait=true"])?;
    let given_back = || stored(cluster, "ipamhandles").is_ok_and(|left| left.len() < handles);
    wait_for(
        PATIENCE,
        || "the address of x/late to be given back".into(),
        given_back,
    )
}
