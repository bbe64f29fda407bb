//! Problems that TigeraStatus reports, and what ends them.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use margay_tests::cluster::Cluster;
use margay_tests::cluster::process::wait_for;
use serde_json::{Value, json};

use crate::RECOVERY;
use crate::observe::{apply, delete};

pub fn overlapping(cluster: &Cluster) -> Result<()> {
    let pool = json!({
        "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
        "metadata": {"name": "overlaps"}, "spec": {"cidr": "10.244.0.0/28", "blockSize": 29},
    });
    apply(cluster, "overlaps", &[pool])?;
    let condition = |pool: &str| {
        let path = r#"jsonpath={.status.conditions[?(@.type=="Allocatable")]}"#;
        cluster
            .kubectl(&["get", "ippools.projectcalico.org", pool, "-o", path])
            .unwrap_or_default()
    };
    let reported = wait_for_messages(cluster, "ippools", |text| {
        text.contains("IPPool overlaps: its range 10.244.0.0/28 overlaps")
    });
    let (new, old) = (condition("overlaps"), condition("default-ipv4-ippool"));
    delete(cluster, &["overlaps"])?;
    reported?;
    ensure!(
        new.contains(r#""status":"False""#) && new.contains("CIDROverlap"),
        "the new pool: {new}"
    );
    ensure!(
        old.contains(r#""status":"True""#),
        "the pool that is in use: {old}"
    );
    wait_for_messages(cluster, "ippools", |text| !text.contains("overlaps"))
}

pub fn not_followed(cluster: &Cluster) -> Result<()> {
    let set = |fields: Value| {
        let patch = json!({ "spec": fields }).to_string();
        let object = "felixconfigurations.projectcalico.org";
        cluster
            .kubectl(&["patch", object, "default", "--type=merge", "-p", &patch])
            .map(drop)
    };
    set(json!({"wireguardEnabled": true, "natPortRange": "1000:2000"}))?;
    let is_reported = |text: &str| {
        let clear =
            "FelixConfiguration default, spec.wireguardEnabled is true: there is no WireGuard";
        text.contains(clear)
            && text.contains(
                "without effect: FelixConfiguration default, spec.natPortRange is 1000:2000",
            )
    };
    let reported = wait_for_messages(cluster, "calico", is_reported);
    set(json!({"wireguardEnabled": null, "natPortRange": null}))?;
    reported?;
    wait_for_messages(cluster, "calico", |text| {
        !text.contains("FelixConfiguration")
    })
}

pub fn bypassed(cluster: &Cluster) -> Result<()> {
    let (n3, file) = (cluster.node("n3")?, "/etc/cni/net.d/05-other.conflist");
    let other = r#"{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"bridge","ipam":{"type":"host-local"}}]}"#;
    n3.exec(&["sh", "-c", &format!("echo '{other}' > {file}")])?;
    let is_reported = |text: &str| {
        text.contains("n3") && text.contains("uses 05-other.conflist") && text.contains("bridge")
    };
    let reported = wait_for_messages(cluster, "calico", is_reported);
    n3.exec(&["rm", file])?;
    reported?;
    wait_for_messages(cluster, "calico", |text| !text.contains("05-other"))
}

pub fn put_back(cluster: &Cluster) -> Result<()> {
    let n3 = cluster.node("n3")?;
    for file in ["/etc/cni/net.d/10-margay.conflist", "/opt/cni/bin/margay"] {
        let before = n3.exec(&["sha256sum", file])?;
        n3.exec(&["rm", file])?;
        let is_back = || n3.exec(&["sha256sum", file]).is_ok_and(|now| now == before);
        wait_for(
            Duration::from_secs(30),
            || format!("{file} of n3 to be there again"),
            is_back,
        )?;
    }
    Ok(())
}

/// One node may run typha, of three: one replica, which is available, and the rollouts there and
/// back come to their end.
pub fn confined(cluster: &Cluster) -> Result<()> {
    let select = |node: Value| {
        let selector =
            json!({"spec": {"controlPlaneNodeSelector": {"kubernetes.io/hostname": node}}});
        cluster
            .kubectl(&[
                "patch",
                "installation",
                "default",
                "--type=merge",
                "-p",
                &selector.to_string(),
            ])
            .map(drop)
    };
    let state = || -> Result<(Value, BTreeSet<String>)> {
        let get = [
            "get",
            "deployment",
            "margay-typha",
            "-n",
            "margay-system",
            "-o",
            "json",
        ];
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
        let replicas = if is_over {
            found["spec"]["replicas"].clone()
        } else {
            Value::Null
        };
        Ok((
            replicas,
            nodes.split_whitespace().map(str::to_owned).collect(),
        ))
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

/// Waits until the messages of a TigeraStatus match.
fn wait_for_messages(
    cluster: &Cluster,
    status: &str,
    is_reported: impl Fn(&str) -> bool,
) -> Result<()> {
    let messages = || {
        cluster.kubectl(&[
            "get",
            "tigerastatus",
            status,
            "-o",
            "jsonpath={.status.conditions[*].message}",
        ])
    };
    let mut text = String::new();
    let waited = wait_for(
        Duration::from_secs(60),
        || format!("TigeraStatus {status} to report it"),
        || {
            text = messages().unwrap_or_default();
            !text.is_empty() && is_reported(&text)
        },
    );
    waited.with_context(|| format!("its messages: {text}"))
}
