//! The API server as one replica of typha sees it: requests over a door that can be shut, watches
//! that are late, cut or expired, and lists that are old, empty or incomplete.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{Request, Response, StatusCode, Uri};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};

use crate::api::{Api, Contents, Key, Objects, TABLE};
use crate::oracle::Listed;
use crate::plant::Plant;
use crate::run::Run;

/// Duration after which the API server ends a watch, as typha asks for.
const WATCH: Duration = Duration::from_secs(55);

/// How a watch ends before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Regularly.
    End,
    /// By an error of the connection.
    Break,
    /// In the middle of a line.
    HalfLine,
    /// By 410.
    Expired,
}

/// What is wrong with a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListFault {
    /// It is of an earlier state.
    Old,
    /// It has no objects.
    Empty,
    /// It lacks every other object.
    Partial,
    /// It ends before its end.
    Unfinished,
}

type ApiBody = UnsyncBoxBody<Bytes, io::Error>;
type Piece = Result<Frame<Bytes>, io::Error>;

struct Stream {
    kind: &'static str,
    cut: Arc<Mutex<Option<Cut>>>,
    wake: Arc<Notify>,
}

struct State {
    dice: fastrand::Rng,
    is_shut: bool,
    streams: Vec<Stream>,
    /// Faults of the next lists.
    lists: Vec<ListFault>,
    /// Requests that fail next.
    refusals: u32,
}

/// One replica's way to the API server.
pub struct Door {
    run: Run,
    name: String,
    api: Api,
    listed: Listed,
    state: Mutex<State>,
    opened: Notify,
}

impl Door {
    /// Creates an open door.
    pub fn new(run: &Run, name: &str, api: &Api, listed: &Listed) -> Arc<Self> {
        let state = State {
            dice: run.dice(name),
            is_shut: false,
            streams: Vec::new(),
            lists: Vec::new(),
            refusals: 0,
        };
        let (run, name, api, listed) = (run.clone(), name.to_owned(), api.clone(), listed.clone());
        Arc::new(Self {
            run,
            name,
            api,
            listed,
            state: Mutex::new(state),
            opened: Notify::new(),
        })
    }

