//! IPAM storage in the API server: Calico's objects in the users' form, whichever way the cluster
//! stores them. The only module of this crate with a client.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::TryStreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Namespace as CoreNamespace, Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, DynamicObject, ListParams, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use margay_api::meta::{
    ANNOTATION_POD_IPS, ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6, Labels,
};
use margay_api::rule::IpVersion;
use margay_api::storage::{self, Kind, Mode};
use margay_api::v3::IPPool;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::{Cluster, Namespace, Objects, Store, StoreError, bounded};
use crate::leak_scan::PodFacts;
use crate::limits::{self, KnownLimits};
use crate::pools::{self, Listed, Pools};

/// Objects per page of a list.
const PAGE: u32 = 500;

/// Objects of one of Calico's kinds.
pub trait CalicoObject:
    Resource<DynamicType = ()> + Serialize + DeserializeOwned + Clone + Send + Sync + 'static
{
}

impl<K> CalicoObject for K where
    K: Resource<DynamicType = ()> + Serialize + DeserializeOwned + Clone + Send + Sync + 'static
{
}

/// Storage in the API server.
#[derive(Clone)]
pub struct ApiServer {
    client: Client,
    mode: Mode,
}

impl ApiServer {
    /// Storage behind a client, in the form that the cluster stores Calico's objects in.
    pub fn new(client: Client, mode: Mode) -> Self {
        Self { client, mode }
    }

    /// Watches the pools, as a node with these labels sees them.
    pub fn watch_pools(&self, labels: watch::Receiver<Option<Labels>>) -> watch::Receiver<Pools> {
        pools::follow(self.watch::<IPPool>(), labels)
    }

    /// Watches what limits the assignment of addresses.
    pub fn watch_limits(&self) -> watch::Receiver<KnownLimits> {
        limits::follow(self.watch(), self.watch(), self.watch())
    }

    /// Watches all objects of a kind. While the kind is not served they stay unknown: a kind that
    /// is not there yet must not be taken for one without objects.
    fn watch<K: CalicoObject>(&self) -> watch::Receiver<Listed<K>> {
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(follow(Collection::new(self), sender));
        receiver
    }

    /// Lists all objects of a kind page by page, keeping the result of `keep` for each.
    async fn pages<K, T>(api: Api<K>, keep: impl Fn(K) -> T) -> Result<Vec<T>, StoreError>
    where
        K: Clone + DeserializeOwned + std::fmt::Debug,
    {
        let mut kept = Vec::new();
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let page = request(api.list(&params)).await?;
            kept.extend(page.items.into_iter().map(&keep));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(kept),
            }
        }
    }
}

/// Objects of one kind in the API server.
struct Collection<K> {
    kind: &'static Kind,
    mode: Mode,
    api: Api<DynamicObject>,
    of: std::marker::PhantomData<fn() -> K>,
}

impl<K: CalicoObject> Collection<K> {
    fn new(server: &ApiServer) -> Self {
        let kind = Kind::of(&K::kind(&())).expect("every kind that IPAM names is one of Calico's");
        let api = Api::all_with(server.client.clone(), &kind.resource(server.mode));
        Self {
            kind,
            mode: server.mode,
            api,
            of: std::marker::PhantomData,
        }
    }

    fn parse(&self, object: DynamicObject) -> Result<K, StoreError> {
        let name = object.name_any();
        let wrong = |error: &dyn std::fmt::Display| {
            StoreError::Damaged(format!(
                "{} {name}: {error}; repair or delete it",
                self.kind.kind
            ))
        };
        let bytes = serde_json::to_vec(&object).map_err(|error| wrong(&error))?;
        let read =
            storage::decode_as(self.mode, self.kind, &bytes).map_err(|error| wrong(&error))?;
        Ok(read.object)
    }

    fn stored(&self, object: &K) -> Result<DynamicObject, StoreError> {
        let wrong = |error: &dyn std::fmt::Display| {
            StoreError::Failed(format!("{}: {error}", self.kind.kind))
        };
        let value = storage::encode(self.mode, self.kind, object).map_err(|error| wrong(&error))?;
        serde_json::from_value(value).map_err(|error| wrong(&error))
    }

