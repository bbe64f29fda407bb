//! What a speaker knows, for those who look.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::{PeerStatus, Speaker};
use crate::attributes::Attributes;
use crate::config::{PeerConfig, PeerId};
use crate::rib::KernelRoute;
use crate::session::ConnectionId;

impl Speaker {
    /// What a session is now.
    pub fn status(&self, peer: PeerId) -> Option<PeerStatus> {
        let state = self.peers.get(&peer)?;
        let established = state.session.established();
        Some(PeerStatus {
            state: state.session.state(),
            negotiated: established.and_then(|each| each.negotiated.clone()),
            received: self.rib.usage(peer).prefixes,
            sent: state.out.sent(),
            updates: state.updates,
            stale: state.stale.keys().copied().collect(),
            left_out: state.out.left_out(),
        })
    }

    /// A peer's configuration.
    pub fn peer(&self, peer: PeerId) -> Option<&PeerConfig> {
        self.peers.get(&peer).map(|state| &state.config)
    }

    /// Addresses from which connections are taken, each with the configuration of its peer.
    pub fn peers(&self) -> impl Iterator<Item = (PeerId, &PeerConfig)> {
        self.peers
            .iter()
            .map(|(peer, state)| (*peer, &state.config))
    }

    /// The peer of a connection.
    pub fn owner(&self, connection: ConnectionId) -> Option<(PeerId, SocketAddr)> {
        let peer = *self.owners.get(&connection)?;
        Some((peer, self.peers.get(&peer)?.config.address))
    }

    /// Routes that the kernel is to have, in order.
    pub fn kernel_routes(&self) -> impl Iterator<Item = (IpNet, &Arc<KernelRoute>)> {
        self.rib.installed()
    }

    /// Routes that a peer has been sent, in order.
    pub fn routes_sent(&self, peer: PeerId) -> impl Iterator<Item = (&IpNet, &Arc<Attributes>)> {
        self.peers
            .get(&peer)
            .into_iter()
            .flat_map(|state| state.out.routes())
    }

    /// Next hops of the routes that peers sent: those that the caller is to tell of by
    /// [`Self::set_next_hop`].
    pub fn next_hops(&self) -> BTreeSet<IpAddr> {
        self.rib.wanted_next_hops()
    }
}
