//! `uninstall`: takes Margay out of a cluster in an order in which nothing hangs, and leaves
//! nothing on the nodes.
//!
//! First the Installation goes, and with it the garbage collector removes agents and typha; what is
//! in the kernels stays until then and after. Then a DaemonSet cleans every node: what isolates
//! pods stays on a node until its last pod has gone, and meanwhile the plugin lets pods be deleted.
//! Then the operator goes, and the definitions with Calico's data only when that is asked for.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{
    DeleteParams, DynamicObject, ListParams, LogParams, Patch, PatchParams, PostParams,
};
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
/// Name of the DaemonSet that cleans, and of its containers.
const CLEANER: &str = "margay-clean";
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
/// Groups of the definitions that an installation brings.
const GROUPS: [&str; 2] = ["operator.tigera.io", "projectcalico.org"];
/// Pods that a message names.
const NAMED: usize = 10;
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(500);
/// Folders of the host: those of the agent, mounted as in its DaemonSet.
const FOLDERS: [(&str, &str, &str); 2] = [
    ("state", "/var/lib/margay", "/var/lib/margay"),
    ("run", "/var/run/margay", "/var/run/margay"),
];
/// Where the folders of the CNI configuration and of plugins are in the container.
const HOST_CONF: &str = "/host/etc/cni/net.d";
const HOST_BIN: &str = "/host/opt/cni/bin";

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
    let image = image(&client).await?;
    let folders = folders(&client).await?;

    let installations = live::resource("operator.tigera.io", "v1", "Installation", "installations");
    let installations: Api<DynamicObject> = Api::all_with(client.clone(), &installations);
    delete(&installations, "default").await?;
    gone(&installations, "default", limit()).await?;
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

    done.extend(clean(&client, &image, &folders, limit()).await?);
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
    remove_rights(&client).await?;
    done.push("the operator and its rights".to_owned());
    if args.crds {
        let count = remove_definitions(&client, cluster.mode(), limit()).await?;
        done.push(format!("{count} definitions with their objects"));
    }
    Ok(done)
}

/// The image that the operator runs, which has the program that cleans.
async fn image(client: &Client) -> Result<String> {
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), OPERATOR);
    let operator = deployments.get_opt(OPERATOR).await.map_err(explained)?;
    let operator = operator.with_context(|| {
        format!(
            "there is no Deployment {OPERATOR}/{OPERATOR}, whose image cleans the nodes; apply \
             deploy/operator.yaml and run this again"
        )
    })?;
    let pod = operator.spec.template.spec;
    let image = pod.and_then(|pod| pod.containers.into_iter().next()?.image);
    image.context("the Deployment of the operator names no image")
}

/// Folders of the host with configurations and plugins, as the agents have them.
async fn folders(client: &Client) -> Result<[String; 2]> {
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), SYSTEM);
    let agents = sets.get_opt("margay-node").await.map_err(explained)?;
    let agents = serde_json::to_value(agents)?;
    let path = |name: &str, usual: &str| {
        let volumes = agents["spec"]["template"]["spec"]["volumes"].as_array();
        let found = volumes
            .into_iter()
            .flatten()
            .find(|volume| volume["name"] == name);
        let path = found.and_then(|volume| volume["hostPath"]["path"].as_str());
        path.unwrap_or(usual).to_owned()
    };
    Ok([
        path("cni-conf", "/etc/cni/net.d"),
        path("cni-bin", "/opt/cni/bin"),
    ])
}

/// Cleans every node, and returns what the nodes say.
async fn clean(
    client: &Client,
    image: &str,
    folders: &[String; 2],
    end: Instant,
) -> Result<Vec<String>> {
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), OPERATOR);
    delete(&sets, CLEANER).await?;
    gone(&sets, CLEANER, end).await?;
    let set = serde_json::from_value(cleaner(image, folders))?;
    sets.create(&PostParams::default(), &set)
        .await
        .map_err(explained)?;
    let mut left = Vec::new();
    let cleaned = wait(end, "every node to be cleaned", async || {
        let set = sets.get(CLEANER).await.map_err(explained)?;
        let status = set.status.unwrap_or_default();
        Ok(status.observed_generation.is_some()
            && status.number_ready >= status.desired_number_scheduled
            && status.desired_number_scheduled > 0)
    })
    .await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), OPERATOR);
    let params = ListParams::default().labels(&format!("app.kubernetes.io/name={CLEANER}"));
    for pod in pods.list(&params).await.map_err(explained)?.items {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        let params = LogParams {
            container: Some(CLEANER.to_owned()),
            ..LogParams::default()
        };
        let log = pods
            .logs(&pod.name_any(), &params)
            .await
            .unwrap_or_default();
        let node = node.unwrap_or_default();
        left.extend(log.lines().map(|line| format!("{node}: {line}")));
    }
    if let Err(error) = cleaned {
        bail!(
            "{error:#}; DaemonSet {OPERATOR}/{CLEANER} goes on cleaning, run this again later\n{}",
            left.join("\n")
        );
    }
    delete(&sets, CLEANER).await?;
    gone(&sets, CLEANER, end).await?;
    Ok(left)
}