    /// Keeps an object that a watch has brought. One that cannot be read hurts only itself: its
    /// last readable version stays.
    fn keep(&self, object: DynamicObject, known: &mut BTreeMap<String, K>) {
        let name = object.name_any();
        match self.parse(object) {
            Ok(object) => drop(known.insert(name, object)),
            Err(error) => tracing::warn!(%error, "left out"),
        }
    }
}

async fn follow<K: CalicoObject>(objects: Collection<K>, sender: watch::Sender<Listed<K>>) {
    let mut events =
        std::pin::pin!(watcher(objects.api.clone(), watcher::Config::default()).default_backoff());
    let (mut known, mut listed) = (BTreeMap::new(), BTreeMap::new());
    loop {
        match events.try_next().await {
            Ok(Some(watcher::Event::Init)) => {
                listed.clear();
                continue;
            }
            Ok(Some(watcher::Event::InitApply(object))) => {
                objects.keep(object, &mut listed);
                continue;
            }
            Ok(Some(watcher::Event::InitDone)) => known = std::mem::take(&mut listed),
            Ok(Some(watcher::Event::Apply(object))) => objects.keep(object, &mut known),
            Ok(Some(watcher::Event::Delete(object))) => drop(known.remove(&object.name_any())),
            Ok(None) => return,
            Err(error) => {
                let (kind, storage) = (objects.kind.kind, objects.mode);
                tracing::warn!(
                    kind,
                    %storage,
                    %error,
                    "watch interrupted; what is known stays in use",
                );
                continue;
            }
        }
        sender.send_replace(Some(Arc::new(known.clone())));
    }
}

impl<K: CalicoObject> Objects<K> for ApiServer {
    async fn get(&self, name: String) -> Result<Option<K>, StoreError> {
        let objects = Collection::new(self);
        request(objects.api.get_opt(&name))
            .await?
            .map(|found| objects.parse(found))
            .transpose()
    }

    async fn list<T: Send>(&self, keep: fn(K) -> T) -> Result<Vec<T>, StoreError> {
        let objects = Collection::<K>::new(self);
        let read = |object: DynamicObject| {
            let name = object.name_any();
            match objects.parse(object) {
                Ok(object) => Some(keep(object)),
                Err(error) => {
                    tracing::warn!(
                        kind = objects.kind.kind,
                        name,
                        %error,
                        "object cannot be read and is skipped",
                    );
                    None
                }
            }
        };
        Ok(Self::pages(objects.api.clone(), read)
            .await?
            .into_iter()
            .flatten()
            .collect())
    }

    async fn create(&self, object: K) -> Result<K, StoreError> {
        let objects = Collection::new(self);
        let stored = objects.stored(&object)?;
        objects.parse(request(objects.api.create(&PostParams::default(), &stored)).await?)
    }

    async fn replace(&self, object: K) -> Result<K, StoreError> {
        let objects = Collection::new(self);
        let stored = objects.stored(&object)?;
        objects.parse(
            request(
                objects
                    .api
                    .replace(&stored.name_any(), &PostParams::default(), &stored),
            )
            .await?,
        )
    }

    async fn delete(&self, metadata: ObjectMeta) -> Result<bool, StoreError> {
        let objects = Collection::<K>::new(self);
        let ObjectMeta {
            name,
            uid,
            resource_version,
            ..
        } = metadata;
        let is_any = uid.is_none() && resource_version.is_none();
        let only = (!is_any).then_some(Preconditions {
            uid,
            resource_version,
        });
        let params = DeleteParams {
            preconditions: only,
            ..DeleteParams::default()
        };
        let deleted = async {
            match objects.api.delete(&name.unwrap_or_default(), &params).await {
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(true),
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
                outcome => outcome.map(|_| true).map_err(failure),
            }
        };
        bounded(deleted).await
    }
}

impl Store for ApiServer {
    async fn namespace(&self, name: String) -> Result<Namespace, StoreError> {
        let namespaces: Api<CoreNamespace> = Api::all(self.client.clone());
        let found = namespaces.get_metadata_opt(&name).await;
        let metadata =
            found.map_err(|error| StoreError::Failed(format!("Namespace {name}: {error}")))?;
        let Some(metadata) = metadata.map(|found| found.metadata) else {
            return Ok(Namespace::default());
        };
        let annotations = metadata.annotations.unwrap_or_default();
        let pools = [
            (IpVersion::V4, ANNOTATION_POD_POOLS_V4),
            (IpVersion::V6, ANNOTATION_POD_POOLS_V6),
        ];
        let pools = pools
            .into_iter()
            .filter_map(|(version, name)| Some((version, annotations.get(name)?.clone())));
        Ok(Namespace {
            labels: metadata.labels.unwrap_or_default(),
            pools: pools.collect(),
        })
    }
}

