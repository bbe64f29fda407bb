//! Metrics of the operator.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Metrics of the operator.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Reconciles of an existing Installation.
    pub reconciles: Counter,
    /// Objects that could not be written.
    pub failures: Counter,
    /// 1 while a condition `Degraded` is True.
    pub degraded: Gauge,
}

impl Metrics {
    /// Metrics that the admin port shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "margay_operator_reconciles",
            "Reconciles of the Installation",
            metrics.reconciles.clone(),
        );
        registry.register(
            "margay_operator_write_failures",
            "Writes of objects that failed",
            metrics.failures.clone(),
        );
        registry.register(
            "margay_operator_degraded",
            "1 while a condition Degraded is True",
            metrics.degraded.clone(),
        );
        margay_runtime::process::register(registry);
        metrics
    }
}