    /// A client whose requests go through the door.
    pub fn client(self: &Arc<Self>) -> kube::Client {
        let door = self.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let door = door.clone();
            async move { Ok::<_, Infallible>(door.answer(request.uri()).await) }
        });
        kube::Client::new(service, "default")
    }

    /// Shuts or opens the door: nothing passes, and nobody is notified.
    pub fn set_shut(&self, is_shut: bool) {
        let mut state = self.state.lock();
        state.is_shut = is_shut;
        if !is_shut {
            self.opened.notify_waiters();
            state
                .streams
                .iter()
                .for_each(|stream| stream.wake.notify_one());
        }
    }

    /// Cuts some of the watches.
    pub fn cut(&self, cut: Cut, dice: &mut fastrand::Rng) {
        let mut state = self.state.lock();
        state
            .streams
            .retain(|stream| Arc::strong_count(&stream.cut) > 1);
        for stream in state.streams.iter().filter(|_| dice.bool()) {
            self.run.note(&self.name, || {
                format!("the watch of {} is cut: {cut:?}", stream.kind)
            });
            *stream.cut.lock() = Some(cut);
            stream.wake.notify_one();
        }
    }

    /// The next list has this fault.
    pub fn spoil_list(&self, fault: ListFault) {
        self.state.lock().lists.push(fault);
    }

    /// The next requests fail.
    pub fn refuse(&self, requests: u32) {
        self.state.lock().refusals = requests;
    }

    /// From now on everything is as it should be.
    pub fn heal(&self) {
        self.set_shut(false);
        let mut state = self.state.lock();
        state.lists.clear();
        state.refusals = 0;
    }

    fn delay(&self) -> Duration {
        let dice = &mut self.state.lock().dice;
        Duration::from_millis(if dice.bool() { 0 } else { dice.u64(1..25) })
    }

    /// Waits until the door is open, and as long as the way takes.
    async fn pass(&self) {
        loop {
            let is_shut = self.state.lock().is_shut;
            if !is_shut {
                break;
            }
            self.opened.notified().await;
        }
        sleep(self.delay()).await;
    }

    async fn answer(self: Arc<Self>, uri: &Uri) -> Response<ApiBody> {
        self.pass().await;
        let is_refused = {
            let mut state = self.state.lock();
            let is_refused = state.refusals > 0;
            state.refusals = state.refusals.saturating_sub(1);
            is_refused
        };
        if is_refused {
            return status(
                StatusCode::INTERNAL_SERVER_ERROR,
                "etcdserver: request timed out",
            );
        }
        let query = |name: &str| {
            let parts = uri.query().unwrap_or_default().split('&');
            parts
                .filter_map(|part| part.split_once('='))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value)
        };
        match find(uri.path()) {
            Some((kind, Some(key))) => self.get(kind, &key),
            Some((kind, None)) if query("watch") == Some("true") => {
                let version = query("resourceVersion").and_then(|version| version.parse().ok());
                self.watch(
                    kind,
                    version.filter(|_| query("sendInitialEvents").is_none()),
                )
            }
            Some((kind, None)) => self.list(kind),
            None => status(
                StatusCode::NOT_FOUND,
                "the server could not find the requested resource",
            ),
        }
    }

    fn get(&self, kind: &'static str, key: &Key) -> Response<ApiBody> {
        let found = self
            .api
            .with(|contents| contents.objects(kind).get(key).cloned());
        match found {
            // As if nobody had asked.
            Some(_) if self.run.has(Plant::BelievedList) => {
                status(StatusCode::NOT_FOUND, "not found")
            }
            Some(text) => full(StatusCode::OK, text.to_string()),
            None => status(StatusCode::NOT_FOUND, "not found"),
        }
    }

    /// Objects and version of the next list, whatever is wrong with it. It lacks only objects that
    /// the replica knows: nobody could find out that others are missing.
    fn next_list(&self, kind: &'static str) -> (u64, u64, Objects, Option<ListFault>) {
        let mut state = self.state.lock();
        let is_known = self.api.with(|contents| {
            let listed = self.listed.lock();
            let known = listed.get(kind);
            known.is_some_and(|known| contents.objects(kind).keys().all(|key| known.contains(key)))
        });
        let lacks = |fault: &ListFault| matches!(fault, ListFault::Empty | ListFault::Partial);
        let fault = state.lists.pop().filter(|fault| is_known || !lacks(fault));
        let (version, from, objects) = self.api.with(|contents: &mut Contents| {
            let past = &contents.kinds[kind].past;
            match fault {
                Some(ListFault::Old) => {
                    let (version, objects) = &past[state.dice.usize(past.len() / 2..past.len())];
                    let version = (*version).max(1000);
                    let sent = if self.run.has(Plant::BelievedOldList) {
                        contents.version
                    } else {
                        version
                    };
                    (sent, sent, objects.clone())
                }
                Some(ListFault::Empty) => (contents.version, contents.version, Objects::new()),
                Some(ListFault::Partial) => {
                    let objects = contents.objects(kind).iter().step_by(2);
                    let objects = objects
                        .map(|(key, text)| (key.clone(), text.clone()))
                        .collect();
                    (contents.version, contents.version, objects)
                }
                _ => (
                    contents.version,
                    contents.version,
                    contents.objects(kind).clone(),
                ),
            }
        });
        self.run.note(&self.name, || match fault {
            Some(fault) => format!("a list of {kind} at {version} is {fault:?}"),
            None => format!("list of {kind} at {version}"),
        });
        (version, from, objects, fault)
    }

    fn list(&self, kind: &'static str) -> Response<ApiBody> {
        let (version, _, objects, _) = self.next_list(kind);
        let items: Vec<&str> = objects.values().map(AsRef::as_ref).collect();
        let page = format!(
            "{{\"metadata\":{{\"resourceVersion\":\"{version}\"}},\"items\":[{}]}}",
            items.join(",")
        );
        full(StatusCode::OK, page)
    }

    fn watch(self: Arc<Self>, kind: &'static str, from: Option<u64>) -> Response<ApiBody> {
        let (out, pieces) = mpsc::channel(1);
        let mut from = from;
        if let Some(version) = from
            && version < self.api.with(|contents| contents.compacted)
        {
            self.run
                .note(&self.name, || format!("{kind} cannot go on from {version}"));
            if self.run.has(Plant::IgnoredExpiry) {
                from = Some(self.api.with(|contents| contents.version));
            } else if version % 2 == 0 {
                return status(StatusCode::GONE, "too old resource version");
            } else {
                let line = gone();
                return full(StatusCode::OK, line);
            }
        }
        let (cut, wake) = (Arc::default(), Arc::new(Notify::new()));
        let stream = Stream {
            kind,
            cut: Arc::clone(&cut),
            wake: wake.clone(),
        };
        self.state.lock().streams.push(stream);
        tokio::spawn(self.send(kind, from, out, cut, wake));
        let pieces = stream::unfold(pieces, |mut pieces| async move {
            Some((pieces.recv().await?, pieces))
        });
        Response::new(StreamBody::new(pieces.boxed()).boxed_unsync())
    }

    /// Sends the events of one watch until it ends.
    async fn send(
        self: Arc<Self>,
        kind: &'static str,
        from: Option<u64>,
        out: mpsc::Sender<Piece>,
        cut: Arc<Mutex<Option<Cut>>>,
        wake: Arc<Notify>,
    ) {
        let end = Instant::now() + WATCH;
        let mut position = match from {
            Some(version) => version,
            None => match self.send_list(kind, &out).await {
                Some(version) => version,
                None => return,
            },
        };
        loop {
            let next = self.api.with(|contents| {
                let log = &contents.kinds[kind].log;
                let next = log.partition_point(|entry| entry.version <= position);
                log.get(next)
                    .map(|entry| (entry.version, entry.line.clone()))
            });
            let is_cut = cut.lock().take();
            if let Some(cut) = is_cut {
                return self.end(cut, next.map(|(_, line)| line), &out).await;
            }
            let is_shut = self.state.lock().is_shut;
            match next.filter(|_| !is_shut) {
                Some((version, line)) => {
                    sleep(self.delay()).await;
                    let is_shut = self.state.lock().is_shut;
                    if is_shut || cut.lock().is_some() {
                        continue;
                    }
                    if out.send(piece(&line)).await.is_err() {
                        return;
                    }
                    position = version;
                }
                None => tokio::select! {
                    biased;
                    () = out.closed() => return,
                    () = wake.notified() => {}
                    () = self.api.changed.notified(), if !is_shut => {}
                    () = sleep_until(end) => {
                        if is_shut { pending::<()>().await }
                        return;
                    }
                },
            }
        }
    }

    async fn send_list(&self, kind: &'static str, out: &mpsc::Sender<Piece>) -> Option<u64> {
        let (version, from, objects, fault) = self.next_list(kind);
        let mut text = String::new();
        for object in objects.values() {
            text.push_str(&format!("{{\"type\":\"ADDED\",\"object\":{object}}}\n"));
        }
        if fault == Some(ListFault::Unfinished) {
            out.send(piece(&text)).await.ok()?;
            return None;
        }
        let annotations = json!({"k8s.io/initial-events-end": "true"});
        let metadata = json!({"resourceVersion": version.to_string(), "annotations": annotations});
        text.push_str(&format!(
            "{}\n",
            json!({"type": "BOOKMARK", "object": {"metadata": metadata}})
        ));
        out.send(piece(&text)).await.ok()?;
        Some(from)
    }

    async fn end(&self, cut: Cut, next: Option<Arc<str>>, out: &mpsc::Sender<Piece>) {
        // The reader may have gone already.
        let _ = match cut {
            Cut::End => return,
            Cut::Break => out.send(Err(io::ErrorKind::ConnectionReset.into())).await,
            Cut::HalfLine => {
                let line = next
                    .as_deref()
                    .unwrap_or("{\"type\":\"BOOKMARK\",\"object\":{}}\n");
                let _ = out.send(piece(&line[..line.len() / 2])).await;
                out.send(Err(io::ErrorKind::ConnectionReset.into())).await
            }
            Cut::Expired if self.run.has(Plant::IgnoredExpiry) => return,
            Cut::Expired => out.send(piece(&gone())).await,
        };
    }
}

/// Kind of a path, and the object if it is one's.
fn find(path: &str) -> Option<(&'static str, Option<Key>)> {
    for (kind, _, _, collection) in TABLE {
        if path == collection {
            return Some((kind, None));
        }
        let (group, plural) = collection.rsplit_once('/')?;
        let parts: Vec<&str> = path
            .strip_prefix(group)
            .unwrap_or_default()
            .split('/')
            .skip(1)
            .collect();
        match parts[..] {
            [found, name] if found == plural => return Some((kind, Some(Key::new("", name)))),
            ["namespaces", namespace, found, name] if found == plural => {
                return Some((kind, Some(Key::new(namespace, name))));
            }
            _ => {}
        }
    }
    None
}

fn gone() -> String {
    let status = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": 410,
        "message": "too old resource version",
    });
    format!("{}\n", json!({"type": "ERROR", "object": status}))
}

fn piece(text: &str) -> Piece {
    Ok(Frame::data(Bytes::copy_from_slice(text.as_bytes())))
}

fn full(code: StatusCode, text: String) -> Response<ApiBody> {
    let body = Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response
}

fn status(code: StatusCode, message: &str) -> Response<ApiBody> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": "", "code": code.as_u16()});
    full(code, status.to_string())
}
