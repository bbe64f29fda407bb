//! Writes a pod's addresses into its annotations, where every other agent and tool reads them. Off the pod's path: the address is claimed already.
//!
//! One task with a bounded number of patches under way; the newest word on a pod replaces older ones that wait.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use margay_api::endpoint::EndpointKey;
use margay_api::meta::{ANNOTATION_CONTAINER_ID, ANNOTATION_POD_IP, ANNOTATION_POD_IPS};
use serde_json::{Value, json};
use tokio::sync::{Notify, Semaphore};

use super::attachment::Attachment;
use super::ports::Announcer;
use crate::requests::bounded;

/// Patches that are under way at once.
const AT_ONCE: usize = 8;
/// Delay before the first retry; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);

#[derive(Clone)]
struct Word {
    uid: String,
    annotations: Value,
    delay: Duration,
}

#[derive(Default)]
struct Pending {
    words: Mutex<BTreeMap<EndpointKey, Word>>,
    news: Notify,
}

impl Pending {
    fn say(&self, endpoint: EndpointKey, word: Word) {
        self.words.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(endpoint, word);
        self.news.notify_one();
    }

    /// Says it again unless something newer has been said.
    fn repeat(&self, endpoint: EndpointKey, word: Word) {
        self.words.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).entry(endpoint).or_insert(word);
        self.news.notify_one();
    }

    fn take(&self) -> Option<(EndpointKey, Word)> {
        self.words.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop_first()
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
        self.pending.say(attachment.endpoint(), Word { uid: attachment.uid.clone(), annotations, delay: RETRY_MIN });
    }

    fn withdraw(&self, attachment: &Attachment) {
        let annotations = json!({ANNOTATION_POD_IP: "", ANNOTATION_POD_IPS: ""});
        self.pending.say(attachment.endpoint(), Word { uid: attachment.uid.clone(), annotations, delay: RETRY_MIN });
    }
}

async fn run(client: Client, pending: Arc<Pending>) {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let Some((endpoint, word)) = pending.take() else {
            drop(place);
            pending.news.notified().await;
            continue;
        };
        let (client, pending) = (client.clone(), pending.clone());
        tokio::spawn(async move {
            let failed = patch(client, &endpoint, &word).await.err();
            drop(place);
            if let Some(error) = failed {
                tracing::debug!(pod = %endpoint, %error, "pod annotation; trying again");
                tokio::time::sleep(word.delay).await;
                let delay = (word.delay * 2).min(RETRY_MAX);
                pending.repeat(endpoint, Word { delay, ..word });
            }
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
