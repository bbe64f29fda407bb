//! The speaker: sessions, table and what goes out, put together.

mod restart;
mod routes;
mod status;
mod transmit;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::adj_out::AdjOut;
use crate::attributes::Family;
use crate::codec;
use crate::config::{PeerConfig, PeerId, SpeakerConfig};
use crate::error::{ConfigError, invalid};
use crate::export::ExportPolicy;
use crate::message::{Capabilities, GracefulRestart, Open, RefreshKind};
use crate::notification::{self, Notification};
use crate::rib::{LocalRoute, NextHopInfo, Rib, RouteChange};
use crate::route_policy;
use crate::session::{
    ConnectionId, Moment, Negotiated, Output, Reason, Session, State, Surroundings,
};
use restart::Deferral;

/// What the caller is to do, or wants to know.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Connect to the peer, with its [`crate::config::Transport`]; answer with
    /// [`Speaker::connected`] or [`Speaker::closed`].
    Connect {
        /// The peer.
        peer: PeerId,
        /// The connection that it will be.
        connection: ConnectionId,
    },
    /// Write these bytes as far as they fit at once, then close the connection or give the attempt
    /// up. It is not mentioned afterwards.
    Close {
        /// The connection.
        connection: ConnectionId,
        /// A NOTIFICATION, or nothing.
        last: Vec<u8>,
    },
    /// A route of the kernel changes.
    Route(RouteChange),
    /// Everything that peers had for us after our restart is in place: routes of this family that
    /// are still in the kernel from before and were not set since can go.
    Synced(Family),
    /// The state of a session is another one.
    State {
        /// The peer.
        peer: PeerId,
        /// The new state.
        state: State,
    },
    /// A connection or a session has ended, or could not be.
    Ended {
        /// The peer.
        peer: PeerId,
        /// Why.
        reason: Reason,
    },
    /// The peer sent something that was handled without ending the session (RFC 7606), or a route
    /// could not be sent to it.
    Problem {
        /// The peer.
        peer: PeerId,
        /// What, for a log.
        text: String,
    },
}

/// Most texts about one UPDATE.
const MAX_PROBLEMS: usize = 4;

struct Peer {
    config: PeerConfig,
    session: Session,
    out: AdjOut,
    open: Open,
    /// Since which state the caller knows.
    reported: State,
    /// Families whose routes are kept until the peer is back and done, or this moment.
    stale: BTreeMap<Family, Duration>,
    /// Families of which the peer has begun a refresh (RFC 7313).
    refreshing: BTreeSet<Family>,
    /// Families of which the peer has sent all, since the session is established.
    complete: BTreeSet<Family>,
    updates: u64,
}

/// What a peer's session is, for status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// State of the session.
    pub state: State,
    /// What both sides agreed on, once it is established.
    pub negotiated: Option<Negotiated>,
    /// Prefixes taken from it, of IPv4 and IPv6.
    pub received: [usize; 2],
    /// Prefixes sent to it.
    pub sent: usize,
    /// UPDATEs taken from it since it was configured.
    pub updates: u64,
    /// Families whose routes are kept while it restarts.
    pub stale: BTreeSet<Family>,
    /// Routes that did not fit a message.
    pub left_out: usize,
}

/// A BGP speaker. Everything that happens is a call; what follows from it is in [`Self::poll`] and
/// [`Self::transmit`], and when it has to be called again without anything happening in
/// [`Self::deadline`].
pub struct Speaker {
    config: SpeakerConfig,
    policy: ExportPolicy,
    peers: BTreeMap<PeerId, Peer>,
    owners: BTreeMap<ConnectionId, PeerId>,
    rib: Rib,
    locals: BTreeMap<IpNet, LocalRoute>,
    deferral: Option<Deferral>,
    actions: Vec<Action>,
    next_id: u64,
}

impl Speaker {
    /// A speaker without peers.
    ///
    /// # Errors
    ///
    /// A configuration that no speaker may have.
    pub fn new(config: SpeakerConfig, now: Duration) -> Result<Self, ConfigError> {
        config.validate()?;
        let deferral = config
            .is_restarting
            .then(|| Deferral::new(now + config.selection_deferral));
        Ok(Self {
            config,
            policy: ExportPolicy::default(),
            peers: BTreeMap::new(),
            owners: BTreeMap::new(),
            rib: Rib::default(),
            locals: BTreeMap::new(),
            deferral,
            actions: Vec::new(),
            next_id: 0,
        })
    }

