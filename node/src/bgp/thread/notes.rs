//! What the thread notes of sessions, logs and publishes.

use std::net::SocketAddr;

use margay_bgp::config::PeerId;
use margay_bgp::session::{Reason, State};
use tokio::time::Instant;

use super::SpeakerOwner;
use crate::bgp::report::{BgpReport, PeerReport};

/// What the thread knows of a session beside the speaker.
pub(super) struct SessionNote {
    pub(super) peer: PeerId,
    pub(super) name: String,
    pub(super) has_password: bool,
    is_established: bool,
    /// Since when it is established, or not.
    since: Instant,
    ended: u64,
    pub(super) last_end: Option<String>,
    /// Why the last attempt to connect failed.
    pub(super) connecting: Option<String>,
}

impl SessionNote {
    pub(super) fn new(peer: PeerId) -> Self {
        Self {
            peer,
            name: String::new(),
            has_password: false,
            is_established: false,
            since: Instant::now(),
            ended: 0,
            last_end: None,
            connecting: None,
        }
    }
}

impl SpeakerOwner {
    pub(super) fn note_state(&mut self, peer: PeerId, state: State) {
        let Some((address, note)) = self.find_note(peer) else {
            return;
        };
        let is_up = state == State::Established;
        let was_up = std::mem::replace(&mut note.is_established, is_up);
        if was_up != is_up {
            note.since = Instant::now();
        }
        if is_up {
            tracing::info!(peer = note.name, %address, "a BGP session is established");
        } else if was_up {
            tracing::warn!(peer = note.name, %address, ?state, "a BGP session is not established");
        } else {
            tracing::debug!(peer = note.name, %address, ?state, "state of a BGP session");
        }
        self.publish();
    }

    pub(super) fn note_end(&mut self, peer: PeerId, reason: &Reason) {
        let Some((address, note)) = self.find_note(peer) else {
            return;
        };
        // The kernel drops what is signed by another password, and says so to nobody.
        let hint = match note.has_password {
            true => "; a password that is not the peer's looks like this too",
            false => "",
        };
        let text = match (reason, note.connecting.take()) {
            (Reason::Unreachable, Some(error)) => format!("{reason}: {error}{hint}"),
            _ => reason.to_string(),
        };
        note.ended += 1;
        // Attempts repeat every few seconds.
        if note.last_end.as_ref() == Some(&text) {
            tracing::debug!(peer = note.name, %address, reason = text, "a BGP session ended");
        } else {
            tracing::info!(peer = note.name, %address, reason = text, "a BGP session ended");
        }
        note.last_end = Some(text);
    }

    fn find_note(&mut self, peer: PeerId) -> Option<(SocketAddr, &mut SessionNote)> {
        let address = *self.ids.get(&peer)?;
        Some((address, self.sessions.get_mut(&address)?))
    }

    pub(super) fn publish(&self) {
        let peers = self.sessions.iter().filter_map(|(address, note)| {
            let status = self.speaker.status(note.peer)?;
            let report = PeerReport {
                name: note.name.clone(),
                asn: self.speaker.peer(note.peer)?.asn,
                state: status.state,
                since: note.since,
                received: status.received,
                sent: status.sent,
                updates: status.updates,
                ended: note.ended,
                last_end: note.last_end.clone(),
                is_stale: !status.stale.is_empty(),
                hold_time: status.negotiated.map(|agreed| agreed.hold_time),
            };
            Some((*address, report))
        });
        let report = BgpReport {
            asn: self.config.asn,
            router_id: self.config.router_id,
            listening: self.listeners.addresses(),
            not_listening: self.listeners.failed.clone(),
            peers: peers.collect(),
        };
        self.report.send_if_modified(|known| {
            let is_new = known.as_ref() != Some(&report);
            *known = Some(report);
            is_new
        });
    }
}
