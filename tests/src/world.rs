//! The pods that scenarios talk about: nine in two namespaces over the nodes, each serving, each
//! reachable for questions from inside.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use margay_api::rule::IpVersion;
use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::image::{Entry, Image};
use crate::probe::{self, Place, Protocol};

/// Ports of every pod; the names are those of its container's ports.
pub const PORTS: [(&str, Protocol, u16); 3] = [
    ("web", Protocol::Tcp, 80),
    ("admin", Protocol::Tcp, 81),
    ("dns", Protocol::Udp, 53),
];
/// The pods of the usual world.
pub const PODS: [&str; 9] = [
    "x/a", "x/b", "x/c", "x/d", "x/e", "y/a", "y/b", "y/c", "y/d",
];
/// Environment variable by which a pod's process is found; its value is the pod's UID.
const MARK: &str = "MARGAY_POD";
/// Time limit for pods to be ready on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    /// `namespace/name`.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address, if it has one.
    pub address_v6: Option<Ipv6Addr>,
    /// Its network.
    pub place: Place,
}

/// Pods that run, by name.
#[derive(Debug)]
pub struct World {
    /// Pods in the order of their names.
    pub pods: Vec<Pod>,
    /// The IP version by which pods ask each other.
    pub version: IpVersion,
}

impl World {
    /// Creates the namespaces and pods of the usual world and waits until all run.
    pub fn create(cluster: &Cluster) -> Result<Self> {
        cluster.kubectl(&["apply", "-f", &manifest(cluster)?.display().to_string()])?;
        for namespace in namespaces() {
            let limit = format!("--timeout={}s", PATIENCE.as_secs());
            cluster.kubectl(&[
                "wait",
                "-n",
                namespace,
                "--for=condition=Ready",
                "pod",
                "--all",
                &limit,
            ])?;
        }
        Self::find(cluster, &PODS)
    }

    /// Finds pods that run already.
    pub fn find(cluster: &Cluster, names: &[&str]) -> Result<Self> {
        let pods = names
            .iter()
            .map(|name| Pod::find(cluster, name))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            pods,
            version: IpVersion::V4,
        })
    }

    /// The address by which a pod is asked.
    pub fn address(&self, name: &str) -> Result<IpAddr> {
        let pod = self.pod(name)?;
        match self.version {
            IpVersion::V4 => Ok(pod.address.into()),
            IpVersion::V6 => pod
                .address_v6
                .map(IpAddr::V6)
                .with_context(|| format!("{name} has no IPv6 address")),
        }
    }

    /// A pod by name.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        let found = self.pods.iter().find(|pod| pod.name == name);
        found.with_context(|| format!("no pod is named {name}"))
    }
}

impl Pod {
    /// The pod `namespace/name`, once it has an address and a process.
    pub fn find(cluster: &Cluster, name: &str) -> Result<Self> {
        let (namespace, pod) = split(name)?;
        let begin = Instant::now();
        loop {
            let text = cluster.kubectl(&["get", "pod", "-n", namespace, pod, "-o", "json"])?;
            let object: Value = serde_json::from_str(&text)?;
            let field = |path: &str| object.pointer(path).and_then(Value::as_str);
            if let (Some(uid), Some(address), Some(node)) = (
                field("/metadata/uid"),
                field("/status/podIP"),
                field("/spec/nodeName"),
            ) && let Some(pid) = process_of(uid)
            {
                let all = object.pointer("/status/podIPs").and_then(Value::as_array);
                let all = all
                    .into_iter()
                    .flatten()
                    .filter_map(|entry| entry["ip"].as_str());
                return Ok(Self {
                    name: name.to_owned(),
                    node: node.to_owned(),
                    address_v6: all.filter_map(|text| text.parse().ok()).next(),
                    address: address
                        .parse()
                        .with_context(|| format!("address of {name}"))?,
                    place: Place::of_process(pid)?,
                });
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "pod {name} has no address or no process after {PATIENCE:?}"
            );
            std::thread::sleep(crate::cluster::process::POLL);
        }
    }
}

