//! What the agent counts: `margay_node_*` on the admin port.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// A kind of record.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// As in the debug service: `settings`, `pool`, `node`, `route`, `ip-set`, `policy` or `endpoint`.
    pub kind: String,
}

/// Cheap to clone; every clone counts into the same numbers.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Frames taken from typha.
    pub frames: Counter,
    /// Records held, by kind.
    pub records: Family<Kind, Gauge>,
    /// Revision that is in the kernel.
    pub revision: Gauge,
    /// Whether typha has said that the view is whole, and the stream is up.
    pub in_sync: Gauge,
    /// Pods attached.
    pub pods: Gauge,
    /// Transactions committed to nftables.
    pub commits: Counter,
    /// Operations in them.
    pub operations: Counter,
    /// Transactions that did not happen.
    pub failures: Counter,
    /// Times that the table had to be repaired after a change by others.
    pub repairs: Counter,
    /// Records that are not enforced as they are written.
    pub errors: Gauge,
    /// Files about pods' interfaces that could not be read at the start.
    pub damaged: Gauge,
    plan: Histogram,
    commit: Histogram,
    lag: Histogram,
}

impl Metrics {
    /// Registers everything.
    pub fn new(registry: &mut Registry) -> Self {
        // From 10 microseconds to 5 seconds.
        let seconds = || Histogram::new(exponential_buckets(1e-5, 2.0, 20));
        let metrics = Self {
            frames: Counter::default(),
            records: Family::default(),
            revision: Gauge::default(),
            in_sync: Gauge::default(),
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
        own.register("frames", "Frames taken from typha", metrics.frames.clone());
        own.register("records", "Records held, by kind", metrics.records.clone());
        own.register("revision", "Revision of the view that is in the kernel", metrics.revision.clone());
        own.register("in_sync", "1 while the stream is up and the view is whole", metrics.in_sync.clone());
        own.register("pods", "Pods attached to this node", metrics.pods.clone());
        own.register("commits", "Transactions committed to nftables", metrics.commits.clone());
        own.register("operations", "Operations in these transactions", metrics.operations.clone());
        own.register("failures", "Transactions that the kernel refused or did not answer", metrics.failures.clone());
        own.register("repairs", "Repairs of the table after a change by others", metrics.repairs.clone());
        own.register("errors", "Records that are not enforced as they are written", metrics.errors.clone());
        own.register(
            "attachments_damaged",
            "Files about pods' interfaces that could not be read at the start and were put aside",
            metrics.damaged.clone(),
        );
        own.register_with_unit(
            "plan",
            "Time to compute what the kernel must hold",
            Unit::Seconds,
            metrics.plan.clone(),
        );
        own.register_with_unit("commit", "Time that the kernel took", Unit::Seconds, metrics.commit.clone());
        own.register_with_unit(
            "lag",
            "From typha's sight of an event to the kernel's commit",
            Unit::Seconds,
            metrics.lag.clone(),
        );
        metrics
    }

    /// One commit, with how long its stages took.
    pub fn committed(&self, operations: usize, plan: Duration, commit: Duration) {
        self.commits.inc();
        self.operations.inc_by(operations as u64);
        self.plan.observe(plan.as_secs_f64());
        self.commit.observe(commit.as_secs_f64());
    }

    /// An event that typha saw this long ago is in force.
    pub fn realised(&self, lag: Duration) {
        self.lag.observe(lag.as_secs_f64());
    }
}
