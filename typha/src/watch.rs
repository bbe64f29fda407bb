//! One watch per kind, the same function for all.
//!
//! Errors never remove anything: a watch that breaks goes on from the version that it had; if the API server has forgotten
//! that version, there is a new list. What a new list lacks is asked for by name before it is removed, because a list
//! can be empty or short by error, and an error there must not take policy and routes from a whole cluster.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::{AsyncBufRead, AsyncBufReadExt};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{GetParams, ListParams, WatchParams};
use kube::core::Request;
use margay_runtime::backoff::{Backoff, jitter};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::cache::{Missing, ObjectKey, Observed};
use crate::compute::Event;
use crate::feed::{Fault, Feed, Form, News, Parsed};
use crate::hub::Cause;
use crate::metrics::{Counters, Kind};

/// How long the API server keeps one watch request open; short, so that a dead connection is noticed soon.
const WATCH: u32 = 55;
/// The longest silence on a watch, which ends by itself before.
const SILENCE: Duration = Duration::from_secs(60);
/// The longest time for a single answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Objects of a page, when lists are not streamed.
const PAGE: u32 = 500;
/// Objects of a list that are handed over at once, so that the owner task looks at other events in between.
const CHUNK: usize = 500;
/// Missing objects that are asked for by name.
const SAMPLE: usize = 32;
/// Where definitions are.
const DEFINITIONS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
/// Between looks at a kind that is not served.
const ABSENT: Duration = Duration::from_secs(10);
/// Between attempts: at first, and at most, so that an API server that is back is heard soon.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// The watch of one kind.
#[derive(Clone)]
pub struct Watch {
    /// Name of the kind, for logs, metrics and the cache.
    pub kind: &'static str,
    /// Where the API serves all objects of the kind.
    pub path: String,
    /// The form in which they come.
    pub form: Form,
    /// The definition of the kind, if a cluster may do without it.
    pub definition: Option<String>,
    /// In a working cluster there is at least one object of the kind.
    pub never_empty: bool,
    /// Connection to the API.
    pub client: kube::Client,
    /// The owner task.
    pub events: mpsc::Sender<Event>,
    /// What is counted.
    pub counters: Counters,
}

/// What is known about a kind that was not found.
enum Outlook {
    /// It is not served, and has no objects.
    Unserved,
    /// It is served elsewhere, where it is looked for from now on.
    Served,
    /// Nothing, or nothing new.
    Unknown,
}

/// The owner task has ended, so there is nobody to watch for.
#[derive(Debug)]
struct Stopped;

/// Why a cycle ended.
enum End {
    Fault(Fault),
    Stopped,
}

