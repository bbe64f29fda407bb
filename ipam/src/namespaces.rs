//! Namespaces, as far as they decide about addresses of their pods: by labels, where a pool has a
//! namespaceSelector, and by annotations that name pools.
//!
//! typha says whether any namespace names pools. If none does and no pool has a namespaceSelector,
//! no namespace is read. Else a pod's namespace is read while its addresses are assigned, so that
//! the read delays nobody. If it turns out to name pools, the addresses are released and assigned
//! again; from then on, pods of that namespace wait for the read first.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use margay_api::meta::{ANNOTATION_POD_POOLS_V4, ANNOTATION_POD_POOLS_V6};
use margay_api::rule::IpVersion;
use parking_lot::{Mutex, MutexGuard};

use super::pools::NodePool;
use super::request::{AddressRequest, Demand, NoAddress};
use super::store::{Namespace, Store, StoreError, bounded};

/// Reads a namespace.
pub type ReadNamespace =
    Arc<dyn Fn(String) -> BoxFuture<'static, Result<Namespace, StoreError>> + Send + Sync>;

/// Reads namespaces from storage.
pub fn reader<S: Store>(store: Arc<S>) -> ReadNamespace {
    Arc::new(move |name| {
        let store = store.clone();
        async move { bounded(store.namespace(name)).await }.boxed()
    })
}

/// Influence of its namespace on the addresses of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relevance {
    /// None is possible.
    None,
    /// None is known.
    Unlikely,
    /// A pool has a namespaceSelector, or the namespace is known to name pools.
    Likely,
}

/// Namespaces that are known to name pools.
#[derive(Clone, Default)]
pub(super) struct NamespacesWithPools(Arc<Mutex<BTreeSet<String>>>);

impl NamespacesWithPools {
    /// Influence of the namespace on the request. `none_names_pools`: no namespace does.
    pub(super) fn relevance(
        &self,
        request: &AddressRequest,
        pools: &[NodePool],
        none_names_pools: bool,
    ) -> Relevance {
        let mut demands = request.demands().into_iter().zip(request.named_by_pod);
        let may_name = !none_names_pools
            && request.exact.is_empty()
            && demands.any(|((_, demand), by_pod)| *demand != Demand::Never && !by_pod);
        match (pools.iter().any(|pool| pool.namespaces.is_some()), may_name) {
            (true, _) => Relevance::Likely,
            (false, true) if self.names().contains(request.namespace()) => Relevance::Likely,
            (false, true) => Relevance::Unlikely,
            (false, false) => Relevance::None,
        }
    }

    /// Records if the namespace names pools.
    pub(super) fn learn(&self, name: &str, namespace: &Namespace) {
        match namespace.pools.is_empty() {
            true => drop(self.names().remove(name)),
            false => drop(self.names().insert(name.to_owned())),
        }
    }

    fn names(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock()
    }
}

/// Returns the demands of the pod: pools that it names itself count before those of its namespace,
/// and these before those of the network configuration.
pub(super) fn demands(
    request: &AddressRequest,
    namespace: &Namespace,
) -> Result<[Demand; 2], NoAddress> {
    let mut demands = [request.ipv4.clone(), request.ipv6.clone()];
    for ((version, demand), by_pod) in IpVersion::ALL
        .into_iter()
        .zip(&mut demands)
        .zip(request.named_by_pod)
    {
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
            "annotation {annotation} of Namespace {name} is {text:?}: must be a JSON list of names \
             or ranges of IPPools, such as [\"pool-a\"]; correct the Namespace"
        )));
    }
    Ok(named)
}

/// Returns the pools with a namespaceSelector that selects the namespace.
pub(super) fn admitted(pools: &[NodePool], namespace: &Namespace) -> BTreeSet<String> {
    let selects = |pool: &&NodePool| {
        pool.namespaces
            .as_ref()
            .is_some_and(|selector| selector.matches(&namespace.labels))
    };
    pools
        .iter()
        .filter(selects)
        .map(|pool| pool.name.clone())
        .collect()
}
