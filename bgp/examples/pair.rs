//! Two speakers in one process, of two autonomous systems, who tell each other a route: the loop that
//! a caller with sockets has as well.

use std::net::IpAddr;
use std::time::Duration;

use margay_bgp::config::{PeerConfig, PeerId, SpeakerConfig};
use margay_bgp::error::ConfigError;
use margay_bgp::export::ExportPolicy;
use margay_bgp::rib::{LocalRoute, RouteChange};
use margay_bgp::session::{ConnectionId, Moment};
use margay_bgp::speaker::{Speaker, SpeakerAction};

const PEER: PeerId = PeerId(0);
const NAMES: [&str; 2] = ["node", "router"];

fn speaker(own: [u8; 4], asn: u32, other: [u8; 4], other_asn: u32) -> Result<Speaker, ConfigError> {
    let start = Moment { now: Duration::ZERO, jitter: own[3] };
    let mut speaker = Speaker::new(SpeakerConfig::new(asn, own.into()), start.now)?;
    let mut policy = ExportPolicy::default();
    policy.services.insert(IpAddr::from(own).into(), ());
    speaker.set_export_policy(policy, start);
    speaker.set_peer(PEER, PeerConfig::new((other, 179).into(), other_asn), start)?;
    let route = LocalRoute { net: IpAddr::from(own).into(), interface: None, priority: None };
    speaker.announce(route, start);
    Ok(speaker)
}

fn main() -> Result<(), ConfigError> {
    let addresses = [[192, 0, 2, 1], [198, 51, 100, 1]];
    let mut speakers = [
        speaker(addresses[0], 64512, addresses[1], 65001)?,
        speaker(addresses[1], 65001, addresses[0], 64512)?,
    ];
    let mut connections: [Option<ConnectionId>; 2] = [None, None];
    let mut routes = 0;
    let mut now = Duration::ZERO;
    while routes < 2 {
        let mut is_idle = true;
        for this in 0..2 {
            let (other, moment) = (1 - this, Moment { now, jitter: 128 });
            for action in speakers[this].poll() {
                is_idle = false;
                println!("{now:?} {}: {action:?}", NAMES[this]);
                match action {
                    SpeakerAction::Connect { connection, .. } => {
                        let (from, to) = (addresses[this].into(), addresses[other].into());
                        // What a listener does: one that is not wanted is closed.
                        connections[other] = speakers[other].accept(from, to, moment);
                        match connections[other] {
                            Some(_) => speakers[this].connected(connection, from, moment),
                            None => speakers[this].closed(connection, moment),
                        }
                        connections[this] = Some(connection);
                    }
                    SpeakerAction::Route(RouteChange::Set { .. }) => routes += 1,
                    _ => {}
                }
            }
            for connection in speakers[this].pending() {
                let mut bytes = Vec::new();
                speakers[this].transmit(connection, 65536, moment, &mut bytes);
                is_idle &= bytes.is_empty();
                if let Some(connection) = connections[other] {
                    speakers[other].receive(connection, &bytes, moment);
                }
            }
        }
        if is_idle {
            // Nothing to do before the next deadline.
            now = speakers.iter().filter_map(Speaker::deadline).min().unwrap_or(now).max(now);
            for speaker in &mut speakers {
                speaker.tick(Moment { now, jitter: 128 });
            }
        }
    }
    Ok(())
}
