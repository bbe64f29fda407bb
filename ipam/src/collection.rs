//! One kind of Calico's objects in the API server: read and written in the users' form, whichever way the cluster stores it.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;

use futures::TryStreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, DynamicObject, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use margay_api::storage::{self, Kind, Mode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::store::StoreError;

/// All objects of a kind by name; `None` until they have been listed.
pub type Listed<K> = Option<Arc<BTreeMap<String, K>>>;

/// See the module.
pub struct Collection<K> {
    kind: &'static Kind,
    mode: Mode,
    api: Api<DynamicObject>,
    of: PhantomData<fn() -> K>,
}

impl<K: Serialize + DeserializeOwned> Collection<K> {
    /// The kind that users know by that name, all namespaces.
    pub fn new(client: &Client, mode: Mode, kind: &str) -> Self {
        let kind = Kind::of(kind).expect("every kind that IPAM names is one of Calico's");
        let api = Api::all_with(client.clone(), &kind.resource(mode));
        Self { kind, mode, api, of: PhantomData }
    }

    /// The object, if there is one.
    pub async fn get(&self, name: &str) -> Result<Option<K>, StoreError> {
        self.api.get_opt(name).await.map_err(error)?.map(|found| self.parse(found)).transpose()
    }

    /// Makes an object that does not exist.
    pub async fn create(&self, object: &K) -> Result<K, StoreError> {
        let stored = self.stored(object)?;
        self.parse(self.api.create(&PostParams::default(), &stored).await.map_err(error)?)
    }

    /// Replaces an object that has not changed since it was read.
    pub async fn replace(&self, name: &str, object: &K) -> Result<K, StoreError> {
        let stored = self.stored(object)?;
        self.parse(self.api.replace(name, &PostParams::default(), &stored).await.map_err(error)?)
    }

    /// Deletes the object with that name, and UID if there is one; that it is gone, or another one, is a success.
    pub async fn delete(&self, metadata: &ObjectMeta) -> Result<(), StoreError> {
        let name = metadata.name.as_deref().unwrap_or_default();
        let only = metadata.uid.clone().map(|uid| Preconditions { uid: Some(uid), resource_version: None });
        let params = DeleteParams { preconditions: only, ..DeleteParams::default() };
        match self.api.delete(name, &params).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            result => result.map(drop).map_err(error),
        }
    }

    fn parse(&self, object: DynamicObject) -> Result<K, StoreError> {
        let name = object.name_any();
        let wrong = |fault: &dyn std::fmt::Display| {
            StoreError::Failed(format!("{} {name}: {fault}; repair or delete it", self.kind.kind))
        };
        let bytes = serde_json::to_vec(&object).map_err(|error| wrong(&error))?;
        let read = storage::decode_as(self.mode, self.kind, &bytes).map_err(|fault| wrong(&fault))?;
        Ok(read.object)
    }

    fn stored(&self, object: &K) -> Result<DynamicObject, StoreError> {
        let wrong = |fault: &dyn std::fmt::Display| StoreError::Failed(format!("{}: {fault}", self.kind.kind));
        let value = storage::encode(self.mode, self.kind, object).map_err(|fault| wrong(&fault))?;
        serde_json::from_value(value).map_err(|error| wrong(&error))
    }
}

impl<K: Serialize + DeserializeOwned + Clone + Send + Sync + 'static> Collection<K> {
    /// Follows the whole kind, and waits for it where it is not served: one that is not there yet must not be taken for one without objects.
    pub fn follow(self) -> watch::Receiver<Listed<K>> {
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(self.run(sender));
        receiver
    }

    async fn run(self, sender: watch::Sender<Listed<K>>) {
        let mut events = std::pin::pin!(watcher(self.api.clone(), watcher::Config::default()).default_backoff());
        let (mut known, mut listed) = (BTreeMap::new(), BTreeMap::new());
        loop {
            match events.try_next().await {
                Ok(Some(watcher::Event::Init)) => {
                    listed.clear();
                    continue;
                }
                Ok(Some(watcher::Event::InitApply(object))) => {
                    self.keep(object, &mut listed);
                    continue;
                }
                Ok(Some(watcher::Event::InitDone)) => known = std::mem::take(&mut listed),
                Ok(Some(watcher::Event::Apply(object))) => self.keep(object, &mut known),
                Ok(Some(watcher::Event::Delete(object))) => drop(known.remove(&object.name_any())),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(kind = self.kind.kind, storage = %self.mode, %error, "watch interrupted; what is known stays in use");
                    continue;
                }
            }
            sender.send_replace(Some(Arc::new(known.clone())));
        }
    }

    /// An object that cannot be read hurts only itself: what was known of it stays.
    fn keep(&self, object: DynamicObject, known: &mut BTreeMap<String, K>) {
        let name = object.name_any();
        match self.parse(object) {
            Ok(object) => drop(known.insert(name, object)),
            Err(error) => tracing::warn!(%error, "left out"),
        }
    }
}

fn error(error: kube::Error) -> StoreError {
    match &error {
        kube::Error::Api(status) if status.code == 409 => StoreError::Conflict,
        kube::Error::Api(status) if status.code == 403 => StoreError::Refused(status.message.clone()),
        kube::Error::Api(status) => StoreError::Failed(status.message.clone()),
        _ => StoreError::Failed(error.to_string()),
    }
}
