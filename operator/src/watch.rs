//! Reflectors: one watch per kind that decisions depend on, with its objects in memory. Gathering
//! the inputs reads that memory and sends no request.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{FutureExt, StreamExt};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use kube::api::{Api, DynamicObject};
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use margay_api::installation::INSTALLATION_NAME;
use margay_api::report::{CONFIG_MAP, Report};
use margay_api::storage::Mode;
use margay_runtime::tasks::Tasks;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tracing::{debug, warn};

use crate::certs::{Stored, secret};
use crate::facts::{host_facts, node_facts, pool_facts, present, request_of};
use crate::inputs::{Inputs, Request};
use crate::kubeadm;
use crate::manifest::{Kind, MANAGED_BY, MANAGER, OWNED_KINDS, key_of, kind};
use crate::names::{CA_NAME, CAPTURE_SECRET, NAMESPACE, READER_SECRET, TYPHA, TYPHA_SECRET};
use crate::storage_v1;

/// Selection of the objects of one watch.
struct Scope {
    kind: &'static Kind,
    namespace: Option<String>,
    labels: Option<String>,
    name: Option<String>,
}

impl Scope {
    fn all(name: &str) -> Self {
        Self {
            kind: kind(name),
            namespace: None,
            labels: None,
            name: None,
        }
    }

    fn named(kind: &str, namespace: &str, name: &str) -> Self {
        Self {
            namespace: (!namespace.is_empty()).then(|| namespace.to_owned()),
            name: Some(name.to_owned()),
            ..Self::all(kind)
        }
    }
}

/// State of the cluster in memory, with a notification of changes.
pub struct Reflectors {
    owned: Vec<(&'static Kind, Store<DynamicObject>)>,
    others: BTreeMap<&'static str, Store<DynamicObject>>,
    named: Vec<(&'static Kind, &'static str, Store<DynamicObject>)>,
    /// Notified on every change.
    pub changed: Arc<Notify>,
}

/// Number of reports of absent replicas that are kept.
const STALE: usize = 8;
/// Namespace that every cluster has; its UID identifies the cluster.
const KUBE_SYSTEM: &str = "kube-system";
/// Owned kinds that an old API server may not serve.
const MUTATING_KINDS: [&str; 2] = ["MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"];
/// Kinds that are watched whole, although their API may not be served yet.
const V3_KINDS: [&str; 8] = [
    "BGPConfiguration",
    "IPPool",
    "FelixConfiguration",
    "Tier",
    "ClusterInformation",
    "HostEndpoint",
    "KubeControllersConfiguration",
    "IPAMConfiguration",
];

impl Reflectors {
    /// Starts every watch as a critical task. `namespace` is the operator's own; Calico's kinds are
    /// read from that storage, and kept in the users' form.
    pub fn start(client: &Client, namespace: &str, mode: Mode, tasks: &mut Tasks) -> Self {
        let changed = Arc::new(Notify::new());
        let mut open = |scope: Scope| watch(client, scope, mode, &changed, tasks);
        let ours = format!("{MANAGED_BY}={MANAGER}");
        let owned = OWNED_KINDS
            .iter()
            .map(|kind| {
                let scope = Scope {
                    labels: Some(ours.clone()),
                    ..Scope::all(kind.kind)
                };
                (kind, open(scope))
            })
            .collect();
        let mut others = BTreeMap::new();
        for name in ["Installation", "TigeraStatus", "Node"]
            .into_iter()
            .chain(V3_KINDS)
        {
            others.insert(name, open(Scope::all(name)));
        }
        let pods = Scope {
            namespace: Some(NAMESPACE.to_owned()),
            ..Scope::all("Pod")
        };
        others.insert("Pod", open(pods));
        let named = [
            ("Secret", namespace, CA_NAME),
            ("Secret", NAMESPACE, TYPHA_SECRET),
            ("Secret", NAMESPACE, READER_SECRET),
            ("Secret", NAMESPACE, CAPTURE_SECRET),
            ("ConfigMap", NAMESPACE, CA_NAME),
            ("ConfigMap", NAMESPACE, CONFIG_MAP),
            ("ConfigMap", KUBE_SYSTEM, kubeadm::CONFIG_MAP),
            ("Namespace", "", KUBE_SYSTEM),
        ]
        .map(|(of, space, name)| (kind(of), name, open(Scope::named(of, space, name))));
        Self {
            owned,
            others,
            named: Vec::from(named),
            changed,
        }
    }

    /// Names of the kinds that have not been read yet and without which nothing is decided.
    pub fn missing(&self) -> Vec<&'static str> {
        let owned = self.owned.iter().map(|(kind, store)| (kind.kind, store));
        let others = self.others.iter().map(|(name, store)| (*name, store));
        let named = self.named.iter().map(|(kind, _, store)| (kind.kind, store));
        owned
            .chain(others)
            .chain(named)
            .filter(|(name, store)| !is_optional(name) && !is_read(store))
            .map(|(name, _)| name)
            .collect()
    }

