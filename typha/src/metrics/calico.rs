//! Numbers that Calico's Typha has names for, under these names, with the label of its sync type
//! for Felix where it has one. What has no counterpart here (write and ping latencies, shared
//! snapshots) is not made up.

use margay_calc::kinds::KINDS;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;

use super::{Counters, Kind};
use crate::registry::Registry;

/// Label of metrics by sync type: a stream of ours is what Felix gets.
const FELIX: [(&str, &str); 1] = [("syncer", "felix")];

/// Computes the numbers at each scrape.
#[derive(Debug)]
pub(super) struct CalicoMetrics {
    pub(super) counters: Counters,
    pub(super) nodes: Registry,
}

impl Collector for CalicoMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Counters {
            events, updates, ..
        } = &self.counters;
        let (events, updates) = (sum(events), sum(updates));
        let skipped = events.saturating_sub(updates);
        let objects = each_kind(|kind| {
            let objects = self.counters.objects.get(kind);
            objects.map_or(0, |objects| u64::try_from(objects.get()).unwrap_or(0))
        });
        let open = u64::try_from(self.counters.open_streams.get()).unwrap_or(0);
        let (streaming, _) = self.nodes.count_current();
        // Counters of Calico's whose names do not end as OpenMetrics demands are gauges here.
        let global = [
            (
                "typha_connections_accepted",
                "Streams that nodes have opened",
                self.counters.streams.get(),
            ),
            ("typha_connections_active", "Streams that are open", open),
            (
                "typha_connections_dropped",
                "Nodes that were sent to the replica that is to serve them",
                self.counters.moved_nodes.get(),
            ),
        ];
        for (name, help, value) in global {
            let gauge = ConstGauge::new(value as i64);
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        let of_felix = [
            (
                "typha_connections_streaming",
                "Nodes that are served",
                streaming as u64,
            ),
            (
                "typha_breadcrumb_seq_number",
                "Revision of this replica",
                self.nodes.revision(),
            ),
            ("typha_cache_size", "Objects in the cache", objects),
            (
                "typha_updates_skipped",
                "Events from the API that changed nothing",
                skipped,
            ),
        ];
        for (name, help, value) in of_felix {
            let gauge = ConstGauge::new(value as i64);
            let mut metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric.encode_family(&FELIX)?)?;
        }
        let counter = ConstCounter::new(events);
        let (name, help) = ("typha_updates", "Events from the API");
        let mut metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
        counter.encode(metric.encode_family(&FELIX)?)
    }
}

fn sum(family: &Family<Kind, Counter>) -> u64 {
    each_kind(|kind| family.get(kind).map_or(0, |counter| counter.get()))
}

fn each_kind(value: impl Fn(&Kind) -> u64) -> u64 {
    let kinds = KINDS.iter();
    kinds.map(|kind| value(&Kind { kind: kind.name })).sum()
}
