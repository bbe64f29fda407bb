//! The admin port of a daemon: `/metrics`, `/healthz` and `/readyz`; and the port for Prometheus,
//! which has `/metrics` alone.
//!
//! Plain HTTP, so the admin port listens on loopback and is read-only: every process in the host's
//! network namespace can reach it. The port for Prometheus is open only where users ask for it.
//! Requests that need an identity are served by gRPC instead.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tower::util::BoxCloneService;
use tower::{BoxError, ServiceBuilder, ServiceExt};
use tracing::{debug, info, warn};

use crate::alive::Liveness;
use crate::ready::Readiness;
use crate::shutdown::Shutdown;

/// Connections served at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 64;
/// Requests answered at once; more are shed with 503, so that a scrape storm cannot pile up work.
const REQUESTS: usize = 16;
/// Time limit of a request, its header included.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause after a failed accept, which is nearly always a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Reply = Response<Full<Bytes>>;

/// Setting with the address of the admin port.
const ADMIN_SETTING: &str = "MARGAY_ADMIN_LISTEN";

/// A port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("address {address}: {source}; choose a free address and port with {setting}")]
pub struct ListenError {
    address: SocketAddr,
    source: io::Error,
    setting: &'static str,
}

/// The open port for Prometheus; dropping it closes the port and its connections.
#[derive(Debug)]
pub struct MetricsPort {
    /// Its address.
    pub address: SocketAddr,
    accepting: AbortHandle,
}

impl Drop for MetricsPort {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Opens the port for Prometheus; `setting` is what users choose the address with.
pub async fn serve_metrics(
    address: SocketAddr,
    registry: Arc<Registry>,
    setting: &'static str,
) -> Result<MetricsPort, ListenError> {
    let listener = bind(address).await.map_err(|source| ListenError {
        address,
        source,
        setting,
    })?;
    let address = listener.local_addr().unwrap_or(address);
    info!(%address, "port for Prometheus open");
    let state = Arc::new(State {
        registry,
        readiness: None,
    });
    let accepting = tokio::spawn(accept(listener, state)).abort_handle();
    Ok(MetricsPort { address, accepting })
}

/// Binds to an address. All addresses are those of IPv4 where the host has no IPv6.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error)
            if address.is_ipv6()
                && address.ip().is_unspecified()
                && error.kind() != io::ErrorKind::AddrInUse =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

/// Opens the admin port, serves it until `shutdown`, and returns its address (port 0 picks any).
pub async fn serve(
    address: SocketAddr,
    registry: Arc<Registry>,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<SocketAddr, ListenError> {
    let failed = |source| ListenError {
        address,
        source,
        setting: ADMIN_SETTING,
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    info!(address = %bound, "admin port open");
    let state = Arc::new(State {
        registry,
        readiness: Some(readiness),
    });
    tokio::spawn(async move {
        tokio::select! {
            () = accept(listener, state) => {}
            () = shutdown.wait() => debug!("admin port closed"),
        }
    });
    Ok(bound)
}

struct State {
    registry: Arc<Registry>,
    /// None where there are metrics alone.
    readiness: Option<Readiness>,
}

// Not `axum::serve`, which limits neither the number of connections nor the time that a request's
// header takes.
async fn accept(listener: TcpListener, state: Arc<State>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let bounded = service(state);
    let service = hyper::service::service_fn(move |request| {
        let answer = bounded.clone().oneshot(request);
        async move { Ok::<_, Infallible>(answer.await.unwrap_or_else(shed)) }
    });
    // Dropped with the port, and with it all connections.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let slot = slots
            .clone()
            .acquire_owned()
            .await
            .expect("this semaphore is never closed");
        let stream: TcpStream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "admin port cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(PATIENCE)
            .serve_connection(TokioIo::new(stream), service.clone());
        connections.spawn(async move {
            if let Err(error) = served.await {
                debug!(%error, "admin connection ended early");
            }
            drop(slot);
        });
    }
}

fn service(state: Arc<State>) -> BoxCloneService<Request<Incoming>, Reply, BoxError> {
    let bounded = ServiceBuilder::new()
        .load_shed()
        .concurrency_limit(REQUESTS)
        .timeout(PATIENCE)
        .service_fn(move |request| {
            let state = state.clone();
            async move { Ok::<_, BoxError>(answer(&state, &request)) }
        });
    BoxCloneService::new(bounded)
}

fn answer(state: &State, request: &Request<Incoming>) -> Reply {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => metrics(&state.registry),
        (_, "/metrics") => refuse_method("GET"),
        (method, path) => match &state.readiness {
            Some(readiness) => answer_probe(readiness, method, path),
            None => text(
                StatusCode::NOT_FOUND,
                format!("no {path} here; use GET /metrics\n"),
            ),
        },
    }
}

fn answer_probe(readiness: &Readiness, method: &Method, path: &str) -> Reply {
    match (method, path) {
        (&Method::GET, "/healthz") => healthz(readiness.liveness()),
        (&Method::GET, "/readyz") => readyz(readiness),
        (_, "/healthz" | "/readyz") => refuse_method("GET"),
        (_, path) => text(
            StatusCode::NOT_FOUND,
            format!("no {path} here; use GET /metrics, /healthz or /readyz\n"),
        ),
    }
}

fn metrics(registry: &Registry) -> Reply {
    let mut body = String::new();
    if let Err(error) = prometheus_client::encoding::text::encode(&mut body, registry) {
        return text(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("metrics: {error}\n"),
        );
    }
    let mut reply = text(StatusCode::OK, body);
    reply.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    );
    reply
}

