//! Effective BGPConfiguration of each node: `node.NAME` over `default`, field by field.

use std::collections::BTreeMap;

use ipnet::IpNet;
use margay_api::bgp::{BgpSettings, DEFAULT_NAME};
use margay_api::network::{NodeBgp, NodeInfo};

use crate::model::BgpMesh;

/// Calico's default AS number.
const DEFAULT_ASN: u32 = 64512;
/// Port of BGP (RFC 4271 section 8.2.1).
const DEFAULT_PORT: u16 = 179;
/// Calico's default metric of routes.
const DEFAULT_PRIORITY: u32 = 1024;

/// All BGPConfigurations, by the names of their objects.
#[derive(Debug, Default)]
pub(super) struct AllSettings(BTreeMap<String, BgpSettings>);

impl AllSettings {
    /// Sets or removes an object. Returns false if nothing changes.
    pub(super) fn set(&mut self, name: String, settings: Option<BgpSettings>) -> bool {
        if self.0.get(&name) == settings.as_ref() {
            return false;
        }
        match settings {
            Some(settings) => self.0.insert(name, settings),
            None => self.0.remove(&name),
        };
        true
    }

    /// Settings of a node.
    pub(super) fn of(&self, node: &str) -> EffectiveSettings {
        let default = self.0.get(DEFAULT_NAME).cloned().unwrap_or_default();
        EffectiveSettings(match self.0.get(&format!("node.{node}")) {
            Some(own) => own.over(&default),
            None => default,
        })
    }

    /// Returns true if some object names ranges of Services.
    pub(super) fn announces_services(&self) -> bool {
        self.0.values().any(|settings| {
            !settings.cluster_ips.is_empty()
                || !settings.external_ips.is_empty()
                || !settings.load_balancer_ips.is_empty()
        })
    }

    /// Returns true if all nodes announce single addresses of some Services.
    pub(super) fn announces_single_addresses(&self) -> bool {
        self.0.values().any(|settings| {
            let mut ranges = settings
                .external_ips
                .iter()
                .chain(&settings.load_balancer_ips);
            settings.aggregates_load_balancers == Some(false)
                || ranges.any(|range| range.prefix_len() == range.max_prefix_len())
        })
    }
}

/// Settings of one node, with their defaults.
#[derive(Debug)]
pub(super) struct EffectiveSettings(BgpSettings);

impl EffectiveSettings {
    /// Speaker of the node, as others see it.
    pub(super) fn node_bgp(&self, node: &NodeInfo) -> NodeBgp {
        NodeBgp {
            asn: node
                .bgp_annotations
                .asn
                .or(self.0.asn)
                .unwrap_or(DEFAULT_ASN),
            cluster_id: node.bgp_annotations.cluster_id,
            listen_port: self.0.listen_port.unwrap_or(DEFAULT_PORT),
        }
    }

    pub(super) fn mesh(&self) -> Option<BgpMesh> {
        self.0.mesh.unwrap_or(true).then(|| BgpMesh {
            password: self.0.mesh_password.clone(),
            restart_time: self.0.mesh_restart_time,
        })
    }

    pub(super) fn priorities(&self) -> [u32; 2] {
        self.0
            .priorities
            .map(|value| value.unwrap_or(DEFAULT_PRIORITY))
    }

    /// Ranges of load balancers are announced as a whole.
    pub(super) fn aggregates_load_balancers(&self) -> bool {
        self.0.aggregates_load_balancers.unwrap_or(true)
    }

    /// All ranges of Services.
    pub(super) fn service_ranges(&self) -> impl Iterator<Item = &IpNet> {
        let lists = [
            &self.0.cluster_ips,
            &self.0.external_ips,
            &self.0.load_balancer_ips,
        ];
        lists.into_iter().flatten()
    }

    /// What is as written.
    pub(super) fn written(&self) -> &BgpSettings {
        &self.0
    }
}
