use serde_json::Value;

use super::super::cel::{Request, refusal};
use super::super::rbac;
use super::*;

#[path = "../../../tests/src/rights/table.rs"]
mod table;

use table::Requests as Table;

/// Table of requests, which `tests/tests/cluster_rights.rs` also sends to a real API server; it
/// documents the fields.
const TABLE: &str = include_str!("../../../tests/data/agent-requests.yaml");

/// Returns plural and group of a kind.
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

/// Returns true when RBAC grants the verb to agents.
fn granted(verb: &str, resource: &str, group: &str) -> bool {
    let lists = |rule: &Value, field: &str, wanted: &str| {
        rule[field]
            .as_array()
            .is_some_and(|list| list.iter().any(|one| one == wanted))
    };
    rbac::node_rules(Mode::V3).iter().any(|rule| {
        lists(rule, "apiGroups", group)
            && lists(rule, "resources", resource)
            && lists(rule, "verbs", verb)
    })
}

fn answer(row: &table::Request, table: &Table) -> String {
    let (before, after) = table.objects_of(row);
    let (plural, group) = resource(before["kind"].as_str().unwrap());
    let full = if row.sub.is_empty() {
        plural
    } else {
        format!("{plural}/{}", row.sub)
    };
    if !granted(&row.verb, &full, group) {
        return "cannot".to_owned();
    }
    let (operation, before, after) = match row.verb.as_str() {
        "create" => ("CREATE", None, Some(&after)),
        "delete" => ("DELETE", Some(&before), None),
        _ => ("UPDATE", Some(&before), Some(&after)),
    };
    let user = json!({"username": REQUESTER, "extra": {NODE_EXTRA: ["n2"]}});
    let request = Request {
        operation,
        user,
        before,
        after,
    };
    let guards = guards();
    let of_kind = guards.iter().filter(|guard| {
        guard.group == group
            && guard.resources.contains(&full.as_str())
            && guard.operations.contains(&operation)
    });
    let refusals = of_kind.map(|guard| refusal(&policy(guard, Mode::V3), &request));
    refusals
        .flatten()
        .next()
        .unwrap_or_else(|| "granted".to_owned())
}

#[test]
fn an_agent_writes_what_is_its_own_nodes() {
    let table: Table = table::parse(TABLE).unwrap();
    let wrong: Vec<String> = table
        .rows
        .iter()
        .filter_map(|row| row.fault(&answer(row, &table)))
        .collect();
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        table.rows.len(),
        wrong.join("\n")
    );
}