    /// Returns the inputs as known now.
    pub fn gather(&self) -> Inputs {
        let (request, ignored) = self.request();
        let mut inputs = Inputs {
            request,
            ignored,
            nodes: self
                .objects("Node")
                .iter()
                .map(|node| node_facts(node))
                .collect(),
            pod_subnets: self.pod_subnets(),
            cluster_id: self
                .one("Namespace", KUBE_SYSTEM)
                .and_then(|namespace| namespace.uid())
                .unwrap_or_default(),
            certificates: self.certificates(),
            pods: decode(&self.objects("Pod")),
            ..Inputs::default()
        };
        self.gather_reports(&mut inputs);
        self.gather_v3(&mut inputs);
        self.gather_owned(&mut inputs);
        for status in self.objects("TigeraStatus") {
            let conditions = &status.data["status"]["conditions"];
            inputs.statuses.insert(
                status.name_any(),
                serde_json::from_value(conditions.clone()).unwrap_or_default(),
            );
        }
        inputs
    }

    fn one(&self, kind: &str, name: &str) -> Option<Arc<DynamicObject>> {
        let (_, _, store) = self
            .named
            .iter()
            .find(|(of, called, _)| of.kind == kind && *called == name)?;
        store.state().first().cloned()
    }

    fn objects(&self, name: &str) -> Vec<Arc<DynamicObject>> {
        self.others.get(name).map(in_order).unwrap_or_default()
    }

    /// Returns the objects of a kind whose API may not be served: none while it has not been read.
    fn served(&self, name: &str) -> Option<Vec<Arc<DynamicObject>>> {
        self.others
            .get(name)
            .filter(|store| is_read(store))
            .map(in_order)
    }

    fn request(&self) -> (Option<Request>, BTreeSet<String>) {
        let (ours, ignored): (Vec<_>, Vec<_>) = self
            .objects("Installation")
            .into_iter()
            .partition(|object| object.name_any() == INSTALLATION_NAME);
        let request = ours
            .first()
            .filter(|object| object.metadata.deletion_timestamp.is_none())
            .map(|object| request_of(object));
        (request, ignored.iter().map(|o| o.name_any()).collect())
    }

    fn pod_subnets(&self) -> Vec<String> {
        let found = self.one("ConfigMap", kubeadm::CONFIG_MAP);
        let text = found
            .as_ref()
            .and_then(|map| map.data["data"]["ClusterConfiguration"].as_str());
        text.map(kubeadm::pod_subnets).unwrap_or_default()
    }

    fn certificates(&self) -> Stored {
        let certificate =
            |name: &str| secret::text(self.one("Secret", name).as_deref()?, "tls.crt");
        let mut stored = Stored {
            typha: certificate(TYPHA_SECRET),
            reader: certificate(READER_SECRET),
            capture: certificate(CAPTURE_SECRET),
            ..Stored::default()
        };
        if let Some(found) = self.one("Secret", CA_NAME) {
            match secret::authority_of(&found) {
                Some(authority) => {
                    let version = found.resource_version().unwrap_or_default();
                    stored.authority = Some((authority, version));
                }
                None => {
                    stored.broken = Some(format!(
                        "Secret {CA_NAME} lacks tls.crt or tls.key; delete it to have a new \
                         authority made"
                    ));
                }
            }
        }
        stored
    }

    /// Collects the reports of the present replicas of typha, and the keys of those that are gone.
    fn gather_reports(&self, inputs: &mut Inputs) {
        let map = self.one("ConfigMap", CONFIG_MAP);
        let data = map.as_ref().and_then(|map| map.data["data"].as_object());
        let is_there = |key: &String| {
            inputs
                .pods
                .iter()
                .any(|pod| pod.metadata.name.as_ref() == Some(key))
        };
        let (kept, stale): (Vec<_>, Vec<_>) = data
            .into_iter()
            .flatten()
            .partition(|(key, _)| is_there(key));
        // A report that cannot be read is of another version of typha, which is about to be
        // replaced.
        let reports = kept
            .iter()
            .filter_map(|(_, text)| serde_json::from_str::<Report>(text.as_str()?).ok());
        inputs.reports = Report::joined(reports);
        // The report of a replica that has just started may be read before its pod.
        if stale.len() > STALE {
            inputs.stale_reports = stale.into_iter().map(|(key, _)| key.clone()).collect();
        }
    }

