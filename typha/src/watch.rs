//! List and watch of one kind; the same code for all kinds.
//!
//! Errors never remove anything: a broken watch resumes from its resource version; if that has
//! expired, there is a new list. Objects that a new list lacks are requested by name before they
//! are removed, because a list can be empty or incomplete by error, and such an error must not
//! remove policy and routes from a whole cluster.

use std::time::Duration;

use futures::{AsyncBufRead, AsyncBufReadExt};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{GetParams, ListParams, WatchParams};
use kube::core::Request;
use margay_calc::ingest::Ingested;
use margay_runtime::backoff::Backoff;
use margay_runtime::clock::unix_ns;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::cause::Cause;
use crate::event::Event;
use crate::feed::{Feed, Form, WatchError, WatchEvent};
use crate::metrics::{Counters, Kind};
use crate::object::{Missing, ObjectKey, Observed};
use crate::packed::PackedList;

/// Timeout of a watch request at the API server, in seconds; short, so that a dead connection is
/// noticed soon.
const WATCH_SECONDS: u32 = 55;
/// Maximal silence on a watch, which the API server ends earlier.
const MAX_SILENCE: Duration = Duration::from_secs(60);
/// Timeout of a single request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Objects per page of a paged list.
const PAGE_SIZE: u32 = 500;
/// Objects of a list per event, so that the owner task handles other events in between.
const CHUNK: usize = 500;
/// Number of missing objects that are requested by name.
const SAMPLE: usize = 32;
/// Path of CustomResourceDefinitions.
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
/// Time between checks of a kind that is not served.
const ABSENT_RETRY: Duration = Duration::from_secs(10);
/// Initial and maximal backoff, short so that recovery of the API server is noticed soon.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// The watch of one kind.
#[derive(Clone)]
pub struct Watch {
    /// Name of the kind, for logs, metrics and the cache.
    pub kind: &'static str,
    /// Path of all objects of the kind.
    pub path: String,
    /// Encoding of the objects.
    pub form: Form,
    /// Name of the kind's CustomResourceDefinition, if a cluster may lack it.
    pub definition: Option<String>,
    /// True if a working cluster always has objects of the kind.
    pub never_empty: bool,
    /// Client of the API server.
    pub client: kube::Client,
    /// Sender to the owner task.
    pub events: mpsc::Sender<Event>,
    /// Metrics.
    pub counters: Counters,
    /// Random values in `0.0..1.0` for the delays of retries.
    pub jitter: fn() -> f64,
}

/// State of a kind that was not found.
enum Availability {
    /// Not served, and therefore without objects.
    Unserved,
    /// Served at another version, which is used from now on.
    Served,
    /// Not known, or unchanged.
    Unknown,
}

/// The owner task has ended.
#[derive(Debug)]
struct Stopped;

/// Reason for the end of a cycle.
enum CycleEnd {
    Error(WatchError),
    Stopped,
}

impl From<WatchError> for CycleEnd {
    fn from(error: WatchError) -> Self {
        Self::Error(error)
    }
}

