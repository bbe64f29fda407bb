//! One kind of Calico's objects, typed, whichever way the cluster stores it.

use std::marker::PhantomData;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, PostParams, Preconditions};
use kube::{Client, Error};
use margay_api::storage::{self, Fault, Kind, Mode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::apply::bounded;

/// Objects of a page.
const PAGE: u32 = 500;

/// Why something was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The API says so.
    #[error("{0}")]
    Api(#[from] Error),
    /// An object is not what its kind says.
    #[error("{0}; repair or delete it")]
    Fault(#[from] Fault),
    /// An object contradicts itself.
    #[error("{0}; repair or delete it")]
    Unsound(String),
}

/// See the module.
pub struct Objects<K> {
    kind: &'static Kind,
    mode: Mode,
    api: Api<DynamicObject>,
    of: PhantomData<fn() -> K>,
}

impl<K: Serialize + DeserializeOwned> Objects<K> {
    /// The kind that users know by that name.
    pub fn new(client: &Client, mode: Mode, kind: &str) -> Self {
        let kind = Kind::of(kind).expect("every kind that is collected is one of Calico's");
        Self { kind, mode, api: Api::all_with(client.clone(), &kind.resource(mode)), of: PhantomData }
    }

    /// The object, if there is one.
    pub async fn get(&self, name: &str) -> Result<Option<K>, StoreError> {
        bounded(self.api.get_opt(name)).await?.map(|found| self.parse(&found)).transpose()
    }

    /// What is wanted of each object that can be read; the objects themselves are forgotten a page at a time.
    pub async fn map<T>(&self, keep: impl Fn(K) -> T) -> Result<Vec<T>, StoreError> {
        let read = |object: &DynamicObject| match self.parse(object) {
            Ok(object) => Some(keep(object)),
            Err(error) => {
                tracing::warn!(kind = self.kind.kind, name = object.metadata.name, %error, "left alone");
                None
            }
        };
        Ok(pages(&self.api, read).await?.into_iter().flatten().collect())
    }

    /// Replaces an object that has not changed since it was read.
    pub async fn replace(&self, name: &str, object: &K) -> Result<K, StoreError> {
        let stored = storage::encode(self.mode, self.kind, object)?;
        let stored: DynamicObject = serde_json::from_value(stored).map_err(Fault::from)?;
        let written = bounded(self.api.replace(name, &PostParams::default(), &stored)).await?;
        self.parse(&written)
    }

    /// Deletes the object as it was read. Answers whether it is gone: if somebody has changed it since, it is not.
    pub async fn delete(&self, metadata: &ObjectMeta) -> Result<bool, StoreError> {
        let only = Preconditions { uid: metadata.uid.clone(), resource_version: metadata.resource_version.clone() };
        let params = DeleteParams::default().preconditions(only);
        match bounded(self.api.delete(metadata.name.as_deref().unwrap_or_default(), &params)).await {
            Err(Error::Api(status)) if status.code == 404 => Ok(true),
            Err(Error::Api(status)) if status.code == 409 => Ok(false),
            outcome => Ok(outcome.map(|_| true)?),
        }
    }

    fn parse(&self, object: &DynamicObject) -> Result<K, StoreError> {
        let bytes = serde_json::to_vec(object).map_err(Fault::from)?;
        Ok(storage::decode_as(self.mode, self.kind, &bytes)?.object)
    }
}

/// Everything of a kind, a page at a time; what is not needed of a page is forgotten before the next.
pub async fn pages<K, T>(api: &Api<K>, keep: impl Fn(&K) -> T) -> Result<Vec<T>, Error>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    let mut kept = Vec::new();
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = bounded(api.list(&params)).await?;
        kept.extend(page.items.iter().map(&keep));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(kept),
        }
    }
}
