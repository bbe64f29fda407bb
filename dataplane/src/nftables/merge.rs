//! Many rules that differ little become one lookup.
//!
//! Between two rules that say otherwise, the order of rules that say the same does not matter. So
//! within such a run, rules that demand the same of a packet but for
//!
//! 1. the destination's ports, demand any of them all;
//! 2. the ranges of one side, demand any of them all;
//! 3. one set of addresses, demand an address of the union of their sets;
//! 4. one set of addresses and the ports, demand an address together with a port of a union that
//!    holds each set's addresses with its ports.
//!
//! A packet is looked up once and not once per policy. A union of many sets is kept in pieces, so
//! that a policy more or less changes one of them. What is joined keeps references to the rules
//! that it comes from.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_calc::model::{RuleRecord, SetId, SideMatch};

use super::names;
use super::origin::RuleRef;
use super::rule::{Origin, sets_of_side};
use margay_nft::Side;

/// Fewer lookups than this are done one by one: a union costs memory, and an element more whenever
/// a member comes or goes.
const WORTHWHILE: usize = 4;
/// Sets in one piece of a union, on average, before it is split in two.
const PIECE: usize = 64;
/// Ports that each address of a set is kept with, at most.
const PORTS: usize = 16;

/// What stands at a place in a tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// A rule of a policy.
    Rule(&'a RuleRecord),
    /// A rule of a policy that reports, and so is like no other.
    Report(&'a RuleRecord, Origin<'a>),
    /// A rule that several were joined into.
    Joined(Box<RuleRecord>),
    /// The same, which also demands that the address of a side together with the protocol and the
    /// destination's port is in a union.
    Crossed(Box<RuleRecord>, Side, SetId),
    /// A policy that is not there: nothing gets past this place.
    Closed,
}

/// Item with the rules of policies that it comes from, in order: each rule of a tier is in one
/// item's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Traced<'a> {
    pub(super) item: Item<'a>,
    pub(super) origins: Vec<RuleRef>,
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
    /// The same, and it holds single addresses only, so that they can be kept with ports.
    Exact,
}

/// What a union is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parts {
    /// The addresses of these sets.
    Addresses(BTreeSet<SetId>),
    /// The addresses of these sets, each with the ports that go with its set.
    Ports(BTreeMap<SetId, BTreeSet<(Protocol, u16)>>),
}

/// Unions by id, with what they are of.
pub(super) type Unions = BTreeMap<SetId, Parts>;

/// What two rules may differ in and still be joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Free {
    ports: bool,
    nets: Option<Side>,
    set: Option<Side>,
    protocol: bool,
}

/// Everything that one side demands, without what is free.
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

/// Everything that a rule demands, without what is free.
type RuleKey<'a> = (
    Free,
    Option<IpVersion>,
    Option<Protocol>,
    Option<Protocol>,
    Option<Icmp>,
    Option<Icmp>,
    SideKey<'a>,
    SideKey<'a>,
);

/// A rule, or what several became, at the place of the first.
struct Entry<'a> {
    place: usize,
    rule: Cow<'a, RuleRecord>,
    origins: Vec<RuleRef>,
}

/// Joins what can be joined, and notes the unions that this takes.
pub(super) fn merge<'a>(
    items: &[(Item<'a>, RuleRef)],
    role: &impl Fn(&SetId) -> Role,
    unions: &mut Unions,
) -> Vec<Traced<'a>> {
    let mut merged = Vec::new();
    let mut rest = items;
    while let Some((first, _)) = rest.first() {
        let action = joinable(first, role);
        let length = match action {
            Some(_) => rest
                .iter()
                .take_while(|(item, _)| joinable(item, role) == action)
                .count(),
            None => 1,
        };
        let (run, after) = rest.split_at(length);
        if length > 1 {
            join(run, role, unions, &mut merged);
        } else {
            merged.extend(
                run.iter()
                    .map(|(item, origin)| Traced::new(item.clone(), vec![*origin])),
            );
        }
        rest = after;
    }
    merged
}

/// What the item says, if its place among others that say the same does not matter.
fn joinable(item: &Item<'_>, role: &impl Fn(&SetId) -> Role) -> Option<Action> {
    let Item::Rule(rule) = item else { return None };
    let complete = [&rule.source, &rule.destination]
        .into_iter()
        .flat_map(sets_of_side)
        .all(|id| role(id) != Role::Missing);
    complete.then_some(rule.action)
}

