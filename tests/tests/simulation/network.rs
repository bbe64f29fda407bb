//! The network between one node and the replicas: streams that are late, slow, cut in the middle of
//! a frame, or half open. What passes is looked at message by message.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures::stream;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use margay_node::agent::AgentHandle;
use margay_node::upstream::Connect;
use margay_proto::sync::decode_versions;
use margay_proto::sync::wire::{self, up};
use margay_runtime::tls::Peer;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::StdError;
use tower::Service;

use crate::frames::Mirror;
use crate::kernel::{Kernel, Source};
use crate::oracle;
use crate::plant::Plant;
use crate::replica::{Place, Process};
use crate::run::Run;

/// Bytes before each message of gRPC: a flag and the length.
const PREFIX: usize = 5;
/// Time after which an attempt to connect to what does not answer ends.
const CONNECT: Duration = Duration::from_secs(3);
/// Maximal time for which one side of a dead connection believes that it lives, as pings find out.
const HALF_OPEN: u64 = 20_000;

type Piece = Result<Frame<Bytes>, Status>;

/// One connection.
struct Conn {
    number: u64,
    replica: usize,
    /// What the process behind it may know.
    oracle: oracle::Shared,
    is_cut: AtomicBool,
    /// The cut is in the middle of a frame.
    is_torn: AtomicBool,
    up: Notify,
    down: Notify,
    /// Time until the server notices its end.
    linger: Duration,
    /// Newest revision that the node got.
    delivered: AtomicU64,
}

struct State {
    dice: fastrand::Rng,
    preferred: usize,
    /// Replicas that cannot be reached.
    is_apart: Vec<bool>,
    is_slow: bool,
    conn: Option<Arc<Conn>>,
    conns: u64,
    agent: Option<AgentHandle>,
    mirror: Mirror,
    last: Option<Bytes>,
}

/// A node's way to the replicas.
pub struct Line {
    run: Run,
    name: String,
    places: Vec<Place>,
    kernel: Arc<Mutex<Kernel>>,
    state: Mutex<State>,
}

/// Connects over a line.
pub struct LineConnector(pub Arc<Line>);

impl Line {
    /// Creates a line of that node.
    pub fn new(run: &Run, name: &str, places: &[Place], kernel: &Arc<Mutex<Kernel>>) -> Arc<Self> {
        let state = State {
            dice: run.dice(name),
            preferred: kernel.lock().node % places.len(),
            is_apart: vec![false; places.len()],
            is_slow: false,
            conn: None,
            conns: 0,
            agent: None,
            mirror: Mirror::default(),
            last: None,
        };
        let (run, name, places, kernel) = (
            run.clone(),
            name.to_owned(),
            places.to_vec(),
            kernel.clone(),
        );
        Arc::new(Self {
            run,
            name,
            places,
            kernel,
            state: Mutex::new(state),
        })
    }

    /// Sets the agent whose line it is.
    pub fn set_agent(&self, agent: Option<AgentHandle>) {
        self.state.lock().agent = agent;
    }

    /// Cuts the connection, whichever replica it leads to, or only if it leads to that one.
    pub fn cut(&self, replica: Option<usize>, is_torn: bool) {
        let state = self.state.lock();
        let conn = state
            .conn
            .as_ref()
            .filter(|conn| replica.is_none_or(|replica| conn.replica == replica));
        if let Some(conn) = conn {
            self.run.note(&self.name, || {
                format!(
                    "connection {} is cut{}",
                    conn.number,
                    if is_torn { " in a frame" } else { "" }
                )
            });
            conn.is_torn.fetch_or(is_torn, Ordering::SeqCst);
            conn.is_cut.fetch_or(!is_torn, Ordering::SeqCst);
            conn.wake();
        }
    }

    /// Parts the node from a replica, or joins them: what is under way waits.
    pub fn set_apart(&self, replica: usize, is_apart: bool) {
        let mut state = self.state.lock();
        state.is_apart[replica] = is_apart;
        state.conn.iter().for_each(|conn| conn.wake());
    }

    /// The node reads nothing for now, or does again.
    pub fn set_slow(&self, is_slow: bool) {
        let mut state = self.state.lock();
        state.is_slow = is_slow;
        state.conn.iter().for_each(|conn| conn.wake());
    }

