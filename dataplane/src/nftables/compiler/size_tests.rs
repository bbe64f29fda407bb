//! Tests of the size of large rules and policies, and of policies that are too large.

use std::borrow::Cow;

use margay_api::endpoint::{NamedPort, WorkloadEndpoint, interface_name};
use margay_api::meta::Labels;
use margay_api::policy::{Order, Policy, Tier, Traffic};
use margay_api::rule::{Action, EntityMatch, Port, PortRange, Protocol, Rule};
use margay_api::selector::Selector;
use margay_calc::graph::Graph;
use margay_calc::model::{
    EndpointRecord, Member, RuleRecord, SetKind as MemberKind, SideMatch, TierBinding,
};
use margay_calc::update::Update;

use super::*;
use crate::nftables::sample::{
    NODE, mk_address, mk_net, mk_packet, mk_pod, mk_policy_key, mk_rule,
};
use crate::nftables::simulate::{self, Packet};
use crate::nftables::stage::Direction;
use margay_nft::Hook;

/// Pod 0 has a policy with these rules, pod 1 one that allows everything.
fn mk_records(rules: Vec<RuleRecord>) -> Records {
    let mut records = Records::new();
    for (number, rules) in [rules, vec![mk_rule(Action::Allow)]]
        .into_iter()
        .enumerate()
    {
        let policy = PolicyRecord {
            ingress: rules,
            egress: Vec::new(),
        };
        records.insert(
            RecordId::Policy(mk_policy_key(number)),
            Record::Policy(policy),
        );
        let (key, addresses) = mk_pod(number);
        let tiers = vec![TierBinding {
            name: "t".to_owned(),
            default_action: Action::Deny,
            ingress: vec![mk_policy_key(number)],
            egress: Vec::new(),
        }];
        let (interface, uid) = (interface_name(&key), String::new());
        let endpoint = EndpointRecord {
            interface,
            uid,
            addresses,
            tiers,
            unmatched: Action::Allow,
        };
        records.insert(RecordId::Endpoint(key), Record::Endpoint(endpoint));
    }
    records
}

fn mk_compiler(records: &Records) -> Compiler {
    let mut compiler = Compiler::new(NODE);
    compiler.apply(
        records,
        &Dirty {
            records: records.keys().cloned().collect(),
            members: BTreeMap::new(),
        },
    );
    for number in 0..2 {
        let (endpoint, addresses) = mk_pod(number);
        let (interface, uid) = (interface_name(&endpoint), String::new());
        compiler.attach(
            interface,
            Attached {
                endpoint,
                uid,
                addresses,
                host_ports: Vec::new(),
            },
            records,
        );
    }
    compiler
}

/// Number of rules of pods' policies in the table.
fn rules_of_classes(compiler: &Compiler) -> usize {
    let chains = compiler.wanted.chains.values();
    chains
        .filter(|chain| chain.base.is_none())
        .map(|chain| chain.rules.len())
        .sum()
}

