//! `uninstall`: takes Margay out of a cluster in an order in which nothing hangs, and leaves
//! nothing on the nodes.
//!
//! First the Installation goes, and with it the garbage collector removes agents and typha; what is
//! in the kernels stays until then and after. Then a DaemonSet cleans every node: what isolates
//! pods stays on a node until its last pod has gone, and meanwhile the plugin lets pods be deleted.
//! Then the operator goes, and the definitions with Calico's data only when that is asked for.

mod cleaner;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::{Api, Client, Resource, ResourceExt};
use margay_api::storage::{Kind, Mode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::live::{self, Connection, ConnectionArgs, explained};
use crate::output::{Finding, Output};
use crate::report;

/// Namespaces of the components and of the operator.
const SYSTEM: &str = "margay-system";
const OPERATOR: &str = "margay-operator";
/// Finalizer of pools, as Calico calls it.
const FINALIZER: &str = "projectcalico.org/ippool-finalizer";
/// Prefixes of the annotations of nodes that agents write.
const ANNOTATIONS: [&str; 7] = [
    "projectcalico.org/IPv4Address",
    "projectcalico.org/IPv6Address",
    "projectcalico.org/IPv4VXLANTunnelAddr",
    "projectcalico.org/IPv6VXLANTunnelAddr",
    "projectcalico.org/VXLANTunnelMACAddr",
    "projectcalico.org/VXLANTunnelMACAddrV6",
    "projectcalico.org/Interfaces",
];
/// Kinds of rights and admission rules: group, version, kind, plural.
const CLUSTER_WIDE: [(&str, &str, &str, &str); 6] = [
    (
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRoleBinding",
        "clusterrolebindings",
    ),
    (
        "rbac.authorization.k8s.io",
        "v1",
        "ClusterRole",
        "clusterroles",
    ),
    (
        ADMISSION,
        "v1",
        "ValidatingAdmissionPolicyBinding",
        "validatingadmissionpolicybindings",
    ),
    (
        ADMISSION,
        "v1",
        "ValidatingAdmissionPolicy",
        "validatingadmissionpolicies",
    ),
    (
        ADMISSION,
        "v1",
        "MutatingAdmissionPolicyBinding",
        "mutatingadmissionpolicybindings",
    ),
    (
        ADMISSION,
        "v1",
        "MutatingAdmissionPolicy",
        "mutatingadmissionpolicies",
    ),
];
const ADMISSION: &str = "admissionregistration.k8s.io";
/// Prefix of the names of ours, and the one without it.
const PREFIX: &str = "margay-";
const TIERS: &str = "protect-builtin-tiers";
/// Groups of the definitions that an installation brings.
const GROUPS: [&str; 2] = ["operator.tigera.io", "projectcalico.org"];
/// Pods that a message names.
const NAMED: usize = 10;
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(500);
/// Arguments of the command.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Say what is there and what stands in the way, and change nothing.
    #[arg(long)]
    pub check: bool,
    /// Go on although pods are in the network: they keep it until they are deleted.
    #[arg(long)]
    pub force: bool,
    /// Delete the definitions too, and with them every pool, policy and address.
    #[arg(long)]
    pub crds: bool,
    /// Time limit of each step, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub timeout: u64,
    /// Form of the answer.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
    /// The cluster.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// What is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Installations.
    pub installations: Vec<String>,
    /// Pods that are in the network: NAMESPACE/NAME on NODE.
    pub pods: Vec<String>,
    /// Nodes to clean.
    pub nodes: Vec<String>,
    /// Pools that their finalizer keeps.
    pub kept_pools: Vec<String>,
    /// What has been done.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub done: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<Finding> {
    let (answer, holds) = live::block_on(async {
        let cluster = Connection::open(&args.connection).await?;
        let mut answer = look(&cluster).await?;
        if args.check {
            let holds = answer.pods.is_empty();
            return Ok((answer, holds));
        }
        ensure!(
            answer.pods.is_empty() || args.force,
            "{}delete or drain them; with --force they keep the network until they are deleted",
            in_the_way(&answer.pods)
        );
        answer.done = remove(&cluster, args).await?;
        Ok((answer, true))
    })?;
    let text = match args.output {
        Output::Tree => show(&answer, args.check),
        Output::Json => report::json(&answer)?,
    };
    Ok(Finding { text, holds })
}

