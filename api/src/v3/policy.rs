//! Policies as users write them: namespaced, cluster-wide, and the staged forms of both and of
//! Kubernetes' own kind.

use k8s_openapi::api::networking::v1::{NetworkPolicyEgressRule, NetworkPolicyIngressRule};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::limits;
use super::rule::RuleSpec;
use crate::policy::DEFAULT_TIER;

fn default_tier() -> String {
    DEFAULT_TIER.to_owned()
}

/// Network policy for the workloads of one namespace.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "NetworkPolicy",
    validation = limits::namespaced_name(),
    plural = "networkpolicies",
    namespaced,
    shortname = "caliconetworkpolicy",
    shortname = "cnp",
    derive = "PartialEq",
    selectable = ".spec.tier",
    printcolumn = r#"{"name":"Tier","type":"string","jsonPath":".spec.tier"}"#,
    printcolumn = r#"{"name":"Order","type":"number","jsonPath":".spec.order"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::namespaced_rules()))]
pub struct NetworkPolicySpec {
    /// Tier that the policy belongs to.
    #[serde(default = "default_tier")]
    pub tier: String,
    /// Position in the tier; lower is earlier, unset is last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<f64>,
    /// Workloads of the namespace that the policy applies to. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub selector: Option<String>,
    /// Restricts the policy to workloads whose service account has matching labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub service_account_selector: Option<String>,
    /// Directions that the policy applies to. Default: Egress if there are only egress rules, both
    /// if there are both, else Ingress.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "limits::directions")]
    pub types: Vec<String>,
    /// Rules for packets to the workload, in order. Both directions together: at most 65,536 rules,
    /// ranges and ports, and 16,384 selectors, Services and named ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub ingress: Vec<RuleSpec>,
    /// Rules for packets from the workload, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub egress: Vec<RuleSpec>,
    /// Performance hints. Accepted and ignored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "limits::performance_hints")]
    pub performance_hints: Vec<String>,
}

/// Network policy for endpoints of the whole cluster.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "GlobalNetworkPolicy",
    validation = limits::global_name(),
    plural = "globalnetworkpolicies",
    shortname = "gnp",
    shortname = "cgnp",
    derive = "PartialEq",
    selectable = ".spec.tier",
    printcolumn = r#"{"name":"Tier","type":"string","jsonPath":".spec.tier"}"#,
    printcolumn = r#"{"name":"Order","type":"number","jsonPath":".spec.order"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::global_rules()))]
pub struct GlobalNetworkPolicySpec {
    /// Tier that the policy belongs to.
    #[serde(default = "default_tier")]
    pub tier: String,
    /// Position in the tier; lower is earlier, unset is last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<f64>,
    /// Endpoints that the policy applies to. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub selector: Option<String>,
    /// Restricts the policy to endpoints in namespaces with matching labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub namespace_selector: Option<String>,
    /// Restricts the policy to workloads whose service account has matching labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub service_account_selector: Option<String>,
    /// Directions that the policy applies to. Default: Egress if there are only egress rules, both
    /// if there are both, else Ingress.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "limits::directions")]
    pub types: Vec<String>,
    /// Rules for packets to the endpoint, in order. Both directions together: at most 65,536 rules,
    /// ranges and ports, and 16,384 selectors, Services and named ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub ingress: Vec<RuleSpec>,
    /// Rules for packets from the endpoint, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub egress: Vec<RuleSpec>,
    /// Applies the policy to packets that a host endpoint forwards, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apply_on_forward: Option<bool>,
    /// Applies the policy before connection tracking, to host endpoints only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub do_not_track: Option<bool>,
    /// Applies the policy before DNAT, to host endpoints only.
    #[serde(default, rename = "preDNAT", skip_serializing_if = "Option::is_none")]
    pub pre_dnat: Option<bool>,
    /// Performance hints. Accepted and ignored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "limits::performance_hints")]
    pub performance_hints: Vec<String>,
}

/// Preview of a network policy for the workloads of one namespace: it is evaluated but not
/// enforced.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "StagedNetworkPolicy",
    validation = limits::namespaced_name(),
    plural = "stagednetworkpolicies",
    namespaced,
    shortname = "scnp",
    shortname = "snp",
    derive = "PartialEq",
    selectable = ".spec.tier",
    printcolumn = r#"{"name":"Tier","type":"string","jsonPath":".spec.tier"}"#,
    printcolumn = r#"{"name":"Action","type":"string","jsonPath":".spec.stagedAction"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::staged_rules()))]
pub struct StagedNetworkPolicySpec {
    /// Change to preview for the enforced policy of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::staged_action")]
    pub staged_action: Option<String>,
    /// The policy to preview.
    #[serde(flatten)]
    pub policy: NetworkPolicySpec,
}

/// Preview of a network policy for endpoints of the whole cluster: it is evaluated but not
/// enforced.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "StagedGlobalNetworkPolicy",
    validation = limits::global_name(),
    plural = "stagedglobalnetworkpolicies",
    shortname = "sgnp",
    derive = "PartialEq",
    selectable = ".spec.tier",
    printcolumn = r#"{"name":"Tier","type":"string","jsonPath":".spec.tier"}"#,
    printcolumn = r#"{"name":"Action","type":"string","jsonPath":".spec.stagedAction"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::staged_global_rules()))]
pub struct StagedGlobalNetworkPolicySpec {
    /// Change to preview for the enforced policy of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::staged_action")]
    pub staged_action: Option<String>,
    /// The policy to preview.
    #[serde(flatten)]
    pub policy: GlobalNetworkPolicySpec,
}

/// Preview of a Kubernetes network policy: it is evaluated but not enforced.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "StagedKubernetesNetworkPolicy",
    plural = "stagedkubernetesnetworkpolicies",
    namespaced,
    shortname = "sknp",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Action","type":"string","jsonPath":".spec.stagedAction"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::staged_kubernetes_rules()))]
pub struct StagedKubernetesNetworkPolicySpec {
    /// Change to preview for the enforced policy of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::staged_action")]
    pub staged_action: Option<String>,
    /// Pods of the namespace that the policy applies to; empty means all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<LabelSelector>,
    /// Rules for packets to the pod. Both directions together: at most 65,536 rules, ranges and
    /// ports, and 16,384 selectors, Services and named ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Vec<NetworkPolicyIngressRule>>,
    /// Rules for packets from the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<NetworkPolicyEgressRule>>,
    /// Directions that the policy applies to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_types: Option<Vec<String>>,
}
