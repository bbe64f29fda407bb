//! Requests for addresses, and the reasons why there may be none.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;
use margay_api::rule::IpVersion;
use margay_api::v3::ipam::AllocationAttribute;

use super::pools::{Choice, Use};

/// Request for an address of each IP version that is needed: all of them or none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressRequest {
    /// Handle and attributes that are kept with the addresses.
    pub attribute: AllocationAttribute,
    /// Whether an IPv4 address is needed.
    pub ipv4: Demand,
    /// Whether an IPv6 address is needed.
    pub ipv6: Demand,
    /// Whether the pod itself names the pools for its IPv4 and its IPv6 address: then what its
    /// namespace names does not count.
    pub named_by_pod: [bool; 2],
    /// Exactly these addresses instead of what is needed otherwise; empty: any.
    pub exact: Vec<IpAddr>,
    /// Use of the addresses.
    pub usage: Use,
    /// Pools with a namespaceSelector that selects the pod's namespace; known once the namespace has
    /// been read.
    pub admitted: BTreeSet<String>,
}

impl AddressRequest {
    /// Request of a pod that needs an address of each IP version that has a pool. The handle is
    /// `<network>.<container id>`, as Calico's plugin spells it.
    pub fn of_pod(handle: String, pod: &EndpointKey) -> Self {
        let secondary = [("namespace", pod.namespace.clone()), ("pod", pod.name.clone())];
        let secondary = secondary.map(|(key, value)| (key.to_owned(), value)).into();
        let attribute = AllocationAttribute {
            handle_id: Some(handle),
            secondary: Some(secondary),
            ..AllocationAttribute::default()
        };
        Self { attribute, ..Self::default() }
    }

    /// The handle.
    pub fn handle(&self) -> &str {
        self.attribute.handle_id.as_deref().unwrap_or_default()
    }

    /// Namespace of the pod; empty if it is not for a pod.
    pub(super) fn namespace(&self) -> &str {
        let secondary = self.attribute.secondary.as_ref();
        secondary.and_then(|secondary| secondary.get("namespace")).map(String::as_str).unwrap_or_default()
    }

    /// Demand of each IP version.
    pub(super) fn demands(&self) -> [(IpVersion, &Demand); 2] {
        [(IpVersion::V4, &self.ipv4), (IpVersion::V6, &self.ipv6)]
    }

    /// Choice of pools of a request that names these.
    pub(super) fn choice(&self, named: Vec<String>) -> Choice {
        Choice { usage: self.usage, named, admitted: self.admitted.clone() }
    }
}

/// Whether an address of one IP version is needed. A pod gets an address of every version that it needs, or none at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Demand {
    /// It is not.
    Never,
    /// If there is a pool of that version which this node may use without naming it.
    #[default]
    IfPooled,
    /// It is, and from one of these pools (names or ranges); empty: from any that need not be named.
    Always(Vec<String>),
}

/// Why there is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    /// All pools that the pod may use are full, or there is none.
    #[error("{0}")]
    Exhausted(String),
    /// An address that the pod names cannot be had.
    #[error("{0}")]
    Refused(String),
    /// The API could not be asked; nothing was claimed, or what was claimed is kept under the handle and is given back with it.
    #[error("{0}")]
    Unavailable(String),
}

/// Claims and releases addresses.
pub trait Addresses: Send + Sync + 'static {
    /// Returns addresses that are durably claimed under the handle; asked again with the same handle, the same addresses.
    fn assign(&self, request: AddressRequest) -> impl Future<Output = Result<Vec<IpNet>, NoAddress>> + Send;
    /// Returns once nothing is claimed under the handle; an unknown handle is a success.
    fn release(&self, handle: String) -> impl Future<Output = Result<(), NoAddress>> + Send;
}
