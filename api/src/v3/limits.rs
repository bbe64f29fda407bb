//! Pieces of schema that several kinds share.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

/// A set of one or both directions.
pub(super) fn directions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "string", "enum": ["Ingress", "Egress"] },
        "minItems": 1,
        "maxItems": 2,
        "x-kubernetes-list-type": "set",
    })
}

/// What a staged policy would do.
pub(super) fn staged_action(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["Set", "Delete", "Learn", "Ignore"], "default": "Set" })
}

/// How a pool's packets are encapsulated.
pub(super) fn encapsulation_mode(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["Never", "Always", "CrossSubnet"] })
}

/// What only pools for certain uses may say.
pub(super) fn allowed_uses(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "items": { "type": "string", "enum": ["Workload", "Tunnel", "LoadBalancer"] },
        "maxItems": 10,
        "x-kubernetes-list-type": "set",
    })
}

/// Rules between the fields of a cluster-wide policy.
pub(super) fn global_rules() -> Value {
    let set = |field: &str| format!("has(self.{field}) && self.{field}");
    json!([
        {
            "rule": format!("!({} && {})", set("doNotTrack"), set("preDNAT")),
            "message": "doNotTrack and preDNAT exclude each other",
        },
        {
            "rule": format!("!({}) || {}", set("doNotTrack"), set("applyOnForward")),
            "message": "doNotTrack needs applyOnForward: true",
        },
        {
            "rule": format!("!({}) || {}", set("preDNAT"), set("applyOnForward")),
            "message": "preDNAT needs applyOnForward: true",
        },
        {
            "rule": format!("!({}) || !has(self.egress) && (!has(self.types) || !('Egress' in self.types))", set("preDNAT")),
            "message": "preDNAT policies have no egress rules and no type Egress",
        },
    ])
}
