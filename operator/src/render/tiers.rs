//! Requires Calico's RBAC permissions for writing policies of a tier.
//!
//! Calico's API server requires `get` on the tier, and the verb on `tier.networkpolicies`
//! (`tier.globalnetworkpolicies` and so on) for the policy's name or `TIER.*`. Here an admission
//! policy checks the same with the authorizer. It sees writes only: reading requires only
//! permission to read the kind.

use margay_api::storage::Mode;
use margay_api::v3;
use serde_json::{Value, json};

use super::Context;
use super::validating_policy::{self, Requests};
use crate::manifest::{MANAGER, Object};

/// Name of the policy.
const RIGHTS: &str = "margay-tier-rights";

/// Kinds of policies that have a tier.
const POLICIES: [&str; 4] = [
    "globalnetworkpolicies",
    "networkpolicies",
    "stagedglobalnetworkpolicies",
    "stagednetworkpolicies",
];

/// Names of all policies, which their bindings share.
pub(super) const NAMES: [&str; 1] = [RIGHTS];

/// Returns the policy and its binding.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    validating_policy::objects(context, RIGHTS, MANAGER, rights(context.settings.mode)).into()
}

/// Returns the checks of the authorizer for one tier: `side` is the policy before or after the
/// request. A check costs a third of the limit of an expression, so each expression has at most
/// two. Admission does not distinguish updates from patches: permission for either is sufficient.
fn authorizer_checks(side: &str, mode: Mode) -> Vec<Value> {
    let variable = |name: &str, expression: String| {
        json!({
            "name": format!("{side}{name}"),
            "expression": expression,
        })
    };
    let reads = |group: &str| {
        format!(
            "authorizer.group('{group}').resource('tiers').name(variables.{side}Tier)\
             .check('get').allowed()"
        )
    };
    // In the older storage a tier may also be read in its stored group.
    let reads = match mode {
        Mode::V1 => format!("({} || {})", reads(v3::GROUP), reads(mode.group())),
        Mode::V3 => reads(v3::GROUP),
    };
    let writes = |name: &str, verb: &str| {
        format!(
            "authorizer.group('{}').resource('tier.' + request.resource.resource)\
             .namespace(variables.where).name({name}).check({verb}).allowed()",
            v3::GROUP
        )
    };
    let either = |name: &str| {
        format!(
            "({} || (request.operation == 'UPDATE' && {}))",
            writes(name, "variables.verb"),
            writes(name, "'patch'")
        )
    };
    vec![
        variable("Reads", reads),
        variable("All", either(&format!("variables.{side}Tier + '.*'"))),
        variable("One", either("variables.name")),
    ]
}

/// Builds the policy. Tiers and pseudo-resources are in the group `projectcalico.org`, also with
/// the older storage.
fn rights(mode: Mode) -> Value {
    let variable = |name: &str, expression: &str| json!({ "name": name, "expression": expression });
    let tier = |of: &str| {
        format!("(has({of}.spec.tier) && {of}.spec.tier != '' ? {of}.spec.tier : 'default')")
    };
    let of = |side: &str| {
        format!(
            "(variables.{side}Tier == '' || (variables.{side}Reads && (variables.{side}All || \
             variables.{side}One)))"
        )
    };
    let mut variables = vec![
        variable(
            "afterTier",
            &format!("request.operation == 'DELETE' ? '' : {}", tier("object")),
        ),
        // Only if it is a different one.
        variable(
            "beforeTier",
            &format!(
                "request.operation == 'CREATE' || {old} == variables.afterTier ? '' : {old}",
                old = tier("oldObject")
            ),
        ),
        variable(
            "name",
            "request.operation == 'DELETE' ? oldObject.metadata.name : object.metadata.name",
        ),
        variable("where", "has(request.namespace) ? request.namespace : ''"),
        variable(
            "verb",
            "request.operation == 'CREATE' ? 'create' : request.operation == 'DELETE' ? 'delete' : \
             'update'",
        ),
    ];
    variables.extend(
        ["before", "after"]
            .into_iter()
            .flat_map(|side| authorizer_checks(side, mode)),
    );
    json!({
        "failurePolicy": "Fail",
        "matchConstraints": Requests::of_calico(
            mode,
            &POLICIES,
            &["CREATE", "UPDATE", "DELETE"],
        ).constraints(),
        "variables": variables,
        "validations": [{
            "expression": format!("{} && {}", of("before"), of("after")),
            "message": "writing policies of a tier requires permission to get the tier, and for \
                        the verb on tier.networkpolicies (or tier.globalnetworkpolicies, \
                        tier.stagednetworkpolicies, tier.stagedglobalnetworkpolicies) of \
                        projectcalico.org for the name TIER.* or the policy's name; grant it with \
                        a Role or ClusterRole",
            "reason": "Forbidden",
        }],
    })
}
