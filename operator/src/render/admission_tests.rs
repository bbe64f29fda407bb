use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::super::cel::{Request, refusal};
use super::super::rbac;
use super::*;

/// The table that a real API server is asked too, by `tests/tests/cluster_rights.rs`; what its fields mean is said there.
const TABLE: &str = include_str!("../../../tests/data/agent-requests.yaml");

#[derive(Deserialize)]
struct Table {
    objects: BTreeMap<String, Value>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    what: String,
    verb: String,
    #[serde(default)]
    sub: String,
    object: String,
    #[serde(default = "nothing", rename = "as")]
    was: Value,
    #[serde(default = "nothing")]
    with: Value,
    answer: String,
}

/// A change of nothing.
fn nothing() -> Value {
    json!({})
}

fn merge(object: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        return object.clone_from(patch);
    };
    if !object.is_object() {
        *object = json!({});
    }
    for (name, change) in fields {
        match change {
            Value::Null => drop(object.as_object_mut().map(|fields| fields.remove(name))),
            change => merge(&mut object[name.as_str()], change),
        }
    }
}

/// As the API server knows the resource of a kind.
fn resource(kind: &str) -> (String, &'static str) {
    let plural = match kind {
        "BlockAffinity" => "blockaffinities".to_owned(),
        "GlobalNetworkPolicy" => "globalnetworkpolicies".to_owned(),
        other => format!("{}s", other.to_lowercase()),
    };
    let group = match kind {
        "Node" | "Pod" | "ConfigMap" | "Secret" => "",
        "CertificateSigningRequest" => "certificates.k8s.io",
        _ => v3::GROUP,
    };
    (plural, group)
}

/// Whether RBAC grants the verb to agents.
fn granted(verb: &str, resource: &str, group: &str) -> bool {
    let lists = |rule: &Value, field: &str, wanted: &str| {
        rule[field].as_array().is_some_and(|list| list.iter().any(|one| one == wanted))
    };
    rbac::node_rules(Mode::V3)
        .iter()
        .any(|rule| lists(rule, "apiGroups", group) && lists(rule, "resources", resource) && lists(rule, "verbs", verb))
}

fn answer(row: &Row, objects: &BTreeMap<String, Value>) -> String {
    let mut before = objects[&row.object].clone();
    merge(&mut before, &row.was);
    let mut after = before.clone();
    merge(&mut after, &row.with);
    let (plural, group) = resource(before["kind"].as_str().unwrap());
    let full = if row.sub.is_empty() { plural } else { format!("{plural}/{}", row.sub) };
    if !granted(&row.verb, &full, group) {
        return "cannot".to_owned();
    }
    let (operation, before, after) = match row.verb.as_str() {
        "create" => ("CREATE", None, Some(&after)),
        "delete" => ("DELETE", Some(&before), None),
        _ => ("UPDATE", Some(&before), Some(&after)),
    };
    let user = json!({"username": REQUESTER, "extra": {NODE_EXTRA: ["n2"]}});
    let request = Request { operation, user, before, after };
    let guards = guards();
    let of_kind = guards.iter().filter(|guard| {
        guard.group == group && guard.resources.contains(&full.as_str()) && guard.operations.contains(&operation)
    });
    let said = of_kind.map(|guard| refusal(&policy(guard, Mode::V3), &request));
    said.flatten().next().unwrap_or_else(|| "granted".to_owned())
}

#[test]
fn an_agent_writes_what_is_its_own_nodes() {
    let table: Table = {
        let mut value: serde_yaml_ng::Value = serde_yaml_ng::from_str(TABLE).unwrap();
        value.apply_merge().unwrap();
        serde_yaml_ng::from_value(value).unwrap()
    };
    let wrong: Vec<String> = table
        .rows
        .iter()
        .map(|row| (row, answer(row, &table.objects)))
        .filter(|(row, answer)| !answer.contains(&row.answer))
        .map(|(row, answer)| {
            format!("{} ({} {}): wanted {:?}, is {answer:?}", row.what, row.verb, row.object, row.answer)
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), table.rows.len(), wrong.join("\n"));
}
