//! On a real cluster: test layer 5.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::ApiResource;
use kube::{Api, Client, api::DynamicObject};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::backend::{Backend, Running, WantedPod};
use super::table::Fixture;
use crate::cluster::Cluster;
use crate::probe::serve::Ports;
use crate::probe::{Place, Protocol, Target, Verdict, ask};
use crate::world::{self, Pod};

/// Field manager of the runner.
const MANAGER: &str = "margay-conformance";
/// Time limit for the cluster's operations.
const PATIENCE: Duration = Duration::from_secs(120);

/// A cluster with Margay on it.
pub struct OnCluster<'a> {
    cluster: &'a Cluster,
    client: Client,
    runtime: Runtime,
}

impl<'a> OnCluster<'a> {
    /// Prepares the cluster. Addresses that pods must have are in a pool of their own, so that no
    /// other pod gets one of them.
    pub fn new(cluster: &'a Cluster, fixture: &Fixture) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let client = runtime.block_on(cluster.client())?;
        let mut backend = Self {
            cluster,
            client,
            runtime,
        };
        if fixture.pin {
            backend.apply(&json!({
                "apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {
                    "name": "conformance",
                },
                "spec": {
                    "cidr": fixture.cidr, "assignmentMode": "Manual", "vxlanMode": "CrossSubnet",
                    "ipipMode": "Never",
                },
            }))?;
        }
        Ok(backend)
    }

    fn api(&self, object: &Value) -> Result<(Api<DynamicObject>, String)> {
        let text = |pointer| {
            object
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let (group, version) = text("/apiVersion")
            .rsplit_once('/')
            .unwrap_or(("", text("/apiVersion")));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("/kind")));
        let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
        ensure!(!name.is_empty(), "{object}: metadata.name is missing");
        let api = match namespace {
            "" => Api::all_with(self.client.clone(), &resource),
            namespace => Api::namespaced_with(self.client.clone(), namespace, &resource),
        };
        Ok((api, name.to_owned()))
    }

    fn node(&self, number: usize) -> Result<String> {
        let nodes = &self.cluster.layout().nodes;
        nodes
            .get(number)
            .map(|node| node.name.clone())
            .with_context(|| format!("no node {number}"))
    }

    fn manifest(&self, wanted: &WantedPod) -> Result<Value> {
        let of = |protocol: Protocol| {
            let ports = wanted.ports.iter().filter(|port| port.protocol == protocol);
            let ports: Vec<String> = ports.map(|port| port.port.to_string()).collect();
            (!ports.is_empty()).then(|| format!("--{protocol}={}", ports.join(",")))
        };
        let mut arguments = vec!["serve".to_owned()];
        arguments.extend(
            [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
                .into_iter()
                .filter_map(of),
        );
        let mut pod = world::program(&wanted.key(), &self.node(wanted.node)?, &arguments)?;
        pod["metadata"]["labels"] = wanted.labels.clone();
        pod["metadata"]["annotations"] = wanted.annotations();
        pod["spec"]["serviceAccountName"] = wanted.service_account.clone().into();
        pod["spec"]["containers"][0]["ports"] = wanted.container_ports();
        Ok(pod)
    }
}

impl Backend for OnCluster<'_> {
    fn apply(&mut self, object: &Value) -> Result<()> {
        let (api, name) = self.api(object)?;
        let patch = PatchParams::apply(MANAGER).force();
        let applied = self
            .runtime
            .block_on(api.patch(&name, &patch, &Patch::Apply(object)));
        applied
            .map(drop)
            .with_context(|| format!("apply {} {name}", object["kind"]))
    }

    fn remove(&mut self, object: &Value) -> Result<()> {
        let (api, name) = self.api(object)?;
        self.runtime.block_on(async {
            let now = DeleteParams {
                grace_period_seconds: Some(0),
                ..DeleteParams::default()
            };
            match api.delete(&name, &now).await {
                Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
                deleted => {
                    drop(deleted.with_context(|| format!("delete {} {name}", object["kind"]))?)
                }
            }
            let gone = kube::runtime::wait::await_condition(
                api,
                &name,
                kube::runtime::wait::conditions::is_deleted(""),
            );
            let gone = tokio::time::timeout(PATIENCE, gone).await;
            gone.with_context(|| {
                format!("{} {name} is not gone after {PATIENCE:?}", object["kind"])
            })??;
            Ok(())
        })
    }

    fn start(&mut self, pods: &[WantedPod]) -> Result<Vec<Running>> {
        for wanted in pods {
            let manifest = self.manifest(wanted)?;
            self.apply(&manifest)?;
        }
        let limit = format!("--timeout={}s", PATIENCE.as_secs());
        let mut running = Vec::new();
        for wanted in pods {
            let name = format!("pod/{}", wanted.name);
            self.cluster.kubectl(&[
                "wait",
                "-n",
                &wanted.namespace,
                "--for=condition=Ready",
                &name,
                &limit,
            ])?;
            let pod = Pod::find(self.cluster, &wanted.key())?;
            await_service(&pod.place, wanted)?;
            running.push(Running {
                address: pod.address.into(),
                place: pod.place,
            });
        }
        Ok(running)
    }

    fn label(&mut self, namespace: &str, name: &str, labels: &Value) -> Result<()> {
        let object = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": namespace, "name": name},
        });
        let (api, name) = self.api(&object)?;
        self.runtime.block_on(async {
            let present = api.get(&name).await?.metadata.labels.unwrap_or_default();
            // Null removes a label.
            let mut wanted = json!(
                present
                    .into_keys()
                    .map(|key| (key, Value::Null))
                    .collect::<serde_json::Map<_, _>>()
            );
            for (key, value) in labels.as_object().into_iter().flatten() {
                wanted[key] = value.clone();
            }
            let patch = Patch::Merge(json!({"metadata": {"labels": wanted}}));
            api.patch(&name, &PatchParams::default(), &patch).await?;
            Ok(())
        })
    }

    fn stop(&mut self, namespace: &str, name: &str) -> Result<()> {
        self.remove(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": namespace, "name": name},
        }))
    }

    fn serve_on_node(&mut self, node: usize, ports: &[(Protocol, u16)]) -> Result<IpAddr> {
        let node = self.cluster.node(&self.node(node)?)?;
        let opened = Place::of_process(node.process.pid)?.run(|| Ports::open(ports))??;
        self.runtime.block_on(async { opened.serve() })?;
        Ok(node.host.address.into())
    }
}

/// Waits until the program in the pod has opened its ports: what it serves answers from its own
/// network.
fn await_service(place: &Place, wanted: &WantedPod) -> Result<()> {
    let begin = Instant::now();
    let local = |port: &super::table::Port| {
        Target::new(port.protocol, std::net::Ipv4Addr::LOCALHOST, port.port)
    };
    let targets: Vec<Target> = wanted.ports.iter().map(local).collect();
    while ask(place, &targets)?
        .iter()
        .any(|verdict| *verdict != Verdict::Answered)
    {
        ensure!(
            begin.elapsed() < PATIENCE,
            "{} does not serve its ports after {PATIENCE:?}",
            wanted.key()
        );
    }
    Ok(())
}
