//! What large rules and large policies take, and what becomes of those that take too much.

use margay_api::endpoint::interface_name;
use margay_api::rule::{Action, PortRange, Protocol};
use margay_calc::model::{EndpointRecord, Member, RuleRecord, SetKind as MemberKind, SideMatch, TierBinding};

use super::*;
use crate::nftables::sample::{NODE, mk_address, mk_net, mk_packet, mk_pod, mk_policy_key, mk_rule};
use crate::nftables::simulate::{self, Packet};
use margay_nft::Hook;

/// Pod 0 under a policy of these rules, pod 1 under one that allows everything.
fn mk_records(rules: Vec<RuleRecord>) -> Records {
    let mut records = Records::new();
    for (number, rules) in [rules, vec![mk_rule(Action::Allow)]].into_iter().enumerate() {
        let policy = PolicyRecord { ingress: rules, egress: Vec::new() };
        records.insert(RecordId::Policy(mk_policy_key(number)), Record::Policy(policy));
        let (key, addresses) = mk_pod(number);
        let tiers = vec![TierBinding {
            name: "t".to_owned(),
            default_action: Action::Deny,
            ingress: vec![mk_policy_key(number)],
            egress: Vec::new(),
        }];
        let (interface, uid) = (interface_name(&key), String::new());
        let endpoint = EndpointRecord { interface, uid, addresses, tiers, unmatched: Action::Allow };
        records.insert(RecordId::Endpoint(key), Record::Endpoint(endpoint));
    }
    records
}

fn mk_compiler(records: &Records) -> Compiler {
    let mut compiler = Compiler::new(NODE);
    compiler.apply(records, &Dirty { records: records.keys().cloned().collect(), members: BTreeMap::new() });
    for number in 0..2 {
        let (endpoint, addresses) = mk_pod(number);
        let (interface, uid) = (interface_name(&endpoint), String::new());
        compiler.attach(interface, Attached { endpoint, uid, addresses }, records);
    }
    compiler
}

/// Rules of the table that pods' policies take.
fn rules_of_classes(compiler: &Compiler) -> usize {
    let chains = compiler.wanted.chains.values();
    chains.filter(|chain| chain.base.is_none()).map(|chain| chain.rules.len()).sum()
}

/// `ports` named ports on both sides, of peers that are ranges and addresses.
fn mk_named(records: &mut Records, ports: usize, action: Action) -> RuleRecord {
    let peers = SetId("s:peers".to_owned());
    let members = ["192.0.2.0/24", "203.0.113.7/32", "10.0.0.0/32"].map(|net| Member::Net(mk_net(net)));
    let record = IpSetRecord { kind: MemberKind::Net, members: members.into() };
    records.insert(RecordId::IpSet(peers.clone()), Record::IpSet(record));
    let mut named = |side: &str, address: &str, first: u16| -> Arc<[SetId]> {
        (0..ports)
            .map(|number| {
                let id = SetId(format!("n:{side}{number}"));
                let port = first + u16::try_from(number).expect("few");
                let members = BTreeSet::from([Member::AddressPort(mk_address(address), Protocol::TCP, port)]);
                let record = IpSetRecord { kind: MemberKind::AddressPort, members };
                records.insert(RecordId::IpSet(id.clone()), Record::IpSet(record));
                id
            })
            .collect()
    };
    let other: Arc<[PortRange]> = [PortRange::single(9)].into();
    let (from, to) = (named("from", "192.0.2.9", 1000), named("to", "10.0.0.0", 2000));
    let side =
        |port_sets| SideMatch { sets: vec![peers.clone()], ports: other.clone(), port_sets, ..SideMatch::default() };
    RuleRecord { protocol: Some(Protocol::TCP), source: side(from), destination: side(to), ..mk_rule(action) }
}

