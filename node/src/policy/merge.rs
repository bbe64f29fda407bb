//! Many rules that differ only in whom they are about become one rule about all of them.
//!
//! Between two rules that say otherwise, the order of rules that say the same does not matter. So within such a run, rules that demand the same of a
//! packet but for one set of addresses are joined into one rule over the union of their sets: a packet is looked up once and not once per policy.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_calc::model::{RuleRecord, SetId, SideMatch};

use super::names;
use super::rule::sets_of_side;
use crate::nft::Side;

/// Fewer sets than this are looked up one by one: a union costs memory, and an element more whenever a member comes or goes.
const WORTHWHILE: usize = 4;

/// What stands at a place in a tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// A rule of a policy.
    Rule(&'a RuleRecord),
    /// A rule that several were joined into.
    Joined(Box<RuleRecord>),
    /// A policy that is not there: nothing gets past this place.
    Closed,
}

/// What a set is to a union.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It is not there: a rule that names it denies.
    Missing,
    /// It is no set of addresses, or too large to be kept twice.
    Alone,
    /// It may be part of a union.
    Part,
}

/// Unions by id, with the sets that they are of.
pub(super) type Unions = BTreeMap<SetId, BTreeSet<SetId>>;

/// Everything that one side demands, but for its sets of addresses if they are what is joined.
type SideKey<'a> = (
    &'a [IpNet],
    &'a [IpNet],
    &'a [SetId],
    &'a [SetId],
    &'a [PortRange],
    &'a [SetId],
    &'a [PortRange],
    &'a [SetId],
    Option<&'a SetId>,
);

/// Everything that a rule demands, but for the set that is joined.
type RuleKey<'a> = (
    Option<Side>,
    Option<IpVersion>,
    Option<Protocol>,
    Option<Protocol>,
    Option<Icmp>,
    Option<Icmp>,
    SideKey<'a>,
    SideKey<'a>,
);

/// Joins what can be joined, and notes the unions that this takes.
pub(super) fn merge<'a>(items: &[Item<'a>], role: &impl Fn(&SetId) -> Role, unions: &mut Unions) -> Vec<Item<'a>> {
    let mut merged = Vec::new();
    let mut rest = items;
    while let Some(first) = rest.first() {
        let action = joinable(first, role);
        let length = match action {
            Some(_) => rest.iter().take_while(|item| joinable(item, role) == action).count(),
            None => 1,
        };
        let (run, after) = rest.split_at(length);
        if length > 1 {
            join(run, role, unions, &mut merged);
        } else {
            merged.extend_from_slice(run);
        }
        rest = after;
    }
    merged
}

/// What the item says, if its place among others that say the same does not matter.
fn joinable(item: &Item<'_>, role: &impl Fn(&SetId) -> Role) -> Option<Action> {
    let Item::Rule(rule) = item else { return None };
    let complete =
        [&rule.source, &rule.destination].into_iter().flat_map(sets_of_side).all(|id| role(id) != Role::Missing);
    (complete && rule.action != Action::Log).then_some(rule.action)
}

fn join<'a>(run: &[Item<'a>], role: &impl Fn(&SetId) -> Role, unions: &mut Unions, merged: &mut Vec<Item<'a>>) {
    let mut groups: BTreeMap<RuleKey<'_>, Vec<usize>> = BTreeMap::new();
    let rules: Vec<&'a RuleRecord> =
        run.iter().filter_map(|item| if let Item::Rule(rule) = item { Some(*rule) } else { None }).collect();
    for (index, rule) in rules.iter().enumerate() {
        groups.entry(key(rule, role)).or_default().push(index);
    }
    let mut places: BTreeMap<usize, Vec<Item<'a>>> = BTreeMap::new();
    for ((side, ..), members) in groups {
        let first = members[0];
        let Some(side) = side else {
            // The same rule more than once.
            places.insert(first, vec![Item::Rule(rules[first])]);
            continue;
        };
        let parts: BTreeSet<SetId> =
            members.iter().filter_map(|index| of(rules[*index], side).sets.first().cloned()).collect();
        if parts.len() < WORTHWHILE {
            let distinct =
                parts.iter().filter_map(|part| members.iter().find(|index| of(rules[**index], side).sets[0] == *part));
            places.insert(first, distinct.map(|index| Item::Rule(rules[*index])).collect());
            continue;
        }
        let id = union_id(&parts);
        let mut rule = Box::new(rules[first].clone());
        match side {
            Side::Source => rule.source.sets = vec![id.clone()],
            Side::Destination => rule.destination.sets = vec![id.clone()],
        }
        unions.insert(id, parts);
        places.insert(first, vec![Item::Joined(rule)]);
    }
    merged.extend(places.into_values().flatten());
}

/// Identity of a union: what it is of.
fn union_id(parts: &BTreeSet<SetId>) -> SetId {
    let text: String = parts.iter().flat_map(|part| [part.0.as_str(), "\n"]).collect();
    SetId(format!("u:{}", names::hash(text.as_bytes())))
}

/// Whether the id is of a union.
pub(super) fn is_union(id: &SetId) -> bool {
    id.0.starts_with("u:")
}

fn of(rule: &RuleRecord, side: Side) -> &SideMatch {
    match side {
        Side::Source => &rule.source,
        Side::Destination => &rule.destination,
    }
}

fn key<'a>(rule: &'a RuleRecord, role: &impl Fn(&SetId) -> Role) -> RuleKey<'a> {
    let one = |side: &SideMatch| matches!(side.sets.as_slice(), [set] if role(set) == Role::Part);
    let joined = if one(&rule.source) {
        Some(Side::Source)
    } else if one(&rule.destination) {
        Some(Side::Destination)
    } else {
        None
    };
    let side = |which| side_key(of(rule, which), joined == Some(which));
    (
        joined,
        rule.ip_version,
        rule.protocol,
        rule.not_protocol,
        rule.icmp,
        rule.not_icmp,
        side(Side::Source),
        side(Side::Destination),
    )
}

fn side_key(side: &SideMatch, joined: bool) -> SideKey<'_> {
    let sets = if joined { &[] } else { side.sets.as_slice() };
    (
        &side.nets,
        &side.not_nets,
        sets,
        &side.not_sets,
        &side.ports,
        &side.port_sets,
        &side.not_ports,
        &side.not_port_sets,
        side.service_set.as_ref(),
    )
}
