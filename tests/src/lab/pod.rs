//! A pod: a network namespace that the real CNI binary attaches.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_api::meta::{ANNOTATION_POD_IP, ANNOTATION_POD_IPS};
use serde_json::{Value, json};

use super::node::Node;
use crate::namespace::Namespace;
use crate::plugin::Call;
use crate::probe::Place;

/// Key of the network configuration under which runtimes that support it pass the pod's
/// annotations.
const POD_ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// Pods of this process so far: their container ids and uids differ.
static PODS: AtomicU32 = AtomicU32::new(0);

/// A pod that runs.
pub struct Pod {
    /// `namespace/name`.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its network.
    pub namespace: Namespace,
    pub(super) manifest: Value,
    container: String,
}

/// The manifest with what API server and scheduler put into it.
pub(super) fn scheduled(manifest: &Value, node: &str) -> Result<Value> {
    let mut object = manifest.clone();
    for field in ["namespace", "name"] {
        ensure!(
            object["metadata"][field].is_string(),
            "metadata.{field} of the pod is missing"
        );
    }
    let number = PODS.fetch_add(1, Ordering::Relaxed);
    object["apiVersion"] = "v1".into();
    object["kind"] = "Pod".into();
    object["metadata"]["uid"] = format!("00000000-0000-4000-8000-{number:012}").into();
    object["spec"]["nodeName"] = node.into();
    for (field, default) in [
        ("serviceAccountName", json!("default")),
        ("containers", json!([])),
    ] {
        if object["spec"][field].is_null() {
            object["spec"][field] = default;
        }
    }
    Ok(object)
}

/// The host ports of the pod's containers, as containerd passes them.
fn port_mappings(manifest: &Value) -> Vec<Value> {
    let containers = manifest["spec"]["containers"]
        .as_array()
        .into_iter()
        .flatten();
    let ports = containers
        .filter_map(|container| container["ports"].as_array())
        .flatten();
    let mapping = |port: &Value| {
        let protocol = port["protocol"].as_str().unwrap_or("TCP").to_lowercase();
        json!({
            "hostPort": port["hostPort"], "containerPort": port["containerPort"],
            "protocol": protocol, "hostIP": port["hostIP"].as_str().unwrap_or_default(),
        })
    };
    ports
        .filter(|port| port["hostPort"].is_u64())
        .map(mapping)
        .collect()
}

impl Pod {
    /// Attaches a pod whose object is there.
    pub(super) fn start(node: &Node, manifest: &Value) -> Result<Self> {
        let text = |pointer: &str| {
            manifest
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let name = format!("{}/{}", text("/metadata/namespace"), text("/metadata/name"));
        let mut pod = Self {
            container: text("/metadata/uid").replace('-', ""),
            name,
            node: node.name.clone(),
            addresses: Vec::new(),
            namespace: Namespace::new()?,
            manifest: manifest.clone(),
        };
        let answer = pod
            .call(node)?
            .exec("ADD")?
            .success()
            .with_context(|| format!("ADD of {}", pod.name))?;
        let addresses = answer["ips"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|ip| ip["address"].as_str());
        pod.addresses = addresses
            .map(|net| Ok(net.parse::<IpNet>()?.addr()))
            .collect::<Result<_>>()?;
        ensure!(
            !pod.addresses.is_empty(),
            "{} has no address: {answer}",
            pod.name
        );
        Ok(pod)
    }

    /// Detaches it.
    pub(super) fn stop(&self, node: &Node) -> Result<()> {
        self.call(node)?
            .exec("DEL")?
            .success()
            .map(drop)
            .with_context(|| format!("DEL of {}", self.name))
    }

    /// The calls of the plugin for this pod.
    fn call(&self, node: &Node) -> Result<Call> {
        let mut call = Call::new(
            &node.socket(),
            &self.name,
            &self.container,
            &self.namespace.path(),
        )?;
        call.config["runtimeConfig"] = json!({
            POD_ANNOTATIONS: self.manifest["metadata"]["annotations"],
            "portMappings": port_mappings(&self.manifest),
        });
        let uid = self.manifest["metadata"]["uid"]
            .as_str()
            .unwrap_or_default();
        call.arguments = format!("{};K8S_POD_UID={uid}", call.arguments);
        Ok(call)
    }

    /// The Pod object as it is once the pod runs.
    pub fn object(&self) -> Value {
        let mut object = self.manifest.clone();
        let join = |separator: &str| {
            let nets = self
                .addresses
                .iter()
                .map(|address| IpNet::from(*address).to_string());
            nets.collect::<Vec<_>>().join(separator)
        };
        object["metadata"]["annotations"][ANNOTATION_POD_IP] = self
            .addresses
            .first()
            .map(|address| IpNet::from(*address).to_string())
            .into();
        object["metadata"]["annotations"][ANNOTATION_POD_IPS] = join(",").into();
        let ips: Vec<Value> = self
            .addresses
            .iter()
            .map(|address| json!({"ip": address}))
            .collect();
        object["status"] =
            json!({"phase": "Running", "podIP": self.addresses.first(), "podIPs": ips});
        object
    }

    /// Its network, to ask from.
    pub fn place(&self) -> Result<Place> {
        Place::of_namespace(&self.namespace)
    }
}
