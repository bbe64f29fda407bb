//! A BGP speaker without I/O, clock or randomness: what happens goes in, and messages, routes of the
//! kernel and the next deadline come out. Whoever owns sockets and time drives it.
//!
//! ```text
//!  set_peer, set_export_policy, announce, withdraw, set_next_hop      (what is wanted)
//!                                   |
//!  accept, connected, receive ->  Speaker  -> poll: Connect, Close, Route, Synced, State, ...
//!  closed, tick                     |      -> pending, transmit: bytes of a connection
//!                                   |      -> deadline: when tick is due
//!                    sessions -- table -- what goes out
//! ```
//!
//! # What it speaks
//!
//! | RFC | What |
//! |---|---|
//! | 4271, 6286, 6608 | sessions, collision detection, best path |
//! | 4760, 2545, 8950 | IPv4 and IPv6 unicast, over either, IPv4 over IPv6 next hops |
//! | 5492, 6793 | capabilities, AS numbers of four octets |
//! | 1997, 4360, 8092 | communities, extended ones as they are, large ones |
//! | 4456 | route reflection |
//! | 2918, 7313 | route refresh, with markers |
//! | 4724, 8538 | graceful restart, of ourselves and of peers, also by NOTIFICATION |
//! | 7606 | malformed attributes withdraw routes and leave the session |
//! | 9003, 9687 | texts for the peer's operator, peers that take nothing |
//! | 9234 | roles and leaks |
//!
//! Filters are those of Calico's `BGPFilter` ([`filter`]), and what no filter decides goes by
//! Calico's rules ([`export`]).
//!
//! # Rules for the caller
//!
//! - After every call take the actions of [`Speaker::poll`](speaker::Speaker::poll) in order, write
//!   for [`Speaker::pending`](speaker::Speaker::pending) connections what fits, and set a timer for
//!   [`Speaker::deadline`](speaker::Speaker::deadline).
//! - A thread that nothing else can stall does that: a peer that hears nothing for the hold time
//!   drops our routes at once, whatever graceful restart says.
//! - To restart without losing a packet: [`Speaker::shut_down`](speaker::Speaker::shut_down) with
//!   `keeps_routes`, or just close the sockets; leave the kernel's routes; start with
//!   [`is_restarting`](config::SpeakerConfig::is_restarting), and remove what
//!   [`SpeakerAction::Synced`](speaker::SpeakerAction::Synced) says can go.
//!
//! # Bounds
//!
//! Of a peer the speaker holds one unfinished message, its routes up to `max_prefixes` and
//! `max_bytes`, and of what goes out one entry per prefix however often it changes. Bytes are made
//! when the caller has room for them.
//!
//! # Peers it has been tried with
//!
//! `tests/tests/bgp.rs` of the workspace, on sockets, over IPv4 and IPv6, both families each:
//!
//! | | BIRD 2.0.12 | FRR 8.4.4 | GoBGP 3.10.0 |
//! |---|---|---|---|
//! | routes both ways, large communities | yes | yes | yes |
//! | its restart, our routes and its own kept | yes, started with `-R` | yes, with `preserve-fw-state` | no: no capability 64 by default |
//! | our restart, our routes kept | yes | yes | no, as above |
//! | wrong AS, router id of both | NOTIFICATION 2/2, 2/3 | the same | the same |
//! | TCP MD5, hold time of 3 s | yes | yes | yes |
//!
//! What they do that one might not expect: FRR without an IPv6 address announces IPv6 routes with an
//! IPv4-mapped next hop, by which no kernel routes, so such a path is never chosen. FRR that
//! is not configured for graceful restart sends End-of-RIB before some of its routes. FRR says at its
//! first start that it is restarting.
//!
//! # Example
//!
//! Two speakers, and bytes carried from one to the other. `examples/pair.rs` goes on with routes.
//!
//! ```
//! use std::time::Duration;
//! use margay_bgp::config::{PeerConfig, PeerId, SpeakerConfig};
//! use margay_bgp::session::Moment;
//! use margay_bgp::speaker::{SpeakerAction, Speaker};
//!
//! let moment = |seconds| Moment { now: Duration::from_secs(seconds), jitter: 255 };
//! let config = SpeakerConfig::new(64512, [10, 0, 0, 1].into());
//! let mut speaker = Speaker::new(config, Duration::ZERO)?;
//! let router = PeerConfig::new("10.0.0.254:179".parse().expect("an address"), 65001);
//! speaker.set_peer(PeerId(1), router, moment(0))?;
//!
//! // Nothing is due at once; when it is, the speaker asks for a connection.
//! let due = speaker.deadline().expect("a peer that is to be connected to");
//! speaker.tick(Moment { now: due, jitter: 255 });
//! let actions = speaker.poll();
//! let Some(SpeakerAction::Connect { connection, .. }) = actions.first() else { panic!("{actions:?}") };
//!
//! // Its first message is an OPEN.
//! speaker.connected(*connection, [10, 0, 0, 1].into(), moment(1));
//! let mut bytes = Vec::new();
//! speaker.transmit(*connection, 65536, moment(1), &mut bytes);
//! assert_eq!(bytes[18], 1);
//! # Ok::<(), margay_bgp::error::ConfigError>(())
//! ```

mod adj_out;
pub mod attributes;
pub mod codec;
pub mod config;
pub mod error;
pub mod export;
pub mod filter;
pub mod message;
pub mod notification;
pub mod rib;
mod route_policy;
pub mod session;
pub mod speaker;
pub mod table;
