//! What is asked of IPAM for a pod, and why there may be no address.

use std::future::Future;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;

/// What is asked of IPAM for one pod interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressRequest {
    /// Under which the addresses are kept: `<network>.<container id>`, as Calico's plugin has it.
    pub handle: String,
    /// The pod.
    pub endpoint: EndpointKey,
    /// Whether it needs an IPv4 address.
    pub ipv4: Demand,
    /// Whether it needs an IPv6 address.
    pub ipv6: Demand,
    /// Whether the pod itself names the pools for its IPv4 and its IPv6 address: then what its Namespace names does not count.
    pub named_by_pod: [bool; 2],
    /// Exactly these addresses instead of what is needed otherwise; empty: any.
    pub exact: Vec<IpAddr>,
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
