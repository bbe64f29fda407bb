//! BGP as users configure it, parsed: communities, filters, peers and settings.

mod filter;
mod peer;

pub use filter::{
    FilterAction, FilterRule, Filters, InvalidFilterRule, MAX_INTERFACE, MAX_OPERATIONS,
    MAX_PREPEND, MatchOperator, PeerType, PrefixMatch, RouteOperation,
};
pub use peer::{
    BgpFilter, BgpNextHopMode, BgpPeer, BgpSettings, DEFAULT_NAME, NamedPrefixes, NodePeers,
    PeerTarget, SecretKey, settings_node,
};

use std::fmt;
use std::str::FromStr;

/// What to write for an AS number.
pub(crate) const ASN_REMEDY: &str = "use 1 to 4294967294, or the form 1.10";

/// Parses an AS number: a decimal number, or `1.10` for 65546 (RFC 5396: asdot). Zero and the last
/// one name no system (RFC 7607, RFC 7300).
pub fn parse_asn(text: &str) -> Option<u32> {
    let part = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u32>().ok().filter(|_| is_number)
    };
    let number = match text.split_once('.') {
        None => part(text)?,
        Some((high, low)) => {
            let (high, low) = (part(high)?, part(low)?);
            let is_short = high <= 0xffff && low <= 0xffff;
            is_short.then_some(high << 16 | low)?
        }
    };
    is_asn(number).then_some(number)
}

/// Returns true if the number names an autonomous system.
pub(crate) const fn is_asn(number: u32) -> bool {
    number != 0 && number != u32::MAX
}

/// Community of RFC 1997, written as `aa:nn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Community(pub u32);

impl fmt::Display for Community {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// Large community of RFC 8092, written as `aa:nn:mm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LargeCommunity(pub [u32; 3]);

impl fmt::Display for LargeCommunity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.0[0], self.0[1], self.0[2])
    }
}

/// A community as BGPConfiguration and BGPFilter have it: `aa:nn` or `aa:nn:mm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CommunityValue {
    /// Two numbers of 16 bits.
    Standard(Community),
    /// Three numbers of 32 bits.
    Large(LargeCommunity),
}

/// Text that is no community.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "community {0:?} is neither aa:nn of 0 to 65535 nor aa:nn:mm of 0 to 4294967295; write \
     64512:100"
)]
pub struct InvalidCommunity(pub String);

impl FromStr for CommunityValue {
    type Err = InvalidCommunity;

    fn from_str(text: &str) -> Result<Self, InvalidCommunity> {
        let error = || InvalidCommunity(text.chars().take(40).collect());
        // `u32::from_str` would take a plus sign.
        let is_number =
            |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let number = |part: &str| {
            if is_number(part) {
                part.parse().ok()
            } else {
                None
            }
        };
        let parts: Option<Vec<u32>> = text.split(':').map(number).collect();
        match parts.as_deref() {
            Some([high, low]) if *high <= 0xffff && *low <= 0xffff => {
                Ok(Self::Standard(Community(high << 16 | low)))
            }
            Some([a, b, c]) => Ok(Self::Large(LargeCommunity([*a, *b, *c]))),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for CommunityValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standard(community) => community.fmt(f),
            Self::Large(community) => community.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn communities_are_read_as_calico_writes_them() {
        let rows = [
            ("64512:100", Some("64512:100")),
            ("0:0", Some("0:0")),
            ("65535:65535", Some("65535:65535")),
            ("65536:1", None),
            ("1:65536", None),
            ("4294967295:1:2", Some("4294967295:1:2")),
            ("4294967296:1:2", None),
            ("1", None),
            ("1:2:3:4", None),
            ("+1:2", None),
            (" 1:2", None),
            ("1:", None),
            ("", None),
        ];
        for (text, expected) in rows {
            let found = text
                .parse::<CommunityValue>()
                .ok()
                .map(|value| value.to_string());
            assert_eq!(found.as_deref(), expected, "{text}");
        }
    }
}
