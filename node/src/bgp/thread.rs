//! The thread that owns the speaker: its sockets, its timers and its next hops.
//!
//! It is a thread of its own because a peer that hears nothing for the hold time drops all routes
//! to this node, whatever graceful restart says.

mod apply;
mod notes;
mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use margay_api::rule::IpVersion;
use margay_bgp::attributes::Family;
use margay_bgp::config::{PeerId, SpeakerConfig};
use margay_bgp::error::ConfigError;
use margay_bgp::rib::RouteChange;
use margay_bgp::session::Moment;
use margay_bgp::speaker::{Action, Speaker};
use margay_dataplane::routes::learned::{LearnedChange, LearnedRoute, LearnedRoutes};
use margay_dataplane::routes::next_hop::NextHopLookup;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};

use self::notes::SessionNote;
use super::config::WantedSpeaker;
use super::connections::{Connections, Event};
use super::hops::Hops;
use super::listeners::Listeners;
use super::report::BgpReport;
use super::sockets;

/// Bytes that are made for a connection at once.
const WRITE: usize = 64 << 10;
/// Events that are handled before what follows from them is written.
const BATCH: usize = 64;
/// Interval of looking next hops up and of trying again to listen. A look takes some microseconds
/// per next hop.
const LOOK: Duration = Duration::from_secs(1);
/// Interval of forgetting next hops that no route has any more, in looks.
const FORGET: u32 = 60;

/// Where learnt routes go.
pub trait RouteSink: Send {
    /// A speaker begins: routes of the one before are kept until it is complete.
    fn begin(&mut self);
    /// Sets and removes routes.
    fn set(&mut self, changes: Vec<LearnedChange>);
    /// Everything of an IP version has been set.
    fn complete(&mut self, version: IpVersion);
}

impl RouteSink for LearnedRoutes {
    fn begin(&mut self) {
        Self::begin(self);
    }

    fn set(&mut self, changes: Vec<LearnedChange>) {
        Self::set(self, changes);
    }

    fn complete(&mut self, version: IpVersion) {
        Self::complete(self, version);
    }
}

/// What the thread is started with.
pub struct ThreadParts {
    /// What the speaker is to be. `None`: its sessions are closed, and the thread ends. When the
    /// sender is dropped the thread ends silently, so that peers keep the routes to this node.
    pub wanted: watch::Receiver<Option<Arc<WantedSpeaker>>>,
    /// Where learnt routes go.
    pub routes: Box<dyn RouteSink>,
    /// Where the state of sessions is published.
    pub report: watch::Sender<Option<BgpReport>>,
    /// The kernel has the routes of a process before this one (RFC 4724 section 4.1).
    pub is_restarting: bool,
    /// Random number in `0.0..1.0`.
    pub jitter: fn() -> f64,
}

/// Starts the thread in the network namespace of the calling one.
///
/// # Errors
/// If there is no thread or file descriptor left.
pub fn spawn(parts: ThreadParts) -> io::Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::Builder::new()
        .name("bgp".to_owned())
        .spawn(move || runtime.block_on(run(parts)))
}

async fn run(mut parts: ThreadParts) {
    let Some(first) = parts.wanted.borrow_and_update().clone() else {
        return;
    };
    let lookup = match NextHopLookup::open() {
        Ok(lookup) => lookup,
        Err(error) => {
            tracing::error!(%error, "BGP does not start: next hops cannot be looked up");
            return;
        }
    };
    let speaker = match mk_speaker(&first.speaker, parts.is_restarting, Duration::ZERO) {
        Ok(speaker) => speaker,
        Err(error) => {
            tracing::error!(%error, "BGP does not start");
            return;
        }
    };
    let (connections, inbox) = Connections::new();
    let mut owner = SpeakerOwner {
        speaker,
        config: first.speaker.clone(),
        wanted: first,
        ids: BTreeMap::new(),
        sessions: BTreeMap::new(),
        next_id: 0,
        listeners: Listeners::new(connections.events()),
        connections,
        inbox,
        hops: Hops::new(Box::new(lookup)),
        gateways: BTreeSet::new(),
        routes: parts.routes,
        changes: BTreeMap::new(),
        report: parts.report,
        start: Instant::now(),
        jitter: parts.jitter,
        looks: 0,
    };
    owner.begin(parts.is_restarting);
    owner.apply().await;
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        owner.run_actions();
        let deadline = owner.deadline();
        tokio::select! {
            changed = parts.wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                let wanted = parts.wanted.borrow_and_update().clone();
                let Some(wanted) = wanted else {
                    return owner.close().await;
                };
                owner.wanted = wanted;
                owner.apply().await;
            }
            Some(event) = owner.inbox.recv() => {
                owner.handle(event);
                for _ in 1..BATCH {
                    let Ok(event) = owner.inbox.try_recv() else { break };
                    owner.handle(event);
                }
            }
            () = tokio::time::sleep_until(deadline) => owner.tick(),
            _ = look.tick() => owner.look_around(),
        }
    }
}

/// See the module.
struct SpeakerOwner {
    speaker: Speaker,
    /// What the speaker was made from.
    config: SpeakerConfig,
    wanted: Arc<WantedSpeaker>,
    ids: BTreeMap<PeerId, SocketAddr>,
    sessions: BTreeMap<SocketAddr, SessionNote>,
    next_id: u32,
    listeners: Listeners,
    connections: Connections,
    inbox: mpsc::Receiver<Event>,
    hops: Hops,
    /// Routes to peers by a gateway of their own.
    gateways: BTreeSet<IpNet>,
    routes: Box<dyn RouteSink>,
    /// Routes that change in this turn.
    changes: BTreeMap<IpNet, Option<Arc<LearnedRoute>>>,
    report: watch::Sender<Option<BgpReport>>,
    start: Instant,
    jitter: fn() -> f64,
    looks: u32,
}

