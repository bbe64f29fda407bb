//! Writes wanted objects: server-side apply with one field manager (read and replace in the older
//! storage, where metadata is one text), and a sweep of owned objects that are no longer wanted.
//! All writes of a reconcile are here.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, stream};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, Error};
use margay_api::report::CONFIG_MAP;
use margay_api::storage::{self, Mode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tracing::{info, warn};

use crate::advice::{Failure, failure};
use crate::client::{bounded, has_node};
use crate::hosts::HostPlan;
use crate::inputs::{Inputs, Present};
use crate::manifest::{Key, MANAGER, OWNED_KINDS, Object, Owner, kind, version_of};
use crate::names::NAMESPACE;
use crate::pool_finalizer::FinalizerChange;
use crate::storage_v1;

/// Field manager of finalizers, other than the one that applies objects.
const FINALIZER_MANAGER: &str = "margay-operator-finalizers";

/// Number of objects that are written concurrently.
const CONCURRENT_WRITES: usize = 8;
/// Number of waves.
const WAVES: u8 = 3;

/// Returns the wave of an object: first namespaces, last objects that refer to others (the API
/// refuses a binding to an unknown role, and a pod without its service account is retried only
/// after a while).
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

/// Fingerprint of an applied body, and the version that the object had afterwards.
type Applied = ([u8; 32], String);

/// Applies objects and remembers them, so that a reconcile without changes writes nothing.
pub struct Applier {
    client: Client,
    mode: Mode,
    applied: BTreeMap<Key, Applied>,
}

impl Applier {
    /// Creates an applier that remembers nothing: the first reconcile applies everything once.
    pub fn new(client: Client, mode: Mode) -> Self {
        Self {
            client,
            mode,
            applied: BTreeMap::new(),
        }
    }

    fn api(&self, key: &Key) -> Api<DynamicObject> {
        let resource = key.kind.resource(self.mode);
        if key.namespace.is_empty() {
            Api::all_with(self.client.clone(), &resource)
        } else {
            Api::namespaced_with(self.client.clone(), &key.namespace, &resource)
        }
    }

    /// Applies every object, several concurrently, in the order of `wave`. A failure does not
    /// prevent the others.
    pub async fn exec(
        &mut self,
        objects: &[Object],
        present: &BTreeMap<Key, Present>,
    ) -> Vec<Failure> {
        let mut failures = Vec::new();
        for turn in 0..WAVES {
            let due: Vec<(&Object, [u8; 32])> = objects
                .iter()
                .filter(|object| wave(object) == turn)
                .map(|object| (object, fingerprint(&object.body)))
                .filter(|(Object { key, .. }, print)| {
                    !is_up_to_date(self.applied.get(key), print, present.get(key))
                })
                .collect();
            let outcomes: Vec<_> = stream::iter(&due)
                .map(|(object, _)| self.apply(object))
                .buffered(CONCURRENT_WRITES)
                .collect()
                .await;
            for ((object, print), outcome) in due.into_iter().zip(outcomes) {
                failures.extend(self.record(object, print, outcome));
            }
        }
        failures
    }

    fn record(
        &mut self,
        object: &Object,
        print: [u8; 32],
        outcome: Result<String, Error>,
    ) -> Option<Failure> {
        match outcome {
            Ok(version) => {
                info!(object = %object.key, "applied");
                self.applied.insert(object.key.clone(), (print, version));
                None
            }
            Err(error) => {
                warn!(object = %object.key, %error, "apply failed");
                self.applied.remove(&object.key);
                Some(failure(object.key.clone(), &error))
            }
        }
    }

    /// Applies one object and returns its version (see [`version_of`]).
    pub async fn apply(&self, object: &Object) -> Result<String, Error> {
        if let Some(kind) = object.key.kind.stored(self.mode) {
            return self.merge(kind, object).await;
        }
        let params = PatchParams::apply(MANAGER).force();
        let api = self.api(&object.key);
        let patch = Patch::Apply(&object.body);
        let applied = bounded(api.patch(&object.key.name, &params, &patch)).await?;
        Ok(version_of(&applied))
    }

    /// Applies an object to the older storage: the present object is read, changed and written
    /// whole, unless it has changed meanwhile.
    async fn merge(&self, kind: &storage::Kind, object: &Object) -> Result<String, Error> {
        let (api, name) = (self.api(&object.key), &object.key.name);
        let present = bounded(api.get_opt(name)).await?;
        let wanted = storage_v1::merge(kind, present.as_ref(), &object.body)?;
        let written = match (present, wanted) {
            (None, Some(wanted)) => bounded(api.create(&PostParams::default(), &wanted)).await?,
            (Some(_), Some(wanted)) => {
                bounded(api.replace(name, &PostParams::default(), &wanted)).await?
            }
            (Some(present), None) => present,
            (None, None) => return Ok(String::new()),
        };
        Ok(version_of(&written))
    }

    /// Deletes the reports of replicas of typha that are gone.
    pub async fn delete_reports(&self, keys: &[String]) -> Option<Failure> {
        let key = Key {
            kind: kind("ConfigMap"),
            namespace: NAMESPACE.to_owned(),
            name: CONFIG_MAP.to_owned(),
        };
        let data: BTreeMap<&String, Value> = keys.iter().map(|key| (key, Value::Null)).collect();
        let patch = Patch::Merge(json!({ "data": data }));
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let written = bounded(self.api(&key).patch(CONFIG_MAP, &params, &patch)).await;
        written.err().map(|error| failure(key, &error))
    }

    /// Creates an object that must not exist yet.
    pub async fn create(&self, object: &Object) -> Result<(), Error> {
        let body = self.body(object)?;
        let params = PostParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PostParams::default()
        };
        bounded(self.api(&object.key).create(&params, &body)).await?;
        Ok(())
    }

    /// Creates, replaces and deletes automatic host endpoints.
    pub async fn exec_hosts(&mut self, plan: HostPlan) -> Vec<Failure> {
        let mut failures = Vec::new();
        for object in &plan.create {
            failures.extend(log_outcome("create", object, self.create(object).await));
        }
        for object in &plan.replace {
            failures.extend(log_outcome("replace", object, self.replace(object).await));
        }
        failures.extend(self.sweep(plan.delete).await);
        failures.extend(self.sweep_of_absent_nodes(plan.of_absent_nodes).await);
        failures
    }

    /// Deletes the host endpoints of nodes that the list lacks, once a read by name confirms that
    /// each of them is gone. If one exists, the list was incomplete, and no node is considered
    /// gone.
    async fn sweep_of_absent_nodes(
        &mut self,
        hosts: BTreeMap<String, Vec<(Key, DeleteParams)>>,
    ) -> Vec<Failure> {
        for (node, theirs) in &hosts {
            match has_node(&self.client, node).await {
                Ok(false) => {}
                Ok(true) => {
                    warn!(
                        node,
                        "node exists but was missing in the list of nodes; no host endpoints of \
                         absent nodes are deleted"
                    );
                    return Vec::new();
                }
                Err(error) => {
                    return theirs
                        .iter()
                        .map(|(key, _)| failure(key.clone(), &error))
                        .collect();
                }
            }
        }
        self.sweep(hosts.into_values().flatten().collect()).await
    }

    /// Returns the object in the form in which the cluster stores it.
    fn body(&self, object: &Object) -> Result<DynamicObject, Error> {
        match object.key.kind.stored(self.mode) {
            Some(kind) => storage_v1::to_storage(kind, object.body.clone()),
            None => serde_json::from_value(object.body.clone()).map_err(Error::SerdeError),
        }
    }

    /// Replaces an object at the version that its body has.
    async fn replace(&self, object: &Object) -> Result<(), Error> {
        let body = self.body(object)?;
        let params = PostParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PostParams::default()
        };
        bounded(
            self.api(&object.key)
                .replace(&object.key.name, &params, &body),
        )
        .await?;
        Ok(())
    }

    /// Applies the status of an object.
    pub async fn apply_status(&self, object: &Object) -> Result<(), Error> {
        let params = PatchParams::apply(MANAGER).force();
        let api = self.api(&object.key);
        let patch = Patch::Apply(&object.body);
        bounded(api.patch_status(&object.key.name, &params, &patch)).await?;
        Ok(())
    }

    /// Applies the status of several objects.
    pub async fn exec_statuses(&self, objects: &[Object]) -> Vec<Failure> {
        let mut failures = Vec::new();
        for object in objects {
            failures.extend(log_outcome(
                "status update",
                object,
                self.apply_status(object).await,
            ));
        }
        failures
    }

    /// Writes finalizers of pools. They are not part of the applied object, so that applying a pool
    /// leaves them alone. A pool that has changed since the reconcile began is left alone.
    pub async fn exec_finalizers(&self, changes: &[FinalizerChange]) -> Vec<Failure> {
        let mut failures = Vec::new();
        for FinalizerChange {
            pool,
            version,
            finalizers,
        } in changes
        {
            let patch =
                json!({ "metadata": { "resourceVersion": version, "finalizers": finalizers } });
            let object = Object::new("IPPool", json!({ "metadata": { "name": pool } }));
            let params = PatchParams {
                field_manager: Some(FINALIZER_MANAGER.to_owned()),
                ..PatchParams::default()
            };
            let written = bounded(
                self.api(&object.key)
                    .patch(pool, &params, &Patch::Merge(patch)),
            )
            .await;
            match written {
                // The pool is gone with its last finalizer, or has changed: the watch triggers the
                // next reconcile.
                Err(Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                written => {
                    failures.extend(log_outcome("finalizer update", &object, written.map(drop)))
                }
            }
        }
        failures
    }

    /// Writes defaults into the Installation. Not forced: a field that a person sets meanwhile
    /// stays that person's.
    pub async fn write_back(&self, owner: &Owner, spec: Value) -> Result<(), Error> {
        let object = Object::new(
            "Installation",
            json!({ "metadata": { "name": owner.name }, "spec": spec }),
        );
        let api = self.api(&object.key);
        let patch = Patch::Apply(&object.body);
        bounded(api.patch(&object.key.name, &PatchParams::apply(MANAGER), &patch)).await?;
        Ok(())
    }

    /// Deletes owned objects that are no longer wanted.
    pub async fn sweep(&mut self, unwanted: Vec<(Key, DeleteParams)>) -> Vec<Failure> {
        let mut failures = Vec::new();
        for (key, mut params) in unwanted {
            if key.kind.stored(self.mode).is_some() {
                storage_v1::uid_to_storage(&mut params);
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

fn log_outcome(action: &str, object: &Object, outcome: Result<(), Error>) -> Option<Failure> {
    match outcome {
        Ok(()) => {
            info!(object = %object.key, "{action} done");
            None
        }
        Err(error) => {
            warn!(object = %object.key, %error, "{action} failed");
            Some(failure(object.key.clone(), &error))
        }
    }
}

/// Returns the objects to sweep: those of owned kinds with our label that belong to this
/// Installation and are neither wanted nor kept. Objects of a deleted Installation are left to the
/// API server's garbage collector.
pub fn unwanted(
    inputs: &Inputs,
    objects: &[Object],
    keep: &BTreeSet<Key>,
    owner: &Owner,
) -> Vec<(Key, DeleteParams)> {
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

/// Returns true when an object is up to date: the body was applied already, and the object has not
/// changed since.
fn is_up_to_date(applied: Option<&Applied>, print: &[u8; 32], present: Option<&Present>) -> bool {
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

/// Restricts the deletion to the object that was read, not a successor of its name.
fn only(uid: &str) -> DeleteParams {
    DeleteParams::background().preconditions(Preconditions {
        uid: Some(uid.to_owned()),
        resource_version: None,
    })
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
