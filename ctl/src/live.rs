//! A cluster behind its API server, with the user's own kubeconfig: what may be seen and changed is
//! the API server's decision.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams, Preconditions};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::GroupVersionKind;
use kube::{Api, Client, Config};
use margay_api::storage::kind::Class;
use margay_api::storage::mode::{self, Evidence};
use margay_api::storage::{self, Kind, Mode};
use serde_json::Value;

use crate::manifest::Origin;
use crate::objects::Objects;

/// Objects per page of a list.
const PAGE: u32 = 500;
/// Time limit of a connection, and of silence while an answer is read.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Group and object of a migration from the older storage to the newer one.
const MIGRATION: (&str, &str) = ("migration.projectcalico.org", "v1-to-v3");
/// Fields of metadata that the API server sets; they are not part of what a user writes.
const BOOKKEEPING: [&str; 3] = ["managedFields", "generation", "selfLink"];

/// Kinds of Kubernetes that policy depends on: group, version, kind, plural.
const KUBERNETES: [(&str, &str, &str, &str); 7] = [
    ("", "v1", "Namespace", "namespaces"),
    ("", "v1", "Node", "nodes"),
    ("", "v1", "Pod", "pods"),
    ("", "v1", "Service", "services"),
    ("", "v1", "ServiceAccount", "serviceaccounts"),
    ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    (
        "networking.k8s.io",
        "v1",
        "NetworkPolicy",
        "networkpolicies",
    ),
];
/// The kind of them that a cluster may lack.
const OPTIONAL: (&str, &str, &str, &str) = (
    "policy.networking.k8s.io",
    "v1alpha2",
    "ClusterNetworkPolicy",
    "clusternetworkpolicies",
);
/// Calico's kinds that policy depends on.
const CALICO: [&str; 11] = [
    "FelixConfiguration",
    "GlobalNetworkPolicy",
    "GlobalNetworkSet",
    "HostEndpoint",
    "IPPool",
    "NetworkPolicy",
    "NetworkSet",
    "StagedGlobalNetworkPolicy",
    "StagedKubernetesNetworkPolicy",
    "StagedNetworkPolicy",
    "Tier",
];

/// How to reach a cluster.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ConnectionArgs {
    /// Kubeconfig [default: that of kubectl].
    #[arg(long, value_name = "PATH", global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, value_name = "NAME", global = true)]
    pub context: Option<String>,
}

/// A connection to an API server.
pub struct Connection {
    client: Client,
    mode: Mode,
}

/// An object that exists.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its name in storage, which may differ from that of the user.
    pub stored_name: String,
    /// The object in the users' form.
    pub object: Value,
}

