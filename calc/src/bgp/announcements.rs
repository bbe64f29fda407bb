//! Which Services each node announces, as Calico does.
//!
//! Ranges of the settings are announced by every node, but for single addresses of load balancers
//! and, with `serviceLoadBalancerAggregation: Disabled`, all of theirs. Single addresses within the
//! ranges are announced for a Service with `externalTrafficPolicy: Local` by the nodes that have a
//! ready backend, and the load balancer's addresses that are in no announced range by every node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::ServiceAddresses;
use margay_api::meta::{Labels, NamespacedName};

use super::settings::EffectiveSettings;
use crate::update::Backend;

/// Label that keeps a node from serving load balancers, and from announcing Services.
const LABEL_EXCLUDED: &str = "node.kubernetes.io/exclude-from-external-load-balancers";

/// Services with their addresses, and nodes with their ready backends.
#[derive(Debug, Default)]
pub(crate) struct Announcements {
    services: BTreeMap<NamespacedName, ServiceAddresses>,
    ready: BTreeMap<NamespacedName, BTreeSet<String>>,
    /// Services with `externalTrafficPolicy: Local`, by node with a ready backend.
    local: BTreeMap<String, BTreeSet<NamespacedName>>,
    /// Other Services with addresses of a load balancer.
    balanced: BTreeSet<NamespacedName>,
}

/// Nodes whose announcements may have changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Affected {
    /// All.
    All,
    /// These.
    Nodes(BTreeSet<String>),
}

impl Announcements {
    /// Sets or removes a Service.
    pub(crate) fn set_service(
        &mut self,
        name: &NamespacedName,
        addresses: Option<ServiceAddresses>,
    ) -> Affected {
        if self.services.get(name) == addresses.as_ref() {
            return Affected::Nodes(BTreeSet::new());
        }
        let is_balanced = |addresses: &ServiceAddresses| {
            !addresses.is_local && !addresses.load_balancer_ips.is_empty()
        };
        let was_balanced = self.balanced.remove(name);
        let mut nodes = self.unlink(name);
        match addresses {
            Some(addresses) => {
                if is_balanced(&addresses) {
                    self.balanced.insert(name.clone());
                }
                self.services.insert(name.clone(), addresses);
            }
            None => {
                self.services.remove(name);
            }
        }
        nodes.extend(self.link(name));
        if was_balanced || self.balanced.contains(name) {
            Affected::All
        } else {
            Affected::Nodes(nodes)
        }
    }

    /// Sets the backends of a Service. Returns the nodes concerned.
    pub(crate) fn set_backends(
        &mut self,
        name: &NamespacedName,
        backends: &[Backend],
    ) -> BTreeSet<String> {
        let nodes = backends.iter().filter_map(|each| each.ready_on.as_deref());
        let nodes: BTreeSet<String> = nodes.map(str::to_owned).collect();
        if self.ready.get(name).unwrap_or(&BTreeSet::new()) == &nodes {
            return BTreeSet::new();
        }
        let mut touched = self.unlink(name);
        if nodes.is_empty() {
            self.ready.remove(name);
        } else {
            self.ready.insert(name.clone(), nodes);
        }
        touched.extend(self.link(name));
        touched
    }

    /// Removes a Service from the nodes that announce it.
    fn unlink(&mut self, name: &NamespacedName) -> BTreeSet<String> {
        let nodes = self.ready.get(name).cloned().unwrap_or_default();
        for node in &nodes {
            if let Some(services) = self.local.get_mut(node) {
                services.remove(name);
                if services.is_empty() {
                    self.local.remove(node);
                }
            }
        }
        nodes
    }

    fn link(&mut self, name: &NamespacedName) -> BTreeSet<String> {
        let nodes = self.ready.get(name).cloned().unwrap_or_default();
        if self.services.get(name).is_some_and(|each| each.is_local) {
            for node in &nodes {
                let services = self.local.entry(node.clone()).or_default();
                services.insert(name.clone());
            }
        }
        nodes
    }

    /// What a node with these labels announces.
    pub(super) fn of(
        &self,
        node: &str,
        labels: &Labels,
        settings: &EffectiveSettings,
    ) -> BTreeSet<IpNet> {
        if labels
            .get(LABEL_EXCLUDED)
            .is_some_and(|value| value != "false")
        {
            return BTreeSet::new();
        }
        let written = settings.written();
        let is_whole = |range: &&IpNet| {
            settings.aggregates_load_balancers() && range.prefix_len() < range.max_prefix_len()
        };
        let balanced = written.load_balancer_ips.iter().filter(is_whole);
        let mut announced: BTreeSet<IpNet> = written
            .cluster_ips
            .iter()
            .chain(&written.external_ips)
            .chain(balanced.clone())
            .copied()
            .collect();
        let within =
            |ranges: &[IpNet], address: &IpAddr| ranges.iter().any(|range| range.contains(address));
        let single = |address: &IpAddr| IpNet::from(*address);
        for service in self.local.get(node).into_iter().flatten() {
            let Some(service) = self.services.get(service) else {
                continue;
            };
            let lists = [
                (&service.cluster_ips, &written.cluster_ips),
                (&service.external_ips, &written.external_ips),
                (&service.load_balancer_ips, &written.load_balancer_ips),
            ];
            for (addresses, ranges) in lists {
                let addresses = addresses.iter().filter(|each| within(ranges, each));
                announced.extend(addresses.map(single));
            }
        }
        let singles: Vec<IpNet> = written
            .load_balancer_ips
            .iter()
            .filter(|range| !is_whole(range))
            .copied()
            .collect();
        if !singles.is_empty() {
            let services = self
                .balanced
                .iter()
                .filter_map(|name| self.services.get(name));
            let addresses = services.flat_map(|service| &service.load_balancer_ips);
            let addresses = addresses.filter(|address| within(&singles, address));
            announced.extend(addresses.map(single));
        }
        announced
    }
}