fn join<'a>(
    run: &[(Item<'a>, RuleRef)],
    role: &impl Fn(&SetId) -> Role,
    unions: &mut Unions,
    merged: &mut Vec<Traced<'a>>,
) {
    let rules = run.iter().filter_map(|(item, origin)| {
        if let Item::Rule(rule) = item {
            Some((*rule, *origin))
        } else {
            None
        }
    });
    let entry = |(place, (rule, origin))| Entry {
        place,
        rule: Cow::Borrowed(rule),
        origins: vec![origin],
    };
    let entries = rules.enumerate().map(entry).collect();
    let ports = |rule: &RuleRecord| Free {
        ports: has_plain_ports(rule),
        ..Free::default()
    };
    let entries = fold(entries, ports, |all, more| {
        let mut ports: Vec<PortRange> = all
            .destination
            .ports
            .iter()
            .chain(&*more.destination.ports)
            .copied()
            .collect();
        ports.sort_unstable();
        ports.dedup();
        all.destination.ports = ports.into();
    });
    let nets = |rule: &RuleRecord| {
        let has_nets = |side: &Side| !of(rule, *side).nets.is_empty();
        Free {
            nets: [Side::Source, Side::Destination].into_iter().find(has_nets),
            ..Free::default()
        }
    };
    let entries = fold(entries, nets, |all, more| {
        for (all, more) in [
            (&mut all.source, &more.source),
            (&mut all.destination, &more.destination),
        ] {
            all.nets.extend(&more.nets);
            all.nets.sort_unstable();
            all.nets.dedup();
        }
    });
    let mut places = BTreeMap::new();
    let entries = cross(entries, role, unions, &mut places);
    unite(entries, role, unions, &mut places);
    merged.extend(places.into_values().flatten());
}

/// Rules in groups that differ in what is free only, by their index.
fn groups(entries: &[Entry<'_>], free: impl Fn(&RuleRecord) -> Free) -> Vec<(Free, Vec<usize>)> {
    let mut groups: BTreeMap<RuleKey<'_>, Vec<usize>> = BTreeMap::new();
    for (index, entry) in entries.iter().enumerate() {
        groups
            .entry(key(&entry.rule, free(&entry.rule)))
            .or_default()
            .push(index);
    }
    groups
        .into_iter()
        .map(|((free, ..), members)| (free, members))
        .collect()
}

/// Makes one rule of each group.
fn fold<'a>(
    entries: Vec<Entry<'a>>,
    free: impl Fn(&RuleRecord) -> Free,
    absorb: impl Fn(&mut RuleRecord, &RuleRecord),
) -> Vec<Entry<'a>> {
    let groups = groups(&entries, free);
    let fold = |(_, members): (Free, Vec<usize>)| {
        let Entry { place, rule, .. } = &entries[members[0]];
        let mut rule = rule.clone();
        let origins = members
            .iter()
            .flat_map(|member| &entries[*member].origins)
            .copied()
            .collect();
        for other in &members[1..] {
            let other = &entries[*other].rule;
            if *other != rule {
                absorb(rule.to_mut(), other);
            }
        }
        Entry {
            place: *place,
            rule,
            origins,
        }
    };
    let mut folded: Vec<Entry<'a>> = groups.into_iter().map(fold).collect();
    folded.sort_by_key(|entry| entry.place);
    folded
}

/// By set, the ports that go with it, and the rules that say so.
type PortsBySet = BTreeMap<SetId, (BTreeSet<(Protocol, u16)>, Vec<RuleRef>)>;

