//! Objects that policy depends on, by kind and name, as manifests or an API server have them.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Service;
use margay_api::endpoint::EndpointKey;
use margay_api::storage::{self, Mode};
use margay_calc::ingest::Ingested;
use margay_calc::kinds::{self, KindName};
use serde_json::{Value, json};

use crate::manifest::{self, Document, Origin, Unreadable};
use crate::workload::{self, PodObject};

/// Kinds whose objects are in a namespace, by their unique names.
const NAMESPACED: [&str; 8] = [
    "EndpointSlice",
    "KubernetesNetworkPolicy",
    "NetworkPolicy",
    "NetworkSet",
    "Pod",
    "ServiceAccount",
    "StagedKubernetesNetworkPolicy",
    "StagedNetworkPolicy",
];

/// Kind and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectName {
    /// Unique name of the kind: [`KindName::name`], `Service`, or that of a workload.
    pub kind: String,
    /// Namespace; empty for kinds without.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            namespace,
            name,
        } = self;
        match namespace.as_str() {
            "" => write!(f, "{kind} {name}"),
            _ => write!(f, "{kind} {namespace}/{name}"),
        }
    }
}

/// An object with what it means.
#[derive(Debug)]
pub struct Object {
    /// Where it was read.
    pub origin: Origin,
    /// What it means.
    pub content: Content,
}

/// What an object means.
#[derive(Debug)]
pub enum Content {
    /// An update, or the reasons why there is none.
    Ingested(Box<Ingested>),
    /// A pod, or the one that stands for those of a workload.
    Pod(Box<PodObject>),
    /// A Service, whose backends are found when all pods are known.
    Service(Box<Service>),
}

/// The objects of one state of a cluster.
#[derive(Debug, Default)]
pub struct Objects {
    /// Those that policy depends on.
    pub known: BTreeMap<ObjectName, Object>,
    /// Documents that are not objects.
    pub unreadable: Vec<Unreadable>,
    /// What a reader should know, such as objects that are there twice.
    pub notes: Vec<String>,
}

impl Objects {
    /// Reads every manifest of these paths. Objects without a namespace are put into `namespace`.
    pub fn read(paths: &[String], namespace: &str) -> Result<Self> {
        let mut objects = Self::default();
        for path in paths {
            manifest::read(path, &mut |document| {
                objects.add_document(document, namespace)
            })?;
        }
        Ok(objects)
    }

    /// Adds a document.
    pub fn add_document(&mut self, document: Document, namespace: &str) {
        match document {
            Ok((origin, value)) => self.add(&origin, value, namespace),
            Err(unreadable) => self.unreadable.push(unreadable),
        }
    }

    /// Adds an object, or all that a list holds. Kinds that policy does not depend on are left out.
    pub fn add(&mut self, origin: &Origin, mut value: Value, namespace: &str) {
        let is_list = value["kind"]
            .as_str()
            .is_some_and(|kind| kind.ends_with("List"));
        if let Some(Value::Array(items)) = value.get_mut("items").filter(|_| is_list) {
            for item in std::mem::take(items) {
                self.add(origin, item, namespace);
            }
            return;
        }
        match parse(value, namespace) {
            Ok(Some((name, content))) => {
                let object = Object {
                    origin: origin.clone(),
                    content,
                };
                if let Some(former) = self.known.insert(name.clone(), object) {
                    self.notes.push(format!(
                        "{name} of {origin} replaces that of {}",
                        former.origin
                    ));
                }
            }
            Ok(None) => {}
            Err(error) => self.unreadable.push(Unreadable {
                origin: origin.clone(),
                reason: format!("{error:#}"),
            }),
        }
    }

    /// Adds those of another state, which replace objects of the same name.
    pub fn overlay(&mut self, other: Self) {
        self.known.extend(other.known);
        self.unreadable.extend(other.unreadable);
        self.notes.extend(other.notes);
    }
}

/// Parses an object; `None` for kinds that policy does not depend on.
fn parse(value: Value, namespace: &str) -> Result<Option<(ObjectName, Content)>> {
    if !value.is_object() {
        bail!("not an object: a manifest has apiVersion, kind and metadata");
    }
    let text = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    if api_version.is_empty() || kind.is_empty() {
        let missing = if kind.is_empty() {
            "kind"
        } else {
            "apiVersion"
        };
        bail!("{missing}: \"\": every object names its kind and the version of its API; add it");
    }
    if api_version == Mode::V1.api_version() {
        return parse_stored(value, &kind, namespace);
    }
    if workload::is_workload(&api_version, &kind) {
        let (name, _) = identity(&value, &kind, Some(namespace))?;
        let key = EndpointKey::new(name.namespace.as_str(), name.name.as_str());
        let pod = workload::of_workload(&key, value).with_context(|| name.to_string())?;
        return Ok(Some((name, Content::Pod(Box::new(pod)))));
    }
    if (api_version.as_str(), kind.as_str()) == ("v1", "Service") {
        let (name, value) =
            identity(&value, "Service", Some(namespace)).map(|(name, _)| (name, value))?;
        return Ok(Some((
            name,
            Content::Service(Box::new(serde_json::from_value(value)?)),
        )));
    }
    let Some(known) = KindName::of(&api_version, &kind) else {
        return Ok(None);
    };
    ingest(known.name, value, namespace, Vec::new()).map(Some)
}

