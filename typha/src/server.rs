//! The gRPC side of sessions: reads what nodes say, hands frames to their streams.
//!
//! Two things happen per node, and neither waits for another node: a task reads hello, acks and addresses; the stream gives
//! the frame in its slot whenever the connection can take one.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use http::{Request, Response};
use margay_proto::sync::{Ack, MAX_UP, NodeProblem, decode_ack, decode_local_endpoint, decode_problems, wire};
use margay_runtime::telemetry::{self, Traceparent};
use margay_runtime::tls::Peer;
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Status, Streaming};
use tower::Service;
use tracing::{debug, info_span, warn};

use crate::codec::{FrameBytes, FrameCodec};
use crate::compute::Event;
use crate::hub::{Hello, Reads};
use crate::metrics::Counters;
use crate::pace::{Bucket, Hellos, MESSAGES, Turn};
use crate::registry::{Acked, Node, Registry, Sent};
use crate::watch::unix_ns;

/// CN of a node's certificate, before the node's name.
const NODE_PREFIX: &str = "margay:node:";
/// Characters of an agent's version that are remembered.
const VERSION: usize = 64;
/// Records of one ack that the log names because they cannot be enforced; the others are counted.
const LOGGED: usize = 16;

/// The service `margay.sync.v1.Sync`. Written by hand because frames are bytes already.
#[derive(Clone)]
pub struct SyncService(Arc<Inner>);

struct Inner {
    events: mpsc::Sender<Event>,
    registry: Registry,
    counters: Counters,
    sessions: AtomicU64,
    hellos: Mutex<Hellos>,
    hello: Duration,
}

impl SyncService {
    /// A service that feeds the owner task behind `events` and gives a node the time `hello` for its first message.
    pub fn new(events: mpsc::Sender<Event>, registry: Registry, counters: Counters, hello: Duration) -> Self {
        let (sessions, hellos) = (AtomicU64::new(1), Mutex::default());
        Self(Arc::new(Inner { events, registry, counters, sessions, hellos, hello }))
    }

    fn begin(&self, node: String, up: Streaming<wire::Up>) -> BoxStream<'static, Frame> {
        let (slot, frames) = mpsc::channel(1);
        let blocked = Arc::new(AtomicBool::new(false));
        let session = self.0.sessions.fetch_add(1, Ordering::Relaxed);
        let reader = Reader { inner: self.0.clone(), node: node.clone(), session };
        tokio::spawn(reader.run(up, slot, blocked.clone()));
        let events = self.0.events.clone();
        let outgoing = Outgoing { frames, parts: VecDeque::new(), blocked, events, node, session };
        stream::unfold(outgoing, Outgoing::next).boxed()
    }
}

type Frame = Result<FrameBytes, Status>;

/// What a node's stream takes frames from.
struct Outgoing {
    frames: mpsc::Receiver<Frame>,
    /// What is left of the frame that is being sent.
    parts: VecDeque<FrameBytes>,
    blocked: Arc<AtomicBool>,
    events: mpsc::Sender<Event>,
    node: String,
    session: u64,
}

impl Outgoing {
    async fn next(mut self) -> Option<(Frame, Self)> {
        if let Some(part) = self.parts.pop_front() {
            return Some((Ok(part), self));
        }
        let frame = self.frames.recv().await?;
        if self.blocked.swap(false, Ordering::SeqCst) {
            let ready = Event::Ready { node: self.node.clone(), session: self.session };
            // Without an owner task the slot's sender is gone too, and the stream ends.
            let _ = self.events.send(ready).await;
        }
        let first = frame.map(|frame| {
            self.parts = frame.into_messages().into();
            self.parts.pop_front().unwrap_or_default()
        });
        Some((first, self))
    }
}

/// Reads what one node says.
struct Reader {
    inner: Arc<Inner>,
    node: String,
    session: u64,
}

