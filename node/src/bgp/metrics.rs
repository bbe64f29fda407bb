//! Metrics of BGP: `margay_bgp_*` on the admin port.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use margay_dataplane::routes::learned::LearnedProgress;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::report::{BgpReport, PeerReport};

/// Label of a session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct PeerLabels {
    /// Name of the BGPPeer, or of the node in the mesh.
    pub name: String,
    /// Address and port of the peer.
    pub address: String,
}

/// Metrics of BGP. Cheap to clone; clones share the same values.
#[derive(Clone, Debug, Default)]
pub struct BgpMetrics {
    /// 1 while the session is established.
    pub established: Family<PeerLabels, Gauge>,
    /// Prefixes that the peer has sent.
    pub received: Family<PeerLabels, Gauge>,
    /// Prefixes that the peer has been sent.
    pub sent: Family<PeerLabels, Gauge>,
    /// UPDATEs that the peer has sent.
    pub updates: Family<PeerLabels, Gauge>,
    /// Sessions and attempts that have ended.
    pub ended: Family<PeerLabels, Gauge>,
    wanted: Gauge,
    installed: Gauge,
    failed: Gauge,
}

impl BgpMetrics {
    /// Registers the metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let own = registry.sub_registry_with_prefix("margay_bgp");
        own.register(
            "session_established",
            "1 while the session with the peer is established",
            metrics.established.clone(),
        );
        own.register(
            "prefixes_received",
            "Prefixes that the peer has sent, before filters",
            metrics.received.clone(),
        );
        own.register(
            "prefixes_sent",
            "Prefixes that the peer has been sent",
            metrics.sent.clone(),
        );
        own.register(
            "session_updates",
            "UPDATEs that the peer has sent since it was configured",
            metrics.updates.clone(),
        );
        own.register(
            "session_ends",
            "Sessions with the peer, and attempts at them, that have ended since it was configured",
            metrics.ended.clone(),
        );
        own.register(
            "routes_wanted",
            "Routes of peers that the kernel is to have",
            metrics.wanted.clone(),
        );
        own.register(
            "routes_installed",
            "Routes of peers in the kernel",
            metrics.installed.clone(),
        );
        own.register(
            "routes_failed",
            "Routes of peers that the kernel refused last",
            metrics.failed.clone(),
        );
        metrics
    }

    /// Takes the state of the speaker over. `known` are the sessions of the last call; those that
    /// are gone have no metrics any more.
    pub(super) fn set_sessions(
        &self,
        report: Option<&BgpReport>,
        known: &mut BTreeSet<PeerLabels>,
    ) {
        let peers = report.iter().flat_map(|report| &report.peers);
        let present: BTreeSet<PeerLabels> = peers
            .map(|(address, peer)| {
                let labels = labels(*address, peer);
                self.set_session(&labels, peer);
                labels
            })
            .collect();
        for gone in known.difference(&present) {
            for family in [
                &self.established,
                &self.received,
                &self.sent,
                &self.updates,
                &self.ended,
            ] {
                family.remove(gone);
            }
        }
        *known = present;
    }

    fn set_session(&self, labels: &PeerLabels, peer: &PeerReport) {
        let set = |family: &Family<PeerLabels, Gauge>, value: usize| {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            family.get_or_create(labels).set(value);
        };
        let count = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        set(&self.established, usize::from(peer.is_established()));
        set(&self.received, peer.received.iter().sum());
        set(&self.sent, peer.sent);
        set(&self.updates, count(peer.updates));
        set(&self.ended, count(peer.ended));
    }

    /// Takes over how far the kernel has come.
    pub(super) fn set_routes(&self, progress: &LearnedProgress) {
        for (gauge, value) in [
            (&self.wanted, progress.wanted),
            (&self.installed, progress.installed),
            (&self.failed, progress.failed),
        ] {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }
}

fn labels(address: SocketAddr, peer: &PeerReport) -> PeerLabels {
    PeerLabels {
        name: peer.name.clone(),
        address: address.to_string(),
    }
}
