//! The printed form, and the errors that `check` finds.

use std::sync::Arc;

use expect_test::expect;

use super::sample::{addresses, everything, net, port, v4};
use super::support::{chain_name, ifname, set_name, table};
use crate::*;

#[test]
fn a_small_table() {
    let mut ruleset = Ruleset::new(table());
    let base = Base {
        kind: ChainType::Filter,
        hook: Hook::Forward,
        priority: -1,
        policy: ChainPolicy::Accept,
    };
    let ct = [
        (CtState::ESTABLISHED, Verdict::Accept),
        (CtState::RELATED, Verdict::Accept),
        (CtState::INVALID, Verdict::Drop),
    ];
    let rules = vec![
        Rule::new().inline_vmap(Selector::CtState, ct),
        Rule::new().vmap(Selector::Iifname, &set_name("from-1")),
        Rule::new()
            .when(Match::iif_prefix(ifname("cali")))
            .counter()
            .drop(),
    ];
    ruleset.put_chain(chain_name("forward-1"), Chain::base(base, rules));
    let ports = [Selector::L4proto, Selector::Dport(Transport::Any)];
    let rules = vec![
        Rule::new()
            .when(Match::in_set(Selector::Saddr4, &set_name("peers-1")))
            .when(Match::any_of(
                ports,
                [
                    [Proto::TCP.into(), port(80)],
                    [Proto::UDP.into(), Field::from(53..=54)],
                ],
            ))
            .accept(),
    ];
    ruleset.put_chain(chain_name("pod-1"), Chain::regular(rules));
    let map = [
        (ifname("cali1"), Verdict::Goto(chain_name("pod-1"))),
        (ifname("cali2"), Verdict::Drop),
    ];
    ruleset.put_set(
        set_name("from-1"),
        Set::verdicts(SetKind::of(FieldType::Iface).with_verdicts(), map),
    );
    let peers = [
        net("10.0.0.0/8"),
        addresses("11.0.0.1", "11.0.0.3"),
        v4("12.0.0.1").into(),
    ];
    ruleset.put_set(
        set_name("peers-1"),
        Set::members(SetKind::of(FieldType::Ipv4).with_intervals(), peers),
    );
    expect![[r#"
        table inet t-1 {
        	map from-1 {
        		type ifname : verdict
        		elements = { "cali1" : goto pod-1,
        			     "cali2" : drop }
        	}

        	set peers-1 {
        		type ipv4_addr
        		flags interval
        		elements = { 10.0.0.0/8,
        			     11.0.0.1-11.0.0.3,
        			     12.0.0.1 }
        	}

        	chain forward-1 {
        		type filter hook forward priority filter - 1; policy accept;
        		ct state vmap { invalid : drop, established : accept, related : accept } comment "7556a765d9c6e8a8"
        		iifname vmap @from-1 comment "abde79b07638c3ec"
        		iifname "cali*" counter drop comment "ccae0990381228f8"
        	}

        	chain pod-1 {
        		ip saddr @peers-1 meta l4proto . th dport { tcp . 80, udp . 53-54 } accept comment "3df341dead392e1e"
        	}
        }
    "#]]
    .assert_eq(&ruleset.to_string());
}

#[test]
fn a_transaction() {
    let mut before = Ruleset::new(table());
    before.put_chain(
        chain_name("old-1"),
        Chain::regular(vec![Rule::new().drop()]),
    );
    before.put_set(set_name("old-2"), Set::new(SetKind::of(FieldType::Mark)));
    let mut after = Ruleset::new(table());
    let members = [v4("10.0.0.1"), v4("10.0.0.2")];
    after.put_set(
        set_name("new-1"),
        Set::members(SetKind::of(FieldType::Ipv4), members),
    );
    let rule = Rule::new()
        .when(Match::in_set(Selector::Saddr4, &set_name("new-1")))
        .drop();
    after.put_chain(chain_name("new-2"), Chain::regular(vec![rule]));
    expect![[r#"
        flush chain old-1
        delete set old-2
        delete chain old-1
        create chain new-2
        create set new-1 of ipv4_addr
        add 2 elements to set new-1
        add 1 rule(s) to chain new-2
    "#]]
    .assert_eq(&diff(&before, &after).to_string());
    expect![[r#"
        create the table
        delete the table
        create the table
        create chain new-2
        create set new-1 of ipv4_addr
        add 2 elements to set new-1
        add 1 rule(s) to chain new-2
    "#]]
    .assert_eq(&Transaction::replace(&after).to_string());
}

#[test]
fn names_and_interfaces_are_checked() {
    for good in ["a", "cali-fw-0123", "_x", "a.b/c"] {
        assert!(ChainName::new(good).is_ok(), "{good}");
    }
    let long = "x".repeat(128);
    for bad in ["", "0a", "-a", "a b", "a\"", "ä", &long] {
        assert!(ChainName::new(bad).is_err(), "{bad}");
    }
    for good in ["eth0", "cali0123456789a", "vxlan.calico", "a-b_c:1"] {
        assert_eq!(IfName::new(good).expect("a name").as_str(), good);
    }
    for bad in ["", "cali0123456789ab", "a b", "a/b", "cali*", "a\"b", "ä"] {
        assert_eq!(IfName::new(bad), None, "{bad}");
    }
}

#[test]
fn a_range_and_its_prefix_are_one_value() {
    assert_eq!(net("10.0.0.0/8"), addresses("10.0.0.0", "10.255.255.255"));
    assert_eq!(net("0.0.0.0/0").prefix_length(), Some(0));
    assert_eq!(addresses("10.0.0.1", "10.0.0.2").prefix_length(), None);
    assert_eq!(addresses("10.0.0.0", "10.0.0.2").prefix_length(), None);
    assert_eq!(addresses("10.0.0.2", "10.0.0.3").prefix_length(), Some(31));
}

/// One change to the sample, and the error it causes.
fn check_error(change: impl FnOnce(&mut Ruleset), expected: &str) {
    let mut ruleset = everything();
    change(&mut ruleset);
    let errors = ruleset.check().expect_err("there is an error");
    assert_eq!(
        errors.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [expected]
    );
}

fn add_rule(ruleset: &mut Ruleset, rule: Rule) {
    Arc::make_mut(ruleset.chains.get_mut("endpoint-2").expect("in the sample"))
        .rules
        .push(rule);
}

fn add_key(ruleset: &mut Ruleset, set: &str, key: impl Into<Key>) {
    let set = Arc::make_mut(ruleset.sets.get_mut(set).expect("in the sample"));
    set.elements.insert(key.into(), Value::Member);
}

#[test]
fn references_are_checked() {
    check_error(
        |ruleset| add_rule(ruleset, Rule::new().jump(&chain_name("nowhere-1"))),
        "chain endpoint-2, rule 0: chain \"nowhere-1\" does not exist",
    );
    check_error(
        |ruleset| add_rule(ruleset, Rule::new().jump(&chain_name("forward-1"))),
        "chain endpoint-2, rule 0: chain \"forward-1\" is a base chain, which is no target of jump \
         or goto",
    );
    check_error(
        |ruleset| {
            add_rule(
                ruleset,
                Rule::new().vmap(Selector::Iifname, &set_name("dispatch-2")),
            )
        },
        "chain endpoint-2, rule 0: set \"dispatch-2\" does not exist",
    );
    check_error(
        |ruleset| {
            add_rule(
                ruleset,
                Rule::new().vmap(Selector::Iifname, &set_name("loop-1")),
            )
        },
        "chain endpoint-2, rule 0: set \"loop-1\" does not exist",
    );
    check_error(
        |ruleset| {
            add_rule(
                ruleset,
                Rule::new().vmap(Selector::Iifname, &set_name("loop-1")),
            );
            let map = [(ifname("a"), Verdict::Goto(chain_name("endpoint-2")))];
            ruleset.put_set(
                set_name("loop-1"),
                Set::verdicts(SetKind::of(FieldType::Iface).with_verdicts(), map),
            );
        },
        "chain \"endpoint-2\" jumps to itself, directly or through other chains",
    );
}

#[test]
fn values_are_checked() {
    check_error(
        |ruleset| {
            add_rule(
                ruleset,
                Rule::new()
                    .when(Match::in_set(Selector::Saddr6, &set_name("addresses-4")))
                    .drop(),
            )
        },
        "chain endpoint-2, rule 0: expected [Ipv6], found [Ipv4]",
    );
    check_error(
        |ruleset| {
            add_rule(
                ruleset,
                Rule::new()
                    .when(Match::is(Selector::L4proto, port(80)))
                    .drop(),
            )
        },
        "chain endpoint-2, rule 0: expected Proto, found Port",
    );
    check_error(
        |ruleset| add_key(ruleset, "addresses-4", net("10.0.0.0/8")),
        "set addresses-4: 10.0.0.0/8 is a range, but the set has no intervals",
    );
    check_error(
        |ruleset| add_key(ruleset, "nets-4", addresses("11.0.0.5", "11.0.0.6")),
        "set nets-4: 11.0.0.0-11.0.0.5 and 11.0.0.5-11.0.0.6 overlap",
    );
    check_error(
        |ruleset| {
            let key = [net("10.1.0.0/16"), Proto::TCP.into(), Field::from(90..=99)];
            add_key(ruleset, "peers-1", key);
        },
        "set peers-1: 10.0.0.0/8 . tcp . 80-90 and 10.1.0.0/16 . tcp . 90-99 overlap",
    );
    let states = CtState::ESTABLISHED | CtState::RELATED;
    check_error(
        |ruleset| {
            add_rule(
                ruleset,
                Rule::new().inline_vmap(Selector::CtState, [(states, Verdict::Accept)]),
            )
        },
        "chain endpoint-2, rule 0: a packet never has the states established,related at once",
    );
    check_error(
        |ruleset| {
            let marks = Field::range(Datum::Mark(1), Datum::Mark(2));
            add_rule(ruleset, Rule::new().when(Match::is(Selector::Mark, marks)));
        },
        "chain endpoint-2, rule 0: 0x00000001-0x00000002 is a range of a type that has no ranges",
    );
    check_error(
        |ruleset| {
            let mark = MarkSet {
                mask: 0xff,
                value: 0x100,
            };
            add_rule(ruleset, Rule::new().then(Statement::MarkSet(mark)));
        },
        "chain endpoint-2, rule 0: mark 0x100 has bits outside its mask 0xff",
    );
}
