//! The table as a value: chains with their rules, and named sets.
//!
//! Chains and sets are shared (`Arc`), so that a ruleset that differs from another in one chain is cheap to make and
//! cheap to compare.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::rule::{Match, NatTarget, Rule, SetRef, Statement, Verdict};
use super::rule::{Nat, Selector};
use super::set::{Datum, FieldType, Key, Set, SetKind, Value, ValueType};

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
#[error(
    "{value:?} is not a name in nftables: 1 to 127 of A-Z a-z 0-9 _ . / -, a letter or one of _ . / first"
)]
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

/// Something that the kernel would refuse, or that cannot mean what it says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A verdict leads nowhere.
    #[error("{place}: chain {target:?} does not exist")]
    UnknownChain {
        /// Where the verdict stands.
        place: String,
        /// The missing chain.
        target: ChainName,
    },
    /// A verdict leads to a base chain.
    #[error("{place}: chain {target:?} is attached to a hook and cannot be called")]
    CallOfBase {
        /// Where the verdict stands.
        place: String,
        /// The base chain.
        target: ChainName,
    },
    /// Chains call each other in a circle.
    #[error("chain {chain:?} calls itself")]
    Loop {
        /// One chain of the circle.
        chain: ChainName,
    },
    /// A rule looks into a set that is not there.
    #[error("{place}: set {set:?} does not exist")]
    UnknownSet {
        /// Where the lookup stands.
        place: String,
        /// The missing set.
        set: SetName,
    },
    /// A lookup, a comparison or an element has the wrong types.
    #[error("{place}: {found} where {expected} is expected")]
    WrongType {
        /// Where it stands.
        place: String,
        /// What the place needs.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A range in a set without intervals.
    #[error("{place}: {key:?} is a range, but the set holds single values only")]
    RangeInPlainSet {
        /// The set.
        place: String,
        /// The element.
        key: Key,
    },
    /// Two elements of an interval set share a value.
    #[error("{place}: {first:?} and {second:?} overlap")]
    Overlap {
        /// The set.
        place: String,
        /// The lower element.
        first: Key,
        /// The element that begins within the lower one.
        second: Key,
    },
}

// --- Ruleset ---

impl Ruleset {
    /// A table with nothing in it.
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

    /// Every reason why the kernel would refuse this table, most of them bugs of whoever made it.
    ///
    /// Costs time in proportion to the whole table: for tests and for a full rewrite, not for each change.
    pub fn check(&self) -> Result<(), Vec<Fault>> {
        let mut faults = Vec::new();
        for (name, set) in &self.sets {
            self.check_set(&format!("set {name}"), set, &mut faults);
        }
        for (name, chain) in &self.chains {
            for (index, rule) in chain.rules.iter().enumerate() {
                self.check_rule(&format!("chain {name}, rule {index}"), rule, &mut faults);
            }
        }
        if let Some(chain) = self.find_loop() {
            faults.push(Fault::Loop { chain });
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(faults)
        }
    }

    fn check_set(&self, place: &str, set: &Set, faults: &mut Vec<Fault>) {
        for (key, value) in &set.elements {
            let types: Vec<FieldType> = key
                .fields()
                .iter()
                .map(|field| field.first().field_type())
                .collect();
            if types != set.kind.key {
                faults.push(wrong_type(place, &set.kind.key, &types));
            }
            if !set.kind.interval && !key.is_single() {
                faults.push(Fault::RangeInPlainSet {
                    place: place.to_owned(),
                    key: key.clone(),
                });
            }
            self.check_value(place, &set.kind.value, value, faults);
        }
        if set.kind.interval && set.kind.key.len() == 1 {
            let pairs = set.elements.keys().zip(set.elements.keys().skip(1));
            faults.extend(
                pairs
                    .filter(|(low, high)| low.fields()[0].last() >= high.fields()[0].first())
                    .map(|(first, second)| Fault::Overlap {
                        place: place.to_owned(),
                        first: first.clone(),
                        second: second.clone(),
                    }),
            );
        }
    }

    fn check_value(
        &self,
        place: &str,
        expected: &ValueType,
        value: &Value,
        faults: &mut Vec<Fault>,
    ) {
        match (expected, value) {
            (ValueType::Member, Value::Member) => {}
            (ValueType::Verdict, Value::Verdict(verdict)) => {
                self.check_verdict(place, verdict, faults)
            }
            (ValueType::Data(types), Value::Data(data))
                if types.iter().copied().eq(data.iter().map(Datum::field_type)) => {}
            _ => faults.push(wrong_type(place, expected, value)),
        }
    }

    fn check_verdict(&self, place: &str, verdict: &Verdict, faults: &mut Vec<Fault>) {
        let Some(target) = verdict.target() else {
            return;
        };
        let place = place.to_owned();
        let target = target.clone();
        match self.chains.get(&target) {
            None => faults.push(Fault::UnknownChain { place, target }),
            Some(chain) if chain.base.is_some() => faults.push(Fault::CallOfBase { place, target }),
            Some(_) => {}
        }
    }

