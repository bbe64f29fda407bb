//! Refuses policies, pools, BGP peers and settings whose selectors do not parse, at the API server.
//!
//! Readers of such objects refuse them too, and fail closed; here the user sees the error at once.
//! Stored objects can still be labelled and deleted: only a changed spec is checked. A policy that
//! exceeds CEL's cost limit, because it has more than a thousand selectors that are not plain
//! comparisons, passes: it may be valid, and its readers check it. The other kinds never exceed the
//! limit.

use margay_api::selector;
use margay_api::storage::{Kind, Mode};
use serde_json::{Value, json};

use super::Context;
use super::validating_policy::{self, Requests};
use crate::manifest::{MANAGER, Object};

/// Name of the policy for selectors of policies.
const POLICIES: &str = "margay-policy-selectors";
/// Name of the policy for selectors of nodes and namespaces.
const NODES: &str = "margay-node-selectors";

/// Matches requests that change the spec.
const CHANGED: &str = "has(object.spec) && (oldObject == null || !has(oldObject.spec) || \
                       object.spec != oldObject.spec)";

/// Names of all policies, which their bindings share.
pub(super) const NAMES: [&str; 2] = [POLICIES, NODES];

/// Returns the policies and their bindings.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    let policies = [
        "NetworkPolicy",
        "GlobalNetworkPolicy",
        "StagedNetworkPolicy",
        "StagedGlobalNetworkPolicy",
    ];
    let others = [
        "BGPPeer",
        "IPPool",
        "FelixConfiguration",
        "KubeControllersConfiguration",
    ];
    let both = [(POLICIES, &policies[..]), (NODES, &others[..])].into_iter();
    let spec = |name, kinds| specification(context.settings.mode, kinds, name);
    both.flat_map(|(name, kinds)| {
        validating_policy::objects(context, name, MANAGER, spec(name, kinds))
    })
    .collect()
}

type Variable = (&'static str, String);

/// Returns the variables of the policy of that name, each computed from earlier ones.
fn variables(name: &str) -> Vec<Variable> {
    let texts = match name {
        POLICIES => texts_of_policies(),
        _ => [
            fields(
                "variables.spec",
                &[
                    "nodeSelector",
                    "namespaceSelector",
                    "peerSelector",
                    "localWorkloadSelector",
                ],
            ),
            vec![texts_of_templates()],
        ]
        .concat()
        .join(" + "),
    };
    let rules = if name == POLICIES {
        rules()
    } else {
        Vec::new()
    };
    let spec = ("spec", "dyn(object.spec)".to_owned());
    let wrong = (
        "wrong",
        format!("variables.texts.filter(text, !({}))", selector::cel("text")),
    );
    [vec![spec], rules, vec![("texts", texts), wrong]].concat()
}

fn specification(mode: Mode, kinds: &[&str], name: &str) -> Value {
    let resources: Vec<&str> = kinds
        .iter()
        .filter_map(|kind| Some(Kind::of(kind)?.plural_in(mode)))
        .collect();
    let variables = variables(name).into_iter();
    let variables =
        variables.map(|(name, expression)| json!({ "name": name, "expression": expression }));
    json!({
        "failurePolicy": if name == POLICIES { "Ignore" } else { "Fail" },
        "matchConstraints": Requests::of_calico(
            mode,
            &resources,
            &["CREATE", "UPDATE"],
        ).constraints(),
        "matchConditions": [{
            "name": "its-specification-changes",
            "expression": CHANGED,
        }],
        "variables": variables.collect::<Vec<_>>(),
        "validations": [refusal()],
    })
}

/// Returns expressions for a list with the text of each of these fields, or an empty list where it
/// is unset.
fn fields(of: &str, names: &[&str]) -> Vec<String> {
    names
        .iter()
        .map(|name| format!("(has({of}.{name}) ? [{of}.{name}] : [])"))
        .collect()
}

/// Variables for the rules of both directions, and for their sources and destinations.
fn rules() -> Vec<Variable> {
    let list = |field: &str| format!("(has(variables.spec.{field}) ? variables.spec.{field} : [])");
    let ends = |side: &str| format!("variables.rules.filter(r, has(r.{side})).map(r, r.{side})");
    vec![
        ("rules", [list("ingress"), list("egress")].join(" + ")),
        ("ends", [ends("source"), ends("destination")].join(" + ")),
    ]
}

fn texts_of_policies() -> String {
    let own = fields(
        "variables.spec",
        &["selector", "namespaceSelector", "serviceAccountSelector"],
    );
    let of_ends = ["selector", "notSelector", "namespaceSelector"];
    let of_ends =
        of_ends.map(|name| format!("variables.ends.filter(e, has(e.{name})).map(e, e.{name})"));
    let accounts = "variables.ends.filter(e, has(e.serviceAccounts) && \
                    has(e.serviceAccounts.selector)).map(e, e.serviceAccounts.selector)";
    [own, of_ends.to_vec(), vec![accounts.to_owned()]]
        .concat()
        .join(" + ")
}

/// Returns an expression for the selectors in templates of host endpoints.
fn texts_of_templates() -> String {
    let mut path = String::from("variables.spec");
    let mut conditions = Vec::new();
    for field in ["controllers", "node", "hostEndpoint", "templates"] {
        path = format!("{path}.{field}");
        conditions.push(format!("has({path})"));
    }
    format!(
        "({} ? {path}.filter(t, has(t.nodeSelector)).map(t, t.nodeSelector) : [])",
        conditions.join(" && ")
    )
}

fn refusal() -> Value {
    json!({
        "expression": "size(variables.wrong) == 0",
        "messageExpression": "'not a selector: ' + variables.wrong[0].substring(0, \
                              size(variables.wrong[0]) < 300 ? size(variables.wrong[0]) : 300) + \
                              '; write operations like has(a), a == \"b\", a in {\"b\", \"c\"} or \
                              all(), joined by && and ||'",
        "message": "not a selector: write operations like has(a), a == \"b\", a in {\"b\", \"c\"} \
                    or all(), joined by && and ||",
        "reason": "Invalid",
    })
}

#[cfg(test)]
#[path = "selectors_tests.rs"]
mod tests;
