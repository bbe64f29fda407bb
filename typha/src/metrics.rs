//! Counters, gauges and histograms. Names of objects and nodes are never labels.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry as Metrics;

use crate::registry::Registry;
use calico::CalicoMetrics;

mod calico;

/// A watched kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// Its name.
    pub kind: &'static str,
}

/// Metrics that the parts of typha update.
#[derive(Debug, Clone)]
pub struct Counters {
    /// Events from the API, by kind.
    pub events: Family<Kind, Counter>,
    /// Events that changed something, by kind.
    pub updates: Family<Kind, Counter>,
    /// Watches that failed and were started again, by kind.
    pub watch_failures: Family<Kind, Counter>,
    /// Lists that were refused, by kind.
    pub lists_refused: Family<Kind, Counter>,
    /// Objects held, by kind.
    pub objects: Family<Kind, Gauge>,
    /// Objects that are not enforced as written, by kind.
    pub refused: Family<Kind, Gauge>,
    /// Flushes of the graph that changed something.
    pub flushes: Counter,
    /// Records of a flush that changed something.
    pub flush_records: Histogram,
    /// Mean seconds until the streams took the frames of a flush.
    pub delivery_seconds: Histogram,
    /// Changes of a frame.
    pub frame_changes: Histogram,
    /// Streams that nodes have opened.
    pub streams: Counter,
    /// Streams that are open.
    pub open_streams: Gauge,
    /// Seconds from the first update of a flush to its frames.
    pub flush_seconds: Histogram,
    /// Frames sent.
    pub frames: Counter,
    /// Bytes of frames sent.
    pub bytes: Counter,
    /// Sessions opened.
    pub sessions_opened: Counter,
    /// Hellos that were refused in favour of other replicas.
    pub refused_hellos: Counter,
    /// Nodes that were sent to the replica that is to serve them.
    pub moved_nodes: Counter,
    /// Buckets resent when sessions opened.
    pub resent_buckets: Counter,
    /// Streams ended because of an error of the node.
    pub stream_errors: Counter,
    /// Seconds from an API event to the ack of a node that enforces it.
    pub enforcement_seconds: Histogram,
    /// Seconds from a frame to its ack.
    pub ack_seconds: Histogram,
}

impl Counters {
    /// Registers all metrics, including those computed on demand from the registry of nodes.
    pub fn register(metrics: &mut Metrics, nodes: Registry) -> Self {
        let counters = Self {
            events: Family::default(),
            updates: Family::default(),
            watch_failures: Family::default(),
            lists_refused: Family::default(),
            objects: Family::default(),
            refused: Family::default(),
            flushes: Counter::default(),
            flush_records: sizes(),
            delivery_seconds: latencies(),
            frame_changes: sizes(),
            streams: Counter::default(),
            open_streams: Gauge::default(),
            flush_seconds: latencies(),
            frames: Counter::default(),
            bytes: Counter::default(),
            sessions_opened: Counter::default(),
            refused_hellos: Counter::default(),
            moved_nodes: Counter::default(),
            resent_buckets: Counter::default(),
            stream_errors: Counter::default(),
            enforcement_seconds: latencies(),
            ack_seconds: latencies(),
        };
        counters.register_api(metrics);
        counters.register_stream(metrics);
        counters.register_calico(metrics, &nodes);
        metrics.register_collector(Box::new(Nodes(nodes)));
        margay_runtime::process::register(metrics);
        counters
    }

    fn register_api(&self, metrics: &mut Metrics) {
        metrics.register(
            "margay_typha_api_events",
            "Events from the API",
            self.events.clone(),
        );
        metrics.register(
            "margay_typha_api_updates",
            "Updates that events from the API resulted in",
            self.updates.clone(),
        );
        metrics.register(
            "margay_typha_watch_failures",
            "Watches that failed and were restarted",
            self.watch_failures.clone(),
        );
        metrics.register(
            "margay_typha_lists_refused",
            "Lists refused because they lacked existing objects or were older than known state",
            self.lists_refused.clone(),
        );
        metrics.register(
            "margay_typha_objects",
            "Objects in the cache",
            self.objects.clone(),
        );
        metrics.register(
            "margay_typha_objects_refused",
            "Objects that are not enforced as written",
            self.refused.clone(),
        );
    }

