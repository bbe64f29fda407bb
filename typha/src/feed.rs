//! What the API server says about one kind, line by line, as a state machine without I/O.
//!
//! A list counts only when it is complete, and not when it is older than what was seen before. What it lacks is not decided
//! here: see [`crate::watch`].

use std::collections::BTreeMap;

use margay_api::meta::NamespacedName;
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::storage::{self, Mode};
use margay_calc::update::Update;
use margay_runtime::telemetry::Traceparent;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::cache::{ObjectKey, Observed};

/// The API server has forgotten the version that was asked for.
const GONE: u16 = 410;

/// What an object of a kind means.
#[derive(Debug, Default)]
pub struct Parsed {
    /// What `calc` is told; none when the object means nothing to policy and routing.
    pub update: Option<Update>,
    /// If the object meant something before, that is to stay.
    pub prefers_former: bool,
    /// Why it is not used as it is written: field, value, rule and remedy.
    pub problems: Vec<String>,
}

/// The form in which objects of a kind come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As users write them.
    Plain,
    /// As the older storage keeps them.
    Stored(&'static storage::Kind),
}

/// Why a watch must be started again.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The connection or the request failed.
    #[error("API server: {0}")]
    Api(Box<kube::Error>),
    /// The stream broke.
    #[error("API server: stream broke: {0}")]
    Broken(std::io::Error),
    /// The API server answered, but not in time.
    #[error("API server: silent for {0} s")]
    Silent(u64),
    /// The API server ended the watch with an error.
    #[error("API server: {code} {message}")]
    Status {
        /// HTTP status.
        code: u16,
        /// Its words.
        message: String,
    },
    /// A line is not what the API server should say.
    #[error("API server: not a watch event: {0}")]
    Line(serde_json::Error),
    /// A streamed list ended without its end mark.
    #[error("API server: streamed list ended early")]
    Unfinished,
    /// The list is older than what was seen before.
    #[error(
        "list is of version {list}, but {seen} was seen before; it is not used (was the cluster restored from a backup? then restart typha)"
    )]
    Older {
        /// Version of the list.
        list: u64,
        /// Newest version seen.
        seen: u64,
    },
    /// A kind that is never empty was listed as empty.
    #[error("list is empty, which this kind never is in a working cluster; it is not used")]
    Empty,
    /// The list lacks an object that exists.
    #[error("list lacks {missing} objects, of which {example} exists when asked for by name; nothing is removed")]
    Lacking {
        /// How many objects the list lacks.
        missing: usize,
        /// One that exists.
        example: ObjectKey,
    },
}

impl Fault {
    /// Whether it is a list that was not believed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Older { .. } | Self::Empty | Self::Lacking { .. })
    }

    /// Whether the API server does not know what was asked for.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api(error) if matches!(&**error, kube::Error::Api(status) if status.code == 404))
    }

    /// Whether the version to go on from is lost, so that a new list is needed.
    pub fn needs_list(&self) -> bool {
        match self {
            Self::Status { code, .. } => *code == GONE,
            Self::Api(error) => matches!(&**error, kube::Error::Api(status) if status.code == GONE),
            Self::Broken(_) | Self::Silent(_) => false,
            Self::Line(_) | Self::Unfinished | Self::Older { .. } => true,
            Self::Empty | Self::Lacking { .. } => true,
        }
    }
}

/// What a line brings.
#[derive(Debug)]
pub enum News {
    /// Nothing for others.
    None,
    /// An object as it is now, and the trace that its writer began.
    Object(Box<Observed>, Option<Traceparent>),
    /// An object is gone.
    Deleted(ObjectKey),
    /// The list is complete.
    List(Vec<Observed>),
}

/// The state of one kind's watch.
#[derive(Debug)]
pub struct Feed<K> {
    parse: fn(K) -> Parsed,
    form: Form,
    never_empty: bool,
    /// Version to go on from; none: a list is needed.
    version: Option<String>,
    /// Newest version ever seen.
    seen: u64,
    /// Objects of the list in progress.
    listing: Vec<Observed>,
    /// Traces that were continued, so that a later change of the object does not continue them again.
    traces: BTreeMap<ObjectKey, Traceparent>,
}

