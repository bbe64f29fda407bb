//! Validation of a ruleset before it is sent.
//!
//! The kernel says which operation it refuses, rarely why, and it accepts some mistakes.

use std::collections::BTreeSet;
use std::fmt;

use crate::rule::{
    Log, MarkSet, Match, Nat, NatTarget, Rule, Selector, SetRef, Statement, Verdict,
};
use crate::ruleset::{ChainName, Ruleset, SetName};
use crate::set::{CtState, Datum, Field, FieldType, Key, Set, SetKind, Value, ValueType};

/// An error in a ruleset: the kernel would refuse it, or accept something that can never match.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// A jump to a chain that does not exist.
    #[error("{place}: chain {target:?} does not exist")]
    UnknownChain {
        /// The rule or set with the verdict.
        place: String,
        /// The missing chain.
        target: ChainName,
    },
    /// A jump to a base chain.
    #[error("{place}: chain {target:?} is a base chain, which is no target of jump or goto")]
    JumpToBaseChain {
        /// The rule or set with the verdict.
        place: String,
        /// The base chain.
        target: ChainName,
    },
    /// Chains that jump to each other in a loop.
    #[error("chain {chain:?} jumps to itself, directly or through other chains")]
    JumpLoop {
        /// One chain of the loop.
        chain: ChainName,
    },
    /// A lookup in a set that does not exist.
    #[error("{place}: set {set:?} does not exist")]
    UnknownSet {
        /// The rule with the lookup.
        place: String,
        /// The missing set.
        set: SetName,
    },
    /// A lookup, comparison or element of the wrong types.
    #[error("{place}: expected {expected}, found {found}")]
    TypeMismatch {
        /// The rule or set.
        place: String,
        /// The expected types.
        expected: String,
        /// The types found.
        found: String,
    },
    /// A range in a set without `flags interval`.
    #[error("{place}: {key} is a range, but the set has no intervals")]
    RangeWithoutIntervals {
        /// The set.
        place: String,
        /// The element.
        key: Key,
    },
    /// A value that can never match, or that the kernel would cut off.
    #[error("{place}: {reason}")]
    Meaningless {
        /// The rule or set.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// Two elements of an interval set overlap.
    #[error("{place}: {first} and {second} overlap")]
    OverlappingElements {
        /// The set.
        place: String,
        /// The lower element.
        first: Key,
        /// The element that starts within the lower one.
        second: Key,
    },
}

impl Ruleset {
    /// Validates the ruleset: references, types, values and jump loops.
    ///
    /// Takes time proportional to the size of the table: call it in tests and before a full
    /// rewrite, not for each change.
    ///
    /// # Errors
    /// Everything that is wrong, each a bug in the program that built the ruleset.
    pub fn check(&self) -> Result<(), Vec<CheckError>> {
        let mut errors = Vec::new();
        for (name, set) in &self.sets {
            self.check_set(&format!("set {name}"), set, &mut errors);
        }
        for (name, chain) in &self.chains {
            for (index, rule) in chain.rules.iter().enumerate() {
                self.check_rule(&format!("chain {name}, rule {index}"), rule, &mut errors);
            }
        }
        if let Some(chain) = self.find_jump_loop() {
            errors.push(CheckError::JumpLoop { chain });
        }
        if errors.is_empty() {
            Ok(())
        } else {
            Err(errors)
        }
    }