    /// Adds a peer, or changes it. A change of what its OPEN says or of its sockets ends the
    /// session, which comes back at once; filters and limits act on the routes that there are.
    ///
    /// # Errors
    ///
    /// A configuration that no peer may have; the former one stays.
    pub fn set_peer(
        &mut self,
        peer: PeerId,
        config: PeerConfig,
        moment: Moment,
    ) -> Result<(), ConfigError> {
        config.validate()?;
        for rules in [&config.import, &config.export] {
            for rule in rules.ipv4.iter().chain(&rules.ipv6) {
                rule.validate()?;
            }
        }
        let twin =
            |(id, each): (&PeerId, &Peer)| *id != peer && each.config.address == config.address;
        if self.peers.iter().any(twin) {
            let rule = "is of one peer only";
            return Err(invalid(
                "address",
                config.address,
                rule,
                "remove the other peer first",
            ));
        }
        let Some(former) = self.peers.get_mut(&peer) else {
            let open = self.open_for(&config);
            let session = Session::start(&config, moment);
            let reported = session.state();
            self.peers.insert(
                peer,
                Peer {
                    config,
                    session,
                    out: AdjOut::default(),
                    open,
                    reported,
                    stale: BTreeMap::new(),
                    refreshing: BTreeSet::new(),
                    complete: BTreeSet::new(),
                    updates: 0,
                },
            );
            return Ok(());
        };
        if former.config == config {
            return Ok(());
        }
        let needs_reset = needs_reset(&former.config, &config);
        former.config = config;
        if needs_reset {
            self.reset(peer, notification::CONFIGURATION_CHANGE, moment);
        } else {
            self.reimport(peer);
            self.resend(peer);
        }
        self.update_peers(moment);
        Ok(())
    }

    /// Removes a peer; its routes go, and ours go there.
    pub fn remove_peer(&mut self, peer: PeerId, moment: Moment) {
        self.with_session(peer, moment, |session, around| {
            let cease = Notification::new(notification::PEER_DECONFIGURED).into_hard_reset();
            let agreed = session
                .established()
                .and_then(|each| each.negotiated.as_ref());
            let is_hard = agreed.is_some_and(|each| each.notification_restart);
            let plain = Notification::new(notification::PEER_DECONFIGURED);
            session.stop(Some(if is_hard { cease } else { plain }), None, around);
        });
        self.rib.remove_peer(peer);
        self.owners.retain(|_, owner| *owner != peer);
        self.peers.remove(&peer);
        self.update_peers(moment);
    }

    /// Ends a session so that it comes back: the peer is notified by this text (RFC 9003).
    pub fn reset_peer(&mut self, peer: PeerId, text: &str, moment: Moment) {
        self.with_session(peer, moment, |session, around| {
            let reset = Notification::with_communication(notification::ADMINISTRATIVE_RESET, text);
            session.stop(Some(reset), Some(Duration::ZERO), around);
        });
        self.update_peers(moment);
    }

    /// Ends all sessions for good. With `keeps_routes` silently, so that peers keep our routes for
    /// the restart time; else with a Cease, so that they go at once.
    pub fn shut_down(&mut self, keeps_routes: bool, text: &str, moment: Moment) {
        for peer in self.peers.keys().copied().collect::<Vec<_>>() {
            self.with_session(peer, moment, |session, around| {
                let cease =
                    Notification::with_communication(notification::ADMINISTRATIVE_SHUTDOWN, text);
                let agreed = session
                    .established()
                    .and_then(|each| each.negotiated.as_ref());
                let is_hard = agreed.is_some_and(|each| each.notification_restart);
                let cease = if is_hard {
                    cease.into_hard_reset()
                } else {
                    cease
                };
                session.stop((!keeps_routes).then_some(cease), None, around);
            });
        }
        self.update_peers(moment);
    }

    fn reset(&mut self, peer: PeerId, codes: notification::Codes, moment: Moment) {
        self.with_session(peer, moment, |session, around| {
            session.stop(Some(Notification::new(codes)), Some(Duration::ZERO), around);
        });
        if let Some(state) = self.peers.get(&peer) {
            let open = self.open_for(&state.config);
            let session = Session::start(&state.config, moment);
            if let Some(state) = self.peers.get_mut(&peer) {
                (state.open, state.session) = (open, session);
            }
        }
    }

