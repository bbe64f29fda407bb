//! Translation between `crd.projectcalico.org/v1`, in which an existing Calico cluster stores its
//! objects, and `projectcalico.org/v3`.
//!
//! The older storage keeps a user's metadata as text in one annotation, so that the stored object
//! and the user's can differ. [`read`] and [`write()`] are each other's inverse; [`complete`] fills
//! in defaults that the older storage leaves out; [`decode`] does all of it from bytes. The storage
//! of a cluster is determined once, at start, by [`mode`].
//!
//! Source of the rules: behaviour of Calico v3.32 towards the API server.

mod defaults;
mod error;
pub mod kind;
mod meta;
pub mod mode;
pub mod name;
mod spec;
pub mod uid;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use error::StorageError;
pub use kind::Kind;
pub use meta::METADATA;
pub use mode::Mode;

use crate::problem::Problem;

/// An object in the user's form, and the problems of its stored form.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded<T = Value> {
    /// Object of `projectcalico.org/v3`.
    pub object: T,
    /// Unreadable parts, which were left out. The rest is used: a policy must not vanish because an
    /// annotation is broken.
    pub problems: Vec<Problem>,
}

/// Translates the stored form into the user's form. Unknown fields are kept.
pub fn read(kind: &Kind, mut stored: Value) -> Result<Decoded, StorageError> {
    let mut problems = Vec::new();
    let object = error::fields(&mut stored, "object")?;
    object.insert("apiVersion".to_owned(), Mode::V3.api_version().into());
    object.insert("kind".to_owned(), kind.kind.into());
    let spec = object
        .get_mut("spec")
        .map(|spec| error::fields(spec, "spec"))
        .transpose()?;
    let tier = spec
        .as_ref()
        .and_then(|spec| spec.get("tier"))
        .and_then(Value::as_str)
        .map(str::to_owned);
    if let Some(spec) = spec {
        spec::read(kind, spec)?;
    }
    let metadata = object
        .entry("metadata")
        .or_insert_with(|| Value::Object(Default::default()));
    meta::read(
        kind,
        tier.as_deref(),
        error::fields(metadata, "metadata")?,
        &mut problems,
    )?;
    Ok(Decoded {
        object: stored,
        problems,
    })
}

/// Translates the user's form into the stored form, as Calico v3.32 writes it.
pub fn write(kind: &Kind, mut object: Value) -> Result<Value, StorageError> {
    let stored = error::fields(&mut object, "object")?;
    stored.insert("apiVersion".to_owned(), Mode::V1.api_version().into());
    stored.insert("kind".to_owned(), kind.stored_kind.into());
    if let Some(spec) = stored.get_mut("spec") {
        spec::write(kind, error::fields(spec, "spec")?);
    }
    let metadata = stored
        .entry("metadata")
        .or_insert_with(|| Value::Object(Default::default()));
    meta::write(kind, error::fields(metadata, "metadata")?)?;
    Ok(object)
}

/// Fills in defaults that readers of the older storage apply. Takes the user's form; idempotent.
pub fn complete(kind: &Kind, object: &mut Value) {
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        defaults::complete(kind, spec);
    }
}

/// Decodes an object of the older storage from JSON into the complete user's form.
pub fn decode(kind: &Kind, bytes: &[u8]) -> Result<Decoded, StorageError> {
    let mut read = read(kind, serde_json::from_slice(bytes)?)?;
    complete(kind, &mut read.object);
    Ok(read)
}

/// Decodes an object of either storage from JSON into its typed form.
pub fn decode_as<T: DeserializeOwned>(
    mode: Mode,
    kind: &Kind,
    bytes: &[u8],
) -> Result<Decoded<T>, StorageError> {
    match mode {
        Mode::V3 => Ok(Decoded {
            object: serde_json::from_slice(bytes)?,
            problems: Vec::new(),
        }),
        Mode::V1 => {
            let Decoded { object, problems } = decode(kind, bytes)?;
            Ok(Decoded {
                object: serde_json::from_value(object)?,
                problems,
            })
        }
    }
}

/// Encodes a typed object in the form of that storage.
pub fn encode<T: Serialize>(mode: Mode, kind: &Kind, object: &T) -> Result<Value, StorageError> {
    let object = serde_json::to_value(object)?;
    match mode {
        Mode::V3 => Ok(object),
        Mode::V1 => write(kind, object),
    }
}
