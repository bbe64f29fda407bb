//! Rules of `BGPFilter`.

use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::CommunityValue;

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

impl Filters {
    /// There is no rule.
    pub fn is_empty(&self) -> bool {
        self.ipv4.is_empty() && self.ipv6.is_empty()
    }
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
    ) -> Result<Self, InvalidFilterRule> {
        let longest = cidr.max_prefix_len();
        let (from, to) = (min.unwrap_or(cidr.prefix_len()), max.unwrap_or(longest));
        if to > longest || from > to {
            return Err(InvalidFilterRule {
                field: "prefixLength",
                value: format!("{from} to {to}"),
                rule: "not a range of lengths of this family",
                remedy: "leave it out for any length",
            });
        }
        Ok(Self {
            cidr: cidr.trunc(),
            operator,
            min: from,
            max: to,
        })
    }

    /// The compared range.
    pub fn cidr(&self) -> IpNet {
        self.cidr
    }

    /// How it is compared.
    pub fn operator(&self) -> MatchOperator {
        self.operator
    }

    /// Lengths of the prefixes that match.
    pub fn lengths(&self) -> RangeInclusive<u8> {
        self.min..=self.max
    }

    /// The prefix of a route is one that is meant.
    pub fn matches(&self, net: &IpNet) -> bool {
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
    Accept(Vec<RouteOperation>),
}

/// Change of a route.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum RouteOperation {
    /// `addCommunity`.
    AddCommunity(CommunityValue),
    /// `prependASPath`.
    PrependAsPath(Vec<u32>),
    /// `setPriority`: the metric in the kernel; it is not sent to peers.
    SetPriority(u32),
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
    pub fn validate(&self) -> Result<(), InvalidFilterRule> {
        if let Some(name) = self
            .interface
            .as_ref()
            .filter(|name| name.len() > MAX_INTERFACE)
        {
            return Err(invalid(
                "interface",
                name,
                "more than 15 characters",
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
                "more than 10 entries",
                "use fewer",
            ));
        }
        for operation in operations {
            if let RouteOperation::PrependAsPath(asns) = operation
                && !(1..=MAX_PREPEND).contains(&asns.len())
            {
                let found = asns.len();
                return Err(invalid(
                    "prependASPath",
                    found,
                    "not 1 to 10 numbers",
                    "use fewer",
                ));
            }
        }
        Ok(())
    }
}

/// What a rule must not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?}: {rule}; {remedy}")]
pub struct InvalidFilterRule {
    /// Name of the field.
    pub field: &'static str,
    /// What it has.
    pub value: String,
    /// The violated rule, as a phrase that follows the value.
    pub rule: &'static str,
    /// What helps.
    pub remedy: &'static str,
}

fn invalid(
    field: &'static str,
    value: impl std::fmt::Display,
    rule: &'static str,
    remedy: &'static str,
) -> InvalidFilterRule {
    InvalidFilterRule {
        field,
        value: value.to_string(),
        rule,
        remedy,
    }
}