impl From<Fault> for End {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Stopped> for End {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

/// Nanoseconds since the epoch.
pub fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

impl Watch {
    /// Feeds the owner task until it ends.
    pub async fn run<K: DeserializeOwned>(mut self, parse: fn(K) -> Parsed) {
        let mut feed = Feed::new(parse, self.form, self.never_empty);
        let mut pace = Pace::new(self.kind);
        let mut streamed = true;
        loop {
            let fault = match self.cycle(&mut feed, &mut pace, &mut streamed).await {
                Ok(()) => continue,
                Err(End::Stopped) => return,
                Err(End::Fault(fault)) => fault,
            };
            let label = Kind { kind: self.kind };
            self.counters.watch_failures.get_or_create(&label).inc();
            if fault.is_refusal() {
                self.counters.lists_refused.get_or_create(&label).inc();
            }
            if fault.needs_list() || feed.version().is_none() {
                feed.restart();
            }
            let pause = match self.look_at_definition(&mut feed, &mut pace, &fault).await {
                Ok(Outlook::Unserved) => ABSENT,
                Ok(Outlook::Served) => continue,
                Ok(Outlook::Unknown) => pace.failed(&fault),
                Err(End::Fault(fault)) => pace.failed(&fault),
                Err(End::Stopped) => return,
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Why an optional kind is not found. One without definition has no objects; one that is served at another version is read at that.
    async fn look_at_definition<K: DeserializeOwned>(
        &mut self,
        feed: &mut Feed<K>,
        pace: &mut Pace,
        fault: &Fault,
    ) -> Result<Outlook, End> {
        let Some(name) = self.definition.clone().filter(|_| fault.is_not_found()) else {
            return Ok(Outlook::Unknown);
        };
        feed.restart();
        let request = Request::new(DEFINITIONS)
            .get(&name, &GetParams::default())
            .map_err(|error| api(kube::Error::BuildRequest(error)))?;
        let definition: CustomResourceDefinition = match answer(self.client.request(request)).await {
            Ok(definition) => definition,
            Err(fault) if fault.is_not_found() => {
                self.hand_over(Vec::new()).await?;
                pace.absent(&name);
                return Ok(Outlook::Unserved);
            }
            Err(fault) => return Err(fault.into()),
        };
        let versions = definition.spec.versions.into_iter().filter(|version| version.served);
        let versions: Vec<String> = versions.map(|version| version.name).collect();
        match elsewhere(&self.path, &versions) {
            None => Ok(Outlook::Unknown),
            Some(path) => {
                info!(kind = self.kind, path, "read at another version; what this version does not know is refused");
                self.path = path;
                Ok(Outlook::Served)
            }
        }
    }

    /// One request and what follows from it; `Ok` when the API server ended the watch as it does from time to time.
    async fn cycle<K: DeserializeOwned>(
        &self,
        feed: &mut Feed<K>,
        pace: &mut Pace,
        streamed: &mut bool,
    ) -> Result<(), End> {
        if feed.version().is_none() && !*streamed {
            let objects = self.pages(feed).await?;
            self.accept(feed, objects).await?;
            pace.works();
        }
        let listing = feed.version().is_none();
        let params = WatchParams {
            timeout: Some(WATCH),
            bookmarks: true,
            send_initial_events: listing,
            ..WatchParams::default()
        };
        let request = Request::new(&self.path)
            .watch(&params, feed.version().unwrap_or_default())
            .map_err(|error| api(kube::Error::BuildRequest(error)))?;
        let opened = answer(self.client.request_stream(request)).await;
        if let (true, Err(Fault::Api(error))) = (listing, &opened)
            && let kube::Error::Api(status) = &**error
            && matches!(status.code, 400 | 422)
        {
            info!(kind = self.kind, %error, "lists are not streamed here; asking for pages");
            *streamed = false;
            return Ok(());
        }
        let outcome = self.read(feed, pace, Box::pin(opened?)).await;
        if matches!(outcome, Err(End::Fault(Fault::Unfinished))) {
            *streamed = false;
        }
        outcome
    }

    async fn read<K: DeserializeOwned>(
        &self,
        feed: &mut Feed<K>,
        pace: &mut Pace,
        mut stream: impl AsyncBufRead + Unpin,
    ) -> Result<(), End> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = timeout(SILENCE, stream.read_until(b'\n', &mut line)).await;
            let read = read.map_err(|_| Fault::Silent(SILENCE.as_secs()))?;
            if read.map_err(Fault::Broken)? == 0 {
                return match feed.version() {
                    Some(_) => Ok(()),
                    None => Err(Fault::Unfinished.into()),
                };
            }
            let news = feed.line(&line)?;
            let seen_unix_ns = unix_ns();
            match news {
                News::None => {}
                News::Object(object, trace) => {
                    let cause = Cause { seen_unix_ns, trace };
                    self.observed(vec![*object], cause).await?;
                }
                News::Deleted(key) => {
                    let cause = Cause { seen_unix_ns, trace: None };
                    let kind = self.kind;
                    self.tell(Event::Deleted { kind, key, cause }).await?;
                }
                News::List(objects) => self.accept(feed, objects).await?,
            }
            if feed.version().is_some() {
                pace.works();
            }
        }
    }

    async fn pages<K: DeserializeOwned>(&self, feed: &mut Feed<K>) -> Result<Vec<Observed>, End> {
        feed.restart();
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let request =
                Request::new(&self.path).list(&params).map_err(|error| api(kube::Error::BuildRequest(error)))?;
            let page = answer(self.client.request_text(request)).await?;
            match feed.page(&page)? {
                (News::List(objects), _) => return Ok(objects),
                (_, next) => params.continue_token = next,
            }
        }
    }

    /// Uses a complete list. If that fails, nothing goes on from its version.
    async fn accept<K: DeserializeOwned>(&self, feed: &mut Feed<K>, objects: Vec<Observed>) -> Result<(), End> {
        let used = self.hand_over(objects).await;
        if used.is_err() {
            feed.restart();
        }
        used
    }

