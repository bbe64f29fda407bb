//! A collector of traces: receives what the components export, and prints one as a tree.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use parking_lot::{Mutex, MutexGuard};
use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::cluster::process;

/// Spans that are kept; later ones push the oldest out.
const KEPT: usize = 200_000;
/// Width of a tree's bars, in characters.
const WIDTH: u64 = 40;

/// A span, as far as a tree needs it. Times are nanoseconds since 1970.
#[derive(Debug, Clone)]
pub struct Span {
    /// Which trace it belongs to.
    pub trace: Vec<u8>,
    /// Its own id.
    pub id: Vec<u8>,
    /// The span that caused it; empty at the root.
    pub parent: Vec<u8>,
    /// Name of the operation.
    pub name: String,
    /// Program.
    pub service: String,
    /// Start.
    pub start: u64,
    /// End.
    pub end: u64,
    /// Attributes as text.
    pub attributes: BTreeMap<String, String>,
}

/// Spans that were received, and the server that receives them.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    received: Receiver,
}

#[derive(Debug, Clone, Default)]
struct Receiver(Arc<Mutex<Received>>);

#[derive(Debug, Default)]
struct Received {
    spans: Vec<Span>,
    /// Everything as it came, if that is wanted.
    bytes: Option<Vec<u8>>,
}

impl Receiver {
    fn lock(&self) -> MutexGuard<'_, Received> {
        self.0.lock()
    }
}

