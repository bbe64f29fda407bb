//! Rules of policies as users write them.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Rule of a policy. All criteria that are set must match.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "self.action == 'Allow' || !has(self.http)",
        "message": "http is only allowed in rules with action Allow",
    },
    {
        "rule": "!has(self.icmp) && !has(self.notICMP) || has(self.protocol) && (self.protocol == \
                 'ICMP' || self.protocol == 'ICMPv6' || self.protocol == 1 || self.protocol == 58)",
        "message": "icmp and notICMP need protocol ICMP or ICMPv6",
    },
    {
        "rule": "!has(self.ipVersion) || !has(self.protocol) || !(self.protocol == 'ICMP' && \
                 self.ipVersion == 6) && !(self.protocol == 'ICMPv6' && self.ipVersion == 4)",
        "message": "ICMP is for ipVersion 4 and ICMPv6 for 6: leave ipVersion out",
    },
    {
        "rule": "!has(self.protocol) || !(self.protocol == 'ICMP' || self.protocol == 'ICMPv6' || \
                 self.protocol == 'UDPLite') || (!has(self.source) || !has(self.source.ports) && \
                 !has(self.source.notPorts)) && (!has(self.destination) || \
                 !has(self.destination.ports) && !has(self.destination.notPorts))",
        "message": "ports need a protocol that has them: TCP, UDP or SCTP",
    },
    {
        "rule": "!has(self.destination) || !has(self.destination.services) || \
                 !has(self.destination.ports) && !has(self.destination.notPorts)",
        "message": "destination.ports and notPorts cannot be combined with destination.services: \
                    the Service determines its ports",
    },
]))]
pub struct RuleSpec {
    /// Action on a packet that matches: Allow, Deny, Log (and continue) or Pass (to the next tier).
    #[schemars(extend("enum" = ["Allow", "Deny", "Log", "Pass"]))]
    pub action: String,
    /// Matches packets of this IP version only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = [4, 6]))]
    pub ip_version: Option<i32>,
    /// Matches packets of this protocol only: a name or a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<IntOrString>,
    /// Matches packets of other protocols only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_protocol: Option<IntOrString>,
    /// Matches ICMP packets of this type and code only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<IcmpSpec>,
    /// Does not match ICMP packets of this type and code.
    #[serde(default, rename = "notICMP", skip_serializing_if = "Option::is_none")]
    pub not_icmp: Option<IcmpSpec>,
    /// Match of the packet's source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<EntityRule>,
    /// Match of the packet's destination.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<EntityRule>,
    /// Match of HTTP requests. Not supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpMatch>,
    /// Annotations of the rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<RuleMetadata>,
    /// Unknown criteria: the rule is refused, because ignoring one would widen it.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// Match of one side of a packet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!has(self.services) || !has(self.selector) && !has(self.notSelector) && \
             !has(self.namespaceSelector) && !has(self.serviceAccounts) && !has(self.nets) && \
             !has(self.notNets)",
    "message": "services cannot be combined with selectors, serviceAccounts, nets or notNets",
}]))]
pub struct EntityRule {
    /// The address is in one of these ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "set"))]
    pub nets: Vec<String>,
    /// The address is in none of these ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "set"))]
    pub not_nets: Vec<String>,
    /// The address belongs to an endpoint or network set with matching labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub selector: Option<String>,
    /// The address does not belong to one with matching labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub not_selector: Option<String>,
    /// The endpoint or network set is in a namespace with matching labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub namespace_selector: Option<String>,
    /// The port is one of these: a number, a range `first:last`, or a name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub ports: Vec<IntOrString>,
    /// The port is none of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 50))]
    pub not_ports: Vec<IntOrString>,
    /// The endpoint runs under one of these service accounts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_accounts: Option<ServiceAccountMatch>,
    /// The address and port are an endpoint of this Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<ServiceMatch>,
    /// Unknown criteria.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// Service accounts by name and by label; both must match if both are set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceAccountMatch {
    /// Names; empty means any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub names: Vec<String>,
    /// Selector over labels of the service account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub selector: Option<String>,
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceMatch {
    /// Name of the Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Namespace of the Service. Default: that of the policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// ICMP type and code.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!has(self.code) || has(self.type)",
    "message": "an ICMP code needs an ICMP type",
}]))]
pub struct IcmpSpec {
    /// ICMP type.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 254))]
    pub kind: Option<i32>,
    /// ICMP code; requires a type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 255))]
    pub code: Option<i32>,
}

/// Match of HTTP requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HttpMatch {
    /// Methods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub methods: Vec<String>,
    /// Paths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub paths: Vec<HttpPath>,
}

/// Match of HTTP paths: one of the two fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HttpPath {
    /// The whole path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub exact: Option<String>,
    /// Prefix of the path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub prefix: Option<String>,
}

/// Metadata of a rule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RuleMetadata {
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}