impl<K: DeserializeOwned> Feed<K> {
    /// A feed that begins with a list.
    pub fn new(parse: fn(K) -> Parsed, form: Form, never_empty: bool) -> Self {
        Self { parse, form, never_empty, version: None, seen: 0, listing: Vec::new(), traces: BTreeMap::new() }
    }

    /// The version to go on from; none: a list is needed.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// A list begins; a former one that did not end is forgotten.
    pub fn restart(&mut self) {
        self.version = None;
        self.listing.clear();
    }

    /// One line of a watch, which may begin with a streamed list.
    pub fn line(&mut self, line: &[u8]) -> Result<News, Fault> {
        let event: Line<'_> = serde_json::from_slice(line).map_err(Fault::Line)?;
        match event.kind {
            "ADDED" | "MODIFIED" => self.object(event.object.get()),
            "DELETED" => {
                let meta = meta(event.object.get())?;
                self.advance(&meta.resource_version);
                let key = meta.key();
                self.traces.remove(&key);
                // In a list that is still coming it would come back.
                self.listing.retain(|listed| listed.key != key);
                Ok(News::Deleted(key))
            }
            "BOOKMARK" => {
                let meta = meta(event.object.get())?;
                if self.version.is_none() && meta.annotations.list_end.is_some() {
                    return self.listed(meta.resource_version);
                }
                self.advance(&meta.resource_version);
                Ok(News::None)
            }
            _ => {
                let status: Status = serde_json::from_str(event.object.get()).map_err(Fault::Line)?;
                Err(Fault::Status { code: status.code, message: status.message })
            }
        }
    }

    /// One page of a list that is not streamed; gives the token of the next page.
    pub fn page(&mut self, page: &str) -> Result<(News, Option<String>), Fault> {
        let page: Page<'_> = serde_json::from_str(page).map_err(Fault::Line)?;
        for item in page.items {
            let (observed, _) = self.observe(item.get())?;
            self.listing.push(observed);
        }
        match page.metadata.next.filter(|next| !next.is_empty()) {
            Some(next) => Ok((News::None, Some(next))),
            None => Ok((self.listed(page.metadata.resource_version)?, None)),
        }
    }

    fn object(&mut self, text: &str) -> Result<News, Fault> {
        let (observed, meta) = self.observe(text)?;
        if self.version.is_none() {
            self.listing.push(observed);
            return Ok(News::None);
        }
        self.advance(&meta.resource_version);
        let trace = self.trace(&observed.key, meta.annotations.trace.as_deref());
        Ok(News::Object(Box::new(observed), trace))
    }

    fn observe(&self, text: &str) -> Result<(Observed, Meta), Fault> {
        let meta = meta(text)?;
        let key = meta.key();
        let Parsed { update, prefers_former, problems } = self.parsed(text).unwrap_or_else(|fault| Parsed {
            // A policy must not open by becoming unreadable.
            update: self.stand_in(text),
            prefers_former: true,
            problems: vec![fault.to_string()],
        });
        let observed = Observed { key, uid: meta.uid.clone(), update, prefers_former, problems };
        Ok((observed, meta))
    }

    /// What the object means, whichever form it has.
    fn parsed(&self, text: &str) -> Result<Parsed, storage::StorageError> {
        match self.form {
            Form::Plain => Ok((self.parse)(serde_json::from_str(text)?)),
            Form::Stored(kind) => {
                let storage::Decoded { object, problems } = storage::decode_as(Mode::V1, kind, text.as_bytes())?;
                let mut parsed = (self.parse)(object);
                parsed.problems.extend(problems.iter().map(ToString::to_string));
                Ok(parsed)
            }
        }
    }

