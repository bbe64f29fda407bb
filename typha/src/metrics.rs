//! Counters, gauges and latencies. Names of objects and nodes are never labels.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry as Metrics;

use crate::registry::Registry;

/// A watched kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// Its name.
    pub kind: &'static str,
}

/// Handles that the parts count with.
#[derive(Debug, Clone)]
pub struct Counters {
    /// Events from the API, by kind.
    pub events: Family<Kind, Counter>,
    /// Events that changed something, by kind.
    pub updates: Family<Kind, Counter>,
    /// Watches that failed and were started again, by kind.
    pub watch_failures: Family<Kind, Counter>,
    /// Lists that were not believed, by kind.
    pub lists_refused: Family<Kind, Counter>,
    /// Objects held, by kind.
    pub objects: Family<Kind, Gauge>,
    /// Objects that are not used as they are written, by kind.
    pub refused: Family<Kind, Gauge>,
    /// Times that changes were computed.
    pub flushes: Counter,
    /// Seconds from the first update of a flush to its frames.
    pub flush_seconds: Histogram,
    /// Frames sent.
    pub frames: Counter,
    /// Bytes of frames sent.
    pub bytes: Counter,
    /// Sessions begun.
    pub hellos: Counter,
    /// Buckets restated at hello.
    pub restated: Counter,
    /// Streams ended because of what the node sent or did not send.
    pub faults: Counter,
    /// Seconds from an API event to the ack of a node.
    pub realised_seconds: Histogram,
    /// Seconds from a frame to its ack.
    pub ack_seconds: Histogram,
}

impl Counters {
    /// Registers everything, also what is read from the registry of nodes when it is asked for.
    pub fn register(metrics: &mut Metrics, nodes: Registry) -> Self {
        let counters = Self {
            events: Family::default(),
            updates: Family::default(),
            watch_failures: Family::default(),
            lists_refused: Family::default(),
            objects: Family::default(),
            refused: Family::default(),
            flushes: Counter::default(),
            flush_seconds: latencies(),
            frames: Counter::default(),
            bytes: Counter::default(),
            hellos: Counter::default(),
            restated: Counter::default(),
            faults: Counter::default(),
            realised_seconds: latencies(),
            ack_seconds: latencies(),
        };
        counters.register_api(metrics);
        counters.register_stream(metrics);
        metrics.register_collector(Box::new(Nodes(nodes)));
        counters
    }

    fn register_api(&self, metrics: &mut Metrics) {
        metrics.register("margay_typha_api_events", "Events from the API", self.events.clone());
        metrics.register(
            "margay_typha_api_updates",
            "Events from the API that changed something",
            self.updates.clone(),
        );
        metrics.register(
            "margay_typha_watch_failures",
            "Watches that failed and were started again",
            self.watch_failures.clone(),
        );
        metrics.register(
            "margay_typha_lists_refused",
            "Lists that lacked objects which exist, or were older than what was known",
            self.lists_refused.clone(),
        );
        metrics.register("margay_typha_objects", "Objects held", self.objects.clone());
        metrics.register(
            "margay_typha_objects_refused",
            "Objects that are not used as they are written",
            self.refused.clone(),
        );
    }

    fn register_stream(&self, metrics: &mut Metrics) {
        metrics.register("margay_typha_flushes", "Times that changes were computed", self.flushes.clone());
        metrics.register(
            "margay_typha_flush_seconds",
            "From the first update of a flush to its frames",
            self.flush_seconds.clone(),
        );
        metrics.register("margay_typha_frames", "Frames sent to nodes", self.frames.clone());
        metrics.register("margay_typha_frame_bytes", "Bytes sent to nodes", self.bytes.clone());
        metrics.register("margay_typha_hellos", "Sessions begun", self.hellos.clone());
        metrics.register(
            "margay_typha_restated_buckets",
            "Buckets restated when sessions began",
            self.restated.clone(),
        );
        metrics.register(
            "margay_typha_stream_faults",
            "Streams ended because of what the node sent or did not send",
            self.faults.clone(),
        );
        metrics.register(
            "margay_typha_realised_seconds",
            "From an API event to the ack of a node that enforces it",
            self.realised_seconds.clone(),
        );
        metrics.register("margay_typha_ack_seconds", "From a frame to its ack", self.ack_seconds.clone());
    }
}

/// 0.25 ms to 8 s, doubling.
fn latencies() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 16))
}

/// Gauges that are counted when somebody looks.
#[derive(Debug)]
struct Nodes(Registry);

impl Collector for Nodes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (all, current) = self.0.realised();
        let gauges = [
            ("margay_typha_nodes", "Nodes with a stream", all),
            ("margay_typha_nodes_current", "Nodes that enforce everything that this replica knows", current),
            ("margay_typha_in_sync", "Whether this replica has seen the whole API", usize::from(self.0.in_sync())),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value as i64);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}