fn healthz(liveness: &Liveness) -> Reply {
    let stuck = liveness.stuck(Instant::now());
    if stuck.is_empty() {
        return text(StatusCode::OK, "ok\n");
    }
    let lines: String = stuck
        .iter()
        .map(|(name, silence)| format!("{name}: no sign of life for {} s\n", silence.as_secs()))
        .collect();
    text(StatusCode::SERVICE_UNAVAILABLE, lines)
}

fn readyz(readiness: &Readiness) -> Reply {
    let missing = readiness.missing();
    if missing.is_empty() {
        return text(StatusCode::OK, "ready\n");
    }
    let lines: String = missing
        .iter()
        .map(|(name, why)| format!("{name}: {why}\n"))
        .collect();
    text(StatusCode::SERVICE_UNAVAILABLE, lines)
}

fn shed(error: BoxError) -> Reply {
    text(
        StatusCode::SERVICE_UNAVAILABLE,
        format!("{error}; ask again later\n"),
    )
}

fn refuse_method(allowed: &'static str) -> Reply {
    let mut reply = text(StatusCode::METHOD_NOT_ALLOWED, format!("use {allowed}\n"));
    reply
        .headers_mut()
        .insert(header::ALLOW, header::HeaderValue::from_static(allowed));
    reply
}

