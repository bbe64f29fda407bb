//! Server side of mutual TLS: connections with a verified peer, for a gRPC server.
//!
//! Handshakes run concurrently and do not block served connections, so a peer that connects and
//! stays silent costs one slot for ten seconds. When slots run out, the oldest handshake of the
//! address that holds the most is dropped.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::{HANDSHAKE, Peer, Tls, leaf};

/// Handshakes in progress at once.
const HANDSHAKES: usize = 256;
/// Finished handshakes that wait for the server.
const READY: usize = 64;
/// Pause after a failed accept, which is nearly always a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// At most one line about refused peers in this time.
const QUIET: Duration = Duration::from_secs(1);

/// One connection, its peer verified.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

/// The stream for `Server::serve_with_incoming`; it never yields an error and ends only when
/// dropped.
#[derive(Debug)]
pub struct Incoming {
    ready: mpsc::Receiver<Connection>,
    accepting: AbortHandle,
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready
            .poll_recv(cx)
            .map(|connection| connection.map(Ok))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Accepts from `listener` and verifies peers with the newest certificates of `tls`.
pub fn incoming(listener: TcpListener, tls: Tls) -> Incoming {
    start(listener, tls, HANDSHAKES, HANDSHAKE)
}

pub(super) fn start(
    listener: TcpListener,
    tls: Tls,
    handshakes: usize,
    patience: Duration,
) -> Incoming {
    let (done, ready) = mpsc::channel(READY);
    let acceptor = Acceptor {
        tls,
        done,
        patience,
        capacity: handshakes,
        tasks: JoinSet::new(),
        pending: Vec::new(),
        refusals: Refusals::default(),
    };
    let accepting = tokio::spawn(acceptor.accept(listener)).abort_handle();
    Incoming { ready, accepting }
}

/// Reasons why a peer is refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Handshake(#[from] io::Error),
    #[error("{0}")]
    Leaf(#[from] super::TlsError),
    #[error("no handshake within {0:?}")]
    Silent(Duration),
}

/// Owner of the handshakes in progress.
struct Acceptor {
    tls: Tls,
    done: mpsc::Sender<Connection>,
    patience: Duration,
    capacity: usize,
    tasks: JoinSet<Result<(), (SocketAddr, Refused)>>,
    /// Oldest first.
    pending: Vec<(Id, IpAddr, AbortHandle)>,
    refusals: Refusals,
}

impl Acceptor {
    async fn accept(mut self, listener: TcpListener) {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, address)) => self.begin(stream, address),
                    Err(error) => {
                        warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(ended) = self.tasks.join_next_with_id() => {
                    let id = match &ended { Ok((id, _)) => *id, Err(error) => error.id() };
                    self.pending.retain(|(pending, ..)| *pending != id);
                    if let Ok((_, Err((address, refused)))) = ended {
                        self.refusals.log(address, &refused);
                    }
                }
            }
        }
    }

    fn begin(&mut self, stream: TcpStream, address: SocketAddr) {
        if self.pending.len() >= self.capacity {
            self.evict();
        }
        let acceptor = TlsAcceptor::from(self.tls.current().server.clone());
        let (done, patience) = (self.done.clone(), self.patience);
        let task = self.tasks.spawn(async move {
            let finished = async {
                let connection = shake(acceptor, stream).await?;
                debug!(%address, name = %connection.peer.common_name, "connected");
                // Fails only if the server has gone, and with it the reason to connect.
                let _ = done.send(connection).await;
                Ok(())
            };
            let outcome = tokio::time::timeout(patience, finished).await;
            outcome
                .unwrap_or(Err(Refused::Silent(patience)))
                .map_err(|refused| (address, refused))
        });
        self.pending.push((task.id(), address.ip(), task));
    }

    /// Drops the oldest handshake of the address that has the most of them.
    fn evict(&mut self) {
        let mut held: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for (_, ip, _) in &self.pending {
            *held.entry(*ip).or_default() += 1;
        }
        let Some((&greedy, _)) = held.iter().max_by_key(|(_, count)| **count) else {
            return;
        };
        if let Some(oldest) = self.pending.iter().position(|(_, ip, _)| *ip == greedy) {
            let (_, _, task) = self.pending.remove(oldest);
            task.abort();
            debug!(
                address = %greedy,
                "too many handshakes in progress; dropping this address's oldest",
            );
        }
    }
}

async fn shake(acceptor: TlsAcceptor, stream: TcpStream) -> Result<Connection, Refused> {
    stream.set_nodelay(true)?;
    let stream = acceptor.accept(stream).await?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first());
    let certificate = certificate
        .ok_or_else(|| io::Error::new(io::ErrorKind::PermissionDenied, "no client certificate"))?;
    let peer = leaf::peer(certificate)?;
    Ok(Connection { stream, peer })
}

/// Logs refused peers without letting them fill the log.
#[derive(Debug, Default)]
struct Refusals {
    logged: Option<Instant>,
    suppressed: u64,
}

impl Refusals {
    fn log(&mut self, address: SocketAddr, refused: &Refused) {
        if self.logged.is_some_and(|logged| logged.elapsed() < QUIET) {
            self.suppressed += 1;
            return;
        }
        warn!(
            %address, reason = %refused, suppressed = self.suppressed,
            "peer refused; it needs a certificate of the cluster's CA"
        );
        *self = Self {
            logged: Some(Instant::now()),
            suppressed: 0,
        };
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
