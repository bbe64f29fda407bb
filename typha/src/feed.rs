//! Decoder of one kind's list and watch, line by line: a state machine without I/O.
//!
//! A list is used only if it is complete and not older than what was received before. What it lacks
//! is handled in [`crate::watch`].

use std::collections::BTreeMap;

use margay_api::meta::NamespacedName;
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::storage::{self, Mode};
use margay_calc::ingest::Ingested;
use margay_calc::update::Update;
use margay_runtime::telemetry::Traceparent;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::object::{ObjectKey, Observed};
use crate::packed::PackedList;

/// HTTP status 410: the requested resource version has expired.
const GONE: u16 = 410;

/// Encoding of the objects of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As users write them.
    Plain,
    /// As the older storage holds them.
    Stored(&'static storage::Kind),
}

/// Reason for restarting a watch.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The connection or the request failed.
    #[error("API server: {0}")]
    Api(Box<kube::Error>),
    /// The stream broke.
    #[error("API server: stream broke: {0}")]
    Broken(std::io::Error),
    /// No data arrived in time.
    #[error("API server: silent for {0} s")]
    Silent(u64),
    /// The API server ended the watch with an error.
    #[error("API server: {code} {message}")]
    Status {
        /// HTTP status.
        code: u16,
        /// Message of the API server.
        message: String,
    },
    /// A line is not a watch event.
    #[error("API server: not a watch event: {0}")]
    Line(serde_json::Error),
    /// A streamed list ended without its end mark.
    #[error("API server: streamed list ended early")]
    Unfinished,
    /// The list is older than what was received before.
    #[error(
        "list is of version {list}, but {seen} was received before; it is ignored (was the cluster \
         restored from a backup? then restart typha)"
    )]
    Older {
        /// Version of the list.
        list: u64,
        /// Latest version received.
        seen: u64,
    },
    /// A kind that is never empty was listed as empty.
    #[error("list is empty, which this kind never is in a working cluster; it is ignored")]
    Empty,
    /// The list lacks an object that exists.
    #[error(
        "list lacks {missing} objects, of which {example} exists when requested by name; nothing \
         is removed"
    )]
    Lacking {
        /// How many objects the list lacks.
        missing: usize,
        /// One that exists.
        example: ObjectKey,
    },
}

impl WatchError {
    /// Returns true if a list was refused.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Older { .. } | Self::Empty | Self::Lacking { .. }
        )
    }

    /// Returns true if the API server does not know the kind or object.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Api(error) if matches!(&**error, kube::Error::Api(status) if status.code == 404),
        )
    }

    /// Returns true if the API server does not give the kind's state: it does not answer, has
    /// no answer itself, or one that cannot be used. A refusal for other reasons is an answer.
    pub fn is_unanswered(&self) -> bool {
        let is_fault = |code: u16| code >= 500;
        match self {
            Self::Api(error) => match &**error {
                kube::Error::Api(status) => is_fault(status.code),
                _ => true,
            },
            Self::Status { code, .. } => is_fault(*code),
            Self::Broken(_) | Self::Silent(_) | Self::Line(_) | Self::Unfinished => true,
            Self::Older { .. } | Self::Empty | Self::Lacking { .. } => true,
        }
    }

    /// Returns true if the watch cannot resume, so that a new list is needed.
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

/// A decoded watch event.
#[derive(Debug)]
pub enum WatchEvent {
    /// Nothing to apply: a bookmark, or an object of a list in progress.
    Bookmark,
    /// Current state of an object, and the trace of its writer.
    Applied(Box<Observed>, Option<Traceparent>),
    /// An object was deleted.
    Deleted(ObjectKey),
    /// A list is complete.
    ListComplete(PackedList),
}

/// State of one kind's watch.
#[derive(Debug)]
pub struct Feed<K> {
    ingest: fn(K) -> Ingested,
    form: Form,
    never_empty: bool,
    /// Resource version to resume from; `None`: a list is needed.
    version: Option<String>,
    /// Latest version ever received.
    seen: u64,
    /// Objects of the list in progress.
    listing: PackedList,
    /// Version of the newest of them, or of the last list if none is in progress.
    newest: u64,
    /// Traces already continued, so that a later change of the object does not continue them again.
    traces: BTreeMap<ObjectKey, Traceparent>,
}

