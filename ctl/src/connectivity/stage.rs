//! The pods, the Service and the policy of a test, in a namespace of their own.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::connectivity::check::{HTTP, Place, ServiceFacts, UDP};
use crate::live::explained;
use crate::remote::link::is_ready;

/// Label of the namespace of a test.
const LABEL: &str = "margay.io/connectivity-test";
/// Name of the Service and of the policy, and label of the servers.
const SERVER: &str = "server";
const POLICY: &str = "guests-only";
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// What a test sets up.
pub struct Stage {
    client: Client,
    namespace: String,
    image: String,
}

impl Stage {
    /// Creates the namespace. One that is there already is nobody's to use.
    pub async fn create(client: Client, namespace: &str, image: &str) -> Result<Self> {
        let namespaces: Api<Namespace> = Api::all(client.clone());
        ensure!(
            namespaces
                .get_opt(namespace)
                .await
                .map_err(explained)?
                .is_none(),
            "namespace {namespace} exists already: another test runs or was broken off; delete \
             it, or name another one by --namespace"
        );
        let object = serde_json::from_value(json!({
            "metadata": {"name": namespace, "labels": {LABEL: "true"}},
        }))?;
        namespaces
            .create(&PostParams::default(), &object)
            .await
            .map_err(explained)?;
        Ok(Self {
            client,
            namespace: namespace.to_owned(),
            image: image.to_owned(),
        })
    }

    /// Creates a server and a client on each node, a guest on the first one, and the Service; waits
    /// until all are ready.
    pub async fn fill(&self, nodes: &[Node], end: Instant) -> Result<(Vec<Place>, ServiceFacts)> {
        let pods = self.pods();
        for (index, node) in nodes.iter().enumerate() {
            let name = node.name_any();
            let guest = (index == 0).then_some("guest");
            for role in [SERVER, "client"].into_iter().chain(guest) {
                let pod = self.pod(role, &name)?;
                pods.create(&PostParams::default(), &pod)
                    .await
                    .map_err(explained)?;
            }
        }
        let services: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        let service = serde_json::from_value(json!({
            "metadata": {"name": SERVER},
            "spec": {
                "type": "NodePort", "selector": {"role": SERVER},
                "ports": [{"name": "http", "port": HTTP, "targetPort": HTTP}],
            },
        }))?;
        let service = services
            .create(&PostParams::default(), &service)
            .await
            .map_err(explained)?;
        let ready = self.wait(end).await?;
        let places = nodes.iter().map(|node| place(node, &ready)).collect();
        Ok((places, self.facts(&service).await?))
    }