    fn open_for(&self, config: &PeerConfig) -> Open {
        // Until the first session of this process the kernel has our routes only if it had them
        // before (RFC 4724 section 3: the Forwarding State bit).
        let is_restarting = self.deferral.is_some();
        let families = config
            .families
            .iter()
            .map(|family| (*family, is_restarting))
            .collect();
        let asn = config.local_asn.unwrap_or(self.config.asn);
        let graceful_restart = config.restart_time.map(|time| GracefulRestart {
            is_restarting,
            notification: true,
            time,
            families,
        });
        Open {
            asn,
            hold_time: config.hold_time,
            router_id: self.config.router_id,
            capabilities: Capabilities {
                families: config.families.clone(),
                four_octet_as: true,
                route_refresh: true,
                enhanced_route_refresh: true,
                extended_next_hop: config.extended_next_hop,
                graceful_restart,
                role: config.role.filter(|_| asn != config.asn),
                has_conflicting_roles: false,
            },
        }
    }

    /// The connection has come about; `local` is our address of it.
    pub fn connected(&mut self, connection: ConnectionId, local: IpAddr, moment: Moment) {
        if let Some(peer) = self.owners.get(&connection).copied() {
            self.with_session(peer, moment, |session, around| {
                session.connected(connection, local, around)
            });
            self.update_peers(moment);
        }
    }

    /// A peer has connected. Returns the number of the connection, or none if it is to be closed:
    /// nobody is configured at that address, or nobody is wanted there now.
    pub fn accept(
        &mut self,
        remote: IpAddr,
        local: IpAddr,
        moment: Moment,
    ) -> Option<ConnectionId> {
        let of_remote = |(_, each): &(&PeerId, &Peer)| each.config.address.ip() == remote;
        let peer = *self.peers.iter().find(of_remote)?.0;
        let mut accepted = None;
        self.with_session(peer, moment, |session, around| {
            accepted = session.accept(local, around)
        });
        if let Some(connection) = accepted {
            self.owners.insert(connection, peer);
        }
        self.update_peers(moment);
        accepted
    }

    /// The connection has ended or could not be made. One that the speaker itself has closed may be
    /// reported too.
    pub fn closed(&mut self, connection: ConnectionId, moment: Moment) {
        if let Some(peer) = self.owners.remove(&connection) {
            self.with_session(peer, moment, |session, around| {
                session.closed(connection, around)
            });
            self.update_peers(moment);
        }
    }

    /// Bytes that the peer sent, cut in whatever way.
    pub fn receive(&mut self, connection: ConnectionId, bytes: &[u8], moment: Moment) {
        if let Some(peer) = self.owners.get(&connection).copied() {
            self.with_session(peer, moment, |session, around| {
                session.receive(connection, bytes, around)
            });
            self.update_peers(moment);
        }
    }

    /// Does what is due at this moment. To be called when [`Self::deadline`] has passed; at other
    /// times it does no harm.
    pub fn tick(&mut self, moment: Moment) {
        for peer in self.peers.keys().copied().collect::<Vec<_>>() {
            let is_due = |state: &Peer| state.session.deadline().is_some_and(|at| at <= moment.now);
            if self.peers.get(&peer).is_some_and(is_due) {
                self.with_session(peer, moment, Session::tick);
            }
            self.expire_stale(peer, moment);
        }
        if self
            .deferral
            .as_ref()
            .is_some_and(|deferral| deferral.until <= moment.now)
        {
            self.end_deferral(&Family::ALL);
        }
        self.update_peers(moment);
    }