/// `ports` named ports on both sides, of peers that are ranges and addresses.
fn mk_named(records: &mut Records, ports: usize, action: Action) -> RuleRecord {
    let peers = SetId("s:peers".to_owned());
    let members =
        ["192.0.2.0/24", "203.0.113.7/32", "10.0.0.0/32"].map(|net| Member::Net(mk_net(net)));
    let record = IpSetRecord {
        kind: MemberKind::Net,
        members: members.into(),
    };
    records.insert(RecordId::IpSet(peers.clone()), Record::IpSet(record));
    let mut named = |side: &str, address: &str, first: u16| -> Arc<[SetId]> {
        (0..ports)
            .map(|number| {
                let id = SetId(format!("n:{side}{number}"));
                let port = first + u16::try_from(number).expect("few");
                let members = BTreeSet::from([Member::AddressPort(
                    mk_address(address),
                    Protocol::TCP,
                    port,
                )]);
                let record = IpSetRecord {
                    kind: MemberKind::AddressPort,
                    members,
                };
                records.insert(RecordId::IpSet(id.clone()), Record::IpSet(record));
                id
            })
            .collect()
    };
    let other: Arc<[PortRange]> = [PortRange::single(9)].into();
    let (from, to) = (
        named("from", "192.0.2.9", 1000),
        named("to", "10.0.0.0", 2000),
    );
    let side = |port_sets| SideMatch {
        sets: vec![peers.clone()],
        ports: other.clone(),
        port_sets,
        ..SideMatch::default()
    };
    RuleRecord {
        protocol: Some(Protocol::TCP),
        source: side(from),
        destination: side(to),
        ..mk_rule(action)
    }
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
            // Whatever the mark contains, a rule that passes matches the same packets.
            for mark in [0, 0x40000, u32::MAX] {
                let packet = Packet {
                    protocol: 6,
                    ports: Some(ports),
                    mark,
                    ..mk_packet(source, "10.0.0.0")
                };
                let fate = simulate::run(&ruleset, Hook::Forward, &packet);
                let wanted = if meets {
                    expected
                } else {
                    behind == Action::Allow
                };
                assert_eq!(fate.passed, wanted, "{action:?} {packet:?}\n{ruleset}");
                assert_eq!(
                    fate.logged.len(),
                    usize::from(meets && action == Action::Log),
                    "{action:?} {packet:?}"
                );
            }
        }
    }
}

/// The view of node `n1` for a policy whose rules have this many peers in a direction, each rule
/// with this many named ports. Each peer is a pod elsewhere that has one of the ports; the policy's
/// own pod has all.
fn mk_view(direction: Direction, peers: usize, names: usize) -> Records {
    let select = |app: &str| Selector::parse(&format!("app == '{app}'")).expect("a selector");
    let ports: Arc<[Port]> = (0..names)
        .map(|number| Port::Named(format!("p{number}")))
        .collect();
    let rule = |number: usize| {
        let peer = EntityMatch {
            selector: Some(select(&format!("a{number}"))),
            ..EntityMatch::default()
        };
        let (source, destination) = match direction {
            Direction::Ingress => (
                peer,
                EntityMatch {
                    ports: ports.clone(),
                    ..EntityMatch::default()
                },
            ),
            Direction::Egress => (
                EntityMatch::default(),
                EntityMatch {
                    ports: ports.clone(),
                    ..peer
                },
            ),
        };
        Rule {
            protocol: Some(Protocol::TCP),
            source,
            destination,
            ..Rule::any(Action::Allow)
        }
    };
    let rules: Vec<Rule> = (0..peers).map(rule).collect();
    let is_ingress = direction == Direction::Ingress;
    let (ingress, egress) = if is_ingress {
        (rules, Vec::new())
    } else {
        (Vec::new(), rules)
    };
    let policy = Policy {
        tier: "t".to_owned(),
        order: Order(None),
        selector: select("own"),
        traffic: Traffic::Normal,
        applies_ingress: is_ingress,
        applies_egress: !is_ingress,
        ingress,
        egress,
    };
    let mut graph = Graph::default();
    let tier = Tier {
        order: Order(None),
        default_action: Action::Deny,
    };
    graph.apply(Update::Tier(policy.tier.clone(), Some(tier)));
    graph.apply(Update::Namespace(
        "x".to_owned(),
        Some(Labels::new().into()),
    ));
    graph.apply(Update::Policy(mk_policy_key(0), Some(policy)));
    let port = |number: usize| {
        let port = 1000 + u16::try_from(number).expect("few");
        NamedPort {
            name: format!("p{number}"),
            protocol: Protocol::TCP,
            port,
        }
    };
    let mut pod = |number: usize, node: &str, app: String, ports: Vec<NamedPort>| {
        let (key, addresses) = mk_pod(number);
        let labels = Labels::from([("app".to_owned(), app)]);
        let (interface, uid, service_account) =
            (interface_name(&key), String::new(), String::new());
        let endpoint = WorkloadEndpoint {
            node: node.to_owned(),
            labels,
            service_account,
            addresses,
            ports,
            uid,
            interface,
        };
        graph.apply(Update::Endpoint(key, Some(endpoint)));
    };
    pod(0, NODE, "own".to_owned(), (0..names).map(port).collect());
    for number in 0..peers {
        pod(
            1 + number,
            "elsewhere",
            format!("a{number}"),
            vec![port(number % names)],
        );
    }
    graph.flush();
    let view = graph.view(NODE);
    let record =
        |id: Cow<'_, RecordId>| Some((id.clone().into_owned(), view.record(&id)?.into_owned()));
    view.ids().filter_map(record).collect()
}

