//! Connections of sessions: a task that reads and one that writes for each, and what they tell.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use margay_bgp::config::PeerConfig;
use margay_bgp::session::ConnectionId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use super::sockets;

/// Bytes of one read, and so of an event. Events that wait are [`EVENTS`] of these at most.
const READ: usize = 16 << 10;
/// Events that wait; the tasks behind them wait as well, and so do their peers.
const EVENTS: usize = 64;
/// How long an attempt to connect takes at most.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long connections that were closed may take to send their last bytes.
const LINGER: Duration = Duration::from_secs(1);

/// What happens on sockets.
pub enum Event {
    /// Somebody has connected.
    Accepted(TcpStream, SocketAddr),
    /// An attempt to connect has ended.
    Connected(ConnectionId, io::Result<TcpStream>),
    /// The peer has sent bytes.
    Read(ConnectionId, Vec<u8>),
    /// The connection has ended.
    Closed(ConnectionId),
    /// What was to be sent is with the kernel.
    Wrote(ConnectionId),
}

enum Chunk {
    Bytes(Vec<u8>),
    /// To be sent as far as there is room for it; the connection ends.
    Last(Vec<u8>),
}

struct Wire {
    chunks: mpsc::Sender<Chunk>,
    is_busy: bool,
    reader: AbortHandle,
}

/// All connections.
pub struct Connections {
    wires: BTreeMap<ConnectionId, Wire>,
    tasks: JoinSet<()>,
    events: mpsc::Sender<Event>,
}

impl Connections {
    /// No connections yet, and where their events come out.
    pub fn new() -> (Self, mpsc::Receiver<Event>) {
        let (events, inbox) = mpsc::channel(EVENTS);
        let own = Self {
            wires: BTreeMap::new(),
            tasks: JoinSet::new(),
            events,
        };
        (own, inbox)
    }

    /// Where events are sent.
    pub fn events(&self) -> mpsc::Sender<Event> {
        self.events.clone()
    }

    /// Connects to a peer; [`Event::Connected`] tells the result.
    pub fn connect(&mut self, connection: ConnectionId, config: &PeerConfig) {
        let (address, transport) = (config.address, config.transport.clone());
        let events = self.events.clone();
        self.spawn(async move {
            let attempt = sockets::connect(address, &transport);
            let stream = tokio::time::timeout(CONNECT_TIMEOUT, attempt).await;
            let stream = stream.unwrap_or_else(|late| Err(late.into()));
            // The thread may be ending.
            let _ = events.send(Event::Connected(connection, stream)).await;
        });
    }

    /// Reads from and writes to a connection until it is closed.
    pub fn attach(&mut self, connection: ConnectionId, stream: TcpStream) {
        let (reading, writing) = stream.into_split();
        let reader = self.spawn(read(connection, reading, self.events.clone()));
        let (chunks, waiting) = mpsc::channel(2);
        self.spawn(write(connection, writing, waiting, self.events.clone()));
        let wire = Wire {
            chunks,
            is_busy: false,
            reader,
        };
        self.wires.insert(connection, wire);
    }

    /// Whether bytes can be sent: all before them are with the kernel.
    pub fn is_idle(&self, connection: ConnectionId) -> bool {
        self.wires
            .get(&connection)
            .is_some_and(|wire| !wire.is_busy)
    }

    /// Sends bytes on a connection that is idle.
    pub fn send(&mut self, connection: ConnectionId, bytes: Vec<u8>) {
        if let Some(wire) = self
            .wires
            .get_mut(&connection)
            .filter(|_| !bytes.is_empty())
        {
            wire.is_busy = wire.chunks.try_send(Chunk::Bytes(bytes)).is_ok();
        }
    }

    /// Notes that the bytes of the last [`Self::send`] are with the kernel.
    pub fn note_sent(&mut self, connection: ConnectionId) {
        if let Some(wire) = self.wires.get_mut(&connection) {
            wire.is_busy = false;
        }
    }

    /// Ends a connection after these bytes, if there is room for them.
    pub fn close(&mut self, connection: ConnectionId, last: Vec<u8>) {
        if let Some(wire) = self.wires.remove(&connection) {
            wire.reader.abort();
            // Without room for it the connection ends by the end of the channel.
            let _ = wire.chunks.try_send(Chunk::Last(last));
        }
    }

    /// Forgets a connection that has ended.
    pub fn remove(&mut self, connection: ConnectionId) {
        self.wires.remove(&connection);
    }

    /// Ends all connections at once and silently. No event of them follows, apart from those
    /// that wait already.
    pub async fn reset(&mut self) {
        self.wires.clear();
        self.tasks.shutdown().await;
    }

    /// Waits until connections that were closed are done.
    pub async fn drain(&mut self) {
        let tasks = &mut self.tasks;
        let done = async { while tasks.join_next().await.is_some() {} };
        // The rest ends with the thread.
        let _ = tokio::time::timeout(LINGER, done).await;
    }

    fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        while self.tasks.try_join_next().is_some() {}
        self.tasks.spawn(task)
    }
}

async fn read(connection: ConnectionId, mut half: OwnedReadHalf, events: mpsc::Sender<Event>) {
    let mut buffer = vec![0; READ];
    while let Ok(length @ 1..) = half.read(&mut buffer).await {
        let bytes = buffer[..length].to_vec();
        if events.send(Event::Read(connection, bytes)).await.is_err() {
            return;
        }
    }
    // The thread may be ending.
    let _ = events.send(Event::Closed(connection)).await;
}

async fn write(
    connection: ConnectionId,
    mut half: OwnedWriteHalf,
    mut chunks: mpsc::Receiver<Chunk>,
    events: mpsc::Sender<Event>,
) {
    while let Some(chunk) = chunks.recv().await {
        match chunk {
            Chunk::Bytes(bytes) => {
                tokio::select! {
                    // The reader sees the end of a broken connection.
                    written = half.write_all(&bytes) => if written.is_err() { return },
                    // It is closed although a message is not out: nothing can follow.
                    _ = chunks.recv() => return,
                }
                if events.send(Event::Wrote(connection)).await.is_err() {
                    return;
                }
            }
            Chunk::Last(bytes) => {
                // As far as there is room.
                let _ = half.try_write(&bytes);
                break;
            }
        }
    }
    // It may be broken already.
    let _ = half.shutdown().await;
}
