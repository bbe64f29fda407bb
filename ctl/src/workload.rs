//! Pods, and workloads as the pod that stands for all of theirs.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use margay_api::endpoint::{EndpointKey, WorkloadEndpoint};
use margay_api::k8s::pod::workload_endpoint;
use margay_api::rule::Protocol;
use serde_json::{Value, json};

/// Node of pods that name none.
const NODE: &str = "unscheduled";
/// Service account of pods that name none, as the API server fills in.
const SERVICE_ACCOUNT: &str = "default";

/// Workloads: API version, kind, and where the template of the pod is.
const WORKLOADS: [(&str, &str, &str); 7] = [
    ("apps/v1", "Deployment", "/spec/template"),
    ("apps/v1", "StatefulSet", "/spec/template"),
    ("apps/v1", "DaemonSet", "/spec/template"),
    ("apps/v1", "ReplicaSet", "/spec/template"),
    ("v1", "ReplicationController", "/spec/template"),
    ("batch/v1", "Job", "/spec/template"),
    ("batch/v1", "CronJob", "/spec/jobTemplate/spec/template"),
];

/// A pod.
#[derive(Clone, Debug)]
pub struct PodObject {
    /// Its name.
    pub key: EndpointKey,
    /// Its endpoint; `None` if it uses its host's network.
    pub endpoint: Option<WorkloadEndpoint>,
    /// True if it has not run to its end: then it has addresses, even if they are not known.
    pub is_alive: bool,
    /// Ports that its containers declare, with names or without.
    pub ports: BTreeSet<(Protocol, u16)>,
}

/// A pod of the cluster.
#[derive(Clone, Debug)]
pub struct ClusterPod {
    /// Its endpoint; `None` if it uses its host's network.
    pub endpoint: Option<WorkloadEndpoint>,
    /// Ports that its containers declare.
    pub ports: BTreeSet<(Protocol, u16)>,
}

impl PodObject {
    /// Returns true if the pod has all the labels of this one, which stands for those of a
    /// workload.
    pub fn may_own(&self, pod: &Self) -> bool {
        let (Some(template), Some(other)) = (&self.endpoint, &pod.endpoint) else {
            return false;
        };
        self.key.namespace == pod.key.namespace
            && template
                .labels
                .iter()
                .all(|(key, value)| other.labels.get(key) == Some(value))
    }
}

/// Returns true for the kinds that have a template of their pods.
pub fn is_workload(api_version: &str, kind: &str) -> bool {
    template_path(api_version, kind).is_some()
}

fn template_path(api_version: &str, kind: &str) -> Option<&'static str> {
    let found = WORKLOADS
        .iter()
        .find(|(version, known, _)| (*version, *known) == (api_version, kind));
    found.map(|(_, _, path)| *path)
}

/// Reads a pod whose namespace is set. One that is not scheduled counts as if it were: offline no
/// pod is.
pub fn of_pod(mut value: Value) -> Result<PodObject> {
    ensure!(
        value["spec"].is_object() || value["spec"].is_null(),
        "Pod: spec: must be a map"
    );
    for (field, filler) in [("nodeName", NODE), ("serviceAccountName", SERVICE_ACCOUNT)] {
        let spec = &mut value["spec"];
        if spec[field].as_str().is_none_or(str::is_empty) {
            spec[field] = filler.into();
        }
    }
    let generated = value["metadata"]["generateName"].take();
    if value["metadata"]["name"].is_null() {
        value["metadata"]["name"] = generated;
    }
    let pod: Pod = serde_json::from_value(value).context("Pod: not what its kind is")?;
    let meta = &pod.metadata;
    let key = EndpointKey::new(
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    );
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    Ok(PodObject {
        key,
        endpoint: workload_endpoint(&pod).map(|(_, endpoint)| endpoint),
        is_alive: !matches!(phase, Some("Succeeded" | "Failed")),
        ports: ports(&pod),
    })
}

/// Reads a workload as one pod of its name: all of its pods have the same labels, account and
/// ports.
pub fn of_workload(key: &EndpointKey, mut value: Value) -> Result<PodObject> {
    let text = |field: &str| value[field].as_str().unwrap_or_default();
    let path = template_path(text("apiVersion"), text("kind")).unwrap_or_default();
    let mut template = value
        .pointer_mut(path)
        .map(Value::take)
        .with_context(|| format!("{path}: missing; a workload has a template of its pods"))?;
    ensure!(template.is_object(), "{path}: must be a map");
    let mut metadata = template["metadata"].take();
    if !metadata.is_object() {
        metadata = json!({});
    }
    metadata["name"] = key.name.as_str().into();
    metadata["namespace"] = key.namespace.as_str().into();
    of_pod(json!({"metadata": metadata, "spec": template["spec"].take()}))
}

fn ports(pod: &Pod) -> BTreeSet<(Protocol, u16)> {
    let spec = pod.spec.iter();
    let containers = spec.flat_map(|spec| {
        spec.init_containers
            .iter()
            .flatten()
            .chain(&spec.containers)
    });
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    let port = |port: &k8s_openapi::api::core::v1::ContainerPort| {
        let number = u16::try_from(port.container_port)
            .ok()
            .filter(|port| *port > 0)?;
        Some((protocol(port.protocol.as_deref())?, number))
    };
    ports.filter_map(port).collect()
}

/// Returns the protocol of a port by its name in Kubernetes; TCP if there is none.
pub fn protocol(name: Option<&str>) -> Option<Protocol> {
    match name.unwrap_or_default() {
        "" | "TCP" => Some(Protocol::TCP),
        "UDP" => Some(Protocol::UDP),
        "SCTP" => Some(Protocol::SCTP),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_a_pod_of_its_template() {
        let name = EndpointKey::new("n", "c");
        let container = json!({
            "name": "c",
            "ports": [
                {"containerPort": 53, "protocol": "UDP"}, {"containerPort": 80, "name": "http"},
            ],
        });
        let template = json!({
            "metadata": {"labels": {"app": "x"}},
            "spec": {"containers": [container], "serviceAccountName": "s"},
        });
        let job = json!({
            "apiVersion": "batch/v1", "kind": "CronJob",
            "spec": {"jobTemplate": {"spec": {"template": template}}},
        });
        let pod = of_workload(&name, job).expect("a workload");
        let endpoint = pod.endpoint.expect("not on the host's network");
        assert_eq!(
            (
                pod.key.to_string().as_str(),
                endpoint.labels["app"].as_str()
            ),
            ("n/c", "x")
        );
        assert_eq!(
            (endpoint.service_account.as_str(), endpoint.node.as_str()),
            ("s", NODE)
        );
        assert_eq!(
            pod.ports,
            BTreeSet::from([(Protocol::TCP, 80), (Protocol::UDP, 53)])
        );
        assert!(of_workload(&name, json!({"apiVersion": "batch/v1", "kind": "CronJob"})).is_err());
    }

    #[test]
    fn pods_of_the_host_and_finished_ones_are_recognised() {
        let pod = |spec: Value, phase: &str| {
            let metadata = json!({"name": "p", "namespace": "n"});
            of_pod(json!({"metadata": metadata, "spec": spec, "status": {"phase": phase}}))
                .expect("a pod")
        };
        assert!(
            pod(json!({"containers": [], "hostNetwork": true}), "Running")
                .endpoint
                .is_none()
        );
        assert!(!pod(json!({"containers": []}), "Succeeded").is_alive);
        let named = pod(json!({"containers": [], "nodeName": "n1"}), "Running")
            .endpoint
            .expect("an endpoint");
        assert_eq!(named.node, "n1");
    }
}
