//! A table as a value: chains with their rules, and named sets.
//!
//! Chains and sets are behind `Arc`, so a ruleset that differs from another in one chain is cheap
//! to build and to compare.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use crate::rule::Rule;
use crate::set::{Set, Value};

/// The contents of one table of family `inet`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// Name of the table, which has no other owner.
    pub table: TableName,
    /// Chains by name.
    pub chains: BTreeMap<ChainName, Arc<Chain>>,
    /// Named sets and maps by name.
    pub sets: BTreeMap<SetName, Arc<Set>>,
}

/// A chain: an ordered list of rules, attached to a hook or not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Chain {
    /// The hook of a base chain; `None` for a regular chain, reached only by jump and goto.
    pub base: Option<Base>,
    /// Rules in order.
    pub rules: Vec<Rule>,
}

/// The attachment of a base chain: `type`, `hook`, `priority` and `policy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Base {
    /// Chain type.
    pub kind: ChainType,
    /// Netfilter hook.
    pub hook: Hook,
    /// Order among the chains of a hook, lowest first; -300 is `raw`, -150 `mangle`, -100 `dstnat`,
    /// 0 `filter`, 100 `srcnat`.
    pub priority: i32,
    /// Verdict on packets that reach the end of the chain.
    pub policy: ChainPolicy,
}

/// Type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainType {
    /// `filter`: everything except NAT.
    Filter,
    /// `nat`: sees only the first packet of a connection.
    Nat,
    /// `route`: like `filter` on output, and reroutes the packet if its mark changes.
    Route,
}

/// Netfilter hook of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Every incoming packet, before routing.
    Prerouting,
    /// Packets for this host.
    Input,
    /// Routed packets.
    Forward,
    /// Packets from this host.
    Output,
    /// Every outgoing packet, after routing.
    Postrouting,
}

/// Policy of a base chain: the verdict on packets that reach its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainPolicy {
    /// `policy accept`
    Accept,
    /// `policy drop`
    Drop,
}

/// A name that nftables would not accept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not a valid nftables name: 1 to 127 of A-Z a-z 0-9 _ . / -, starting with a \
     letter or _ . /"
)]
pub struct NameError {
    /// The rejected name.
    pub value: String,
}

macro_rules! names {
    ($($(#[$doc:meta])+ $name:ident;)*) => {$(
        $(#[$doc])+
        ///
        /// The kernel accepts keywords of nft's grammar (`fwd`, `rt`, `ip`) as names, but `nft -f`
        /// does not: put a dash or a digit in every name to keep the printed ruleset loadable.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Validates a name.
            ///
            /// # Errors
            /// If it is empty, longer than 127 bytes or has a character that nft does not accept.
            pub fn new(name: &str) -> Result<Self, NameError> {
                if is_name(name) {
                    Ok(Self(name.into()))
                } else {
                    Err(NameError { value: name.to_owned() })
                }
            }

            /// The name as a string slice.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    )*};
}

names! {
    /// Name of a table.
    TableName;
    /// Name of a chain.
    ChainName;
    /// Name of a set or map.
    SetName;
}

/// Longest accepted name, in bytes. The kernel allows 255 (`NFT_NAME_MAXLEN` - 1), which is
/// unreadable in a log line.
const NAME_MAX: usize = 127;

fn is_name(name: &str) -> bool {
    let first = |byte: u8| byte.is_ascii_alphabetic() || matches!(byte, b'_' | b'.' | b'/');
    let rest = |byte: u8| first(byte) || byte.is_ascii_digit() || byte == b'-';
    name.len() <= NAME_MAX && name.bytes().next().is_some_and(first) && name.bytes().all(rest)
}

// --- Ruleset ---

impl Ruleset {
    /// An empty table.
    pub fn new(table: TableName) -> Self {
        Self {
            table,
            chains: BTreeMap::new(),
            sets: BTreeMap::new(),
        }
    }

    /// Adds or replaces a chain.
    pub fn put_chain(&mut self, name: ChainName, chain: Chain) {
        self.chains.insert(name, Arc::new(chain));
    }

    /// Adds or replaces a set.
    pub fn put_set(&mut self, name: SetName, set: Set) {
        self.sets.insert(name, Arc::new(set));
    }
}

// --- Chain and Rule ---

impl Chain {
    /// A regular chain, reached only by jump and goto.
    pub fn regular(rules: impl Into<Vec<Rule>>) -> Self {
        Self {
            base: None,
            rules: rules.into(),
        }
    }

    /// A base chain.
    pub fn base(base: Base, rules: impl Into<Vec<Rule>>) -> Self {
        Self {
            base: Some(base),
            rules: rules.into(),
        }
    }
}

impl Set {
    /// The chains that the verdicts of the elements jump or go to.
    pub(crate) fn jump_targets(&self) -> impl Iterator<Item = &ChainName> {
        self.elements.values().filter_map(|value| match value {
            Value::Verdict(verdict) => verdict.target(),
            Value::Member | Value::Data(_) => None,
        })
    }
}

/// Version of the encoder, part of every fingerprint. Bump it whenever the same rule is encoded
/// differently, so that an upgraded program rewrites the chains that its predecessor left.
const ENCODING: u64 = 1;

impl Rule {
    /// A hash of the rule. The kernel keeps it as the rule's comment, so a rule read back is
    /// recognised without decoding its expressions.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = Fnv(0xcbf2_9ce4_8422_2325 ^ ENCODING);
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// The comment that carries the fingerprint.
    pub(crate) fn comment(&self) -> String {
        format!("{:016x}", self.fingerprint())
    }
}

/// FNV-1a, 64 bits. Stable across builds, which the standard library's hasher does not promise.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
