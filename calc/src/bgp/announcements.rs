//! Which Services each node announces, as Calico does.
//!
//! Ranges of the settings are announced by every node, but for ranges of a single address and, with
//! `serviceLoadBalancerAggregation: Disabled`, all of load balancers. Single addresses within the
//! ranges are announced for a Service with `externalTrafficPolicy: Local` by the nodes that have a
//! ready backend; of other Services, external addresses and those of load balancers that are in no
//! announced range, by every node.

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
    /// Other Services with external addresses or those of a load balancer.
    wide: BTreeSet<NamespacedName>,
}

/// Nodes whose announcements may have changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Affected {
    /// Those with a ready backend.
    pub(crate) nodes: BTreeSet<String>,
    /// All of them, if single addresses are announced by all nodes.
    pub(crate) is_wide: bool,
}

impl Announcements {
    /// Sets or removes a Service.
    pub(crate) fn set_service(
        &mut self,
        name: &NamespacedName,
        addresses: Option<ServiceAddresses>,
    ) -> Affected {
        if self.services.get(name) == addresses.as_ref() {
            return Affected::default();
        }
        let is_wide = |addresses: &ServiceAddresses| {
            let is_empty =
                addresses.load_balancer_ips.is_empty() && addresses.external_ips.is_empty();
            !addresses.is_local && !is_empty
        };
        let was_wide = self.wide.remove(name);
        let mut nodes = self.unlink(name);
        match addresses {
            Some(addresses) => {
                if is_wide(&addresses) {
                    self.wide.insert(name.clone());
                }
                self.services.insert(name.clone(), addresses);
            }
            None => {
                self.services.remove(name);
            }
        }
        nodes.extend(self.link(name));
        Affected {
            nodes,
            is_wide: was_wide || self.wide.contains(name),
        }
    }

    /// Sets the backends of a Service.
    pub(crate) fn set_backends(&mut self, name: &NamespacedName, backends: &[Backend]) -> Affected {
        let nodes = backends.iter().filter_map(|each| each.ready_on.as_deref());
        let nodes: BTreeSet<String> = nodes.map(str::to_owned).collect();
        if self.ready.get(name).unwrap_or(&BTreeSet::new()) == &nodes {
            return Affected::default();
        }
        let mut touched = self.unlink(name);
        if nodes.is_empty() {
            self.ready.remove(name);
        } else {
            self.ready.insert(name.clone(), nodes);
        }
        touched.extend(self.link(name));
        Affected {
            nodes: touched,
            is_wide: false,
        }
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
        let aggregates = settings.aggregates_load_balancers();
        let is_range = |range: &&IpNet| range.prefix_len() < range.max_prefix_len();
        let is_whole = |range: &&IpNet| aggregates && is_range(range);
        let external = written.external_ips.iter().filter(is_range);
        let balanced = written.load_balancer_ips.iter().filter(is_whole);
        let mut announced: BTreeSet<IpNet> = written
            .cluster_ips
            .iter()
            .chain(external)
            .chain(balanced)
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
        let rest = |ranges: &[IpNet], is_whole: &dyn Fn(&&IpNet) -> bool| -> Vec<IpNet> {
            let rest = ranges.iter().filter(|range| !is_whole(range));
            rest.copied().collect()
        };
        let external = rest(&written.external_ips, &is_range);
        let balanced = rest(&written.load_balancer_ips, &is_whole);
        if !external.is_empty() || !balanced.is_empty() {
            for service in self.wide.iter().filter_map(|name| self.services.get(name)) {
                let lists = [
                    (&service.external_ips, &external),
                    (&service.load_balancer_ips, &balanced),
                ];
                for (addresses, ranges) in lists {
                    let addresses = addresses.iter().filter(|each| within(ranges, each));
                    announced.extend(addresses.map(single));
                }
            }
        }
        announced
    }
}
