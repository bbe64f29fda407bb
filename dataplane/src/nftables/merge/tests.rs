//! What becomes of runs of rules: how many lookups, and what a rule more changes.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::*;
use crate::nftables::sample::{mk_net, mk_rule};

fn mk_set(number: usize) -> SetId {
    SetId(format!("s:{number}"))
}

fn mk_from(set: SetId, ports: Vec<PortRange>) -> RuleRecord {
    RuleRecord {
        protocol: Some(Protocol::TCP),
        source: SideMatch {
            sets: vec![set],
            ..SideMatch::default()
        },
        destination: SideMatch {
            ports: ports.into(),
            ..SideMatch::default()
        },
        ..mk_rule(Action::Allow)
    }
}

fn mk_block(number: usize, except: bool) -> RuleRecord {
    let net = |length: u8| mk_net(&format!("10.{}.{}.0/{length}", number / 256, number % 256));
    let not_nets = if except { vec![net(28)] } else { Vec::new() };
    RuleRecord {
        source: SideMatch {
            nets: vec![net(24)],
            not_nets,
            ..SideMatch::default()
        },
        ..mk_rule(Action::Allow)
    }
}

fn port(number: usize) -> Vec<PortRange> {
    vec![PortRange::single(
        1000 + u16::try_from(number).expect("a port"),
    )]
}

fn merged(rules: &[RuleRecord]) -> (usize, Unions) {
    let mut unions = Unions::new();
    let merged = merge(&items(rules), &|_| Role::Exact, &mut unions);
    (merged.len(), unions)
}

fn items(rules: &[RuleRecord]) -> Vec<(Item<'_>, RuleRef)> {
    rules
        .iter()
        .enumerate()
        .map(|(index, rule)| (Item::Rule(rule), RuleRef::new(0, 0, Some(index))))
        .collect()
}

/// Rules that differ in a set, in ports, in ranges or not at all, so that they are joined in every
/// way.
fn alike(action: impl Strategy<Value = Action>) -> impl Strategy<Value = RuleRecord> {
    let ports = subsequence((0..6).collect::<Vec<usize>>(), 0..3);
    let nets = subsequence((0..3).collect::<Vec<usize>>(), 0..2);
    let set = prop_oneof![3 => (0..12_usize).prop_map(Some), 1 => Just(None)];
    let protocol = select(vec![Protocol::TCP, Protocol::TCP, Protocol::UDP]);
    (action, set, ports, nets, protocol, any::<bool>()).prop_map(
        |(action, set, ports, nets, protocol, outward)| {
            let ports: Vec<PortRange> = ports.into_iter().flat_map(port).collect();
            let nets = nets
                .into_iter()
                .map(|number| mk_net(&format!("10.{number}.0.0/16")))
                .collect();
            let peer = SideMatch {
                sets: set.map(mk_set).into_iter().collect(),
                nets,
                ..SideMatch::default()
            };
            let (source, mut destination) = if outward {
                (SideMatch::default(), peer)
            } else {
                (peer, SideMatch::default())
            };
            destination.ports = ports.into();
            RuleRecord {
                protocol: Some(protocol),
                source,
                destination,
                ..mk_rule(action)
            }
        },
    )
}

/// Some sets cannot be part of a union, and some not of one with ports.
fn mk_role(id: &SetId) -> Role {
    match id.0.as_str() {
        "s:0" => Role::Missing,
        "s:1" => Role::Alone,
        "s:2" => Role::Part,
        _ => Role::Exact,
    }
}