impl Cluster for ApiServer {
    async fn nodes(&self) -> Result<BTreeSet<String>, StoreError> {
        let nodes =
            Self::pages(Api::all(self.client.clone()), |node: Node| node.name_any()).await?;
        Ok(nodes.into_iter().collect())
    }

    async fn pods(&self) -> Result<BTreeMap<String, PodFacts>, StoreError> {
        let pods = Self::pages(Api::all(self.client.clone()), |pod: Pod| pod_facts(&pod)).await?;
        Ok(pods.into_iter().collect())
    }

    async fn pools(&self) -> Result<Option<Vec<IpNet>>, StoreError> {
        let range = |pool: IPPool| {
            (
                pool.metadata.deletion_timestamp.is_none(),
                pool.spec.cidr.parse::<IpNet>().ok(),
            )
        };
        let pools = self
            .list(range)
            .await?
            .into_iter()
            .filter(|(stays, _)| *stays);
        Ok(pools.map(|(_, range)| range).collect())
    }

    async fn has_node(&self, name: String) -> Result<bool, StoreError> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        Ok(request(nodes.get_metadata_opt(&name)).await?.is_some())
    }

    async fn pod(&self, name: String) -> Result<Option<PodFacts>, StoreError> {
        let Some((namespace, pod)) = name.split_once('/') else {
            return Err(StoreError::Failed(format!("{name:?} does not name a pod")));
        };
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        Ok(request(pods.get_opt(pod))
            .await?
            .map(|pod| pod_facts(&pod).1))
    }
}

/// Runs one request with a time limit.
async fn request<T>(
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, StoreError> {
    bounded(async { request.await.map_err(failure) }).await
}

fn failure(error: kube::Error) -> StoreError {
    match &error {
        kube::Error::Api(status) if status.code == 409 => StoreError::Conflict,
        kube::Error::Api(status) if status.code == 403 => {
            StoreError::Refused(status.message.clone())
        }
        kube::Error::Api(status) => StoreError::Failed(status.message.clone()),
        _ => StoreError::Failed(error.to_string()),
    }
}

/// Returns the name of a pod and what its addresses depend on.
pub fn pod_facts(pod: &Pod) -> (String, PodFacts) {
    let status = pod.status.as_ref();
    let reported = status
        .into_iter()
        .flat_map(|status| status.pod_ips.iter().flatten())
        .map(|address| address.ip.clone());
    let annotated = pod
        .annotations()
        .get(ANNOTATION_POD_IPS)
        .into_iter()
        .flat_map(|text| text.split(','));
    let annotated = annotated.map(|text| text.split('/').next().unwrap_or_default().to_owned());
    let facts = PodFacts {
        node: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.clone())
            .unwrap_or_default(),
        addresses: reported
            .chain(annotated)
            .filter_map(|text| text.parse().ok())
            .collect(),
        is_finished: matches!(
            status.and_then(|status| status.phase.as_deref()),
            Some("Succeeded" | "Failed")
        ),
    };
    (
        format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()),
        facts,
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_finished_pod_has_no_addresses() {
        let pod = |phase: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": {
                    "namespace": "x",
                    "name": "a",
                    "annotations": {ANNOTATION_POD_IPS: "10.0.0.1/32,fd00::1/128"},
                },
                "spec": {"nodeName": "n1", "containers": []},
                "status": {"phase": phase, "podIPs": [{"ip": "10.0.0.1"}]},
            }))
            .unwrap()
        };
        for (phase, is_finished) in [
            ("Pending", false),
            ("Running", false),
            ("Unknown", false),
            ("Succeeded", true),
            ("Failed", true),
        ] {
            let (name, facts) = pod_facts(&pod(phase));
            let addresses = ["10.0.0.1", "fd00::1"]
                .map(|text| text.parse().unwrap())
                .into();
            assert_eq!(
                (name.as_str(), facts),
                (
                    "x/a",
                    PodFacts {
                        node: "n1".to_owned(),
                        addresses,
                        is_finished
                    }
                ),
                "{phase}"
            );
        }
    }
}
