//! What the cluster says, as plain values: everything that later stages decide upon. Filled by [`crate::watch`], never by a request.

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
use crate::hosts::HostFacts;
use crate::object::{Key, Owner};

/// The Installation as read.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Name and identity.
    pub owner: Owner,
    /// Counts changes of the spec; conditions say which one they are about.
    pub generation: i64,
    /// The spec as stored, unknown fields included.
    pub spec: Value,
    /// Which fields of the spec were written by us (managed fields of our field manager), as the API's own trie; null where none are.
    pub written: Value,
    /// The conditions in its status.
    pub conditions: Vec<StatusCondition>,
}

/// A node as far as an operator needs to know it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeFacts {
    /// Its name.
    pub name: String,
    /// Whether pods may be scheduled to it and it runs Linux.
    pub usable: bool,
    /// Whether it runs Linux.
    pub is_linux: bool,
    /// Its labels.
    pub labels: Labels,
    /// What keeps pods away that do not tolerate it.
    pub taints: Vec<Taint>,
    /// When it was made, as the API writes it: such texts are ordered like their times.
    pub created: String,
    /// Addresses by which others reach it: its own, those of its tunnels and those of its interfaces.
    pub addresses: BTreeSet<IpAddr>,
    /// Those of them that kubelet reports.
    pub reported: BTreeSet<IpAddr>,
    /// Those of them that its agent has written as the node's own, or as ends of its tunnels.
    pub claimed: BTreeSet<IpAddr>,
    /// Those of them that are ends of its tunnels.
    pub tunnels: BTreeSet<IpAddr>,
    /// What its agent tells of its interfaces, or why that cannot be read; none: it has not told yet.
    pub interfaces: Option<Result<Vec<NodeInterface>, String>>,
}

/// An IPPool as found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PoolFacts {
    /// Its name.
    pub name: String,
    /// Its spec.
    pub spec: Value,
    /// Whether it carries our label: it was made or adopted by an operator and follows the Installation.
    pub managed: bool,
    /// When it was made, as the API writes it: such texts are ordered like their times.
    pub created: String,
    /// Whether its deletion has begun.
    pub terminating: bool,
    /// Its finalizers.
    pub finalizers: Vec<String>,
    /// Version of the object.
    pub version: String,
    /// The conditions in its status.
    pub conditions: Vec<Value>,
}

impl PoolFacts {
    /// The range, as text.
    pub fn cidr(&self) -> &str {
        self.spec["cidr"].as_str().unwrap_or_default()
    }
}

/// An object of ours as found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Present {
    /// Generation where the kind counts it, else the resource version: changes when the object does, not when its status does.
    pub version: String,
    /// Identity of the object.
    pub uid: String,
    /// Identity of the Installation that owns it; empty where none does.
    pub owner: String,
    /// Whether its deletion has begun.
    pub terminating: bool,
}

/// Everything that was gathered.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The Installation `default`, if there is one.
    pub request: Option<Request>,
    /// Names of Installations that are ignored because of their name.
    pub ignored: BTreeSet<String>,
    /// All nodes.
    pub nodes: Vec<NodeFacts>,
    /// Pod CIDRs that the platform declares, as text.
    pub pod_subnets: Vec<String>,
    /// Identity of the cluster (of its kube-system namespace).
    pub cluster_id: String,
    /// All pools; none while the API does not serve the kind.
    pub pools: Option<Vec<PoolFacts>>,
    /// Specs of FelixConfigurations, by name; none while the API does not serve the kind.
    pub felix: Option<BTreeMap<String, Value>>,
    /// Spec of IPAMConfiguration `default`, if there is one.
    pub ipam: Option<Value>,
    /// Objects of BGP, kind and name, in the storage that has such kinds.
    pub bgp: BTreeSet<String>,
    /// Names of Tiers; none while the API does not serve the kind.
    pub tiers: Option<BTreeSet<String>>,
    /// Spec of ClusterInformation `default`: outer none while the API does not serve the kind.
    pub cluster_information: Option<Option<Value>>,
    /// The KubeControllersConfiguration `default`: outer none while the API does not serve the kind.
    pub controllers: Option<Option<Value>>,
    /// All host endpoints; none while the API does not serve the kind.
    pub host_endpoints: Option<Vec<HostFacts>>,
    /// Whether the API serves admission policies that mutate.
    pub mutates: bool,
    /// Cluster IP of typha's Service.
    pub typha_address: Option<String>,
    /// What is stored of certificates.
    pub certificates: Stored,
    /// Objects that carry our label.
    pub present: BTreeMap<Key, Present>,
    /// Deployments in our namespace.
    pub deployments: Vec<Deployment>,
    /// DaemonSets in our namespace.
    pub daemon_sets: Vec<DaemonSet>,
    /// Pods in our namespace.
    pub pods: Vec<Pod>,
    /// What typha's replicas find wrong with objects and nodes.
    pub reports: Report,
    /// Keys of the reports of replicas that are gone.
    pub stale_reports: Vec<String>,
    /// Conditions of each TigeraStatus.
    pub statuses: BTreeMap<String, Vec<StatusCondition>>,
}

impl Inputs {
    /// How many nodes can run components.
    pub fn usable_nodes(&self) -> usize {
        self.nodes.iter().filter(|node| node.usable).count()
    }
}