proptest! {
    #[test]
    fn every_rule_is_an_origin_of_one_item(
        rules in vec(alike(select(vec![Action::Allow, Action::Allow, Action::Deny])), 0..60),
    ) {
        let items = items(&rules);
        let merged = merge(&items, &mk_role, &mut Unions::new());
        let mut origins: Vec<RuleRef> = merged
            .iter()
            .flat_map(|traced| traced.origins.clone())
            .collect();
        origins.sort_unstable();
        let all: Vec<RuleRef> = items.iter().map(|(_, origin)| *origin).collect();
        prop_assert_eq!(origins, all);
        for Traced { item, origins } in &merged {
            prop_assert!(origins.is_sorted());
            let Item::Rule(rule) = item else { continue };
            prop_assert!(origins.iter().any(|origin| items.contains(&(Item::Rule(rule), *origin))));
        }
    }

    #[test]
    fn the_order_of_rules_with_the_same_action_changes_no_origin(
        (rules, shuffled) in vec(alike(Just(Action::Allow)), 2..60).prop_flat_map(|rules| {
            let numbered: Vec<(usize, RuleRecord)> = rules.iter().cloned().enumerate().collect();
            (Just(rules), Just(numbered).prop_shuffle())
        }),
    ) {
        // Nothing is missing: what a missing set stands between is no run.
        let role = |id: &SetId| match mk_role(id) {
            Role::Missing => Role::Exact,
            role => role,
        };
        let by_origin = |items: &[(Item<'_>, RuleRef)]| -> Vec<(Vec<RuleRef>, String)> {
            let merged = merge(items, &role, &mut Unions::new());
            let mut found: Vec<_> =
                merged
                    .into_iter()
                    .map(|traced| (traced.origins, format!("{:?}", plain(traced.item))))
                    .collect();
            found.sort();
            found
        };
        let shuffled: Vec<_> = shuffled
            .iter()
            .map(|(number, rule)| (Item::Rule(rule), RuleRef::new(0, 0, Some(*number))))
            .collect();
        prop_assert_eq!(by_origin(&items(&rules)), by_origin(&shuffled));
    }
}

/// The item whether or not its rule is still that of a policy.
fn plain(item: Item<'_>) -> (RuleRecord, Option<(Side, SetId)>) {
    match item {
        Item::Rule(rule) => (rule.clone(), None),
        Item::Joined(rule) => (*rule, None),
        Item::Crossed(rule, side, set) => (*rule, Some((side, set))),
        Item::Report(..) | Item::Closed => panic!("no rule reports, and no policy is missing"),
    }
}

/// What the rules are like, each by its number, and how many are left of 1000.
type Shape<'a> = (&'a str, &'a dyn Fn(usize) -> RuleRecord, usize);

/// What every policy of a big namespace looks like, 1000 rules of each shape: how many are left.
#[test]
fn shapes_that_collapse() {
    const RULES: usize = 1000;
    let shapes: [Shape<'_>; 7] = [
        (
            "peers, one port",
            &|number| mk_from(mk_set(number), port(0)),
            16,
        ),
        (
            "peers, a port each",
            &|number| mk_from(mk_set(number), port(number)),
            16,
        ),
        (
            "one peer, a port each",
            &|number| mk_from(mk_set(0), port(number)),
            1,
        ),
        (
            "few peers, many ports",
            &|number| mk_from(mk_set(number % 3), port(number)),
            3,
        ),
        ("the same rule", &|_| mk_from(mk_set(0), port(0)), 1),
        ("ranges", &|number| mk_block(number, false), 1),
        (
            "ranges with exceptions",
            &|number| mk_block(number, true),
            RULES,
        ),
    ];
    for (name, rule, left) in shapes {
        let rules: Vec<RuleRecord> = (0..RULES).map(rule).collect();
        assert_eq!(merged(&rules).0, left, "{name}");
    }
}

#[test]
fn a_peer_more_changes_one_piece_of_a_union() {
    for own_ports in [false, true] {
        let rule =
            |number: usize| mk_from(mk_set(number), port(if own_ports { number } else { 0 }));
        let rules: Vec<RuleRecord> = (0..1000).map(rule).collect();
        let (_, before) = merged(&rules[..999]);
        let (_, after) = merged(&rules);
        let new = after.keys().filter(|id| !before.contains_key(*id)).count();
        let gone = before.keys().filter(|id| !after.contains_key(*id)).count();
        assert_eq!((new, gone), (1, 1), "ports of their own: {own_ports}");
    }
}

#[test]
fn rules_with_another_action_stay_in_their_places() {
    let allow = |number| mk_from(mk_set(number), port(0));
    let deny = RuleRecord {
        action: Action::Deny,
        ..mk_from(mk_set(99), port(0))
    };
    let rules: Vec<RuleRecord> = (0..8)
        .map(allow)
        .chain([deny.clone()])
        .chain((8..16).map(allow))
        .collect();
    let mut unions = Unions::new();
    let merged = merge(&items(&rules), &|_| Role::Exact, &mut unions);
    assert_eq!(merged.len(), 3);
    assert_eq!(merged[1].item, Item::Rule(&deny));
    let origins: Vec<usize> = merged.iter().map(|traced| traced.origins.len()).collect();
    assert_eq!(origins, [8, 1, 8]);
    assert_eq!(unions.len(), 2);
}