fn mk_speaker(
    config: &SpeakerConfig,
    is_restarting: bool,
    now: Duration,
) -> Result<Speaker, ConfigError> {
    let config = SpeakerConfig {
        is_restarting,
        ..config.clone()
    };
    Speaker::new(config, now)
}

impl SpeakerOwner {
    fn moment(&self) -> Moment {
        Moment {
            now: self.start.elapsed(),
            jitter: ((self.jitter)() * 256.0) as u8,
        }
    }

    fn deadline(&self) -> Instant {
        let due = self.speaker.deadline().map(|due| self.start + due);
        // The interval of looks comes before.
        due.unwrap_or_else(|| Instant::now() + 2 * LOOK)
    }

    fn tick(&mut self) {
        let moment = self.moment();
        self.speaker.tick(moment);
    }

    /// Begins with a new speaker.
    fn begin(&mut self, is_restarting: bool) {
        self.changes.clear();
        self.hops.retain(&BTreeSet::new());
        self.routes.begin();
        if !is_restarting {
            IpVersion::ALL
                .iter()
                .for_each(|version| self.routes.complete(*version));
        }
    }

    fn handle(&mut self, event: Event) {
        let moment = self.moment();
        match event {
            Event::Accepted(stream, remote) => self.accept(stream, remote.ip(), moment),
            Event::Connected(connection, Ok(stream)) => {
                let local = stream.local_addr().map(|address| address.ip());
                // It may have been given up meanwhile.
                if let (Ok(local), Some(_)) = (local, self.speaker.owner(connection)) {
                    self.connections.attach(connection, stream);
                    self.speaker.connected(connection, local, moment);
                }
            }
            Event::Connected(connection, Err(error)) => {
                let owner = self.speaker.owner(connection);
                if let Some(note) = owner.and_then(|(_, address)| self.sessions.get_mut(&address)) {
                    note.connecting = Some(error.to_string());
                }
                self.speaker.closed(connection, moment);
            }
            Event::Read(connection, bytes) => self.speaker.receive(connection, &bytes, moment),
            Event::Closed(connection) => {
                self.connections.remove(connection);
                self.speaker.closed(connection, moment);
            }
            Event::Wrote(connection) => self.connections.note_sent(connection),
        }
    }

    fn accept(&mut self, stream: TcpStream, remote: IpAddr, moment: Moment) {
        let Ok(local) = stream.local_addr() else {
            return;
        };
        let Some(connection) = self.speaker.accept(remote, local.ip(), moment) else {
            return;
        };
        let owner = self.speaker.owner(connection);
        let config = owner.and_then(|(peer, _)| self.speaker.peer(peer));
        let transport = config
            .map(|config| config.transport.clone())
            .unwrap_or_default();
        match sockets::prepare(&stream, remote, &transport) {
            Ok(()) => self.connections.attach(connection, stream),
            Err(error) => {
                tracing::warn!(%remote, %error, "a BGP connection cannot be used");
                self.speaker.closed(connection, moment);
            }
        }
    }

    /// Does what the speaker asks for, until it asks for nothing more.
    fn run_actions(&mut self) {
        loop {
            let actions = self.speaker.poll();
            if actions.is_empty() && !self.learn_all() {
                break;
            }
            for action in actions {
                self.act(action);
            }
        }
        for connection in self.speaker.pending() {
            if self.connections.is_idle(connection) {
                let (mut bytes, moment) = (Vec::new(), self.moment());
                self.speaker.transmit(connection, WRITE, moment, &mut bytes);
                self.connections.send(connection, bytes);
            }
        }
        self.flush_changes();
    }

    fn flush_changes(&mut self) {
        if !self.changes.is_empty() {
            let changes = std::mem::take(&mut self.changes);
            self.routes.set(changes.into_iter().collect());
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Connect { peer, connection } => {
                if let Some(config) = self.speaker.peer(peer) {
                    self.connections.connect(connection, config);
                }
            }
            Action::Close { connection, last } => self.connections.close(connection, last),
            Action::Route(RouteChange::Set { net, route }) => self.install(net, &route),
            Action::Route(RouteChange::Remove { net }) => {
                if !self.gateways.contains(&net) {
                    self.changes.insert(net, None);
                }
            }
            Action::Synced(family) => {
                self.flush_changes();
                tracing::info!(%family, "the routes of BGP peers are complete");
                self.routes.complete(version_of(family));
            }
            Action::State { peer, state } => self.note_state(peer, state),
            Action::Ended { peer, reason } => self.note_end(peer, &reason),
            Action::Problem { peer, text } => {
                let address = self.ids.get(&peer);
                tracing::warn!(
                    ?address,
                    problem = text,
                    "a BGP peer sent what cannot be used"
                );
            }
        }
    }

    /// Ends all sessions for good: peers remove what leads to this node.
    async fn close(mut self) {
        let moment = self.moment();
        self.speaker
            .shut_down(false, "BGP is turned off on this node", moment);
        self.run_actions();
        self.routes.begin();
        IpVersion::ALL
            .iter()
            .for_each(|version| self.routes.complete(*version));
        self.report.send_replace(None);
        self.connections.drain().await;
    }
}

const fn version_of(family: Family) -> IpVersion {
    match family {
        Family::Ipv4 => IpVersion::V4,
        Family::Ipv6 => IpVersion::V6,
    }
}