    fn gather_v3(&self, inputs: &mut Inputs) {
        let names = |objects: Vec<Arc<DynamicObject>>| {
            objects.iter().map(|object| object.name_any()).collect()
        };
        inputs.pools = self
            .served("IPPool")
            .map(|pools| pools.iter().map(|pool| pool_facts(pool)).collect());
        let specs = |objects: Vec<Arc<DynamicObject>>| {
            objects
                .iter()
                .map(|object| (object.name_any(), object.data["spec"].clone()))
                .collect::<BTreeMap<_, _>>()
        };
        inputs.felix = self.served("FelixConfiguration").map(specs);
        inputs.bgp = self.served("BGPConfiguration").map(specs);
        inputs.ipam = self
            .served("IPAMConfiguration")
            .map(specs)
            .and_then(|mut known| known.remove("default"));
        inputs.tiers = self.served("Tier").map(names);
        inputs.cluster_information = self.served("ClusterInformation").map(|objects| {
            objects
                .iter()
                .find(|object| object.name_any() == "default")
                .map(|object| object.data["spec"].clone())
        });
        inputs.controllers = self.served("KubeControllersConfiguration").map(|objects| {
            let found = objects.iter().find(|object| object.name_any() == "default");
            found.and_then(|object| serde_json::to_value(object.as_ref()).ok())
        });
        inputs.host_endpoints = self
            .served("HostEndpoint")
            .map(|hosts| hosts.iter().map(|host| host_facts(host)).collect());
    }

    fn gather_owned(&self, inputs: &mut Inputs) {
        let mut mutating = self
            .owned
            .iter()
            .filter(|(kind, _)| MUTATING_KINDS.contains(&kind.kind));
        inputs.mutates = mutating.all(|(_, store)| is_read(store));
        for (kind, store) in &self.owned {
            let objects = in_order(store);
            match kind.kind {
                "Deployment" => inputs.deployments = decode::<Deployment>(&objects),
                "DaemonSet" => inputs.daemon_sets = decode::<DaemonSet>(&objects),
                "Service" => {
                    inputs.typha_address = objects
                        .iter()
                        .find(|service| service.name_any() == TYPHA)
                        .and_then(|service| service.data["spec"]["clusterIP"].as_str())
                        .filter(|address| !address.is_empty() && *address != "None")
                        .map(str::to_owned);
                }
                _ => {}
            }
            let found = objects
                .iter()
                .map(|object| (key_of(kind, object), present(object)));
            inputs.present.extend(found);
        }
        if let Some(bundle) = self.one("ConfigMap", CA_NAME) {
            let key = key_of(kind("ConfigMap"), &bundle);
            inputs.present.insert(key, present(&bundle));
        }
    }
}

/// Returns true for kinds that may not be served.
fn is_optional(name: &str) -> bool {
    V3_KINDS.contains(&name) || MUTATING_KINDS.contains(&name)
}

/// Starts a watch; it reconnects for ever, with backoff.
fn watch(
    client: &Client,
    scope: Scope,
    mode: Mode,
    changed: &Arc<Notify>,
    tasks: &mut Tasks,
) -> Store<DynamicObject> {
    let resource = scope.kind.resource(mode);
    let api: Api<DynamicObject> = match &scope.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let config = watcher::Config {
        label_selector: scope.labels,
        field_selector: scope.name.map(|name| format!("metadata.name={name}")),
        ..watcher::Config::default()
    };
    let writer = reflector::store::Writer::new(resource);
    let store = writer.as_reader();
    let (kind, stored) = (scope.kind.kind, scope.kind.stored(mode));
    let convert = move |object: &mut DynamicObject| {
        if let Some(stored) = stored {
            storage_v1::from_storage(stored, object);
        }
        strip(kind, object);
    };
    let stream = watcher(api, config)
        .modify(convert)
        .default_backoff()
        .reflect(writer);
    let changed = Arc::clone(changed);
    tasks.spawn(&format!("watch of {kind}"), async move {
        let mut stream = std::pin::pin!(stream);
        while let Some(event) = stream.next().await {
            match event {
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
                Ok(_) => changed.notify_one(),
                Err(error) if is_unserved(&error) => debug!(kind, %error, "not served yet"),
                Err(error) => warn!(kind, %error, "watch interrupted, retrying"),
            }
        }
    });
    store
}

fn is_unserved(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}

/// Drops the fields of an object that are not read: statuses of nodes are most of a large cluster's
/// bytes.
fn strip(kind: &str, object: &mut DynamicObject) {
    if kind != "Installation" {
        object.metadata.managed_fields = None;
    }
    if kind == "Node"
        && let Some(data) = object.data.as_object_mut()
    {
        let addresses = data
            .remove("status")
            .map(|mut status| status["addresses"].take());
        if let Some(addresses) = addresses.filter(Value::is_array) {
            data.insert("status".to_owned(), json!({ "addresses": addresses }));
        }
    }
}

fn is_read(store: &Store<DynamicObject>) -> bool {
    matches!(store.wait_until_ready().now_or_never(), Some(Ok(())))
}

/// Returns the objects in order of names, so that equal contents give equal decisions and messages.
fn in_order(store: &Store<DynamicObject>) -> Vec<Arc<DynamicObject>> {
    let mut objects = store.state();
    objects.sort_by(|a, b| {
        let key = |object: &DynamicObject| (object.namespace(), object.name_any());
        key(a).cmp(&key(b))
    });
    objects
}

fn decode<T: DeserializeOwned>(objects: &[Arc<DynamicObject>]) -> Vec<T> {
    objects
        .iter()
        .filter_map(|object| serde_json::to_value(object.as_ref()).ok())
        .filter_map(|value| serde_json::from_value(value).ok())
        .collect()
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
