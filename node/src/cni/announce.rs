//! Writes a pod's addresses into its annotations, where other nodes and tools read them. It is not
//! on the path of ADD: the address is claimed already.
//!
//! One task with a bounded number of patches in flight, at most one per pod; the newest patch of a
//! pod replaces older ones that wait.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use margay_api::endpoint::EndpointKey;
use margay_api::meta::{ANNOTATION_CONTAINER_ID, ANNOTATION_POD_IP, ANNOTATION_POD_IPS};
use serde_json::{Value, json};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::attachment::Attachment;
use super::ports::Announcer;
use crate::requests::bounded;

/// Maximal number of patches in flight.
const AT_ONCE: usize = 8;
/// Delay before the first retry; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq)]
struct Word {
    uid: String,
    annotations: Value,
    /// Not sent before.
    due: Instant,
    /// Delay before the next retry.
    delay: Duration,
}

impl Word {
    fn new(uid: &str, annotations: Value) -> Self {
        Self { uid: uid.to_owned(), annotations, due: Instant::now(), delay: RETRY_MIN }
    }

    /// The same patch, to be retried after a failure.
    fn later(self, now: Instant) -> Self {
        Self { due: now + self.delay, delay: (self.delay * 2).min(RETRY_MAX), ..self }
    }
}

/// Queue of annotation patches: the latest per pod, one in flight.
#[derive(Default)]
struct Book {
    words: BTreeMap<EndpointKey, Word>,
    /// Pods with a patch in flight. The next patch of the pod waits for it: two at once could
    /// arrive in either order.
    under_way: BTreeSet<EndpointKey>,
}

impl Book {
    fn say(&mut self, endpoint: EndpointKey, word: Word) {
        self.words.insert(endpoint, word);
    }

    /// Dequeues a patch that can be sent now.
    fn take(&mut self, now: Instant) -> Option<(EndpointKey, Word)> {
        let mut words = self.words.iter();
        let may_be_said =
            |(endpoint, word): &(&EndpointKey, &Word)| word.due <= now && !self.under_way.contains(*endpoint);
        let endpoint = words.find(may_be_said)?.0.clone();
        self.under_way.insert(endpoint.clone());
        self.words.remove_entry(&endpoint)
    }

    /// Handles the end of a patch: a failed one is queued again, unless a newer one is.
    fn done(&mut self, endpoint: EndpointKey, failed: Option<Word>) {
        self.under_way.remove(&endpoint);
        if let Some(word) = failed {
            self.words.entry(endpoint).or_insert(word);
        }
    }

    /// When the next patch is due that does not wait for one in flight.
    fn due(&self) -> Option<Instant> {
        let words = self.words.iter().filter(|(endpoint, _)| !self.under_way.contains(*endpoint));
        words.map(|(_, word)| word.due).min()
    }
}

#[derive(Default)]
struct Pending {
    book: Mutex<Book>,
    news: Notify,
}

impl Pending {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn say(&self, endpoint: EndpointKey, word: Word) {
        self.book().say(endpoint, word);
        self.news.notify_one();
    }

    fn done(&self, endpoint: EndpointKey, failed: Option<Word>) {
        self.book().done(endpoint, failed);
        self.news.notify_one();
    }

    /// Waits until a patch may be ready.
    async fn wait(&self) {
        let due = self.book().due();
        match due {
            Some(due) => drop(tokio::time::timeout_at(due, self.news.notified()).await),
            None => self.news.notified().await,
        }
    }
}

/// Handle to the task that annotates pods.
pub struct Annotations {
    pending: Arc<Pending>,
}

impl Annotations {
    /// Starts the task.
    pub fn spawn(client: Client) -> Self {
        let pending = Arc::new(Pending::default());
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
        self.pending.say(attachment.endpoint(), Word::new(&attachment.uid, annotations));
    }

    fn withdraw(&self, attachment: &Attachment) {
        let annotations = json!({ANNOTATION_POD_IP: "", ANNOTATION_POD_IPS: ""});
        self.pending.say(attachment.endpoint(), Word::new(&attachment.uid, annotations));
    }
}

async fn run(client: Client, pending: Arc<Pending>) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let taken = pending.book().take(Instant::now());
        let Some((endpoint, word)) = taken else {
            drop(place);
            pending.wait().await;
            continue;
        };
        let (client, pending) = (client.clone(), pending.clone());
        tokio::spawn(async move {
            let failed = patch(client, &endpoint, &word).await.err();
            drop(place);
            let failed = failed.map(|error| {
                tracing::debug!(pod = %endpoint, %error, "the pod could not be annotated; trying again");
                word.later(Instant::now())
            });
            pending.done(endpoint, failed);
        });
    }
}

/// Patches the pod's annotations through the status subresource, as Calico's plugin does, so that a
/// node needs no right to change a pod's spec. A pod that is gone, or another one of the same name
/// (the UID is a precondition), needs no annotation.
async fn patch(client: Client, endpoint: &EndpointKey, word: &Word) -> Result<(), kube::Error> {
    let mut metadata = json!({"annotations": word.annotations});
    if !word.uid.is_empty() {
        metadata["uid"] = json!(word.uid);
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

    fn word(text: &str) -> Word {
        Word::new("u", json!(text))
    }

    #[tokio::test(start_paused = true)]
    async fn one_word_on_a_pod_is_under_way_and_the_newest_is_said_last() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.say(pod(), word("old"));
        let old = book.take(now).expect("a word");
        assert_eq!(old, (pod(), word("old")));
        book.say(pod(), word("new"));
        assert_eq!((book.take(now), book.due()), (None, None), "the old one is under way");
        book.say(EndpointKey::new("x", "b"), word("other"));
        assert_eq!(book.take(now), Some((EndpointKey::new("x", "b"), word("other"))));
        book.done(pod(), Some(old.1.later(now)));
        assert_eq!(book.take(now), Some((pod(), word("new"))), "the old one has failed and is dropped");
        book.done(pod(), None);
        assert_eq!((book.take(now + RETRY_MAX), book.due()), (None, None), "nothing is said again");
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_said_again_later_and_a_newer_word_at_once() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.say(pod(), word("old"));
        let (_, old) = book.take(now).expect("a word");
        book.done(pod(), Some(old.later(now)));
        assert_eq!((book.take(now), book.due()), (None, Some(now + RETRY_MIN)));
        let (_, old) = book.take(now + RETRY_MIN).expect("it is due");
        assert_eq!((&old.annotations, old.delay), (&json!("old"), RETRY_MIN * 2));
        book.done(pod(), Some(old.later(now)));
        book.say(pod(), word("new"));
        assert_eq!(book.take(now), Some((pod(), word("new"))));
    }
}
