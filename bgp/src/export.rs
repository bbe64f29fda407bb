//! Which routes go to peers where no filter decides: Calico's rules.
//!
//! In this order, for a route of the prefix *n*:
//!
//! 1. *n* is a block of this node: it goes if the block is confirmed. *n* is inside of one: it does
//!    not go, as the block says it already, unless it is preferred to it (a pod that moves between
//!    nodes has a smaller metric).
//! 2. *n* is within a pool: it goes, if the pool has no `disableBGPExport`. That is what a
//!    reflector passes on, and addresses borrowed from others' blocks.
//! 3. *n* is a Service's address or range that this node announces: it goes.
//! 4. Else it does not.
//!
//! A route that a peer sent goes neither back to it nor to the router that its packets are sent by.
//! What goes has the communities of every `prefixAdvertisements` entry that contains it.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::attributes::CommunityValue;
use crate::table::{NetMap, NetSet};

/// Rules of the node, for all peers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExportPolicy {
    /// Blocks of this node, and whether their affinity is confirmed.
    pub blocks: NetMap<bool>,
    /// Pools, and whether their routes are exported (`disableBGPExport` is not set).
    pub pools: NetMap<bool>,
    /// What is announced of Services: ranges (`serviceClusterIPs` and so on) and single addresses.
    pub services: NetSet,
    /// Communities of prefixes (`prefixAdvertisements`).
    pub communities: NetMap<BTreeSet<CommunityValue>>,
    /// Ranges of Services: routes within, learnt from peers, are not for this node's kernel, which
    /// has its own way to Services.
    pub service_ranges: NetSet,
}

impl ExportPolicy {
    /// A route goes to peers. `is_preferred`: its metric is below that of normal routes.
    pub fn exports(&self, net: &IpNet, is_preferred: bool) -> bool {
        if let Some(is_confirmed) = self.blocks.get(net) {
            return *is_confirmed;
        }
        if self.blocks.containing(net).next().is_some() && !is_preferred {
            return false;
        }
        // The longest pool: pools do not overlap, but where they did, the narrower one would be
        // about fewer routes.
        if let Some((_, is_exported)) = self.pools.containing(net).last() {
            return *is_exported;
        }
        self.services.get(net).is_some()
    }

    /// Communities that a route gets.
    pub fn communities(&self, net: &IpNet) -> impl Iterator<Item = CommunityValue> {
        self.communities
            .containing(net)
            .flat_map(|(_, communities)| communities.iter().copied())
    }

    /// A route of a peer may go to the kernel.
    pub fn installs(&self, net: &IpNet) -> bool {
        self.service_ranges.containing(net).next().is_none()
    }
}

#[cfg(test)]
mod tests;
