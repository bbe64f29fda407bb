//! Writes a pod's addresses into its annotations, where other nodes and tools read them. It is not
//! on the path of ADD: the address is claimed already.
//!
//! One task with a bounded number of patches in flight, at most one per pod; the newest patch of a
//! pod replaces older ones that wait.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use margay_api::endpoint::EndpointKey;
use margay_api::meta::{ANNOTATION_CONTAINER_ID, ANNOTATION_POD_IP, ANNOTATION_POD_IPS};
use margay_runtime::backoff::{Backoff, jitter};
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::attachment::Attachment;
use super::ports::Announcer;
use crate::requests::bounded;

/// Maximal number of patches in flight.
const MAX_IN_FLIGHT: usize = 8;
/// Longest delay before the first retry; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq)]
struct PodPatch {
    uid: String,
    annotations: Value,
    /// Not sent before.
    due: Instant,
    /// Delays before the next retries.
    retry: Backoff,
}

impl PodPatch {
    fn new(uid: &str, annotations: Value) -> Self {
        Self {
            uid: uid.to_owned(),
            annotations,
            due: Instant::now(),
            retry: Backoff::new(RETRY_MIN, RETRY_MAX),
        }
    }

    /// The same patch, to be retried after a failure.
    fn retry_later(mut self, now: Instant, jitter: f64) -> Self {
        self.due = now + self.retry.next(jitter);
        self
    }
}

/// Queue of annotation patches: the latest per pod, one in flight.
#[derive(Default)]
struct PatchQueue {
    patches: BTreeMap<EndpointKey, PodPatch>,
    /// Pods with a patch in flight. The next patch of the pod waits for it: two at once could
    /// arrive in either order.
    in_flight: BTreeSet<EndpointKey>,
}

impl PatchQueue {
    fn put(&mut self, endpoint: EndpointKey, patch: PodPatch) {
        self.patches.insert(endpoint, patch);
    }

    /// Dequeues a patch that can be sent now.
    fn next_ready(&mut self, now: Instant) -> Option<(EndpointKey, PodPatch)> {
        let mut patches = self.patches.iter();
        let is_ready = |(endpoint, patch): &(&EndpointKey, &PodPatch)| {
            patch.due <= now && !self.in_flight.contains(*endpoint)
        };
        let endpoint = patches.find(is_ready)?.0.clone();
        self.in_flight.insert(endpoint.clone());
        self.patches.remove_entry(&endpoint)
    }

    /// Handles the end of a patch: a failed one is queued again, unless a newer one is.
    fn complete(&mut self, endpoint: EndpointKey, failed: Option<PodPatch>) {
        self.in_flight.remove(&endpoint);
        if let Some(patch) = failed {
            self.patches.entry(endpoint).or_insert(patch);
        }
    }

    /// When the next patch is due that does not wait for one in flight.
    fn next_due(&self) -> Option<Instant> {
        let patches = self
            .patches
            .iter()
            .filter(|(endpoint, _)| !self.in_flight.contains(*endpoint));
        patches.map(|(_, patch)| patch.due).min()
    }
}

#[derive(Default)]
struct SharedQueue {
    queue: Mutex<PatchQueue>,
    changed: Notify,
}

impl SharedQueue {
    fn lock(&self) -> MutexGuard<'_, PatchQueue> {
        self.queue.lock()
    }

    fn put(&self, endpoint: EndpointKey, patch: PodPatch) {
        self.lock().put(endpoint, patch);
        self.changed.notify_one();
    }

    fn complete(&self, endpoint: EndpointKey, failed: Option<PodPatch>) {
        self.lock().complete(endpoint, failed);
        self.changed.notify_one();
    }

    /// Waits until a patch may be ready.
    async fn wait(&self) {
        let due = self.lock().next_due();
        match due {
            Some(due) => drop(tokio::time::timeout_at(due, self.changed.notified()).await),
            None => self.changed.notified().await,
        }
    }
}

/// Handle to the task that annotates pods.
pub struct Annotations {
    pending: Arc<SharedQueue>,
}

impl Annotations {
    /// Starts the task that sends patches.
    pub fn spawn(client: Client) -> Self {
        let pending = Arc::new(SharedQueue::default());
        tokio::spawn(run(client, pending.clone()));
        Self { pending }
    }
}

