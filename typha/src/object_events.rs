//! Kubernetes Events on objects that are not enforced as written, so that `kubectl describe` shows
//! the reason.
//!
//! The name of an Event is derived from object and problem, so replicas and restarts do not repeat
//! it. Events are written one at a time with at least `PAUSE` between them. Of one object only
//! the latest waits. With too many objects waiting further ones are dropped; the status still has
//! their problems.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use margay_api::report::cut;
use margay_api::storage::Mode;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::debug;

use crate::kinds::KINDS;
use crate::object::ObjectKey;

/// Maximal number of objects with a waiting Event.
const MAX_WAITING: usize = 256;
/// Minimal time between two Events.
const PAUSE: Duration = Duration::from_millis(200);
/// Timeout of the API server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximal length of an Event's note, in bytes (Kubernetes validation).
const MAX_NOTE: usize = 1024;
/// Namespace of Events on cluster-scoped objects.
const CLUSTER_NAMESPACE: &str = "default";
/// Value of reportingController.
const CONTROLLER: &str = "margay.io/typha";
/// Maximal length of an object's name as prefix of an Event's name, which must remain a valid name.
const MAX_NAME: usize = 200;

/// Problems of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectWarning {
    kind: &'static str,
    key: ObjectKey,
    uid: String,
    note: String,
}

impl ObjectWarning {
    /// Creates a warning, cutting the problems to the length of an Event's note.
    pub fn new(kind: &'static str, key: &ObjectKey, uid: &str, problems: &[String]) -> Self {
        Self {
            kind,
            key: key.clone(),
            uid: uid.to_owned(),
            note: cut(&problems.join("; "), MAX_NOTE),
        }
    }

    /// The Event as `instance` writes it at that time.
    fn event(&self, mode: Mode, instance: &str, now: Timestamp) -> Option<Event> {
        let Self {
            kind,
            key,
            uid,
            note,
        } = self;
        let (api_version, api_kind) = KINDS.iter().find(|spec| spec.name == *kind)?.identity(mode);
        let mut hasher = DefaultHasher::new();
        (kind, uid, note).hash(&mut hasher);
        let begin = if key.name.len() <= MAX_NAME {
            &key.name
        } else {
            "object"
        };
        let namespace = if key.namespace.is_empty() {
            CLUSTER_NAMESPACE
        } else {
            &key.namespace
        };
        Some(Event {
            metadata: ObjectMeta {
                name: Some(format!("{begin}.{:016x}", hasher.finish())),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(now)),
            type_: Some("Warning".to_owned()),
            reason: Some("NotEnforcedAsWritten".to_owned()),
            action: Some("Read".to_owned()),
            note: Some(note.clone()),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(cut(instance, 128)),
            regarding: Some(ObjectReference {
                api_version: Some(api_version),
                kind: Some(api_kind.to_owned()),
                name: Some(key.name.clone()),
                namespace: (!key.namespace.is_empty()).then(|| key.namespace.clone()),
                uid: (!uid.is_empty()).then(|| uid.clone()),
                ..ObjectReference::default()
            }),
            ..Event::default()
        })
    }
}

/// Queue of warnings; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct WarningQueue(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    waiting: Mutex<BTreeMap<(&'static str, ObjectKey), ObjectWarning>>,
    available: Notify,
}

impl WarningQueue {
    /// Adds a warning, replacing a waiting one about the same object. Dropped if the queue is full.
    pub fn push(&self, warning: ObjectWarning) {
        let mut waiting = self.0.waiting.lock();
        let key = (warning.kind, warning.key.clone());
        if waiting.len() < MAX_WAITING || waiting.contains_key(&key) {
            waiting.insert(key, warning);
            self.0.available.notify_one();
        }
    }

    /// Waits for the first warning and removes it.
    pub async fn pop(&self) -> ObjectWarning {
        loop {
            // One notification may stand for several warnings, so the queue decides.
            let first = self.0.waiting.lock().pop_first();
            match first {
                Some((_, warning)) => return warning,
                None => self.0.available.notified().await,
            }
        }
    }
}

/// Writes Events forever. An Event that cannot be written is dropped.
pub async fn run(client: kube::Client, mode: Mode, instance: String, warnings: WarningQueue) {
    loop {
        let warning = warnings.pop().await;
        if let Some(event) = warning.event(mode, &instance, Timestamp::now()) {
            let namespace = event.metadata.namespace.clone().unwrap_or_default();
            let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
            match timeout(REQUEST_TIMEOUT, api.create(&PostParams::default(), &event)).await {
                Ok(Ok(_)) => {}
                // Written by another replica, or by this one before a restart.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {}
                Ok(Err(error)) => debug!(object = %warning.key, %error, "event not written"),
                Err(_) => debug!(object = %warning.key, "event not written: no answer"),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk(name: &str, problem: &str) -> ObjectWarning {
        ObjectWarning::new(
            "NetworkPolicy",
            &ObjectKey::new("ns", name),
            "u",
            &[problem.to_owned()],
        )
    }

    #[test]
    fn an_event_regards_one_object_and_has_the_same_name_for_every_replica() {
        let now = Timestamp::UNIX_EPOCH;
        let event = |warning: &ObjectWarning, instance: &str| {
            warning
                .event(Mode::V3, instance, now)
                .expect("a kind of the table")
        };
        let (one, other) = (event(&mk("p", "x"), "a"), event(&mk("p", "x"), "b"));
        assert_eq!(one.metadata, other.metadata);
        assert_ne!(
            one.metadata.name,
            event(&mk("p", "y"), "a").metadata.name,
            "for another problem"
        );
        let regarding = one.regarding.expect("an object");
        assert_eq!(
            regarding.api_version.as_deref(),
            Some("projectcalico.org/v3")
        );
        assert_eq!(
            (regarding.kind.as_deref(), regarding.uid.as_deref()),
            (Some("NetworkPolicy"), Some("u"))
        );
        let global = ObjectWarning::new(
            "GlobalNetworkPolicy",
            &ObjectKey::new("", "g"),
            "",
            &["x".repeat(9999)],
        );
        let event = event(&global, &"i".repeat(999));
        assert_eq!(event.metadata.namespace.as_deref(), Some(CLUSTER_NAMESPACE));
        assert!(event.note.is_some_and(|note| note.len() <= MAX_NOTE));
    }

    #[tokio::test]
    async fn the_latest_of_an_object_waits_and_with_too_many_objects_some_are_dropped() {
        let warnings = WarningQueue::default();
        warnings.push(mk("0", "old"));
        warnings.push(mk("0", "new"));
        (1..5000).for_each(|number| warnings.push(mk(&number.to_string(), "x")));
        assert_eq!(warnings.pop().await, mk("0", "new"));
        for _ in 1..MAX_WAITING {
            warnings.pop().await;
        }
        assert!(
            futures::FutureExt::now_or_never(warnings.pop()).is_none(),
            "no more than these wait"
        );
    }
}
