//! Workload and host endpoints in parsed form.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use data_encoding::HEXLOWER;

use crate::meta::{Labels, NamespacedName};
use crate::rule::Protocol;

/// Identity of a workload endpoint: its pod. A pod has one endpoint, `eth0`.
pub type EndpointKey = NamespacedName;

/// A port that a pod declares under a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NamedPort {
    /// Name, unique within protocol and pod.
    pub name: String,
    /// Protocol of the port.
    pub protocol: Protocol,
    /// Port number.
    pub port: u16,
}

/// A pod as an endpoint. Labels inherited from namespace and service account are not included:
/// `calc` adds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEndpoint {
    /// Node that the pod is scheduled on.
    pub node: String,
    /// The pod's labels with the reserved labels of Calico added.
    pub labels: Labels,
    /// Service account of the pod; may be empty.
    pub service_account: String,
    /// Addresses; empty until known, and again once the pod has finished.
    pub addresses: Vec<IpAddr>,
    /// Named ports of all containers.
    pub ports: Vec<NamedPort>,
    /// The pod's uid as the container runtime knows it; empty: not known.
    pub uid: String,
    /// Host side interface, from [`interface_name`].
    pub interface: String,
}

/// A HostEndpoint: interfaces of a node to which policy applies. Labels inherited from its profiles
/// are not included: `calc` adds them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostEndpoint {
    /// Node that has the interfaces.
    pub node: String,
    /// Labels that selectors see.
    pub labels: Labels,
    /// Interfaces that it covers.
    pub interface: HostInterface,
    /// Addresses of the interfaces, in order, each once; not empty with
    /// [`HostInterface::ByAddress`].
    pub addresses: Vec<IpAddr>,
    /// Named ports.
    pub ports: Vec<NamedPort>,
    /// Profiles, which decide about packets that no policy decides about, in order, each once.
    pub profiles: Vec<Profile>,
}

/// Selection of the interfaces of a host endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostInterface {
    /// All interfaces of the node.
    All,
    /// By name.
    Named(String),
    /// By one of the addresses.
    ByAddress,
}

/// A profile: it decides about packets that no policy decides about, and its labels are inherited.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    /// Allows everything.
    Allow,
    /// Profile of a namespace (`kns.NAME`), which allows everything if the namespace exists.
    Namespace(String),
    /// Profile of a service account (`ksa.NAMESPACE.NAME`), which passes to the next profile if the
    /// account exists.
    ServiceAccount(NamespacedName),
    /// A name that no profile can have.
    Unknown,
}

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

/// Addresses of a Service that nodes may announce by BGP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceAddresses {
    /// Cluster IPs.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// External IPs.
    pub external_ips: BTreeSet<IpAddr>,
    /// Addresses of the load balancer.
    pub load_balancer_ips: BTreeSet<IpAddr>,
    /// Only nodes with a backend serve it (`externalTrafficPolicy: Local`).
    pub is_local: bool,
}

/// Returns Calico's name for the host side of a pod's veth pair: `cali` and the first 11 hex digits
/// of SHA-1 over `namespace.pod`.
pub fn interface_name(key: &EndpointKey) -> String {
    use sha1::{Digest, Sha1};
    let hex = HEXLOWER.encode(&Sha1::digest(format!("{}.{}", key.namespace, key.name)));
    format!("cali{}", &hex[..11])
}
