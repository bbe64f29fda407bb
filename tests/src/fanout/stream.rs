//! The stream of one node, which reconnects when it ends, and what was measured on it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use futures::FutureExt;
use margay_calc::digest;
use margay_calc::model::{Record, RecordId};
use margay_node::upstream::acks::send_acks;
use margay_proto::sync::{Ack, Change, Frame, Joiner, MAX_FRAME, Versions, encode_versions, wire};
use margay_runtime::tls::{Connector, Tls};
use parking_lot::Mutex;
use prost::Message;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::transport::Channel;

use super::clock::now_ns;
use super::identity::SERVER;
use super::rebroadcast::{self, ObjectMessage};
use super::wire::{Glance, RawFrames, decode, events};

/// Path of the call.
const PATH: &str = "/margay.sync.v1.Sync/Sync";
/// Pings, as an agent's.
const PING: Duration = Duration::from_secs(10);
/// First and longest time between two attempts to connect, as an agent's.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Times of a run's events, which all nodes share.
#[derive(Debug, Default)]
pub struct Schedule {
    first: AtomicU32,
    start_ns: AtomicU64,
    interval_ns: AtomicU64,
}

impl Schedule {
    /// Sets the number of the first event, its time and the time between two.
    pub fn set(&self, first: u32, start_ns: u64, interval_ns: u64) {
        self.first.store(first, Ordering::Relaxed);
        self.interval_ns.store(interval_ns, Ordering::Relaxed);
        self.start_ns.store(start_ns, Ordering::Release);
    }

    /// Time since the event was scheduled, in nanoseconds; `None` for one of an earlier run.
    fn age(&self, event: u32, now: u64) -> Option<u64> {
        let start = self.start_ns.load(Ordering::Acquire);
        let place = event.checked_sub(self.first.load(Ordering::Relaxed))?;
        Some(
            now.saturating_sub(start + u64::from(place) * self.interval_ns.load(Ordering::Relaxed)),
        )
    }
}

/// How much of the frames a node reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// The trailer.
    Glance,
    /// Everything, for latencies.
    Decode,
    /// Everything, and it holds its view, so that it can resume.
    Hold,
}

/// What all nodes of a process share.
#[derive(Debug)]
pub struct RunState {
    /// Times of events.
    pub schedule: Schedule,
    /// Ports of servers, in order of preference.
    pub ports: watch::Sender<Vec<u16>>,
    /// The servers rebroadcast.
    pub rebroadcast: bool,
}

/// What was measured on one node.
#[derive(Debug, Default)]
pub struct Measured {
    /// Time at which the node was last in sync; 0 before.
    pub synced_ns: AtomicU64,
    /// The stream is open and in sync.
    pub is_synced: AtomicBool,
    /// Times the node came in sync.
    pub syncs: AtomicU64,
    /// Frames received.
    pub frames: AtomicU64,
    /// Bytes of frames received.
    pub bytes: AtomicU64,
    /// Bytes received on the last stream until in sync.
    pub sync_bytes: AtomicU64,
    /// Number of the last event heard of.
    pub last_event: AtomicU32,
    /// Latencies, in nanoseconds.
    pub latencies: Mutex<Vec<u64>>,
}

/// One node.
pub struct SimulatedNode {
    /// Its certificate.
    pub tls: Tls,
    /// How much it reads.
    pub depth: Depth,
    /// What all share.
    pub common: Arc<RunState>,
    /// What is measured.
    pub measured: Arc<Measured>,
    held: BTreeMap<RecordId, Record>,
    versions: Versions,
}

impl SimulatedNode {
    /// A node that holds nothing.
    pub fn new(tls: Tls, depth: Depth, common: Arc<RunState>, measured: Arc<Measured>) -> Self {
        Self {
            tls,
            depth,
            common,
            measured,
            held: BTreeMap::new(),
            versions: Versions::new(),
        }
    }

    /// Connects, and again whenever the stream ends.
    pub async fn run(mut self, number: usize) {
        let mut ports = self.common.ports.subscribe();
        let mut wait = RETRY.0;
        for attempt in number.. {
            let port = {
                let Ok(ports) = ports.wait_for(|ports| !ports.is_empty()).await else {
                    return;
                };
                ports[attempt % ports.len()]
            };
            let syncs = self.measured.syncs.load(Ordering::Relaxed);
            let ended = if self.common.rebroadcast {
                self.follow(port).await
            } else {
                self.stream(port).await
            };
            self.measured.is_synced.store(false, Ordering::Relaxed);
            if let Err(error) = ended {
                tracing::debug!(number, port, "{error:#}");
            }
            if self.measured.syncs.load(Ordering::Relaxed) > syncs {
                wait = RETRY.0;
            }
            // Spread like an agent's, but the same in every run.
            tokio::time::sleep(wait.mul_f64(0.5 + (number % 64) as f64 / 128.0)).await;
            wait = (wait * 2).min(RETRY.1);
        }
    }

    fn connector(&self, port: u16) -> Result<Connector> {
        Ok(Connector::new(
            self.tls.clone(),
            &format!("127.0.0.1:{port}"),
            SERVER,
        )?)
    }

