//! Storage of IPAM: Calico's objects with compare-and-swap, as the allocator and the collector use
//! it. [`api_server`] is the one of a cluster, `memory` that of tests.

pub mod api_server;
#[cfg(any(test, feature = "testing"))]
pub mod memory;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use margay_api::meta::Labels;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::{BlockAffinity, IPAMBlock, IPAMHandle};

use crate::leak_scan::PodFacts;

/// Time limit of a request: a connection that has died silently must not stop what is queued behind
/// it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Reasons why a request did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The object exists already, or has changed since it was read.
    #[error("changed by somebody else")]
    Conflict,
    /// The API server does not allow it.
    #[error("{0}")]
    Refused(String),
    /// The object is there and cannot be read: nothing of it can be used until somebody repairs it.
    #[error("{0}")]
    Damaged(String),
    /// It may or may not have been done.
    #[error("{0}")]
    Failed(String),
}

/// Objects of one kind, in the users' form. Names and versions are in their metadata.
pub trait Objects<K>: Send + Sync + 'static {
    /// Reads an object, if it exists.
    fn get(&self, name: String) -> impl Future<Output = Result<Option<K>, StoreError>> + Send;
    /// Reads all objects and keeps the result of `keep` for each that can be decoded.
    fn list<T: Send>(
        &self,
        keep: fn(K) -> T,
    ) -> impl Future<Output = Result<Vec<T>, StoreError>> + Send;
    /// Creates an object, unless there is one of that name.
    fn create(&self, object: K) -> impl Future<Output = Result<K, StoreError>> + Send;
    /// Replaces an object, unless it has changed since it was read.
    fn replace(&self, object: K) -> impl Future<Output = Result<K, StoreError>> + Send;
    /// Deletes the object of that name, only with that UID and that version if they are set.
    /// Returns true when it is gone, false when it is another one or has changed.
    fn delete(&self, metadata: ObjectMeta)
    -> impl Future<Output = Result<bool, StoreError>> + Send;
}

/// Storage of IPAM.
pub trait Store: Objects<IPAMBlock> + Objects<BlockAffinity> + Objects<IPAMHandle> {
    /// Reads a namespace; one that does not exist has no labels and no annotations.
    fn namespace(&self, name: String)
    -> impl Future<Output = Result<Namespace, StoreError>> + Send;
}

/// Nodes, pods and pools, which tell whether addresses and blocks are still needed.
pub trait Cluster: Send + Sync {
    /// Names of all nodes.
    fn nodes(&self) -> impl Future<Output = Result<BTreeSet<String>, StoreError>> + Send;
    /// All pods, by `namespace/name`.
    fn pods(&self) -> impl Future<Output = Result<BTreeMap<String, PodFacts>, StoreError>> + Send;
    /// Ranges of all pools but those that are being deleted; none if one cannot be read.
    fn pools(&self) -> impl Future<Output = Result<Option<Vec<IpNet>>, StoreError>> + Send;
    /// Reads a node by name, which is conclusive where a list may be incomplete.
    fn has_node(&self, name: String) -> impl Future<Output = Result<bool, StoreError>> + Send;
    /// Reads a pod by `namespace/name`, which is conclusive where a list may be incomplete.
    fn pod(
        &self,
        name: String,
    ) -> impl Future<Output = Result<Option<PodFacts>, StoreError>> + Send;
}

/// A namespace, as far as addresses of its pods depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its labels.
    pub labels: Labels,
    /// Its annotations that name pools, as written.
    pub pools: BTreeMap<IpVersion, String>,
}

/// State of an affinity of a node to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AffinityState {
    /// The node is about to create the block.
    Pending,
    /// The block is the node's.
    Confirmed,
    /// The block is about to be deleted.
    PendingDeletion,
}

impl AffinityState {
    /// The state as Calico spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Confirmed => "confirmed",
            Self::PendingDeletion => "pendingDeletion",
        }
    }
}

/// Runs a request, or several that belong together, with a time limit. After it, they count as
/// failed: they may or may not have been done.
pub(crate) async fn bounded<T>(
    request: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let elapsed = |_| {
        Err(StoreError::Failed(format!(
            "no answer from the API server within {REQUEST_TIMEOUT:?}"
        )))
    };
    tokio::time::timeout(REQUEST_TIMEOUT, request)
        .await
        .unwrap_or_else(elapsed)
}