impl Collector {
    /// Listens at `address` inside a network namespace, for as long as the process lives.
    pub fn start(netns: &Path, address: SocketAddr) -> Result<Self> {
        let listener = process::in_netns(netns, || {
            TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))
        })?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let received = Receiver::default();
        let receiver = received.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
                let server = tonic::transport::Server::builder()
                    .add_service(TraceServiceServer::new(receiver));
                server.serve_with_incoming(incoming).await?;
                anyhow::Ok(())
            })
        });
        Ok(Self { address, received })
    }

    /// Address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Received spans of a trace.
    pub fn of(&self, trace: &[u8]) -> Vec<Span> {
        of_trace(&self.received.lock().spans, trace)
    }

    /// From now on everything is kept as it comes, also what a tree does not need.
    pub fn record(&self) {
        self.received.lock().bytes.get_or_insert_default();
    }

    /// Bytes received since [`record`](Self::record).
    pub fn recorded(&self) -> Vec<u8> {
        self.received.lock().bytes.clone().unwrap_or_default()
    }

    /// Programs that have reported a span.
    pub fn services(&self) -> BTreeSet<String> {
        self.received
            .lock()
            .spans
            .iter()
            .map(|span| span.service.clone())
            .collect()
    }

    /// Waits for a trace whose root did `name`, carries the attribute, and began after `since`,
    /// until the program `last` has reported so many spans of it and no further one has come for a
    /// moment; then whatever has come.
    pub fn trace(
        &self,
        root: (&str, &str, &str),
        since: SystemTime,
        last: (&str, usize),
        limit: Duration,
    ) -> Option<Vec<Span>> {
        let since = since.duration_since(UNIX_EPOCH).ok()?.as_nanos() as u64;
        let begin = Instant::now();
        let (mut known, mut changed) = (0, Instant::now());
        loop {
            let found = self.find(root, since);
            if found.len() != known {
                (known, changed) = (found.len(), Instant::now());
            }
            let reported = found.iter().filter(|span| span.service == last.0).count() >= last.1;
            let quiet = changed.elapsed() > Duration::from_secs(1);
            if (reported && quiet) || begin.elapsed() > limit {
                return (!found.is_empty()).then_some(found);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Every replica of typha traces a change; the most complete trace is from the one that sent it
    /// to a node.
    fn find(&self, (name, key, value): (&str, &str, &str), since: u64) -> Vec<Span> {
        let received = self.received.lock();
        let spans = &received.spans;
        let is_root = |span: &&Span| {
            let attribute = span.attributes.get(key);
            span.name == name
                && span.start >= since
                && attribute.is_some_and(|found| found.contains(value))
        };
        let traces = spans
            .iter()
            .filter(is_root)
            .map(|root| of_trace(spans, &root.trace));
        traces.max_by_key(Vec::len).unwrap_or_default()
    }
}

fn of_trace(spans: &[Span], trace: &[u8]) -> Vec<Span> {
    spans
        .iter()
        .filter(|span| span.trace == trace)
        .cloned()
        .collect()
}

/// A trace as a tree: one line a span, with the time from the root's start, how long it took, and a
/// bar.
pub fn tree(spans: &[Span]) -> String {
    let ids: BTreeSet<&[u8]> = spans.iter().map(|span| span.id.as_slice()).collect();
    let mut children: BTreeMap<&[u8], Vec<&Span>> = BTreeMap::new();
    let mut roots = Vec::new();
    for span in spans {
        if ids.contains(span.parent.as_slice()) {
            children.entry(&span.parent).or_default().push(span);
        } else {
            roots.push(span);
        }
    }
    let begin = spans
        .iter()
        .map(|span| span.start)
        .min()
        .unwrap_or_default();
    let length = spans
        .iter()
        .map(|span| span.end)
        .max()
        .unwrap_or_default()
        .saturating_sub(begin)
        .max(1);
    let mut text = format!(
        "{:58} {:14} {:>8} {:>9}\n",
        "span", "program", "after ms", "took ms"
    );
    roots.sort_by_key(|span| span.start);
    for root in roots {
        branch(&mut text, root, &mut children, (begin, length), 0);
    }
    text
}

fn branch(
    text: &mut String,
    span: &Span,
    children: &mut BTreeMap<&[u8], Vec<&Span>>,
    (begin, length): (u64, u64),
    depth: usize,
) {
    let detail = span
        .attributes
        .iter()
        .map(|(key, value)| format!(" {key}={value}"))
        .collect::<String>();
    let label: String = format!("{:indent$}{}{detail}", "", span.name, indent = depth * 2)
        .chars()
        .take(58)
        .collect();
    let after = span.start.saturating_sub(begin);
    let took = span.end.saturating_sub(span.start);
    let at = |time: u64| (time.min(length) * WIDTH / length) as usize;
    let (left, right) = (at(after), at(after + took));
    let bar = "━".repeat((right - left).max(1));
    let _ = writeln!(
        text,
        "{label:58} {:14} {:>8.2} {:>9.3}  {}{bar}",
        span.service,
        after as f64 / 1e6,
        took as f64 / 1e6,
        " ".repeat(left)
    );
    let mut below = children.remove(span.id.as_slice()).unwrap_or_default();
    below.sort_by_key(|span| span.start);
    for child in below {
        branch(text, child, children, (begin, length), depth + 1);
    }
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let request = request.into_inner();
        let bytes = request.encode_to_vec();
        let mut spans = Vec::new();
        for resource in request.resource_spans {
            let about = resource
                .resource
                .map(|resource| attributes(resource.attributes))
                .unwrap_or_default();
            let service = about.get("service.name").cloned().unwrap_or_default();
            for span in resource
                .scope_spans
                .into_iter()
                .flat_map(|scope| scope.spans)
            {
                spans.push(Span {
                    trace: span.trace_id,
                    id: span.span_id,
                    parent: span.parent_span_id,
                    name: span.name,
                    service: service.clone(),
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                    attributes: attributes(span.attributes),
                });
            }
        }
        let mut received = self.lock();
        if let Some(kept) = &mut received.bytes {
            kept.extend(bytes);
        }
        received.spans.extend(spans);
        let excess = received.spans.len().saturating_sub(KEPT);
        received.spans.drain(..excess);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Attributes of the operation; those that tracing adds about the source are left out.
fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, String> {
    const SOURCE: [&str; 5] = ["code.", "thread.", "busy_ns", "idle_ns", "target"];
    let text = |pair: &KeyValue| match pair.value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text.clone()),
        any_value::Value::IntValue(number) => Some(number.to_string()),
        any_value::Value::BoolValue(truth) => Some(truth.to_string()),
        any_value::Value::DoubleValue(number) => Some(number.to_string()),
        _ => None,
    };
    pairs
        .iter()
        .filter(|pair| !SOURCE.iter().any(|prefix| pair.key.starts_with(prefix)))
        .filter_map(|pair| Some((pair.key.clone(), text(pair)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_span(id: u8, parent: u8, name: &str, start: u64, end: u64) -> Span {
        let parent = if parent == 0 {
            Vec::new()
        } else {
            vec![parent]
        };
        Span {
            trace: vec![1],
            id: vec![id],
            parent,
            name: name.into(),
            service: "demo".into(),
            start,
            end,
            attributes: BTreeMap::new(),
        }
    }

    #[test]
    fn children_stand_below_their_parents_in_the_order_of_their_starts() {
        let spans = [
            mk_span(3, 1, "late", 5_000_000, 6_000_000),
            mk_span(1, 0, "root", 0, 1_000_000),
            mk_span(2, 1, "early", 500_000, 700_000),
        ];
        let text = tree(&spans);
        let names: Vec<&str> = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split("demo").next())
            .map(str::trim_end)
            .collect();
        assert_eq!(names, ["root", "  early", "  late"], "{text}");
    }

    #[test]
    fn a_span_whose_parent_is_unknown_is_a_root() {
        let text = tree(&[mk_span(2, 9, "orphan", 0, 1)]);
        assert!(text.contains("orphan"), "{text}");
    }
}
