//! Logs to standard error, spans to an OTLP collector, and the filter that can be changed while
//! running.
//!
//! Logs are JSON, one object a line, unless standard error is a terminal; `MARGAY_LOG_FORMAT`
//! (`json` or `text`) decides otherwise. Spans leave over gRPC when `OTEL_EXPORTER_OTLP_ENDPOINT`
//! is set (see [`Settings`]); without it nothing is recorded and spans cost next to nothing.

mod context;
mod export;
mod settings;

use std::io::{self, IsTerminal};
use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Metadata, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::filter::{FilterExt, ParseError, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

pub use context::{Traceparent, TraceparentError, add_link, current, of, set_parent};
pub use settings::{Format, Settings, SettingsError};

/// Spans and events of these crates may leave the process; those of the exporter's own stack must
/// not, because each export would make the next one.
const OURS: &str = "margay";
/// The longest that the last spans of a process may take to leave.
const FLUSH: Duration = Duration::from_secs(3);

/// Target of the event that a panic is written as.
const PANIC: &str = "panic";

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Why telemetry did not start, or a filter was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter does not parse.
    #[error("log filter {filter:?}: {source}; write it like margay_node=debug,info (MARGAY_LOG)")]
    Filter {
        /// The filter as given.
        filter: String,
        /// Parse error.
        source: ParseError,
    },
    /// An environment variable has an invalid value.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The exporter cannot be made.
    #[error(
        "OTLP endpoint {endpoint:?}: {reason}; correct OTEL_EXPORTER_OTLP_ENDPOINT or unset it"
    )]
    Export {
        /// The endpoint as given, but for a password in it.
        endpoint: String,
        /// Cause.
        reason: String,
    },
    /// Telemetry belongs to the process and starts once.
    #[error("telemetry has already started in this process: {0}")]
    Twice(#[from] TryInitError),
    /// A filter can be changed only where one was set.
    #[error("telemetry has not started in this process, so there is no log filter to change")]
    NotStarted,
}

/// Keeps the exporter alive. Call [`Guard::shutdown`] as the last thing, else the last seconds'
/// spans are lost.
#[derive(Debug)]
pub struct Guard {
    provider: Option<SdkTracerProvider>,
}

impl Guard {
    /// Sends the spans that have not left yet; gives up after three seconds.
    pub async fn shutdown(self) {
        let Some(provider) = self.provider else {
            return;
        };
        let flushed = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH));
        match flushed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans were not exported"),
            Err(error) => tracing::warn!(%error, "the exporter has panicked"),
        }
    }
}

/// Starts logs and spans for the whole process. `service` names it to the collector unless
/// `OTEL_SERVICE_NAME` does; `filter` is in the syntax of `tracing_subscriber`'s `EnvFilter`, empty
/// for `info`. Needs a tokio runtime of several threads when spans are exported.
pub fn init(service: &str, filter: &str) -> Result<Guard, Error> {
    let settings = Settings::from_env(service, io::stderr().is_terminal(), |name| {
        std::env::var(name).ok()
    })?;
    start(&settings, filter)
}

/// Starts telemetry with settings that do not come from the environment.
pub fn start(settings: &Settings, filter: &str) -> Result<Guard, Error> {
    let (filter, handle) = reload::Layer::new(parse_filter(filter)?);
    let provider = export::provider(settings)?;
    let spans = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer(OURS))
            .with_filter(filter_fn(leaves_the_process))
    });
    tracing_subscriber::registry()
        .with(lines(settings.format).with_filter(filter.or(filter_fn(is_panic))))
        .with(spans)
        .try_init()?;
    // `try_init` succeeds once in a process, so this is the first and only value.
    let _ = FILTER.set(handle);
    log_panics();
    Ok(Guard { provider })
}

/// Replaces the log filter of the running process and returns the former one. Spans are not
/// affected.
pub fn set_filter(filter: &str) -> Result<String, Error> {
    let wanted = parse_filter(filter)?;
    let handle = FILTER.get().ok_or(Error::NotStarted)?;
    let mut former = String::new();
    handle
        .modify(|current| {
            former = current.to_string();
            *current = wanted;
        })
        .map_err(|_| Error::NotStarted)?;
    Ok(former)
}

fn parse_filter(filter: &str) -> Result<EnvFilter, Error> {
    EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .parse(filter)
        .map_err(|source| Error::Filter {
            filter: filter.to_owned(),
            source,
        })
}

fn leaves_the_process(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= tracing::Level::INFO && metadata.target().starts_with(OURS)
}

fn is_panic(metadata: &Metadata<'_>) -> bool {
    metadata.target() == PANIC
}

fn lines<S>(format: Format) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    match format {
        Format::Json => layer
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .boxed(),
        Format::Text => layer.with_ansi(io::stderr().is_terminal()).boxed(),
    }
}

/// A panic in a task ends only that task, so it must be seen where everything else is seen,
/// whatever the filter.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic
            .location()
            .map(ToString::to_string)
            .unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("no message");
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(target: PANIC, %place, %message, %backtrace, "panic");
    }));
}
