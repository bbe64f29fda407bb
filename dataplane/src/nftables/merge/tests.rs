//! What becomes of runs of rules: how many lookups, and what a rule more changes.

use super::*;
use crate::nftables::sample::{mk_net, mk_rule};

fn mk_set(number: usize) -> SetId {
    SetId(format!("s:{number}"))
}

fn mk_from(set: SetId, ports: Vec<PortRange>) -> RuleRecord {
    RuleRecord {
        protocol: Some(Protocol::TCP),
        source: SideMatch { sets: vec![set], ..SideMatch::default() },
        destination: SideMatch { ports: ports.into(), ..SideMatch::default() },
        ..mk_rule(Action::Allow)
    }
}

fn mk_block(number: usize, except: bool) -> RuleRecord {
    let net = |length: u8| mk_net(&format!("10.{}.{}.0/{length}", number / 256, number % 256));
    let not_nets = if except { vec![net(28)] } else { Vec::new() };
    RuleRecord { source: SideMatch { nets: vec![net(24)], not_nets, ..SideMatch::default() }, ..mk_rule(Action::Allow) }
}

fn port(number: usize) -> Vec<PortRange> {
    vec![PortRange::single(1000 + u16::try_from(number).expect("a port"))]
}

fn merged(rules: &[RuleRecord]) -> (usize, Unions) {
    let items: Vec<Item<'_>> = rules.iter().map(Item::Rule).collect();
    let mut unions = Unions::new();
    let merged = merge(&items, &|_| Role::Exact, &mut unions);
    (merged.len(), unions)
}

/// What the rules are like, each by its number, and how many are left of 1000.
type Shape<'a> = (&'a str, &'a dyn Fn(usize) -> RuleRecord, usize);

/// What every policy of a big namespace looks like, 1000 rules of each shape: how many are left.
#[test]
fn shapes_that_collapse() {
    const RULES: usize = 1000;
    let shapes: [Shape<'_>; 7] = [
        ("peers, one port", &|number| mk_from(mk_set(number), port(0)), 16),
        ("peers, a port each", &|number| mk_from(mk_set(number), port(number)), 16),
        ("one peer, a port each", &|number| mk_from(mk_set(0), port(number)), 1),
        ("few peers, many ports", &|number| mk_from(mk_set(number % 3), port(number)), 3),
        ("the same rule", &|_| mk_from(mk_set(0), port(0)), 1),
        ("ranges", &|number| mk_block(number, false), 1),
        ("ranges with exceptions", &|number| mk_block(number, true), RULES),
    ];
    for (name, rule, left) in shapes {
        let rules: Vec<RuleRecord> = (0..RULES).map(rule).collect();
        assert_eq!(merged(&rules).0, left, "{name}");
    }
}

#[test]
fn a_peer_more_changes_one_piece_of_a_union() {
    for own_ports in [false, true] {
        let rule = |number: usize| mk_from(mk_set(number), port(if own_ports { number } else { 0 }));
        let rules: Vec<RuleRecord> = (0..1000).map(rule).collect();
        let (_, before) = merged(&rules[..999]);
        let (_, after) = merged(&rules);
        let new = after.keys().filter(|id| !before.contains_key(*id)).count();
        let gone = before.keys().filter(|id| !after.contains_key(*id)).count();
        assert_eq!((new, gone), (1, 1), "ports of their own: {own_ports}");
    }
}

#[test]
fn what_says_otherwise_stays_in_its_place() {
    let allow = |number| mk_from(mk_set(number), port(0));
    let deny = RuleRecord { action: Action::Deny, ..mk_from(mk_set(99), port(0)) };
    let rules: Vec<RuleRecord> = (0..8).map(allow).chain([deny.clone()]).chain((8..16).map(allow)).collect();
    let items: Vec<Item<'_>> = rules.iter().map(Item::Rule).collect();
    let mut unions = Unions::new();
    let merged = merge(&items, &|_| Role::Exact, &mut unions);
    assert_eq!(merged.len(), 3);
    assert_eq!(merged[1], Item::Rule(&deny));
    assert_eq!(unions.len(), 2);
}
