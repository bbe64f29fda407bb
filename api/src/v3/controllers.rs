//! Settings of the cluster's controllers as users write them. What is not about host endpoints is somebody else's and left as it is.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use super::parse::controllers::{host_endpoints, leak_grace};

/// Settings of the cluster's controllers; the object `default` counts.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "KubeControllersConfiguration",
    plural = "kubecontrollersconfigurations",
    shortname = "kcc",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct KubeControllersConfigurationSpec {
    /// What each controller does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controllers: Option<ControllersSpec>,
}

/// What each controller does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct ControllersSpec {
    /// What is done for nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeControllerSpec>,
}

/// What is done for nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct NodeControllerSpec {
    /// Host endpoints that are made for every node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_endpoint: Option<AutoHostEndpointSpec>,
    /// How long an address has had no pod before it is released, like 15m (the default); with 0s it never is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leak_grace_period: Option<String>,
}

/// Host endpoints that are made for every node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoHostEndpointSpec {
    /// Enabled, or Disabled (the default): then those that were made are removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Enabled", "Disabled"]))]
    pub auto_create: Option<String>,
    /// Enabled (the default): one of every node for all of its interfaces, named NODE-auto-hep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Enabled", "Disabled"]))]
    pub create_default_host_endpoint: Option<String>,
    /// More of them, for some interfaces of some nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub templates: Vec<HostEndpointTemplateSpec>,
}

/// Host endpoints for some interfaces of some nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostEndpointTemplateSpec {
    /// What tells these from others: they are named NODE-GENERATENAME-auto-hep, with interfacePattern NODE-GENERATENAME-INTERFACE-auto-hep.
    #[schemars(length(max = 253), extend("pattern" = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub generate_name: String,
    /// Which of the node's addresses it has: those of these ranges, to which interfacePattern adds those of the interface; without either, all.
    #[serde(default, rename = "interfaceCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub interface_cidrs: Vec<String>,
    /// A regular expression: each interface of a node gets one of its own if a part of its name matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface_pattern: Option<String>,
    /// Labels, beside those of the node and over them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Nodes that get one, by their labels; without, all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub node_selector: Option<String>,
}
