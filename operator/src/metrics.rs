//! What the operator counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Counters of the operator.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Rounds begun with an Installation present.
    pub rounds: Counter,
    /// Objects that could not be written.
    pub failures: Counter,
    /// 1 while the Installation is degraded.
    pub degraded: Gauge,
}

impl Metrics {
    /// Metrics that the admin port shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("margay_operator_rounds", "Rounds of reconciliation", metrics.rounds.clone());
        registry.register(
            "margay_operator_write_failures",
            "Objects that could not be written",
            metrics.failures.clone(),
        );
        registry.register("margay_operator_degraded", "1 while the Installation is degraded", metrics.degraded.clone());
        metrics
    }
}
