//! Events on objects that are not used as they are written, so that whoever wrote one sees why where he looks first.
//!
//! An event is written once for what is wrong with an object: its name is made of that, so that replicas and restarts do not repeat it. They are
//! written one after the other and not faster than [`PAUSE`]; of an object the newest waits, and of very many objects some are left out, which
//! are in the status all the same.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use margay_api::report::cut;
use margay_api::storage::Mode;
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::debug;

use crate::cache::ObjectKey;
use crate::kinds::TABLE;

/// Objects whose events wait.
const WAITING: usize = 256;
/// Between two events.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest time for the API server's answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Bytes of an event's note: Kubernetes' limit.
const NOTE: usize = 1024;
/// Where events of objects are that are in no namespace.
const NOWHERE: &str = "default";
/// Who tells.
const CONTROLLER: &str = "margay.io/typha";
/// The longest name of an object that an event's name begins with, so that the whole is a name.
const NAME: usize = 200;

/// What is wrong with one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    kind: &'static str,
    key: ObjectKey,
    uid: String,
    note: String,
}

impl Notice {
    /// These problems of that object, as much of them as an event holds.
    pub fn new(kind: &'static str, key: &ObjectKey, uid: &str, problems: &[String]) -> Self {
        Self { kind, key: key.clone(), uid: uid.to_owned(), note: cut(&problems.join("; "), NOTE) }
    }

    /// The event as `instance` writes it at that time.
    fn event(&self, mode: Mode, instance: &str, now: Timestamp) -> Option<Event> {
        let Self { kind, key, uid, note } = self;
        let (api_version, api_kind) = TABLE.iter().find(|line| line.kind == *kind)?.identity(mode);
        let mut hasher = DefaultHasher::new();
        (kind, uid, note).hash(&mut hasher);
        let begin = if key.name.len() <= NAME { &key.name } else { "object" };
        let namespace = if key.namespace.is_empty() { NOWHERE } else { &key.namespace };
        Some(Event {
            metadata: ObjectMeta {
                name: Some(format!("{begin}.{:016x}", hasher.finish())),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            event_time: Some(MicroTime(now)),
            type_: Some("Warning".to_owned()),
            reason: Some("NotUsedAsWritten".to_owned()),
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

/// Notices that wait to be written; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Notices(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    waiting: Mutex<BTreeMap<(&'static str, ObjectKey), Notice>>,
    bell: Notify,
}

impl Notices {
    /// The notice replaces one that waits about the same object. While too many wait it is left out.
    pub fn put(&self, notice: Notice) {
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (notice.kind, notice.key.clone());
        if waiting.len() < WAITING || waiting.contains_key(&key) {
            waiting.insert(key, notice);
            self.0.bell.notify_one();
        }
    }

    /// The first of those that wait, once there is one.
    pub async fn take(&self) -> Notice {
        loop {
            let first = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_first();
            match first {
                Some((_, notice)) => return notice,
                None => self.0.bell.notified().await,
            }
        }
    }
}

/// Writes events for ever. What cannot be written is left out.
pub async fn run(client: kube::Client, mode: Mode, instance: String, notices: Notices) {
    loop {
        let notice = notices.take().await;
        if let Some(event) = notice.event(mode, &instance, Timestamp::now()) {
            let namespace = event.metadata.namespace.clone().unwrap_or_default();
            let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
            match timeout(ANSWER, api.create(&PostParams::default(), &event)).await {
                Ok(Ok(_)) => {}
                // Another replica was faster, or this one said it before it was started anew.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {}
                Ok(Err(error)) => debug!(object = %notice.key, %error, "event not written"),
                Err(_) => debug!(object = %notice.key, "event not written: no answer"),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk(name: &str, problem: &str) -> Notice {
        Notice::new("NetworkPolicy", &ObjectKey::new("ns", name), "u", &[problem.to_owned()])
    }

    #[test]
    fn an_event_is_about_one_object_and_is_the_same_for_every_replica() {
        let now = Timestamp::UNIX_EPOCH;
        let event =
            |notice: &Notice, instance: &str| notice.event(Mode::V3, instance, now).expect("a kind of the table");
        let (one, other) = (event(&mk("p", "x"), "a"), event(&mk("p", "x"), "b"));
        assert_eq!(one.metadata, other.metadata);
        assert_ne!(one.metadata.name, event(&mk("p", "y"), "a").metadata.name, "for another problem");
        let regarding = one.regarding.expect("an object");
        assert_eq!(regarding.api_version.as_deref(), Some("projectcalico.org/v3"));
        assert_eq!((regarding.kind.as_deref(), regarding.uid.as_deref()), (Some("NetworkPolicy"), Some("u")));
        let global = Notice::new("GlobalNetworkPolicy", &ObjectKey::new("", "g"), "", &["x".repeat(9999)]);
        let event = event(&global, &"i".repeat(999));
        assert_eq!(event.metadata.namespace.as_deref(), Some(NOWHERE));
        assert!(event.note.is_some_and(|note| note.len() <= NOTE));
    }

    #[tokio::test]
    async fn the_newest_of_an_object_waits_and_of_very_many_objects_some_are_left_out() {
        let notices = Notices::default();
        notices.put(mk("0", "old"));
        notices.put(mk("0", "new"));
        (1..5000).for_each(|number| notices.put(mk(&number.to_string(), "x")));
        assert_eq!(notices.take().await, mk("0", "new"));
        for _ in 1..WAITING {
            notices.take().await;
        }
        assert!(futures::FutureExt::now_or_never(notices.take()).is_none(), "no more than these wait");
    }
}