    /// Runs one stream to its end.
    async fn stream(&mut self, port: u16) -> Result<()> {
        let connector = self.connector(port)?;
        let endpoint = connector
            .endpoint()
            .http2_keep_alive_interval(PING)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_with_connector(connector).await?;
        let buckets = match self.depth {
            Depth::Hold => digest::buckets(self.held.iter()).to_vec(),
            Depth::Glance | Depth::Decode => Vec::new(),
        };
        let (up, mut frames) = open(channel, buckets, &self.versions).await?;
        let (mut bytes, mut parts) = (0, Joiner::default());
        let (acks, published) = watch::channel(None);
        tokio::spawn(send_acks(published, up));
        loop {
            let Some(message) = frames.message().await? else {
                return Ok(());
            };
            let mut glance = self.receive(&message, &mut parts, &mut bytes)?;
            // An agent that commits several frames at once acknowledges the last one.
            while let Some(next) = frames.message().now_or_never() {
                let Some(message) = next? else { return Ok(()) };
                glance = self.receive(&message, &mut parts, &mut bytes)?;
            }
            if !glance.more {
                let ack = Ack {
                    revision: glance.revision,
                    ..Ack::default()
                };
                acks.send_replace(Some(Arc::new(ack)));
            }
        }
    }

    fn receive(&mut self, message: &Bytes, parts: &mut Joiner, bytes: &mut u64) -> Result<Glance> {
        let glance = Glance::of(message)?;
        *bytes += message.len() as u64;
        self.measured
            .bytes
            .fetch_add(message.len() as u64, Ordering::Relaxed);
        self.measured
            .frames
            .fetch_add(u64::from(!glance.more), Ordering::Relaxed);
        if self.depth != Depth::Glance
            && let Some(frame) = decode(message, parts)?
        {
            self.record(events(&frame));
            if self.depth == Depth::Hold {
                self.versions.extend(frame.trailer.versions.clone());
                apply(&mut self.held, frame);
            }
        }
        if glance.in_sync {
            self.measured.sync_bytes.store(*bytes, Ordering::Relaxed);
            self.mark_synced();
        }
        Ok(glance)
    }

    /// Records the latencies of events that the node has not heard of before.
    fn record(&self, events: std::collections::BTreeSet<u32>) {
        let (now, known) = (now_ns(), self.measured.last_event.load(Ordering::Relaxed));
        let mut latencies = self.measured.latencies.lock();
        for event in events {
            // Numbers start at 0, so one is added to tell the first from none.
            if event + 1 > known
                && let Some(age) = self.common.schedule.age(event, now)
            {
                latencies.push(age);
            }
            self.measured
                .last_event
                .fetch_max(event + 1, Ordering::Relaxed);
        }
    }

    fn mark_synced(&self) {
        self.measured.synced_ns.store(now_ns(), Ordering::Relaxed);
        self.measured.is_synced.store(true, Ordering::Relaxed);
        self.measured.syncs.fetch_add(1, Ordering::Relaxed);
    }

    /// Follows a server that rebroadcasts.
    async fn follow(&mut self, port: u16) -> Result<()> {
        let stream = self.connector(port)?.connect().await?;
        let (read, mut write) = tokio::io::split(stream);
        let mut read = tokio::io::BufReader::with_capacity(32 << 10, read);
        loop {
            let frame = rebroadcast::receive(&mut read).await?;
            self.measured
                .bytes
                .fetch_add(frame.len() as u64, Ordering::Relaxed);
            self.measured.frames.fetch_add(1, Ordering::Relaxed);
            let object = ObjectMessage::decode(&*frame)?;
            if object.revision == 0 {
                continue;
            }
            if !self.measured.is_synced.load(Ordering::Relaxed) {
                let bytes = self.measured.bytes.load(Ordering::Relaxed);
                self.measured.sync_bytes.store(bytes, Ordering::Relaxed);
                self.mark_synced();
            }
            if self.depth != Depth::Glance {
                self.record(rebroadcast_event(&object).into_iter().collect());
            }
            write.write_u64(object.revision).await?;
            write.flush().await?;
        }
    }
}

fn rebroadcast_event(object: &ObjectMessage) -> Option<u32> {
    let value: serde_json::Value = serde_json::from_slice(&object.value).ok()?;
    let address = value["addresses"][0].as_str()?.parse().ok()?;
    super::model::event_of(address)
}

type Opened = (mpsc::Sender<wire::Up>, tonic::Streaming<Bytes>);

/// Opens a stream and sends hello.
pub async fn open(channel: Channel, buckets: Vec<u64>, versions: &Versions) -> Result<Opened> {
    let (up, outgoing) = mpsc::channel(16);
    let agent_version = env!("CARGO_PKG_VERSION").to_owned();
    let hello = wire::Hello {
        agent_version,
        buckets,
        host_endpoints: true,
        bgp: true,
        compact: true,
        versions: encode_versions(versions),
        ..wire::Hello::default()
    };
    up.send(wire::Up {
        message: Some(wire::up::Message::Hello(hello)),
    })
    .await?;
    let mut client = Grpc::new(channel).max_decoding_message_size(MAX_FRAME);
    client.ready().await.context("the connection")?;
    let request = tonic::Request::new(ReceiverStream::new(outgoing));
    let answer = client.streaming(request, PATH.parse()?, RawFrames).await?;
    Ok((up, answer.into_inner()))
}

/// Applies a frame to records.
fn apply(held: &mut BTreeMap<RecordId, Record>, frame: Frame) {
    let mut sent = std::collections::BTreeSet::new();
    for change in frame.changes {
        match change {
            Change::Upsert(id, record) => {
                sent.insert(id.clone());
                held.insert(id, record);
            }
            Change::Remove(id) => drop(held.remove(&id)),
            Change::Members(set, _, delta) => {
                if let Some(Record::IpSet(record)) = held.get_mut(&RecordId::IpSet(set)) {
                    record
                        .members
                        .retain(|member| !delta.removed.contains(member));
                    record.members.extend(delta.added);
                }
            }
        }
    }
    if frame.trailer.in_sync {
        let resent = &frame.trailer.restated_buckets;
        held.retain(|id, _| sent.contains(id) || !resent.contains(&digest::bucket(id)));
    }
}