    /// Sends the node to another replica.
    pub fn switch(&self) {
        let to = {
            let mut state = self.state.lock();
            let current = state
                .conn
                .as_ref()
                .map_or(state.preferred, |conn| conn.replica);
            state.preferred = (current + 1) % self.places.len();
            state.preferred
        };
        self.run
            .note(&self.name, || format!("goes to replica {to}"));
        self.cut(None, false);
    }

    /// From now on everything is as it should be.
    pub fn heal(&self) {
        self.set_slow(false);
        (0..self.places.len()).for_each(|replica| self.set_apart(replica, false));
    }

    /// Replica and number of the connection, and the number of changes with which it began.
    pub fn connection(&self) -> Option<(usize, u64, usize)> {
        let state = self.state.lock();
        let conn = state
            .conn
            .as_ref()
            .filter(|conn| conn.delivered.load(Ordering::SeqCst) > 0)?;
        Some((conn.replica, conn.number, state.mirror.resent))
    }

    fn delay(&self) -> Duration {
        let dice = &mut self.state.lock().dice;
        Duration::from_millis(if dice.bool() { 0 } else { dice.u64(1..20) })
    }

    fn is_apart(&self, replica: usize) -> bool {
        self.state.lock().is_apart[replica]
    }

    /// Replica to connect to: the preferred one, unless the last attempt there failed.
    fn choose(&self) -> usize {
        self.state.lock().preferred
    }

    fn choose_next(&self) {
        let mut state = self.state.lock();
        state.preferred = (state.preferred + 1) % self.places.len();
    }

    fn open(&self, replica: usize, oracle: oracle::Shared) -> Arc<Conn> {
        let mut state = self.state.lock();
        state.conns += 1;
        let linger = if state.dice.bool() {
            0
        } else {
            state.dice.u64(0..HALF_OPEN)
        };
        let conn = Arc::new(Conn {
            number: state.conns,
            replica,
            oracle,
            is_cut: AtomicBool::new(false),
            is_torn: AtomicBool::new(false),
            up: Notify::new(),
            down: Notify::new(),
            linger: Duration::from_millis(linger),
            delivered: AtomicU64::new(0),
        });
        state.conn = Some(conn.clone());
        self.run.note(&self.name, || {
            format!("connection {} to replica {replica}", conn.number)
        });
        conn
    }

    /// Waits while the replica cannot be reached; returns false once the connection is cut.
    async fn pass(&self, conn: &Conn, wake: &Notify) -> bool {
        sleep(self.delay()).await;
        while self.is_apart(conn.replica) && !conn.is_cut() {
            wake.notified().await;
        }
        !conn.is_cut()
    }

    /// Takes messages of the node to the server.
    async fn carry_up(self: Arc<Self>, conn: Arc<Conn>, up: Body, out: mpsc::Sender<Piece>) {
        let mut messages = Messages::new(up);
        loop {
            let next = tokio::select! {
                biased;
                () = conn.up.notified() => match conn.is_cut() { true => break, false => continue },
                next = messages.next() => next,
            };
            let Some(Ok(message)) = next else { break };
            if !self.pass(&conn, &conn.up).await {
                break;
            }
            if !self.look_up(&conn, &message).await {
                continue;
            }
            let message = self.tamper_up(message);
            if out.send(Ok(Frame::data(framed(&message)))).await.is_err() {
                return;
            }
        }
        // The server learns of it later.
        sleep(conn.linger).await;
    }

    /// Looks at a message of the node; returns false if it gets lost.
    async fn look_up(&self, conn: &Conn, message: &[u8]) -> bool {
        match wire::Up::decode(message).ok().and_then(|up| up.message) {
            Some(up::Message::Hello(hello)) => {
                let agent = self.state.lock().agent.clone();
                let records = match agent {
                    Some(agent) => agent.inspect(|state, _| state.records().clone()).await,
                    None => None,
                };
                let versions = decode_versions(hello.versions).unwrap_or_default();
                self.state.lock().mirror = Mirror::of(records.unwrap_or_default(), versions);
                let (oracle, since) = (conn.oracle.clone(), conn.oracle.lock().newest());
                self.kernel.lock().sources.push(Source { oracle, since });
                true
            }
            Some(up::Message::Ack(ack)) => {
                let delivered = conn.delivered.load(Ordering::SeqCst);
                if ack.revision > delivered {
                    let revision = ack.revision;
                    self.run.fail(
                        &self.name,
                        format_args!("acknowledges {revision}, but got no more than {delivered}"),
                    );
                }
                !self.run.has(Plant::LostAck)
            }
            _ => true,
        }
    }

