//! Import and export filters as `BGPFilter` has them.
//!
//! Rules are looked at in order, filter by filter; the first one that matches decides. A rule
//! matches if all that it names does. What no rule decides is for the caller.

use ipnet::IpNet;
pub use margay_api::bgp::{
    FilterAction, FilterRule, Filters, MatchOperator, PeerType, PrefixMatch, RouteOperation,
};

use crate::attributes::{Attributes, Family};

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

/// Changes a route.
pub fn apply(operation: &RouteOperation, attributes: &mut Attributes, priority: &mut u32) {
    match operation {
        RouteOperation::AddCommunity(community) => attributes.add_community(*community),
        RouteOperation::PrependAsPath(asns) => attributes.as_path.prepend(asns),
        RouteOperation::SetPriority(value) => *priority = *value,
    }
}

fn matches(rule: &FilterRule, route: &Candidate<'_>) -> bool {
    let interface = |pattern: &String| {
        route
            .interface
            .is_some_and(|name| is_name_like(pattern, name))
    };
    rule.prefix
        .as_ref()
        .is_none_or(|prefix| prefix.matches(route.net))
        && (!rule.from_peers || route.is_from_peer)
        && rule.interface.as_ref().is_none_or(interface)
        && rule.peer_type.is_none_or(|kind| kind == route.peer_type)
        && rule
            .community
            .is_none_or(|community| route.attributes.has_community(community))
        && route.attributes.as_path.starts_with(&rule.as_path_prefix)
        && rule
            .priority
            .is_none_or(|priority| priority == route.priority)
}

/// The action of the first rule that matches.
pub fn decide<'a>(filters: &'a Filters, route: &Candidate<'_>) -> Option<&'a FilterAction> {
    let rules = match Family::of(route.net) {
        Family::Ipv4 => &filters.ipv4,
        Family::Ipv6 => &filters.ipv6,
    };
    rules
        .iter()
        .find(|rule| matches(rule, route))
        .map(|rule| &rule.action)
}

/// A name is like a pattern with `*` and `?`. Takes time in the product of their lengths at most.
pub fn is_name_like(pattern: &str, name: &str) -> bool {
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
