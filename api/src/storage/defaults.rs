//! Defaults that readers of the older storage apply to unset fields.

use serde_json::{Map, Value, json};

use super::Kind;

type Fields = Map<String, Value>;

/// Fills in the defaults of a spec of that kind.
pub(super) fn complete(kind: &Kind, spec: &mut Fields) {
    match kind.kind {
        "IPPool" => pool(spec),
        "Tier" => set_default(spec, "defaultAction", json!("Deny")),
        "NetworkPolicy"
        | "GlobalNetworkPolicy"
        | "StagedNetworkPolicy"
        | "StagedGlobalNetworkPolicy" => policy(spec),
        _ => {}
    }
}

fn pool(spec: &mut Fields) {
    let is_v6 = spec
        .get("cidr")
        .and_then(Value::as_str)
        .is_some_and(|cidr| cidr.contains(':'));
    convert_v2_fields(spec);
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
        set_default(spec, field, value);
    }
}

/// Converts two fields of pools that were first written with calicoctl of Calico v2.
fn convert_v2_fields(spec: &mut Fields) {
    let is_on = |value: &Value| value.get("enabled").and_then(Value::as_bool) == Some(true);
    if let Some(ipip) = spec.remove("ipip").filter(is_on) {
        let mode = if ipip["mode"] == "cross-subnet" {
            "CrossSubnet"
        } else {
            "Always"
        };
        if matches!(
            spec.get("ipipMode").and_then(Value::as_str),
            None | Some("" | "Never")
        ) {
            spec.insert("ipipMode".to_owned(), mode.into());
        }
    }
    if spec.remove("nat-outgoing") == Some(Value::Bool(true)) {
        set_default(spec, "natOutgoing", json!(true));
    }
}

fn policy(spec: &mut Fields) {
    set_default(spec, "tier", json!("default"));
    let has = |field: &str| {
        spec.get(field)
            .and_then(Value::as_array)
            .is_some_and(|rules| !rules.is_empty())
    };
    let types = match (has("ingress"), has("egress")) {
        (false, true) => json!(["Egress"]),
        (true, true) => json!(["Ingress", "Egress"]),
        (_, false) => json!(["Ingress"]),
    };
    set_default(spec, "types", types);
}

/// Sets a field that is unset, or an empty text or list.
fn set_default(spec: &mut Fields, field: &str, value: Value) {
    let is_set = match spec.get(field) {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    };
    if !is_set {
        spec.insert(field.to_owned(), value);
    }
}
