//! Who may write the policies of a tier: those to whom RBAC gives it in Calico's words.
//!
//! Calico's API server asks for `get` on the tier, and for the verb on `tier.networkpolicies` (`tier.globalnetworkpolicies` and so on) under the policy's
//! name or `TIER.*`. Here the same is asked of the authorizer by an admission policy, which sees writes only: reading is for those who may read the kind.

use margay_api::storage::Mode;
use margay_api::v3;
use serde_json::{Value, json};

use super::Context;
use super::validation::{self, Requests};
use crate::manifest::{MANAGER, Object};

/// Rights on tiers.
const RIGHTS: &str = "margay-tier-rights";

/// The kinds of policies that have a tier.
const POLICIES: [&str; 4] =
    ["globalnetworkpolicies", "networkpolicies", "stagedglobalnetworkpolicies", "stagednetworkpolicies"];

/// Names of all policies, which are those of their bindings.
pub(super) const NAMES: [&str; 1] = [RIGHTS];

/// A policy and its binding.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    validation::objects(context, RIGHTS, MANAGER, rights(context.settings.mode)).into()
}

/// What is asked of the authorizer about one tier: `side` is the policy before or after the request. A question costs a third of what an expression may
/// cost, so each expression has two at most. Admission does not tell an update from a patch: the right to either will do.
fn questions(side: &str, mode: Mode) -> Vec<Value> {
    let variable =
        |name: &str, expression: String| json!({ "name": format!("{side}{name}"), "expression": expression });
    let reads = |group: &str| {
        format!("authorizer.group('{group}').resource('tiers').name(variables.{side}Tier).check('get').allowed()")
    };
    // In the older storage a tier may also be read as it is stored.
    let reads = match mode {
        Mode::V1 => format!("({} || {})", reads(v3::GROUP), reads(mode.group())),
        Mode::V3 => reads(v3::GROUP),
    };
    let writes = |name: &str, verb: &str| {
        format!(
            "authorizer.group('{}').resource('tier.' + request.resource.resource).namespace(variables.where).name({name}).check({verb}).allowed()",
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

/// Tiers and pseudo-resources are those of the group that users know, in the older storage too.
fn rights(mode: Mode) -> Value {
    let variable = |name: &str, expression: &str| json!({ "name": name, "expression": expression });
    let tier = |of: &str| format!("(has({of}.spec.tier) && {of}.spec.tier != '' ? {of}.spec.tier : 'default')");
    let of = |side: &str| {
        format!(
            "(variables.{side}Tier == '' || (variables.{side}Reads && (variables.{side}All || variables.{side}One)))"
        )
    };
    let mut variables = vec![
        variable("afterTier", &format!("request.operation == 'DELETE' ? '' : {}", tier("object"))),
        // Only where it is another one.
        variable(
            "beforeTier",
            &format!(
                "request.operation == 'CREATE' || {old} == variables.afterTier ? '' : {old}",
                old = tier("oldObject")
            ),
        ),
        variable("name", "request.operation == 'DELETE' ? oldObject.metadata.name : object.metadata.name"),
        variable("where", "has(request.namespace) ? request.namespace : ''"),
        variable(
            "verb",
            "request.operation == 'CREATE' ? 'create' : request.operation == 'DELETE' ? 'delete' : 'update'",
        ),
    ];
    variables.extend(["before", "after"].into_iter().flat_map(|side| questions(side, mode)));
    json!({
        "failurePolicy": "Fail",
        "matchConstraints": Requests::of_calico(mode, &POLICIES, &["CREATE", "UPDATE", "DELETE"]).constraints(),
        "variables": variables,
        "validations": [{
            "expression": format!("{} && {}", of("before"), of("after")),
            "message": "writing the policies of a tier takes the right to get the tier, and that to the verb on tier.networkpolicies (or \
                tier.globalnetworkpolicies, tier.stagednetworkpolicies, tier.stagedglobalnetworkpolicies) of projectcalico.org under the name \
                TIER.* or the policy's own; grant it by a role",
            "reason": "Forbidden",
        }],
    })
}
