//! Property tests of `diff`: after any sequence of rulesets, the kernel has exactly the last one.

use std::sync::Arc;

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use super::sample::{everything, net, port, v4};
use super::support::{
    assert_same_lines, chain_name, ifname, in_namespace, list, load, loadable, normal, set_name,
    table,
};
use crate::*;

/// Few names and values, so that consecutive rulesets have much in common.
const CHAINS: [&str; 5] = ["chain-0", "chain-1", "chain-2", "chain-3", "chain-4"];

/// A set of one of a few kinds, so that consecutive rulesets replace one kind by another.
fn arb_set() -> impl Strategy<Value = Set> {
    let single = (0u8..16).prop_map(|last| Key::from(std::net::Ipv4Addr::new(10, 0, 0, last)));
    let plain =
        btree_set(single, 0..8).prop_map(|keys| Set::members(SetKind::of(FieldType::Ipv4), keys));
    // Cuts a small address space at random places and keeps random pieces: ranges that touch and
    // move.
    let ranges = (btree_set(0u8..=255, 1..8), vec(any::<bool>(), 8)).prop_map(|(cuts, kept)| {
        let address = |last| Datum::from(std::net::Ipv4Addr::new(255, 255, 255, last));
        let cuts: Vec<u8> = cuts.into_iter().collect();
        let ends = cuts.iter().skip(1).map(|next| next - 1).chain([255]);
        let pieces = cuts.iter().zip(ends).zip(kept).filter(|(_, kept)| *kept);
        let keys = pieces.map(|((first, last), _)| Field::range(address(*first), address(last)));
        Set::members(SetKind::of(FieldType::Ipv4).with_intervals(), keys)
    });
    prop_oneof![plain, ranges]
}

fn arb_verdict(own: usize) -> impl Strategy<Value = Verdict> {
    let later: Vec<Verdict> = CHAINS[own + 1..]
        .iter()
        .flat_map(|name| {
            [
                Verdict::Jump(chain_name(name)),
                Verdict::Goto(chain_name(name)),
            ]
        })
        .chain([Verdict::Accept, Verdict::Drop, Verdict::Return])
        .collect();
    select(later)
}

/// A rule of chain number `own`, which jumps to later chains only.
fn arb_rule(own: usize) -> impl Strategy<Value = Rule> {
    let test = prop_oneof![
        Just(Match::in_set(Selector::Saddr4, &set_name("addresses-1"))),
        Just(Match::not_in_set(
            Selector::Daddr4,
            &set_name("addresses-2")
        )),
        (1u16..4).prop_map(|last| Match::is(Selector::Dport(Transport::Tcp), port(last))),
        (1u16..4)
            .prop_map(|last| Match::any_of(Selector::Dport(Transport::Udp), [port(last), port(9)])),
    ];
    (test, arb_verdict(own)).prop_map(|(test, verdict)| Rule::new().when(test).verdict(verdict))
}

fn arb_chain(own: usize) -> impl Strategy<Value = Chain> {
    let base = if own == 0 {
        let policies = [ChainPolicy::Accept, ChainPolicy::Drop].map(Some);
        let priorities = [0, 10];
        (select(policies.to_vec()), select(priorities.to_vec()))
            .prop_map(|(policy, priority)| {
                let (kind, hook) = (ChainType::Filter, Hook::Forward);
                policy.map(|policy| Base {
                    kind,
                    hook,
                    priority,
                    policy,
                })
            })
            .boxed()
    } else {
        Just(None).boxed()
    };
    (base, vec(arb_rule(own), 0..4)).prop_map(|(base, rules)| Chain { base, rules })
}

/// A verdict map from interface names to chains.
fn arb_dispatch() -> impl Strategy<Value = Set> {
    let name = (0u8..6).prop_map(|number| Key::from(ifname(&format!("cali{number}"))));
    let verdict = arb_verdict(0).prop_map(Value::Verdict);
    btree_map(name, verdict, 0..5).prop_map(|elements| Set {
        kind: SetKind::of(FieldType::Iface).with_verdicts(),
        elements,
    })
}

/// A verdict map of concatenated ranges, which never overlap.
fn arb_peers() -> impl Strategy<Value = Set> {
    let nets = select(vec![
        net("10.0.0.0/25"),
        net("10.0.0.128/25"),
        v4("10.0.1.7").into(),
    ]);
    let protos = select(vec![Field::from(Proto::TCP), Proto::UDP.into()]);
    let ports = select(vec![Field::from(0..=5), Field::from(6..=9), port(12)]);
    let key = (nets, protos, ports).prop_map(|(net, proto, ports)| Key::from([net, proto, ports]));
    let verdict = arb_verdict(0).prop_map(Value::Verdict);
    let kind = SetKind::of([FieldType::Ipv4, FieldType::Proto, FieldType::Port])
        .with_intervals()
        .with_verdicts();
    btree_map(key, verdict, 0..6).prop_map(move |elements| Set {
        kind: kind.clone(),
        elements,
    })
}

