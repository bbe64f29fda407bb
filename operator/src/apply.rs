//! Writes what is wanted: server-side apply with one field manager (to the older storage, where metadata is one text, read and replace), and a sweep
//! of what is ours and no longer wanted. All writes are here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, Error};
use margay_api::report::CONFIG_MAP;
use margay_api::storage::{self, Mode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tracing::{info, warn};

use crate::drain::Finalizers;
use crate::hosts::HostPlan;
use crate::inputs::{Inputs, Present};
use crate::object::{Key, MANAGER, OWNED_KINDS, Object, Owner, kind};
use crate::render::NAMESPACE;
use crate::status::Failure;
use crate::stored;

/// Who writes finalizers, as the API server keeps it: another one than who applies objects.
const FINALIZER_MANAGER: &str = "margay-operator-finalizers";

/// The longest that one request may take: a connection that has died silently must not stop every later round.
const PATIENCE: Duration = Duration::from_secs(15);

/// The outcome of a request, or an error when there is none for too long.
pub async fn bounded<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match tokio::time::timeout(PATIENCE, request).await {
        Ok(outcome) => outcome,
        Err(silence) => Err(Error::Service(Box::new(silence))),
    }
}

/// Asks for a node by name: the word of the API where a list may be short.
pub async fn has_node(client: &Client, name: &str) -> Result<bool, Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    Ok(bounded(nodes.get_metadata_opt(name)).await?.is_some())
}

/// How many objects are written at a time.
const AT_ONCE: usize = 8;
/// How many waves there are.
const WAVES: u8 = 3;

/// When an object has its turn: first what others live in, last what refers to others (the API refuses a binding to a role that it does not
/// know, and a pod without its account is tried again only after a while).
fn wave(object: &Object) -> u8 {
    match object.key.kind.kind {
        "Namespace" => 0,
        "ClusterRoleBinding"
        | "DaemonSet"
        | "Deployment"
        | "MutatingAdmissionPolicyBinding"
        | "ValidatingAdmissionPolicyBinding" => 2,
        _ => 1,
    }
}

/// Fingerprint of a body that was applied, and the version that the object then had.
type Applied = ([u8; 32], String);

/// Applies objects and remembers what it applied, so that a round in which nothing differs writes nothing.
pub struct Applier {
    client: Client,
    mode: Mode,
    applied: BTreeMap<Key, Applied>,
}

impl Applier {
    /// Nothing is remembered yet: the first round applies everything once.
    pub fn new(client: Client, mode: Mode) -> Self {
        Self { client, mode, applied: BTreeMap::new() }
    }