    /// When [`Self::tick`] is to be called at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        let of_peer = |peer: &Peer| {
            peer.session
                .deadline()
                .into_iter()
                .chain(peer.stale.values().copied())
                .min()
        };
        let deferral = self.deferral.as_ref().map(|deferral| deferral.until);
        self.peers
            .values()
            .filter_map(of_peer)
            .chain(deferral)
            .min()
    }

    /// What there is to be done since the last call, in order.
    pub fn poll(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Asks a peer for its routes of a family (RFC 2918). Returns whether it can be asked.
    pub fn request_refresh(&mut self, peer: PeerId, family: Family, moment: Moment) -> bool {
        let Some(state) = self.peers.get_mut(&peer) else {
            return false;
        };
        let Some(id) = state.session.established().map(|each| each.id) else {
            return false;
        };
        let Some(connection) = state
            .session
            .connections
            .iter_mut()
            .find(|each| each.id == id)
        else {
            return false;
        };
        let knows = |agreed: &Negotiated| agreed.route_refresh && agreed.families.contains(&family);
        if !connection.negotiated.as_ref().is_some_and(knows) {
            return false;
        }
        let message = codec::refresh(family, RefreshKind::Request);
        // One that waits is the same question.
        if !connection
            .control
            .windows(message.len())
            .any(|window| window == message)
        {
            connection.control.extend(message);
            connection.blocked_since.get_or_insert(moment.now);
        }
        true
    }

    /// Runs `work` on a session and does what it asks for.
    fn with_session(
        &mut self,
        peer: PeerId,
        moment: Moment,
        work: impl FnOnce(&mut Session, &mut Surroundings<'_>),
    ) {
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        let mut outputs = Vec::new();
        let mut around = Surroundings {
            config: &state.config,
            open: &state.open,
            moment,
            next_id: &mut self.next_id,
            out: &mut outputs,
        };
        work(&mut state.session, &mut around);
        let mut is_cut = false;
        for output in outputs {
            if let Output::Update(update) = output {
                // What came before the end of the session counts, but not beyond a limit.
                is_cut = is_cut || !self.take_update(peer, update, moment);
            } else {
                self.take_output(peer, output, moment);
            }
        }
    }

    fn take_output(&mut self, peer: PeerId, output: Output, moment: Moment) {
        match output {
            Output::Connect(connection) => {
                self.owners.insert(connection, peer);
                self.actions.push(Action::Connect { peer, connection });
            }
            Output::Close(connection, last) => {
                self.owners.remove(&connection);
                self.actions.push(Action::Close { connection, last });
            }
            Output::Up(negotiated) => self.session_up(peer, &negotiated, moment),
            Output::Down { kept, restart_time } => {
                self.session_down(peer, &kept, restart_time, moment)
            }
            Output::Update(_) => {}
            Output::Refresh(refresh) => self.take_refresh(peer, refresh),
            Output::Ended(reason) => self.actions.push(Action::Ended { peer, reason }),
        }
    }

    /// Brings the table up to date after something happened, and reports new states.
    fn update_peers(&mut self, moment: Moment) {
        self.check_deferral();
        self.flush_routes();
        let is_silent = self.is_silent();
        for (peer, state) in &mut self.peers {
            if state.out.is_pending() && !is_silent {
                state.session.note_pending(moment.now);
            }
            let now = state.session.state();
            if now != state.reported {
                state.reported = now;
                self.actions.push(Action::State {
                    peer: *peer,
                    state: now,
                });
            }
        }
    }

    /// Says how a next hop is reached: `Some(None)` is not at all, none that it is not known any
    /// more.
    pub fn set_next_hop(
        &mut self,
        address: IpAddr,
        info: Option<Option<NextHopInfo>>,
        moment: Moment,
    ) {
        let former = self.rib.gateway(address);
        if self.rib.set_next_hop(address, info) {
            let has_other_gateway = self.rib.gateway(address) != former;
            for peer in self.peers.keys().copied().collect::<Vec<_>>() {
                // Filters may look at the interface.
                if self
                    .peers
                    .get(&peer)
                    .is_some_and(|state| !state.config.import.is_empty())
                {
                    self.reimport(peer);
                }
                // Routes do not go to the peer that their packets are sent by.
                if has_other_gateway {
                    self.resend(peer);
                }
            }
            self.update_peers(moment);
        }
    }

    fn route_session<'a>(&'a self, state: &'a Peer) -> Option<route_policy::Session<'a>> {
        let connection = state.session.established()?;
        let negotiated = connection.negotiated.as_ref()?;
        Some(route_policy::Session {
            speaker: &self.config,
            peer: &state.config,
            local_address: connection.local,
            extended_next_hop: negotiated.extended_next_hop,
        })
    }
}

/// What is different is in the OPEN or in the sockets.
fn needs_reset(former: &PeerConfig, now: &PeerConfig) -> bool {
    let facts = |config: &PeerConfig| {
        let open = (
            config.asn,
            config.local_asn,
            config.families.clone(),
            config.hold_time,
        );
        let more = (
            config.restart_time,
            config.extended_next_hop,
            config.role,
            config.keepalive,
        );
        (
            open,
            more,
            config.address,
            config.is_passive,
            config.transport.clone(),
        )
    };
    facts(former) != facts(now)
}
