//! Layers for every gRPC server: authorization by client certificate, and trace propagation.
//!
//! They act on the HTTP request, before any service sees it, so that a service added later cannot
//! forget them. The peer comes from [`crate::tls::incoming`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::Either;
use futures::future::{Ready, ready};
use http::{Request, Response};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Status, body::Body};
use tower::{Layer, Service};
use tracing::instrument::{Instrument, Instrumented};
use tracing::{info_span, warn};

use crate::telemetry::{self, Traceparent};
use crate::tls::Peer;

/// Name of the metadata entry that carries the trace context, from W3C Trace Context.
const TRACEPARENT: &str = "traceparent";

/// Services that each organization may call; everything else is refused.
///
/// A service is named as in its .proto file with its package: `grpc.health.v1.Health`.
#[derive(Debug, Clone, Default)]
pub struct Admission(Arc<BTreeMap<&'static str, Vec<&'static str>>>);

impl Admission {
    /// Builds the table from pairs of an organization and the services that its members may call.
    pub fn new(rules: impl IntoIterator<Item = (&'static str, &'static [&'static str])>) -> Self {
        let mut table: BTreeMap<&'static str, Vec<&'static str>> = BTreeMap::new();
        for (organization, services) in rules {
            table.entry(organization).or_default().extend(services);
        }
        Self(Arc::new(table))
    }

    /// Checks that this peer may send a request with this path (`/package.Service/Method`).
    fn check(&self, peer: Option<&Peer>, path: &str) -> Result<(), Status> {
        let Some(peer) = peer else {
            return Err(Status::unauthenticated(
                "the connection has no client certificate",
            ));
        };
        let service = path.strip_prefix('/').and_then(|path| path.split_once('/'));
        let allowed = self
            .0
            .get(peer.organization.as_str())
            .map(Vec::as_slice)
            .unwrap_or_default();
        if service.is_some_and(|(service, _)| allowed.contains(&service)) {
            return Ok(());
        }
        let Peer {
            common_name,
            organization,
        } = peer;
        warn!(%common_name, %organization, path, "call denied");
        Err(Status::permission_denied(format!(
            "{common_name:?} of {organization:?} may not call {path}; it may call {allowed:?}"
        )))
    }
}

impl<S> Layer<S> for Admission {
    type Service = Admitted<S>;

    fn layer(&self, inner: S) -> Admitted<S> {
        Admitted {
            rules: self.clone(),
            inner,
        }
    }
}

/// A service behind an [`Admission`].
#[derive(Debug, Clone)]
pub struct Admitted<S> {
    rules: Admission,
    inner: S,
}

impl<S, B> Service<Request<B>> for Admitted<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self
            .rules
            .check(request.extensions().get(), request.uri().path())
        {
            Ok(()) => Either::Left(self.inner.call(request)),
            Err(refused) => Either::Right(ready(Ok(refused.into_http()))),
        }
    }
}

/// Gives each call a span that continues the caller's trace. The span ends when the answer begins,
/// so a stream's messages need spans of their own.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trace;

impl<S> Layer<S> for Trace {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced { inner }
    }
}

/// A service behind [`Trace`].
#[derive(Debug, Clone)]
pub struct Traced<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Traced<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Instrumented<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let peer = request
            .extensions()
            .get::<Peer>()
            .map(|peer| peer.common_name.as_str());
        let span = info_span!(
            "grpc",
            otel.name = request.uri().path(),
            otel.kind = "server",
            peer
        );
        let parent = request
            .headers()
            .get(TRACEPARENT)
            .and_then(|value| value.to_str().ok());
        if let Some(parent) = parent.and_then(|text| text.parse::<Traceparent>().ok()) {
            telemetry::set_parent(&span, parent);
        }
        let call = span.in_scope(|| self.inner.call(request));
        call.instrument(span)
    }
}

/// Maximal length of a log filter, in bytes.
const MAX_FILTER_BYTES: usize = 4096;

