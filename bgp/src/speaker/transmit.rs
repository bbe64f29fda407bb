//! Bytes for connections: what the session says first, then routes.

use super::Speaker;
use crate::config::PeerId;
use crate::session::{ConnectionId, Moment};

impl Speaker {
    /// Connections that have bytes to be written.
    pub fn pending(&self) -> Vec<ConnectionId> {
        let mut pending = Vec::new();
        for peer in self.peers.values() {
            for connection in &peer.session.connections {
                let has_routes = peer
                    .session
                    .established()
                    .is_some_and(|each| each.id == connection.id)
                    && peer.out.is_pending()
                    && !self.is_silent();
                if !connection.control.is_empty() || has_routes {
                    pending.push(connection.id);
                }
            }
        }
        pending
    }

    /// Appends bytes for a connection, about `budget` at most: what is to be written next. They are
    /// taken as written. KEEPALIVEs come before routes.
    pub fn transmit(
        &mut self,
        connection: ConnectionId,
        budget: usize,
        moment: Moment,
        out: &mut Vec<u8>,
    ) {
        let Some(peer) = self.owners.get(&connection).copied() else {
            return;
        };
        let before = out.len();
        let is_established = self.take_control(peer, connection, out);
        if is_established && !self.is_silent() {
            self.write_routes(peer, budget.saturating_sub(out.len() - before), out);
        }
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        let is_pending = state.out.is_pending();
        if let Some(each) = state
            .session
            .connections
            .iter_mut()
            .find(|each| each.id == connection)
            && out.len() > before
        {
            each.blocked_since = (is_established && is_pending).then_some(moment.now);
        }
    }

    fn take_control(&mut self, peer: PeerId, connection: ConnectionId, out: &mut Vec<u8>) -> bool {
        let Some(state) = self.peers.get_mut(&peer) else {
            return false;
        };
        if let Some(each) = state
            .session
            .connections
            .iter_mut()
            .find(|each| each.id == connection)
        {
            out.append(&mut each.control);
        }
        state
            .session
            .established()
            .is_some_and(|each| each.id == connection)
    }
}
