//! What the speaker's thread tells of itself and its sessions.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use margay_bgp::session::State;
use tokio::time::Instant;

/// How long a session may be down before it is a problem of the node.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Maximal number of sessions that one message names.
const MAX_NAMED: usize = 3;

/// State of the speaker.
#[derive(Clone, Debug, PartialEq)]
pub struct BgpReport {
    /// AS number of the node.
    pub asn: u32,
    /// BGP identifier.
    pub router_id: Ipv4Addr,
    /// Where it listens.
    pub listening: BTreeSet<SocketAddr>,
    /// Where it does not, with the reason.
    pub not_listening: BTreeMap<SocketAddr, String>,
    /// Sessions by the peer's address.
    pub peers: BTreeMap<SocketAddr, PeerReport>,
}

/// State of a session.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerReport {
    /// Name of the BGPPeer, or of the node in the mesh.
    pub name: String,
    /// AS number of the peer.
    pub asn: u32,
    /// State of the session.
    pub state: State,
    /// Since when it is in that state: established, or not.
    pub since: Instant,
    /// Prefixes that the peer has sent, of IPv4 and IPv6.
    pub received: [usize; 2],
    /// Prefixes that the peer has been sent.
    pub sent: usize,
    /// UPDATEs that the peer has sent.
    pub updates: u64,
    /// Sessions and attempts that have ended.
    pub ended: u64,
    /// Why the last one ended.
    pub last_end: Option<String>,
    /// Routes of the peer are kept while it restarts.
    pub is_stale: bool,
    /// Agreed hold time, once established.
    pub hold_time: Option<Duration>,
}

impl PeerReport {
    /// The session is established.
    pub fn is_established(&self) -> bool {
        self.state == State::Established
    }
}

impl BgpReport {
    /// Describes sessions that have been down for long.
    pub fn session_problem(&self, now: Instant) -> Option<String> {
        let is_down = |peer: &&PeerReport| {
            !peer.is_established() && now.saturating_duration_since(peer.since) >= PATIENCE
        };
        let lines = self.peers.iter().filter(|(_, peer)| is_down(peer));
        let lines = lines.map(|(address, peer)| {
            let why = peer.last_end.as_deref().unwrap_or("no connection yet");
            format!("{} at {address} (AS {}): {why}", peer.name, peer.asn)
        });
        listed("BGP sessions are not established: ", lines)
    }

    /// Describes where it does not listen.
    pub fn listen_problem(&self) -> Option<String> {
        let lines = self.not_listening.iter();
        let lines = lines.map(|(address, why)| format!("{address}: {why}"));
        listed(
            "BGP peers cannot connect to this node, which tries to connect to them: ",
            lines,
        )
    }

    /// When [`Self::session_problem`] may change although nothing happens.
    pub fn next_problem(&self, now: Instant) -> Option<Instant> {
        let down = self.peers.values().filter(|peer| !peer.is_established());
        down.map(|peer| peer.since + PATIENCE)
            .filter(|at| *at > now)
            .min()
    }
}

/// A message of the first lines, and how many more there are; `None`: there are none.
pub(super) fn listed(head: &str, lines: impl Iterator<Item = String>) -> Option<String> {
    let mut text = head.to_owned();
    let mut count = 0_usize;
    for line in lines {
        count += 1;
        if count <= MAX_NAMED {
            let separator = if count == 1 { "" } else { "; " };
            // Writing into a string does not fail.
            let _ = write!(text, "{separator}{line}");
        }
    }
    if count > MAX_NAMED {
        let _ = write!(text, "; and {} more", count - MAX_NAMED);
    }
    (count > 0).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_is_down_for_a_minute_is_a_problem() {
        let start = Instant::now();
        let peer = |name: &str, state, last_end: Option<&str>| PeerReport {
            name: name.to_owned(),
            asn: 65001,
            state,
            since: start,
            received: [0; 2],
            sent: 0,
            updates: 0,
            ended: 0,
            last_end: last_end.map(str::to_owned),
            is_stale: false,
            hold_time: None,
        };
        let peers = [
            ("10.0.0.1:179", peer("up", State::Established, None)),
            (
                "10.0.0.2:179",
                peer("tor", State::Active, Some("connection refused")),
            ),
            ("10.0.0.3:179", peer("new", State::Idle, None)),
        ];
        let peers = peers.map(|(address, peer)| (address.parse().expect("an address"), peer));
        let report = BgpReport {
            asn: 64512,
            router_id: [10, 0, 0, 9].into(),
            listening: BTreeSet::new(),
            not_listening: BTreeMap::new(),
            peers: peers.into(),
        };
        assert_eq!(report.session_problem(start), None);
        assert_eq!(report.next_problem(start), Some(start + PATIENCE));
        let late = start + PATIENCE;
        assert_eq!(
            report.session_problem(late).as_deref(),
            Some(
                "BGP sessions are not established: tor at 10.0.0.2:179 (AS 65001): connection \
                 refused; new at 10.0.0.3:179 (AS 65001): no connection yet"
            )
        );
        assert_eq!(report.next_problem(late), None);
    }

    #[test]
    fn a_long_list_ends_with_a_count() {
        let lines = |count: usize| (0..count).map(|number| number.to_string());
        assert_eq!(listed("", lines(0)), None);
        assert_eq!(listed("x: ", lines(3)).as_deref(), Some("x: 0; 1; 2"));
        assert_eq!(
            listed("x: ", lines(5)).as_deref(),
            Some("x: 0; 1; 2; and 2 more")
        );
    }
}
