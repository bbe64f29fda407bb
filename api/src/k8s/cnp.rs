//! Kubernetes' cluster-wide policies, `policy.networking.k8s.io` ClusterNetworkPolicy, as users
//! write them.
//!
//! The schema is that of the network-policy-api project, with its experimental fields for named
//! ports and nodes. Types decode whatever an API server may hold, including one that serves a newer
//! version of the kind; `convert` fails closed on what it does not recognise.

mod convert;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::CustomResource;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use convert::{key, policy};

/// Name of the definition of the kind.
pub const DEFINITION: &str = "clusternetworkpolicies.policy.networking.k8s.io";

/// Tier of policies that no other policy can override.
pub const ADMIN_TIER: &str = "kube-admin";
/// Tier of policies that every namespaced policy overrides.
pub const BASELINE_TIER: &str = "kube-baseline";

/// Network policy for the whole cluster.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "policy.networking.k8s.io",
    version = "v1alpha2",
    kind = "ClusterNetworkPolicy",
    plural = "clusternetworkpolicies",
    shortname = "cnp",
    derive = "PartialEq",
    status = "ClusterNetworkPolicyStatus",
    annotation(
        "api-approved.kubernetes.io",
        "unapproved, as the network-policy-api project has it"
    ),
    printcolumn = r#"{"name":"Tier","type":"string","jsonPath":".spec.tier"}"#,
    printcolumn = r#"{"name":"Priority","type":"string","jsonPath":".spec.priority"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[schemars(extend("required" = ["tier", "priority", "subject"]))]
pub struct ClusterNetworkPolicySpec {
    /// Admin (before namespaced policies) or Baseline (after them).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Admin", "Baseline"]))]
    pub tier: Option<String>,
    /// Place in the tier, from 0 to 1000; lower is earlier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub priority: Option<i32>,
    /// Pods that the policy applies to: exactly one field must be set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "subject")]
    pub subject: Option<Peer>,
    /// Rules for packets to the pods, in order. Without any, the policy does not affect them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 25))]
    pub ingress: Vec<IngressRule>,
    /// Rules for packets from the pods, in order. Without any, the policy does not affect them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 25))]
    pub egress: Vec<EgressRule>,
}

/// Observed state of the policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterNetworkPolicyStatus {
    /// Conditions by type.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Rule for packets to a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("required" = ["action", "from"]))]
pub struct IngressRule {
    /// Name of the rule, for information.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 100))]
    pub name: String,
    /// Accept, Deny, or Pass (to the next tier).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(extend("enum" = ["Accept", "Deny", "Pass"]))]
    pub action: String,
    /// Sources of the packet: any of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "ingress_peers")]
    pub from: Vec<Peer>,
    /// Protocols and ports of the packet: any of these; unset means all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 25))]
    pub protocols: Vec<ProtocolMatch>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// Rule for packets from a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("required" = ["action", "to"], "x-kubernetes-validations" = [{
    "rule": "!(self.to.exists(peer, has(peer.networks) || has(peer.nodes)) && has(self.protocols) \
             && self.protocols.exists(protocol, has(protocol.destinationNamedPort)))",
    "message": "networks and nodes have no named ports: give destinationPort in protocols, or \
                write a rule of its own",
}]))]
pub struct EgressRule {
    /// Name of the rule, for information.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 100))]
    pub name: String,
    /// Accept, Deny, or Pass (to the next tier).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(extend("enum" = ["Accept", "Deny", "Pass"]))]
    pub action: String,
    /// Destinations of the packet: any of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "egress_peers")]
    pub to: Vec<Peer>,
    /// Protocols and ports of the packet: any of these; unset means all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 25))]
    pub protocols: Vec<ProtocolMatch>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// Peer of a rule: exactly one field must be set. Subjects and sources are namespaces or pods only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct Peer {
    /// All pods of the namespaces that match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Pods that match, in namespaces that match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPods>,
    /// Addresses of the nodes that match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<LabelSelector>,
    /// Address ranges, which may include pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "networks")]
    pub networks: Option<Vec<String>>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// Pods in namespaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("required" = ["podSelector"]))]
pub struct NamespacedPods {
    /// Namespaces; empty is all.
    #[serde(default, skip_serializing_if = "selects_all")]
    pub namespace_selector: LabelSelector,
    /// Pods; empty is all.
    #[serde(default, skip_serializing_if = "selects_all")]
    pub pod_selector: LabelSelector,
    /// Fields that this version does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// Protocol and port of a packet: exactly one field must be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct ProtocolMatch {
    /// TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TransportMatch>,
    /// UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub udp: Option<TransportMatch>,
    /// SCTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sctp: Option<TransportMatch>,
    /// Named port of the receiving pod, with its protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_named_port: Option<String>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// Ports of one protocol.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("minProperties" = 1))]
pub struct TransportMatch {
    /// Destination port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<PortMatch>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// One port or a range: exactly one field must be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct PortMatch {
    /// A single port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub number: Option<i32>,
    /// A range of ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<RangeMatch>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    #[schemars(skip)]
    pub unknown: BTreeMap<String, Value>,
}

/// Ports from the first to the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.start < self.end",
    "message": "a range starts below its end: use number for a single port",
}]))]
pub struct RangeMatch {
    /// First port.
    #[schemars(range(min = 1, max = 65535))]
    pub start: i32,
    /// Last port.
    #[schemars(range(min = 1, max = 65535))]
    pub end: i32,
}

fn selects_all(selector: &LabelSelector) -> bool {
    *selector == LabelSelector::default()
}

fn networks(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": {
            "type": "string",
            "maxLength": 43,
            "x-kubernetes-validations": [{
                "rule": "isCIDR(self)",
                "message": "not a range: write it like 10.0.0.0/8 or fd00::/8",
            }],
        },
        "minItems": 1,
        "maxItems": 25,
        "x-kubernetes-list-type": "set",
    })
}

/// Returns the schema of a peer with these fields only.
fn peer(generator: &mut SchemaGenerator, fields: &[&str]) -> Value {
    let mut schema = Peer::json_schema(generator).to_value();
    if let Some(properties) = schema["properties"].as_object_mut() {
        properties.retain(|name, _| fields.contains(&name.as_str()));
    }
    schema
}

fn peers(generator: &mut SchemaGenerator, fields: &[&str]) -> Schema {
    let items = peer(generator, fields);
    json_schema!({ "type": "array", "items": items, "minItems": 1, "maxItems": 25 })
}

fn subject(generator: &mut SchemaGenerator) -> Schema {
    let schema = peer(generator, &["namespaces", "pods"]);
    Schema::try_from(schema).unwrap_or_else(|_| json_schema!({ "type": "object" }))
}

fn ingress_peers(generator: &mut SchemaGenerator) -> Schema {
    peers(generator, &["namespaces", "pods"])
}

fn egress_peers(generator: &mut SchemaGenerator) -> Schema {
    peers(generator, &["namespaces", "pods", "nodes", "networks"])
}
