//! Configuration of the speaker and its peers.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::attributes::{Community, Family};
use crate::error::{ConfigError, invalid};
use crate::filter::Filters;
use crate::message::Role;

/// Port of BGP (RFC 4271 section 8.2.1).
pub const PORT: u16 = 179;
/// Hold time where nothing is configured, as Calico's BIRD has it.
pub const DEFAULT_HOLD_TIME: Duration = Duration::from_secs(240);
/// Shortest hold time that is not zero (RFC 4271 section 4.2).
pub const MIN_HOLD_TIME: Duration = Duration::from_secs(3);
/// Between two attempts to connect (Calico: `connect retry time 5`).
pub const DEFAULT_CONNECT_RETRY: Duration = Duration::from_secs(5);
/// Restart time where BGPPeer has no `maxRestartTime` (Calico: 120 s).
pub const DEFAULT_RESTART_TIME: Duration = Duration::from_secs(120);
/// Longest restart time that capability 64 has room for (RFC 4724 section 3).
pub const MAX_RESTART_TIME: Duration = Duration::from_secs(4095);

/// The peer that a session is with: a number that the caller chooses, which is never reused for
/// another peer while it is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u32);

/// What the speaker is, the same for all peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpeakerConfig {
    /// BGP identifier.
    pub router_id: Ipv4Addr,
    /// AS number (`BGPConfiguration.asNumber` or the node's annotation).
    pub asn: u32,
    /// Cluster of a route reflector (RFC 4456; annotation `RouteReflectorClusterID`).
    pub cluster_id: Option<Ipv4Addr>,
    /// The process has restarted and the kernel still has the routes of the one before: peers are
    /// asked to keep ours, and nothing is announced until theirs are complete (RFC 4724 section
    /// 4.1).
    pub is_restarting: bool,
    /// Longest wait for the peers' routes after a restart (RFC 4724: Selection_Deferral_Timer).
    pub selection_deferral: Duration,
    /// Most next hops of one route in the kernel; one for none but the best.
    pub max_paths: usize,
    /// A next hop that nobody has reported counts as reachable, at no cost.
    pub assume_reachable: bool,
    /// Kernel metric of routes that no filter gives another (`ipv4NormalRoutePriority`).
    pub ipv4_priority: u32,
    /// As `ipv4_priority`, of IPv6.
    pub ipv6_priority: u32,
}

impl SpeakerConfig {
    /// A speaker with Calico's defaults.
    pub fn new(asn: u32, router_id: Ipv4Addr) -> Self {
        Self {
            router_id,
            asn,
            cluster_id: None,
            is_restarting: false,
            selection_deferral: DEFAULT_RESTART_TIME,
            max_paths: 64,
            assume_reachable: true,
            ipv4_priority: 1024,
            ipv6_priority: 1024,
        }
    }

    /// # Errors
    ///
    /// A value that no speaker may have.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.asn == 0 || self.asn == u32::MAX {
            return Err(invalid(
                "asn",
                self.asn,
                "is 1 to 4294967294 (RFC 7607)",
                "64512 is private",
            ));
        }
        if self.router_id.is_unspecified() {
            return Err(invalid(
                "router_id",
                self.router_id,
                "is not zero (RFC 6286)",
                "use an IPv4 address of the node",
            ));
        }
        if self.max_paths == 0 {
            return Err(invalid(
                "max_paths",
                0,
                "is at least 1",
                "1 turns multipath off",
            ));
        }
        Ok(())
    }
}

/// How next hops are announced (`BGPPeer.nextHopMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NextHopMode {
    /// Ours on routes that begin here and towards other autonomous systems; else as received (RFC
    /// 4271 section 5.1.3).
    #[default]
    Auto,
    /// Ours always.
    Own,
    /// As received, towards other autonomous systems too.
    Keep,
}

/// A password, which no text shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Longest key that Linux takes (TCP_MD5SIG_MAXKEYLEN).
    pub const MAX: usize = 80;

    /// A key of 1 to 80 bytes.
    ///
    /// # Errors
    ///
    /// Another length.
    pub fn new(text: String) -> Result<Self, ConfigError> {
        let length = text.len();
        if (1..=Self::MAX).contains(&length) {
            Ok(Self(text))
        } else {
            let found = format!("{length} bytes");
            Err(invalid(
                "password",
                found,
                "has 1 to 80 bytes, as TCP MD5 takes",
                "shorten it at both ends",
            ))
        }
    }

    /// The key, for the socket.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// What the caller's sockets need and the machine never reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Transport {
    /// Address to connect from (`sourceAddress: UseNodeIP`).
    pub source: Option<IpAddr>,
    /// TCP MD5 key (RFC 2385).
    pub password: Option<Password>,
    /// Packets from more hops away than this are dropped (RFC 5082; `ttlSecurity`).
    pub ttl_security: Option<u8>,
    /// Gateway by which the peer is reached (`reachableBy`).
    pub reachable_by: Option<IpAddr>,
}

