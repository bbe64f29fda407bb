//! Finding what is wrong with a ruleset before the kernel does.
//!
//! The kernel names the operation it refuses, not the reason; and some mistakes it accepts.

use std::collections::BTreeSet;
use std::fmt;

use super::rule::{Log, MarkSet, Match, Nat, NatTarget, Rule, Selector, SetRef, Statement, Verdict};
use super::ruleset::{ChainName, Ruleset, SetName};
use super::set::{CtState, Datum, Field, FieldType, Key, Set, SetKind, Value, ValueType};

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
    #[error("{place}: {key} is a range, but the set holds single values only")]
    RangeInPlainSet {
        /// The set.
        place: String,
        /// The element.
        key: Key,
    },
    /// Something that has no meaning, or never the one it seems to have.
    #[error("{place}: {what}")]
    Senseless {
        /// Where it stands.
        place: String,
        /// What is wrong with it.
        what: String,
    },
    /// Two elements of an interval set share a value.
    #[error("{place}: {first} and {second} overlap")]
    Overlap {
        /// The set.
        place: String,
        /// The lower element.
        first: Key,
        /// The element that begins within the lower one.
        second: Key,
    },
}

impl Ruleset {
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
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn check_set(&self, place: &str, set: &Set, faults: &mut Vec<Fault>) {
        for (key, value) in &set.elements {
            let types: Vec<FieldType> = key.fields().iter().map(|field| field.first().field_type()).collect();
            if types != set.kind.key {
                faults.push(wrong_type(place, &set.kind.key, &types));
            }
            key.fields().iter().for_each(|field| check_field(place, field, faults));
            if !set.kind.interval && !key.is_single() {
                faults.push(Fault::RangeInPlainSet { place: place.to_owned(), key: key.clone() });
            }
            self.check_value(place, &set.kind.value, value, faults);
        }
        if set.kind.interval {
            let overlaps = overlaps(set).into_iter();
            faults.extend(overlaps.map(|(first, second)| Fault::Overlap {
                place: place.to_owned(),
                first: first.clone(),
                second: second.clone(),
            }));
        }
    }

    fn check_value(&self, place: &str, expected: &ValueType, value: &Value, faults: &mut Vec<Fault>) {
        match (expected, value) {
            (ValueType::Member, Value::Member) => {}
            (ValueType::Verdict, Value::Verdict(verdict)) => self.check_verdict(place, verdict, faults),
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
            if let Statement::Verdict(verdict) = statement {
                self.check_verdict(place, verdict, faults);
            }
            if let Some((key, set)) = statement.lookup() {
                self.check_lookup(place, statement, key, set, faults);
            }
            check_values(place, statement, faults);
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
                    return faults.push(Fault::UnknownSet { place: place.to_owned(), set: name.clone() });
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
        self.chains.keys().find_map(|name| self.walk_calls(name, &mut Vec::new(), &mut finished))
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
        let rules = self.chains.get(name).map(|chain| chain.rules.as_slice()).unwrap_or_default();
        let targets = rules.iter().flat_map(|rule| self.targets(rule));
        let found = targets.into_iter().find_map(|target| self.walk_calls(target, path, finished));
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

/// Checks the values written in a statement.
fn check_values(place: &str, statement: &Statement, faults: &mut Vec<Fault>) {
    match statement {
        Statement::Match(Match::Is(selector, _, field)) => {
            let found = field.first().field_type();
            if selector.field_type() != found {
                faults.push(wrong_type(place, &selector.field_type(), &found));
            }
            check_field(place, field, faults);
        }
        Statement::Match(Match::NamePrefix(selector, ..)) if selector.field_type() != FieldType::Iface => {
            faults.push(wrong_type(place, &FieldType::Iface, &selector.field_type()));
        }
        Statement::MarkSet(MarkSet { mask, value }) | Statement::Match(Match::MarkBits { mask, value, .. })
            if value & !mask != 0 =>
        {
            faults.push(senseless(place, format!("mark {value:#x} has bits outside of its mask {mask:#x}")));
        }
        Statement::Log(Log { prefix, .. }) if prefix.len() > LOG_PREFIX_MAX || prefix.contains(['"', '\n']) => {
            faults.push(senseless(place, format!("log prefix {prefix:?} is longer than {LOG_PREFIX_MAX} or quoted")));
        }
        _ => {}
    }
}

/// Checks that a field can be met by a packet: types in the order of the host have no ranges, and a packet has one
/// state, which a comparison or a map compares as a whole.
fn check_field(place: &str, field: &Field, faults: &mut Vec<Fault>) {
    let ordered = !matches!(
        field.first().field_type(),
        FieldType::Mark | FieldType::CtState | FieldType::Iface | FieldType::Family
    );
    if !ordered && !field.is_single() {
        faults.push(senseless(place, format!("{field} is a range of a type without an order")));
    }
    if let Datum::CtState(CtState(bits)) = field.first()
        && bits.count_ones() != 1
    {
        faults.push(senseless(place, format!("a packet is never in the states {field} at once")));
    }
}

fn senseless(place: &str, what: String) -> Fault {
    Fault::Senseless { place: place.to_owned(), what }
}

/// Longest prefix of a log message, in bytes, that the kernel keeps.
const LOG_PREFIX_MAX: usize = 127;

/// Pairs of keys that share a value: what the kernel refuses, depending on the order in which they come.
fn overlaps(set: &Set) -> Vec<(&Key, &Key)> {
    let keys: Vec<&Key> = set.elements.keys().collect();
    let mut found = Vec::new();
    for (index, low) in keys.iter().enumerate() {
        // Keys are in the order of where their first field begins.
        let last = low.fields()[0].last();
        let near = keys[index + 1..].iter().take_while(|high| high.fields()[0].first() <= last);
        found.extend(near.filter(|high| low.overlaps(high)).map(|high| (*low, *high)));
    }
    found
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

fn wrong_type(place: &str, expected: &(impl fmt::Debug + ?Sized), found: &(impl fmt::Debug + ?Sized)) -> Fault {
    Fault::WrongType { place: place.to_owned(), expected: format!("{expected:?}"), found: format!("{found:?}") }
}