#[test]
fn named_ports_of_both_sides_take_as_many_rules_as_there_are_ports() {
    for (action, behind, expected) in [
        (Action::Allow, Action::Deny, true),
        (Action::Deny, Action::Allow, false),
        (Action::Pass, Action::Deny, true),
        (Action::Log, Action::Deny, false),
    ] {
        let mut sets = Records::new();
        let rule = mk_named(&mut sets, 50, action);
        let mut records = mk_records(vec![rule, mk_rule(behind)]);
        records.extend(sets);
        let compiler = mk_compiler(&records);
        let rules = rules_of_classes(&compiler);
        // For each of two families.
        assert!((200..250).contains(&rules), "{action:?}: {rules} rules");
        let ruleset = compiler.ruleset(&records);
        assert_eq!(ruleset.check(), Ok(()));
        for (source, ports, meets) in [
            ("192.0.2.9", (1049, 2049), true),
            ("192.0.2.9", (1000, 2000), true),
            ("192.0.2.9", (9, 2007), true),
            ("192.0.2.8", (9, 9), true),
            ("203.0.113.7", (9, 2000), true),
            ("192.0.2.8", (1000, 2000), false),
            ("192.0.2.9", (1050, 2000), false),
            ("192.0.2.9", (1000, 2050), false),
            ("198.51.100.1", (9, 9), false),
        ] {
            // Whatever others have written into the mark, a rule that passes is met by what it is about.
            for mark in [0, 0x40000, u32::MAX] {
                let packet = Packet { protocol: 6, ports: Some(ports), mark, ..mk_packet(source, "10.0.0.0") };
                let fate = simulate::run(&ruleset, Hook::Forward, &packet);
                let wanted = if meets { expected } else { behind == Action::Allow };
                assert_eq!(fate.passed, wanted, "{action:?} {packet:?}\n{ruleset}");
                assert_eq!(fate.logged.len(), usize::from(meets && action == Action::Log), "{action:?} {packet:?}");
            }
        }
    }
}

#[test]
fn a_policy_beyond_the_bound_is_closed_and_costs_the_others_nothing() {
    let ports: Arc<[PortRange]> = (0..1000).map(|port| PortRange::single(2 * port)).collect();
    let rule = |number: u8| RuleRecord {
        protocol: Some(Protocol::TCP),
        source: SideMatch { nets: vec![mk_net(&format!("10.{number}.0.0/16"))], ..SideMatch::default() },
        destination: SideMatch { ports: ports.clone(), ..SideMatch::default() },
        ..mk_rule(Action::Allow)
    };
    for (count, is_closed) in [(100_u8, false), (200, true)] {
        let records = mk_records((0..count).map(rule).collect());
        let compiler = mk_compiler(&records);
        let errors = compiler.errors();
        assert_eq!(errors.contains_key(&RecordId::Policy(mk_policy_key(0))), is_closed, "{errors:?}");
        assert!(errors.values().all(|reason| reason.contains("131072")), "{errors:?}");
        let ruleset = compiler.ruleset(&records);
        let meets = Packet { protocol: 6, ports: Some((1, 8)), ..mk_packet("10.7.0.1", "10.0.0.0") };
        assert_eq!(simulate::run(&ruleset, Hook::Forward, &meets).passed, !is_closed);
        let other = Packet { protocol: 6, ports: Some((1, 7)), ..mk_packet("10.7.0.1", "10.0.0.1") };
        assert!(simulate::run(&ruleset, Hook::Forward, &other).passed);
    }
}

#[test]
fn the_largest_part_of_a_transaction_is_found() {
    let mut sets = Records::new();
    let rule = mk_named(&mut sets, 50, Action::Allow);
    let mut records = mk_records(vec![rule]);
    records.extend(sets);
    let mut compiler = mk_compiler(&records);
    let whole = Transaction::replace(&compiler.ruleset(&records));
    let parts = compiler.largest(&whole, 2);
    let Part::Class(class) = &parts[0] else { panic!("{parts:?}") };
    assert!(class.policies().eq([&mk_policy_key(0)]));
    compiler.refuse(parts[0].clone(), "no room".to_owned(), &records);
    assert!(!compiler.largest(&whole, 100).contains(&parts[0]));
    assert!(rules_of_classes(&compiler) < 10);
}
