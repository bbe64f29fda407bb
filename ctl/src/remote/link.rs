//! The way to typha and the agents: the API server's port-forward to their pods, and the
//! certificate of readers. Both are the user's own rights, so RBAC decides who may ask.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use margay_proto::debug::debug_client::DebugClient;
use margay_proto::debug::node_debug_client::NodeDebugClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::live::{Connection, explained};

/// Namespace of the components.
pub const NAMESPACE: &str = "margay-system";
/// Secret with the certificate of readers.
const READER_SECRET: &str = "margay-reader-tls";
/// Secret with the certificate of those who capture packets.
pub const CAPTURE_SECRET: &str = "margay-capture-tls";
/// ConfigMap with the authorities to trust.
const CA_NAME: &str = "margay-ca";
/// Label of the components' pods, and its values.
const LABEL: &str = "app.kubernetes.io/name";
const TYPHA: &str = "margay-typha";
const NODE: &str = "margay-node";
/// Ports of their services.
const TYPHA_PORT: u16 = 5473;
const NODE_PORT: u16 = 5474;
/// Time limit of a connection, and of a call.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Time between two pings, which is shorter than any limit on silence in between.
const PING: Duration = Duration::from_secs(10);

/// Replica of typha, by the name of its pod.
pub struct Replica {
    /// Name of the pod.
    pub name: String,
    /// Its service.
    pub client: DebugClient<Channel>,
}

/// Pods of the components, and what they accept a caller by.
pub struct Link {
    pods: Api<Pod>,
    tls: ClientTlsConfig,
}

impl Link {
    /// Reads the certificate of readers with the rights of the user.
    pub async fn open(cluster: &Connection) -> Result<Self> {
        Self::with_secret(cluster, READER_SECRET).await
    }

    /// Reads the certificate of that Secret with the rights of the user.
    pub async fn with_secret(cluster: &Connection, name: &str) -> Result<Self> {
        let client = cluster.client().clone();
        let secrets: Api<Secret> = Api::namespaced(client.clone(), NAMESPACE);
        let secret = secrets.get_opt(name).await.map_err(explained)?;
        let secret = secret.with_context(|| absent("Secret", name))?;
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), NAMESPACE);
        let map = maps.get_opt(CA_NAME).await.map_err(explained)?;
        let map = map.with_context(|| absent("ConfigMap", CA_NAME))?;
        let part = |key: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(key));
            bytes
                .map(|bytes| bytes.0.clone())
                .with_context(|| format!("Secret {NAMESPACE}/{name} has no {key}"))
        };
        let authorities = map.data.as_ref().and_then(|data| data.get("ca.crt"));
        let authorities = authorities
            .with_context(|| format!("ConfigMap {NAMESPACE}/{CA_NAME} has no ca.crt"))?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(authorities))
            .identity(Identity::from_pem(part("tls.crt")?, part("tls.key")?));
        Ok(Self {
            pods: Api::namespaced(client, NAMESPACE),
            tls,
        })
    }

    /// Connects to every replica of typha that is ready, in the order of their names.
    pub async fn replicas(&self) -> Result<Vec<Replica>> {
        let mut replicas = Vec::new();
        for pod in self.list(TYPHA).await?.iter().filter(|pod| is_ready(pod)) {
            let name = pod.name_any();
            let channel = self.channel(&name, TYPHA_PORT, TYPHA).await?;
            let client = DebugClient::new(channel).max_decoding_message_size(usize::MAX);
            replicas.push(Replica { name, client });
        }
        ensure!(
            !replicas.is_empty(),
            "no replica of typha is ready; `status` shows the installation"
        );
        Ok(replicas)
    }

    /// Pods of the components.
    pub fn pods(&self) -> &Api<Pod> {
        &self.pods
    }

    /// Pods of agents, by their nodes.
    pub async fn agents(&self) -> Result<BTreeMap<String, Pod>> {
        let pods = self.list(NODE).await?.into_iter();
        let pods = pods.filter(|pod| pod.metadata.deletion_timestamp.is_none());
        Ok(pods
            .filter_map(|pod| Some((pod.spec.as_ref()?.node_name.clone()?, pod)))
            .collect())
    }

    /// Connects to an agent by its pod.
    pub async fn agent(&self, pod: &Pod) -> Result<NodeDebugClient<Channel>> {
        let channel = self.channel_to_agent(pod).await?;
        Ok(NodeDebugClient::new(channel).max_decoding_message_size(usize::MAX))
    }

    /// A connection to an agent by its pod, for whichever of its services.
    pub async fn channel_to_agent(&self, pod: &Pod) -> Result<Channel> {
        self.channel(&pod.name_any(), NODE_PORT, NODE).await
    }

    async fn list(&self, name: &str) -> Result<Vec<Pod>> {
        let params = ListParams::default().labels(&format!("{LABEL}={name}"));
        Ok(self.pods.list(&params).await.map_err(explained)?.items)
    }

    async fn channel(&self, pod: &str, port: u16, server: &str) -> Result<Channel> {
        let forwarded = self.pods.portforward(pod, &[port]).await.map_err(explained);
        let mut forwarded =
            forwarded.with_context(|| format!("no connection to pod {NAMESPACE}/{pod}"))?;
        let Some(stream) = forwarded.take_stream(port) else {
            bail!("port-forward to pod {NAMESPACE}/{pod} has no port {port}");
        };
        let mut stream = Some(TokioIo::new(stream));
        // A forwarded connection is one stream: when it has ended, there is no second one.
        let connector = tower::service_fn(move |_| {
            let taken = stream.take();
            async move { taken.ok_or_else(|| io::Error::other("the forwarded connection ended")) }
        });
        let endpoint = Endpoint::from_shared(format!("https://{server}:{port}"))?
            .tls_config(self.tls.clone().domain_name(server))?
            .connect_timeout(TIMEOUT)
            // A capture may be silent for longer than the API server's client waits.
            .http2_keep_alive_interval(PING)
            .keep_alive_while_idle(true)
            .timeout(TIMEOUT);
        let channel = endpoint.connect_with_connector(connector).await;
        channel.with_context(|| format!("pod {NAMESPACE}/{pod} does not answer on port {port}"))
    }
}

fn absent(kind: &str, name: &str) -> String {
    format!(
        "there is no {kind} {NAMESPACE}/{name}: the operator writes it with an installation; \
         `status` shows what is there"
    )
}

/// Returns true if the pod serves.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    let mut ready = conditions.filter(|condition| condition.type_ == "Ready");
    pod.metadata.deletion_timestamp.is_none() && ready.any(|condition| condition.status == "True")
}

/// What a service answered, with what helps.
pub fn answered<T>(whom: &str, answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T> {
    let refused = |status: tonic::Status| match status.code() {
        tonic::Code::Unimplemented => {
            anyhow::anyhow!("{whom} is of an older version, which cannot say that")
        }
        _ => anyhow::anyhow!("{whom}: {}", status.message()),
    };
    answer.map(tonic::Response::into_inner).map_err(refused)
}
