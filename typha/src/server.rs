//! gRPC side of sessions: reads messages of nodes and hands frames to their streams.
//!
//! Each node has two independent halves, and neither waits for another node: a task reads hello,
//! acks and addresses; the stream sends the frame in its slot whenever the connection can take one.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, Response};
use margay_proto::sync::{
    Ack, MAX_UP, NodeProblem, Versions, decode_ack, decode_local_endpoint, decode_problems,
    decode_versions, wire,
};
use margay_runtime::clock::unix_ns;
use margay_runtime::telemetry::{self, Traceparent};
use margay_runtime::tls::Peer;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Status, Streaming};
use tower::Service;
use tracing::{debug, info_span, warn};

use crate::body::{FrameBody, FrameResult};
use crate::codec::UpDecoder;
use crate::event::Event;
use crate::hello::{Capabilities, Hello};
use crate::metrics::Counters;
use crate::pace::{HelloTurn, Hellos, MESSAGES, TokenBucket};
use crate::registry::{AckOutcome, NodeSession, Registry, SentFrame};

/// Prefix of the node's name in the CN of its certificate.
const NODE_PREFIX: &str = "margay:node:";
/// Maximal number of characters kept of an agent's version.
const MAX_VERSION: usize = 64;
/// Records of one ack that are logged as not enforceable; further ones are counted.
const MAX_LOGGED: usize = 16;

/// The service `margay.sync.v1.Sync`. Implemented by hand because frames are encoded already.
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
    /// Creates a service that sends events to the owner task; `hello` is the timeout for a node's
    /// first message.
    pub fn new(
        events: mpsc::Sender<Event>,
        registry: Registry,
        counters: Counters,
        hello: Duration,
    ) -> Self {
        let (sessions, hellos) = (AtomicU64::new(1), Mutex::default());
        Self(Arc::new(Inner {
            events,
            registry,
            counters,
            sessions,
            hellos,
            hello,
        }))
    }

    /// Opens the stream of a call of `Sync`.
    fn answer(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        if request.uri().path() != "/margay.sync.v1.Sync/Sync" {
            return Err(Status::unimplemented("margay.sync.v1.Sync has only Sync"));
        }
        let node = node_name(request.extensions().get())?;
        // Without an encoding: a compressed message is refused.
        let up = Streaming::new_request(UpDecoder, request.into_body(), None, Some(MAX_UP));
        let mut response = Response::new(Body::new(self.start_session(node, up)));
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        Ok(response)
    }

    fn start_session(&self, node: String, up: Streaming<wire::Up>) -> FrameBody {
        let (slot, frames) = mpsc::channel(1);
        let blocked = Arc::new(AtomicBool::new(false));
        let session = self.0.sessions.fetch_add(1, Ordering::Relaxed);
        let reader = Reader {
            inner: self.0.clone(),
            node: node.clone(),
            session,
        };
        self.0.counters.streams.inc();
        self.0.counters.open_streams.inc();
        // A task of its own, so that acks are read while the connection takes no frames.
        tokio::spawn(reader.run(up, slot, blocked.clone()));
        FrameBody::new(frames, blocked, self.0.events.clone(), node, session)
    }
}

/// Reads the messages of one node.
struct Reader {
    inner: Arc<Inner>,
    node: String,
    session: u64,
}

