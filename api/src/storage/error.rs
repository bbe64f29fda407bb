//! Errors of the translation between the two storages.

use serde_json::{Map, Value};

/// An object that neither storage can hold.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// It is not JSON, or a field has the wrong type.
    #[error("object: {0}; correct the field that the position points at")]
    Json(#[from] serde_json::Error),
    /// A value that should be an object with fields.
    #[error("{field}: {found}: not a set of fields; write it as an object, or leave it out")]
    NotFields {
        /// Path of the field.
        field: String,
        /// The value found, cut short.
        found: String,
    },
    /// A value that is not a UID.
    #[error(
        "{field}: {value:?}: not a UID; the API server writes it like \
         123e4567-e89b-42d3-a456-426614174000"
    )]
    Uid {
        /// Path of the field.
        field: String,
        /// The value found.
        value: String,
    },
    /// A text that should mean true or false and does not.
    #[error("{field}: {value}: neither true nor false; use \"true\" or \"false\"")]
    Truth {
        /// Path of the field.
        field: String,
        /// The value found.
        value: String,
    },
}

/// Limit of a value in an error, in characters.
const SHOWN: usize = 80;

/// Returns the value's fields, or an error if it is not an object.
pub(super) fn fields<'a>(
    value: &'a mut Value,
    field: &str,
) -> Result<&'a mut Map<String, Value>, StorageError> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(StorageError::NotFields {
            field: field.to_owned(),
            found: shown(other),
        }),
    }
}

/// Formats a value for an error.
pub(super) fn shown(value: &Value) -> String {
    cut(value.to_string())
}

/// Cuts text for an error.
pub(super) fn cut(mut text: String) -> String {
    if let Some((cut, _)) = text.char_indices().nth(SHOWN) {
        text.truncate(cut);
        text.push_str("...");
    }
    text
}
