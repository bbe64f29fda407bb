//! The table as a value: chains with their rules, and named sets.
//!
//! Chains and sets are shared (`Arc`), so that a ruleset that differs from another in one chain is cheap to make and
//! cheap to compare.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::rule::Rule;
use super::set::{Set, Value};

/// Everything in one table of family `inet`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// Name of the table, which belongs to us alone.
    pub table: TableName,
    /// Chains by name.
    pub chains: BTreeMap<ChainName, Arc<Chain>>,
    /// Named sets and maps by name.
    pub sets: BTreeMap<SetName, Arc<Set>>,
}

/// A chain of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Chain {
    /// Where the kernel calls it; `None` for a chain that only rules and maps call.
    pub base: Option<Base>,
    /// Rules in order.
    pub rules: Vec<Rule>,
}

/// How a base chain is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Base {
    /// What it may do.
    pub kind: ChainType,
    /// Point in the packet's way.
    pub hook: Hook,
    /// Order among the chains of a hook, lowest first; -300 is `raw`, -150 `mangle`, -100 `dstnat`, 0 `filter`,
    /// 100 `srcnat`.
    pub priority: i32,
    /// Verdict on packets that no rule decides.
    pub policy: Policy,
}

/// Type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainType {
    /// Anything but translation.
    Filter,
    /// Translation; sees only the first packet of a connection.
    Nat,
    /// As filter on output, and the packet is routed anew when its mark changes.
    Route,
}

/// Hook of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Every packet that comes in, before routing.
    Prerouting,
    /// Packets to this host.
    Input,
    /// Packets passing through.
    Forward,
    /// Packets of this host.
    Output,
    /// Every packet that leaves, after routing.
    Postrouting,
}

/// Policy of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// Undecided packets pass.
    Accept,
    /// Undecided packets are dropped.
    Drop,
}

/// A name that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a name in nftables: 1 to 127 of A-Z a-z 0-9 _ . / -, a letter or one of _ . / first")]
pub struct NameError {
    /// The refused text.
    pub value: String,
}

macro_rules! names {
    ($($(#[$doc:meta])+ $name:ident;)*) => {$(
        $(#[$doc])+
        ///
        /// A word of nft's own grammar (`fwd`, `rt`, `ip`) is a name for the kernel but not for the program's text:
        /// keep a dash or a digit in names.
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name, if it is one.
            pub fn new(name: &str) -> Result<Self, NameError> {
                if is_name(name) { Ok(Self(name.into())) } else { Err(NameError { value: name.to_owned() }) }
            }

            /// The name as text.
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

/// Longest name taken; the kernel's own limit is 255, log lines are read by people.
const NAME_MAX: usize = 127;

fn is_name(name: &str) -> bool {
    let first = |byte: u8| byte.is_ascii_alphabetic() || matches!(byte, b'_' | b'.' | b'/');
    let rest = |byte: u8| first(byte) || byte.is_ascii_digit() || byte == b'-';
    name.len() <= NAME_MAX && name.bytes().next().is_some_and(first) && name.bytes().all(rest)
}

// --- Ruleset ---

impl Ruleset {
    /// A table with nothing in it.
    pub fn new(table: TableName) -> Self {
        Self { table, chains: BTreeMap::new(), sets: BTreeMap::new() }
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
    /// A chain that only rules and maps call.
    pub fn regular(rules: impl Into<Vec<Rule>>) -> Self {
        Self { base: None, rules: rules.into() }
    }

    /// A chain that the kernel calls.
    pub fn base(base: Base, rules: impl Into<Vec<Rule>>) -> Self {
        Self { base: Some(base), rules: rules.into() }
    }
}

impl Set {
    /// Chains that elements lead to.
    pub(super) fn targets(&self) -> impl Iterator<Item = &ChainName> {
        self.elements.values().filter_map(|value| match value {
            Value::Verdict(verdict) => verdict.target(),
            Value::Member | Value::Data(_) => None,
        })
    }
}

/// Raised whenever the same rule comes to be encoded differently, so that an upgraded agent rewrites its chains.
const ENCODING: u64 = 1;

impl Rule {
    /// A number that identifies the rule's meaning. It is kept as comment in the kernel, which is how a table found
    /// there is recognised without decoding its expressions.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = Fnv(0xcbf2_9ce4_8422_2325 ^ ENCODING);
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// The comment that carries the fingerprint.
    pub(super) fn comment(&self) -> String {
        format!("{:016x}", self.fingerprint())
    }
}

/// FNV-1a: the same in every build, unlike the standard library's hasher.
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
