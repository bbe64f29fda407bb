//! Client for one kind of Calico's objects: typed, whichever way the cluster stores it.

use std::marker::PhantomData;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, PostParams, Preconditions};
use kube::{Client, Error};
use margay_api::storage::{self, Kind, Mode, StorageError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::client::bounded;

/// Objects per page of a list.
const PAGE: u32 = 500;

/// Reasons why an object was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Error of the API.
    #[error("{0}")]
    Api(#[from] Error),
    /// An object does not match its kind.
    #[error("{0}; repair or delete it")]
    Storage(#[from] StorageError),
    /// An object contradicts itself.
    #[error("{0}; repair or delete it")]
    Unsound(String),
}

/// Objects of one kind of Calico's.
pub struct CalicoObjects<K> {
    kind: &'static Kind,
    mode: Mode,
    api: Api<DynamicObject>,
    of: PhantomData<fn() -> K>,
}

impl<K: Serialize + DeserializeOwned> CalicoObjects<K> {
    /// Creates a client for the kind of that name in `projectcalico.org/v3`.
    pub fn new(client: &Client, mode: Mode, kind: &str) -> Self {
        let kind = Kind::of(kind).expect("every kind that is collected is one of Calico's");
        Self { kind, mode, api: Api::all_with(client.clone(), &kind.resource(mode)), of: PhantomData }
    }

    /// Reads an object, if it exists.
    pub async fn get(&self, name: &str) -> Result<Option<K>, StoreError> {
        bounded(self.api.get_opt(name)).await?.map(|found| self.parse(&found)).transpose()
    }

    /// Reads all objects and keeps the result of `keep` for each that can be decoded; the objects
    /// are dropped page by page.
    pub async fn map<T>(&self, keep: impl Fn(K) -> T) -> Result<Vec<T>, StoreError> {
        let read = |object: &DynamicObject| match self.parse(object) {
            Ok(object) => Some(keep(object)),
            Err(error) => {
                tracing::warn!(kind = self.kind.kind, name = object.metadata.name, %error, "object cannot be read and is skipped");
                None
            }
        };
        Ok(pages(&self.api, read).await?.into_iter().flatten().collect())
    }

    /// Replaces an object that has not changed since it was read.
    pub async fn replace(&self, name: &str, object: &K) -> Result<K, StoreError> {
        let stored = storage::encode(self.mode, self.kind, object)?;
        let stored: DynamicObject = serde_json::from_value(stored).map_err(StorageError::from)?;
        let written = bounded(self.api.replace(name, &PostParams::default(), &stored)).await?;
        self.parse(&written)
    }

    /// Deletes the object as it was read. Returns true when it is gone, false when it has changed
    /// since.
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
        let bytes = serde_json::to_vec(object).map_err(StorageError::from)?;
        Ok(storage::decode_as(self.mode, self.kind, &bytes)?.object)
    }
}

/// Lists all objects of a kind page by page, keeping the result of `keep` for each.
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
