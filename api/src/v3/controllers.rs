//! KubeControllersConfiguration as users write it. Margay reads the settings of host endpoints and
//! leaked addresses, and preserves the others.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of the cluster's controllers, in the object `default`.
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
    /// Settings of each controller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controllers: Option<ControllersSpec>,
}

/// Settings of each controller.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct ControllersSpec {
    /// Settings of the node controller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeControllerSpec>,
}

/// Settings of the node controller.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct NodeControllerSpec {
    /// Automatic host endpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_endpoint: Option<AutoHostEndpointSpec>,
    /// Time without a pod after which an address is released, such as 15m (the default); 0s
    /// disables it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leak_grace_period: Option<String>,
}

/// Automatic host endpoints.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoHostEndpointSpec {
    /// Enabled or Disabled (the default). Disabled removes the host endpoints that were created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Enabled", "Disabled"]))]
    pub auto_create: Option<String>,
    /// Enabled (the default): one host endpoint per node for all of its interfaces, named
    /// NODE-auto-hep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Enabled", "Disabled"]))]
    pub create_default_host_endpoint: Option<String>,
    /// Further host endpoints, for some interfaces of some nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub templates: Vec<HostEndpointTemplateSpec>,
}

/// Template of host endpoints for some interfaces of some nodes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostEndpointTemplateSpec {
    /// Part of the names of these host endpoints: NODE-GENERATENAME-auto-hep, or
    /// NODE-GENERATENAME-INTERFACE-auto-hep with interfacePattern.
    #[schemars(length(max = 253), extend("pattern" = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub generate_name: String,
    /// Addresses of the node to include: those in these ranges, and those of the interface with
    /// interfacePattern; without either, all.
    #[serde(
        default,
        rename = "interfaceCIDRs",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub interface_cidrs: Vec<String>,
    /// Regular expression: each interface of a node gets a host endpoint of its own if part of its
    /// name matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface_pattern: Option<String>,
    /// Labels, added to those of the node; these take precedence.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Nodes that get a host endpoint, by their labels. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub node_selector: Option<String>,
}
