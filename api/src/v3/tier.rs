//! Tiers as users write them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::core::Rule;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// Tiers that every installation has (Calico's own and those of Kubernetes' policy kinds): name,
/// order and default action. Validation below keeps them so.
pub const BUILT_IN_TIERS: [(&str, u32, &str); 3] = [
    ("kube-admin", 1_000, "Pass"),
    ("default", 1_000_000, "Deny"),
    ("kube-baseline", 10_000_000, "Pass"),
];

fn default_action() -> String {
    "Deny".to_owned()
}

/// Tier: a group of policies with a position among the tiers.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "Tier",
    plural = "tiers",
    derive = "PartialEq",
    status = "TierStatus",
    validation = pinned("default", "Deny", 1_000_000),
    validation = pinned("kube-admin", "Pass", 1_000),
    validation = pinned("kube-baseline", "Pass", 10_000_000),
    validation = Rule::new(
        "self.metadata.name.size() <= 63 && \
         self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",
    )
        .message("a tier's name is a DNS label: at most 63 lower case letters, digits and '-'"),
    printcolumn = r#"{"name":"Order","type":"number","jsonPath":".spec.order"}"#,
    printcolumn = r#"{"name":"DefaultAction","type":"string","jsonPath":".spec.defaultAction"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct TierSpec {
    /// Position among the tiers; lower is earlier, unset is last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<f64>,
    /// Action at the end of the tier on packets that a policy of it applied to.
    #[serde(default = "default_action")]
    #[schemars(extend("enum" = ["Pass", "Deny"]))]
    pub default_action: String,
}

/// Observed state of a tier.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
pub struct TierStatus {
    /// Conditions: `Ready`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// Rule that a built-in tier is not redefined: other policies rely on its position.
fn pinned(name: &str, action: &str, order: u32) -> Rule {
    Rule::new(format!(
        "self.metadata.name != '{name}' || self.spec.defaultAction == '{action}' && \
         has(self.spec.order) && double(self.spec.order) == {order}.0"
    ))
    .message(format!("tier {name} is built in: defaultAction {action}, order {order}").as_str())
}