/// A peer.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerConfig {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its AS number.
    pub asn: u32,
    /// Ours towards it (`localASNumber`), if it is not the speaker's.
    pub local_asn: Option<u32>,
    /// How often our own AS number may be in its paths (`numAllowedLocalASNumbers`).
    pub allowed_local_asn: u8,
    /// Families of the session.
    pub families: BTreeSet<Family>,
    /// Never connect, only accept.
    pub is_passive: bool,
    /// Proposed hold time; zero for none.
    pub hold_time: Duration,
    /// Time between KEEPALIVEs; a third of the hold time where it is longer or not given.
    pub keepalive: Option<Duration>,
    /// Between two attempts to connect.
    pub connect_retry: Duration,
    /// Announce graceful restart with this restart time (`maxRestartTime`).
    pub restart_time: Option<Duration>,
    /// Longest time that routes of a peer that restarts are kept, whatever it announces.
    pub max_stale_time: Duration,
    /// Reflect to it and from it (RFC 4456).
    pub is_reflector_client: bool,
    /// How next hops are announced.
    pub next_hop_mode: NextHopMode,
    /// Our next hop by family where the session's own address is of the other one.
    pub own_next_hops: BTreeMap<Family, IpAddr>,
    /// Offer IPv4 routes over IPv6 next hops (RFC 8950).
    pub extended_next_hop: bool,
    /// Our role towards it (RFC 9234).
    pub role: Option<Role>,
    /// Its routes must begin with its AS number (RFC 4271 section 6.3).
    pub enforce_first_as: bool,
    /// Filters of its routes, in order; what none decides is accepted.
    pub import: Filters,
    /// Filters of ours, in order; what none decides goes by [`crate::export::ExportPolicy`].
    pub export: Filters,
    /// Communities that it gets with every route.
    pub communities: BTreeSet<Community>,
    /// Most prefixes taken from it, by family.
    pub max_prefixes: usize,
    /// Most memory that its routes take, in bytes, all families together.
    pub max_bytes: usize,
    /// For sockets.
    pub transport: Transport,
}

impl PeerConfig {
    /// A peer with Calico's defaults, of the family of its address.
    pub fn new(address: SocketAddr, asn: u32) -> Self {
        Self {
            address,
            asn,
            local_asn: None,
            allowed_local_asn: 0,
            families: [Family::of_address(&address.ip())].into(),
            is_passive: false,
            hold_time: DEFAULT_HOLD_TIME,
            keepalive: None,
            connect_retry: DEFAULT_CONNECT_RETRY,
            restart_time: Some(DEFAULT_RESTART_TIME),
            max_stale_time: Duration::from_secs(600),
            is_reflector_client: false,
            next_hop_mode: NextHopMode::Auto,
            own_next_hops: BTreeMap::new(),
            extended_next_hop: false,
            role: None,
            enforce_first_as: false,
            import: Filters::default(),
            export: Filters::default(),
            communities: BTreeSet::new(),
            max_prefixes: 1_000_000,
            max_bytes: 256 << 20,
            transport: Transport::default(),
        }
    }

    /// # Errors
    ///
    /// A value that no peer may have.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (field, asn) in [("asn", Some(self.asn)), ("local_asn", self.local_asn)] {
            if asn.is_some_and(|asn| asn == 0 || asn == u32::MAX) {
                let asn = asn.unwrap_or_default();
                return Err(invalid(
                    field,
                    asn,
                    "is 1 to 4294967294 (RFC 7607)",
                    "64512 is private",
                ));
            }
        }
        if self.families.is_empty() {
            return Err(invalid(
                "families",
                "[]",
                "has at least one",
                "name that of the address",
            ));
        }
        let (hold, seconds) = (self.hold_time, self.hold_time.as_secs());
        if (hold > Duration::ZERO && hold < MIN_HOLD_TIME) || seconds > u64::from(u16::MAX) {
            let found = format!("{hold:?}");
            return Err(invalid(
                "hold_time",
                found,
                "is 0 or 3 to 65535 s (RFC 4271)",
                "240 s is the default",
            ));
        }
        if self
            .keepalive
            .is_some_and(|time| time < Duration::from_secs(1))
        {
            let found = format!("{:?}", self.keepalive.unwrap_or_default());
            return Err(invalid(
                "keepalive",
                found,
                "is at least 1 s (RFC 4271)",
                "leave it out",
            ));
        }
        if self
            .restart_time
            .is_some_and(|time| time > MAX_RESTART_TIME)
        {
            let found = format!("{:?}", self.restart_time.unwrap_or_default());
            return Err(invalid(
                "restart_time",
                found,
                "is at most 4095 s (RFC 4724)",
                "120 s is the default",
            ));
        }
        for (family, address) in &self.own_next_hops {
            if *family == Family::Ipv6 && address.is_ipv4() {
                return Err(invalid(
                    "own_next_hops",
                    address,
                    "of IPv6 is of IPv6",
                    "name an IPv6 address",
                ));
            }
        }
        Ok(())
    }
}
