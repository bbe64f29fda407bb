//! Addresses that a node has given to its pods and that the API does not show yet.
//!
//! A pod's peers may talk to it as soon as its node has plumbed it; waiting for the API would cost a round trip through
//! kubelet. What a node says holds for its own pods only, and only until the API says the same.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

use margay_api::endpoint::{EndpointKey, WorkloadEndpoint};
use margay_calc::update::Update;
use margay_proto::sync::LocalEndpoint;

/// Pods of one node that may differ from the API at the same time: what a node starts within the API's delay, with much room.
const PER_NODE: usize = 1024;
/// Of those, pods that the API does not know: what is bound to the node and not heard of yet.
pub const UNKNOWN: usize = 128;

/// What a node says is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// A node has said more than it can have pods.
    #[error(
        "node {node:?} has told addresses of {PER_NODE} pods that the API does not confirm; no more are taken before it does"
    )]
    TooMany {
        /// The node.
        node: String,
    },
    /// A node has said more about pods that the API does not know than can be on their way.
    #[error(
        "node {node:?} has told addresses of {UNKNOWN} pods that the API does not know; no more of those are taken before it does"
    )]
    TooManyUnknown {
        /// The node.
        node: String,
    },
    /// The address is in a block of another node, which has not lent it.
    #[error(
        "node {node:?} tells address {address} of a block of node {owner:?}; it is taken once the block shows that it was lent"
    )]
    Foreign {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
        /// The node that the block belongs to.
        owner: String,
    },
}

/// Owner of what nodes have said: by node, as a node's word counts for its own pods only.
#[derive(Debug, Default)]
pub struct Overlays(BTreeMap<String, BTreeMap<EndpointKey, LocalEndpoint>>);

impl Overlays {
    /// What `node` (by its certificate) says replaces what it said about the same pod.
    pub fn put(&mut self, node: &str, said: LocalEndpoint) -> Result<(), NotTaken> {
        let of_node = self.0.entry(node.to_owned()).or_default();
        if of_node.len() >= PER_NODE && !of_node.contains_key(&said.key) {
            return Err(NotTaken::TooMany { node: node.to_owned() });
        }
        of_node.insert(said.key.clone(), said);
        Ok(())
    }

    /// Whether the node may say something about one more pod that is not known. `is_known` says of which the API knows.
    pub fn has_room(&self, node: &str, said: &LocalEndpoint, is_known: impl Fn(&EndpointKey) -> bool) -> bool {
        let Some(of_node) = self.0.get(node) else { return true };
        of_node.contains_key(&said.key) || of_node.keys().filter(|key| !is_known(key)).count() < UNKNOWN
    }

    /// The node says that a pod has nothing any more, and this is all that there was to say about it.
    pub fn forget(&mut self, node: &str, said: &LocalEndpoint) {
        let of_node = self.0.get(node);
        if of_node.and_then(|of_node| of_node.get(&said.key)).is_some_and(|former| former.uid == said.uid) {
            self.remove(node, &said.key);
        }
    }

    /// Drops what a node said unless `keep` says of node and word that it is still needed.
    pub fn retain(&mut self, keep: impl Fn(&str, &LocalEndpoint) -> bool) {
        self.0.retain(|node, of_node| {
            of_node.retain(|_, said| keep(node, said));
            !of_node.is_empty()
        });
    }

    /// The object's meaning with what its node says about it.
    pub fn effective<'a>(&self, uid: &str, update: Option<&'a Update>) -> Option<Cow<'a, Update>> {
        let update = update?;
        let Some((key, endpoint, said)) = self.find(uid, update) else {
            return Some(Cow::Borrowed(update));
        };
        let mut endpoint = endpoint.clone();
        endpoint.addresses.clone_from(&said.addresses);
        Some(Cow::Owned(Update::Endpoint(key.clone(), Some(endpoint))))
    }

    /// The API shows the object like this: what its node says is not needed any more if it is the same.
    pub fn confirm(&mut self, uid: &str, update: Option<&Update>) {
        if let Some((key, endpoint, said)) = update.and_then(|update| self.find(uid, update))
            && said.addresses == endpoint.addresses
        {
            self.remove(&endpoint.node, key);
        }
    }

    /// The object is gone, and with it what its node said about it; not what it said about a successor.
    pub fn withdraw(&mut self, uid: &str, update: Option<&Update>) {
        if let Some((key, endpoint, _)) = update.and_then(|update| self.find(uid, update)) {
            self.remove(&endpoint.node, key);
        }
    }

    /// What the node has said, which counts no more.
    pub fn take(&mut self, node: &str) -> BTreeMap<EndpointKey, LocalEndpoint> {
        self.0.remove(node).unwrap_or_default()
    }

    /// Pods that the node has said something about that counts.
    #[cfg(test)]
    pub fn words(&self, node: &str) -> usize {
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
        let said = self.0.get(&endpoint.node)?.get(key)?;
        (said.uid == uid).then_some((key, endpoint, said))
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