    /// Hands over what the list holds, and what it lacks only after asking for it.
    async fn hand_over(&self, objects: Vec<Observed>) -> Result<(), End> {
        let count = objects.len();
        self.tell(Event::Begin(self.kind)).await?;
        let cause = Cause { seen_unix_ns: unix_ns(), trace: None };
        let mut objects = objects.into_iter();
        loop {
            let chunk: Vec<_> = objects.by_ref().take(CHUNK).collect();
            if chunk.is_empty() {
                break;
            }
            self.observed(chunk, cause).await?;
        }
        let missing = self.missing().await?;
        for key in &missing.sample {
            if self.exists(key).await? {
                let (missing, example) = (missing.total, key.clone());
                return Err(Fault::Lacking { missing, example }.into());
            }
        }
        debug!(kind = self.kind, count, gone = missing.total, "listed");
        self.tell(Event::Sweep(self.kind)).await?;
        Ok(())
    }

    async fn missing(&self) -> Result<Missing, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.tell(Event::Listed { kind: self.kind, limit: SAMPLE, reply }).await?;
        answer.await.map_err(|_| Stopped)
    }

    async fn exists(&self, key: &ObjectKey) -> Result<bool, Fault> {
        let request = Request::new(object_path(&self.path, key))
            .get_metadata(&key.name, &GetParams::default())
            .map_err(|error| api(kube::Error::BuildRequest(error)))?;
        match answer(self.client.request_text(request)).await {
            Ok(_) => Ok(true),
            Err(fault) if fault.is_not_found() => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    async fn observed(&self, objects: Vec<Observed>, cause: Cause) -> Result<(), Stopped> {
        let kind = self.kind;
        self.tell(Event::Observed { kind, objects, cause }).await
    }

    async fn tell(&self, event: Event) -> Result<(), Stopped> {
        self.events.send(event).await.map_err(|_| Stopped)
    }
}

/// How often is tried, and what is said about it: once when it begins to fail, once when it works again.
struct Pace {
    kind: &'static str,
    backoff: Backoff,
    told: Option<String>,
}

impl Pace {
    fn new(kind: &'static str) -> Self {
        Self { kind, backoff: Backoff::new(RETRY.0, RETRY.1), told: None }
    }

    fn works(&mut self) {
        if self.told.take().is_some() {
            info!(kind = self.kind, "watch goes on");
        }
        self.backoff.reset();
    }

    /// The kind has no definition, and so no objects.
    fn absent(&mut self, definition: &str) {
        let words = format!("no definition {definition}");
        if self.told.as_ref() != Some(&words) {
            info!(kind = self.kind, definition, "not served; taken for empty until its definition is there");
            self.told = Some(words);
        }
    }

    fn failed(&mut self, fault: &Fault) -> Duration {
        let words = fault.to_string();
        if self.told.as_ref() == Some(&words) {
            debug!(kind = self.kind, %fault, "watch still interrupted");
        } else {
            warn!(kind = self.kind, %fault, "watch interrupted; what is known stays in force");
            self.told = Some(words);
        }
        self.backoff.next(jitter())
    }
}

/// Where objects of the namespace are served, given where all are.
fn object_path(path: &str, key: &ObjectKey) -> String {
    match path.rsplit_once('/') {
        Some((group, plural)) if !key.namespace.is_empty() => {
            format!("{group}/namespaces/{}/{plural}", key.namespace)
        }
        _ => path.to_owned(),
    }
}

/// The same path at a version that is served; none if it is at one of them already, which the API server will get to know.
fn elsewhere(path: &str, served: &[String]) -> Option<String> {
    let mut parts: Vec<&str> = path.split('/').collect();
    let version = parts.get_mut(3)?;
    if served.iter().any(|served| served == version) {
        return None;
    }
    *version = served.first()?;
    Some(parts.join("/"))
}

fn api(error: kube::Error) -> Fault {
    Fault::Api(Box::new(error))
}

async fn answer<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Fault> {
    match timeout(ANSWER, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(api(error)),
        Err(_) => Err(Fault::Silent(ANSWER.as_secs())),
    }
}

#[cfg(test)]
mod tests;