prop_compose! {
    fn arb_ruleset()(
        chains in (arb_chain(0), arb_chain(1), arb_chain(2), arb_chain(3)),
        present in vec(any::<bool>(), 5),
        first in arb_set(),
        second in arb_set(),
        dispatch in proptest::option::of(arb_dispatch()),
        peers in proptest::option::of(arb_peers()),
    ) -> Ruleset {
        let mut ruleset = Ruleset::new(table());
        ruleset.put_set(set_name("addresses-1"), first);
        ruleset.put_set(set_name("addresses-2"), second);
        let (zero, one, two, three) = chains;
        for (index, chain) in [zero, one, two, three, Chain::default()].into_iter().enumerate() {
            if present[index] {
                ruleset.put_chain(chain_name(CHAINS[index]), chain);
            }
        }
        ruleset.sets.extend(peers.map(|map| (set_name("peers-1"), Arc::new(map))));
        ruleset.sets.extend(dispatch.map(|map| (set_name("dispatch-1"), Arc::new(map))));
        loadable(keep_sound(ruleset))
    }
}

/// Removes the rules and elements that jump to missing chains, and adds rules that use the maps.
fn keep_sound(mut ruleset: Ruleset) -> Ruleset {
    let names: Vec<ChainName> = ruleset.chains.keys().cloned().collect();
    let leads_somewhere =
        |verdict: &Verdict| verdict.target().is_none_or(|target| names.contains(target));
    for chain in ruleset.chains.values_mut() {
        Arc::make_mut(chain).rules.retain(|rule| {
            rule.statements.iter().all(|statement| match statement {
                Statement::Verdict(verdict) => leads_somewhere(verdict),
                _ => true,
            })
        });
    }
    let peers = vec![
        Selector::Saddr4,
        Selector::L4proto,
        Selector::Dport(Transport::Any),
    ];
    for (name, key) in [("dispatch-1", vec![Selector::Iifname]), ("peers-1", peers)] {
        let Some(map) = ruleset.sets.get_mut(name) else {
            continue;
        };
        Arc::make_mut(map).elements.retain(|_, value| match value {
            Value::Verdict(verdict) => leads_somewhere(verdict),
            Value::Member | Value::Data(_) => true,
        });
        if let Some(chain) = ruleset.chains.get_mut(CHAINS[0]) {
            Arc::make_mut(chain)
                .rules
                .insert(0, Rule::new().vmap(key, &set_name(name)));
        }
    }
    ruleset
        .check()
        .unwrap_or_else(|faults| panic!("{faults:?}"));
    ruleset
}

fn fresh_listing(ruleset: &Ruleset) -> String {
    in_namespace(|| {
        load(&ruleset.to_string());
        normal(&list())
    })
}

