//! Model of the API server's storage: objects with resource versions, the log that watches read,
//! and every state that has ever been.

use std::collections::BTreeMap;
use std::sync::Arc;

use margay_api::meta::NamespacedName;
use margay_calc::kinds;
use margay_calc::update::Update;
use margay_typha::kinds::{KINDS, KindSpec};
use margay_typha::object::POD;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Notify;

/// Name of an object.
pub type Key = NamespacedName;

/// Simulated kinds: name in typha's table, API version, kind, path.
pub const TABLE: [(&str, &str, &str, &str); 10] = [
    (POD, "v1", "Pod", "/api/v1/pods"),
    ("Namespace", "v1", "Namespace", "/api/v1/namespaces"),
    ("Node", "v1", "Node", "/api/v1/nodes"),
    (
        "KubernetesNetworkPolicy",
        "networking.k8s.io/v1",
        "NetworkPolicy",
        "/apis/networking.k8s.io/v1/networkpolicies",
    ),
    (
        "NetworkPolicy",
        "projectcalico.org/v3",
        "NetworkPolicy",
        "/apis/projectcalico.org/v3/networkpolicies",
    ),
    (
        "GlobalNetworkPolicy",
        "projectcalico.org/v3",
        "GlobalNetworkPolicy",
        "/apis/projectcalico.org/v3/globalnetworkpolicies",
    ),
    (
        "Tier",
        "projectcalico.org/v3",
        "Tier",
        "/apis/projectcalico.org/v3/tiers",
    ),
    (
        "GlobalNetworkSet",
        "projectcalico.org/v3",
        "GlobalNetworkSet",
        "/apis/projectcalico.org/v3/globalnetworksets",
    ),
    (
        "IPPool",
        "projectcalico.org/v3",
        "IPPool",
        "/apis/projectcalico.org/v3/ippools",
    ),
    (
        "IPAMBlock",
        "projectcalico.org/v3",
        "IPAMBlock",
        "/apis/projectcalico.org/v3/ipamblocks",
    ),
];

/// The watched kinds that are simulated.
pub fn kinds() -> impl Iterator<Item = &'static KindSpec> {
    KINDS
        .iter()
        .filter(|spec| TABLE.iter().any(|line| line.0 == spec.name))
}

/// One event of a kind's watch.
pub struct Entry {
    /// Version after it.
    pub version: u64,
    /// The event as a line of a watch.
    pub line: Arc<str>,
}

/// Objects of a kind at some version, as JSON.
pub type Objects = BTreeMap<Key, Arc<str>>;

/// One kind.
#[derive(Default)]
pub struct KindState {
    /// Current objects.
    pub objects: Objects,
    /// All events.
    pub log: Vec<Entry>,
    /// Every state, with the version since which it has been.
    pub past: Vec<(u64, Objects)>,
    /// Values that each object has had, in order; `None`: absent or irrelevant.
    pub values: BTreeMap<Key, Vec<Option<Update>>>,
}

/// Contents of the storage.
pub struct Contents {
    /// Version of the last write.
    pub version: u64,
    /// Watches cannot resume from versions before this one.
    pub compacted: u64,
    /// The kinds by their name in typha's table.
    pub kinds: BTreeMap<&'static str, KindState>,
}

/// The storage; cheap to clone.
#[derive(Clone)]
pub struct Api {
    contents: Arc<Mutex<Contents>>,
    /// Notified by every write.
    pub changed: Arc<Notify>,
}

impl Default for Api {
    fn default() -> Self {
        let first = |line: &(&'static str, &str, &str, &str)| {
            (
                line.0,
                KindState {
                    past: vec![(0, Objects::new())],
                    ..KindState::default()
                },
            )
        };
        let kinds = TABLE.iter().map(first).collect();
        // Versions of a real API server are never small.
        let contents = Contents {
            version: 1000,
            compacted: 0,
            kinds,
        };
        Self {
            contents: Arc::new(Mutex::new(contents)),
            changed: Arc::default(),
        }
    }
}

impl Api {
    /// Reads or changes the contents.
    pub fn with<T>(&self, work: impl FnOnce(&mut Contents) -> T) -> T {
        work(&mut self.contents.lock())
    }

    /// Writes an object, or deletes it. Deleting what is not there does nothing.
    pub fn write(&self, kind: &'static str, key: &Key, object: Option<Value>) {
        self.with(|contents| contents.write(kind, key, object));
        self.changed.notify_waiters();
    }
}

impl Contents {
    /// Objects of a kind.
    pub fn objects(&self, kind: &str) -> &Objects {
        &self.kinds[kind].objects
    }

    fn write(&mut self, kind: &'static str, key: &Key, object: Option<Value>) {
        let version = self.version + 1;
        let Some(state) = self.kinds.get_mut(kind) else {
            return;
        };
        let is_known = state.objects.contains_key(key);
        let (event, text) = match object {
            Some(object) => {
                let text = complete(kind, key, object, version).to_string();
                (if is_known { "MODIFIED" } else { "ADDED" }, text)
            }
            None => match state.objects.get(key) {
                Some(last) => ("DELETED", with_version(last, version)),
                None => return,
            },
        };
        self.version = version;
        let line = format!("{{\"type\":\"{event}\",\"object\":{text}}}\n");
        state.log.push(Entry {
            version,
            line: line.into(),
        });
        let value = if event == "DELETED" {
            None
        } else {
            ingest(kind, &text)
        };
        state
            .values
            .entry(key.clone())
            .or_insert_with(|| vec![None])
            .push(value);
        match event {
            "DELETED" => drop(state.objects.remove(key)),
            _ => drop(state.objects.insert(key.clone(), text.into())),
        }
        state.past.push((version, state.objects.clone()));
    }
}

/// The object with what the API server adds.
fn complete(kind: &str, key: &Key, mut object: Value, version: u64) -> Value {
    let line = TABLE
        .iter()
        .find(|line| line.0 == kind)
        .expect("a simulated kind");
    object["apiVersion"] = json!(line.1);
    object["kind"] = json!(line.2);
    object["metadata"]["name"] = json!(key.name);
    if !key.namespace.is_empty() {
        object["metadata"]["namespace"] = json!(key.namespace);
    }
    object["metadata"]["resourceVersion"] = json!(version.to_string());
    object
}

fn with_version(text: &str, version: u64) -> String {
    let mut object: Value = serde_json::from_str(text).expect("an object of ours");
    object["metadata"]["resourceVersion"] = json!(version.to_string());
    object.to_string()
}

/// What typha makes of an object.
pub fn ingest(kind: &str, text: &str) -> Option<Update> {
    let object: Value = serde_json::from_str(text).expect("an object of ours");
    let ingested = kinds::ingest(kind, object).expect("a kind of typha");
    let ingested = ingested.expect("an object of its kind");
    assert!(
        ingested.problems.is_empty(),
        "{text}: {:?}",
        ingested.problems
    );
    ingested.update
}
