//! Overlay of pod addresses that nodes report ahead of the API.
//!
//! Peers of a pod may talk to it as soon as its node has set up its network; waiting for the API
//! would cost the way through kubelet. A node's report applies only to its own pods, and only until
//! the API shows the same.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use margay_api::endpoint::{EndpointKey, WorkloadEndpoint};
use margay_calc::update::Update;
use margay_proto::sync::LocalEndpoint;

/// Pods of one node that may differ from the API at the same time: far more than a node starts
/// within the API's delay.
const MAX_PER_NODE: usize = 1024;
/// Of these, pods that are not in the cache yet: bound to the node, but not received from the API.
pub const MAX_UNKNOWN: usize = 128;

/// Reason for rejecting a report.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportRejected {
    /// More reports than the node can have pods.
    #[error(
        "node {node:?} has reported addresses of {MAX_PER_NODE} pods that the API does not confirm \
         yet; further reports are rejected until it does"
    )]
    TooMany {
        /// The node.
        node: String,
    },
    /// More reports about pods that the API does not know than can be starting.
    #[error(
        "node {node:?} has reported addresses of {MAX_UNKNOWN} pods that the API does not have \
         yet; further ones are rejected until it does"
    )]
    TooManyUnknown {
        /// The node.
        node: String,
    },
    /// The address is in a block of another node and not borrowed.
    #[error(
        "node {node:?} reports address {address} in a block of node {owner:?}; it is rejected \
         until the block shows it as borrowed"
    )]
    Foreign {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
        /// The node that the block is affine to.
        owner: String,
    },
}

/// Reports by node, because a node's report applies only to its own pods.
#[derive(Debug, Default)]
pub struct Overlays(BTreeMap<String, BTreeMap<EndpointKey, LocalEndpoint>>);

impl Overlays {
    /// Replaces the report of `node` (by its certificate) about the same pod.
    pub fn set(&mut self, node: &str, report: LocalEndpoint) -> Result<(), ReportRejected> {
        let of_node = self.0.entry(node.to_owned()).or_default();
        if of_node.len() >= MAX_PER_NODE && !of_node.contains_key(&report.key) {
            return Err(ReportRejected::TooMany {
                node: node.to_owned(),
            });
        }
        of_node.insert(report.key.clone(), report);
        Ok(())
    }

    /// Returns true if the node may report one more unknown pod. `is_known` returns true for pods
    /// that the API knows.
    pub fn has_room(
        &self,
        node: &str,
        report: &LocalEndpoint,
        is_known: impl Fn(&EndpointKey) -> bool,
    ) -> bool {
        let Some(of_node) = self.0.get(node) else {
            return true;
        };
        of_node.contains_key(&report.key)
            || of_node.keys().filter(|key| !is_known(key)).count() < MAX_UNKNOWN
    }

    /// Removes the node's report about a pod that has ended.
    pub fn forget(&mut self, node: &str, report: &LocalEndpoint) {
        let of_node = self.0.get(node);
        if of_node
            .and_then(|of_node| of_node.get(&report.key))
            .is_some_and(|former| former.uid == report.uid)
        {
            self.remove(node, &report.key);
        }
    }

    /// Keeps the reports for which `keep` returns true, called with node and report.
    pub fn retain(&mut self, keep: impl Fn(&str, &LocalEndpoint) -> bool) {
        self.0.retain(|node, of_node| {
            of_node.retain(|_, report| keep(node, report));
            !of_node.is_empty()
        });
    }

    /// Overlays the object with the report of its node.
    pub fn effective<'a>(&self, uid: &str, update: Option<&'a Update>) -> Option<Cow<'a, Update>> {
        let update = update?;
        let Some((key, endpoint, report)) = self.find(uid, update) else {
            return Some(Cow::Borrowed(update));
        };
        let mut endpoint = endpoint.clone();
        endpoint.addresses.clone_from(&report.addresses);
        Some(Cow::Owned(Update::Endpoint(key.clone(), Some(endpoint))))
    }

    /// Removes the report of the object's node if the API now shows the same.
    pub fn confirm(&mut self, uid: &str, update: Option<&Update>) {
        if let Some((key, endpoint, report)) = update.and_then(|update| self.find(uid, update))
            && report.addresses == endpoint.addresses
        {
            self.remove(&endpoint.node, key);
        }
    }

    /// Removes the report about a deleted object, unless it is about a successor of the same name.
    pub fn withdraw(&mut self, uid: &str, update: Option<&Update>) {
        if let Some((key, endpoint, _)) = update.and_then(|update| self.find(uid, update)) {
            self.remove(&endpoint.node, key);
        }
    }

    /// Removes all reports of a node and returns them.
    pub fn remove_node(&mut self, node: &str) -> BTreeMap<EndpointKey, LocalEndpoint> {
        self.0.remove(node).unwrap_or_default()
    }

    /// Number of reports of the node.
    #[cfg(test)]
    pub fn reports(&self, node: &str) -> usize {
        self.0.get(node).map_or(0, BTreeMap::len)
    }

    fn find<'a>(
        &self,
        uid: &str,
        update: &'a Update,
    ) -> Option<(&'a EndpointKey, &'a WorkloadEndpoint, &LocalEndpoint)> {
        let Update::Endpoint(key, Some(endpoint)) = update else {
            return None;
        };
        let report = self.0.get(&endpoint.node)?.get(key)?;
        (report.uid == uid).then_some((key, endpoint, report))
    }

    fn remove(&mut self, node: &str, key: &EndpointKey) {
        if let Some(of_node) = self.0.get_mut(node) {
            of_node.remove(key);
            if of_node.is_empty() {
                self.0.remove(node);
            }
        }
    }
}