    async fn wait(&self, end: Instant) -> Result<Vec<Pod>> {
        loop {
            let pods = self
                .pods()
                .list(&ListParams::default())
                .await
                .map_err(explained)?
                .items;
            let missing: Vec<String> = pods
                .iter()
                .filter(|pod| !is_ready(pod))
                .map(unready)
                .collect();
            if missing.is_empty() {
                return Ok(pods);
            }
            if Instant::now() >= end {
                bail!("pods do not become ready: {}", missing.join("; "));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn facts(&self, service: &Service) -> Result<ServiceFacts> {
        let dns: Api<Service> = Api::namespaced(self.client.clone(), "kube-system");
        let has_dns = dns.get_opt("kube-dns").await.map_err(explained)?.is_some();
        let spec = service.spec.as_ref();
        let address = spec.and_then(|spec| spec.cluster_ip.as_ref()?.parse().ok());
        let ports = spec
            .into_iter()
            .flat_map(|spec| spec.ports.iter().flatten());
        let node_port = ports.filter_map(|port| port.node_port).next();
        Ok(ServiceFacts {
            address,
            name: has_dns.then(|| format!("{SERVER}.{}.svc", self.namespace)),
            node_port: node_port.and_then(|port| u16::try_from(port).ok()),
        })
    }

    /// Creates the policy that lets guests in, and nobody else.
    pub async fn close(&self) -> Result<()> {
        let policy = serde_json::from_value(json!({
            "metadata": {"name": POLICY},
            "spec": {
                "podSelector": {"matchLabels": {"role": SERVER}},
                "policyTypes": ["Ingress"],
                "ingress": [{
                    "from": [{"podSelector": {"matchLabels": {"role": "guest"}}}],
                    "ports": [{"port": HTTP}],
                }],
            },
        }))?;
        self.policies()
            .create(&PostParams::default(), &policy)
            .await
            .map_err(explained)?;
        Ok(())
    }

    /// Deletes the policy.
    pub async fn open(&self) -> Result<()> {
        self.policies()
            .delete(POLICY, &DeleteParams::default())
            .await
            .map_err(explained)?;
        Ok(())
    }

    /// Deletes the namespace, and waits until it is gone.
    pub async fn remove(&self, end: Instant) -> Result<()> {
        let (namespaces, name): (Api<Namespace>, _) =
            (Api::all(self.client.clone()), &self.namespace);
        namespaces
            .delete(name, &DeleteParams::default())
            .await
            .map_err(explained)?;
        while namespaces.get_opt(name).await.map_err(explained)?.is_some() {
            ensure!(
                Instant::now() < end,
                "namespace {name} is not gone yet; `kubectl get namespace {name} -o yaml` says why"
            );
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Pods of the test.
    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn policies(&self) -> Api<NetworkPolicy> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// A pod that needs no rights.
    fn pod(&self, role: &str, node: &str) -> Result<Pod> {
        let container = json!({
            "name": role,
            "image": self.image,
            "imagePullPolicy": "IfNotPresent",
            "args": [
                "netexec", format!("--http-port={HTTP}"), format!("--udp-port={UDP}"),
            ],
            "readinessProbe": {
                "httpGet": {"path": "/hostname", "port": HTTP}, "periodSeconds": 1,
            },
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": {"drop": ["ALL"]},
                "runAsNonRoot": true,
                "runAsUser": 65534,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        });
        Ok(serde_json::from_value(json!({
            "metadata": {"name": name_of(role, node), "labels": {"role": role}},
            "spec": {
                "nodeName": node,
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "tolerations": [{"operator": "Exists"}],
                "containers": [container],
            },
        }))?)
    }
}

/// Name of the pod of that role on a node.
pub fn name_of(role: &str, node: &str) -> String {
    format!("{role}-{node}")
}

/// Nodes that pods can run on, at most so many.
pub async fn nodes(client: &Client, most: usize) -> Result<Vec<Node>> {
    let nodes: Api<Node> = Api::all(client.clone());
    let mut nodes = nodes
        .list(&ListParams::default())
        .await
        .map_err(explained)?
        .items;
    nodes.retain(is_usable);
    nodes.truncate(most);
    ensure!(!nodes.is_empty(), "no Linux node is Ready and schedulable");
    Ok(nodes)
}

fn is_usable(node: &Node) -> bool {
    let value = serde_json::to_value(node).unwrap_or_default();
    let conditions = value["status"]["conditions"].as_array();
    let is_ready = conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
    is_ready
        && value["spec"]["unschedulable"] != true
        && value["metadata"]["labels"]["kubernetes.io/os"] == "linux"
}

fn place(node: &Node, pods: &[Pod]) -> Place {
    let name = node.name_any();
    let addresses = node
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten());
    let mut internal = addresses.filter(|address| address.type_ == "InternalIP");
    let server = name_of(SERVER, &name);
    let servers = pods.iter().filter(|pod| pod.name_any() == server);
    let servers = servers.flat_map(|pod| pod.status.iter());
    let servers = servers.flat_map(|status| status.pod_ips.iter().flatten());
    Place {
        address: internal
            .next()
            .and_then(|address| address.address.parse().ok()),
        servers: servers
            .filter_map(|address| address.ip.parse().ok())
            .collect(),
        node: name,
    }
}

/// A pod that is not ready, with what kubelet says.
fn unready(pod: &Pod) -> String {
    let value: Value = serde_json::to_value(pod).unwrap_or_default();
    let states = value["status"]["containerStatuses"].as_array();
    let waiting = states
        .into_iter()
        .flatten()
        .map(|state| &state["state"]["waiting"]);
    let mut reasons = waiting.filter_map(|waiting| {
        let reason = waiting["reason"].as_str()?;
        Some(format!(
            "{reason} {}",
            waiting["message"].as_str().unwrap_or_default()
        ))
    });
    let reason = reasons
        .next()
        .unwrap_or_else(|| "kubelet has not started it".to_owned());
    format!("{}: {}", pod.name_any(), reason.trim())
}

/// Answer of a client that was asked to talk to somebody.
pub async fn dial(pods: &Api<Pod>, pod: &str, path: &str) -> Result<Value> {
    let mut forwarded = pods.portforward(pod, &[HTTP]).await.map_err(explained)?;
    let stream = forwarded.take_stream(HTTP).context("a forwarded port")?;
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    let request = http::Request::get(path)
        .header("host", pod)
        .body(http_body_util::Empty::<bytes::Bytes>::new())?;
    let answered = async {
        let response = sender.send_request(request).await?;
        let body = http_body_util::BodyExt::collect(response.into_body()).await?;
        Ok::<_, hyper::Error>(body.to_bytes())
    };
    let body = tokio::select! {
        body = answered => body?,
        ended = connection => {
            ended?;
            bail!("the connection to pod {pod} ended before it answered");
        }
    };
    serde_json::from_slice(&body)
        .with_context(|| format!("pod {pod}: {}", String::from_utf8_lossy(&body)))
}
