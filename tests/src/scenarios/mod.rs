//! Scenarios that do not care how Calico's data is stored: every suite of a real cluster runs the
//! same ones.

pub mod ctl;
pub mod hosts;
pub mod policy;
pub mod pools;
pub mod secrets;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use margay_api::storage::{self, Kind, Mode};
use margay_api::v3;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::demo::Stage;

/// Environment of a scenario.
#[derive(Debug)]
pub struct Environment {
    /// A cluster with Margay and the usual pods.
    pub stage: Stage,
    /// Storage of Calico's data.
    pub mode: Mode,
}

impl Environment {
    /// Applies a manifest as users write it, in the form that the cluster stores.
    pub fn apply(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = stored(self.mode, name, text, self.stage.cluster.folder())?;
        self.stage
            .cluster
            .kubectl(&["apply", "-f", &path.display().to_string()])?;
        Ok(path)
    }

    /// Deletes an object of a kind of Calico's that has no namespace.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        self.stage
            .cluster
            .kubectl(&["delete", &self.resource(kind_of(kind)?), name])
            .map(drop)
    }

    /// Every object of a kind of Calico's that has no namespace, by name, as users see it.
    pub fn objects(&self, kind: &str) -> Result<BTreeMap<String, Value>> {
        let kind = kind_of(kind)?;
        let text = self
            .stage
            .cluster
            .kubectl(&["get", &self.resource(kind), "-o", "json"])?;
        let list: Value = serde_json::from_str(&text)?;
        let items = list["items"]
            .as_array()
            .cloned()
            .unwrap_or_default()
            .into_iter();
        let seen = |stored: Value| -> Result<(String, Value)> {
            let object = match self.mode {
                Mode::V3 => stored,
                Mode::V1 => storage::read(kind, stored)?.object,
            };
            Ok((
                object["metadata"]["name"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                object,
            ))
        };
        items.map(seen).collect()
    }

    fn resource(&self, kind: &Kind) -> String {
        format!("{}.{}", kind.plural_in(self.mode), self.mode.group())
    }
}

fn kind_of(name: &str) -> Result<&'static Kind> {
    Kind::of(name).with_context(|| format!("{name} is no kind of Calico"))
}

/// Writes a manifest's objects into the folder in the form in which that storage keeps them.
pub fn stored(mode: Mode, name: &str, text: &str, folder: &Path) -> Result<PathBuf> {
    let documents = serde_yaml_ng::Deserializer::from_str(text).map(Value::deserialize);
    let items = documents
        .map(|object| store(mode, object?))
        .collect::<Result<Vec<_>>>()?;
    let path = folder.join(format!("{name}.json"));
    std::fs::write(
        &path,
        json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string(),
    )?;
    Ok(path)
}

fn store(mode: Mode, object: Value) -> Result<Value> {
    let is_calicos = object["apiVersion"]
        .as_str()
        .is_some_and(|version| version.starts_with(v3::GROUP));
    if mode == Mode::V3 || !is_calicos {
        return Ok(object);
    }
    let name = object["kind"].as_str().unwrap_or_default().to_owned();
    Ok(storage::write(kind_of(&name)?, object)?)
}