impl<K: DeserializeOwned> Feed<K> {
    /// Creates a feed that starts with a list.
    pub fn new(ingest: fn(K) -> Ingested, form: Form, never_empty: bool) -> Self {
        Self {
            ingest,
            form,
            never_empty,
            version: None,
            seen: 0,
            listing: PackedList::default(),
            newest: 0,
            traces: BTreeMap::new(),
        }
    }

    /// Resource version to resume from; `None`: a list is needed.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Latest version ever received, as a number; 0 if versions are not numbers.
    pub fn version_number(&self) -> u64 {
        self.seen
    }

    /// Version of the newest object in the last list.
    pub fn newest_listed(&self) -> u64 {
        self.newest
    }

    /// Starts a new list; an incomplete one is dropped.
    pub fn restart(&mut self) {
        self.version = None;
        self.newest = 0;
        self.listing.clear();
    }

    /// Decodes one line of a watch, which may start with a streamed list.
    pub fn decode_line(&mut self, line: &[u8]) -> Result<WatchEvent, WatchError> {
        let event: RawEvent<'_> = serde_json::from_slice(line).map_err(WatchError::Line)?;
        match event.kind {
            "ADDED" | "MODIFIED" => self.decode_object(event.object.get()),
            "DELETED" => {
                let meta = object_meta(event.object.get())?;
                self.advance(&meta.resource_version);
                let key = meta.key();
                self.traces.remove(&key);
                // The list in progress may contain the object; it must not bring it back.
                self.listing.remove(&key);
                Ok(WatchEvent::Deleted(key))
            }
            "BOOKMARK" => {
                let meta = object_meta(event.object.get())?;
                if self.version.is_none() && meta.annotations.list_end.is_some() {
                    return self.complete_list(meta.resource_version);
                }
                self.advance(&meta.resource_version);
                Ok(WatchEvent::Bookmark)
            }
            _ => {
                let status: RawStatus =
                    serde_json::from_str(event.object.get()).map_err(WatchError::Line)?;
                Err(WatchError::Status {
                    code: status.code,
                    message: status.message,
                })
            }
        }
    }

    /// Decodes one page of a paged list; returns the token of the next page.
    pub fn decode_page(&mut self, page: &str) -> Result<(WatchEvent, Option<String>), WatchError> {
        let page: RawPage<'_> = serde_json::from_str(page).map_err(WatchError::Line)?;
        for item in page.items {
            let (observed, meta) = self.observe(item.get())?;
            self.push_listed(observed, &meta);
        }
        match page.metadata.next.filter(|next| !next.is_empty()) {
            Some(next) => Ok((WatchEvent::Bookmark, Some(next))),
            None => Ok((self.complete_list(page.metadata.resource_version)?, None)),
        }
    }

    fn decode_object(&mut self, text: &str) -> Result<WatchEvent, WatchError> {
        let (observed, meta) = self.observe(text)?;
        if self.version.is_none() {
            self.push_listed(observed, &meta);
            return Ok(WatchEvent::Bookmark);
        }
        self.advance(&meta.resource_version);
        let trace = self.new_trace(&observed.key, meta.annotations.trace.as_deref());
        Ok(WatchEvent::Applied(Box::new(observed), trace))
    }

    fn push_listed(&mut self, observed: Observed, meta: &RawMeta) {
        let version = version_number(&meta.resource_version).unwrap_or(0);
        self.newest = self.newest.max(version);
        self.listing.push(observed);
    }

    fn observe(&self, text: &str) -> Result<(Observed, RawMeta), WatchError> {
        let meta = object_meta(text)?;
        let key = meta.key();
        let Ingested {
            update,
            prefers_former,
            problems,
        } = self.ingest_text(text).unwrap_or_else(|fault| Ingested {
            // A policy must not open by becoming unreadable.
            update: self.closed_policy(text),
            prefers_former: true,
            problems: vec![fault.to_string()],
        });
        let observed = Observed {
            key,
            uid: meta.uid.clone(),
            update,
            prefers_former,
            problems,
        };
        Ok((observed, meta))
    }

    /// Parses an object of either form.
    fn ingest_text(&self, text: &str) -> Result<Ingested, storage::StorageError> {
        match self.form {
            Form::Plain => Ok((self.ingest)(serde_json::from_str(text)?)),
            Form::Stored(kind) => {
                let storage::Decoded { object, problems } =
                    storage::decode_as(Mode::V1, kind, text.as_bytes())?;
                let mut ingested = (self.ingest)(object);
                ingested
                    .problems
                    .extend(problems.iter().map(ToString::to_string));
                Ok(ingested)
            }
        }
    }