/// Joins rules that differ in one set and in ports; returns the others.
fn cross<'a>(
    entries: Vec<Entry<'a>>,
    role: &impl Fn(&SetId) -> Role,
    unions: &mut Unions,
    places: &mut BTreeMap<usize, Vec<Traced<'a>>>,
) -> Vec<Entry<'a>> {
    let free = |rule: &RuleRecord| {
        let set = side_of_set(rule, |id| role(id) == Role::Exact).filter(|_| has_few_ports(rule));
        Free {
            ports: set.is_some(),
            protocol: set.is_some(),
            nets: None,
            set,
        }
    };
    let mut crossed = BTreeSet::new();
    for (Free { set, .. }, members) in groups(&entries, free) {
        let Some(side) = set else { continue };
        let joined = || members.iter().map(|index| &entries[*index]);
        let ports: BTreeSet<_> = joined()
            .map(|entry| (entry.rule.protocol, &entry.rule.destination.ports))
            .collect();
        if ports.len() < WORTHWHILE {
            continue;
        }
        let mut parts = PortsBySet::new();
        for Entry { rule, origins, .. } in joined() {
            let ports = rule
                .destination
                .ports
                .iter()
                .flat_map(|range| range.first..=range.last);
            let ports = rule
                .protocol
                .into_iter()
                .flat_map(|protocol| ports.clone().map(move |port| (protocol, port)));
            let (all, from) = parts.entry(of(rule, side).sets[0].clone()).or_default();
            all.extend(ports);
            from.extend(origins);
        }
        let mut rest = RuleRecord::clone(&entries[members[0]].rule);
        rest.protocol = None;
        rest.destination.ports = Arc::default();
        of_mut(&mut rest, side).sets.clear();
        let union = |piece: PortsBySet| {
            let mut origins = Vec::new();
            let mut ports_by_set = BTreeMap::new();
            for (set, (ports, from)) in piece {
                ports_by_set.insert(set, ports);
                origins.extend(from);
            }
            let parts = Parts::Ports(ports_by_set);
            let id = parts.id();
            unions.insert(id.clone(), parts);
            Traced::new(Item::Crossed(Box::new(rest.clone()), side, id), origins)
        };
        places.insert(
            entries[members[0]].place,
            pieces(parts).into_iter().map(union).collect(),
        );
        crossed.extend(members);
    }
    let mut index = 0..;
    entries
        .into_iter()
        .filter(|_| {
            index
                .next()
                .is_some_and(|index: usize| !crossed.contains(&index))
        })
        .collect()
}

/// Joins rules that differ in one set.
fn unite<'a>(
    entries: Vec<Entry<'a>>,
    role: &impl Fn(&SetId) -> Role,
    unions: &mut Unions,
    places: &mut BTreeMap<usize, Vec<Traced<'a>>>,
) {
    let is_part = |id: &SetId| matches!(role(id), Role::Part | Role::Exact);
    let free = |rule: &RuleRecord| Free {
        set: side_of_set(rule, is_part),
        ..Free::default()
    };
    let groups = groups(&entries, free);
    let mut entries: Vec<Option<Entry<'a>>> = entries.into_iter().map(Some).collect();
    for (Free { set, .. }, members) in groups {
        let mut members = members
            .into_iter()
            .filter_map(|index| entries[index].take())
            .peekable();
        let Some(place) = members.peek().map(|entry| entry.place) else {
            continue;
        };
        let items = match set {
            // Two rules that are the same became one before.
            None => members.map(Entry::into_traced).collect(),
            Some(side) => {
                let by_set: BTreeMap<SetId, Entry<'a>> = members
                    .map(|entry| (of(&entry.rule, side).sets[0].clone(), entry))
                    .collect();
                united(by_set, side, unions)
            }
        };
        places.insert(place, items);
    }
}

/// Rules that differ in their set only.
fn united<'a>(
    by_set: BTreeMap<SetId, Entry<'a>>,
    side: Side,
    unions: &mut Unions,
) -> Vec<Traced<'a>> {
    if by_set.len() < WORTHWHILE {
        return by_set.into_values().map(Entry::into_traced).collect();
    }
    let union = |piece: BTreeMap<SetId, Entry<'a>>| {
        let parts = Parts::Addresses(piece.keys().cloned().collect());
        let origins = piece
            .values()
            .flat_map(|entry| &entry.origins)
            .copied()
            .collect();
        let mut rule = piece.into_values().next()?.rule.into_owned();
        let id = parts.id();
        of_mut(&mut rule, side).sets = vec![id.clone()];
        unions.insert(id, parts);
        Some(Traced::new(Item::Joined(Box::new(rule)), origins))
    };
    pieces(by_set).into_iter().filter_map(union).collect()
}

