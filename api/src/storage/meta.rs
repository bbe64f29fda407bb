//! Metadata of the older storage: text in one annotation, except for a few fields.

use serde_json::{Map, Value};

use super::kind::{Class, Kind};
use super::{Mode, StorageError, error, name, uid};
use crate::problem::Problem;

/// Annotation with the user's metadata as JSON (libcalico-go, `projectcalico.org/metadata`).
pub const METADATA: &str = "projectcalico.org/metadata";

/// Fields in the order in which they are written, so that equal metadata is equal text.
const ORDER: [&str; 12] = [
    "name",
    "generateName",
    "selfLink",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "labels",
    "annotations",
    "ownerReferences",
    "finalizers",
    "managedFields",
];
/// Fields that stay outside the annotation.
const OUTSIDE: [&str; 3] = ["namespace", "resourceVersion", "uid"];
/// Go's zero time, which Calico writes where it knows no time.
const NO_TIME: &str = "0001-01-01T00:00:00Z";

type Fields = Map<String, Value>;

/// Replaces the stored metadata by the user's.
pub(super) fn read(
    kind: &Kind,
    tier: Option<&str>,
    metadata: &mut Fields,
    problems: &mut Vec<Problem>,
) -> Result<(), StorageError> {
    if kind.class == Class::Ipam {
        return Ok(());
    }
    if let Some(Value::String(stored)) = metadata.get("uid").filter(|uid| **uid != "") {
        let seen = uid::flip(stored, "metadata.uid")?;
        metadata.insert("uid".to_owned(), seen.into());
    }
    let kept = match metadata
        .get_mut("annotations")
        .and_then(Value::as_object_mut)
    {
        Some(annotations) => annotations.remove(METADATA),
        None => None,
    };
    let kept = kept.and_then(|text| parse(&text, problems));
    let stored_name = metadata
        .get("name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let named = kept
        .as_ref()
        .and_then(|kept| kept.get("name"))
        .and_then(Value::as_str);
    let name = match kind.class {
        Class::Policy => name::user_name(stored_name, named, tier),
        _ => stored_name.to_owned(),
    };
    if let Some(kept) = kept {
        restore(metadata, kept)?;
    }
    if !name.is_empty() {
        metadata.insert("name".to_owned(), name.into());
    }
    metadata.retain(|field, value| {
        !(["labels", "annotations"].contains(&field.as_str()) && is_empty(value))
    });
    Ok(())
}

/// Parses the annotation; nothing, and a problem, when it is not a JSON object.
fn parse(text: &Value, problems: &mut Vec<Problem>) -> Option<Fields> {
    let why = match text.as_str().map(serde_json::from_str::<Value>) {
        Some(Ok(Value::Object(fields))) => return Some(fields),
        Some(Ok(_)) => "not a set of fields".to_owned(),
        Some(Err(error)) => format!("not JSON: {error}"),
        None => "not text".to_owned(),
    };
    problems.push(Problem::new(
        format!("metadata.annotations[{METADATA}]"),
        error::cut(
            text.as_str()
                .map_or_else(|| text.to_string(), str::to_owned),
        ),
        format!("{why}; labels and annotations in it are ignored"),
        "write the object again with calicoctl, or delete the annotation",
    ));
    None
}

/// Replaces the stored metadata by that of the annotation, except for the fields outside of it.
/// Labels and annotations are merged; the annotation takes precedence.
fn restore(metadata: &mut Fields, mut kept: Fields) -> Result<(), StorageError> {
    for reference in kept
        .get_mut("ownerReferences")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        rewrite(
            reference,
            &[&Mode::V1.api_version(), &Mode::V3.api_version()],
            Mode::V3,
        )?;
    }
    for field in ["labels", "annotations"] {
        let mut both = take(metadata, field);
        both.extend(take(&mut kept, field));
        kept.insert(field.to_owned(), Value::Object(both));
    }
    for field in OUTSIDE {
        match metadata.remove(field) {
            Some(value) => kept.insert(field.to_owned(), value),
            None => kept.remove(field),
        };
    }
    let has_time = kept
        .get("creationTimestamp")
        .is_some_and(|time| !time.is_null() && *time != NO_TIME);
    if !has_time {
        match metadata.remove("creationTimestamp") {
            Some(time) => kept.insert("creationTimestamp".to_owned(), time),
            None => kept.remove("creationTimestamp"),
        };
    }
    kept.retain(|_, value| !value.is_null());
    *metadata = kept;
    Ok(())
}