fn cleaner(image: &str, [conf, bin]: &[String; 2]) -> Value {
    let labels = json!({"app.kubernetes.io/name": CLEANER});
    let folders = FOLDERS.map(|(name, host, inside)| (name, host.to_owned(), inside));
    let folders = folders.into_iter().chain([
        ("cni-conf", conf.clone(), HOST_CONF),
        ("cni-bin", bin.clone(), HOST_BIN),
    ]);
    let (volumes, mounts): (Vec<Value>, Vec<Value>) = folders
        .map(|(name, host, inside)| {
            let path = json!({"path": host, "type": "DirectoryOrCreate"});
            (
                json!({"name": name, "hostPath": path}),
                json!({"name": name, "mountPath": inside}),
            )
        })
        .unzip();
    let container = |name: &str, command: &[&str]| {
        json!({
            "name": name, "image": image, "imagePullPolicy": "IfNotPresent",
            "command": command,
            "env": [
                {"name": "MARGAY_CNI_CONF_DIR", "value": HOST_CONF},
                {"name": "MARGAY_CNI_BIN_DIR", "value": HOST_BIN},
            ],
            "securityContext": {
                "privileged": true, "readOnlyRootFilesystem": true, "runAsUser": 0,
            },
            "volumeMounts": mounts,
        })
    };
    json!({
        "metadata": {"name": CLEANER, "labels": labels},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "hostNetwork": true,
                    "automountServiceAccountToken": false,
                    "priorityClassName": "system-node-critical",
                    "terminationGracePeriodSeconds": 1,
                    "nodeSelector": {"kubernetes.io/os": "linux"},
                    "tolerations": [{"operator": "Exists"}],
                    "initContainers": [container(CLEANER, &["/margay", "clean"])],
                    "containers": [container("done", &["/margay", "clean", "--idle"])],
                    "volumes": volumes,
                },
            },
        },
    })
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
        if !ANNOTATIONS.iter().any(|name| has(&name)) {
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

async fn remove_rights(client: &Client) -> Result<()> {
    use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
    delete(&Api::<ClusterRoleBinding>::all(client.clone()), OPERATOR).await?;
    delete(&Api::<ClusterRole>::all(client.clone()), OPERATOR).await
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
    fn the_cleaner_is_a_valid_daemon_set_with_the_folders_of_the_agents() {
        let folders = ["/etc/other".to_owned(), "/opt/cni/bin".to_owned()];
        let value = cleaner("image:1", &folders);
        let set: DaemonSet = serde_json::from_value(value).expect("a DaemonSet");
        let pod = set.spec.template.spec.expect("a pod");
        let volumes = pod.volumes.expect("volumes");
        let paths: Vec<String> = volumes
            .into_iter()
            .filter_map(|volume| Some(volume.host_path?.path))
            .collect();
        assert_eq!(
            paths,
            [
                "/var/lib/margay",
                "/var/run/margay",
                "/etc/other",
                "/opt/cni/bin"
            ]
        );
        assert_eq!(
            pod.init_containers.expect("a container")[0]
                .image
                .as_deref(),
            Some("image:1")
        );
    }

    #[test]
    fn only_our_finalizer_keeps_a_pool() {
        let pool = |finalizer: &str| json!({"metadata": {"finalizers": [finalizer]}});
        assert!(is_kept(&pool(FINALIZER)));
        assert!(!is_kept(&pool("others")));
        assert!(!is_kept(&json!({"metadata": {}})));
    }
}
