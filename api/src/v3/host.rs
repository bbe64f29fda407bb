//! HostEndpoint as users write it.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::limits;

/// Attaches policy to one or all network interfaces of a node.
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
    /// Name of the interface; * means all interfaces. Unset: the interface with one of expectedIPs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = "^([*]|[a-zA-Z0-9_.-]{0,15})$"))]
    pub interface_name: Option<String>,
    /// Addresses of the interface: used to find it if it is not named, and matched by the selectors
    /// of rules.
    #[serde(default, rename = "expectedIPs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub expected_ips: Vec<String>,
    /// Profiles, which decide about packets that no policy decides about: those of namespaces and
    /// service accounts, or projectcalico-default-allow. Without any, such packets are denied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<String>,
    /// Named ports, to which rules can refer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<EndpointPortSpec>,
}

/// Named port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointPortSpec {
    /// Name of the port.
    #[schemars(extend("pattern" = "^[a-zA-Z0-9_.-]{1,128}$"))]
    pub name: String,
    /// Protocol of the port: a name or a number.
    pub protocol: IntOrString,
    /// Port number, 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i64,
}
