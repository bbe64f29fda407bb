//! State of the cluster, as plain values: the inputs of every later stage. Filled by
//! [`crate::watch`], never by a request.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Pod, Taint};
use margay_api::hosts::NodeInterface;
use margay_api::installation::StatusCondition;
use margay_api::meta::Labels;
use margay_api::report::Report;
use serde_json::Value;

use crate::certs::Stored;
use crate::manifest::{Key, Owner};

/// The Installation as read.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Name and UID.
    pub owner: Owner,
    /// Generation of the spec, which conditions refer to.
    pub generation: i64,
    /// The spec as stored, unknown fields included.
    pub spec: Value,
    /// Fields of the spec that were written by us (managed fields of our field manager), as the
    /// API's own trie; null if there are none.
    pub written: Value,
    /// Conditions in its status.
    pub conditions: Vec<StatusCondition>,
}

/// Facts of a node that the operator depends on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// Name of the node.
    pub name: String,
    /// True when pods may be scheduled to it and it runs Linux.
    pub usable: bool,
    /// True when it runs Linux.
    pub is_linux: bool,
    /// Labels of the node.
    pub labels: Labels,
    /// Taints of the node.
    pub taints: Vec<Taint>,
    /// Creation time as the API writes it: such texts have the order of their times.
    pub created: String,
    /// Addresses at which others reach it: its own, those of its tunnels and those of its
    /// interfaces.
    pub addresses: BTreeSet<IpAddr>,
    /// The addresses that kubelet reports.
    pub reported: BTreeSet<IpAddr>,
    /// The addresses that its agent has written as the node's own or its tunnels'.
    pub claimed: BTreeSet<IpAddr>,
    /// The addresses of its tunnels.
    pub tunnels: BTreeSet<IpAddr>,
    /// Interfaces that its agent reports, or why the report cannot be read; none: not reported yet.
    pub interfaces: Option<Result<Vec<NodeInterface>, String>>,
}

/// An IPPool as read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PoolFacts {
    /// Name of the pool.
    pub name: String,
    /// Spec of the pool.
    pub spec: Value,
    /// True when it has our label: it was created or adopted by an operator and follows the
    /// Installation.
    pub managed: bool,
    /// Creation time as the API writes it: such texts have the order of their times.
    pub created: String,
    /// True when its deletion has begun.
    pub terminating: bool,
    /// Finalizers of the pool.
    pub finalizers: Vec<String>,
    /// Version of the object.
    pub version: String,
    /// Conditions in its status.
    pub conditions: Vec<Value>,
}

impl PoolFacts {
    /// Returns the range, as text.
    pub fn cidr(&self) -> &str {
        self.spec["cidr"].as_str().unwrap_or_default()
    }
}

/// A host endpoint as read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostFacts {
    /// Name of the object.
    pub name: String,
    /// UID of the object.
    pub uid: String,
    /// Version of the object, which a replacement must have.
    pub version: String,
    /// Labels of the object.
    pub labels: Labels,
    /// Annotations of the object.
    pub annotations: BTreeMap<String, String>,
    /// Spec of the object.
    pub spec: Value,
}

/// An owned object as read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Present {
    /// Generation where the kind has it, else the resource version: changes with the object but not
    /// with its status.
    pub version: String,
    /// UID of the object.
    pub uid: String,
    /// UID of the Installation that owns it; empty if none does.
    pub owner: String,
    /// True when its deletion has begun.
    pub terminating: bool,
}

/// Everything that was gathered.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The Installation `default`, if it exists.
    pub request: Option<Request>,
    /// Names of Installations that are ignored because they have another name.
    pub ignored: BTreeSet<String>,
    /// All nodes.
    pub nodes: Vec<NodeFacts>,
    /// Pod CIDRs that the platform declares, as text.
    pub pod_subnets: Vec<String>,
    /// UID of the kube-system namespace, which identifies the cluster.
    pub cluster_id: String,
    /// All pools; none while the API does not serve the kind.
    pub pools: Option<Vec<PoolFacts>>,
    /// Specs of FelixConfigurations, by name; none while the API does not serve the kind.
    pub felix: Option<BTreeMap<String, Value>>,
    /// Specs of BGPConfigurations, by name; none while the API does not serve the kind.
    pub bgp: Option<BTreeMap<String, Value>>,
    /// Spec of IPAMConfiguration `default`, if there is one.
    pub ipam: Option<Value>,
    /// Names of Tiers; none while the API does not serve the kind.
    pub tiers: Option<BTreeSet<String>>,
    /// Spec of ClusterInformation `default`: outer none while the API does not serve the kind.
    pub cluster_information: Option<Option<Value>>,
    /// The KubeControllersConfiguration `default`: outer none while the API does not serve the
    /// kind.
    pub controllers: Option<Option<Value>>,
    /// All host endpoints; none while the API does not serve the kind.
    pub host_endpoints: Option<Vec<HostFacts>>,
    /// True when the API serves MutatingAdmissionPolicies.
    pub mutates: bool,
    /// Cluster IP of typha's Service.
    pub typha_address: Option<String>,
    /// Certificates as stored.
    pub certificates: Stored,
    /// Objects with our label.
    pub present: BTreeMap<Key, Present>,
    /// Deployments in our namespace.
    pub deployments: Vec<Deployment>,
    /// DaemonSets in our namespace.
    pub daemon_sets: Vec<DaemonSet>,
    /// Pods in our namespace.
    pub pods: Vec<Pod>,
    /// Problems that typha's replicas report.
    pub reports: Report,
    /// Keys of reports of replicas that are gone.
    pub stale_reports: Vec<String>,
    /// Conditions of each TigeraStatus.
    pub statuses: BTreeMap<String, Vec<StatusCondition>>,
}

impl Inputs {
    /// Number of nodes that can run components.
    pub fn usable_nodes(&self) -> usize {
        self.nodes.iter().filter(|node| node.usable).count()
    }
}