/// Splits what a union is of into pieces by a hash of each set: a set more or less is one in one
/// piece, until there are twice as many.
fn pieces<T>(parts: BTreeMap<SetId, T>) -> Vec<BTreeMap<SetId, T>> {
    let count = parts.len().div_ceil(PIECE).next_power_of_two();
    if count == 1 {
        return vec![parts];
    }
    let mut pieces: BTreeMap<usize, BTreeMap<SetId, T>> = BTreeMap::new();
    for (id, part) in parts {
        pieces
            .entry(names::spread(id.0.as_bytes()) % count)
            .or_default()
            .insert(id, part);
    }
    pieces.into_values().collect()
}

impl<'a> Traced<'a> {
    fn new(item: Item<'a>, mut origins: Vec<RuleRef>) -> Self {
        origins.sort_unstable();
        Self { item, origins }
    }
}

impl<'a> Entry<'a> {
    fn into_traced(self) -> Traced<'a> {
        let item = match self.rule {
            Cow::Borrowed(rule) => Item::Rule(rule),
            Cow::Owned(rule) => Item::Joined(Box::new(rule)),
        };
        Traced::new(item, self.origins)
    }
}

impl Parts {
    /// Identity of the union: what it is of.
    fn id(&self) -> SetId {
        let text: String = match self {
            Self::Addresses(sets) => sets
                .iter()
                .flat_map(|part| [part.0.as_str(), "\n"])
                .collect(),
            Self::Ports(sets) => format!("{sets:?}"),
        };
        SetId(format!("u:{}", names::hash(text.as_bytes())))
    }

    /// Whether the set is one of those that the union is of.
    pub(super) fn contains(&self, id: &SetId) -> bool {
        match self {
            Self::Addresses(sets) => sets.contains(id),
            Self::Ports(sets) => sets.contains_key(id),
        }
    }
}

/// Whether the id is of a union.
pub(super) fn is_union(id: &SetId) -> bool {
    id.0.starts_with("u:")
}

/// Whether ports are demanded, by number only.
fn has_plain_ports(rule: &RuleRecord) -> bool {
    !rule.destination.ports.is_empty() && rule.destination.port_sets.is_empty()
}

/// Whether each address can be kept with every port that is demanded.
fn has_few_ports(rule: &RuleRecord) -> bool {
    let size = |range: &PortRange| usize::from(range.last.saturating_sub(range.first)) + 1;
    has_plain_ports(rule)
        && rule.protocol.is_some_and(Protocol::has_ports)
        && rule.destination.ports.iter().map(size).sum::<usize>() <= PORTS
}

/// The side whose addresses are demanded by one set, and that set is as wanted.
fn side_of_set(rule: &RuleRecord, wanted: impl Fn(&SetId) -> bool) -> Option<Side> {
    let one = |side: &Side| matches!(of(rule, *side).sets.as_slice(), [set] if wanted(set));
    [Side::Source, Side::Destination].into_iter().find(one)
}

fn of(rule: &RuleRecord, side: Side) -> &SideMatch {
    match side {
        Side::Source => &rule.source,
        Side::Destination => &rule.destination,
    }
}

fn of_mut(rule: &mut RuleRecord, side: Side) -> &mut SideMatch {
    match side {
        Side::Source => &mut rule.source,
        Side::Destination => &mut rule.destination,
    }
}

fn key(rule: &RuleRecord, free: Free) -> RuleKey<'_> {
    (
        free,
        rule.ip_version,
        rule.protocol.filter(|_| !free.protocol),
        rule.not_protocol,
        rule.icmp,
        rule.not_icmp,
        side_key(&rule.source, Side::Source, free),
        side_key(&rule.destination, Side::Destination, free),
    )
}

fn side_key(side: &SideMatch, which: Side, free: Free) -> SideKey<'_> {
    let nets = if free.nets == Some(which) {
        &[]
    } else {
        side.nets.as_slice()
    };
    let sets = if free.set == Some(which) {
        &[]
    } else {
        side.sets.as_slice()
    };
    let ports: &[PortRange] = if free.ports && which == Side::Destination {
        &[]
    } else {
        &side.ports
    };
    (
        nets,
        &side.not_nets,
        sets,
        &side.not_sets,
        ports,
        &side.port_sets,
        &side.not_ports,
        &side.not_port_sets,
        side.service_set.as_ref(),
    )
}

#[cfg(test)]
mod tests;
