//! Messages as values (RFC 4271 section 4).

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::IpNet;

use crate::attributes::{Attributes, Family};
use crate::notification::Notification;

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// OPEN.
    Open(Open),
    /// UPDATE.
    Update(Update),
    /// NOTIFICATION.
    Notification(Notification),
    /// KEEPALIVE.
    Keepalive,
    /// ROUTE-REFRESH (RFC 2918).
    RouteRefresh(RouteRefresh),
}

/// OPEN (RFC 4271 section 4.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// AS number of the sender: that of capability 65 if it is there.
    pub asn: u32,
    /// Proposed hold time; zero for none.
    pub hold_time: Duration,
    /// BGP identifier.
    pub router_id: Ipv4Addr,
    /// Capabilities (RFC 5492).
    pub capabilities: Capabilities,
}

/// Capabilities that the speaker knows (RFC 5492); others are not kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// Families by capability 1 (RFC 4760). Empty: the capability is absent, which means IPv4.
    pub families: BTreeSet<Family>,
    /// Capability 65 (RFC 6793).
    pub four_octet_as: bool,
    /// Capability 2 (RFC 2918).
    pub route_refresh: bool,
    /// Capability 70 (RFC 7313).
    pub enhanced_route_refresh: bool,
    /// Capability 5 for IPv4 routes over IPv6 next hops (RFC 8950).
    pub extended_next_hop: bool,
    /// Capability 64 (RFC 4724).
    pub graceful_restart: Option<GracefulRestart>,
    /// Capability 9 (RFC 9234).
    pub role: Option<Role>,
    /// Capability 9 is there more than once with different values, which is an error (RFC 9234
    /// section 4.2).
    pub has_conflicting_roles: bool,
}

/// Graceful restart capability (RFC 4724 section 3, RFC 8538 section 2).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GracefulRestart {
    /// Restart State: the sender has restarted and waits for our End-of-RIB.
    pub is_restarting: bool,
    /// N flag: NOTIFICATIONs, too, leave routes in place (RFC 8538).
    pub notification: bool,
    /// How long the sender takes to come back, 0 to 4095 s.
    pub time: Duration,
    /// Families, each with its Forwarding State flag: forwarding was preserved.
    pub families: BTreeMap<Family, bool>,
}

/// Role on a session between autonomous systems (RFC 9234 section 4.1): what the sender is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Sells transit to the peer.
    Provider,
    /// Route server.
    RouteServer,
    /// Client of a route server.
    RouteServerClient,
    /// Buys transit from the peer.
    Customer,
    /// Exchanges its own and its customers' routes.
    Peer,
}

impl Role {
    /// The only role that the other side may have (RFC 9234 section 4.2).
    pub fn counterpart(self) -> Self {
        match self {
            Self::Provider => Self::Customer,
            Self::Customer => Self::Provider,
            Self::RouteServer => Self::RouteServerClient,
            Self::RouteServerClient => Self::RouteServer,
            Self::Peer => Self::Peer,
        }
    }
}

/// UPDATE (RFC 4271 section 4.3) with errors handled as RFC 7606 has it: what is malformed so that
/// its routes are withdrawn stands in `withdrawn` and `errors`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Update {
    /// Prefixes that are no longer reachable.
    pub withdrawn: Vec<IpNet>,
    /// Reachable prefixes with their attributes: up to one entry per family.
    pub announced: Vec<(Attributes, Vec<IpNet>)>,
    /// The message is the End-of-RIB marker of this family (RFC 4724 section 2).
    pub end_of_rib: Option<Family>,
    /// Malformed attributes, as text with their consequence.
    pub errors: Vec<String>,
}

/// ROUTE-REFRESH (RFC 2918, RFC 7313).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteRefresh {
    /// Family; none for one that is not ours, which is ignored.
    pub family: Option<Family>,
    /// What it is about.
    pub kind: RefreshKind,
}

/// Message subtype of ROUTE-REFRESH (RFC 7313 section 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefreshKind {
    /// Routes are asked for.
    Request,
    /// BoRR: all routes of the family follow.
    Begin,
    /// EoRR: what was not sent since BoRR is no more.
    End,
    /// Another subtype, which is ignored.
    Unknown,
}
