//! What a namespace says of the addresses of its pods: by its labels, where a pool has a namespaceSelector, and by annotations that name pools.
//!
//! It is read by name for each pod, beside the claim of its addresses and not before it, so that it delays nobody: what is claimed meanwhile is right but
//! for pods of namespaces that say something, and is taken back where one turns out to. Of those it is known from then on that they have to be asked first.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use futures::FutureExt;
use futures::future::BoxFuture;
use margay_api::meta::{ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6};
use margay_api::rule::IpVersion;

use super::pools::NodePool;
use super::request::{AddressRequest, Demand, NoAddress};
use super::store::{Namespace, Store, StoreError, bounded};

/// Reads a namespace.
pub type Look = Arc<dyn Fn(String) -> BoxFuture<'static, Result<Namespace, StoreError>> + Send + Sync>;

/// Reads namespaces from storage.
pub fn look<S: Store>(store: Arc<S>) -> Look {
    Arc::new(move |name| {
        let store = store.clone();
        async move { bounded(store.namespace(name)).await }.boxed()
    })
}

/// Whether what the namespace says may matter to a pod, and is asked before anything is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relevance {
    /// It cannot matter.
    None,
    /// It is not known to.
    Unlikely,
    /// A pool asks for its labels, or it is known to have annotations.
    Likely,
}

/// Namespaces that are known to name pools.
#[derive(Clone, Default)]
pub(super) struct Known(Arc<Mutex<BTreeSet<String>>>);

impl Known {
    /// What the namespace of this name says of this pod.
    pub(super) fn relevance(&self, request: &AddressRequest, pools: &[NodePool]) -> Relevance {
        let demands = request.demands().into_iter().zip(request.named_by_pod);
        let may_name = request.exact.is_empty()
            && demands.into_iter().any(|((_, demand), by_pod)| *demand != Demand::Never && !by_pod);
        match (pools.iter().any(|pool| pool.namespaces.is_some()), may_name) {
            (true, _) => Relevance::Likely,
            (false, true) if self.names().contains(request.namespace()) => Relevance::Likely,
            (false, true) => Relevance::Unlikely,
            (false, false) => Relevance::None,
        }
    }

    /// Remembers whether it names pools.
    pub(super) fn learn(&self, name: &str, namespace: &Namespace) {
        match namespace.pools.is_empty() {
            true => drop(self.names().remove(name)),
            false => drop(self.names().insert(name.to_owned())),
        }
    }

    fn names(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What the pod asks for with what its namespace says: pools that it names come after the pod's own and before those of the network configuration.
pub(super) fn demands(request: &AddressRequest, namespace: &Namespace) -> Result<[Demand; 2], NoAddress> {
    let mut demands = [request.ipv4.clone(), request.ipv6.clone()];
    for ((version, demand), by_pod) in IpVersion::ALL.into_iter().zip(&mut demands).zip(request.named_by_pod) {
        if let Some(text) = namespace.pools.get(&version)
            && *demand != Demand::Never
            && !by_pod
        {
            *demand = Demand::Always(pools(version, request.namespace(), text)?);
        }
    }
    Ok(demands)
}

fn pools(version: IpVersion, name: &str, text: &str) -> Result<Vec<String>, NoAddress> {
    let named: Vec<String> = serde_json::from_str(text).unwrap_or_default();
    if named.is_empty() || named.iter().any(String::is_empty) {
        let annotation = match version {
            IpVersion::V4 => ANNOTATION_POD_POOLS_V4,
            IpVersion::V6 => ANNOTATION_POD_POOLS_V6,
        };
        return Err(NoAddress::Refused(format!(
            "annotation {annotation} of Namespace {name} is {text:?}: must be a JSON list of names or ranges of IPPools, such as [\"pool-a\"]; correct the Namespace"
        )));
    }
    Ok(named)
}

/// Pools with a namespaceSelector that selects the namespace.
pub(super) fn admitted(pools: &[NodePool], namespace: &Namespace) -> BTreeSet<String> {
    let selects =
        |pool: &&NodePool| pool.namespaces.as_ref().is_some_and(|selector| selector.matches(&namespace.labels));
    pools.iter().filter(selects).map(|pool| pool.name.clone()).collect()
}
