//! Packets of a pod as a file that tcpdump reads: of pods of this node only, and bounded in time
//! and bytes. Callers need a certificate of their own for it, because packets hold what users say.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use margay_api::endpoint::EndpointKey;
use margay_netlink::tap::Tap;
use margay_proto::debug::capture_server::Capture;
use margay_proto::debug::{CaptureChunk, CaptureRequest};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::agent::AgentHandle;

/// Captures that run at the same time on a node.
const CONCURRENT: usize = 2;
/// Bounds of a capture.
const MAX_SECONDS: u32 = 600;
const MAX_BYTES: u64 = 256 << 20;
const MAX_SNAP: u32 = 65_535;
/// Bytes of a chunk, after which it is sent.
const CHUNK: usize = 64 << 10;
/// Time after which it is looked whether the caller has gone, while there are no packets.
const LOOK: Duration = Duration::from_millis(500);
/// Chunks that a slow caller may leave unread; the kernel drops frames then.
const QUEUE: usize = 4;
/// Head of a file: times in nanoseconds, frames of Ethernet (pcap, version 2.4).
const MAGIC: u32 = 0xa1b2_3c4d;
const VERSION: [u16; 2] = [2, 4];
const ETHERNET: u32 = 1;

/// Implementation of the service.
pub struct CaptureService {
    agent: AgentHandle,
    running: Arc<Semaphore>,
}

impl CaptureService {
    /// A service for the pods of this agent.
    pub fn new(agent: AgentHandle) -> Self {
        Self {
            agent,
            running: Arc::new(Semaphore::new(CONCURRENT)),
        }
    }
}

/// Bounds of a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bounds {
    time: Duration,
    bytes: u64,
    snap: usize,
}

impl Bounds {
    /// Checks what is asked for; 0 is the most that is allowed.
    fn parse(request: &CaptureRequest) -> Result<Self, String> {
        let within = |field: &str, value: u64, most: u64| match value {
            0 => Ok(most),
            value if value <= most => Ok(value),
            value => Err(format!("{field}: {value}: at most {most}")),
        };
        let seconds = within("seconds", request.seconds.into(), MAX_SECONDS.into())?;
        let snap = within("snap_length", request.snap_length.into(), MAX_SNAP.into())?;
        Ok(Self {
            time: Duration::from_secs(seconds),
            bytes: within("bytes", request.bytes, MAX_BYTES)?,
            snap: usize::try_from(snap).unwrap_or(usize::MAX),
        })
    }
}

#[tonic::async_trait]
impl Capture for CaptureService {
    type RecordStream = ReceiverStream<Result<CaptureChunk, Status>>;

    async fn record(
        &self,
        request: Request<CaptureRequest>,
    ) -> Result<Response<Self::RecordStream>, Status> {
        let request = request.into_inner();
        let bounds = Bounds::parse(&request).map_err(Status::invalid_argument)?;
        let permit = Arc::clone(&self.running).try_acquire_owned();
        let permit = permit.map_err(|_| {
            Status::resource_exhausted(format!(
                "{CONCURRENT} captures run on this node already; wait for their end"
            ))
        })?;
        let key = EndpointKey::new(request.namespace.as_str(), request.name.as_str());
        let subject = key.to_string();
        let found = self.agent.inspect(move |_, dataplane| {
            let mut attached = dataplane.attached().iter();
            let found = attached.find(|(_, attached)| attached.endpoint == key);
            found.map(|(interface, _)| interface.clone())
        });
        let found = found.await;
        let found = found.ok_or_else(|| Status::unavailable("the agent is ending"))?;
        let interface = found.ok_or_else(|| {
            Status::not_found(format!("no pod {subject} has an interface on this node"))
        })?;
        let failed = |error: io::Error| Status::internal(format!("link {interface}: {error}"));
        let tap = Tap::open(&interface).map_err(failed)?;
        // Whoever looks into pods is on record.
        tracing::warn!(pod = subject, ?bounds, "packets of a pod are captured");
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = capture(&tap, bounds, &sender) {
                // The caller may have gone.
                let _ = sender.blocking_send(Err(Status::aborted(error.to_string())));
            }
            drop(permit);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// Sends frames until a bound is reached or the caller has gone.
fn capture(
    tap: &Tap,
    bounds: Bounds,
    sender: &mpsc::Sender<Result<CaptureChunk, Status>>,
) -> io::Result<()> {
    let end = Instant::now() + bounds.time;
    let (mut pcap, mut left) = (head(bounds.snap), bounds.bytes);
    let mut frame = vec![0; bounds.snap];
    loop {
        let is_over = left == 0 || Instant::now() >= end || sender.is_closed();
        if !pcap.is_empty() {
            let pcap = std::mem::take(&mut pcap);
            if sender.blocking_send(Ok(CaptureChunk { pcap })).is_err() {
                return Ok(());
            }
        }
        if is_over {
            return Ok(());
        }
        tap.wait(LOOK.min(end.saturating_duration_since(Instant::now())))?;
        while pcap.len() < CHUNK && left > 0 {
            let Some(length) = tap.read(&mut frame)? else {
                break;
            };
            let kept = &frame[..length.min(bounds.snap)];
            let record = record(SystemTime::now(), kept, length);
            left = left.saturating_sub(record.len() as u64);
            pcap.extend(record);
        }
    }
}

/// Head of the file.
fn head(snap: usize) -> Vec<u8> {
    let mut bytes = MAGIC.to_le_bytes().to_vec();
    VERSION
        .iter()
        .for_each(|part| bytes.extend(part.to_le_bytes()));
    // Time zone and accuracy, which nobody uses.
    bytes.extend([0; 8]);
    bytes.extend(u32::try_from(snap).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(ETHERNET.to_le_bytes());
    bytes
}

/// A frame with its head: time, length as kept and as it was.
fn record(at: SystemTime, kept: &[u8], length: usize) -> Vec<u8> {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let lengths = [kept.len(), length].map(|length| u32::try_from(length).unwrap_or(u32::MAX));
    let head = [
        u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
        since.subsec_nanos(),
        lengths[0],
        lengths[1],
    ];
    let mut bytes: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(kept);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_the_most_unless_less_is_asked_for() {
        let most = Bounds::parse(&CaptureRequest::default()).expect("bounds");
        assert_eq!(
            most,
            Bounds {
                time: Duration::from_secs(MAX_SECONDS.into()),
                bytes: MAX_BYTES,
                snap: 65_535,
            }
        );
        let less = CaptureRequest {
            seconds: 3,
            bytes: 1000,
            snap_length: 96,
            ..CaptureRequest::default()
        };
        let less = Bounds::parse(&less).expect("bounds");
        assert_eq!((less.time.as_secs(), less.bytes, less.snap), (3, 1000, 96));
        let more = CaptureRequest {
            seconds: MAX_SECONDS + 1,
            ..CaptureRequest::default()
        };
        assert_eq!(
            Bounds::parse(&more).expect_err("too long"),
            "seconds: 601: at most 600"
        );
    }

    #[test]
    fn a_file_is_what_tcpdump_reads() {
        let file = [
            head(96),
            record(UNIX_EPOCH + Duration::new(7, 5), &[0xaa; 3], 1500),
        ]
        .concat();
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("a word"));
        assert_eq!((word(0), word(16), word(20)), (MAGIC, 96, ETHERNET));
        assert_eq!((word(24), word(28), word(32), word(36)), (7, 5, 3, 1500));
        assert_eq!(&file[40..], [0xaa; 3]);
    }
}
