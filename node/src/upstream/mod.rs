//! The stream to typha: sends a hello with the digests held, hands frames to the agent, and sends
//! acknowledgements, problems and the addresses of pods.
//!
//! A stream that ends is reopened, to the replica that is to serve this node or else to whichever
//! answers (`servers`). Records stay, and the new server sends only what differs.

pub mod acks;
pub mod notices;
mod servers;

use std::time::Duration;

use margay_proto::sync::wire::{self, sync_client::SyncClient};
use margay_proto::sync::{self, Joiner, MAX_FRAME, SERVERS_METADATA};
use margay_runtime::backoff::Backoff;
use margay_runtime::shutdown::Shutdown;
use margay_runtime::tls::Connector;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::StdError;

use crate::agent::{AgentEvent, AgentHandle};
use crate::problems::Problems;
use crate::state::{Held, ViewError};
use acks::send_acks;
use notices::Notices;
use servers::{Attempt, Servers};

/// DNS name in typha's certificate, whatever its address.
pub const SERVER_NAME: &str = "margay-typha";
/// Interval of HTTP/2 pings, which detect a server that vanished.
const PING: Duration = Duration::from_secs(10);
/// Time limit for the answer to a ping.
const PONG: Duration = Duration::from_secs(10);
/// Minimal and maximal delay between connection attempts: short at first, because another replica
/// is likely to be up.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Duration after which a stream counts as stable and the backoff starts over.
const STABLE: Duration = Duration::from_secs(30);
/// Capacity of the queue of messages to the server.
const QUEUE: usize = 16;

