//! The CNI socket: access, concurrency, and plugins that disconnect before their response.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use margay_ipam::request::Addresses;
use margay_proto::cni::{self, Outcome, Request, Response, Verb, code};
use margay_runtime::telemetry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::Instrument;

use super::ports::{Announcer, Enforcer};
use super::request::{CniError, Config};
use super::service::{CniCall, Service};

/// Maximal number of calls in progress; more wait in the socket's backlog. Beyond this, the
/// kernel's own locks are the limit.
const MAX_CALLS: usize = 64;
/// Time limit for reading a request, which a plugin sends at once.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Delay after a failed accept: what the node lacks takes a while to come back.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Binds the socket for root only, replacing that of an earlier run.
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

/// Serves calls until dropped, or until the socket fails for good.
pub async fn serve<E: Enforcer, A: Addresses, N: Announcer>(
    listener: UnixListener,
    service: Arc<Service<E, A, N>>,
) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(MAX_CALLS));
    loop {
        let permit = permits
            .clone()
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let (stream, _) = accept_next(|| listener.accept()).await?;
        let service = service.clone();
        tokio::spawn(async move {
            if let Err(error) = handle_connection(stream, &service).await {
                tracing::debug!(%error, "CNI connection");
            }
            drop(permit);
        });
    }
}

/// Accepts the next connection. A transient error, as when the node is out of file descriptors,
/// only delays it.
async fn accept_next<T, F: Future<Output = io::Result<T>>>(
    mut accept: impl FnMut() -> F,
) -> io::Result<T> {
    loop {
        match accept().await {
            Err(error) if !is_lasting(&error) => {
                tracing::warn!(
                    %error,
                    "a CNI connection could not be accepted; the plugin's call fails and the \
                     runtime retries",
                );
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
            result => return result,
        }
    }
}

/// Whether the socket itself is unusable.
fn is_lasting(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP)
    )
}

/// Handles one request. The call runs to its end even if the plugin disconnects: an ADD whose
/// response was not read is undone by the DEL that the CNI specification requires of the runtime,
/// and a repeated ADD returns what exists.
async fn handle_connection<E: Enforcer, A: Addresses, N: Announcer>(
    mut stream: UnixStream,
    service: &Service<E, A, N>,
) -> io::Result<()> {
    if stream.peer_cred()?.uid() != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "only root may call",
        ));
    }
    let request = tokio::time::timeout(READ_TIMEOUT, read_request(&mut stream)).await??;
    let span = tracing::info_span!("cni", verb = verb_name(&request), network = request.network);
    if let Ok(parent) = request.traceparent.parse() {
        telemetry::set_parent(&span, parent);
    }
    let outcome = dispatch(service, request).instrument(span.clone()).await;
    let outcome = outcome.unwrap_or_else(|refusal| {
        span.in_scope(|| tracing::warn!(code = refusal.code, msg = refusal.msg, "refused"));
        Outcome::Error(cni::Error {
            code: refusal.code,
            msg: refusal.msg,
            details: String::new(),
        })
    });
    stream
        .write_all(&cni::encode_frame(&Response {
            outcome: Some(outcome),
        })?)
        .await
}

async fn read_request(stream: &mut UnixStream) -> io::Result<Request> {
    let mut header = [0; cni::HEADER];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; cni::length(header)?];
    stream.read_exact(&mut body).await?;
    Ok(cni::decode(&body)?)
}

async fn dispatch<E: Enforcer, A: Addresses, N: Announcer>(
    service: &Service<E, A, N>,
    request: Request,
) -> Result<Outcome, CniError> {
    let missing = || {
        CniError::new(
            code::MISUNDERSTOOD,
            "the request names no attachment; plugin and agent have different versions, restart \
             the agent's pod",
        )
    };
    let call = CniCall {
        network: request.network,
        config: Config::parse(&request.config)?,
        timeout_millis: request.timeout_millis,
    };
    let done = |()| Outcome::Done(cni::Done {});
    match request.verb.ok_or_else(missing)? {
        Verb::Add(add) => service
            .add(&call, &add.attachment.ok_or_else(missing)?)
            .await
            .map(Outcome::Result),
        Verb::Del(del) => service
            .del(&call, &del.attachment.ok_or_else(missing)?)
            .await
            .map(done),
        Verb::Check(check) => service
            .check(&call, &check.attachment.ok_or_else(missing)?)
            .await
            .map(done),
        Verb::Status(_) => service.status().map(done),
        Verb::Gc(gc) => service.gc(&call, &gc.valid).await.map(done),
    }
}

fn verb_name(request: &Request) -> &'static str {
    match request.verb {
        Some(Verb::Add(_)) => "ADD",
        Some(Verb::Del(_)) => "DEL",
        Some(Verb::Check(_)) => "CHECK",
        Some(Verb::Status(_)) => "STATUS",
        Some(Verb::Gc(_)) => "GC",
        None => "none",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_socket_that_is_none_any_more_is_the_end() {
        let passing = [
            libc::EMFILE,
            libc::ENFILE,
            libc::ECONNABORTED,
            libc::ENOBUFS,
            libc::ENOMEM,
        ];
        let mut results: VecDeque<io::Result<u8>> = passing
            .into_iter()
            .map(|number| Err(io::Error::from_raw_os_error(number)))
            .collect();
        results.push_back(Ok(1));
        results.push_back(Err(io::Error::from_raw_os_error(libc::EBADF)));
        let mut accept =
            || std::future::ready(results.pop_front().expect("nobody asks after the end"));
        assert_eq!(
            accept_next(&mut accept)
                .await
                .expect("the connection after the failures"),
            1
        );
        assert_eq!(
            accept_next(&mut accept)
                .await
                .expect_err("the end")
                .raw_os_error(),
            Some(libc::EBADF)
        );
    }
}
