//! Rules in parsed form, common to policies of every kind, with selectors already rewritten to
//! effective labels.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::meta::NamespacedName;
use crate::selector::Selector;

/// Action of a rule on a packet that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Accept and stop.
    Allow,
    /// Drop and stop.
    Deny,
    /// Write a log line and continue with the next rule.
    Log,
    /// Leave this tier and continue with the next.
    Pass,
}

/// IP version of a rule that names one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// IP version of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }
}

/// An IP protocol by number. Names are resolved when a rule is parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv4.
    pub const ICMP: Self = Self(1);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// SCTP.
    pub const SCTP: Self = Self(132);
    /// UDP-Lite.
    pub const UDPLITE: Self = Self(136);

    /// ICMP of an IP version. In packets of the other version the number has no special meaning.
    pub fn icmp_of(version: IpVersion) -> Self {
        match version {
            IpVersion::V4 => Self::ICMP,
            IpVersion::V6 => Self::ICMPV6,
        }
    }

    /// Returns true when packets of this protocol carry 16-bit source and destination ports in the
    /// first four bytes.
    pub fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP | Self::UDPLITE)
    }
}

/// An inclusive range of port numbers; one port is a range of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port, not below the first.
    pub last: u16,
}

impl PortRange {
    /// Returns the range that holds one port.
    pub fn single(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// Returns true when the port is inside.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

/// One entry of a rule's port list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// Ports by number.
    Range(PortRange),
    /// The port that each endpoint declares under this name.
    Named(String),
}

/// ICMP type and, optionally, code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Icmp {
    /// ICMP type; absent means any.
    pub kind: Option<u8>,
    /// ICMP code; only with a type.
    pub code: Option<u8>,
}

/// Match of one side of a packet. All criteria that are present must hold; each list is "any of".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntityMatch {
    /// The address is in one of these; empty means any.
    pub nets: Vec<IpNet>,
    /// The address is in none of these.
    pub not_nets: Vec<IpNet>,
    /// The address belongs to an endpoint or network set whose effective labels match.
    pub selector: Option<Selector>,
    /// The address does not belong to one whose effective labels match.
    pub not_selector: Option<Selector>,
    /// The port is one of these; empty means any. Rules made from one rule of a Kubernetes kind
    /// share the list.
    pub ports: Arc<[Port]>,
    /// The port is none of these.
    pub not_ports: Vec<Port>,
    /// The address is one of a node whose labels match.
    pub nodes: Option<Selector>,
    /// The address and port are an endpoint of this Service.
    pub service: Option<NamespacedName>,
}

/// A rule. All criteria that are present must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Action on a match.
    pub action: Action,
    /// Only packets of this IP version.
    pub ip_version: Option<IpVersion>,
    /// Only packets of this protocol.
    pub protocol: Option<Protocol>,
    /// Only packets not of this protocol.
    pub not_protocol: Option<Protocol>,
    /// Only ICMP packets of the rule's IP version, of this type and code.
    pub icmp: Option<Icmp>,
    /// Only packets that are not; packets of other protocols have no type, and match.
    pub not_icmp: Option<Icmp>,
    /// Match of the packet's source.
    pub source: EntityMatch,
    /// Match of the packet's destination.
    pub destination: EntityMatch,
}

impl Rule {
    /// Returns a rule that matches every packet.
    pub fn any(action: Action) -> Self {
        Self {
            action,
            ip_version: None,
            protocol: None,
            not_protocol: None,
            icmp: None,
            not_icmp: None,
            source: EntityMatch::default(),
            destination: EntityMatch::default(),
        }
    }
}
