//! An existing Calico cluster's data: how objects lie in `crd.projectcalico.org/v1`, and the way from there to `projectcalico.org/v3` and back.
//!
//! The older storage keeps a user's metadata as text in one annotation, so that what users see and what is stored can differ. [`read`] and
//! [`write`] are each other's inverse; [`complete`] fills in what the older storage leaves out; [`decode`] is all of it from bytes. Which
//! storage a cluster uses is decided once, at start, in [`mode`].
//!
//! Source of the rules: Calico v3.32 as its clients behave towards the API server.

mod defaults;
mod fault;
pub mod kind;
mod meta;
pub mod mode;
pub mod name;
mod spec;
pub mod uid;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub use fault::Fault;
pub use kind::Kind;
pub use meta::METADATA;
pub use mode::Mode;

use crate::problem::Problem;

/// An object as users see it, and what of its stored form could not be used.
#[derive(Clone, Debug, PartialEq)]
pub struct Read<T = Value> {
    /// The object of `projectcalico.org/v3`.
    pub object: T,
    /// Parts that were left out because they cannot be read. The rest holds: a policy must not vanish because an annotation is broken.
    pub problems: Vec<Problem>,
}

/// From the stored form to the users' form. Fields that are not known are kept.
pub fn read(kind: &Kind, mut stored: Value) -> Result<Read, Fault> {
    let mut problems = Vec::new();
    let object = fault::fields(&mut stored, "object")?;
    object.insert("apiVersion".to_owned(), Mode::V3.api_version().into());
    object.insert("kind".to_owned(), kind.kind.into());
    let spec = object.get_mut("spec").map(|spec| fault::fields(spec, "spec")).transpose()?;
    let tier = spec.as_ref().and_then(|spec| spec.get("tier")).and_then(Value::as_str).map(str::to_owned);
    if let Some(spec) = spec {
        spec::read(kind, spec)?;
    }
    let metadata = object.entry("metadata").or_insert_with(|| Value::Object(Default::default()));
    meta::read(kind, tier.as_deref(), fault::fields(metadata, "metadata")?, &mut problems)?;
    Ok(Read { object: stored, problems })
}

/// From the users' form to the stored form, as Calico v3.32 writes it.
pub fn write(kind: &Kind, mut object: Value) -> Result<Value, Fault> {
    let stored = fault::fields(&mut object, "object")?;
    stored.insert("apiVersion".to_owned(), Mode::V1.api_version().into());
    stored.insert("kind".to_owned(), kind.stored_kind.into());
    if let Some(spec) = stored.get_mut("spec") {
        spec::write(kind, fault::fields(spec, "spec")?);
    }
    let metadata = stored.entry("metadata").or_insert_with(|| Value::Object(Default::default()));
    meta::write(kind, fault::fields(metadata, "metadata")?)?;
    Ok(object)
}

/// Fills in what readers of the older storage assume of an object that lacks it. Takes the users' form; doing it again changes nothing.
pub fn complete(kind: &Kind, object: &mut Value) {
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        defaults::complete(kind, spec);
    }
}

/// An object of the older storage, from its JSON, as users see it and complete.
pub fn decode(kind: &Kind, bytes: &[u8]) -> Result<Read, Fault> {
    let mut read = read(kind, serde_json::from_slice(bytes)?)?;
    complete(kind, &mut read.object);
    Ok(read)
}

/// An object of either storage, from its JSON, in its typed form.
pub fn decode_as<T: DeserializeOwned>(mode: Mode, kind: &Kind, bytes: &[u8]) -> Result<Read<T>, Fault> {
    match mode {
        Mode::V3 => Ok(Read { object: serde_json::from_slice(bytes)?, problems: Vec::new() }),
        Mode::V1 => {
            let Read { object, problems } = decode(kind, bytes)?;
            Ok(Read { object: serde_json::from_value(object)?, problems })
        }
    }
}

/// A typed object in the form in which that storage keeps it.
pub fn encode<T: Serialize>(mode: Mode, kind: &Kind, object: &T) -> Result<Value, Fault> {
    let object = serde_json::to_value(object)?;
    match mode {
        Mode::V3 => Ok(object),
        Mode::V1 => write(kind, object),
    }
}
