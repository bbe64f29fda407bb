//! The table of `tests/data/agent-requests.yaml`: requests, and the result of each. A real API
//! server is asked (`super`), and the operator's own tests, which include this file.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// The table, which documents its own fields.
#[derive(Deserialize)]
pub struct Requests {
    /// Objects by the names that rows give them.
    pub objects: BTreeMap<String, Value>,
    /// The requests.
    pub rows: Vec<Request>,
}

/// One request.
#[derive(Deserialize)]
pub struct Request {
    /// Description.
    pub what: String,
    /// Verb of RBAC.
    pub verb: String,
    /// Subresource, if any.
    #[serde(default)]
    pub sub: String,
    object: String,
    #[serde(default = "nothing", rename = "as")]
    was: Value,
    /// Changes of the object, as JSON merge patch.
    #[serde(default = "nothing")]
    pub with: Value,
    /// What the answer contains.
    pub answer: String,
}

/// A change of nothing.
fn nothing() -> Value {
    json!({})
}

impl Requests {
    /// The object of a row before the request and after it.
    pub fn objects_of(&self, row: &Request) -> (Value, Value) {
        let mut before = self
            .objects
            .get(&row.object)
            .unwrap_or_else(|| panic!("no object {}", row.object))
            .clone();
        merge(&mut before, &row.was);
        let mut after = before.clone();
        merge(&mut after, &row.with);
        (before, after)
    }
}

impl Request {
    /// Why the answer is not the wanted one, if it is not.
    pub fn fault(&self, answer: &str) -> Option<String> {
        let Self {
            what,
            verb,
            object,
            answer: wanted,
            ..
        } = self;
        (!answer.contains(wanted))
            .then(|| format!("{what} ({verb} {object}): wanted {wanted:?}, is {answer:?}"))
    }
}

/// A table as text.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, serde_yaml_ng::Error> {
    let mut value: serde_yaml_ng::Value = serde_yaml_ng::from_str(text)?;
    value.apply_merge()?;
    serde_yaml_ng::from_value(value)
}

/// Applies a JSON merge patch to an object (RFC 7386).
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
