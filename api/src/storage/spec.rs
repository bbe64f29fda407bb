//! Fields of specs that the two storages represent differently.

use serde_json::{Map, Value};

use super::{Kind, StorageError, error};

/// Translates stored fields into the user's.
pub(super) fn read(kind: &Kind, spec: &mut Map<String, Value>) -> Result<(), StorageError> {
    without_nulls(spec);
    if kind.kind == "BlockAffinity" {
        let deleted = match spec.get("deleted") {
            None => false,
            Some(Value::Bool(deleted)) => *deleted,
            Some(other) => {
                let parsed = other.as_str().and_then(truth);
                parsed.ok_or_else(|| StorageError::Truth {
                    field: "spec.deleted".to_owned(),
                    value: error::shown(other),
                })?
            }
        };
        spec.insert("deleted".to_owned(), deleted.into());
    }
    if kind.kind == "IPAMConfiguration" {
        // The older storage has no CRD defaults: an unset field is false.
        for field in ["strictAffinity", "autoAllocateBlocks"] {
            spec.entry(field).or_insert(Value::Bool(false));
        }
    }
    Ok(())
}

/// Translates the user's fields into the stored ones.
pub(super) fn write(kind: &Kind, spec: &mut Map<String, Value>) {
    if kind.kind == "BlockAffinity" {
        let deleted = spec
            .get("deleted")
            .and_then(Value::as_bool)
            .unwrap_or(false);
        spec.insert("deleted".to_owned(), deleted.to_string().into());
    }
}

/// Parses the texts for true and false that Calico accepts (Go's strconv.ParseBool).
fn truth(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "" | "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Removes null fields: CRDs of older manifests have no schema, and a program's empty lists are
/// stored as null. Nulls within lists are kept, as they mean something (a free address of a block).
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