    /// Registers what Calico's Typha has a name for under that name too, so that its dashboards
    /// work.
    fn register_calico(&self, metrics: &mut Metrics, nodes: &Registry) {
        let felix = metrics.sub_registry_with_label(("syncer".into(), "felix".into()));
        felix.register(
            "typha_breadcrumb_size",
            "As margay_typha_flush_records",
            self.flush_records.clone(),
        );
        felix.register(
            "typha_client_latency_secs",
            "As margay_typha_delivery_seconds",
            self.delivery_seconds.clone(),
        );
        felix.register(
            "typha_kvs_per_msg",
            "As margay_typha_frame_changes",
            self.frame_changes.clone(),
        );
        metrics.register_collector(Box::new(CalicoMetrics {
            counters: self.clone(),
            nodes: nodes.clone(),
        }));
    }

    fn register_stream(&self, metrics: &mut Metrics) {
        metrics.register(
            "margay_typha_flushes",
            "Flushes of the graph",
            self.flushes.clone(),
        );
        metrics.register(
            "margay_typha_flush_seconds",
            "From the first update of a flush to its frames",
            self.flush_seconds.clone(),
        );
        metrics.register(
            "margay_typha_flush_records",
            "Records that a flush changed",
            self.flush_records.clone(),
        );
        metrics.register(
            "margay_typha_delivery_seconds",
            "From a flush until streams took its frames, mean of the streams",
            self.delivery_seconds.clone(),
        );
        metrics.register(
            "margay_typha_frame_changes",
            "Changes in a frame",
            self.frame_changes.clone(),
        );
        metrics.register(
            "margay_typha_streams",
            "Streams that nodes have opened",
            self.streams.clone(),
        );
        metrics.register(
            "margay_typha_streams_open",
            "Streams that are open",
            self.open_streams.clone(),
        );
        metrics.register(
            "margay_typha_frames",
            "Frames sent to nodes",
            self.frames.clone(),
        );
        metrics.register(
            "margay_typha_frame_bytes",
            "Bytes sent to nodes",
            self.bytes.clone(),
        );
        metrics.register(
            "margay_typha_sessions_opened",
            "Sessions opened",
            self.sessions_opened.clone(),
        );
        metrics.register(
            "margay_typha_hellos_refused",
            "Nodes that asked to be served and were refused in favour of other replicas",
            self.refused_hellos.clone(),
        );
        metrics.register(
            "margay_typha_nodes_moved",
            "Nodes that were sent to the replica that is to serve them",
            self.moved_nodes.clone(),
        );
        metrics.register(
            "margay_typha_resent_buckets",
            "Buckets resent when sessions opened",
            self.resent_buckets.clone(),
        );
        metrics.register(
            "margay_typha_stream_errors",
            "Streams ended because of an error of the node",
            self.stream_errors.clone(),
        );
        metrics.register(
            "margay_typha_enforcement_seconds",
            "From an API event to the ack of a node that enforces it",
            self.enforcement_seconds.clone(),
        );
        metrics.register(
            "margay_typha_ack_seconds",
            "From a frame to its ack",
            self.ack_seconds.clone(),
        );
    }
}

/// Buckets from 1 to 32,768, doubling twice.
fn sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 4.0, 8))
}

/// Buckets from 0.25 ms to 8 s, doubling.
fn latencies() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 16))
}

/// Gauges computed on demand.
#[derive(Debug)]
struct Nodes(Registry);

impl Collector for Nodes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (all, current) = self.0.count_current();
        let gauges = [
            ("margay_typha_nodes", "Nodes with a stream", all),
            (
                "margay_typha_nodes_current",
                "Nodes that enforce the latest revision of this replica",
                current,
            ),
            (
                "margay_typha_in_sync",
                "1 if this replica is in sync with the API",
                usize::from(self.0.in_sync()),
            ),
            (
                "margay_typha_cut_off",
                "1 if the API server has not answered this replica for 30 seconds",
                usize::from(self.0.is_cut_off()),
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value as i64);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}