/// Parses an object in the form of the older storage.
fn parse_stored(
    value: Value,
    stored_kind: &str,
    namespace: &str,
) -> Result<Option<(ObjectName, Content)>> {
    let Some(kind) = storage::kind::ALL
        .iter()
        .find(|kind| kind.stored_kind == stored_kind)
    else {
        return Ok(None);
    };
    if KindName::of(&Mode::V3.api_version(), kind.kind).is_none() {
        return Ok(None);
    }
    let mut decoded = storage::read(kind, value)?;
    storage::complete(kind, &mut decoded.object);
    let problems = decoded.problems.iter().map(ToString::to_string).collect();
    ingest(kind.kind, decoded.object, namespace, problems).map(Some)
}

fn ingest(
    kind: &str,
    value: Value,
    namespace: &str,
    problems: Vec<String>,
) -> Result<(ObjectName, Content)> {
    let namespace = NAMESPACED.contains(&kind).then_some(namespace);
    let (name, namespace) = identity(&value, kind, namespace)?;
    let mut value = value;
    if let Some(namespace) = namespace {
        value["metadata"]["namespace"] = namespace.into();
    }
    match kind {
        "Pod" => return Ok((name, Content::Pod(Box::new(workload::of_pod(value)?)))),
        "Namespace" => label_namespace(&mut value, &name.name),
        _ => {}
    }
    let Some(ingested) = kinds::ingest(kind, value) else {
        bail!("{name}: not a kind that policy depends on");
    };
    let mut ingested =
        ingested.map_err(|error| anyhow::anyhow!("{name}: not what its kind is: {error}"))?;
    ingested.problems.extend(problems);
    Ok((name, Content::Ingested(Box::new(ingested))))
}

/// The API server labels each Namespace with its name.
fn label_namespace(value: &mut Value, name: &str) {
    if !value["metadata"]["labels"].is_object() {
        value["metadata"]["labels"] = json!({});
    }
    value["metadata"]["labels"]["kubernetes.io/metadata.name"] = name.into();
}

/// A field of an object's metadata, unless it is empty. YAML takes words such as `n` and `1` for
/// something else than text, and an object must not get into another namespace by that.
pub fn metadata_text<'a>(value: &'a Value, kind: &str, field: &str) -> Result<Option<&'a str>> {
    match &value["metadata"][field] {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        other => bail!("{kind}: metadata.{field}: {other}: must be text; put it into quotes"),
    }
}

/// Name of an object, and its namespace if its kind has any: its own, else the given one.
fn identity(
    value: &Value,
    kind: &str,
    namespace: Option<&str>,
) -> Result<(ObjectName, Option<String>)> {
    let text = |field: &str| metadata_text(value, kind, field);
    let Some(name) = text("name")?.or(text("generateName")?) else {
        bail!("{kind}: metadata.name: \"\": an object has a name; add it");
    };
    let own = text("namespace")?;
    let namespace = namespace.map(|default| own.unwrap_or(default).to_owned());
    let name = ObjectName {
        kind: kind.to_owned(),
        namespace: namespace.clone().unwrap_or_default(),
        name: name.to_owned(),
    };
    Ok((name, namespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(text: &str) -> Objects {
        let mut objects = Objects::default();
        manifest::split("f", text, &mut |document| {
            objects.add_document(document, "here")
        });
        objects
    }

    fn names(objects: &Objects) -> Vec<String> {
        objects.known.keys().map(ToString::to_string).collect()
    }

    #[test]
    fn kinds_are_distinguished_by_group() {
        let objects = objects(
            r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a}
spec: {podSelector: {}}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: a, namespace: there}
spec: {}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: a}
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: space}}
- apiVersion: apps/v1
  kind: Deployment
  metadata: {name: d}
  spec: {template: {spec: {containers: []}}}
"#,
        );
        assert_eq!(objects.unreadable, []);
        let wanted = [
            "Deployment here/d",
            "KubernetesNetworkPolicy here/a",
            "Namespace space",
            "NetworkPolicy there/a",
        ];
        assert_eq!(names(&objects), wanted);
    }

    #[test]
    fn the_older_storage_is_read_too() {
        let objects = objects(
            r#"
apiVersion: crd.projectcalico.org/v1
kind: NetworkPolicy
metadata: {name: default.a, namespace: there}
spec: {selector: all()}
---
apiVersion: crd.projectcalico.org/v1
kind: IPAMHandle
metadata: {name: h}
"#,
        );
        assert_eq!(objects.unreadable, []);
        assert_eq!(names(&objects).len(), 1);
        assert!(names(&objects)[0].starts_with("NetworkPolicy there/"));
    }

    #[test]
    fn what_is_no_object_is_reported_with_its_place() {
        let objects = objects(
            "a: b\n---\nkind: Pod\napiVersion: v1\n---\n[]\n---\napiVersion: v1\nkind: Pod\n\
             metadata: {name: n}\n",
        );
        let found: Vec<String> = objects
            .unreadable
            .iter()
            .map(|bad| format!("{} {}", bad.origin, bad.reason))
            .collect();
        assert_eq!(found.len(), 4, "{found:#?}");
        assert!(found[0].starts_with("f:1 kind:"), "{found:#?}");
        // YAML 1.1 has more words for true and false.
        assert!(
            found[3].ends_with("Pod: metadata.name: false: must be text; put it into quotes"),
            "{found:#?}"
        );
        assert!(
            found[1].starts_with("f:3 Pod: metadata.name:"),
            "{found:#?}"
        );
    }

    #[test]
    fn the_later_of_two_counts() {
        let set = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkSet\n\
                   metadata: {name: a}\nspec: {}\n";
        let objects = objects(&format!("{set}---\n{set}"));
        assert_eq!(
            objects.notes,
            ["GlobalNetworkSet a of f:6 replaces that of f:1"]
        );
    }
}