    /// What stands in the place of a policy of Calico's that cannot be read and never could: what its readable fields leave is closed.
    fn stand_in(&self, text: &str) -> Option<Update> {
        let parsed = self.parsed(&readable_policy(text)?.to_string()).ok()?;
        let is_calicos =
            |key: &PolicyKey| matches!(key.kind, PolicyKind::NetworkPolicy | PolicyKind::GlobalNetworkPolicy);
        parsed.update.filter(|update| matches!(update, Update::Policy(key, _) if is_calicos(key)))
    }

    fn listed(&mut self, version: String) -> Result<News, Fault> {
        let objects = std::mem::take(&mut self.listing);
        if let Some(list) = number(&version)
            && list < self.seen
        {
            return Err(Fault::Older { list, seen: self.seen });
        }
        if self.never_empty && objects.is_empty() {
            return Err(Fault::Empty);
        }
        self.advance(&version);
        self.version = Some(version);
        Ok(News::List(objects))
    }

    fn advance(&mut self, version: &str) {
        if let Some(current) = &mut self.version {
            version.clone_into(current);
        }
        if let Some(version) = number(version) {
            self.seen = self.seen.max(version);
        }
    }

    fn trace(&mut self, key: &ObjectKey, text: Option<&str>) -> Option<Traceparent> {
        let trace: Traceparent = text?.parse().ok()?;
        let former = self.traces.insert(key.clone(), trace);
        (former != Some(trace)).then_some(trace)
    }
}

/// A policy reduced to the fields that have the type which they must have. Its rules are one that denies, in the directions that it has rules of.
fn readable_policy(text: &str) -> Option<Value> {
    let object: Value = serde_json::from_str(text).ok()?;
    let name = &object["metadata"];
    let mut spec = serde_json::Map::new();
    for (field, value) in object["spec"].as_object().into_iter().flatten() {
        let kept = match field.as_str() {
            "tier" | "selector" | "namespaceSelector" | "serviceAccountSelector" => value.is_string(),
            "order" => value.is_number(),
            "applyOnForward" | "doNotTrack" | "preDNAT" => value.is_boolean(),
            "types" => value.as_array().is_some_and(|types| types.iter().all(Value::is_string)),
            _ => false,
        };
        if kept {
            spec.insert(field.clone(), value.clone());
        } else if field == "types" {
            spec.insert(field.clone(), json!(["Ingress", "Egress"]));
        } else if ["ingress", "egress"].contains(&field.as_str()) && !value.is_null() && *value != json!([]) {
            spec.insert(field.clone(), json!([{ "action": "Deny" }]));
        }
    }
    let metadata = json!({ "name": name["name"], "namespace": name["namespace"] });
    Some(json!({ "apiVersion": object["apiVersion"], "kind": object["kind"], "metadata": metadata, "spec": spec }))
}

/// Versions grow and can be compared as numbers; one that is no number is never called older.
fn number(version: &str) -> Option<u64> {
    version.parse().ok()
}

fn meta(text: &str) -> Result<Meta, Fault> {
    #[derive(Deserialize)]
    struct Object {
        metadata: Meta,
    }
    let object: Object = serde_json::from_str(text).map_err(Fault::Line)?;
    Ok(object.metadata)
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMeta,
    #[serde(borrow)]
    items: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    code: u16,
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    uid: String,
    resource_version: String,
    #[serde(default)]
    annotations: Annotations,
}

/// The only annotations that matter to every kind.
#[derive(Deserialize, Default)]
struct Annotations {
    /// By it whoever writes an object has its change traced as part of their own trace.
    #[serde(rename = "margay.io/traceparent")]
    trace: Option<String>,
    /// On the bookmark that ends a streamed list.
    #[serde(rename = "k8s.io/initial-events-end")]
    list_end: Option<String>,
}

impl Meta {
    fn key(&self) -> ObjectKey {
        NamespacedName::new(self.namespace.as_str(), self.name.as_str())
    }
}

#[cfg(test)]
mod tests;