async fn look(cluster: &Connection) -> Result<Answer> {
    let name = |object: &Value| {
        object["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let installations = live::resource("operator.tigera.io", "v1", "Installation", "installations");
    let installations = cluster.list(&installations, None).await?;
    let pods = cluster
        .list(&live::resource("", "v1", "Pod", "pods"), None)
        .await?;
    let nodes = cluster
        .list(&live::resource("", "v1", "Node", "nodes"), None)
        .await?;
    let nodes = nodes
        .iter()
        .filter(|node| node["metadata"]["labels"]["kubernetes.io/os"] == "linux");
    let kept = pools(cluster).await?.into_iter().filter(is_kept);
    Ok(Answer {
        installations: installations.iter().map(name).collect(),
        pods: pods.iter().filter_map(in_network).collect(),
        nodes: nodes.map(name).collect(),
        kept_pools: kept.map(|pool| name(&pool)).collect(),
        done: Vec::new(),
    })
}

async fn pools(cluster: &Connection) -> Result<Vec<Value>> {
    let kind = Kind::of("IPPool").context("one of Calico's kinds")?;
    cluster.list(&kind.resource(cluster.mode()), None).await
}

fn is_kept(pool: &Value) -> bool {
    let finalizers = pool["metadata"]["finalizers"].as_array();
    finalizers
        .into_iter()
        .flatten()
        .any(|finalizer| finalizer == FINALIZER)
}

/// A pod with an address of the network, and its place.
fn in_network(pod: &Value) -> Option<String> {
    let is_over = matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    );
    let node = pod["spec"]["nodeName"].as_str()?;
    if is_over || pod["spec"]["hostNetwork"] == true || pod["status"]["podIP"].is_null() {
        return None;
    }
    let metadata = |field: &str| pod["metadata"][field].as_str().unwrap_or_default();
    Some(format!(
        "{}/{} on {node}",
        metadata("namespace"),
        metadata("name")
    ))
}

fn in_the_way(pods: &[String]) -> String {
    let mut text = format!("{} pods are in the network:\n", pods.len());
    pods.iter()
        .take(NAMED)
        .for_each(|pod| text += &format!("  {pod}\n"));
    if pods.len() > NAMED {
        text += &format!("  and {} more\n", pods.len() - NAMED);
    }
    text
}

async fn remove(cluster: &Connection, args: &Args) -> Result<Vec<String>> {
    let client = cluster.client().clone();
    let limit = || Instant::now() + Duration::from_secs(args.timeout);
    let mut done = Vec::new();
    // Read before it goes: the cleaner needs what the agents had.
    let image = cleaner::image(&client).await?;
    let folders = cleaner::folders(&client).await?;

    let installations = live::resource("operator.tigera.io", "v1", "Installation", "installations");
    let installations: Api<DynamicObject> = Api::all_with(client.clone(), &installations);
    delete(&installations, "default").await?;
    gone(&installations, "default", limit()).await?;
    // Where the components come from a manifest, nobody else deletes them.
    delete(
        &Api::<DaemonSet>::namespaced(client.clone(), SYSTEM),
        "margay-node",
    )
    .await?;
    delete(
        &Api::<Deployment>::namespaced(client.clone(), SYSTEM),
        "margay-typha",
    )
    .await?;
    let agents: Api<Pod> = Api::namespaced(client.clone(), SYSTEM);
    wait(limit(), "agents and typha to end", async || {
        let left = agents
            .list(&ListParams::default())
            .await
            .map_err(explained)?
            .items;
        Ok(left.is_empty())
    })
    .await?;
    done.push("the Installation, and with it agents, typha and their rights".to_owned());

    done.extend(cleaner::clean(&client, &image, &folders, limit()).await?);
    if cluster.mode() == Mode::V3 {
        release_pools(cluster).await?;
    }
    let annotated = strip_nodes(&client).await?;
    done.push(format!("annotations of {annotated} nodes"));

    for name in [SYSTEM, OPERATOR] {
        let namespaces: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(client.clone());
        delete(&namespaces, name).await?;
        gone(&namespaces, name, limit()).await?;
        done.push(format!("namespace {name}"));
    }
    remove_rights(cluster).await?;
    done.push("the operator and its rights".to_owned());
    if args.crds {
        let count = remove_definitions(&client, cluster.mode(), limit()).await?;
        done.push(format!("{count} definitions with their objects"));
    }
    Ok(done)
}

/// Removes the finalizer of pools, as the operator does without an Installation; it may be gone.
async fn release_pools(cluster: &Connection) -> Result<()> {
    let kind = Kind::of("IPPool").context("one of Calico's kinds")?;
    let api: Api<DynamicObject> =
        Api::all_with(cluster.client().clone(), &kind.resource(cluster.mode()));
    for pool in pools(cluster).await?.into_iter().filter(is_kept) {
        let metadata = &pool["metadata"];
        let finalizers = metadata["finalizers"].as_array().into_iter().flatten();
        let others: Vec<&Value> = finalizers.filter(|one| *one != FINALIZER).collect();
        let patch = json!({"metadata": {
            "resourceVersion": metadata["resourceVersion"], "finalizers": others,
        }});
        let name = metadata["name"].as_str().unwrap_or_default();
        match api
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
        {
            // The operator has been faster.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            written => drop(written.map_err(explained)?),
        }
    }
    Ok(())
}

/// Removes the annotations of agents; returns how many nodes had any.
async fn strip_nodes(client: &Client) -> Result<usize> {
    let nodes: Api<Node> = Api::all(client.clone());
    let mut count = 0;
    for node in nodes
        .list(&ListParams::default())
        .await
        .map_err(explained)?
        .items
    {
        let has = |name: &&str| node.annotations().contains_key(*name);
        if !ANNOTATIONS.iter().any(has) {
            continue;
        }
        let none: serde_json::Map<String, Value> = ANNOTATIONS
            .iter()
            .map(|name| ((*name).to_owned(), Value::Null))
            .collect();
        let patch = Patch::Merge(json!({"metadata": {"annotations": none}}));
        let name = node.name_any();
        nodes
            .patch(&name, &PatchParams::default(), &patch)
            .await
            .map_err(explained)?;
        count += 1;
    }
    Ok(count)
}

/// Deletes what belongs to no namespace: rights and admission rules. With an Installation most of
/// it has gone already.
async fn remove_rights(cluster: &Connection) -> Result<()> {
    for (group, version, kind, plural) in CLUSTER_WIDE {
        let resource = live::resource(group, version, kind, plural);
        let api: Api<DynamicObject> = Api::all_with(cluster.client().clone(), &resource);
        for object in cluster.list(&resource, None).await? {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            if name.starts_with(PREFIX) || name == TIERS {
                delete(&api, name).await?;
            }
        }
    }
    Ok(())
}

/// Deletes the definitions that came with the operator; of the older storage only its own.
async fn remove_definitions(client: &Client, mode: Mode, end: Instant) -> Result<usize> {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let all = definitions
        .list(&ListParams::default())
        .await
        .map_err(explained)?
        .items;
    let groups = if mode == Mode::V3 {
        &GROUPS[..]
    } else {
        &GROUPS[..1]
    };
    let is_ours = |one: &CustomResourceDefinition| groups.contains(&one.spec.group.as_str());
    let ours: Vec<String> = all
        .iter()
        .filter(|one| is_ours(one))
        .map(ResourceExt::name_any)
        .collect();
    for name in &ours {
        delete(&definitions, name).await?;
    }
    for name in &ours {
        gone(&definitions, name, end).await?;
    }
    Ok(ours.len())
}

/// Deletes an object that may be gone.
async fn delete<K>(api: &Api<K>, name: &str) -> Result<()>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    match api.delete(name, &DeleteParams::foreground()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        deleted => deleted.map(drop).map_err(explained),
    }
}