impl From<Stopped> for CycleEnd {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

impl Watch {
    /// Sends events to the owner task until it ends.
    pub async fn run<K: DeserializeOwned>(mut self, ingest: fn(K) -> Ingested) {
        let mut feed = Feed::new(ingest, self.form, self.never_empty);
        let mut retry = RetryLog::new(self.kind, self.jitter);
        let mut streamed = true;
        loop {
            let error = match self.cycle(&mut feed, &mut retry, &mut streamed).await {
                Ok(()) => continue,
                Err(CycleEnd::Stopped) => return,
                Err(CycleEnd::Error(error)) => error,
            };
            let label = Kind { kind: self.kind };
            self.counters.watch_failures.get_or_create(&label).inc();
            if error.is_refusal() {
                self.counters.lists_refused.get_or_create(&label).inc();
            }
            if self.report_error(&feed, &error).await.is_err() {
                return;
            }
            if error.needs_list() || feed.version().is_none() {
                feed.restart();
            }
            let pause = match self.check_definition(&mut feed, &mut retry, &error).await {
                Ok(Availability::Unserved) => ABSENT_RETRY,
                Ok(Availability::Served) => continue,
                Ok(Availability::Unknown) => retry.record_failure(&error),
                Err(CycleEnd::Error(error)) => retry.record_failure(&error),
                Err(CycleEnd::Stopped) => return,
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Checks why an optional kind is not found. Without a definition it has no objects; if it is
    /// served at another version, it is read at that one.
    async fn check_definition<K: DeserializeOwned>(
        &mut self,
        feed: &mut Feed<K>,
        retry: &mut RetryLog,
        error: &WatchError,
    ) -> Result<Availability, CycleEnd> {
        let Some(name) = self.definition.clone().filter(|_| error.is_not_found()) else {
            return Ok(Availability::Unknown);
        };
        feed.restart();
        let request = Request::new(DEFINITIONS)
            .get(&name, &GetParams::default())
            .map_err(|error| api_error(kube::Error::BuildRequest(error)))?;
        let definition: CustomResourceDefinition =
            match with_timeout(self.client.request(request)).await {
                Ok(definition) => definition,
                Err(error) if error.is_not_found() => {
                    self.send_list(PackedList::default(), 0, 0).await?;
                    retry.record_absence(&name);
                    return Ok(Availability::Unserved);
                }
                Err(error) => return Err(error.into()),
            };
        let versions = definition
            .spec
            .versions
            .into_iter()
            .filter(|version| version.served);
        let versions: Vec<String> = versions.map(|version| version.name).collect();
        match path_at_served_version(&self.path, &versions) {
            None => Ok(Availability::Unknown),
            Some(path) => {
                info!(
                    kind = self.kind,
                    path, "served at another version; unknown fields are refused"
                );
                self.path = path;
                Ok(Availability::Served)
            }
        }
    }

    /// Sends one request and processes its response; `Ok` when the API server ends the watch
    /// regularly.
    async fn cycle<K: DeserializeOwned>(
        &self,
        feed: &mut Feed<K>,
        retry: &mut RetryLog,
        streamed: &mut bool,
    ) -> Result<(), CycleEnd> {
        if feed.version().is_none() && !*streamed {
            let objects = self.list_pages(feed).await?;
            self.apply_list(feed, objects).await?;
            retry.record_success();
        }
        let listing = feed.version().is_none();
        let params = WatchParams {
            timeout: Some(WATCH_SECONDS),
            bookmarks: true,
            send_initial_events: listing,
            ..WatchParams::default()
        };
        let request = Request::new(&self.path)
            .watch(&params, feed.version().unwrap_or_default())
            .map_err(|error| api_error(kube::Error::BuildRequest(error)))?;
        let opened = with_timeout(self.client.request_stream(request)).await;
        if let (true, Err(WatchError::Api(error))) = (listing, &opened)
            && let kube::Error::Api(status) = &**error
            && matches!(status.code, 400 | 422)
        {
            info!(kind = self.kind, %error, "streamed lists are not supported; using pages");
            *streamed = false;
            return Ok(());
        }
        let opened = opened?;
        self.report_answer(feed).await?;
        let outcome = self.read(feed, retry, Box::pin(opened)).await;
        if matches!(outcome, Err(CycleEnd::Error(WatchError::Unfinished))) {
            *streamed = false;
        }
        outcome
    }

    async fn read<K: DeserializeOwned>(
        &self,
        feed: &mut Feed<K>,
        retry: &mut RetryLog,
        mut stream: impl AsyncBufRead + Unpin,
    ) -> Result<(), CycleEnd> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = timeout(MAX_SILENCE, stream.read_until(b'\n', &mut line)).await;
            let read = read.map_err(|_| WatchError::Silent(MAX_SILENCE.as_secs()))?;
            if read.map_err(WatchError::Broken)? == 0 {
                return match feed.version() {
                    Some(_) => Ok(()),
                    None => Err(WatchError::Unfinished.into()),
                };
            }
            let event = feed.decode_line(&line)?;
            let seen_unix_ns = unix_ns();
            match event {
                WatchEvent::Bookmark => self.report_answer(feed).await?,
                WatchEvent::Applied(object, trace) => {
                    let cause = Cause {
                        seen_unix_ns,
                        trace,
                        version: feed.version_number(),
                    };
                    self.send_observed(vec![*object], cause).await?;
                }
                WatchEvent::Deleted(key) => {
                    let cause = Cause {
                        seen_unix_ns,
                        trace: None,
                        version: feed.version_number(),
                    };
                    let kind = self.kind;
                    self.send(Event::Deleted { kind, key, cause }).await?;
                }
                WatchEvent::ListComplete(objects) => self.apply_list(feed, objects).await?,
            }
            if feed.version().is_some() {
                retry.record_success();
            }
        }
    }

    async fn list_pages<K: DeserializeOwned>(
        &self,
        feed: &mut Feed<K>,
    ) -> Result<PackedList, CycleEnd> {
        feed.restart();
        let mut params = ListParams::default().limit(PAGE_SIZE);
        loop {
            let request = Request::new(&self.path)
                .list(&params)
                .map_err(|error| api_error(kube::Error::BuildRequest(error)))?;
            let page = with_timeout(self.client.request_text(request)).await?;
            match feed.decode_page(&page)? {
                (WatchEvent::ListComplete(objects), _) => return Ok(objects),
                (_, next) => params.continue_token = next,
            }
        }
    }

    /// Applies a complete list. On failure the next cycle lists again.
    async fn apply_list<K: DeserializeOwned>(
        &self,
        feed: &mut Feed<K>,
        objects: PackedList,
    ) -> Result<(), CycleEnd> {
        let used = self
            .send_list(objects, feed.version_number(), feed.newest_listed())
            .await;
        if used.is_err() {
            feed.restart();
        }
        used
    }

    /// Reports whether the API server has answered with this error, or not at all.
    async fn report_error<K: DeserializeOwned>(
        &self,
        feed: &Feed<K>,
        error: &WatchError,
    ) -> Result<(), Stopped> {
        let kind = self.kind;
        let event = match error.is_unanswered() {
            true => Event::Unanswered {
                kind,
                reason: error.to_string(),
            },
            false => Event::Answered {
                kind,
                version: feed.version_number(),
            },
        };
        self.send(event).await
    }

    /// Reports that the API server answers, and the version that is known, unless there is none
    /// because a list is in progress.
    async fn report_answer<K: DeserializeOwned>(&self, feed: &Feed<K>) -> Result<(), Stopped> {
        if feed.version().is_none() {
            return Ok(());
        }
        let (kind, version) = (self.kind, feed.version_number());
        self.send(Event::Answered { kind, version }).await
    }

    /// Sends the objects of a list, and removes what it lacks after confirming that by name.
    async fn send_list(
        &self,
        objects: PackedList,
        version: u64,
        newest: u64,
    ) -> Result<(), CycleEnd> {
        let count = objects.len();
        self.send(Event::ListStarted(self.kind)).await?;
        let cause = Cause {
            seen_unix_ns: unix_ns(),
            ..Cause::default()
        };
        let mut objects = objects.into_iter();
        loop {
            let chunk: Vec<_> = objects.by_ref().take(CHUNK).collect();
            if chunk.is_empty() {
                break;
            }
            self.send_observed(chunk, cause).await?;
        }
        let missing = self.missing().await?;
        for key in &missing.sample {
            if self.exists(key).await? {
                let (missing, example) = (missing.total, key.clone());
                return Err(WatchError::Lacking { missing, example }.into());
            }
        }
        debug!(kind = self.kind, count, gone = missing.total, "listed");
        let kind = self.kind;
        self.send(Event::Sweep {
            kind,
            version,
            newest,
        })
        .await?;
        Ok(())
    }

    async fn missing(&self) -> Result<Missing, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::ListCompleted {
            kind: self.kind,
            limit: SAMPLE,
            reply,
        })
        .await?;
        answer.await.map_err(|_| Stopped)
    }

