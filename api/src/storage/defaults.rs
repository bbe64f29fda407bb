//! What readers of the older storage assume of an object that does not say.

use serde_json::{Map, Value, json};

use super::Kind;

type Fields = Map<String, Value>;

/// Fills in a spec of that kind.
pub(super) fn complete(kind: &Kind, spec: &mut Fields) {
    match kind.kind {
        "IPPool" => pool(spec),
        "Tier" => unless_said(spec, "defaultAction", json!("Deny")),
        "NetworkPolicy" | "GlobalNetworkPolicy" | "StagedNetworkPolicy" | "StagedGlobalNetworkPolicy" => policy(spec),
        _ => {}
    }
}

fn pool(spec: &mut Fields) {
    let is_v6 = spec.get("cidr").and_then(Value::as_str).is_some_and(|cidr| cidr.contains(':'));
    first_forms(spec);
    let size = if is_v6 { 122 } else { 26 };
    if spec.get("blockSize").and_then(Value::as_i64) == Some(0) {
        spec.remove("blockSize");
    }
    for (field, value) in [
        ("blockSize", json!(size)),
        ("ipipMode", json!("Never")),
        ("vxlanMode", json!("Never")),
        ("nodeSelector", json!("all()")),
        ("allowedUses", json!(["Workload", "Tunnel"])),
        ("assignmentMode", json!("Automatic")),
    ] {
        unless_said(spec, field, value);
    }
}

/// Pools that were first written with the programs of Calico v2 say two things in fields of their own.
fn first_forms(spec: &mut Fields) {
    let is_on = |value: &Value| value.get("enabled").and_then(Value::as_bool) == Some(true);
    if let Some(ipip) = spec.remove("ipip").filter(is_on) {
        let mode = if ipip["mode"] == "cross-subnet" { "CrossSubnet" } else { "Always" };
        if matches!(spec.get("ipipMode").and_then(Value::as_str), None | Some("" | "Never")) {
            spec.insert("ipipMode".to_owned(), mode.into());
        }
    }
    if spec.remove("nat-outgoing") == Some(Value::Bool(true)) {
        unless_said(spec, "natOutgoing", json!(true));
    }
}

fn policy(spec: &mut Fields) {
    unless_said(spec, "tier", json!("default"));
    let has = |field: &str| spec.get(field).and_then(Value::as_array).is_some_and(|rules| !rules.is_empty());
    let types = match (has("ingress"), has("egress")) {
        (false, true) => json!(["Egress"]),
        (true, true) => json!(["Ingress", "Egress"]),
        (_, false) => json!(["Ingress"]),
    };
    unless_said(spec, "types", types);
}

/// Empty text and empty lists say nothing.
fn unless_said(spec: &mut Fields, field: &str, value: Value) {
    let is_said = match spec.get(field) {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    if !is_said {
        spec.insert(field.to_owned(), value);
    }
}