    fn check_set(&self, place: &str, set: &Set, errors: &mut Vec<CheckError>) {
        for (key, value) in &set.elements {
            let types: Vec<FieldType> = key
                .fields()
                .iter()
                .map(|field| field.first().field_type())
                .collect();
            if types != set.kind.key {
                errors.push(type_mismatch(place, &set.kind.key, &types));
            }
            key.fields()
                .iter()
                .for_each(|field| check_field(place, field, errors));
            if !set.kind.interval && !key.is_single() {
                errors.push(CheckError::RangeWithoutIntervals {
                    place: place.to_owned(),
                    key: key.clone(),
                });
            }
            self.check_value(place, &set.kind.value, value, errors);
        }
        if set.kind.interval {
            let overlaps = overlaps(set).into_iter();
            errors.extend(
                overlaps.map(|(first, second)| CheckError::OverlappingElements {
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
        errors: &mut Vec<CheckError>,
    ) {
        match (expected, value) {
            (ValueType::Member, Value::Member) => {}
            (ValueType::Verdict, Value::Verdict(verdict)) => {
                self.check_verdict(place, verdict, errors)
            }
            (ValueType::Data(types), Value::Data(data))
                if types.iter().copied().eq(data.iter().map(Datum::field_type)) => {}
            _ => errors.push(type_mismatch(place, expected, value)),
        }
    }

    fn check_verdict(&self, place: &str, verdict: &Verdict, errors: &mut Vec<CheckError>) {
        let Some(target) = verdict.target() else {
            return;
        };
        let place = place.to_owned();
        let target = target.clone();
        match self.chains.get(&target) {
            None => errors.push(CheckError::UnknownChain { place, target }),
            Some(chain) if chain.base.is_some() => {
                errors.push(CheckError::JumpToBaseChain { place, target })
            }
            Some(_) => {}
        }
    }

    fn check_rule(&self, place: &str, rule: &Rule, errors: &mut Vec<CheckError>) {
        for statement in &rule.statements {
            if let Statement::Verdict(verdict) = statement {
                self.check_verdict(place, verdict, errors);
            }
            if let Some((key, set)) = statement.lookup() {
                self.check_lookup(place, statement, key, set, errors);
            }
            check_values(place, statement, errors);
        }
    }

    fn check_lookup(
        &self,
        place: &str,
        statement: &Statement,
        key: &[Selector],
        set: &SetRef,
        errors: &mut Vec<CheckError>,
    ) {
        let kind = match set {
            SetRef::Named(name) => match self.sets.get(name) {
                Some(set) => &set.kind,
                None => {
                    return errors.push(CheckError::UnknownSet {
                        place: place.to_owned(),
                        set: name.clone(),
                    });
                }
            },
            SetRef::Anonymous(set) => {
                self.check_set(place, set, errors);
                &set.kind
            }
        };
        let types: Vec<FieldType> = key.iter().map(Selector::field_type).collect();
        if types != kind.key {
            errors.push(type_mismatch(place, &types, &kind.key));
        }
        if !has_values_for(statement, kind) {
            errors.push(type_mismatch(place, statement, &kind.value));
        }
    }

    /// A chain of a jump loop, through rules and verdict maps alike.
    fn find_jump_loop(&self) -> Option<ChainName> {
        let mut finished = BTreeSet::new();
        self.chains
            .keys()
            .find_map(|name| self.find_jump_loop_from(name, &mut Vec::new(), &mut finished))
    }

    fn find_jump_loop_from<'a>(
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
        let targets = rules.iter().flat_map(|rule| self.jump_targets(rule));
        let found = targets
            .into_iter()
            .find_map(|target| self.find_jump_loop_from(target, path, finished));
        path.pop();
        finished.insert(name);
        found
    }

    /// The chains that a rule may jump or go to.
    fn jump_targets<'a>(&'a self, rule: &'a Rule) -> Vec<&'a ChainName> {
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
            targets.extend(map.into_iter().flat_map(Set::jump_targets));
        }
        targets
    }
}

/// Checks the constants in a statement.
fn check_values(place: &str, statement: &Statement, errors: &mut Vec<CheckError>) {
    match statement {
        Statement::Match(Match::Is(selector, _, field)) => {
            let found = field.first().field_type();
            if selector.field_type() != found {
                errors.push(type_mismatch(place, &selector.field_type(), &found));
            }
            check_field(place, field, errors);
        }
        Statement::Match(Match::NamePrefix(selector, ..))
            if selector.field_type() != FieldType::Iface =>
        {
            errors.push(type_mismatch(
                place,
                &FieldType::Iface,
                &selector.field_type(),
            ));
        }
        Statement::MarkSet(MarkSet { mask, value })
        | Statement::Match(Match::MarkBits { mask, value, .. })
            if value & !mask != 0 =>
        {
            errors.push(meaningless(
                place,
                format!("mark {value:#x} has bits outside its mask {mask:#x}"),
            ));
        }
        Statement::Log(Log { prefix, .. })
            if prefix.len() > LOG_PREFIX_MAX || prefix.contains(['"', '\n']) =>
        {
            errors.push(meaningless(
                place,
                format!(
                    "log prefix {prefix:?} is longer than {LOG_PREFIX_MAX} bytes, or has a quote \
                     or line break"
                ),
            ));
        }
        _ => {}
    }
}

/// Checks that a packet can match a field. The kernel compares bytes from left to right, so values
/// in host byte order have no ranges; and a packet has exactly one conntrack state, so a comparison
/// with several at once never matches.
fn check_field(place: &str, field: &Field, errors: &mut Vec<CheckError>) {
    let has_ranges = !matches!(
        field.first().field_type(),
        FieldType::Mark | FieldType::CtState | FieldType::Iface | FieldType::Family
    );
    if !has_ranges && !field.is_single() {
        errors.push(meaningless(
            place,
            format!("{field} is a range of a type that has no ranges"),
        ));
    }
    if let Datum::CtState(CtState(bits)) = field.first()
        && bits.count_ones() != 1
    {
        errors.push(meaningless(
            place,
            format!("a packet never has the states {field} at once"),
        ));
    }
}

fn meaningless(place: &str, reason: String) -> CheckError {
    CheckError::Meaningless {
        place: place.to_owned(),
        reason,
    }
}

/// Longest log prefix in bytes: `NF_LOG_PREFIXLEN` - 1 (`linux/netfilter/nf_log.h`).
const LOG_PREFIX_MAX: usize = 127;

/// Pairs of keys that overlap. Whether the kernel refuses them depends on the order in which they
/// are added.
fn overlaps(set: &Set) -> Vec<(&Key, &Key)> {
    let keys: Vec<&Key> = set.elements.keys().collect();
    let mut found = Vec::new();
    for (index, low) in keys.iter().enumerate() {
        // Keys are sorted by the start of their first field, so the rest cannot overlap.
        let last = low.fields()[0].last();
        let near = keys[index + 1..]
            .iter()
            .take_while(|high| high.fields()[0].first() <= last);
        found.extend(
            near.filter(|high| low.overlaps(high))
                .map(|high| (*low, *high)),
        );
    }
    found
}

/// Whether a set of this kind has the values that the statement needs.
fn has_values_for(statement: &Statement, kind: &SetKind) -> bool {
    match (statement, &kind.value) {
        (Statement::Match(_), value) => *value == ValueType::Member,
        (Statement::Vmap(..), value) => *value == ValueType::Verdict,
        (
            Statement::Nat(Nat {
                to: NatTarget::Map {
                    family, with_port, ..
                },
                ..
            }),
            ValueType::Data(types),
        ) => {
            let address = family.address_type();
            if *with_port {
                *types == [address, FieldType::Port]
            } else {
                *types == [address]
            }
        }
        _ => false,
    }
}

fn type_mismatch(
    place: &str,
    expected: &(impl fmt::Debug + ?Sized),
    found: &(impl fmt::Debug + ?Sized),
) -> CheckError {
    CheckError::TypeMismatch {
        place: place.to_owned(),
        expected: format!("{expected:?}"),
        found: format!("{found:?}"),
    }
}
