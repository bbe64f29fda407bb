//! Automatic host endpoints as written. Their addresses come from annotations that the node's agent
//! writes, so one that an IPAM block gives to a pod or to another node's tunnel is left out: it
//! would put that pod among the hosts that policies select.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::HostEndpoint;
use margay_api::hosts::{CREATED_BY, LABEL_CREATED_BY};

/// Automatic host endpoints, with the indexes to find those that a change may concern.
#[derive(Debug, Default)]
pub(crate) struct AutoHosts {
    written: BTreeMap<String, HostEndpoint>,
    /// Names by address.
    by_address: BTreeMap<IpAddr, BTreeSet<String>>,
    /// Names by node.
    by_node: BTreeMap<String, BTreeSet<String>>,
}

/// Returns true if the operator, or Calico's controller, made the host endpoint. What people write
/// is used as it is.
fn is_automatic(endpoint: &HostEndpoint) -> bool {
    endpoint
        .labels
        .get(LABEL_CREATED_BY)
        .is_some_and(|by| by == CREATED_BY)
}

impl AutoHosts {
    /// Sets or removes a host endpoint; one that is not automatic is removed.
    pub(crate) fn set(&mut self, name: &str, endpoint: Option<&HostEndpoint>) {
        if let Some(former) = self.written.remove(name) {
            former
                .addresses
                .iter()
                .for_each(|address| remove(&mut self.by_address, address, name));
            remove(&mut self.by_node, &former.node, name);
        }
        let Some(endpoint) = endpoint.filter(|endpoint| is_automatic(endpoint)) else {
            return;
        };
        for address in &endpoint.addresses {
            self.by_address
                .entry(*address)
                .or_default()
                .insert(name.to_owned());
        }
        self.by_node
            .entry(endpoint.node.clone())
            .or_default()
            .insert(name.to_owned());
        self.written.insert(name.to_owned(), endpoint.clone());
    }

    /// The host endpoint as written, if it is automatic.
    pub(crate) fn get(&self, name: &str) -> Option<&HostEndpoint> {
        self.written.get(name)
    }

    /// All of them, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &HostEndpoint)> {
        self.written.iter()
    }

    /// Names of those with an address in the range.
    pub(crate) fn within(&self, range: IpNet) -> impl Iterator<Item = &String> {
        self.by_address
            .range(range.network()..=range.broadcast())
            .flat_map(|(_, names)| names)
    }

    /// Names of those of a node.
    pub(crate) fn on(&self, node: &str) -> impl Iterator<Item = &String> {
        self.by_node.get(node).into_iter().flatten()
    }
}

fn remove<K: Ord>(index: &mut BTreeMap<K, BTreeSet<String>>, key: &K, name: &str) {
    if let Some(names) = index.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            index.remove(key);
        }
    }
}