/// `namespace/name` in two.
pub fn split(name: &str) -> Result<(&str, &str)> {
    name.split_once('/')
        .with_context(|| format!("`{name}` is not namespace/name"))
}

/// The namespaces of the usual world.
pub fn namespaces() -> Vec<&'static str> {
    let mut names: Vec<&str> = PODS
        .iter()
        .filter_map(|name| name.split_once('/'))
        .map(|(namespace, _)| namespace)
        .collect();
    names.dedup();
    names
}

/// Writes the manifest of the usual world into the cluster's folder: three pods on each of three
/// nodes.
pub fn manifest(cluster: &Cluster) -> Result<PathBuf> {
    let nodes: Vec<&str> = cluster
        .layout()
        .nodes
        .iter()
        .map(|node| node.name.as_str())
        .collect();
    let mut items: Vec<Value> = namespaces()
        .iter()
        .map(|name| {
            json!({
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": {"ns": name}},
            })
        })
        .collect();
    for (index, name) in PODS.iter().enumerate() {
        items.push(server(name, nodes[index % nodes.len()])?);
    }
    let path = cluster.folder().join("pods.json");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    std::fs::write(&path, serde_json::to_string_pretty(&list)?)?;
    Ok(path)
}

/// A pod that serves on [`PORTS`], labelled `pod=NAME`.
pub fn server(name: &str, node: &str) -> Result<Value> {
    let of = |wanted: Protocol| {
        let ports: Vec<String> = PORTS
            .iter()
            .filter(|port| port.1 == wanted)
            .map(|port| port.2.to_string())
            .collect();
        format!("--{wanted}={}", ports.join(","))
    };
    let (namespace, pod) = split(name)?;
    let ports: Vec<Value> = PORTS
        .iter()
        .map(|(name, protocol, port)| {
            json!({
                "name": name,
                "containerPort": port,
                "protocol": protocol.to_string().to_uppercase(),
            })
        })
        .collect();
    let mut object = program(
        name,
        node,
        &["serve".to_owned(), of(Protocol::Tcp), of(Protocol::Udp)],
    )?;
    object["metadata"]["labels"] = json!({"pod": pod, "ns": namespace});
    object["spec"]["containers"][0]["ports"] = json!(ports);
    object["spec"]["restartPolicy"] = json!("Always");
    Ok(object)
}

/// A pod that runs the prober with arguments.
pub fn program(name: &str, node: &str, arguments: &[String]) -> Result<Value> {
    let (namespace, pod) = split(name)?;
    Ok(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod, "namespace": namespace, "labels": {"pod": pod}},
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "containers": [{
                "name": "probe",
                "image": probe::IMAGE,
                "imagePullPolicy": "IfNotPresent",
                "args": arguments,
                "env": [{"name": MARK, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}],
            }],
        },
    }))
}

/// Writes the image of the prober, whose program is beside the harness, into `folder`.
pub fn image(folder: &Path) -> Result<PathBuf> {
    let stripped = crate::install::stripped("margay-probe", folder)?;
    let archive = folder.join("probe.tar");
    let image = Image {
        name: probe::IMAGE.to_owned(),
        entries: vec![Entry::File {
            source: stripped,
            dest: "probe".into(),
        }],
        entrypoint: vec!["/probe".to_owned()],
    };
    image.write(&archive)?;
    Ok(archive)
}

/// Address of every pod, by name.
pub fn addresses(world: &World) -> BTreeMap<&str, Ipv4Addr> {
    world
        .pods
        .iter()
        .map(|pod| (pod.name.as_str(), pod.address))
        .collect()
}

/// A process whose environment names the pod.
fn process_of(uid: &str) -> Option<i32> {
    let wanted = format!("{MARK}={uid}");
    let pids = std::fs::read_dir("/proc").ok()?.flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == wanted.as_bytes())
        })
}