    /// The message that comes instead of this one of the node.
    fn tamper_up(&self, message: Bytes) -> Bytes {
        match wire::Up::decode(&*message).ok().and_then(|up| up.message) {
            Some(up::Message::Hello(mut hello)) if self.run.has(Plant::ForgottenVersions) => {
                hello.versions.clear();
                let message = Some(up::Message::Hello(hello));
                wire::Up { message }.encode_to_vec().into()
            }
            _ => message,
        }
    }

    /// Takes frames to the node.
    async fn carry_down(self: Arc<Self>, conn: Arc<Conn>, down: Body, out: mpsc::Sender<Piece>) {
        let mut messages = Messages::new(down);
        loop {
            let is_slow = self.state.lock().is_slow;
            let next = tokio::select! {
                biased;
                () = conn.down.notified() => match conn.is_cut() {
                    true => break,
                    false => continue,
                },
                () = out.closed() => break,
                next = messages.next(), if !is_slow => next,
            };
            let Some(message) = next else {
                let trailers = messages.trailers.take().unwrap_or_default();
                // Behind the Service there are other replicas than the one that refuses.
                if conn.delivered.load(Ordering::SeqCst) == 0 {
                    self.choose_next();
                }
                let _ = out.send(Ok(Frame::trailers(trailers))).await;
                return;
            };
            let message = match message {
                Ok(message) => message,
                Err(status) => {
                    let _ = out.send(Err(status)).await;
                    return;
                }
            };
            // A node that has gone on to another stream gets nothing of this one.
            if !self.pass(&conn, &conn.down).await || out.is_closed() {
                break;
            }
            if conn.is_torn.load(Ordering::SeqCst) {
                let bytes = framed(&message);
                let _ = out
                    .send(Ok(Frame::data(bytes.slice(..bytes.len() / 2))))
                    .await;
                conn.is_cut.store(true, Ordering::SeqCst);
                conn.wake();
                break;
            }
            for message in self.tamper(&conn, message) {
                self.look_down(&conn, &message);
                if out.send(Ok(Frame::data(framed(&message)))).await.is_err() {
                    break;
                }
            }
        }
        // The node notices at once, the server later.
        let _ = out.send(Err(Status::unavailable("connection reset"))).await;
        drop(out);
        sleep(conn.linger).await;
    }

    fn look_down(&self, conn: &Conn, message: &[u8]) {
        let taken = self.state.lock().mirror.take(message);
        match taken {
            Ok(Some(revision)) => {
                self.run.note(&self.name, || {
                    format!("gets revision {revision} over connection {}", conn.number)
                });
                conn.delivered.store(revision, Ordering::SeqCst);
            }
            Ok(None) => {}
            Err(error) => self.run.fail(&self.name, error),
        }
    }

    /// The messages that come instead of this one.
    fn tamper(&self, conn: &Conn, message: Bytes) -> Vec<Bytes> {
        let Ok(mut frame) = wire::Frame::decode(&*message) else {
            return vec![message];
        };
        let is_first = frame.in_sync;
        let former = self.state.lock().last.replace(message.clone());
        let is_removal =
            |change: &wire::Change| matches!(change.change, Some(wire::change::Change::Remove(_)));
        if self.run.has(Plant::RemovalsFirst) {
            frame.changes.sort_by_key(|change| !is_removal(change));
        } else if self.run.has(Plant::TornFrame) && frame.changes.len() > 1 {
            frame.changes.pop();
        } else if self.run.has(Plant::LostFrame) && !is_first && frame.revision % 3 == 0 {
            return Vec::new();
        } else if self.run.has(Plant::SkippedBucket)
            && is_first
            && conn.number > 1
            && !frame.changes.is_empty()
        {
            skip_bucket(&mut frame);
        } else if self.run.has(Plant::RepeatedFrame) && !is_first {
            return vec![message.clone(), message];
        } else if self.run.has(Plant::StaleStream) && is_first {
            return [Some(message), former].into_iter().flatten().collect();
        } else {
            return vec![message];
        }
        vec![frame.encode_to_vec().into()]
    }
}

