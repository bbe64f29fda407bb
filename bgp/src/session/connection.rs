//! One connection of a session: from its OPEN to its end (RFC 4271 section 8.2.2, states OpenSent to
//! Established).

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use crate::attributes::Family;
use crate::codec::{CodecContext, Framer};
use crate::config::{MIN_HOLD_TIME, PeerConfig};
use crate::message::{GracefulRestart, Open};
use crate::notification::{self, Notification};

/// Hold time until the peer's OPEN has said what it is (RFC 4271 section 8.2.2: 4 minutes).
pub(crate) const OPEN_HOLD_TIME: Duration = Duration::from_secs(240);

/// A connection: a number of the speaker's, which it never uses again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// Time and a random number: all that the machine gets of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Time since any fixed point; it never goes back.
    pub now: Duration,
    /// A random octet. Timers that are set at this moment are 75 to 100 % of their length by it
    /// (RFC 4271 section 10).
    pub jitter: u8,
}

impl Moment {
    /// The moment at which a timer of this length runs out.
    pub(crate) fn after(&self, length: Duration) -> Duration {
        const UNITS: u32 = 1020;
        self.now + length * (765 + u32::from(self.jitter)) / UNITS
    }
}

/// State of a connection (RFC 4271 section 8.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ConnectionStage {
    OpenSent,
    OpenConfirm,
    Established,
}

/// What both OPENs have come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// The peer's BGP identifier.
    pub router_id: Ipv4Addr,
    /// Hold time; zero for none.
    pub hold_time: Duration,
    /// Time between our KEEPALIVEs; zero for none.
    pub keepalive: Duration,
    /// Families of both.
    pub families: BTreeSet<Family>,
    /// AS numbers of four octets.
    pub four_octet_as: bool,
    /// We may ask for routes, and the peer may.
    pub route_refresh: bool,
    /// With markers (RFC 7313).
    pub enhanced_route_refresh: bool,
    /// IPv6 next hops of IPv4 routes.
    pub extended_next_hop: bool,
    /// The peer's capability of graceful restart, if we announced ours.
    pub graceful_restart: Option<GracefulRestart>,
    /// NOTIFICATIONs leave routes in place (RFC 8538).
    pub notification_restart: bool,
}

impl Negotiated {
    /// How messages of this session are read and written.
    pub(crate) fn context(&self, is_internal: bool) -> CodecContext {
        let context = CodecContext {
            four_octet_as: self.four_octet_as,
            is_internal,
            ipv4: false,
            ipv6: false,
            extended_next_hop: self.extended_next_hop,
        };
        context.with_families(&self.families)
    }
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) id: ConnectionId,
    /// We opened it.
    pub(crate) is_outgoing: bool,
    pub(crate) local: IpAddr,
    pub(crate) stage: ConnectionStage,
    pub(crate) framer: Framer,
    /// Messages that have not been taken yet. KEEPALIVEs and the answers to OPEN: a few, as no
    /// second KEEPALIVE is added behind one.
    pub(crate) control: Vec<u8>,
    pub(crate) negotiated: Option<Negotiated>,
    pub(crate) opened_at: Duration,
    pub(crate) hold_until: Option<Duration>,
    pub(crate) keepalive_at: Option<Duration>,
    /// Since when bytes wait although none has been taken (RFC 9687).
    pub(crate) blocked_since: Option<Duration>,
}

impl Connection {
    pub(crate) fn new(id: ConnectionId, is_outgoing: bool, local: IpAddr, now: Duration) -> Self {
        Self {
            id,
            is_outgoing,
            local,
            stage: ConnectionStage::OpenSent,
            framer: Framer::default(),
            control: Vec::new(),
            negotiated: None,
            opened_at: now,
            hold_until: Some(now + OPEN_HOLD_TIME),
            keepalive_at: None,
            blocked_since: None,
        }
    }

