//! The DaemonSet that cleans every node: `margay clean` of the operator's image in an init
//! container, so that its pods are ready when their nodes are clean.

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, LogParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{OPERATOR, SYSTEM, delete, gone, wait};
use crate::live::explained;

/// Name of the DaemonSet that cleans, and of its containers.
const CLEANER: &str = "margay-clean";
/// Folders of the host: those of the agent, mounted as in its DaemonSet.
const FOLDERS: [(&str, &str, &str); 2] = [
    ("state", "/var/lib/margay", "/var/lib/margay"),
    ("run", "/var/run/margay", "/var/run/margay"),
];
/// Where the folders of the CNI configuration and of plugins are in the container.
const HOST_CONF: &str = "/host/etc/cni/net.d";
const HOST_BIN: &str = "/host/opt/cni/bin";

/// The image that the operator runs, which has the program that cleans.
pub(super) async fn image(client: &Client) -> Result<String> {
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
pub(super) async fn folders(client: &Client) -> Result<[String; 2]> {
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
pub(super) async fn clean(
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
