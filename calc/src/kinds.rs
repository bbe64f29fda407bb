//! Table of the kinds that policy or routing depends on, by their names in the API.

use serde::{Deserialize, Deserializer};

use crate::ingest::{self, Ingested};

/// A kind that [`ingest()`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindName {
    /// API group; empty for the core.
    pub group: &'static str,
    /// Kind within its group.
    pub kind: &'static str,
    /// Name that is unique among all of them: two groups have a `NetworkPolicy`.
    pub name: &'static str,
}

impl KindName {
    /// Returns the kind of an object with that `apiVersion` and `kind`, in whatever version.
    pub fn of(api_version: &str, kind: &str) -> Option<&'static Self> {
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        KINDS
            .iter()
            .find(|known| known.group == group && known.kind == kind)
    }
}

macro_rules! kinds {
    ($($group:literal, $kind:literal, $name:literal, $ingest:path;)*) => {
        /// All of them.
        pub const KINDS: &[KindName] = &[$(KindName { group: $group, kind: $kind, name: $name }),*];

        /// Ingests an object of the kind of that unique name; `None` if there is no such kind.
        pub fn ingest<'de, D: Deserializer<'de>>(
            name: &str,
            object: D,
        ) -> Option<Result<Ingested, D::Error>> {
            match name {
                $($name => Some(Deserialize::deserialize(object).map($ingest)),)*
                _ => None,
            }
        }
    };
}

kinds! {
    "", "Pod", "Pod", ingest::pod;
    "", "Namespace", "Namespace", ingest::namespace;
    "", "Node", "Node", ingest::node;
    "", "ServiceAccount", "ServiceAccount", ingest::service_account;
    "discovery.k8s.io", "EndpointSlice", "EndpointSlice", ingest::endpoint_slice;
    "networking.k8s.io", "NetworkPolicy", "KubernetesNetworkPolicy", ingest::kubernetes_policy;
    "policy.networking.k8s.io", "ClusterNetworkPolicy", "KubernetesClusterNetworkPolicy",
        ingest::cluster_policy;
    "projectcalico.org", "NetworkPolicy", "NetworkPolicy", ingest::network_policy;
    "projectcalico.org", "GlobalNetworkPolicy", "GlobalNetworkPolicy", ingest::global_policy;
    "projectcalico.org", "StagedNetworkPolicy", "StagedNetworkPolicy", ingest::staged_policy;
    "projectcalico.org", "StagedGlobalNetworkPolicy", "StagedGlobalNetworkPolicy",
        ingest::staged_global_policy;
    "projectcalico.org", "StagedKubernetesNetworkPolicy", "StagedKubernetesNetworkPolicy",
        ingest::staged_kubernetes_policy;
    "projectcalico.org", "Tier", "Tier", ingest::tier;
    "projectcalico.org", "NetworkSet", "NetworkSet", ingest::network_set;
    "projectcalico.org", "GlobalNetworkSet", "GlobalNetworkSet", ingest::global_network_set;
    "projectcalico.org", "HostEndpoint", "HostEndpoint", ingest::host_endpoint;
    "projectcalico.org", "IPPool", "IPPool", ingest::pool;
    "projectcalico.org", "IPAMBlock", "IPAMBlock", ingest::block;
    "projectcalico.org", "FelixConfiguration", "FelixConfiguration", ingest::settings;
    "", "Service", "Service", ingest::service;
    "projectcalico.org", "BGPConfiguration", "BGPConfiguration", ingest::bgp_settings;
    "projectcalico.org", "BGPPeer", "BGPPeer", ingest::bgp_peer;
    "projectcalico.org", "BGPFilter", "BGPFilter", ingest::bgp_filter;
}
