//! What the allocator of a node watches.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;

use super::limits::KnownLimits;
use super::pools::Pools;
use super::request::NoAddress;

/// Node of each block, as the cluster knows it. It may lag behind; `None` until anything is known.
pub type BlockMap = Option<Arc<BTreeMap<IpNet, String>>>;

/// Watched inputs of the allocator.
#[derive(Clone)]
pub struct Inputs {
    /// Node of each block.
    pub map: watch::Receiver<BlockMap>,
    /// Pools to assign from.
    pub pools: watch::Receiver<Pools>,
    /// Limits and reservations.
    pub limits: watch::Receiver<KnownLimits>,
    /// No Namespace names pools for its pods; false as long as that is not certain.
    pub no_namespace_names_pools: watch::Receiver<bool>,
}

impl Inputs {
    /// Returns once all inputs are known.
    pub(super) async fn known(mut self) -> Result<(), NoAddress> {
        self.map
            .wait_for(Option::is_some)
            .await
            .map_err(|_| NoAddress::stopping())?;
        self.pools
            .wait_for(Option::is_some)
            .await
            .map_err(|_| NoAddress::stopping())?;
        self.limits
            .wait_for(Option::is_some)
            .await
            .map_err(|_| NoAddress::stopping())?;
        Ok(())
    }

    /// Returns true when all inputs are known.
    pub(super) fn is_known(&self) -> bool {
        self.map.borrow().is_some()
            && self.pools.borrow().is_some()
            && self.limits.borrow().is_some()
    }

    /// Error that names the input that is not known yet.
    pub(super) fn unknown(&self) -> NoAddress {
        let what = if self.map.borrow().is_none() {
            "the node's view has not come from margay-typha, or does not have the node"
        } else if self.pools.borrow().is_none() {
            "IPPools have not been listed"
        } else {
            "what bounds IPAM, or a block of this node, has not been read"
        };
        NoAddress::Unavailable(format!(
            "what addresses this node has is not known yet: {what}; the runtime will try again"
        ))
    }
}
