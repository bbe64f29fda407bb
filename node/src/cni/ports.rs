//! Interfaces of the CNI service to the rest of the agent, as traits, so that it can be tested
//! without an API server.

use std::future::Future;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::EndpointKey;

use super::attachment::Attachment;
use margay_dataplane::Attached;

/// Reason why a pod's policy is not in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotEnforced {
    /// typha has not sent the pod's policy yet.
    #[error("policy of the pod has not been received yet: {0}")]
    Unknown(String),
    /// The kernel refused the policy.
    #[error("policy of the pod could not be programmed: {0}")]
    Refused(String),
}

/// Programs pods' policy and routes in the kernel.
pub trait Enforcer: Clone + Send + Sync + 'static {
    /// Returns once the pod's policy and addresses are committed. May wait for as long as the
    /// caller allows.
    fn attach(&self, interface: String, pod: Attached) -> impl Future<Output = Result<(), NotEnforced>> + Send;
    /// Returns once nothing of the endpoint is enforced any more; one that was never attached is a
    /// success. False: nothing is written to the kernel now, and rules of an earlier run may still
    /// let its packets pass, so its link has to be removed first.
    fn detach(&self, endpoint: EndpointKey, interface: String) -> impl Future<Output = bool> + Send;
    /// Notes that a pod's link was created: its addresses are routed to it from now on. Returns
    /// once the route worker does not remove these routes as stale.
    fn link_made(&self, interface: String, index: u32, pod: Attached) -> impl Future<Output = ()> + Send;
    /// Notes that the link of a detached endpoint is gone, and its routes with it. A later link of
    /// the same name is left alone.
    fn link_gone(&self, interface: String, index: Option<u32>) -> impl Future<Output = ()> + Send;
    /// Reason why no pod can be attached now, if any.
    fn not_ready_reason(&self) -> Option<String>;
}

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

/// Announces the addresses of pods to the cluster.
pub trait Announcer: Send + Sync + 'static {
    /// Announces the pod's addresses. Does not block.
    fn announce(&self, attachment: &Attachment);
    /// Announces that the pod has no addresses any more. Does not block.
    fn withdraw(&self, attachment: &Attachment);
}
