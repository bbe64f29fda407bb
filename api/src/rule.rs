//! Rules in parsed form: what a policy of any kind says, with selectors already rewritten to effective labels.

use std::sync::Arc;

use ipnet::IpNet;

use crate::meta::NamespacedName;
use crate::selector::Selector;

/// What a rule does with a packet that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Accept and stop.
    Allow,
    /// Drop and stop.
    Deny,
    /// Write a log line and go on with the next rule.
    Log,
    /// Leave this tier and go on with the next.
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

    /// ICMP of an IP version: the number of the other version's is nothing special in a packet.
    pub fn icmp_of(version: IpVersion) -> Self {
        match version {
            IpVersion::V4 => Self::ICMP,
            IpVersion::V6 => Self::ICMPV6,
        }
    }

    /// Whether packets of this protocol carry 16-bit source and destination ports in the first four bytes.
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
    /// The range that holds one port.
    pub fn single(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Whether the port is inside.
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

/// What a rule demands of one side of a packet. All criteria that are present must hold; each list is "any of".
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
    /// The port is one of these; empty means any. Rules that one rule of Kubernetes' kinds became share the list.
    pub ports: Arc<[Port]>,
    /// The port is none of these.
    pub not_ports: Vec<Port>,
    /// The address is one of a node whose labels match.
    pub nodes: Option<Selector>,
    /// The address and port are an endpoint of this Service.
    pub service: Option<NamespacedName>,
}

/// One rule. All criteria that are present must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What to do.
    pub action: Action,
    /// Only packets of this IP version.
    pub ip_version: Option<IpVersion>,
    /// Only packets of this protocol.
    pub protocol: Option<Protocol>,
    /// Only packets not of this protocol.
    pub not_protocol: Option<Protocol>,
    /// Only packets that are ICMP of their own IP version, of this type and code.
    pub icmp: Option<Icmp>,
    /// Only packets that are not; what is no ICMP of its version has no type, and passes.
    pub not_icmp: Option<Icmp>,
    /// Where the packet comes from.
    pub source: EntityMatch,
    /// Where the packet goes to.
    pub destination: EntityMatch,
}

impl Rule {
    /// A rule that matches every packet.
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
