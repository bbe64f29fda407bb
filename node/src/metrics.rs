//! Metrics of the agent: `margay_node_*` on the admin port.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::calico_metrics::CalicoMetrics;

/// Label of a kind of record.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// Kind as in the debug service: `settings`, `pool`, `node`, `route`, `ip-set`, `policy`,
    /// `endpoint` or `host-endpoint`.
    pub kind: String,
}

/// Metrics of the agent. Cheap to clone; clones share the same counters.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Frames received from typha.
    pub frames: Counter,
    /// Records in the view, by kind.
    pub records: Family<Kind, Gauge>,
    /// Revision of the view in the kernel.
    pub revision: Gauge,
    /// 1 while the stream is up and typha has declared the view complete.
    pub in_sync: Gauge,
    /// Streams to typha that were opened.
    pub streams: Counter,
    /// Pods attached to this node.
    pub pods: Gauge,
    /// Transactions committed to nftables.
    pub commits: Counter,
    /// nftables operations in these transactions.
    pub operations: Counter,
    /// Transactions that the kernel refused or did not answer.
    pub failures: Counter,
    /// Repairs of the table after a change by another program.
    pub repairs: Counter,
    /// Records that are not enforced as written.
    pub errors: Gauge,
    /// Attachment files that could not be read at start.
    pub damaged: Gauge,
    plan: Histogram,
    commit: Histogram,
    lag: Histogram,
}

impl Metrics {
    /// Registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        // From 10 microseconds to 5 seconds.
        let seconds = || Histogram::new(exponential_buckets(1e-5, 2.0, 20));
        let metrics = Self {
            frames: Counter::default(),
            records: Family::default(),
            revision: Gauge::default(),
            in_sync: Gauge::default(),
            streams: Counter::default(),
            pods: Gauge::default(),
            commits: Counter::default(),
            operations: Counter::default(),
            failures: Counter::default(),
            repairs: Counter::default(),
            errors: Gauge::default(),
            damaged: Gauge::default(),
            plan: seconds(),
            commit: seconds(),
            lag: seconds(),
        };
        let own = registry.sub_registry_with_prefix("margay_node");
        own.register(
            "frames",
            "Frames received from typha",
            metrics.frames.clone(),
        );
        own.register(
            "records",
            "Records in the view, by kind",
            metrics.records.clone(),
        );
        own.register(
            "revision",
            "Revision of the view in the kernel",
            metrics.revision.clone(),
        );
        own.register(
            "in_sync",
            "1 while the stream is up and the view is complete",
            metrics.in_sync.clone(),
        );
        own.register(
            "streams",
            "Streams to typha that were opened",
            metrics.streams.clone(),
        );
        own.register("pods", "Pods attached to this node", metrics.pods.clone());
        own.register(
            "commits",
            "Transactions committed to nftables",
            metrics.commits.clone(),
        );
        own.register(
            "operations",
            "Operations in these transactions",
            metrics.operations.clone(),
        );
        own.register(
            "failures",
            "Transactions that the kernel refused or did not answer",
            metrics.failures.clone(),
        );
        own.register(
            "repairs",
            "Repairs of the table after changes by other programs",
            metrics.repairs.clone(),
        );
        own.register(
            "errors",
            "Records that are not enforced as written",
            metrics.errors.clone(),
        );
        own.register(
            "attachments_damaged",
            "Attachment files that could not be read at start and were set aside",
            metrics.damaged.clone(),
        );
        own.register_with_unit(
            "plan",
            "Time to compute an nftables transaction",
            Unit::Seconds,
            metrics.plan.clone(),
        );
        own.register_with_unit(
            "commit",
            "Time that the kernel took to commit a transaction",
            Unit::Seconds,
            metrics.commit.clone(),
        );
        own.register_with_unit(
            "lag",
            "Time from typha's receipt of an event to its commit in the kernel",
            Unit::Seconds,
            metrics.lag.clone(),
        );
        registry.register(
            "felix_int_dataplane_apply_time_seconds",
            "As margay_node_commit_seconds",
            metrics.commit.clone(),
        );
        registry.register_collector(Box::new(CalicoMetrics(metrics.clone())));
        margay_runtime::process::register(registry);
        metrics
    }

    /// Records a commit and the duration of its stages.
    pub fn record_commit(&self, operations: usize, plan: Duration, commit: Duration) {
        self.commits.inc();
        self.operations.inc_by(operations as u64);
        self.plan.observe(plan.as_secs_f64());
        self.commit.observe(commit.as_secs_f64());
    }

    /// Records the age of an event when it got in force.
    pub fn record_lag(&self, lag: Duration) {
        self.lag.observe(lag.as_secs_f64());
    }
}
