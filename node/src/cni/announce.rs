//! Writes a pod's addresses into its annotations, where every other agent and tool reads them. Off the pod's path: the address is claimed already.
//!
//! One task with a bounded number of patches under way, one of each pod; the newest word on a pod replaces older ones that wait.

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

/// Patches that are under way at once.
const AT_ONCE: usize = 8;
/// Longest delay before the first retry; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq)]
struct Word {
    uid: String,
    annotations: Value,
    /// Not said before.
    due: Instant,
    /// Delays before it is said again.
    retry: Backoff,
}

impl Word {
    fn new(uid: &str, annotations: Value) -> Self {
        Self { uid: uid.to_owned(), annotations, due: Instant::now(), retry: Backoff::new(RETRY_MIN, RETRY_MAX) }
    }

    /// The same word after it could not be said.
    fn later(mut self, now: Instant, jitter: f64) -> Self {
        self.due = now + self.retry.next(jitter);
        self
    }
}

/// What is to be said: the newest word on each pod.
#[derive(Default)]
struct Book {
    words: BTreeMap<EndpointKey, Word>,
    /// Pods with a word under way. The next one waits for it: two at once could arrive in either order.
    under_way: BTreeSet<EndpointKey>,
}

impl Book {
    fn say(&mut self, endpoint: EndpointKey, word: Word) {
        self.words.insert(endpoint, word);
    }

    /// A word that may be said now.
    fn take(&mut self, now: Instant) -> Option<(EndpointKey, Word)> {
        let mut words = self.words.iter();
        let may_be_said =
            |(endpoint, word): &(&EndpointKey, &Word)| word.due <= now && !self.under_way.contains(*endpoint);
        let endpoint = words.find(may_be_said)?.0.clone();
        self.under_way.insert(endpoint.clone());
        self.words.remove_entry(&endpoint)
    }

    /// Notes that a word was said, or failed and is to be said later, unless there is a newer one by now.
    fn done(&mut self, endpoint: EndpointKey, failed: Option<Word>) {
        self.under_way.remove(&endpoint);
        if let Some(word) = failed {
            self.words.entry(endpoint).or_insert(word);
        }
    }

    /// When the next word may be said that waits for nothing else.
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
        self.book.lock()
    }

    fn say(&self, endpoint: EndpointKey, word: Word) {
        self.book().say(endpoint, word);
        self.news.notify_one();
    }

    fn done(&self, endpoint: EndpointKey, failed: Option<Word>) {
        self.book().done(endpoint, failed);
        self.news.notify_one();
    }

    /// Returns when there may be a word to say.
    async fn wait(&self) {
        let due = self.book().due();
        match due {
            Some(due) => drop(tokio::time::timeout_at(due, self.news.notified()).await),
            None => self.news.notified().await,
        }
    }
}

/// See the module.
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
                tracing::debug!(pod = %endpoint, %error, "pod annotation; trying again");
                word.later(Instant::now(), jitter())
            });
            pending.done(endpoint, failed);
        });
    }
}

/// Through the status subresource, as Calico does, so that a node needs no right to change what a pod is. A pod that is gone, or another of the same
/// name (the UID is a precondition), needs no annotation.
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
        book.done(pod(), Some(old.1.later(now, 1.0)));
        assert_eq!(book.take(now), Some((pod(), word("new"))), "the old one has failed and is dropped");
        book.done(pod(), None);
        assert_eq!((book.take(now + RETRY_MAX), book.due()), (None, None), "nothing is said again");
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_said_again_later_and_a_newer_word_at_once() {
        let (mut book, now) = (Book::default(), Instant::now());
        book.say(pod(), word("old"));
        let (_, old) = book.take(now).expect("a word");
        book.done(pod(), Some(old.later(now, 1.0)));
        assert_eq!((book.take(now), book.due()), (None, Some(now + RETRY_MIN)));
        let (_, old) = book.take(now + RETRY_MIN).expect("it is due");
        assert_eq!(old.annotations, json!("old"));
        let old = old.later(now, 1.0);
        assert_eq!(old.due, now + RETRY_MIN * 2, "the delay doubles");
        book.done(pod(), Some(old));
        book.say(pod(), word("new"));
        assert_eq!(book.take(now), Some((pod(), word("new"))));
    }
}