impl Reader {
    async fn run(
        self,
        mut up: Streaming<wire::Up>,
        slot: mpsc::Sender<FrameResult>,
        blocked: Arc<AtomicBool>,
    ) {
        match self.read_hello(&mut up).await {
            Ok((hello, versions)) => {
                // The owner task holds the only strong sender from here on: dropping it ends the
                // stream.
                let end = slot.downgrade();
                let hello = Hello {
                    node: self.node.clone(),
                    session: self.session,
                    agent_version: hello.agent_version.chars().take(MAX_VERSION).collect(),
                    buckets: hello.buckets,
                    versions,
                    has_alternatives: hello.has_alternatives,
                    capabilities: Capabilities {
                        host_endpoints: hello.host_endpoints,
                        bgp: hello.bgp,
                        compact: hello.compact,
                    },
                    slot,
                    blocked,
                };
                if let Err(status) = self.read(hello, &mut up).await {
                    self.end_with(status, end.upgrade());
                }
            }
            Err(Some(status)) => self.end_with(status, Some(slot)),
            Err(None) => {}
        }
        self.inner.counters.open_streams.dec();
        let gone = Event::Disconnected {
            node: self.node,
            session: self.session,
        };
        let _ = self.inner.events.send(gone).await;
    }

    fn end_with(&self, status: Status, slot: Option<mpsc::Sender<FrameResult>>) {
        self.inner.counters.stream_errors.inc();
        warn!(
            node = %self.node,
            reason = status.message(),
            "stream ended because of a message of the node",
        );
        if let Some(slot) = slot {
            // A node that does not read does not get the reason.
            let _ = slot.try_send(Err(status));
        }
    }

    /// Reads the first message; `Err(None)` if the connection has ended.
    async fn read_hello(
        &self,
        up: &mut Streaming<wire::Up>,
    ) -> Result<(wire::Hello, Versions), Option<Status>> {
        let first = tokio::time::timeout(self.inner.hello, up.message()).await;
        let first = first.map_err(|_| {
            let timeout = self.inner.hello;
            Status::deadline_exceeded(format!("no hello within {timeout:?}"))
        })?;
        let first = first.map_err(|status| connection_end(status).err())?;
        match first.and_then(|up| up.message) {
            Some(wire::up::Message::Hello(mut hello)) => {
                let versions = decode_versions(std::mem::take(&mut hello.versions));
                let versions = versions.map_err(|error| Some(invalid(error)))?;
                self.wait_for_turn().await.map(|()| (hello, versions))
            }
            _ => Err(Some(Status::invalid_argument(
                "the first message must be hello",
            ))),
        }
    }

    /// Waits until the node may send hello again.
    async fn wait_for_turn(&self) -> Result<(), Option<Status>> {
        let hellos = || self.inner.hellos.lock();
        let mut turn = hellos().arrive(&self.node, self.session, Instant::now().into_std());
        loop {
            match turn {
                HelloTurn::Now => return Ok(()),
                HelloTurn::After(wait) => tokio::time::sleep(wait).await,
                HelloTurn::Never => {
                    return Err(Some(Status::aborted("the node has opened another stream")));
                }
            }
            turn = hellos().retry(&self.node, self.session, Instant::now().into_std());
        }
    }

    /// Reads messages until the node closes its side or the connection ends.
    async fn read(&self, hello: Hello, up: &mut Streaming<wire::Up>) -> Result<(), Status> {
        self.send(Event::Hello(hello)).await?;
        let mut rate = TokenBucket::new(MESSAGES, Instant::now().into_std());
        loop {
            // While this waits, flow control holds back further messages of the node.
            let wait = rate.wait(Instant::now().into_std());
            if wait > Duration::ZERO {
                tokio::time::sleep(wait).await;
            }
            rate.consume(Instant::now().into_std());
            match up.message().await {
                Ok(Some(message)) => self.handle(message).await?,
                Ok(None) => return Ok(()),
                Err(status) => return connection_end(status),
            }
        }
    }

    async fn handle(&self, message: wire::Up) -> Result<(), Status> {
        match message.message {
            Some(wire::up::Message::Ack(ack)) => {
                self.handle_ack(&decode_ack(ack).map_err(invalid)?)
            }
            Some(wire::up::Message::LocalEndpoint(report)) => {
                let report = decode_local_endpoint(report).map_err(invalid)?;
                let node = self.node.clone();
                self.send(Event::LocalEndpoint { node, report }).await?;
            }
            Some(wire::up::Message::Problems(problems)) => {
                self.handle_problems(decode_problems(problems).map_err(invalid)?)
            }
            Some(wire::up::Message::Hello(_)) => {
                return Err(Status::invalid_argument("hello twice on one stream"));
            }
            // A message type of a later version.
            None => {}
        }
        Ok(())
    }

