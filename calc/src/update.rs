//! Input of `calc`: the latest state of one object, or its absence.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::bgp::{BgpFilter, BgpPeer, BgpSettings};
use margay_api::endpoint::{EndpointKey, HostEndpoint, ServiceAddresses, WorkloadEndpoint};
use margay_api::meta::{Labels, NamespacedName};
use margay_api::network::{BlockInfo, NetworkSet, NodeInfo, Pool};
use margay_api::policy::{Policy, PolicyKey, StagedPolicy, Tier};
use margay_api::rule::Protocol;
use margay_api::settings::FelixOverrides;

/// Identity of a network set; the namespace is empty for global ones.
pub type NetworkSetKey = NamespacedName;

/// One backend of a Service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Backend {
    /// Address of the backend.
    pub address: IpAddr,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// Port number at the backend.
    pub port: u16,
    /// Node of the backend, while it is ready to serve.
    pub ready_on: Option<Arc<str>>,
}

/// A namespace, as far as its pods depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Labels, which its pods inherit.
    pub labels: Labels,
    /// An annotation names the pools that its pods have their addresses from.
    pub names_pools: bool,
}

impl From<Labels> for NamespaceInfo {
    fn from(labels: Labels) -> Self {
        Self {
            labels,
            names_pools: false,
        }
    }
}

/// The latest state of one object; `None` means that it does not exist. Applying the same update
/// twice has no further effect.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// A pod that is scheduled and not host-networked, as an endpoint.
    Endpoint(EndpointKey, Option<WorkloadEndpoint>),
    /// A host endpoint by the name of its object.
    HostEndpoint(String, Option<HostEndpoint>),
    /// A namespace.
    Namespace(String, Option<NamespaceInfo>),
    /// Labels of a service account.
    ServiceAccount(NamespacedName, Option<Labels>),
    /// An enforced policy of any kind.
    Policy(PolicyKey, Option<Policy>),
    /// A policy of a staged kind.
    Staged(PolicyKey, Option<StagedPolicy>),
    /// A tier.
    Tier(String, Option<Tier>),
    /// A network set, namespaced or global.
    NetworkSet(NetworkSetKey, Option<NetworkSet>),
    /// Backends of a Service, from all its EndpointSlices.
    Service(NamespacedName, Option<Vec<Backend>>),
    /// A node.
    Node(String, Option<NodeInfo>),
    /// An IP pool by the name of its object.
    Pool(String, Option<Pool>),
    /// An IPAM block by its range.
    Block(IpNet, Option<BlockInfo>),
    /// A FelixConfiguration by the name of its object.
    Settings(String, Option<FelixOverrides>),
    /// Addresses of a Service that nodes may announce.
    ServiceAddresses(NamespacedName, Option<ServiceAddresses>),
    /// A BGPConfiguration by the name of its object.
    BgpSettings(String, Option<BgpSettings>),
    /// A BGPPeer by the name of its object.
    BgpPeer(String, Option<BgpPeer>),
    /// A BGPFilter by the name of its object.
    BgpFilter(String, Option<BgpFilter>),
}

impl Update {
    /// Update that removes the object.
    pub fn removal(&self) -> Self {
        match self {
            Self::Endpoint(key, _) => Self::Endpoint(key.clone(), None),
            Self::Namespace(key, _) => Self::Namespace(key.clone(), None),
            Self::ServiceAccount(key, _) => Self::ServiceAccount(key.clone(), None),
            Self::Policy(key, _) => Self::Policy(key.clone(), None),
            Self::HostEndpoint(key, _) => Self::HostEndpoint(key.clone(), None),
            Self::Staged(key, _) => Self::Staged(key.clone(), None),
            Self::Tier(key, _) => Self::Tier(key.clone(), None),
            Self::NetworkSet(key, _) => Self::NetworkSet(key.clone(), None),
            Self::Service(key, _) => Self::Service(key.clone(), None),
            Self::Node(key, _) => Self::Node(key.clone(), None),
            Self::Pool(key, _) => Self::Pool(key.clone(), None),
            Self::Block(key, _) => Self::Block(*key, None),
            Self::Settings(key, _) => Self::Settings(key.clone(), None),
            Self::ServiceAddresses(key, _) => Self::ServiceAddresses(key.clone(), None),
            Self::BgpSettings(key, _) => Self::BgpSettings(key.clone(), None),
            Self::BgpPeer(key, _) => Self::BgpPeer(key.clone(), None),
            Self::BgpFilter(key, _) => Self::BgpFilter(key.clone(), None),
        }
    }
}