/// Reason why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("connect: {0}")]
    Connect(#[source] StdError),
    #[error("{0}")]
    Status(#[from] Box<tonic::Status>),
    #[error("the server closed the stream")]
    Closed,
    #[error("a frame cannot be decoded: {0}; check that typha and the agent have the same version")]
    Frame(#[from] sync::Error),
    #[error("a frame cannot be applied: {0}")]
    View(#[from] ViewError),
    #[error("the agent has ended")]
    Agent,
}

impl StreamEnd {
    /// Servers that the one that ended the stream recommends.
    fn servers(&self) -> Vec<String> {
        let Self::Status(status) = self else {
            return Vec::new();
        };
        let list = status.metadata().get(SERVERS_METADATA);
        let list = list.and_then(|list| list.to_str().ok());
        list.into_iter()
            .flat_map(|list| list.split(','))
            .map(str::to_owned)
            .collect()
    }
}

/// Opens connections to typha.
pub trait Connect: Send + Sync {
    /// A connection.
    type Channel: GrpcService<Body, ResponseBody = Body, Future: Send> + Send;
    /// Connects to a replica at this address, or to any of them at that of the Service.
    fn connect(&self, server: &str)
    -> impl Future<Output = Result<Self::Channel, StdError>> + Send;
}

impl Connect for Connector {
    type Channel = tonic::transport::Channel;

    async fn connect(&self, server: &str) -> Result<Self::Channel, StdError> {
        let endpoint = self.endpoint();
        let endpoint = endpoint
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PONG)
            .keep_alive_while_idle(true);
        Ok(endpoint.connect_with_connector(self.at(server)).await?)
    }
}

/// The stream's ends.
pub struct Upstream<C = Connector> {
    /// Connector to typha.
    pub connector: C,
    /// Address of typha's Service.
    pub server: String,
    /// The agent.
    pub agent: AgentHandle,
    /// Addresses of this node's pods.
    pub notices: Notices,
    /// Problems of this node.
    pub problems: Problems,
    /// Random values in `0.0..1.0` for the delays of retries.
    pub jitter: fn() -> f64,
}

impl<C: Connect> Upstream<C> {
    /// Keeps a stream open until shutdown, or until the agent ends.
    pub async fn run(self, shutdown: Shutdown) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut servers = Servers::new(&self.server);
        for stream in 1.. {
            let started = Instant::now();
            let attempt = servers.next();
            let ended = tokio::select! {
                biased;
                ended = self.stream_until_end(stream, &attempt, &mut servers) => ended,
                () = shutdown.wait() => return,
            };
            servers.record_end(&attempt.server);
            servers.set(ended.servers());
            let known = self.agent.send(AgentEvent::Disconnected { stream }).await;
            if matches!(ended, StreamEnd::Agent) || !known {
                return;
            }
            if started.elapsed() >= STABLE {
                backoff.reset();
            }
            let delay = backoff.next((self.jitter)());
            tracing::warn!(
                server = attempt.server,
                reason = with_sources(&ended),
                ?delay,
                "the stream to typha ended; enforcement continues with the view held"
            );
            tokio::select! {
                biased;
                () = tokio::time::sleep(delay) => {}
                () = shutdown.wait() => return,
            }
        }
    }

    /// Runs one stream from connection to end.
    async fn stream_until_end(
        &self,
        stream: u64,
        attempt: &Attempt,
        servers: &mut Servers,
    ) -> StreamEnd {
        match self.run_stream(stream, attempt, servers).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn run_stream(
        &self,
        stream: u64,
        attempt: &Attempt,
        servers: &mut Servers,
    ) -> Result<std::convert::Infallible, StreamEnd> {
        let server = attempt.server.as_str();
        let channel = self.connector.connect(server).await;
        let channel = channel.map_err(StreamEnd::Connect)?;
        let mut client = SyncClient::new(channel).max_decoding_message_size(MAX_FRAME);

        let (hello, held) = oneshot::channel();
        let (fault, faults) = oneshot::channel();
        let opened = AgentEvent::Connected {
            stream,
            hello,
            fault,
            server: server.to_owned(),
        };
        if !self.agent.send(opened).await {
            return Err(StreamEnd::Agent);
        }
        let Held { buckets, versions } = held.await.map_err(|_| StreamEnd::Agent)?;
        // Acknowledgements up to here belong to former streams.
        let mut acks = self.agent.acks();
        acks.mark_unchanged();

        let (up, outgoing) = mpsc::channel(QUEUE);
        let agent_version = env!("CARGO_PKG_VERSION").to_owned();
        let hello = wire::Hello {
            agent_version,
            buckets,
            host_endpoints: true,
            bgp: true,
            compact: true,
            versions: sync::encode_versions(&versions),
            has_alternatives: attempt.has_alternatives,
        };
        // The channel is empty and its receiver exists, so this neither waits nor fails.
        let _ = up
            .send(wire::Up {
                message: Some(wire::up::Message::Hello(hello)),
            })
            .await;
        let frames = client
            .sync(ReceiverStream::new(outgoing))
            .await
            .map_err(Box::new)?
            .into_inner();
        tracing::info!(server, "stream to typha is open");
        // In this order, not at random: frames may come without end, so they are last.
        tokio::select! {
            biased;
            fault = faults => Err(fault.map_or(StreamEnd::Agent, StreamEnd::View)),
            () = send_acks(acks, up.clone()) => Err(StreamEnd::Closed),
            () = self.problems.send_changes(up.clone()) => Err(StreamEnd::Closed),
            () = self.notices.send_all(up, &self.agent) => Err(StreamEnd::Closed),
            ended = self.receive(stream, frames, servers) => Err(ended),
        }
    }

    /// Hands frames to the agent. While the agent's queue is full none is read, and the server
    /// coalesces changes instead of queueing them.
    async fn receive(
        &self,
        stream: u64,
        mut frames: tonic::Streaming<wire::Frame>,
        servers: &mut Servers,
    ) -> StreamEnd {
        let mut parts = Joiner::default();
        loop {
            let part = match frames.message().await {
                Ok(Some(part)) => part,
                Ok(None) => return StreamEnd::Closed,
                Err(status) => return Box::new(status).into(),
            };
            let mut frame = match parts.push(part) {
                Ok(Some(frame)) => Box::new(frame),
                Ok(None) => continue,
                Err(error) => return error.into(),
            };
            servers.set(std::mem::take(&mut frame.trailer.servers));
            if frame.trailer.in_sync {
                servers.record_served();
            }
            if !self.agent.send(AgentEvent::Frame { stream, frame }).await {
                return StreamEnd::Agent;
            }
        }
    }
}

/// Formats an error with its sources, which tonic's own text omits.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests;