    async fn exists(&self, key: &ObjectKey) -> Result<bool, WatchError> {
        let request = Request::new(object_path(&self.path, key))
            .get_metadata(&key.name, &GetParams::default())
            .map_err(|error| api_error(kube::Error::BuildRequest(error)))?;
        match with_timeout(self.client.request_text(request)).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn send_observed(&self, objects: Vec<Observed>, cause: Cause) -> Result<(), Stopped> {
        let kind = self.kind;
        self.send(Event::Observed {
            kind,
            objects,
            cause,
        })
        .await
    }

    async fn send(&self, event: Event) -> Result<(), Stopped> {
        self.events.send(event).await.map_err(|_| Stopped)
    }
}

/// Backoff, and logging of state changes: once when the watch fails, once when it works again.
struct RetryLog {
    kind: &'static str,
    backoff: Backoff,
    jitter: fn() -> f64,
    logged: Option<String>,
}

impl RetryLog {
    fn new(kind: &'static str, jitter: fn() -> f64) -> Self {
        Self {
            kind,
            backoff: Backoff::new(RETRY.0, RETRY.1),
            jitter,
            logged: None,
        }
    }

    fn record_success(&mut self) {
        if self.logged.take().is_some() {
            info!(kind = self.kind, "watch resumed");
        }
        self.backoff.reset();
    }

    /// Logs that the kind has no definition, and so no objects.
    fn record_absence(&mut self, definition: &str) {
        let state = format!("no definition {definition}");
        if self.logged.as_ref() != Some(&state) {
            info!(
                kind = self.kind,
                definition, "not served; treated as empty until its definition exists"
            );
            self.logged = Some(state);
        }
    }

    fn record_failure(&mut self, error: &WatchError) -> Duration {
        let state = error.to_string();
        if self.logged.as_ref() == Some(&state) {
            debug!(kind = self.kind, %error, "watch still interrupted");
        } else {
            warn!(
                kind = self.kind,
                %error,
                "watch interrupted; the last known state stays in force",
            );
            self.logged = Some(state);
        }
        self.backoff.next((self.jitter)())
    }
}

/// Path of an object's namespace, from the path of all objects.
fn object_path(path: &str, key: &ObjectKey) -> String {
    match path.rsplit_once('/') {
        Some((group, plural)) if !key.namespace.is_empty() => {
            format!("{group}/namespaces/{}/{plural}", key.namespace)
        }
        _ => path.to_owned(),
    }
}

/// The same path at a served version; `None` if it is at one already, which the API server is about
/// to serve.
fn path_at_served_version(path: &str, served: &[String]) -> Option<String> {
    let mut parts: Vec<&str> = path.split('/').collect();
    let version = parts.get_mut(3)?;
    if served.iter().any(|served| served == version) {
        return None;
    }
    *version = served.first()?;
    Some(parts.join("/"))
}

fn api_error(error: kube::Error) -> WatchError {
    WatchError::Api(Box::new(error))
}

async fn with_timeout<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, WatchError> {
    match timeout(REQUEST_TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(api_error(error)),
        Err(_) => Err(WatchError::Silent(REQUEST_TIMEOUT.as_secs())),
    }
}

#[cfg(test)]
mod tests;
