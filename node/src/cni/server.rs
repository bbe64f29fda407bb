//! The socket: who may speak, how many at once, and what happens when the plugin goes away before its answer.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use margay_proto::cni::{self, Outcome, Request, Response, Verb, code};
use margay_runtime::telemetry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::Instrument;

use super::ports::{Addresses, Announcer, Enforcer};
use super::request::{Config, Refusal};
use super::service::{Call, Service};

/// Calls that are worked on at once; more wait in the socket's backlog. Above this the kernel's own locks are the limit, not the calls.
const AT_ONCE: usize = 64;
/// A plugin sends its request at once; one that does not is cut off.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the socket for root alone, in the place of an earlier run's.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves calls until dropped.
pub async fn serve<E: Enforcer, A: Addresses, N: Announcer>(
    listener: UnixListener,
    service: Arc<Service<E, A, N>>,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        let (stream, _) = listener.accept().await?;
        let service = service.clone();
        tokio::spawn(async move {
            if let Err(error) = converse(stream, &service).await {
                tracing::debug!(%error, "CNI connection");
            }
            drop(place);
        });
    }
}

/// One request and its answer. The call goes on to its end when the plugin has gone: an ADD nobody heard of is taken back by the DEL that the
/// specification demands of the runtime, and asked for again it answers with what it has.
async fn converse<E: Enforcer, A: Addresses, N: Announcer>(
    mut stream: UnixStream,
    service: &Service<E, A, N>,
) -> io::Result<()> {
    if stream.peer_cred()?.uid() != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "only root may call"));
    }
    let request = tokio::time::timeout(READ_TIMEOUT, read(&mut stream)).await??;
    let span = tracing::info_span!("cni", verb = name(&request), network = request.network);
    if let Ok(parent) = request.traceparent.parse() {
        telemetry::set_parent(&span, parent);
    }
    let outcome = answer(service, request).instrument(span.clone()).await;
    let outcome = outcome.unwrap_or_else(|refusal| {
        span.in_scope(|| tracing::warn!(code = refusal.code, msg = refusal.msg, "refused"));
        Outcome::Error(cni::Error { code: refusal.code, msg: refusal.msg, details: String::new() })
    });
    stream.write_all(&cni::encode_frame(&Response { outcome: Some(outcome) })?).await
}

async fn read(stream: &mut UnixStream) -> io::Result<Request> {
    let mut header = [0; cni::HEADER];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; cni::length(header)?];
    stream.read_exact(&mut body).await?;
    Ok(cni::decode(&body)?)
}

async fn answer<E: Enforcer, A: Addresses, N: Announcer>(
    service: &Service<E, A, N>,
    request: Request,
) -> Result<Outcome, Refusal> {
    let missing = || {
        Refusal::new(
            code::MISUNDERSTOOD,
            "the request names no attachment; plugin and agent are of different versions, restart the agent's pod",
        )
    };
    let call = Call {
        network: request.network,
        config: Config::parse(&request.config)?,
        timeout_millis: request.timeout_millis,
    };
    let done = |()| Outcome::Done(cni::Done {});
    match request.verb.ok_or_else(missing)? {
        Verb::Add(add) => service.add(&call, &add.attachment.ok_or_else(missing)?).await.map(Outcome::Result),
        Verb::Del(del) => service.del(&call, &del.attachment.ok_or_else(missing)?).await.map(done),
        Verb::Check(check) => service.check(&call, &check.attachment.ok_or_else(missing)?).await.map(done),
        Verb::Status(_) => service.status().map(done),
        Verb::Gc(gc) => service.gc(&call, &gc.valid).await.map(done),
    }
}

fn name(request: &Request) -> &'static str {
    match request.verb {
        Some(Verb::Add(_)) => "ADD",
        Some(Verb::Del(_)) => "DEL",
        Some(Verb::Check(_)) => "CHECK",
        Some(Verb::Status(_)) => "STATUS",
        Some(Verb::Gc(_)) => "GC",
        None => "none",
    }
}
