//! Peers that a server must survive: each holds or breaks its connections in one way.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result};
use http::Uri;
use hyper_util::rt::TokioIo;
use margay_proto::sync::Versions;
use margay_proto::sync::wire::{Up, up};
use margay_runtime::tls::Connector;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tower::service_fn;

use super::control::{Orders, reply};
use super::identity::{Identities, SERVER};
use super::model::Numbers;
use super::stream::open;

/// Time between two bytes of a peer that sends slowly.
const DRIP: Duration = Duration::from_millis(500);
/// Time between two attempts of a peer that sends garbage.
const PAUSE: Duration = Duration::from_millis(200);
/// What an HTTP/2 client sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the peers do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Manner {
    /// Open a stream and then read nothing from the socket.
    Stalled,
    /// Open a stream with a flow control window of zero.
    ZeroWindow,
    /// Complete the handshake and send the HTTP/2 preface one byte at a time.
    Slowloris,
    /// Connect and send nothing.
    HalfOpen,
    /// Send bytes that are no HTTP/2, or messages that break the protocol; again and again.
    Malformed,
}

/// Arguments of the peers.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder of certificates.
    #[arg(long)]
    tls: PathBuf,
    /// Port of the server.
    #[arg(long)]
    port: u16,
    /// What they do.
    #[arg(long, value_enum)]
    manner: Manner,
    /// How many.
    #[arg(long)]
    count: usize,
    /// Number of the first node whose certificate they use.
    #[arg(long)]
    first: usize,
}

/// Connects all, answers once they are as they should be, and goes on until the orders end.
pub async fn run(args: Args) -> Result<()> {
    let identities = Identities::at(&args.tls);
    let (mut tasks, mut ready) = (JoinSet::new(), Vec::new());
    for number in 0..args.count {
        let connector = Connector::new(
            identities.node(args.first + number)?,
            &format!("127.0.0.1:{}", args.port),
            SERVER,
        )?;
        let (up, is_up) = tokio::sync::oneshot::channel();
        ready.push(is_up);
        tasks.spawn(behave(args.manner, connector, args.port, number as u64, up));
    }
    for is_up in ready {
        is_up
            .await
            .context("a peer ended before it was connected")?;
    }
    reply(&json!({"connected": args.count}))?;
    let mut orders = Orders::new();
    while orders.next().await?.is_some() {}
    Ok(())
}

async fn behave(
    manner: Manner,
    connector: Connector,
    port: u16,
    number: u64,
    ready: tokio::sync::oneshot::Sender<()>,
) -> Result<()> {
    match manner {
        Manner::HalfOpen => {
            let stream = TcpStream::connect(("127.0.0.1", port)).await?;
            let _ = ready.send(());
            std::future::pending::<()>().await;
            drop(stream);
        }
        Manner::Slowloris => {
            let mut stream = connector.connect().await?;
            let _ = ready.send(());
            for byte in PREFACE.iter().cycle() {
                stream.write_all(&[*byte]).await?;
                stream.flush().await?;
                tokio::time::sleep(DRIP).await;
            }
        }
        Manner::Stalled => stall(connector, ready).await?,
        Manner::ZeroWindow => {
            let endpoint = connector.endpoint().initial_stream_window_size(0);
            let channel = endpoint.connect_with_connector(connector).await?;
            let stream = open(channel, Vec::new(), &Versions::new()).await?;
            let _ = ready.send(());
            std::future::pending::<()>().await;
            drop(stream);
        }
        Manner::Malformed => {
            let _ = ready.send(());
            let mut numbers = Numbers::new(number);
            for attempt in number.. {
                // The server ends these connections, which is what is wanted.
                let _ = if attempt % 2 == 0 {
                    garbage(&connector, &mut numbers).await
                } else {
                    breach(&connector).await
                };
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    Ok(())
}

/// Sends random bytes.
async fn garbage(connector: &Connector, numbers: &mut Numbers) -> Result<()> {
    let mut stream = connector.connect().await?;
    let bytes: Vec<u8> = (0..2048)
        .flat_map(|_| numbers.take().to_le_bytes())
        .collect();
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    Ok(())
}

/// Sends hello twice.
async fn breach(connector: &Connector) -> Result<()> {
    let channel = connector
        .endpoint()
        .connect_with_connector(connector.clone())
        .await?;
    let (up, mut frames) = open(channel, Vec::new(), &Versions::new()).await?;
    let hello = up::Message::Hello(margay_proto::sync::wire::Hello::default());
    up.send(Up {
        message: Some(hello),
    })
    .await?;
    while frames.message().await?.is_some() {}
    Ok(())
}

/// Opens a stream and then stops to read from the socket.
async fn stall(connector: Connector, ready: tokio::sync::oneshot::Sender<()>) -> Result<()> {
    let frozen = Arc::new(AtomicBool::new(false));
    let endpoint = connector
        .endpoint()
        .initial_stream_window_size(64 << 20)
        .initial_connection_window_size(64 << 20);
    let flag = frozen.clone();
    let connect = service_fn(move |_: Uri| {
        let (connector, frozen) = (connector.clone(), flag.clone());
        async move {
            let stream = connector.connect().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>(TokioIo::new(Freezing { stream, frozen }))
        }
    });
    let channel = endpoint.connect_with_connector(connect).await?;
    let (_up, mut frames) = open(channel, Vec::new(), &Versions::new()).await?;
    frames.message().await?;
    frozen.store(true, Ordering::Relaxed);
    let _ = ready.send(());
    std::future::pending().await
}

/// A stream from which nothing is read any more once it is frozen.
struct Freezing<S> {
    stream: S,
    frozen: Arc<AtomicBool>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Freezing<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.frozen.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Freezing<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