impl Reader {
    async fn run(self, mut up: Streaming<wire::Up>, slot: mpsc::Sender<Frame>, blocked: Arc<AtomicBool>) {
        match self.hello(&mut up).await {
            Ok(hello) => {
                // From here on only the owner task keeps the stream open.
                let end = slot.downgrade();
                let hello = Hello {
                    node: self.node.clone(),
                    session: self.session,
                    agent_version: hello.agent_version.chars().take(VERSION).collect(),
                    buckets: hello.buckets,
                    reads: Reads { host_endpoints: hello.host_endpoints, compact: hello.compact },
                    slot,
                    blocked,
                };
                if let Err(status) = self.read(hello, &mut up).await {
                    self.fault(status, end.upgrade());
                }
            }
            Err(Some(status)) => self.fault(status, Some(slot)),
            Err(None) => {}
        }
        let gone = Event::Gone { node: self.node, session: self.session };
        let _ = self.inner.events.send(gone).await;
    }

    fn fault(&self, status: Status, slot: Option<mpsc::Sender<Frame>>) {
        self.inner.counters.faults.inc();
        warn!(node = %self.node, reason = status.message(), "stream ended for what the node said");
        if let Some(slot) = slot {
            // A node that does not read does not see why.
            let _ = slot.try_send(Err(status));
        }
    }

    /// The first message; `Err(None)` when the connection has ended.
    async fn hello(&self, up: &mut Streaming<wire::Up>) -> Result<wire::Hello, Option<Status>> {
        let first = tokio::time::timeout(self.inner.hello, up.message()).await;
        let first = first.map_err(|_| {
            let patience = self.inner.hello;
            Status::deadline_exceeded(format!("no hello within {patience:?}"))
        })?;
        let first = first.map_err(|status| ended(status).err())?;
        match first.and_then(|up| up.message) {
            Some(wire::up::Message::Hello(hello)) => self.turn().await.map(|()| hello),
            _ => Err(Some(Status::invalid_argument("the first message must be hello"))),
        }
    }

    /// Waits until the node may say hello again.
    async fn turn(&self) -> Result<(), Option<Status>> {
        let hellos = || self.inner.hellos.lock().unwrap_or_else(PoisonError::into_inner);
        let mut turn = hellos().come(&self.node, self.session, Instant::now());
        loop {
            match turn {
                Turn::Now => return Ok(()),
                Turn::After(wait) => tokio::time::sleep(wait).await,
                Turn::Never => return Err(Some(Status::aborted("the node has opened another stream"))),
            }
            turn = hellos().again(&self.node, self.session, Instant::now());
        }
    }

    /// Ends well when the node has closed its side, or the connection has ended.
    async fn read(&self, hello: Hello, up: &mut Streaming<wire::Up>) -> Result<(), Status> {
        self.tell(Event::Hello(hello)).await?;
        let mut pace = Bucket::new(MESSAGES, Instant::now());
        loop {
            // Meanwhile the connection holds what the node says.
            let wait = pace.wait(Instant::now());
            if wait > Duration::ZERO {
                tokio::time::sleep(wait).await;
            }
            pace.take(Instant::now());
            match up.message().await {
                Ok(Some(message)) => self.take(message).await?,
                Ok(None) => return Ok(()),
                Err(status) => return ended(status),
            }
        }
    }

    async fn take(&self, message: wire::Up) -> Result<(), Status> {
        match message.message {
            Some(wire::up::Message::Ack(ack)) => self.acked(&decode_ack(ack).map_err(refused)?),
            Some(wire::up::Message::LocalEndpoint(said)) => {
                let said = decode_local_endpoint(said).map_err(refused)?;
                let node = self.node.clone();
                self.tell(Event::Local { node, said }).await?;
            }
            Some(wire::up::Message::Problems(problems)) => self.troubled(decode_problems(problems).map_err(refused)?),
            Some(wire::up::Message::Hello(_)) => {
                return Err(Status::invalid_argument("hello twice on one stream"));
            }
            // Of a later version.
            None => {}
        }
        Ok(())
    }