impl Announcer for Annotations {
    fn announce(&self, attachment: &Attachment) {
        let addresses: Vec<String> = attachment.addresses.iter().map(IpNet::to_string).collect();
        let annotations = json!({
            ANNOTATION_CONTAINER_ID: attachment.id.container,
            ANNOTATION_POD_IP: addresses.first(),
            ANNOTATION_POD_IPS: addresses.join(","),
        });
        self.pending.put(
            attachment.endpoint(),
            PodPatch::new(&attachment.uid, annotations),
        );
    }

    fn withdraw(&self, attachment: &Attachment) {
        let annotations = json!({ANNOTATION_POD_IP: "", ANNOTATION_POD_IPS: ""});
        self.pending.put(
            attachment.endpoint(),
            PodPatch::new(&attachment.uid, annotations),
        );
    }
}

async fn run(client: Client, pending: Arc<SharedQueue>) {
    let places = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let taken = pending.lock().next_ready(Instant::now());
        let Some((endpoint, patch)) = taken else {
            drop(place);
            pending.wait().await;
            continue;
        };
        let (client, pending) = (client.clone(), pending.clone());
        tokio::spawn(async move {
            let failed = patch_pod(client, &endpoint, &patch).await.err();
            drop(place);
            let failed = failed.map(|error| {
                tracing::debug!(
                    pod = %endpoint,
                    %error,
                    "the pod could not be annotated; trying again",
                );
                patch.retry_later(Instant::now(), jitter())
            });
            pending.complete(endpoint, failed);
        });
    }
}

/// Patches the pod's annotations through the status subresource, as Calico's plugin does, so that a
/// node needs no right to change a pod's spec. A pod that is gone, or another one of the same name
/// (the UID is a precondition), needs no annotation.
async fn patch_pod(
    client: Client,
    endpoint: &EndpointKey,
    patch: &PodPatch,
) -> Result<(), kube::Error> {
    let mut metadata = json!({"annotations": patch.annotations});
    if !patch.uid.is_empty() {
        metadata["uid"] = json!(patch.uid);
    }
    let pods: Api<Pod> = Api::namespaced(client, &endpoint.namespace);
    let patch = Patch::Strategic(json!({"metadata": metadata}));
    match bounded(pods.patch_status(&endpoint.name, &PatchParams::default(), &patch)).await {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => Ok(()),
        result => result.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> EndpointKey {
        EndpointKey::new("x", "a")
    }

    fn patch(text: &str) -> PodPatch {
        PodPatch::new("u", json!(text))
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_has_one_patch_under_way_and_the_latest_is_sent_last() {
        let (mut queue, now) = (PatchQueue::default(), Instant::now());
        queue.put(pod(), patch("old"));
        let old = queue.next_ready(now).expect("a patch");
        assert_eq!(old, (pod(), patch("old")));
        queue.put(pod(), patch("new"));
        assert_eq!(
            (queue.next_ready(now), queue.next_due()),
            (None, None),
            "the old one is under way"
        );
        queue.put(EndpointKey::new("x", "b"), patch("other"));
        assert_eq!(
            queue.next_ready(now),
            Some((EndpointKey::new("x", "b"), patch("other")))
        );
        queue.complete(pod(), Some(old.1.retry_later(now, 1.0)));
        assert_eq!(
            queue.next_ready(now),
            Some((pod(), patch("new"))),
            "the old one has failed and is dropped"
        );
        queue.complete(pod(), None);
        assert_eq!(
            (queue.next_ready(now + RETRY_MAX), queue.next_due()),
            (None, None),
            "nothing is sent again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_patch_is_retried_later_and_a_newer_one_is_sent_at_once() {
        let (mut queue, now) = (PatchQueue::default(), Instant::now());
        queue.put(pod(), patch("old"));
        let (_, old) = queue.next_ready(now).expect("a patch");
        queue.complete(pod(), Some(old.retry_later(now, 1.0)));
        assert_eq!(
            (queue.next_ready(now), queue.next_due()),
            (None, Some(now + RETRY_MIN))
        );
        let (_, old) = queue.next_ready(now + RETRY_MIN).expect("it is due");
        assert_eq!(old.annotations, json!("old"));
        let old = old.retry_later(now, 1.0);
        assert_eq!(old.due, now + RETRY_MIN * 2, "the delay doubles");
        queue.complete(pod(), Some(old));
        queue.put(pod(), patch("new"));
        assert_eq!(queue.next_ready(now), Some((pod(), patch("new"))));
    }
}