/// Named ports are one set per side of a rule, so that neither rules nor sets nor elements
/// multiply.
#[test]
fn peers_and_named_ports_are_added_and_not_multiplied() {
    for direction in [Direction::Ingress, Direction::Egress] {
        for (peers, names) in [(1, 1), (1, 60), (60, 1), (30, 30), (60, 60)] {
            let records = mk_view(direction, peers, names);
            let sets = records
                .values()
                .filter(|record| matches!(record, Record::IpSet(_)))
                .count();
            let mut compiler = Compiler::new(NODE);
            let all = Dirty {
                records: records.keys().cloned().collect(),
                members: BTreeMap::new(),
            };
            compiler.apply(&records, &all);
            let (endpoint, addresses) = mk_pod(0);
            compiler.attach(
                interface_name(&endpoint),
                Attached {
                    endpoint,
                    uid: String::new(),
                    addresses,
                    host_ports: Vec::new(),
                },
                &records,
            );
            let rules = rules_of_classes(&compiler);
            let ruleset = compiler.ruleset(&records);
            let elements: usize = ruleset.sets.values().map(|set| set.elements.len()).sum();
            let what = format!("{direction:?} of {peers} peers and {names} ports");
            // Each peer is a set of addresses, and for egress one of its ports.
            assert!(sets <= 2 * peers + 1, "{what}: {sets} sets in the view");
            // For each of two families, including the last rule of each chain.
            assert!(rules <= 4 * peers + 20, "{what}: {rules} rules");
            assert!(
                ruleset.sets.len() <= 4 * peers + 20,
                "{what}: {} sets",
                ruleset.sets.len()
            );
            // An address of each family.
            assert!(
                elements <= 8 * (peers + names) + 40,
                "{what}: {elements} elements"
            );
        }
    }
}

#[test]
fn a_policy_beyond_the_bound_is_closed_and_costs_the_others_nothing() {
    let ports: Arc<[PortRange]> = (0..1000).map(|port| PortRange::single(2 * port)).collect();
    let rule = |number: u8| RuleRecord {
        protocol: Some(Protocol::TCP),
        source: SideMatch {
            nets: vec![mk_net(&format!("10.{number}.0.0/16"))],
            ..SideMatch::default()
        },
        destination: SideMatch {
            ports: ports.clone(),
            ..SideMatch::default()
        },
        ..mk_rule(Action::Allow)
    };
    for (count, is_closed) in [(100_u8, false), (200, true)] {
        let records = mk_records((0..count).map(rule).collect());
        let compiler = mk_compiler(&records);
        let errors = compiler.errors();
        assert_eq!(
            errors.contains_key(&RecordId::Policy(mk_policy_key(0))),
            is_closed,
            "{errors:?}"
        );
        assert!(
            errors.values().all(|reason| reason.contains("131072")),
            "{errors:?}"
        );
        let ruleset = compiler.ruleset(&records);
        let meets = Packet {
            protocol: 6,
            ports: Some((1, 8)),
            ..mk_packet("10.7.0.1", "10.0.0.0")
        };
        assert_eq!(
            simulate::run(&ruleset, Hook::Forward, &meets).passed,
            !is_closed
        );
        let other = Packet {
            protocol: 6,
            ports: Some((1, 7)),
            ..mk_packet("10.7.0.1", "10.0.0.1")
        };
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
    let parts = compiler.largest_parts(&whole, 2);
    let TablePart::Class(class) = &parts[0] else {
        panic!("{parts:?}")
    };
    assert!(class.policies().eq([&mk_policy_key(0)]));
    compiler.refuse(parts[0].clone(), "no room".to_owned(), &records);
    assert!(!compiler.largest_parts(&whole, 100).contains(&parts[0]));
    assert!(rules_of_classes(&compiler) < 10);
}
