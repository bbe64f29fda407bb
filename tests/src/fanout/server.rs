//! The server: typha without a client of the API, which gets its watch events from a local socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use margay_calc::ingest::{self, Ingested};
use margay_runtime::clock::unix_ns;
use margay_runtime::ready::Readiness;
use margay_runtime::shutdown::Shutdown;
use margay_runtime::telemetry;
use margay_typha::app::{GrpcServices, Timeouts};
use margay_typha::cache::Cache;
use margay_typha::cause::Cause;
use margay_typha::compute::{EVENT_QUEUE, GraphOwner};
use margay_typha::event::Event;
use margay_typha::feed::{Feed, Form, WatchEvent};
use margay_typha::metrics::Counters;
use margay_typha::object::POD;
use margay_typha::packed::PackedList;
use margay_typha::registry::Registry;
use prometheus_client::registry::Registry as Metrics;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use super::control::reply;
use super::identity::Identities;
use super::rebroadcast;

/// Kinds that the source writes, each on a connection of its own.
pub const KINDS: [&str; 5] = [
    POD,
    "Namespace",
    "KubernetesNetworkPolicy",
    "GlobalNetworkPolicy",
    "Tier",
];
/// Maximal duration of shutdown.
const SHUTDOWN: Duration = Duration::from_secs(20);
/// Objects of a list in one event, as in typha's watches.
const CHUNK: usize = 500;

/// How the server distributes changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Distribution {
    /// Margay's typha.
    Margay,
    /// Every object to every node: encoded per node, one send per event.
    Rebroadcast,
}

/// Arguments of the server.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder of certificates.
    #[arg(long)]
    tls: PathBuf,
    /// Path of the socket for watch events.
    #[arg(long)]
    source: PathBuf,
    /// How changes are distributed.
    #[arg(long, value_enum, default_value = "margay")]
    mode: Distribution,
    /// Log filter.
    #[arg(long, env = "MARGAY_LOG", default_value = "error")]
    log: String,
}

/// Serves until a termination signal. Answers with its port, and once more when it is in sync.
pub async fn run(args: Args) -> Result<()> {
    let telemetry = telemetry::init("margay-typha", &args.log)?;
    let shutdown = Shutdown::on_signals(SHUTDOWN)?;
    let tls = Identities::at(&args.tls).server()?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let source = listen(&args.source)?;
    reply(&json!({"port": listener.local_addr()?.port()}))?;
    let (events, inbox) = mpsc::channel(EVENT_QUEUE);
    tokio::spawn(accept(source, events.clone()));
    let readiness = Readiness::default();
    let gate = readiness.gate("sync", "nothing listed yet");
    if args.mode == Distribution::Rebroadcast {
        return rebroadcast::serve(listener, tls, inbox, gate).await;
    }
    let registry = Registry::default();
    let counters = Counters::register(&mut Metrics::default(), registry.clone());
    let owner = GraphOwner::new(Cache::new(KINDS), counters.clone(), registry.clone(), gate);
    let owner = tokio::spawn(owner.run(inbox, shutdown.clone()));
    tokio::spawn({
        let readiness = readiness.clone();
        async move {
            readiness.wait().await;
            reply(&json!({"synced": true}))
        }
    });
    let timeouts = Timeouts::default();
    let services = GrpcServices {
        events,
        registry,
        counters,
        readiness,
        shutdown: shutdown.clone(),
        timeouts,
    };
    let served = shutdown
        .drain("gRPC", SHUTDOWN / 2, services.serve(listener, tls))
        .await;
    owner.abort();
    telemetry.shutdown().await;
    served.map_or(Ok(()), |served| served)
}

fn listen(path: &Path) -> Result<UnixListener> {
    // A socket of a former run.
    let _ = std::fs::remove_file(path);
    UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))
}

async fn accept(listener: UnixListener, events: mpsc::Sender<Event>) {
    while let Ok((stream, _)) = listener.accept().await {
        let events = events.clone();
        tokio::spawn(async move {
            if let Err(error) = read(stream, events).await {
                eprintln!("source: {error:#}");
            }
        });
    }
}

/// Reads the watch of one kind, which the first line names.
async fn read(stream: UnixStream, events: mpsc::Sender<Event>) -> Result<()> {
    let mut lines = BufReader::new(stream);
    let mut kind = String::new();
    lines.read_line(&mut kind).await?;
    match kind.trim() {
        POD => watch(POD, ingest::pod, lines, events).await,
        "Namespace" => watch("Namespace", ingest::namespace, lines, events).await,
        "KubernetesNetworkPolicy" => {
            watch(
                "KubernetesNetworkPolicy",
                ingest::kubernetes_policy,
                lines,
                events,
            )
            .await
        }
        "GlobalNetworkPolicy" => {
            watch("GlobalNetworkPolicy", ingest::global_policy, lines, events).await
        }
        "Tier" => watch("Tier", ingest::tier, lines, events).await,
        other => bail!("kind {other:?}: expected one of {KINDS:?}"),
    }
}

async fn watch<K: DeserializeOwned>(
    kind: &'static str,
    ingest: fn(K) -> Ingested,
    mut lines: BufReader<UnixStream>,
    events: mpsc::Sender<Event>,
) -> Result<()> {
    let mut feed = Feed::new(ingest, Form::Plain, false);
    let mut line = Vec::new();
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        let event = feed.decode_line(&line)?;
        let cause = Cause {
            seen_unix_ns: unix_ns(),
            trace: None,
            version: feed.version_number(),
        };
        match event {
            WatchEvent::Bookmark => {}
            WatchEvent::Applied(object, _) => {
                send(
                    &events,
                    Event::Observed {
                        kind,
                        objects: vec![*object],
                        cause,
                    },
                )
                .await?;
            }
            WatchEvent::Deleted(key) => send(&events, Event::Deleted { kind, key, cause }).await?,
            WatchEvent::ListComplete(objects) => {
                send_list(kind, objects, cause.version, &events).await?;
            }
        }
    }
}

/// Sends a list in the steps of a watch.
async fn send_list(
    kind: &'static str,
    objects: PackedList,
    version: u64,
    events: &mpsc::Sender<Event>,
) -> Result<()> {
    send(events, Event::ListStarted(kind)).await?;
    let mut objects = objects.into_iter();
    loop {
        let objects: Vec<_> = objects.by_ref().take(CHUNK).collect();
        if objects.is_empty() {
            break;
        }
        send(
            events,
            Event::Observed {
                kind,
                objects,
                cause: Cause::default(),
            },
        )
        .await?;
    }
    let (reply, missing) = oneshot::channel();
    send(
        events,
        Event::ListCompleted {
            kind,
            limit: 0,
            reply,
        },
    )
    .await?;
    missing.await?;
    let sweep = Event::Sweep {
        kind,
        version,
        newest: version,
    };
    send(events, sweep).await
}

async fn send(events: &mpsc::Sender<Event>, event: Event) -> Result<()> {
    events
        .send(event)
        .await
        .map_err(|_| anyhow!("the owner of the graph has ended"))
}