    fn api(&self, key: &Key) -> Api<DynamicObject> {
        let resource = key.kind.resource(self.mode);
        if key.namespace.is_empty() {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), &key.namespace, &resource)
        }
    }

    /// Applies every object, several at a time, in the order of [`wave`]. One that fails does not keep the others from being tried.
    pub async fn exec(&mut self, objects: &[Object], present: &BTreeMap<Key, Present>) -> Vec<Failure> {
        let mut failures = Vec::new();
        for turn in 0..WAVES {
            let due: Vec<(&Object, [u8; 32])> = objects
                .iter()
                .filter(|object| wave(object) == turn)
                .map(|object| (object, fingerprint(&object.body)))
                .filter(|(Object { key, .. }, print)| !is_settled(self.applied.get(key), print, present.get(key)))
                .collect();
            let outcomes: Vec<_> =
                stream::iter(&due).map(|(object, _)| self.apply(object)).buffered(AT_ONCE).collect().await;
            for ((object, print), outcome) in due.into_iter().zip(outcomes) {
                failures.extend(self.note(object, print, outcome));
            }
        }
        failures
    }

    fn note(&mut self, object: &Object, print: [u8; 32], outcome: Result<String, Error>) -> Option<Failure> {
        match outcome {
            Ok(version) => {
                info!(object = %object.key, "applied");
                self.applied.insert(object.key.clone(), (print, version));
                None
            }
            Err(error) => {
                warn!(object = %object.key, %error, "not applied");
                self.applied.remove(&object.key);
                Some(failure(object.key.clone(), &error))
            }
        }
    }

    /// Applies one object and returns its version (see [`version`]).
    pub async fn apply(&self, object: &Object) -> Result<String, Error> {
        if let Some(kind) = object.key.kind.stored(self.mode) {
            return self.merge(kind, object).await;
        }
        let params = PatchParams::apply(MANAGER).force();
        let api = self.api(&object.key);
        let patch = Patch::Apply(&object.body);
        let applied = bounded(api.patch(&object.key.name, &params, &patch)).await?;
        Ok(version(&applied))
    }

    /// Applies an object to the older storage: what is there is read, changed and written whole, unless it has changed meanwhile.
    async fn merge(&self, kind: &storage::Kind, object: &Object) -> Result<String, Error> {
        let (api, name) = (self.api(&object.key), &object.key.name);
        let present = bounded(api.get_opt(name)).await?;
        let wanted = stored::merge(kind, present.as_ref(), &object.body)?;
        let written = match (present, wanted) {
            (None, Some(wanted)) => bounded(api.create(&PostParams::default(), &wanted)).await?,
            (Some(_), Some(wanted)) => bounded(api.replace(name, &PostParams::default(), &wanted)).await?,
            (Some(present), None) => present,
            (None, None) => return Ok(String::new()),
        };
        Ok(version(&written))
    }

    /// Takes away what replicas of typha reported that are gone.
    pub async fn forget_reports(&self, keys: &[String]) -> Option<Failure> {
        let key = Key { kind: kind("ConfigMap"), namespace: NAMESPACE.to_owned(), name: CONFIG_MAP.to_owned() };
        let data: BTreeMap<&String, Value> = keys.iter().map(|key| (key, Value::Null)).collect();
        let patch = Patch::Merge(json!({ "data": data }));
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let written = bounded(self.api(&key).patch(CONFIG_MAP, &params, &patch)).await;
        written.err().map(|error| failure(key, &error))
    }

    /// Makes an object that must not exist yet.
    pub async fn create(&self, object: &Object) -> Result<(), Error> {
        let body = self.body(object)?;
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        bounded(self.api(&object.key).create(&params, &body)).await?;
        Ok(())
    }

    /// Makes, writes anew and deletes host endpoints of nodes.
    pub async fn exec_hosts(&mut self, plan: HostPlan) -> Vec<Failure> {
        let mut failures = Vec::new();
        for object in &plan.create {
            failures.extend(told("created", object, self.create(object).await));
        }
        for object in &plan.replace {
            failures.extend(told("replaced", object, self.replace(object).await));
        }
        failures.extend(self.sweep(plan.delete).await);
        failures.extend(self.sweep_departed(plan.departed).await);
        failures
    }

    /// Deletes what is of nodes that were not seen, once none of these is there when it is asked for. If one is, the list of nodes was short, and
    /// nothing that it lacks is believed to be gone.
    async fn sweep_departed(&mut self, departed: BTreeMap<String, Vec<(Key, DeleteParams)>>) -> Vec<Failure> {
        for (node, theirs) in &departed {
            match has_node(&self.client, node).await {
                Ok(false) => {}
                Ok(true) => {
                    warn!(
                        node,
                        "missing in the list of nodes, but there; no host endpoint is deleted for want of its node"
                    );
                    return Vec::new();
                }
                Err(error) => return theirs.iter().map(|(key, _)| failure(key.clone(), &error)).collect(),
            }
        }
        self.sweep(departed.into_values().flatten().collect()).await
    }

    /// The object in the form in which the cluster stores it.
    fn body(&self, object: &Object) -> Result<DynamicObject, Error> {
        match object.key.kind.stored(self.mode) {
            Some(kind) => stored::store(kind, object.body.clone()),
            None => serde_json::from_value(object.body.clone()).map_err(Error::SerdeError),
        }
    }

    /// Writes an object whole, in place of the version that its body names.
    async fn replace(&self, object: &Object) -> Result<(), Error> {
        let body = self.body(object)?;
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        bounded(self.api(&object.key).replace(&object.key.name, &params, &body)).await?;
        Ok(())
    }

    /// Applies to the status of an object.
    pub async fn apply_status(&self, object: &Object) -> Result<(), Error> {
        let params = PatchParams::apply(MANAGER).force();
        let api = self.api(&object.key);
        let patch = Patch::Apply(&object.body);
        bounded(api.patch_status(&object.key.name, &params, &patch)).await?;
        Ok(())
    }

    /// Applies to the status of objects.
    pub async fn exec_statuses(&self, objects: &[Object]) -> Vec<Failure> {
        let mut failures = Vec::new();
        for object in objects {
            failures.extend(told("judged", object, self.apply_status(object).await));
        }
        failures
    }

    /// Writes finalizers of pools. They are no part of what is applied, so that applying a pool leaves them alone; of a pool that has changed nothing is written.
    pub async fn exec_finalizers(&self, changes: &[Finalizers]) -> Vec<Failure> {
        let mut failures = Vec::new();
        for Finalizers { pool, version, finalizers } in changes {
            let patch = json!({ "metadata": { "resourceVersion": version, "finalizers": finalizers } });
            let object = Object::new("IPPool", json!({ "metadata": { "name": pool } }));
            let params = PatchParams { field_manager: Some(FINALIZER_MANAGER.to_owned()), ..PatchParams::default() };
            let written = bounded(self.api(&object.key).patch(pool, &params, &Patch::Merge(patch))).await;
            match written {
                // It went with its last finalizer, or has changed and is judged again.
                Err(Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                written => failures.extend(told("finalizers written", &object, written.map(drop))),
            }
        }
        failures
    }

    /// Writes defaults into the Installation. Without force: a field that a person sets meanwhile is that person's.
    pub async fn write_back(&self, owner: &Owner, spec: Value) -> Result<(), Error> {
        let object = Object::new("Installation", json!({ "metadata": { "name": owner.name }, "spec": spec }));
        let api = self.api(&object.key);
        let patch = Patch::Apply(&object.body);
        bounded(api.patch(&object.key.name, &PatchParams::apply(MANAGER), &patch)).await?;
        Ok(())
    }

    /// Deletes what is ours and no longer wanted.
    pub async fn sweep(&mut self, unwanted: Vec<(Key, DeleteParams)>) -> Vec<Failure> {
        let mut failures = Vec::new();
        for (key, mut params) in unwanted {
            if key.kind.stored(self.mode).is_some() {
                stored::unsee(&mut params);
            }
            match bounded(self.api(&key).delete(&key.name, &params)).await {
                Ok(_) => info!(object = %key, "deleted: no longer wanted"),
                Err(Error::Api(status)) if status.code == 404 => {}
                Err(error) => failures.push(failure(key.clone(), &error)),
            }
            self.applied.remove(&key);
        }
        failures
    }
}

