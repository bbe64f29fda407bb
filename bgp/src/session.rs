//! The session machine of one peer (RFC 4271 section 8).
//!
//! A session is up to two connections, one of each direction, each with its own state from OpenSent
//! on, and what there is while it has none: Idle, Connect or Active. Which connection stays when
//! both have got their OPEN is decided by section 6.8.

mod connection;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

pub(crate) use connection::{Connection, ConnectionStage, negotiate};
pub use connection::{ConnectionId, Moment, Negotiated};

use crate::attributes::Family;
use crate::codec::{self, DecodeError, Plain};
use crate::config::PeerConfig;
use crate::message::{Message, Open, RouteRefresh, Update};
use crate::notification::{self, Codes, Notification};

/// Before the first attempt to connect, so that two sides that start at once rarely collide.
const FIRST_CONNECT: Duration = Duration::from_millis(500);
/// After a session ended that had been established, and after the first error.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest time in Idle after errors that repeat (BIRD: error wait time 60 to 300 s).
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// In Idle after the limit of prefixes: what was too much stays so for a while.
const PREFIX_BACKOFF: Duration = Duration::from_secs(300);

/// State of a session (RFC 4271 section 8.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SessionState {
    /// No connection is made or taken: stopped, or waiting after an error.
    Idle,
    /// A connection is being made.
    Connect,
    /// Connections are taken; the next one is made when the timer runs out.
    Active,
    /// Our OPEN is out.
    OpenSent,
    /// The peer's OPEN is in.
    OpenConfirm,
    /// Routes are exchanged.
    Established,
}

/// Why an established session or an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// We sent a NOTIFICATION.
    Sent(Notification, String),
    /// The peer sent a NOTIFICATION.
    Received(Notification),
    /// The connection ended or broke.
    Closed,
    /// No connection came about.
    Unreachable,
    /// The peer connected anew after a restart (RFC 4724 section 4.2).
    Restarted,
    /// We stopped it without a word, so that the peer keeps our routes.
    Stopped,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sent(notification, detail) if detail.is_empty() => {
                write!(f, "sent {notification}")
            }
            Self::Sent(notification, detail) => write!(f, "sent {notification}: {detail}"),
            Self::Received(notification) => write!(f, "received {notification}"),
            Self::Closed => f.write_str("the connection ended"),
            Self::Unreachable => f.write_str("no connection"),
            Self::Restarted => f.write_str("the peer has restarted"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

/// What the session asks for and tells.
#[derive(Debug)]
pub(crate) enum SessionOutput {
    /// A connection is to be made.
    Connect(ConnectionId),
    /// A connection is to be closed, after these bytes if there is room for them.
    Close(ConnectionId, Vec<u8>),
    /// Routes are exchanged from now on.
    Up(Negotiated),
    /// They are not any more. Routes of these families stay, for as long as the peer announced.
    Down { kept: BTreeSet<Family>, restart_time: Duration },
    /// The peer sent routes.
    Update(Update),
    /// The peer sent a ROUTE-REFRESH.
    Refresh(RouteRefresh),
    /// Something went wrong or ended.
    Ended(Reason),
}

/// The session with one peer.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) connections: Vec<Connection>,
    /// The attempt that is being made.
    attempt: Option<ConnectionId>,
    is_running: bool,
    idle_until: Option<Duration>,
    connect_at: Option<Duration>,
    failures: u32,
    established_at: Option<Duration>,
}

/// Everything around a session that its steps need.
pub(crate) struct Surroundings<'a> {
    pub(crate) config: &'a PeerConfig,
    pub(crate) open: &'a Open,
    pub(crate) moment: Moment,
    pub(crate) next_id: &'a mut u64,
    pub(crate) out: &'a mut Vec<SessionOutput>,
}

impl Surroundings<'_> {
    fn is_internal(&self) -> bool {
        self.open.asn == self.config.asn
    }
}

impl Session {
    /// A session that will connect soon.
    pub(crate) fn start(config: &PeerConfig, moment: Moment) -> Self {
        Self {
            connections: Vec::new(),
            attempt: None,
            is_running: true,
            idle_until: None,
            connect_at: (!config.is_passive).then(|| moment.after(FIRST_CONNECT)),
            failures: 0,
            established_at: None,
        }
    }

