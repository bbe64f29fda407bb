//! Network sets as users write them: addresses outside of the cluster that selectors can match by
//! label.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Set of addresses that policies of one namespace can select.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "NetworkSet",
    plural = "networksets",
    shortname = "netsets",
    namespaced,
    derive = "PartialEq"
)]
pub struct NetworkSetSpec {
    /// Addresses and address ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub nets: Vec<String>,
}

/// Set of addresses that cluster-wide policies, and others by `global()`, can select.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "GlobalNetworkSet",
    plural = "globalnetworksets",
    shortname = "gns",
    derive = "PartialEq"
)]
pub struct GlobalNetworkSetSpec {
    /// Addresses and address ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub nets: Vec<String>,
}
