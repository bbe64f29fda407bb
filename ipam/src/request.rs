//! Requests for addresses, and the reasons why there may be none.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;

use super::pools::{PoolChoice, Use};

/// Request for an address of each IP version that is needed: all of them or none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressRequest {
    /// Handle and attributes that are kept with the addresses.
    pub attribute: AllocationAttribute,
    /// Demand for an IPv4 address.
    pub ipv4: Demand,
    /// Demand for an IPv6 address.
    pub ipv6: Demand,
    /// For IPv4 and IPv6, true when the pod itself names the pools: then those that its namespace
    /// names do not count.
    pub named_by_pod: [bool; 2],
    /// Exactly these addresses instead of the demands; empty: any.
    pub exact: Vec<IpAddr>,
    /// Use of the addresses.
    pub usage: Use,
    /// Pools with a namespaceSelector that selects the pod's namespace; known once the namespace
    /// has been read.
    pub admitted: BTreeSet<String>,
}

impl AddressRequest {
    /// Request of a pod that needs an address of each IP version that has a pool. The handle is
    /// `<network>.<container id>`, as Calico's plugin spells it.
    pub fn of_pod(handle: String, pod: &EndpointKey) -> Self {
        let secondary = [
            ("namespace", pod.namespace.clone()),
            ("pod", pod.name.clone()),
        ];
        let secondary = secondary.map(|(key, value)| (key.to_owned(), value)).into();
        let attribute = AllocationAttribute {
            handle_id: Some(handle),
            secondary: Some(secondary),
            ..AllocationAttribute::default()
        };
        Self {
            attribute,
            ..Self::default()
        }
    }

    /// The handle.
    pub fn handle(&self) -> &str {
        self.attribute.handle_id.as_deref().unwrap_or_default()
    }

    /// Namespace of the pod; empty if it is not for a pod.
    pub(super) fn namespace(&self) -> &str {
        let secondary = self.attribute.secondary.as_ref();
        secondary
            .and_then(|secondary| secondary.get("namespace"))
            .map(String::as_str)
            .unwrap_or_default()
    }

    /// Demand of each IP version.
    pub(super) fn demands(&self) -> [(IpVersion, &Demand); 2] {
        [(IpVersion::V4, &self.ipv4), (IpVersion::V6, &self.ipv6)]
    }

    /// Choice of pools of a request that names these.
    pub(super) fn choice(&self, named: Vec<String>) -> PoolChoice {
        PoolChoice {
            usage: self.usage,
            named,
            admitted: self.admitted.clone(),
        }
    }
}

/// Demand for an address of one IP version. A pod gets addresses of all versions that it needs, or
/// none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Demand {
    /// None.
    Never,
    /// One, if this node may use a pool of that version without naming it.
    #[default]
    IfPooled,
    /// One from these pools (names or ranges); empty: from any pool that need not be named.
    Always(Vec<String>),
}

/// Reasons why there is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    /// All pools that the pod may use are full, or there are none.
    #[error("{0}")]
    Exhausted(String),
    /// An address or a pool that the pod names cannot be had.
    #[error("{0}")]
    Refused(String),
    /// Storage did not answer. Nothing was claimed, or what was claimed has the handle and is
    /// released with it.
    #[error("{0}")]
    Unavailable(String),
}

impl NoAddress {
    /// The answer to what is asked of an allocator that ends.
    pub(super) fn stopping() -> Self {
        Self::Unavailable("the agent is stopping; the runtime will try again".to_owned())
    }
}

/// Assigns and releases addresses of pods.
pub trait Addresses: Send + Sync + 'static {
    /// Assigns addresses, which storage has under the handle when this returns. A second request
    /// with the same handle gets the same addresses.
    fn assign(
        &self,
        request: AddressRequest,
    ) -> impl Future<Output = Result<Vec<IpNet>, NoAddress>> + Send;
    /// Releases all addresses of the handle. An unknown handle is a success.
    fn release(&self, handle: String) -> impl Future<Output = Result<(), NoAddress>> + Send;
}