/// Replaces the user's metadata by the stored form.
pub(super) fn write(kind: &Kind, metadata: &mut Fields) -> Result<(), StorageError> {
    if kind.class == Class::Ipam {
        return Ok(());
    }
    let mut kept = std::mem::take(metadata);
    for field in ["namespace", "resourceVersion"] {
        metadata.extend(kept.remove_entry(field));
    }
    if let Some(seen) = kept
        .remove("uid")
        .as_ref()
        .and_then(Value::as_str)
        .filter(|uid| !uid.is_empty())
    {
        metadata.insert("uid".to_owned(), uid::flip(seen, "metadata.uid")?.into());
    }
    metadata.extend(
        kept.get_key_value("name")
            .map(|(name, value)| (name.clone(), value.clone())),
    );
    if kind.class != Class::Policy {
        kept.remove("name");
    }
    for reference in kept
        .get_mut("ownerReferences")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        rewrite(reference, &[&Mode::V3.api_version()], Mode::V1)?;
    }
    if let Some(Value::Object(annotations)) = kept.get_mut("annotations") {
        annotations.remove(METADATA);
    }
    kept.retain(|_, value| !value.is_null() && !is_empty(value));
    let labels = ours(&kept, "labels");
    if !labels.is_empty() {
        metadata.insert("labels".to_owned(), Value::Object(labels));
    }
    let mut annotations = ours(&kept, "annotations");
    annotations.insert(METADATA.to_owned(), text(&kept).into());
    metadata.insert("annotations".to_owned(), Value::Object(annotations));
    Ok(())
}

/// Translates an owner reference to one of the given versions into the other storage's form.
fn rewrite(reference: &mut Value, of: &[&str], into: Mode) -> Result<(), StorageError> {
    let Some(fields) = reference.as_object_mut() else {
        return Ok(());
    };
    let version = fields
        .get("apiVersion")
        .and_then(Value::as_str)
        .unwrap_or_default();
    if !of.contains(&version) {
        return Ok(());
    }
    fields.insert("apiVersion".to_owned(), into.api_version().into());
    if let Some(owner) = fields
        .get("uid")
        .and_then(Value::as_str)
        .filter(|uid| !uid.is_empty())
    {
        let owner = uid::flip(owner, "metadata.ownerReferences[].uid")?;
        fields.insert("uid".to_owned(), owner.into());
    }
    Ok(())
}

/// Returns the metadata as text: known fields in a fixed order, then unknown ones.
fn text(kept: &Fields) -> String {
    let known = ORDER.iter().filter_map(|field| kept.get_key_value(*field));
    let others = kept
        .iter()
        .filter(|(field, _)| !ORDER.contains(&field.as_str()));
    let parts: Vec<String> = known
        .chain(others)
        .map(|(field, value)| format!("{}:{value}", Value::from(field.as_str())))
        .collect();
    format!("{{{}}}", parts.join(","))
}

/// Returns the labels or annotations that Calico's programs read outside of the annotation too.
fn ours(kept: &Fields, field: &str) -> Fields {
    let is_ours =
        |key: &str| key.contains("projectcalico.org/") || key.contains("operator.tigera.io/");
    let all = kept
        .get(field)
        .and_then(Value::as_object)
        .into_iter()
        .flatten();
    all.filter(|(key, _)| is_ours(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn take(fields: &mut Fields, field: &str) -> Fields {
    match fields.remove(field) {
        Some(Value::Object(values)) => values,
        _ => Fields::new(),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        other => other.is_null(),
    }
}