    fn check_rule(&self, place: &str, rule: &Rule, faults: &mut Vec<Fault>) {
        for statement in &rule.statements {
            match statement {
                Statement::Verdict(verdict) => self.check_verdict(place, verdict, faults),
                Statement::Match(Match::Is(selector, _, field)) => {
                    let found = field.first().field_type();
                    if selector.field_type() != found {
                        faults.push(wrong_type(place, &selector.field_type(), &found));
                    }
                }
                Statement::Match(Match::NamePrefix(selector, ..))
                    if selector.field_type() != FieldType::Iface =>
                {
                    faults.push(wrong_type(place, &FieldType::Iface, &selector.field_type()));
                }
                _ => {}
            }
            if let Some((key, set)) = statement.lookup() {
                self.check_lookup(place, statement, key, set, faults);
            }
        }
    }

    fn check_lookup(
        &self,
        place: &str,
        statement: &Statement,
        key: &[Selector],
        set: &SetRef,
        faults: &mut Vec<Fault>,
    ) {
        let kind = match set {
            SetRef::Named(name) => match self.sets.get(name) {
                Some(set) => &set.kind,
                None => {
                    return faults.push(Fault::UnknownSet {
                        place: place.to_owned(),
                        set: name.clone(),
                    });
                }
            },
            SetRef::Anonymous(set) => {
                self.check_set(place, set, faults);
                &set.kind
            }
        };
        let types: Vec<FieldType> = key.iter().map(Selector::field_type).collect();
        if types != kind.key {
            faults.push(wrong_type(place, &types, &kind.key));
        }
        if !yields(statement, kind) {
            faults.push(wrong_type(place, statement, &kind.value));
        }
    }

    /// A chain on a circle of calls, through rules and maps alike.
    fn find_loop(&self) -> Option<ChainName> {
        let mut finished = BTreeSet::new();
        self.chains
            .keys()
            .find_map(|name| self.walk_calls(name, &mut Vec::new(), &mut finished))
    }

    fn walk_calls<'a>(
        &'a self,
        name: &'a ChainName,
        path: &mut Vec<&'a ChainName>,
        finished: &mut BTreeSet<&'a ChainName>,
    ) -> Option<ChainName> {
        if path.contains(&name) {
            return Some(name.clone());
        }
        if finished.contains(name) {
            return None;
        }
        path.push(name);
        let rules = self
            .chains
            .get(name)
            .map(|chain| chain.rules.as_slice())
            .unwrap_or_default();
        let targets = rules.iter().flat_map(|rule| self.targets(rule));
        let found = targets
            .into_iter()
            .find_map(|target| self.walk_calls(target, path, finished));
        path.pop();
        finished.insert(name);
        found
    }

    /// Chains that a rule may lead to.
    fn targets<'a>(&'a self, rule: &'a Rule) -> Vec<&'a ChainName> {
        let mut targets = Vec::new();
        for statement in &rule.statements {
            if let Statement::Verdict(verdict) = statement {
                targets.extend(verdict.target());
            }
            let map = match statement {
                Statement::Vmap(_, SetRef::Named(name)) => self.sets.get(name).map(AsRef::as_ref),
                Statement::Vmap(_, SetRef::Anonymous(set)) => Some(set.as_ref()),
                _ => None,
            };
            targets.extend(map.into_iter().flat_map(Set::targets));
        }
        targets
    }
}

/// Whether a set of this kind gives what the statement needs.
fn yields(statement: &Statement, kind: &SetKind) -> bool {
    match (statement, &kind.value) {
        (Statement::Match(_), value) => *value == ValueType::Member,
        (Statement::Vmap(..), value) => *value == ValueType::Verdict,
        (Statement::Nat(Nat { to: NatTarget::Map { family, with_port, .. }, .. }), ValueType::Data(types)) => {
            let address = family.address_type();
            if *with_port { *types == [address, FieldType::Port] } else { *types == [address] }
        }
        _ => false,
    }
}

fn wrong_type(
    place: &str,
    expected: &(impl fmt::Debug + ?Sized),
    found: &(impl fmt::Debug + ?Sized),
) -> Fault {
    Fault::WrongType {
        place: place.to_owned(),
        expected: format!("{expected:?}"),
        found: format!("{found:?}"),
    }
}

// --- Chain and Rule ---

impl Chain {
    /// A chain that only rules and maps call.
    pub fn regular(rules: impl Into<Vec<Rule>>) -> Self {
        Self {
            base: None,
            rules: rules.into(),
        }
    }

    /// A chain that the kernel calls.
    pub fn base(base: Base, rules: impl Into<Vec<Rule>>) -> Self {
        Self {
            base: Some(base),
            rules: rules.into(),
        }
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