    fn handle_ack(&self, ack: &Ack) {
        // Acks of a session that has been replaced do not count.
        let Some(node) = self.inner.registry.get(&self.node, self.session) else {
            return;
        };
        let AckOutcome {
            done,
            new_errors,
            is_changed,
        } = node.record_ack(ack, Instant::now().into_std(), unix_ns());
        if is_changed {
            self.inner.registry.notify_problems();
        }
        // Of several frames that one ack covers, all but the last were enforced somewhat earlier.
        let (waited, waited_ns) = (
            Duration::from_micros(ack.waited_us),
            ack.waited_us.saturating_mul(1000),
        );
        for sent in &done {
            let counters = &self.inner.counters;
            counters
                .ack_seconds
                .observe(sent.at.elapsed().saturating_sub(waited).as_secs_f64());
            if sent.event_unix_ns > 0 {
                let took = unix_ns()
                    .saturating_sub(sent.event_unix_ns)
                    .saturating_sub(waited_ns);
                counters
                    .enforcement_seconds
                    .observe(Duration::from_nanos(took).as_secs_f64());
            }
        }
        if let Some(last) = done.last() {
            record_ack_span(&node, last, ack);
        }
        for (id, message) in new_errors.iter().take(MAX_LOGGED) {
            warn!(
                node = %self.node,
                revision = ack.revision,
                record = ?id,
                %message,
                "node cannot enforce a record",
            );
        }
        if let Some(more) = new_errors.len().checked_sub(MAX_LOGGED + 1) {
            warn!(
                node = %self.node,
                more = more + 1,
                "node cannot enforce more records; ListRecords lists them",
            );
        }
    }

    fn handle_problems(&self, problems: Vec<NodeProblem>) {
        for NodeProblem {
            code,
            message,
            degraded,
        } in self
            .inner
            .registry
            .set_problems(&self.node, self.session, problems)
        {
            warn!(node = %self.node, code, degraded, %message, "node reports a problem");
        }
    }

    async fn send(&self, event: Event) -> Result<(), Status> {
        let sent = self.inner.events.send(event).await;
        sent.map_err(|_| Status::unavailable("this replica shuts down; connect to another one"))
    }
}

/// Last span of a change's trace: the node has committed it to its kernel.
fn record_ack_span(node: &NodeSession, sent: &SentFrame, ack: &Ack) {
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
    span.in_scope(|| debug!(node = %node.name, revision = ack.revision, "revision enforced"));
}

/// Name of the node that a certificate identifies: its stream gets the view of this node and no
/// other.
fn node_name(peer: Option<&Peer>) -> Result<String, Status> {
    let peer = peer.ok_or_else(|| Status::unauthenticated("no client certificate"))?;
    match peer.common_name.strip_prefix(NODE_PREFIX) {
        Some(node) if !node.is_empty() => Ok(node.to_owned()),
        _ => Err(Status::permission_denied(format!(
            "certificate names {:?}; the CN of a node certificate is {NODE_PREFIX}NAME",
            peer.common_name
        ))),
    }
}

fn invalid(error: margay_proto::sync::Error) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Distinguishes messages that cannot be decoded, which are an error of the node, from the end of a
/// connection, which is not.
fn connection_end(status: Status) -> Result<(), Status> {
    match status.code() {
        tonic::Code::InvalidArgument | tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => {
            Err(status)
        }
        _ => Ok(()),
    }
}

impl NamedService for SyncService {
    const NAME: &'static str = "margay.sync.v1.Sync";
}

impl Service<Request<Body>> for SyncService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        ready(Ok(self.answer(request).unwrap_or_else(Status::into_http)))
    }
}
