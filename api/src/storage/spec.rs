//! Fields that the two storages write differently.

use serde_json::{Map, Value};

use super::{Fault, Kind, fault};

/// From the stored fields to the users'.
pub(super) fn read(kind: &Kind, spec: &mut Map<String, Value>) -> Result<(), Fault> {
    without_nulls(spec);
    if kind.kind == "BlockAffinity" {
        let deleted = match spec.get("deleted") {
            None => false,
            Some(Value::Bool(deleted)) => *deleted,
            Some(other) => {
                let told = other.as_str().and_then(truth);
                told.ok_or_else(|| Fault::Truth { field: "spec.deleted".to_owned(), value: fault::shown(other) })?
            }
        };
        spec.insert("deleted".to_owned(), deleted.into());
    }
    if kind.kind == "IPAMConfiguration" {
        // The older storage has no defaults: what it leaves out is off.
        for field in ["strictAffinity", "autoAllocateBlocks"] {
            spec.entry(field).or_insert(Value::Bool(false));
        }
    }
    Ok(())
}

/// From the users' fields to the stored.
pub(super) fn write(kind: &Kind, spec: &mut Map<String, Value>) {
    if kind.kind == "BlockAffinity" {
        let deleted = spec.get("deleted").and_then(Value::as_bool).unwrap_or(false);
        spec.insert("deleted".to_owned(), deleted.to_string().into());
    }
}

/// Words for true and false that Calico's programs accept.
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// A field that is null is a field that is not there: CRDs of older manifests have no schema, and store a program's empty lists so. Nulls in
/// lists mean something (a free address of a block).
fn without_nulls(fields: &mut Map<String, Value>) {
    fields.retain(|_, value| !value.is_null());
    fields.values_mut().for_each(inside);
}

fn inside(value: &mut Value) {
    match value {
        Value::Object(fields) => without_nulls(fields),
        Value::Array(items) => items.iter_mut().for_each(inside),
        _ => {}
    }
}
