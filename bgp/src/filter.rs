//! Import and export filters as `BGPFilter` has them.
//!
//! Rules are looked at in order, filter by filter; the first one that matches decides. A rule
//! matches if all that it names does. What no rule decides is for the caller.

use ipnet::IpNet;

use crate::attributes::{Attributes, CommunityValue, Family};
use crate::error::{ConfigError, invalid};

/// Most operations of a rule (`BGPFilter`).
pub const MAX_OPERATIONS: usize = 10;
/// Most AS numbers that one operation puts in front (`BGPFilter`).
pub const MAX_PREPEND: usize = 10;
/// Longest pattern of an interface's name (`BGPFilter`; IFNAMSIZ less one).
pub const MAX_INTERFACE: usize = 15;

/// The filters of one direction of a peer, in order, by family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filters {
    /// Rules for IPv4 (`importV4`, `exportV4`).
    pub ipv4: Vec<FilterRule>,
    /// Rules for IPv6 (`importV6`, `exportV6`).
    pub ipv6: Vec<FilterRule>,
}

/// How a prefix is compared (`matchOperator`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatchOperator {
    /// The same prefix.
    Equal,
    /// Another prefix.
    NotEqual,
    /// The same or one inside.
    In,
    /// Neither the same nor inside.
    NotIn,
}

/// Match of a route's prefix (`cidr`, `matchOperator`, `prefixLength`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixMatch {
    cidr: IpNet,
    operator: MatchOperator,
    min: u8,
    max: u8,
}

impl PrefixMatch {
    /// A match; lengths that are not given are those of the prefix and of an address.
    ///
    /// # Errors
    ///
    /// Lengths that are no range of the family's.
    pub fn new(
        cidr: IpNet,
        operator: MatchOperator,
        min: Option<u8>,
        max: Option<u8>,
    ) -> Result<Self, ConfigError> {
        let longest = cidr.max_prefix_len();
        let (from, to) = (min.unwrap_or(cidr.prefix_len()), max.unwrap_or(longest));
        if to > longest || from > to {
            let rule = "is a range from min to max up to the length of an address";
            let found = format!("{from} to {to}");
            return Err(invalid(
                "prefixLength",
                found,
                rule,
                "leave it out for any length",
            ));
        }
        Ok(Self {
            cidr: cidr.trunc(),
            operator,
            min: from,
            max: to,
        })
    }

    fn matches(&self, net: &IpNet) -> bool {
        let is_long_enough = (self.min..=self.max).contains(&net.prefix_len());
        match self.operator {
            MatchOperator::Equal => *net == self.cidr && is_long_enough,
            MatchOperator::NotEqual => *net != self.cidr || !is_long_enough,
            MatchOperator::In => self.cidr.contains(net) && is_long_enough,
            MatchOperator::NotIn => !self.cidr.contains(net) || !is_long_enough,
        }
    }
}

/// What kind of session a rule is for (`peerType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerType {
    /// With another autonomous system.
    External,
    /// Within ours.
    Internal,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterRule {
    /// Prefix.
    pub prefix: Option<PrefixMatch>,
    /// Only routes that a peer sent (`source: RemotePeers`).
    pub from_peers: bool,
    /// Name of the route's interface, where `*` stands for any text and `?` for one character.
    pub interface: Option<String>,
    /// Kind of the session that is filtered.
    pub peer_type: Option<PeerType>,
    /// A community that the route has.
    pub community: Option<CommunityValue>,
    /// Numbers that the route's AS path begins with.
    pub as_path_prefix: Vec<u32>,
    /// Kernel metric of the route.
    pub priority: Option<u32>,
    /// What happens to it.
    pub action: FilterAction,
}

/// What a rule does with the routes that it matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FilterAction {
    /// It does not pass.
    Reject,
    /// It passes after these changes.
    Accept(Vec<Operation>),
}

/// Change of a route.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// `addCommunity`.
    AddCommunity(CommunityValue),
    /// `prependASPath`.
    PrependAsPath(Vec<u32>),
    /// `setPriority`: the metric in the kernel; it is not sent to peers.
    SetPriority(u32),
}

impl Operation {
    /// Changes a route.
    pub fn apply(&self, attributes: &mut Attributes, priority: &mut u32) {
        match self {
            Self::AddCommunity(community) => attributes.add_community(*community),
            Self::PrependAsPath(asns) => attributes.as_path.prepend(asns),
            Self::SetPriority(value) => *priority = *value,
        }
    }
}

/// A route that a filter is asked about.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Its prefix.
    pub net: &'a IpNet,
    /// Its attributes.
    pub attributes: &'a Attributes,
    /// A peer sent it.
    pub is_from_peer: bool,
    /// The interface that it leads to, if that is known.
    pub interface: Option<&'a str>,
    /// Kind of the session that is filtered.
    pub peer_type: PeerType,
    /// Its metric in the kernel.
    pub priority: u32,
}

impl FilterRule {
    /// A rule that matches every route.
    pub fn new(action: FilterAction) -> Self {
        Self {
            prefix: None,
            from_peers: false,
            interface: None,
            peer_type: None,
            community: None,
            as_path_prefix: Vec::new(),
            priority: None,
            action,
        }
    }

    /// # Errors
    ///
    /// More than `BGPFilter` lets a rule have.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(name) = self
            .interface
            .as_ref()
            .filter(|name| name.len() > MAX_INTERFACE)
        {
            return Err(invalid(
                "interface",
                name,
                "has at most 15 characters",
                "use * for the rest",
            ));
        }
        let FilterAction::Accept(operations) = &self.action else {
            return Ok(());
        };
        if operations.len() > MAX_OPERATIONS {
            let found = operations.len();
            return Err(invalid(
                "operations",
                found,
                "has at most 10 entries",
                "use fewer",
            ));
        }
        for operation in operations {
            if let Operation::PrependAsPath(asns) = operation
                && !(1..=MAX_PREPEND).contains(&asns.len())
            {
                let found = asns.len();
                return Err(invalid(
                    "prependASPath",
                    found,
                    "has 1 to 10 numbers",
                    "use fewer",
                ));
            }
        }
        Ok(())
    }

    fn matches(&self, route: &Candidate<'_>) -> bool {
        let interface =
            |pattern: &String| route.interface.is_some_and(|name| is_like(pattern, name));
        self.prefix
            .as_ref()
            .is_none_or(|prefix| prefix.matches(route.net))
            && (!self.from_peers || route.is_from_peer)
            && self.interface.as_ref().is_none_or(interface)
            && self.peer_type.is_none_or(|kind| kind == route.peer_type)
            && self
                .community
                .is_none_or(|community| route.attributes.has_community(community))
            && route.attributes.as_path.starts_with(&self.as_path_prefix)
            && self
                .priority
                .is_none_or(|priority| priority == route.priority)
    }
}

impl Filters {
    /// The action of the first rule that matches.
    pub fn decide(&self, route: &Candidate<'_>) -> Option<&FilterAction> {
        let rules = match Family::of(route.net) {
            Family::Ipv4 => &self.ipv4,
            Family::Ipv6 => &self.ipv6,
        };
        rules
            .iter()
            .find(|rule| rule.matches(route))
            .map(|rule| &rule.action)
    }

    /// There is no rule.
    pub fn is_empty(&self) -> bool {
        self.ipv4.is_empty() && self.ipv6.is_empty()
    }
}

/// A name is like a pattern with `*` and `?`. Takes time in the product of their lengths at most.
fn is_like(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || *byte == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                // The star takes one more.
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests;
