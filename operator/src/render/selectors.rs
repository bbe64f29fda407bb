//! What the API server refuses because nobody could say whom it is about: policies, pools and settings whose selectors are none.
//!
//! The code that reads such objects refuses them too, and closes what they may be about; here whoever writes one learns it at once. What is
//! stored already can still be labelled and deleted: only a changed specification is looked at. A policy that cannot be judged, because it has more than
//! a thousand selectors that are no plain comparisons, passes: it may be right, and its reader looks. Of the other kinds everything can be judged.

use margay_api::selector;
use margay_api::storage::{Kind, Mode};
use serde_json::{Value, json};

use super::Context;
use super::validation::{self, Requests};
use crate::manifest::{MANAGER, Object};

/// Selectors of policies.
const POLICIES: &str = "margay-policy-selectors";
/// Selectors of nodes and namespaces.
const NODES: &str = "margay-node-selectors";

/// Whether the request changes what is looked at.
const CHANGED: &str =
    "has(object.spec) && (oldObject == null || !has(oldObject.spec) || object.spec != oldObject.spec)";

/// Names of all policies, which are those of their bindings.
pub(super) const NAMES: [&str; 2] = [POLICIES, NODES];

/// A policy and its binding for each.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    let policies = ["NetworkPolicy", "GlobalNetworkPolicy", "StagedNetworkPolicy", "StagedGlobalNetworkPolicy"];
    let others = ["IPPool", "FelixConfiguration", "KubeControllersConfiguration"];
    let both = [(POLICIES, &policies[..]), (NODES, &others[..])].into_iter();
    let spec = |name, kinds| specification(context.settings.mode, kinds, name);
    both.flat_map(|(name, kinds)| validation::objects(context, name, MANAGER, spec(name, kinds))).collect()
}

type Variable = (&'static str, String);

/// What the policy of that name works out, one from the other.
fn variables(name: &str) -> Vec<Variable> {
    let texts = match name {
        POLICIES => texts_of_policies(),
        _ => [fields("variables.spec", &["nodeSelector", "namespaceSelector"]), vec![texts_of_templates()]]
            .concat()
            .join(" + "),
    };
    let rules = if name == POLICIES { rules() } else { Vec::new() };
    let spec = ("spec", "dyn(object.spec)".to_owned());
    let wrong = ("wrong", format!("variables.texts.filter(text, !({}))", selector::cel("text")));
    [vec![spec], rules, vec![("texts", texts), wrong]].concat()
}

fn specification(mode: Mode, kinds: &[&str], name: &str) -> Value {
    let resources: Vec<&str> = kinds.iter().filter_map(|kind| Some(Kind::of(kind)?.plural_in(mode))).collect();
    let variables = variables(name).into_iter();
    let variables = variables.map(|(name, expression)| json!({ "name": name, "expression": expression }));
    json!({
        "failurePolicy": if name == POLICIES { "Ignore" } else { "Fail" },
        "matchConstraints": Requests::of_calico(mode, &resources, &["CREATE", "UPDATE"]).constraints(),
        "matchConditions": [{
            "name": "its-specification-changes",
            "expression": CHANGED,
        }],
        "variables": variables.collect::<Vec<_>>(),
        "validations": [refusal()],
    })
}

/// A list of the text in each of these fields, or of none where it is not there.
fn fields(of: &str, names: &[&str]) -> Vec<String> {
    names.iter().map(|name| format!("(has({of}.{name}) ? [{of}.{name}] : [])")).collect()
}

/// Rules of both directions, and what they say about either end of a packet.
fn rules() -> Vec<Variable> {
    let list = |field: &str| format!("(has(variables.spec.{field}) ? variables.spec.{field} : [])");
    let ends = |side: &str| format!("variables.rules.filter(r, has(r.{side})).map(r, r.{side})");
    vec![
        ("rules", [list("ingress"), list("egress")].join(" + ")),
        ("ends", [ends("source"), ends("destination")].join(" + ")),
    ]
}

fn texts_of_policies() -> String {
    let own = fields("variables.spec", &["selector", "namespaceSelector", "serviceAccountSelector"]);
    let of_ends = ["selector", "notSelector", "namespaceSelector"];
    let of_ends = of_ends.map(|name| format!("variables.ends.filter(e, has(e.{name})).map(e, e.{name})"));
    let accounts = "variables.ends.filter(e, has(e.serviceAccounts) && has(e.serviceAccounts.selector))\
         .map(e, e.serviceAccounts.selector)";
    [own, of_ends.to_vec(), vec![accounts.to_owned()]].concat().join(" + ")
}

/// Selectors of the templates of host endpoints.
fn texts_of_templates() -> String {
    let mut path = String::from("variables.spec");
    let mut there = Vec::new();
    for field in ["controllers", "node", "hostEndpoint", "templates"] {
        path = format!("{path}.{field}");
        there.push(format!("has({path})"));
    }
    format!("({} ? {path}.filter(t, has(t.nodeSelector)).map(t, t.nodeSelector) : [])", there.join(" && "))
}

fn refusal() -> Value {
    json!({
        "expression": "size(variables.wrong) == 0",
        "messageExpression": "'not a selector: ' + variables.wrong[0].substring(0, size(variables.wrong[0]) < 300 ? size(variables.wrong[0]) : 300) + \
            '; write operations like has(a), a == \"b\", a in {\"b\", \"c\"} or all(), joined by && and ||'",
        "message": "not a selector: write operations like has(a), a == \"b\", a in {\"b\", \"c\"} or all(), joined by && and ||",
        "reason": "Invalid",
    })
}

#[cfg(test)]
#[path = "selectors_tests.rs"]
mod tests;