/// Replaces the log filter of the process at the request of an admitted caller; returns the former
/// one.
pub fn set_log(filter: &str) -> Result<String, Status> {
    if filter.len() > MAX_FILTER_BYTES {
        return Err(Status::invalid_argument(format!(
            "log filter: {} bytes are more than {MAX_FILTER_BYTES}; write it like \
             margay_node=debug,info",
            filter.len()
        )));
    }
    let wanted = filter.trim();
    let former = telemetry::set_filter(wanted).map_err(|error| match error {
        telemetry::Error::NotStarted => Status::failed_precondition(error.to_string()),
        error => Status::invalid_argument(error.to_string()),
    })?;
    // A warning, so that it is logged with almost any filter.
    warn!(%former, wanted, "log filter changed");
    Ok(former)
}

/// Adds the current span's context to an outgoing call; nothing where nothing is recorded.
pub fn inject(metadata: &mut MetadataMap) {
    let value = telemetry::current().map(|current| MetadataValue::try_from(current.to_string()));
    if let Some(Ok(value)) = value {
        metadata.insert(TRACEPARENT, value);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tonic::Code;
    use tower::{ServiceBuilder, ServiceExt, service_fn};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    const TEXT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const HEALTH: &str = "/grpc.health.v1.Health/Check";
    const SYNC: &str = "/margay.sync.v1.Sync/Connect";

    async fn code(peer: Option<(&str, &str)>, path: &str) -> Code {
        let rules = Admission::new([
            ("margay:nodes", &["margay.sync.v1.Sync"][..]),
            ("margay:readers", &["grpc.health.v1.Health"][..]),
        ]);
        let service =
            ServiceBuilder::new()
                .layer(rules)
                .service(service_fn(|_: Request<()>| async {
                    Ok::<_, Infallible>(Status::ok("reached").into_http())
                }));
        let mut request = Request::builder().uri(path).body(()).expect("request");
        if let Some((common_name, organization)) = peer {
            let (common_name, organization) = (common_name.to_owned(), organization.to_owned());
            request.extensions_mut().insert(Peer {
                common_name,
                organization,
            });
        }
        let response: Response<Body> = service.oneshot(request).await.expect("answer");
        Status::from_header_map(response.headers())
            .expect("status")
            .code()
    }

    #[tokio::test]
    async fn only_what_is_allowed_is_reached() {
        let node = Some(("margay:node:n1", "margay:nodes"));
        let reader = Some(("margay:reader", "margay:readers"));
        let table = [
            (node, SYNC, Code::Ok),
            (node, HEALTH, Code::PermissionDenied),
            (reader, HEALTH, Code::Ok),
            (reader, SYNC, Code::PermissionDenied),
            (
                reader,
                "/grpc.health.v1.HealthX/Check",
                Code::PermissionDenied,
            ),
            (reader, "/grpc.health.v1.Health", Code::PermissionDenied),
            (
                reader,
                "//grpc.health.v1.Health/Check",
                Code::PermissionDenied,
            ),
            (Some(("margay-typha", "")), HEALTH, Code::PermissionDenied),
            (
                Some(("margay:node:n1", "other")),
                SYNC,
                Code::PermissionDenied,
            ),
            (None, HEALTH, Code::Unauthenticated),
        ];
        for (peer, path, wanted) in table {
            assert_eq!(code(peer, path).await, wanted, "{peer:?} {path}");
        }
    }

    #[test]
    fn a_call_continues_the_callers_trace() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let subscriber = tracing_subscriber::registry().with(layer);
        let inside = || async { Ok::<_, Infallible>(telemetry::current()) };
        let mut service = ServiceBuilder::new()
            .layer(Trace)
            .service(service_fn(move |_: Request<()>| inside()));
        tracing::subscriber::with_default(subscriber, || {
            let request = Request::builder()
                .uri(SYNC)
                .header(TRACEPARENT, TEXT)
                .body(());
            let call = service.call(request.expect("request"));
            let seen = futures::executor::block_on(call)
                .expect("answer")
                .expect("recorded");
            assert!(TEXT.contains(&seen.trace_id()), "{seen}");
            assert_ne!(seen.to_string(), TEXT);

            let outer = info_span!("outer");
            let mut metadata = MetadataMap::new();
            outer.in_scope(|| inject(&mut metadata));
            let sent = metadata
                .get(TRACEPARENT)
                .and_then(|value| value.to_str().ok());
            assert_eq!(
                sent.map(str::to_owned),
                telemetry::of(&outer).map(|c| c.to_string())
            );
        });
        let mut nothing = MetadataMap::new();
        inject(&mut nothing);
        assert!(nothing.is_empty());
    }
}