    pub(crate) fn state(&self) -> SessionState {
        match self.connections.iter().map(|each| each.stage).max() {
            Some(ConnectionStage::Established) => SessionState::Established,
            Some(ConnectionStage::OpenConfirm) => SessionState::OpenConfirm,
            Some(ConnectionStage::OpenSent) => SessionState::OpenSent,
            None if !self.is_running || self.idle_until.is_some() => SessionState::Idle,
            None if self.attempt.is_some() => SessionState::Connect,
            None => SessionState::Active,
        }
    }

    pub(crate) fn established(&self) -> Option<&Connection> {
        self.connections.iter().find(|each| each.stage == ConnectionStage::Established)
    }

    fn established_mut(&mut self) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|each| each.stage == ConnectionStage::Established)
    }

    /// The earliest moment at which [`Self::tick`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let connections = self.connections.iter().filter_map(Connection::deadline);
        connections.chain(self.idle_until).chain(self.connect_at).min()
    }

    /// The attempt has led to a connection.
    pub(crate) fn connected(
        &mut self,
        id: ConnectionId,
        local: IpAddr,
        around: &mut Surroundings<'_>,
    ) {
        if self.attempt == Some(id) {
            self.attempt = None;
            self.connect_at = None;
            self.open(id, true, local, around);
        }
    }

    /// The peer has connected. Returns the connection's number, or none if it is not wanted now:
    /// the session is idle.
    pub(crate) fn accept(
        &mut self,
        local: IpAddr,
        around: &mut Surroundings<'_>,
    ) -> Option<ConnectionId> {
        if self.state() == SessionState::Idle {
            return None;
        }
        // The peer has one connection of its own at a time; it has given the former one up.
        let is_former =
            |each: &Connection| !each.is_outgoing && each.stage != ConnectionStage::Established;
        while let Some(at) = self.connections.iter().position(is_former) {
            self.close_connection(at, notification::CONNECTION_COLLISION, around);
        }
        *around.next_id += 1;
        let id = ConnectionId(*around.next_id);
        self.open(id, false, local, around);
        Some(id)
    }

    fn open(
        &mut self,
        id: ConnectionId,
        is_outgoing: bool,
        local: IpAddr,
        around: &mut Surroundings<'_>,
    ) {
        let mut connection = Connection::new(id, is_outgoing, local, around.moment.now);
        connection.control = codec::encode(around.open);
        connection.blocked_since = Some(around.moment.now);
        self.connections.push(connection);
    }

    /// The attempt has come to nothing, or the connection has ended.
    pub(crate) fn closed(&mut self, id: ConnectionId, around: &mut Surroundings<'_>) {
        if self.attempt == Some(id) {
            self.attempt = None;
            self.connect_at = Some(around.moment.after(around.config.connect_retry));
            around.out.push(SessionOutput::Ended(Reason::Unreachable));
        } else if let Some(at) = self.connections.iter().position(|each| each.id == id) {
            let connection = self.connections.remove(at);
            self.finish(connection, Reason::Closed, None, around);
        }
    }

    /// Bytes of the peer.
    pub(crate) fn receive(
        &mut self,
        id: ConnectionId,
        bytes: &[u8],
        around: &mut Surroundings<'_>,
    ) {
        let Some(at) = self.connections.iter().position(|each| each.id == id) else { return };
        let mut framer = std::mem::take(&mut self.connections[at].framer);
        let mut wrong: Option<DecodeError> = None;
        let pushed = framer.push(bytes, &mut |message| {
            let Some(connection) = self.connections.iter_mut().find(|each| each.id == id) else {
                return false;
            };
            let context = match &connection.negotiated {
                Some(negotiated) => negotiated.context(around.is_internal()),
                None => codec::CodecContext {
                    four_octet_as: true,
                    is_internal: around.is_internal(),
                    ipv4: true,
                    ipv6: true,
                    extended_next_hop: false,
                },
            };
            match codec::decode(message, &context) {
                Ok(message) => self.handle(id, message, around),
                Err(error) => wrong = Some(error),
            }
            wrong.is_none()
        });
        match self.connections.iter_mut().find(|each| each.id == id) {
            Some(connection) => connection.framer = framer,
            None => return,
        }
        if let Some(error) = pushed.err().or(wrong) {
            self.fail(id, error.notification, error.detail, around);
        }
    }

    fn handle(&mut self, id: ConnectionId, message: Message, around: &mut Surroundings<'_>) {
        let Some(at) = self.connections.iter().position(|each| each.id == id) else { return };
        let connection = &mut self.connections[at];
        match (connection.stage, message) {
            (_, Message::Notification(notification)) => {
                let connection = self.connections.remove(at);
                self.finish(connection, Reason::Received(notification), None, around);
            }
            (ConnectionStage::OpenSent, Message::Open(open)) => self.take_open(id, &open, around),
            (ConnectionStage::OpenConfirm, Message::Keepalive) => self.establish(id, around),
            (ConnectionStage::Established, message) => {
                connection.restart_hold(around.moment.now);
                match message {
                    Message::Keepalive => {}
                    Message::Update(update) => around.out.push(SessionOutput::Update(update)),
                    Message::RouteRefresh(refresh) => {
                        around.out.push(SessionOutput::Refresh(refresh))
                    }
                    _ => self.fail_unexpected(id, notification::UNEXPECTED_IN_ESTABLISHED, around),
                }
            }
            (ConnectionStage::OpenSent, _) => {
                self.fail_unexpected(id, notification::UNEXPECTED_IN_OPEN_SENT, around);
            }
            (ConnectionStage::OpenConfirm, _) => {
                self.fail_unexpected(id, notification::UNEXPECTED_IN_OPEN_CONFIRM, around);
            }
        }
    }

    fn fail_unexpected(&mut self, id: ConnectionId, codes: Codes, around: &mut Surroundings<'_>) {
        self.fail(id, Notification::new(codes), String::new(), around);
    }

    fn take_open(&mut self, id: ConnectionId, open: &Open, around: &mut Surroundings<'_>) {
        let negotiated = match negotiate(around.config, around.open, open) {
            Ok(negotiated) => negotiated,
            Err((notification, detail)) => return self.fail(id, notification, detail, around),
        };
        if !self.wins(id, open, around) {
            if let Some(at) = self.connections.iter().position(|each| each.id == id) {
                self.close_connection(at, notification::CONNECTION_COLLISION, around);
            }
            return;
        }
        let Some(connection) = self.connections.iter_mut().find(|each| each.id == id) else {
            return;
        };
        connection.negotiated = Some(negotiated);
        connection.stage = ConnectionStage::OpenConfirm;
        connection.control.extend(codec::encode(Plain::Keepalive));
        connection.blocked_since.get_or_insert(around.moment.now);
        connection.restart_hold(around.moment.now);
        connection.restart_keepalive(around.moment);
    }

    /// Collision detection (RFC 4271 section 6.8): this connection, whose OPEN has come, stays; the
    /// other one, if it has got so far, is closed then.
    fn wins(&mut self, id: ConnectionId, open: &Open, around: &mut Surroundings<'_>) -> bool {
        let Some(this) = self.connections.iter().find(|each| each.id == id) else { return false };
        let (is_outgoing, opened_at) = (this.is_outgoing, this.opened_at);
        let is_rival =
            |each: &Connection| each.id != id && each.stage >= ConnectionStage::OpenConfirm;
        let Some(at) = self.connections.iter().position(is_rival) else { return true };
        let rival = &self.connections[at];
        if rival.stage == ConnectionStage::Established {
            // A peer that connects again has lost the former connection: it has restarted, which
            // it is believed only if it said that it may (RFC 4724 section 4.2). A connection from
            // before is of the same start.
            let may_restart =
                rival.negotiated.as_ref().is_some_and(|each| each.graceful_restart.is_some());
            let is_later = self.established_at.is_some_and(|at| opened_at > at);
            if is_outgoing || !may_restart || !is_later {
                return false;
            }
            let former = self.connections.remove(at);
            around.out.push(SessionOutput::Close(former.id, Vec::new()));
            self.finish(former, Reason::Restarted, None, around);
            return true;
        }
        // That of the side with the greater identifier stays; where they are equal, with the
        // greater AS number (RFC 6286).
        let ours_is_greater = (around.open.router_id, around.open.asn) > (open.router_id, open.asn);
        let stays = is_outgoing == ours_is_greater || is_outgoing == rival.is_outgoing;
        if stays {
            self.close_connection(at, notification::CONNECTION_COLLISION, around);
        }
        stays
    }

    fn establish(&mut self, id: ConnectionId, around: &mut Surroundings<'_>) {
        // The peer has chosen this one: its KEEPALIVE is its answer to our OPEN.
        while let Some(at) = self.connections.iter().position(|each| each.id != id) {
            self.close_connection(at, notification::CONNECTION_COLLISION, around);
        }
        if let Some(attempt) = self.attempt.take() {
            around.out.push(SessionOutput::Close(attempt, Vec::new()));
        }
        let Some(connection) = self.connections.iter_mut().find(|each| each.id == id) else {
            return;
        };
        connection.stage = ConnectionStage::Established;
        connection.restart_hold(around.moment.now);
        let negotiated = connection.negotiated.clone();
        self.connect_at = None;
        self.established_at = Some(around.moment.now);
        around.out.extend(negotiated.map(SessionOutput::Up));
    }

    /// Ends a connection with a NOTIFICATION.
    fn fail(
        &mut self,
        id: ConnectionId,
        notification: Notification,
        detail: String,
        around: &mut Surroundings<'_>,
    ) {
        let Some(at) = self.connections.iter().position(|each| each.id == id) else { return };
        let connection = self.connections.remove(at);
        self.finish(connection, Reason::Sent(notification, detail), None, around);
    }

    /// Closes one of two connections; the session goes on.
    fn close_connection(&mut self, at: usize, codes: Codes, around: &mut Surroundings<'_>) {
        let connection = self.connections.remove(at);
        around
            .out
            .push(SessionOutput::Close(connection.id, codec::encode(&Notification::new(codes))));
    }

    /// What the end of a connection means, which has been taken out of the session. `backoff` is
    /// the time in Idle, if the reason alone does not say it.
    fn finish(
        &mut self,
        connection: Connection,
        reason: Reason,
        backoff: Option<Duration>,
        around: &mut Surroundings<'_>,
    ) {
        let last = match &reason {
            Reason::Sent(notification, _) => codec::encode(notification),
            _ => Vec::new(),
        };
        if reason != Reason::Restarted {
            around.out.push(SessionOutput::Close(connection.id, last));
        }
        let was_established = connection.stage == ConnectionStage::Established;
        if was_established {
            self.established_at = None;
            self.failures = 0;
            around.out.push(down(&connection, &reason));
        }
        let is_error = matches!(reason, Reason::Sent(..) | Reason::Received(_));
        let is_last = self.connections.is_empty() && reason != Reason::Restarted;
        around.out.push(SessionOutput::Ended(reason));
        if !is_last || !self.is_running {
            return;
        }
        let wait = match backoff {
            Some(wait) => Some(wait),
            None if is_error => {
                let wait = FIRST_BACKOFF * 2u32.saturating_pow(self.failures.min(16));
                self.failures = self.failures.saturating_add(1);
                Some(wait.min(MAX_BACKOFF))
            }
            None => None,
        };
        match wait {
            Some(wait) => {
                self.idle_until = Some(around.moment.after(wait));
                self.connect_at = None;
                around
                    .out
                    .extend(self.attempt.take().map(|id| SessionOutput::Close(id, Vec::new())));
            }
            // A peer that closes has something else to do first: to restart, most often.
            None if self.attempt.is_none() && !around.config.is_passive => {
                let retry =
                    if was_established { FIRST_BACKOFF } else { around.config.connect_retry };
                self.connect_at = Some(around.moment.after(retry));
            }
            None => {}
        }
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, around: &mut Surroundings<'_>) {
        let now = around.moment.now;
        let is_due = |at: Option<Duration>| at.is_some_and(|at| at <= now);
        if is_due(self.idle_until) {
            self.idle_until = None;
            if !around.config.is_passive {
                self.connect_at = Some(now);
            }
        }
        if is_due(self.connect_at) {
            self.connect_at = None;
            // A connection that the peer has made is looked at first.
            if self.attempt.is_none() && self.connections.is_empty() {
                *around.next_id += 1;
                let id = ConnectionId(*around.next_id);
                self.attempt = Some(id);
                around.out.push(SessionOutput::Connect(id));
            }
        }
        let ids: Vec<ConnectionId> = self.connections.iter().map(|each| each.id).collect();
        for id in ids {
            self.tick_connection(id, around);
        }
    }

    fn tick_connection(&mut self, id: ConnectionId, around: &mut Surroundings<'_>) {
        let now = around.moment.now;
        let Some(connection) = self.connections.iter_mut().find(|each| each.id == id) else {
            return;
        };
        if connection.hold_until.is_some_and(|at| at <= now) {
            let expired = Notification::new(notification::HOLD_TIMER_EXPIRED);
            return self.fail(id, expired, String::new(), around);
        }
        if connection.blocked_since.is_some_and(|since| since + connection.send_hold_time() <= now)
        {
            let expired = Notification::new(notification::SEND_HOLD_TIMER_EXPIRED);
            return self.fail(id, expired, "the peer takes nothing".to_owned(), around);
        }
        if connection.keepalive_at.is_some_and(|at| at <= now) {
            // One that has not been taken yet says the same.
            if connection.control.is_empty() {
                connection.control.extend(codec::encode(Plain::Keepalive));
                connection.blocked_since.get_or_insert(now);
            }
            connection.restart_keepalive(around.moment);
        }
    }

    /// Ends everything with this NOTIFICATION, or without a word. With a time the session goes on
    /// after it; else it is over.
    pub(crate) fn stop(
        &mut self,
        notification: Option<Notification>,
        backoff: Option<Duration>,
        around: &mut Surroundings<'_>,
    ) {
        self.is_running = backoff.is_some();
        self.idle_until = None;
        self.connect_at = None;
        around.out.extend(self.attempt.take().map(|id| SessionOutput::Close(id, Vec::new())));
        for connection in std::mem::take(&mut self.connections) {
            let reason = match &notification {
                Some(notification) => Reason::Sent(notification.clone(), String::new()),
                None => Reason::Stopped,
            };
            self.finish(connection, reason, backoff, around);
        }
        // Where there was no connection, it ends as well.
        self.idle_until = backoff.map(|wait| around.moment.after(wait));
    }

    /// The peer sent more than it may.
    pub(crate) fn stop_for_limit(&mut self, text: String, around: &mut Surroundings<'_>) {
        let Some(id) = self.established().map(|each| each.id) else { return };
        let Some(at) = self.connections.iter().position(|each| each.id == id) else { return };
        let connection = self.connections.remove(at);
        let cease = Notification::new(notification::MAX_PREFIXES);
        // The routes must go, whatever has been agreed on.
        let keeps = connection.negotiated.as_ref().is_some_and(|each| each.notification_restart);
        let cease = if keeps { cease.into_hard_reset() } else { cease };
        self.finish(connection, Reason::Sent(cease, text), Some(PREFIX_BACKOFF), around);
    }

    /// Bytes are wanted to be written: by the table, which the session does not see.
    pub(crate) fn note_pending(&mut self, now: Duration) {
        if let Some(connection) = self.established_mut() {
            connection.blocked_since.get_or_insert(now);
        }
    }
}

/// Which routes stay after the end of an established session (RFC 4724 section 4.2, RFC 8538
/// section 3).
fn down(connection: &Connection, reason: &Reason) -> SessionOutput {
    let negotiated = connection.negotiated.as_ref();
    let restart = negotiated.and_then(|each| each.graceful_restart.as_ref());
    let by_notification = negotiated.is_some_and(|each| each.notification_restart);
    let keeps = match reason {
        Reason::Sent(notification, _) | Reason::Received(notification) => {
            by_notification && !notification.is_hard_reset()
        }
        Reason::Closed | Reason::Restarted | Reason::Unreachable => true,
        Reason::Stopped => false,
    };
    let of_both = |family: &Family| negotiated.is_some_and(|each| each.families.contains(family));
    let families = restart.filter(|_| keeps).map(|restart| restart.families.keys().copied());
    SessionOutput::Down {
        kept: families.into_iter().flatten().filter(of_both).collect(),
        restart_time: restart.map_or(Duration::ZERO, |restart| restart.time),
    }
}