async fn gone<K>(api: &Api<K>, name: &str, end: Instant) -> Result<()>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    wait(end, &format!("{name} to be gone"), async || {
        match api.get_opt(name).await {
            // Its kind may be gone with it.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(true),
            found => Ok(found.map_err(explained)?.is_none()),
        }
    })
    .await
}

async fn wait(end: Instant, what: &str, is_so: impl AsyncFn() -> Result<bool>) -> Result<()> {
    while !is_so().await? {
        ensure!(Instant::now() < end, "waited in vain for {what}");
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

fn show(answer: &Answer, is_check: bool) -> String {
    if !is_check {
        return answer
            .done
            .iter()
            .map(|line| format!("removed: {line}\n"))
            .collect();
    }
    let list = |names: &[String]| match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let mut text = format!("Installation: {}\n", list(&answer.installations));
    text += &format!("nodes to clean: {}\n", list(&answer.nodes));
    text += &format!(
        "pools with a finalizer, which is removed: {}\n",
        list(&answer.kept_pools)
    );
    match answer.pods.as_slice() {
        [] => text += "no pods are in the network: nothing stands in the way\n",
        pods => text += &format!("in the way: {}", in_the_way(pods)),
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_of_the_network_are_those_with_an_address_of_it() {
        let pod = |host: bool, phase: &str| {
            json!({
                "metadata": {"namespace": "x", "name": "a"},
                "spec": {"nodeName": "n1", "hostNetwork": host},
                "status": {"phase": phase, "podIP": "10.0.0.1"},
            })
        };
        assert_eq!(
            in_network(&pod(false, "Running")).as_deref(),
            Some("x/a on n1")
        );
        assert_eq!(in_network(&pod(true, "Running")), None);
        assert_eq!(in_network(&pod(false, "Succeeded")), None);
        assert_eq!(
            in_network(&json!({"spec": {"nodeName": "n1"}})),
            None,
            "without an address"
        );
    }

    #[test]
    fn a_check_says_what_stands_in_the_way() {
        let answer = Answer {
            installations: vec!["default".to_owned()],
            pods: vec!["x/a on n1".to_owned()],
            nodes: vec!["n1".to_owned(), "n2".to_owned()],
            ..Answer::default()
        };
        expect_test::expect![[r#"
            Installation: default
            nodes to clean: n1, n2
            pools with a finalizer, which is removed: none
            in the way: 1 pods are in the network:
              x/a on n1
        "#]]
        .assert_eq(&show(&answer, true));
    }

    #[test]
    fn only_our_finalizer_keeps_a_pool() {
        let pool = |finalizer: &str| json!({"metadata": {"finalizers": [finalizer]}});
        assert!(is_kept(&pool(FINALIZER)));
        assert!(!is_kept(&pool("others")));
        assert!(!is_kept(&json!({"metadata": {}})));
    }
}
