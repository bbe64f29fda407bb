//! Scenarios that do not care how Calico's data is stored: every suite of a real cluster runs the same ones.

pub mod hosts;
pub mod policy;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use margay_api::storage::{self, Kind, Mode};
use margay_api::v3;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::demo::Stage;

/// Where scenarios play.
#[derive(Debug)]
pub struct Ground {
    /// A cluster with Margay and the usual pods.
    pub stage: Stage,
    /// Storage of Calico's data.
    pub mode: Mode,
}

impl Ground {
    /// Applies a manifest as users write it, in the form that the cluster stores.
    pub fn apply(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = stored(self.mode, name, text, self.stage.cluster.folder())?;
        self.stage.cluster.kubectl(&["apply", "-f", &path.display().to_string()])?;
        Ok(path)
    }
}

/// Writes a manifest's objects into the folder in the form in which that storage keeps them.
pub fn stored(mode: Mode, name: &str, text: &str, folder: &Path) -> Result<PathBuf> {
    let documents = serde_yaml_ng::Deserializer::from_str(text).map(Value::deserialize);
    let items = documents.map(|object| store(mode, object?)).collect::<Result<Vec<_>>>()?;
    let path = folder.join(format!("{name}.json"));
    std::fs::write(&path, json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string())?;
    Ok(path)
}

fn store(mode: Mode, object: Value) -> Result<Value> {
    let is_calicos = object["apiVersion"].as_str().is_some_and(|version| version.starts_with(v3::GROUP));
    if mode == Mode::V3 || !is_calicos {
        return Ok(object);
    }
    let name = object["kind"].as_str().unwrap_or_default().to_owned();
    let kind = Kind::of(&name).with_context(|| format!("{name} is no kind of Calico"))?;
    Ok(storage::write(kind, object)?)
}
