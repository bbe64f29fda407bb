//! Objects that have no effect as written, because of other objects.

use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::ipam::names;
use margay_api::meta::{
    ANNOTATION_IPIP, ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6, ANNOTATION_VXLAN_IPV4,
    ANNOTATION_VXLAN_IPV6,
};
use margay_api::network::TunnelKind;
use margay_api::policy::PolicyKey;
use margay_api::rule::IpVersion;

use crate::blocks::{BlockRefusal, Excess};

/// An object that has no effect as written: a missing reference, or a conflict with another object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Conflict {
    /// A policy whose tier does not exist.
    TierMissing {
        /// The policy.
        policy: PolicyKey,
        /// The tier.
        tier: String,
    },
    /// Two pools with the same CIDR.
    PoolShadowed {
        /// The pool that has no effect.
        pool: String,
        /// The pool that is used.
        winner: String,
    },
    /// A host endpoint whose node does not exist.
    NodeMissing {
        /// The host endpoint.
        endpoint: String,
        /// The node.
        node: String,
    },
    /// An IPAM block that gets no route.
    BlockRefused {
        /// CIDR of the block.
        range: IpNet,
        /// The node that the block is affine to, if any.
        node: Option<String>,
        /// The reason.
        why: BlockRefusal,
    },
    /// A node with more blocks, or more borrowed addresses, than its quota.
    Excess(Excess),
    /// An address that a Node object claims, but another node has.
    AddressRejected {
        /// The node that claims it.
        node: String,
        /// The address.
        address: IpAddr,
        /// The tunnel whose address it is claimed as; none: the node's own address.
        tunnel: Option<TunnelKind>,
        /// The node that has it, if any.
        winner: Option<String>,
    },
    /// An address of an automatic host endpoint that a block gives to a pod or to another node.
    HostAddressRejected {
        /// The host endpoint.
        endpoint: String,
        /// Its node.
        node: String,
        /// The address.
        address: IpAddr,
    },
    /// A BGPPeer in a cluster without BGP.
    BgpDisabled {
        /// The BGPPeer.
        peer: String,
    },
    /// A BGPPeer with a filter that does not exist.
    BgpFilterMissing {
        /// The BGPPeer.
        peer: String,
        /// Name of the BGPFilter.
        filter: String,
    },
    /// A BGPPeer of a node that does not exist.
    BgpNodeMissing {
        /// The BGPPeer.
        peer: String,
        /// The node.
        node: String,
    },
    /// A BGPPeer without an AS number, whose address is no node's.
    BgpAsnMissing {
        /// The BGPPeer.
        peer: String,
    },
    /// A BGPPeer whose address another one has on some node.
    BgpPeerShadowed {
        /// The BGPPeer that has no effect there.
        peer: String,
        /// The BGPPeer that is used instead.
        winner: String,
        /// The address.
        address: IpAddr,
    },
}

impl Conflict {
    /// Kind and name of the object.
    pub fn object(&self) -> String {
        match self {
            Self::TierMissing { policy, .. } => policy.to_string(),
            Self::PoolShadowed { pool, .. } => format!("IPPool {pool}"),
            Self::NodeMissing { endpoint, .. } | Self::HostAddressRejected { endpoint, .. } => {
                format!("HostEndpoint {endpoint}")
            }
            Self::BlockRefused { range, .. } => format!("IPAMBlock {}", names::block(*range)),
            Self::BgpDisabled { peer }
            | Self::BgpFilterMissing { peer, .. }
            | Self::BgpNodeMissing { peer, .. }
            | Self::BgpAsnMissing { peer }
            | Self::BgpPeerShadowed { peer, .. } => format!("BGPPeer {peer}"),
            Self::AddressRejected { node, .. } | Self::Excess(Excess { node, .. }) => {
                format!("Node {node}")
            }
        }
    }

    /// Explains the conflict: field, value, rule and remedy.
    pub fn reason(&self) -> String {
        match self {
            Self::TierMissing { tier, .. } => {
                format!(
                    "spec.tier: {tier:?}: there is no such tier, so the policy comes after all \
                     tiers and denies what it does not allow; create the tier or correct the name"
                )
            }
            Self::PoolShadowed { winner, .. } => {
                format!(
                    "spec.cidr: IPPool {winner} has the same range and is used instead; delete one \
                     of them"
                )
            }
            Self::NodeMissing { node, .. } => {
                format!(
                    "spec.node: {node:?}: there is no such node, so it is not enforced; correct \
                     the name or delete the host endpoint"
                )
            }
            Self::BlockRefused { range, node, why } => {
                format!(
                    "spec.cidr: {range} of {}: {why}",
                    node.as_deref().unwrap_or("no node")
                )
            }
            Self::Excess(excess) => excess.to_string(),
            Self::BgpDisabled { .. }
            | Self::BgpAsnMissing { .. }
            | Self::BgpFilterMissing { .. }
            | Self::BgpNodeMissing { .. }
            | Self::BgpPeerShadowed { .. } => self.bgp_reason(),
            Self::HostAddressRejected { node, address, .. } => {
                format!(
                    "spec.expectedIPs: {address}: it is in an IPAMBlock, and neither under the \
                     handle of node {node}'s tunnel nor reported by its kubelet, so policies do \
                     not take it for the node's; if the node has changed, restart its agent; else \
                     find out what wrote it into the annotations of Node {node}"
                )
            }
            Self::AddressRejected {
                address,
                tunnel,
                winner,
                ..
            } => {
                let annotations = match (tunnel, address) {
                    (Some(TunnelKind::Vxlan(IpVersion::V4)), _) => ANNOTATION_VXLAN_IPV4,
                    (Some(TunnelKind::Vxlan(IpVersion::V6)), _) => ANNOTATION_VXLAN_IPV6,
                    (Some(TunnelKind::Ipip), _) => ANNOTATION_IPIP,
                    (None, IpAddr::V4(_)) => ANNOTATION_NODE_IPV4,
                    (None, IpAddr::V6(_)) => ANNOTATION_NODE_IPV6,
                };
                let why = match winner {
                    Some(winner) => format!("node {winner} has that address"),
                    None => "it is in a block of another node, and not under the handle of this \
                             node's tunnel"
                        .to_owned(),
                };
                format!(
                    "{annotations}: {address}: {why}, so other nodes do not use it for this node; \
                     if the node has changed, delete the annotation and restart its agent; else \
                     find out what wrote it"
                )
            }
        }
    }

    fn bgp_reason(&self) -> String {
        match self {
            Self::BgpDisabled { .. } => {
                "spec: BGP is disabled, so it has no session; set calicoNetwork.bgp to Enabled in \
                 the Installation, or delete the peer"
                    .to_owned()
            }
            Self::BgpFilterMissing { filter, .. } => {
                format!(
                    "spec.filters: {filter:?}: there is no such BGPFilter, so no route passes; \
                     create it or correct the name"
                )
            }
            Self::BgpNodeMissing { node, .. } => {
                format!(
                    "spec.node: {node:?}: there is no such node, so it has no session; correct \
                     the name or delete the peer"
                )
            }
            Self::BgpPeerShadowed {
                winner, address, ..
            } => {
                format!(
                    "spec.peerIP: {address}: BGPPeer {winner} has the same address on a node and \
                     is used there instead; delete one of them"
                )
            }
            _ => "spec.asNumber: missing, and the address of the peer is no node's, so it has no \
                  session; name the peer's AS number"
                .to_owned(),
        }
    }
}
