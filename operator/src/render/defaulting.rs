//! Mutating admission policy with defaults of Calico's policies, as Calico's own API server stores
//! them.
//!
//! Enforcement does not depend on it, as every reader of a policy applies the same defaults; so the
//! request passes if it fails.

use margay_api::storage::Mode;
use serde_json::{Value, json};

use super::Context;
use super::validating_policy::{Requests, metadata};
use crate::manifest::{MANAGER, Object};

/// Name of the policy.
const DEFAULTS: &str = "margay-policy-defaults";

/// Kinds of Calico's policies that have a tier.
const POLICIES: [&str; 4] = [
    "globalnetworkpolicies",
    "networkpolicies",
    "stagedglobalnetworkpolicies",
    "stagednetworkpolicies",
];

/// Names of all policies, which their bindings share.
pub(super) const NAMES: [&str; 1] = [DEFAULTS];

/// Default of `types` from the rules: egress alone, both, or ingress.
const TYPES: &str = "size(variables.egress) == 0 ? ['Ingress'] : size(variables.ingress) == 0 ? \
                     ['Egress'] : ['Ingress', 'Egress']";

/// Returns the policy and its binding, if the API serves them. Objects of the older storage are
/// written by programs, which set defaults themselves.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    if !context.inputs.mutates || context.settings.mode == Mode::V1 {
        return Vec::new();
    }
    let bound =
        json!({ "metadata": metadata(DEFAULTS, MANAGER), "spec": { "policyName": DEFAULTS } });
    vec![
        context.object("MutatingAdmissionPolicy", defaults()),
        context.object("MutatingAdmissionPolicyBinding", bound),
    ]
}

fn defaults() -> Value {
    let variable = |name: &str, expression: &str| json!({ "name": name, "expression": expression });
    let list = |field: &str| format!("has(object.spec.{field}) ? object.spec.{field} : []");
    let patch = |expression: String| {
        json!({
            "patchType": "JSONPatch",
            "jsonPatch": { "expression": expression },
        })
    };
    let label = "'projectcalico.org/tier'";
    json!({
        "metadata": metadata(DEFAULTS, MANAGER),
        "spec": {
            "failurePolicy": "Ignore",
            "reinvocationPolicy": "Never",
            "matchConstraints": Requests::of_calico(
                Mode::V3,
                &POLICIES,
                &["CREATE", "UPDATE"],
            ).constraints(),
            "matchConditions": [{ "name": "has-a-spec", "expression": "has(object.spec)" }],
            "variables": [
                variable("ingress", &list("ingress")),
                variable("egress", &list("egress")),
                variable("types", &list("types")),
                variable(
                    "tier",
                    "has(object.spec.tier) && object.spec.tier != '' ? object.spec.tier : \
                     'default'",
                ),
                variable(
                    "deletes",
                    "has(object.spec.stagedAction) && object.spec.stagedAction == 'Delete'",
                ),
                variable("labels", "has(object.metadata.labels) ? object.metadata.labels : {}"),
            ],
            "mutations": [
                patch(format!(
                    "size(variables.types) > 0 || variables.deletes ? [] : [JSONPatch{{op: 'add', \
                     path: '/spec/types', value: {TYPES}}}]"
                )),
                patch(
                    "has(object.spec.tier) && object.spec.tier == variables.tier ? [] : \
                     [JSONPatch{op: 'add', path: '/spec/tier', value: variables.tier}]"
                        .to_owned(),
                ),
                patch(format!(
                    "{label} in variables.labels && variables.labels[{label}] == variables.tier ? \
                     [] : !has(object.metadata.labels) ? [JSONPatch{{op: 'add', path: \
                     '/metadata/labels', value: {{{label}: variables.tier}}}}] : [JSONPatch{{op: \
                     'add', path: '/metadata/labels/' + jsonpatch.escapeKey({label}), value: \
                     variables.tier}}]"
                )),
            ],
        },
    })
}