fn text(status: StatusCode, body: impl Into<String>) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body.into())));
    *reply.status_mut() = status;
    reply.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    reply
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    struct Port {
        address: SocketAddr,
        readiness: Readiness,
        shutdown: Shutdown,
    }

    async fn open() -> Port {
        let mut registry = Registry::default();
        let counter: Counter = Counter::default();
        counter.inc_by(7);
        registry.register("margay_test_things", "Things seen", counter);
        let (readiness, shutdown) = (Readiness::default(), Shutdown::default());
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let address = serve(any, Arc::new(registry), readiness.clone(), shutdown.clone());
        Port {
            address: address.await.expect("a free port"),
            readiness,
            shutdown,
        }
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        stream.write_all(request.as_bytes()).await.expect("write");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("read");
        reply
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        ask(
            address,
            &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
        )
        .await
    }

    #[tokio::test]
    async fn metrics_are_open_metrics() {
        let port = open().await;
        let reply = get(port.address, "/metrics").await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
        assert!(reply.contains("application/openmetrics-text"), "{reply}");
        assert!(reply.contains("margay_test_things_total 7\n"), "{reply}");
        assert!(reply.ends_with("# EOF\n"), "{reply}");
    }

    #[tokio::test]
    async fn readyz_names_what_is_missing() {
        let port = open().await;
        let gate = port
            .readiness
            .gate("sync", "waiting for the first snapshot");
        let reply = get(port.address, "/readyz").await;
        assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
        assert!(
            reply.ends_with("sync: waiting for the first snapshot\n"),
            "{reply}"
        );
        assert!(
            get(port.address, "/healthz")
                .await
                .starts_with("HTTP/1.1 200")
        );
        gate.open();
        assert!(
            get(port.address, "/readyz")
                .await
                .starts_with("HTTP/1.1 200")
        );
    }

    #[tokio::test]
    async fn healthz_names_the_loop_that_hangs() {
        let port = open().await;
        let liveness = port.readiness.liveness();
        let pulse = liveness.part("owner", Duration::ZERO);
        let reply = get(port.address, "/healthz").await;
        assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
        assert!(reply.contains("owner: no sign of life"), "{reply}");
        drop(pulse);
        let reply = get(port.address, "/healthz").await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }

    #[tokio::test]
    async fn wrong_requests_are_answered_with_the_valid_ones() {
        let port = open().await;
        let reply = get(port.address, "/nothing").await;
        assert!(
            reply.starts_with("HTTP/1.1 404") && reply.contains("/readyz"),
            "{reply}"
        );
        let put = "PUT /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        let reply = ask(port.address, put).await;
        assert!(
            reply.starts_with("HTTP/1.1 405") && reply.contains("allow: GET"),
            "{reply}"
        );
    }

    #[tokio::test]
    async fn nothing_is_changed_by_whoever_reaches_the_port() {
        let port = open().await;
        for method in ["PUT", "POST", "PATCH", "DELETE"] {
            for path in ["/log", "/metrics", "/healthz", "/readyz", "/"] {
                let request = format!(
                    "{method} {path} HTTP/1.1\r\n\
                     host: x\r\n\
                     connection: close\r\n\
                     content-length: 5\r\n\
                     \r\n\
                     trace"
                );
                let reply = ask(port.address, &request).await;
                assert!(reply.starts_with("HTTP/1.1 40"), "{method} {path}: {reply}");
            }
        }
    }

    #[tokio::test]
    async fn the_port_for_prometheus_has_metrics_alone_and_closes_with_its_connections() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let port = serve_metrics(any, Arc::new(Registry::default()), "a setting").await;
        let port = port.expect("a free port");
        let taken = serve_metrics(port.address, Arc::new(Registry::default()), "a setting").await;
        assert!(
            taken
                .expect_err("taken")
                .to_string()
                .ends_with("with a setting")
        );
        let reply = get(port.address, "/metrics").await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
        for path in ["/healthz", "/readyz", "/"] {
            let reply = get(port.address, path).await;
            assert!(
                reply.starts_with("HTTP/1.1 404") && reply.contains("/metrics"),
                "{reply}"
            );
        }
        let mut open = TcpStream::connect(port.address).await.expect("connect");
        open.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .expect("write");
        open.read_exact(&mut [0; 15]).await.expect("an answer");
        drop(port);
        // It ends instead of waiting for a further request.
        open.read_to_end(&mut Vec::new()).await.expect("the end");
    }

    #[tokio::test]
    async fn a_silent_client_does_not_block_others() {
        let port = open().await;
        let _silent = TcpStream::connect(port.address).await.expect("connect");
        assert!(
            get(port.address, "/healthz")
                .await
                .starts_with("HTTP/1.1 200")
        );
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let port = open().await;
        let error = serve(
            port.address,
            Arc::new(Registry::default()),
            port.readiness.clone(),
            port.shutdown.clone(),
        );
        let error = error.await.expect_err("taken").to_string();
        assert!(error.contains(&port.address.to_string()), "{error}");
        assert!(error.contains("MARGAY_ADMIN_LISTEN"), "{error}");
    }
}
