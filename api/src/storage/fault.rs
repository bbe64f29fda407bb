//! Why an object cannot be translated.

use serde_json::{Map, Value};

/// An object that is not what either storage can hold.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It is not JSON, or a field has another type than its kind says.
    #[error("object: {0}; correct the field that the position points at")]
    Json(#[from] serde_json::Error),
    /// Fields are expected there.
    #[error("{field}: {found}: not a set of fields; write it as an object, or leave it out")]
    NotFields {
        /// Where.
        field: String,
        /// What is there, cut short.
        found: String,
    },
    /// A UID that is none.
    #[error("{field}: {value:?}: not a UID; the API server writes it like 123e4567-e89b-42d3-a456-426614174000")]
    Uid {
        /// Where.
        field: String,
        /// What is there.
        value: String,
    },
    /// A text that stands for true or false, and is neither.
    #[error("{field}: {value}: neither true nor false; use \"true\" or \"false\"")]
    Truth {
        /// Where.
        field: String,
        /// What is there.
        value: String,
    },
}

/// The longest value that an error repeats, in characters.
const SHOWN: usize = 80;

/// The value's fields, or the fault that it has none.
pub(super) fn fields<'a>(value: &'a mut Value, field: &str) -> Result<&'a mut Map<String, Value>, Fault> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(Fault::NotFields { field: field.to_owned(), found: shown(other) }),
    }
}

/// A value as an error repeats it.
pub(super) fn shown(value: &Value) -> String {
    cut(value.to_string())
}

/// Text as an error repeats it.
pub(super) fn cut(mut text: String) -> String {
    if let Some((cut, _)) = text.char_indices().nth(SHOWN) {
        text.truncate(cut);
        text.push_str("...");
    }
    text
}