impl Connection {
    /// Connects, and finds out how the cluster stores Calico's data.
    pub async fn open(args: &ConnectionArgs) -> Result<Self> {
        let mut config = config(args).await?;
        config.connect_timeout = Some(TIMEOUT);
        config.read_timeout = Some(TIMEOUT);
        let client = Client::try_from(config).context("kubeconfig: no client can be made of it")?;
        let mode = mode::decide(&evidence(&client).await.map_err(explained)?).mode;
        Ok(Self { client, mode })
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Storage of Calico's data.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Lists all objects of a kind as they are served; empty if the kind is not served.
    pub async fn list(
        &self,
        resource: &ApiResource,
        namespace: Option<&str>,
    ) -> Result<Vec<Value>> {
        let api = self.api(resource, namespace);
        let (mut objects, mut params) = (Vec::new(), ListParams::default().limit(PAGE));
        loop {
            let page = match api.list(&params).await {
                Err(kube::Error::Api(status)) if status.code == 404 => return Ok(objects),
                page => page
                    .map_err(explained)
                    .with_context(|| resource.plural.clone())?,
            };
            for object in page.items {
                let mut value = serde_json::to_value(object)?;
                // Objects of a list do not say what they are.
                value["apiVersion"] = resource.api_version.as_str().into();
                value["kind"] = resource.kind.as_str().into();
                objects.push(value);
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(objects),
            }
        }
    }

    /// Lists all objects of one of Calico's kinds in the users' form.
    pub async fn list_calico(&self, kind: &Kind, namespace: Option<&str>) -> Result<Vec<Value>> {
        let objects = self.list(&kind.resource(self.mode), namespace).await?;
        objects
            .into_iter()
            .map(|object| from_storage(self.mode, kind, object))
            .collect()
    }

    /// Reads an object as it is served; none if it or its kind is not there.
    pub async fn read(
        &self,
        resource: &ApiResource,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Option<Value>> {
        let found = self.api(resource, namespace).get_opt(name).await;
        let found = found.map_err(explained)?;
        Ok(found.map(serde_json::to_value).transpose()?)
    }

    /// Reads an object of one of Calico's kinds by the name that users know it by.
    pub async fn find(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Option<Found>> {
        let api = self.api(&kind.resource(self.mode), namespace);
        for stored_name in stored_names(self.mode, kind, name) {
            let found = api.get_opt(&stored_name).await.map_err(explained)?;
            let Some(found) = found else { continue };
            let object = from_storage(self.mode, kind, serde_json::to_value(found)?)?;
            if object["metadata"]["name"] == name {
                return Ok(Some(Found {
                    stored_name,
                    object,
                }));
            }
        }
        Ok(None)
    }

    /// Creates an object, given in the users' form.
    pub async fn create(&self, kind: &Kind, object: Value) -> Result<()> {
        let stored = to_storage(self.mode, kind, object, None)?;
        let namespace = stored.metadata.namespace.clone();
        let api = self.api(&kind.resource(self.mode), namespace.as_deref());
        api.create(&PostParams::default(), &stored)
            .await
            .map_err(explained)?;
        Ok(())
    }

    /// Replaces an object, unless it has changed since it was read.
    pub async fn replace(&self, kind: &Kind, found: &Found, object: Value) -> Result<()> {
        let stored = to_storage(self.mode, kind, object, Some(found))?;
        let namespace = stored.metadata.namespace.clone();
        let api = self.api(&kind.resource(self.mode), namespace.as_deref());
        api.replace(&found.stored_name, &PostParams::default(), &stored)
            .await
            .map_err(explained)?;
        Ok(())
    }

    /// Deletes an object, unless it has changed since it was read.
    pub async fn delete(&self, kind: &Kind, found: &Found) -> Result<()> {
        let text = |field: &str| found.object["metadata"][field].as_str().map(str::to_owned);
        let api = self.api(&kind.resource(self.mode), text("namespace").as_deref());
        let resource_version = text("resourceVersion");
        let preconditions = Some(Preconditions {
            uid: None,
            resource_version,
        });
        let params = DeleteParams {
            preconditions,
            ..DeleteParams::default()
        };
        api.delete(&found.stored_name, &params)
            .await
            .map_err(explained)?;
        Ok(())
    }

    /// Reads everything that policy depends on.
    pub async fn objects(&self) -> Result<Objects> {
        let mut objects = Objects::default();
        let origin = Origin {
            file: "the cluster".to_owned(),
            line: 0,
        };
        let kubernetes = KUBERNETES.iter().chain([&OPTIONAL]);
        let kubernetes =
            kubernetes.map(|(group, version, kind, plural)| resource(group, version, kind, plural));
        let calico = CALICO
            .iter()
            .filter_map(|kind| Some(Kind::of(kind)?.resource(self.mode)));
        for resource in kubernetes.chain(calico) {
            for value in self.list(&resource, None).await? {
                objects.add(&origin, value, "default");
            }
        }
        Ok(objects)
    }

    fn api(&self, resource: &ApiResource, namespace: Option<&str>) -> Api<DynamicObject> {
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        }
    }
}

/// A resource of the API.
pub fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

/// Runs what needs the network.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    // A second installation within one process, as in tests, changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(future)
}

async fn config(args: &ConnectionArgs) -> Result<Config> {
    let options = KubeConfigOptions {
        context: args.context.clone(),
        ..Default::default()
    };
    match (&args.kubeconfig, &args.context) {
        (Some(path), _) => {
            let shown = path.display();
            let file = Kubeconfig::read_from(path)
                .with_context(|| format!("--kubeconfig: {shown}: cannot be read"))?;
            let config = Config::from_custom_kubeconfig(file, &options).await;
            config.with_context(|| format!("--kubeconfig: {shown}: cannot be used"))
        }
        (None, Some(context)) => Config::from_kubeconfig(&options)
            .await
            .with_context(|| format!("--context: {context:?}: cannot be used")),
        (None, None) => Config::infer()
            .await
            .context("no cluster: there is no kubeconfig; give --kubeconfig, or -f for manifests"),
    }
}

async fn evidence(client: &Client) -> Result<Evidence, kube::Error> {
    let groups = client.list_api_groups().await?.groups;
    let groups: Vec<String> = groups.into_iter().map(|group| group.name).collect();
    let (group, name) = MIGRATION;
    let mut migration = None;
    if groups.iter().any(|served| served == group) {
        let resource = resource(group, "v1", "DatastoreMigration", "datastoremigrations");
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let found = api.get_opt(name).await?;
        migration =
            found.and_then(|found| found.data["status"]["phase"].as_str().map(str::to_owned));
    }
    Ok(Evidence { groups, migration })
}

/// Names under which an object may be stored, the usual one first.
pub fn stored_names(mode: Mode, kind: &Kind, name: &str) -> Vec<String> {
    let mut names = vec![name.to_owned()];
    if mode == Mode::V1 && kind.class == Class::Policy {
        names.push(storage::name::other_stored_name(name, name));
    }
    names
}

/// Returns an object of one of Calico's kinds in the users' form.
pub fn from_storage(mode: Mode, kind: &Kind, object: Value) -> Result<Value> {
    if mode == Mode::V3 {
        return Ok(object);
    }
    let name = object["metadata"]["name"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let mut decoded =
        storage::read(kind, object).with_context(|| format!("{} {name}", kind.stored_kind))?;
    storage::complete(kind, &mut decoded.object);
    Ok(decoded.object)
}

/// Returns what is to be stored. An object that is there keeps its name in storage, its identity
/// and, unless the user names one, the version that was read.
fn to_storage(
    mode: Mode,
    kind: &Kind,
    mut object: Value,
    found: Option<&Found>,
) -> Result<DynamicObject> {
    let metadata = object["metadata"].as_object_mut();
    let metadata = metadata.with_context(|| format!("{}: metadata: must be a map", kind.kind))?;
    metadata.retain(|field, _| !BOOKKEEPING.contains(&field.as_str()));
    if let Some(found) = found {
        let present = &found.object["metadata"];
        metadata
            .entry("resourceVersion")
            .or_insert_with(|| present["resourceVersion"].clone());
        metadata.insert("uid".to_owned(), present["uid"].clone());
        metadata.insert(
            "creationTimestamp".to_owned(),
            present["creationTimestamp"].clone(),
        );
    } else {
        for field in ["resourceVersion", "uid", "creationTimestamp"] {
            metadata.remove(field);
        }
    }
    metadata.retain(|_, value| !value.is_null());
    let mut stored = match mode {
        Mode::V3 => object,
        Mode::V1 => storage::write(kind, object)?,
    };
    if let Some(found) = found {
        stored["metadata"]["name"] = found.stored_name.as_str().into();
    }
    Ok(serde_json::from_value(stored)?)
}

/// What the API server says, with what helps.
pub fn explained(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            anyhow!("{}; ask for this right in RBAC", status.message)
        }
        kube::Error::Api(status) if status.code == 409 => {
            anyhow!(
                "{}; somebody else has changed it, try again",
                status.message
            )
        }
        kube::Error::Api(status) => anyhow!("{}", status.message),
        error => anyhow::Error::new(error).context("the API server cannot be asked"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn policy() -> &'static Kind {
        Kind::of("GlobalNetworkPolicy").expect("one of Calico's kinds")
    }

    fn written() -> Value {
        json!({
            "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
            "metadata": {"name": "p", "labels": {"a": "b"}, "managedFields": [], "uid": "old"},
            "spec": {"selector": "all()"},
        })
    }

    #[test]
    fn a_new_object_has_no_identity_yet() {
        let v3 = to_storage(Mode::V3, policy(), written(), None).expect("an object");
        let v3 = serde_json::to_value(v3).expect("a value");
        assert_eq!(v3["metadata"], json!({"name": "p", "labels": {"a": "b"}}));
        let v1 = to_storage(Mode::V1, policy(), written(), None).expect("an object");
        let v1 = serde_json::to_value(v1).expect("a value");
        assert_eq!(v1["apiVersion"], "crd.projectcalico.org/v1");
        assert_eq!(
            v1["metadata"].get("labels"),
            None,
            "they are in the annotation"
        );
        assert_eq!(v1["metadata"]["name"], "p");
    }

    #[test]
    fn a_replaced_object_keeps_its_stored_name_and_version() {
        let stored = json!({
            "apiVersion": "crd.projectcalico.org/v1", "kind": "GlobalNetworkPolicy",
            "metadata": {
                "name": "default.p", "resourceVersion": "7",
                "uid": "7d0e4a52-91c1-4c56-b8a7-5b4b9fcb3a13",
            },
            "spec": {"selector": "all()"},
        });
        let object = from_storage(Mode::V1, policy(), stored).expect("the users' form");
        assert_eq!(object["metadata"]["name"], "p");
        let found = Found {
            stored_name: "default.p".to_owned(),
            object,
        };
        let again = to_storage(Mode::V1, policy(), written(), Some(&found)).expect("an object");
        let metadata = serde_json::to_value(again.metadata).expect("a value");
        assert_eq!(metadata["name"], "default.p");
        assert_eq!(metadata["uid"], "7d0e4a52-91c1-4c56-b8a7-5b4b9fcb3a13");
        assert_eq!(metadata["resourceVersion"], "7");
        let mut stale = written();
        stale["metadata"]["resourceVersion"] = "3".into();
        let stale = to_storage(Mode::V1, policy(), stale, Some(&found)).expect("an object");
        assert_eq!(
            stale.metadata.resource_version.as_deref(),
            Some("3"),
            "so that it conflicts"
        );
    }

    #[test]
    fn policies_have_two_names_in_the_older_storage() {
        assert_eq!(stored_names(Mode::V3, policy(), "p"), ["p"]);
        assert_eq!(stored_names(Mode::V1, policy(), "p"), ["p", "default.p"]);
        let pool = Kind::of("IPPool").expect("one of Calico's kinds");
        assert_eq!(stored_names(Mode::V1, pool, "p"), ["p"]);
    }

    #[test]
    fn every_kind_that_policy_depends_on_is_read() {
        let read = KUBERNETES
            .iter()
            .chain([&OPTIONAL])
            .map(|(group, _, kind, _)| (*group, *kind));
        let read: Vec<_> = read
            .chain(CALICO.map(|kind| ("projectcalico.org", kind)))
            .collect();
        for known in margay_calc::kinds::KINDS
            .iter()
            // Policy depends neither on blocks nor on BGP.
            .filter(|known| known.kind != "IPAMBlock" && !known.kind.starts_with("BGP"))
        {
            assert!(read.contains(&(known.group, known.kind)), "{}", known.name);
        }
        assert!(CALICO.iter().all(|kind| Kind::of(kind).is_some()));
    }
}