/// As if the bucket of the frame's last record were the same on both sides.
fn skip_bucket(frame: &mut wire::Frame) {
    let bucket = |change: &wire::Change| match margay_proto::sync::decode_change(change.clone()) {
        Ok(margay_proto::sync::Change::Upsert(id, _)) => Some(margay_calc::digest::bucket(&id)),
        _ => None,
    };
    if let Some(skipped) = frame.changes.last().and_then(bucket) {
        frame
            .changes
            .retain(|change| bucket(change) != Some(skipped));
        frame
            .restated_buckets
            .retain(|restated| *restated != skipped);
    }
}

impl Conn {
    fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::SeqCst)
    }

    fn wake(&self) {
        self.up.notify_one();
        self.down.notify_one();
    }
}

impl Connect for LineConnector {
    type Channel = Channel;

    async fn connect(&self, _: &str) -> Result<Channel, StdError> {
        let line = self.0.clone();
        sleep(line.delay()).await;
        let replica = line.choose();
        let is_running = line.places[replica]
            .lock()
            .as_ref()
            .is_some_and(Process::is_running);
        if line.is_apart(replica) {
            line.choose_next();
            sleep(CONNECT).await;
            return Err("no answer".into());
        }
        if !is_running {
            line.choose_next();
            return Err("connection refused".into());
        }
        Ok(Channel { line, replica })
    }
}

/// A connection as the client has it.
pub struct Channel {
    line: Arc<Line>,
    replica: usize,
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = StdError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, StdError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), StdError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (line, replica) = (self.line.clone(), self.replica);
        Box::pin(async move {
            let process = line.places[replica]
                .lock()
                .as_ref()
                .map(|process| (process.service.clone(), process.oracle.clone()));
            let (mut service, oracle) = process.ok_or("connection reset")?;
            let conn = line.open(replica, oracle);
            let (mut head, up) = request.into_parts();
            let common_name = format!("margay:node:{}", line.name);
            head.extensions.insert(Peer {
                common_name,
                organization: "margay:nodes".to_owned(),
            });
            let (out, pieces) = mpsc::channel(1);
            tokio::spawn(line.clone().carry_up(conn.clone(), up, out));
            let response = service.call(Request::from_parts(head, body(pieces))).await;
            let (head, down) = response
                .unwrap_or_else(|never: Infallible| match never {})
                .into_parts();
            let (out, pieces) = mpsc::channel(1);
            tokio::spawn(line.carry_down(conn, down, out));
            Ok(Response::from_parts(head, body(pieces)))
        })
    }
}

fn body(pieces: mpsc::Receiver<Piece>) -> Body {
    Body::new(StreamBody::new(stream::unfold(
        pieces,
        |mut pieces| async move { Some((pieces.recv().await?, pieces)) },
    )))
}

fn framed(message: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(PREFIX + message.len());
    bytes.extend_from_slice(&[0]);
    bytes.extend_from_slice(
        &u32::try_from(message.len())
            .unwrap_or(u32::MAX)
            .to_be_bytes(),
    );
    bytes.extend_from_slice(message);
    bytes.freeze()
}

/// Messages of a body.
struct Messages {
    body: Body,
    buffer: BytesMut,
    complete: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
}

impl Messages {
    fn new(body: Body) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            complete: VecDeque::new(),
            trailers: None,
        }
    }

    /// The next one; nothing is lost if this is not awaited to its end.
    async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        loop {
            if let Some(message) = self.complete.pop_front() {
                return Some(Ok(message));
            }
            match self.body.frame().await? {
                Ok(frame) => match frame.into_data() {
                    Ok(data) => self.buffer.extend_from_slice(&data),
                    Err(other) => self.trailers = other.into_trailers().ok(),
                },
                Err(status) => return Some(Err(status)),
            }
            while let Some(length) = self.buffer.get(1..PREFIX) {
                let length = length
                    .iter()
                    .fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
                if self.buffer.len() < PREFIX + length {
                    break;
                }
                self.buffer.advance(PREFIX);
                self.complete
                    .push_back(self.buffer.split_to(length).freeze());
            }
        }
    }
}