fn told(verb: &str, object: &Object, outcome: Result<(), Error>) -> Option<Failure> {
    match outcome {
        Ok(()) => {
            info!(object = %object.key, "{verb}");
            None
        }
        Err(error) => {
            warn!(object = %object.key, %error, "not {verb}");
            Some(failure(object.key.clone(), &error))
        }
    }
}

/// What the sweep deletes: objects of owned kinds with our label that belong to this Installation and are neither wanted nor kept. What belonged to
/// one that is gone the API server's garbage collector takes.
pub fn unwanted(inputs: &Inputs, objects: &[Object], keep: &BTreeSet<Key>, owner: &Owner) -> Vec<(Key, DeleteParams)> {
    let wanted: BTreeSet<&Key> = objects.iter().map(|object| &object.key).collect();
    let ours = |key: &Key, present: &Present| {
        OWNED_KINDS.contains(key.kind) && !present.terminating && present.owner == owner.uid
    };
    inputs
        .present
        .iter()
        .filter(|(key, present)| ours(key, present) && !wanted.contains(key) && !keep.contains(key))
        .rev()
        .map(|(key, present)| (key.clone(), only(&present.uid)))
        .collect()
}

/// Whether an object is as it was left: same body as last applied, and not changed since.
fn is_settled(applied: Option<&Applied>, print: &[u8; 32], present: Option<&Present>) -> bool {
    match (applied, present) {
        (Some((before, version)), Some(present)) => {
            before == print && *version == present.version && !present.terminating
        }
        _ => false,
    }
}

fn fingerprint(body: &Value) -> [u8; 32] {
    Sha256::digest(body.to_string().as_bytes()).into()
}

/// Generation where the kind counts it, else the resource version.
pub fn version(object: &DynamicObject) -> String {
    match object.metadata.generation {
        Some(generation) => format!("generation {generation}"),
        None => object.metadata.resource_version.clone().unwrap_or_default(),
    }
}

/// Whether trying again can help: the server was busy, somebody else was faster, or it could not be reached.
pub fn is_transient(error: &Error) -> bool {
    match error {
        Error::Api(status) => matches!(status.code, 409 | 429 | 500..=599) || is_terminating(&status.message),
        Error::SerdeError(_) | Error::BuildRequest(_) => false,
        _ => true,
    }
}

/// The namespace is on its way out; it is made again when it is gone.
fn is_terminating(message: &str) -> bool {
    message.contains("because it is being terminated")
}

fn failure(key: Key, error: &Error) -> Failure {
    let transient = is_transient(error);
    let message = match error {
        Error::Api(status) if is_terminating(&status.message) => status.message.clone(),
        Error::Api(status) if status.code == 403 => format!(
            "{}; apply deploy/operator.yaml of this version again, it has the operator's permissions",
            status.message
        ),
        Error::Api(status) if status.code == 404 => format!(
            "{}; the API does not serve {} {}, apply deploy/operator.yaml of this version",
            status.message,
            key.kind.api_version(),
            key.kind.plural
        ),
        Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    };
    Failure { key, message, transient }
}

/// Deletes only the object that was seen, not a successor of its name.
fn only(uid: &str) -> DeleteParams {
    DeleteParams::background().preconditions(Preconditions { uid: Some(uid.to_owned()), resource_version: None })
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
