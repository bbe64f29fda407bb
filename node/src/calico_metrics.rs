//! Numbers that Felix has names for, under these names, so that its dashboards work. What has no
//! counterpart here (iptables, the `ipset` program, a calculation graph on the node) is not made
//! up.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;

use crate::metrics::{Kind, Metrics};

/// Values of `felix_resync_state`: waiting for the datastore, and in sync.
const RESYNC_STATES: [i64; 2] = [1, 3];

/// Computes the numbers at each scrape.
#[derive(Debug)]
pub(crate) struct CalicoMetrics(pub(crate) Metrics);

impl CalicoMetrics {
    fn records(&self, kind: &str) -> i64 {
        let kind = Kind {
            kind: kind.to_owned(),
        };
        self.0.records.get(&kind).map_or(0, |records| records.get())
    }
}

impl Collector for CalicoMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counter = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let sets = self.records("ip-set");
        // Counters of Felix whose names do not end as OpenMetrics demands are gauges here.
        let gauges = [
            (
                "felix_active_local_endpoints",
                "Endpoints of this node",
                self.records("endpoint") + self.records("host-endpoint"),
            ),
            (
                "felix_active_local_policies",
                "Policies that apply to endpoints of this node",
                self.records("policy"),
            ),
            (
                "felix_active_local_selectors",
                "Sets that these policies refer to",
                sets,
            ),
            ("felix_ipsets_calico", "The same", sets),
            (
                "felix_cluster_num_hosts",
                "Nodes of the cluster",
                self.records("node"),
            ),
            (
                "felix_int_dataplane_failures",
                "Transactions that the kernel refused or did not answer",
                counter(self.0.failures.get()),
            ),
            (
                "felix_resync_state",
                "3 while the view is complete and the stream to typha open, else 1",
                RESYNC_STATES[usize::from(self.0.in_sync.get() == 1)],
            ),
            (
                "felix_resyncs_started",
                "Streams to typha that were opened",
                counter(self.0.streams.get()),
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}
