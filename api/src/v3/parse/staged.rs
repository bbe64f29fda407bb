//! Parses staged policies: changes to preview for enforced policies.

use serde::Serialize;
use serde_json::Value;

use super::policy::{global, namespace_of, namespaced};
use crate::policy::{Policy, StagedPolicy};
use crate::problem::{Problems, Refusal};
use crate::v3::policy::{
    StagedGlobalNetworkPolicy, StagedKubernetesNetworkPolicy, StagedNetworkPolicy,
};

type Parsed = Result<StagedPolicy, Refusal<StagedPolicy>>;

/// Parses a staged namespaced policy. A refusal has no replacement, as nothing is enforced.
pub fn staged_network_policy(policy: &StagedNetworkPolicy) -> Parsed {
    let spec = &policy.spec;
    let namespace = namespace_of(&policy.metadata.namespace);
    staged(&spec.staged_action, &spec.policy, || {
        namespaced(namespace, &spec.policy)
    })
}

/// Parses a staged cluster-wide policy. A refusal has no replacement, as nothing is enforced.
pub fn staged_global_network_policy(policy: &StagedGlobalNetworkPolicy) -> Parsed {
    let spec = &policy.spec;
    staged(&spec.staged_action, &spec.policy, || global(&spec.policy))
}

/// Parses a staged Kubernetes policy. A refusal has no replacement, as nothing is enforced.
pub fn staged_kubernetes_network_policy(policy: &StagedKubernetesNetworkPolicy) -> Parsed {
    let spec = &policy.spec;
    let kubernetes = k8s_openapi::api::networking::v1::NetworkPolicySpec {
        pod_selector: spec.pod_selector.clone(),
        ingress: spec.ingress.clone(),
        egress: spec.egress.clone(),
        policy_types: spec.policy_types.clone(),
    };
    let namespace = namespace_of(&policy.metadata.namespace);
    staged(&spec.staged_action, &kubernetes, || {
        crate::k8s::netpol::spec(namespace, &kubernetes)
    })
}

/// `Set` and `Learn` (a proposal by a tool) carry the policy; `Delete` allows no other field;
/// `Ignore` is not evaluated, whatever else is set.
fn staged<S: Serialize>(
    action: &Option<String>,
    spec: &S,
    policy: impl FnOnce() -> Result<Policy, Refusal>,
) -> Parsed {
    const FIELD: &str = "spec.stagedAction";
    let mut problems = Problems::default();
    match action.as_deref().unwrap_or_default() {
        "" | "Set" | "Learn" => match policy() {
            Ok(policy) => return Ok(StagedPolicy::Set(policy)),
            Err(Refusal { problems, .. }) => {
                return Err(Refusal {
                    problems,
                    closed: None,
                    prefers_former: false,
                });
            }
        },
        "Ignore" => return Ok(StagedPolicy::Ignore),
        "Delete" => match field_beside_tier(spec) {
            None => return Ok(StagedPolicy::Delete),
            Some(field) => problems.add(
                format!("spec.{field}"),
                "Delete",
                "stagedAction Delete removes the enforced policy of this name and allows no other \
                 fields",
                "remove every field but stagedAction and tier, or use stagedAction Set",
            ),
        },
        other => problems.add(
            FIELD,
            other,
            "not an action",
            "use Set, Delete, Learn or Ignore",
        ),
    }
    Err(Refusal::without_replacement(problems))
}

/// Returns the first field that is set, other than the tier.
fn field_beside_tier(spec: &impl Serialize) -> Option<String> {
    let Ok(Value::Object(fields)) = serde_json::to_value(spec) else {
        return None;
    };
    let is_set = |value: &Value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    };
    fields
        .into_iter()
        .find(|(name, value)| name != "tier" && is_set(value))
        .map(|(name, _)| name)
}