    fn acked(&self, ack: &Ack) {
        let Some(node) = self.inner.registry.get(&self.node, self.session) else {
            return;
        };
        let Acked { done, news, is_changed } = node.acked(ack);
        if is_changed {
            self.inner.registry.ring();
        }
        for sent in &done {
            let counters = &self.inner.counters;
            counters.ack_seconds.observe(sent.at.elapsed().as_secs_f64());
            if sent.event_unix_ns > 0 {
                let took = unix_ns().saturating_sub(sent.event_unix_ns);
                counters.realised_seconds.observe(Duration::from_nanos(took).as_secs_f64());
            }
        }
        if let Some(last) = done.last() {
            span(&node, last, ack);
        }
        for (id, message) in news.iter().take(LOGGED) {
            warn!(node = %self.node, revision = ack.revision, record = ?id, %message, "node cannot enforce a record");
        }
        if let Some(more) = news.len().checked_sub(LOGGED + 1) {
            warn!(node = %self.node, more = more + 1, "node cannot enforce more records; ListRecords tells which");
        }
    }

    fn troubled(&self, problems: Vec<NodeProblem>) {
        for NodeProblem { code, message, degraded } in self.inner.registry.troubled(&self.node, self.session, problems)
        {
            warn!(node = %self.node, code, degraded, %message, "something is wrong with a node");
        }
    }

    async fn tell(&self, event: Event) -> Result<(), Status> {
        let told = self.inner.events.send(event).await;
        told.map_err(|_| Status::unavailable("this replica goes away; say hello to another one"))
    }
}

/// The last span of a change's trace: the node has it in its kernel.
fn span(node: &Node, sent: &Sent, ack: &Ack) {
    let parent = ack.traceparent.parse::<Traceparent>().ok().or(sent.trace);
    let Some(parent) = parent else { return };
    let span = info_span!(
        "ack",
        node = %node.name,
        revision = ack.revision,
        plan_us = ack.plan_us,
        commit_us = ack.commit_us,
        since_sent_us = sent.at.elapsed().as_micros() as u64,
        errors = ack.errors.len(),
    );
    telemetry::set_parent(&span, parent);
    span.in_scope(|| debug!(node = %node.name, revision = ack.revision, "realised"));
}

/// The node that a certificate is for: it gets this node's view and no other.
fn node_name(peer: Option<&Peer>) -> Result<String, Status> {
    let peer = peer.ok_or_else(|| Status::unauthenticated("there is no client certificate"))?;
    match peer.common_name.strip_prefix(NODE_PREFIX) {
        Some(node) if !node.is_empty() => Ok(node.to_owned()),
        _ => Err(Status::permission_denied(format!(
            "certificate names {:?}; the CN of a node's is {NODE_PREFIX}NAME",
            peer.common_name
        ))),
    }
}

fn refused(error: margay_proto::sync::Error) -> Status {
    Status::invalid_argument(error.to_string())
}

/// A message that cannot be decoded is the node's fault; a connection that ends is nobody's.
fn ended(status: Status) -> Result<(), Status> {
    match status.code() {
        tonic::Code::InvalidArgument | tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => Err(status),
        _ => Ok(()),
    }
}

impl NamedService for SyncService {
    const NAME: &'static str = "margay.sync.v1.Sync";
}

type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl Service<Request<Body>> for SyncService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != "/margay.sync.v1.Sync/Sync" {
                return Ok(Status::unimplemented("margay.sync.v1.Sync has only Sync").into_http());
            }
            let mut grpc = Grpc::new(FrameCodec).max_decoding_message_size(MAX_UP);
            Ok(grpc.streaming(Method(service), request).await)
        })
    }
}

/// The method `Sync`.
struct Method(SyncService);

impl StreamingService<wire::Up> for Method {
    type Response = FrameBytes;
    type ResponseStream = BoxStream<'static, Frame>;
    type Future = Answer<Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<wire::Up>>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move {
            let node = node_name(request.extensions().get())?;
            Ok(tonic::Response::new(service.begin(node, request.into_inner())))
        })
    }
}