    /// When it is to be looked at again.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let blocked = self.blocked_since.map(|since| since + self.send_hold_time());
        [self.hold_until, self.keepalive_at, blocked].into_iter().flatten().min()
    }

    /// RFC 9687 section 3.1: twice the hold time, and at least 8 minutes. None without hold time.
    pub(crate) fn send_hold_time(&self) -> Duration {
        const LEAST: Duration = Duration::from_secs(480);
        let hold = self.negotiated.as_ref().map_or(Duration::ZERO, |each| each.hold_time);
        (2 * hold).max(LEAST)
    }

    /// Starts the timers anew that a message of the peer starts.
    pub(crate) fn restart_hold(&mut self, now: Duration) {
        let hold = self.negotiated.as_ref().map_or(OPEN_HOLD_TIME, |each| each.hold_time);
        self.hold_until = (hold > Duration::ZERO).then(|| now + hold);
    }

    pub(crate) fn restart_keepalive(&mut self, moment: Moment) {
        let time = self.negotiated.as_ref().map_or(Duration::ZERO, |each| each.keepalive);
        self.keepalive_at = (time > Duration::ZERO).then(|| moment.after(time));
    }
}

/// What the peer's OPEN comes to, beside ours.
///
/// # Errors
///
/// The NOTIFICATION that ends the connection, with what is wrong (RFC 4271 section 6.2, RFC 9234
/// section 4.2).
pub(crate) fn negotiate(
    config: &PeerConfig,
    own: &Open,
    theirs: &Open,
) -> Result<Negotiated, (Notification, String)> {
    let refuse = |codes, text: String| Err((Notification::new(codes), text));
    if theirs.asn != config.asn {
        let text = format!("the peer says AS {}, and AS {} is configured", theirs.asn, config.asn);
        return refuse(notification::BAD_PEER_AS, text);
    }
    let is_internal = own.asn == config.asn;
    // Identifiers are unique within an autonomous system (RFC 6286).
    if theirs.router_id.is_unspecified() || (is_internal && theirs.router_id == own.router_id) {
        let text = format!(
            "the peer's BGP identifier is {}, and so is ours or it is zero",
            theirs.router_id
        );
        return refuse(notification::BAD_BGP_IDENTIFIER, text);
    }
    if theirs.hold_time > Duration::ZERO && theirs.hold_time < MIN_HOLD_TIME {
        let text = format!("the peer proposes a hold time of {:?}, below 3 s", theirs.hold_time);
        return refuse(notification::UNACCEPTABLE_HOLD_TIME, text);
    }
    let (ours, others) = (&own.capabilities, &theirs.capabilities);
    if let (Some(own), Some(other)) = (ours.role.filter(|_| !is_internal), others.role)
        && (own.counterpart() != other || others.has_conflicting_roles)
    {
        let text = format!("the peer is {other:?} and we are {own:?}");
        return refuse(notification::ROLE_MISMATCH, text);
    }
    let families: BTreeSet<Family> =
        ours.families.intersection(&others.families).copied().collect();
    if families.is_empty() {
        let (own, other) = (&ours.families, &others.families);
        let text = format!("no common family: we have {own:?}, the peer has {other:?}");
        return refuse(notification::UNSUPPORTED_CAPABILITY, text);
    }
    let hold_time = own.hold_time.min(theirs.hold_time);
    let third = hold_time / 3;
    let keepalive = config.keepalive.map_or(third, |time| time.min(third));
    let graceful_restart =
        others.graceful_restart.clone().filter(|_| ours.graceful_restart.is_some());
    let notification_restart = graceful_restart.as_ref().is_some_and(|each| each.notification);
    Ok(Negotiated {
        router_id: theirs.router_id,
        hold_time,
        keepalive,
        families,
        four_octet_as: others.four_octet_as,
        route_refresh: others.route_refresh,
        enhanced_route_refresh: others.enhanced_route_refresh && others.route_refresh,
        extended_next_hop: ours.extended_next_hop && others.extended_next_hop,
        graceful_restart,
        notification_restart,
    })
}