#[test]
fn every_sequence_ends_in_its_last_ruleset() {
    let mut runner = TestRunner::new(Config {
        cases: 100,
        failure_persistence: None,
        ..Config::default()
    });
    let sequence = vec(arb_ruleset(), 1..6);
    let outcome = runner.run(&sequence, |sequence| {
        let last = sequence.last().expect("at least one");
        let listing = in_namespace(|| {
            let mut socket = NftSocket::open().expect("root");
            socket
                .exec(&Transaction::replace(&Ruleset::new(table())))
                .expect("an empty table");
            let mut present = Ruleset::new(table());
            for wanted in &sequence {
                let transaction = diff(&present, wanted);
                let done = socket.exec(&transaction);
                prop_assert!(
                    done.is_ok(),
                    "{}\n{transaction}",
                    done.expect_err("not done")
                );
                let listed = socket.list(&table()).expect("a listing");
                prop_assert_eq!(&listed.sets, &wanted.sets);
                prop_assert_eq!(listed.drift(wanted), vec![]);
                present = wanted.clone();
            }
            Ok(normal(&list()))
        })?;
        prop_assert_eq!(listing, fresh_listing(last));
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

/// A table that is read back, whatever it holds, becomes the wanted one.
#[test]
fn every_table_found_is_led_to_the_wanted_one() {
    let mut runner = TestRunner::new(Config {
        cases: 100,
        failure_persistence: None,
        ..Config::default()
    });
    let outcome = runner.run(&(arb_ruleset(), arb_ruleset()), |(found, wanted)| {
        in_namespace(|| {
            load(&found.to_string());
            let mut socket = NftSocket::open().expect("root");
            let plan = socket.list(&table()).expect("a listing").diff(&wanted);
            prop_assert_eq!(
                &plan,
                &diff(&found, &wanted),
                "the transaction is the same for a table read back and for its ruleset"
            );
            let done = socket.exec(&plan);
            prop_assert!(done.is_ok(), "{}\n{plan}", done.expect_err("not done"));
            prop_assert_eq!(
                socket.list(&table()).expect("a listing").drift(&wanted),
                vec![]
            );
            Ok(())
        })
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn equal_rulesets_need_nothing() {
    assert!(diff(&everything(), &everything()).is_empty());
}

/// Changes, and the operations that they result in.
#[test]
fn only_what_changed_is_touched() {
    let check = |change: &dyn Fn(&mut Ruleset), expected: &[&str]| {
        let mut wanted = everything();
        change(&mut wanted);
        let ops: Vec<String> = diff(&everything(), &wanted)
            .ops()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(ops, expected);
    };
    let set = |ruleset: &mut Ruleset, name: &str, key: Key, value: Value| {
        Arc::make_mut(ruleset.sets.get_mut(name).expect("in the sample"))
            .elements
            .insert(key, value);
    };
    let chain = |ruleset: &mut Ruleset, name: &str, change: &dyn Fn(&mut Chain)| {
        change(Arc::make_mut(
            ruleset.chains.get_mut(name).expect("in the sample"),
        ));
    };
    check(
        &|ruleset| set(ruleset, "addresses-4", v4("10.0.0.3").into(), Value::Member),
        &["add 10.0.0.3 to set addresses-4"],
    );
    check(
        &|ruleset| {
            set(
                ruleset,
                "dispatch-1",
                ifname("cali3").into(),
                Value::Verdict(Verdict::Accept),
            )
        },
        &[
            "delete \"cali3\" from set dispatch-1",
            "add \"cali3\" : accept to set dispatch-1",
        ],
    );
    check(
        &|ruleset| {
            chain(ruleset, "endpoint-1", &|chain| {
                chain.rules.push(Rule::new().accept())
            })
        },
        &["add 1 rule(s) to chain endpoint-1"],
    );
    check(
        &|ruleset| {
            chain(ruleset, "endpoint-1", &|chain| {
                chain.rules.insert(0, Rule::new().accept())
            })
        },
        &[
            "flush chain endpoint-1",
            "add 2 rule(s) to chain endpoint-1",
        ],
    );
    check(
        &|ruleset| {
            chain(ruleset, "forward-1", &|chain| {
                chain.base = chain.base.map(|base| Base {
                    policy: ChainPolicy::Accept,
                    ..base
                });
            });
        },
        &[
            "create chain forward-1 with type filter hook forward priority filter - 5; policy \
             accept;",
        ],
    );
    check(
        &|ruleset| {
            chain(ruleset, "forward-1", &|chain| {
                chain.base = chain.base.map(|base| Base {
                    priority: 0,
                    ..base
                })
            });
        },
        &[
            "flush chain forward-1",
            "delete chain forward-1",
            "create chain forward-1 with type filter hook forward priority filter; policy drop;",
            "add 1 rule(s) to chain forward-1",
        ],
    );
    check(
        &|ruleset| {
            let kind = SetKind::of(FieldType::Ipv4).with_intervals();
            ruleset.put_set(set_name("empty-4"), Set::new(kind));
        },
        &["delete set empty-4", "create set empty-4 of ipv4_addr"],
    );
}

/// A set in use changes its kind: the rules with lookups in it are rewritten too.
#[test]
fn a_set_in_use_changes_its_kind_in_one_transaction() {
    in_namespace(|| {
        let mut socket = NftSocket::open().expect("root");
        let before = loadable(everything());
        socket
            .exec(&diff(&Ruleset::new(table()), &before))
            .expect("sound");
        let mut after = before.clone();
        let kind = SetKind::of(FieldType::Ipv4).with_intervals();
        after.put_set(
            set_name("addresses-4"),
            Set::members(
                kind,
                [Field::range(v4("10.0.0.1").into(), v4("10.0.0.9").into())],
            ),
        );
        socket.exec(&diff(&before, &after)).expect("sound");
        assert_same_lines(&normal(&list()), &fresh_listing(&after));
    });
}
