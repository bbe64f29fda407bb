//! Host endpoints as users write them: interfaces of nodes under policy.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::limits;

pub use super::parse::host::host_endpoint;

/// Interfaces of a node under policy.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "HostEndpoint",
    plural = "hostendpoints",
    shortname = "hep",
    shortname = "heps",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.node"}"#,
    printcolumn = r#"{"name":"Interface","type":"string","jsonPath":".spec.interfaceName"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::host_endpoint_rules()))]
pub struct HostEndpointSpec {
    /// Name of the node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// Name of the interface; * is all of them. Without: the interface that has one of expectedIPs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = "^([*]|[a-zA-Z0-9_.-]{0,15})$"))]
    pub interface_name: Option<String>,
    /// Addresses of the interface: how it is found where it is not named, and what selectors of rules stand for that match this object.
    #[serde(default, rename = "expectedIPs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub expected_ips: Vec<String>,
    /// What decides about packets of the host that no policy decides: profiles of namespaces and service accounts, or
    /// projectcalico-default-allow. Without any, such packets are denied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<String>,
    /// Ports by name, for the rules that name them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<EndpointPortSpec>,
}

/// A port under a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointPortSpec {
    /// The name.
    #[schemars(extend("pattern" = "^[a-zA-Z0-9_.-]{1,128}$"))]
    pub name: String,
    /// Protocol of the port: a name or a number.
    pub protocol: IntOrString,
    /// The port.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i64,
}