    /// Substitute for an unreadable policy of Calico's kinds without a former value: closed for
    /// everything that its readable fields select.
    fn closed_policy(&self, text: &str) -> Option<Update> {
        let ingested = self.ingest_text(&readable_policy(text)?.to_string()).ok()?;
        let is_of_calico = |key: &PolicyKey| {
            matches!(
                key.kind,
                PolicyKind::NetworkPolicy | PolicyKind::GlobalNetworkPolicy
            )
        };
        ingested
            .update
            .filter(|update| matches!(update, Update::Policy(key, _) if is_of_calico(key)))
    }

    fn complete_list(&mut self, version: String) -> Result<WatchEvent, WatchError> {
        let objects = std::mem::take(&mut self.listing);
        if let Some(list) = version_number(&version)
            && list < self.seen
        {
            return Err(WatchError::Older {
                list,
                seen: self.seen,
            });
        }
        if self.never_empty && objects.is_empty() {
            return Err(WatchError::Empty);
        }
        self.advance(&version);
        self.version = Some(version);
        Ok(WatchEvent::ListComplete(objects))
    }

    fn advance(&mut self, version: &str) {
        if let Some(current) = &mut self.version {
            version.clone_into(current);
        }
        if let Some(version) = version_number(version) {
            self.seen = self.seen.max(version);
        }
    }

    fn new_trace(&mut self, key: &ObjectKey, text: Option<&str>) -> Option<Traceparent> {
        let trace: Traceparent = text?.parse().ok()?;
        let former = self.traces.insert(key.clone(), trace);
        (former != Some(trace)).then_some(trace)
    }
}

/// Reduces a policy to the fields of the correct type. Its rules become one that denies, in the
/// directions in which it has rules.
fn readable_policy(text: &str) -> Option<Value> {
    let object: Value = serde_json::from_str(text).ok()?;
    let name = &object["metadata"];
    let mut spec = serde_json::Map::new();
    for (field, value) in object["spec"].as_object().into_iter().flatten() {
        let is_kept = match field.as_str() {
            "tier" | "selector" | "namespaceSelector" | "serviceAccountSelector" => {
                value.is_string()
            }
            "order" => value.is_number(),
            "applyOnForward" | "doNotTrack" | "preDNAT" => value.is_boolean(),
            "types" => value
                .as_array()
                .is_some_and(|types| types.iter().all(Value::is_string)),
            _ => false,
        };
        if is_kept {
            spec.insert(field.clone(), value.clone());
        } else if field == "types" {
            spec.insert(field.clone(), json!(["Ingress", "Egress"]));
        } else if ["ingress", "egress"].contains(&field.as_str())
            && !value.is_null()
            && *value != json!([])
        {
            spec.insert(field.clone(), json!([{ "action": "Deny" }]));
        }
    }
    let metadata = json!({ "name": name["name"], "namespace": name["namespace"] });
    Some(json!({
        "apiVersion": object["apiVersion"],
        "kind": object["kind"],
        "metadata": metadata,
        "spec": spec,
    }))
}

/// Resource versions are compared as numbers (Kubernetes 1.35, KEP-5504); one that is not a number
/// never counts as older.
fn version_number(version: &str) -> Option<u64> {
    version.parse().ok()
}

fn object_meta(text: &str) -> Result<RawMeta, WatchError> {
    #[derive(Deserialize)]
    struct WithMeta {
        metadata: RawMeta,
    }
    let object: WithMeta = serde_json::from_str(text).map_err(WatchError::Line)?;
    Ok(object.metadata)
}

#[derive(Deserialize)]
struct RawEvent<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct RawPage<'a> {
    metadata: RawPageMeta,
    #[serde(borrow)]
    items: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPageMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

#[derive(Deserialize)]
struct RawStatus {
    #[serde(default)]
    code: u16,
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMeta {
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

/// Annotations that are used for every kind.
#[derive(Deserialize, Default)]
struct Annotations {
    /// Trace context of the writer, whose trace the change continues.
    #[serde(rename = "margay.io/traceparent")]
    trace: Option<String>,
    /// Marks the bookmark that ends a streamed list.
    #[serde(rename = "k8s.io/initial-events-end")]
    list_end: Option<String>,
}

impl RawMeta {
    fn key(&self) -> ObjectKey {
        NamespacedName::new(self.namespace.as_str(), self.name.as_str())
    }
}

#[cfg(test)]
mod tests;
