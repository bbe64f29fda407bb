//! Tests of the compiled table as text, and of what a change of the view costs.

mod unions;

use expect_test::expect_file;
use margay_api::endpoint::interface_name;
use margay_api::network::{Encapsulation, NodeInfo};
use margay_api::rule::{Action, PortRange, Protocol};
use margay_api::settings::FelixSettings;
use margay_calc::model::{
    EndpointRecord, Member, PoolRecord, RuleRecord, SetKind as MemberKind, SideMatch, TierBinding,
};

use super::*;
use crate::conformance::{all_dirty, mk_attached};
use crate::nftables::sample::{
    NODE, mk_address, mk_net, mk_packet, mk_pod, mk_policy_key, mk_rule, mk_set_id,
};
use crate::nftables::simulate::{self, Packet};
use margay_nft::{CtState, Hook, IfName};

/// A fresh compiler with this view.
fn fresh(records: &Records, pods: &[usize]) -> Compiler {
    let mut compiler = Compiler::new(NODE);
    compiler.apply(records, &all_dirty(records));
    for number in pods {
        let (interface, pod) = mk_attached(*number);
        compiler.attach(interface, pod, records);
    }
    compiler
}

/// Whether a packet passes the guard and the forward hook, and its log lines.
fn fate(ruleset: &Ruleset, packet: &Packet) -> (bool, Vec<String>) {
    let before_routing = Packet {
        output: None,
        ..packet.clone()
    };
    if !simulate::run(ruleset, Hook::Prerouting, &before_routing).passed {
        return (false, Vec::new());
    }
    let forwarded = simulate::run(ruleset, Hook::Forward, packet);
    (forwarded.passed, forwarded.logged)
}

fn passes(ruleset: &Ruleset, packet: &Packet) -> bool {
    fate(ruleset, packet).0
}

/// Two pods with one policy list, one with none, on a node of a cluster with a tunnel.
fn mk_records() -> Records {
    let set = |members: &[&str]| {
        let members = members.iter().map(|net| Member::Net(mk_net(net))).collect();
        Record::IpSet(IpSetRecord {
            kind: MemberKind::Net,
            members,
        })
    };
    let from = |number: usize| SideMatch {
        sets: vec![mk_set_id(number)],
        ..SideMatch::default()
    };
    let web = RuleRecord {
        protocol: Some(Protocol::TCP),
        source: from(0),
        destination: SideMatch {
            ports: [
                PortRange::single(80),
                PortRange {
                    first: 8000,
                    last: 8080,
                },
            ]
            .into(),
            ..SideMatch::default()
        },
        ..mk_rule(Action::Allow)
    };
    let shun = RuleRecord {
        source: from(1),
        ..mk_rule(Action::Deny)
    };
    let policy = |ingress: Vec<RuleRecord>| {
        Record::Policy(PolicyRecord {
            ingress,
            egress: Vec::new(),
        })
    };
    let endpoint = |number: usize, tiers: Vec<TierBinding>| {
        let (key, addresses) = mk_pod(number);
        let record = EndpointRecord {
            interface: interface_name(&key),
            uid: String::new(),
            addresses,
            tiers,
            unmatched: Action::Allow,
        };
        (RecordId::Endpoint(key), Record::Endpoint(record))
    };
    let tier = |name: &str, default_action, policies: &[usize]| TierBinding {
        name: name.to_owned(),
        default_action,
        ingress: policies
            .iter()
            .map(|number| mk_policy_key(*number))
            .collect(),
        egress: Vec::new(),
    };
    let tiers = vec![
        tier("security", Action::Pass, &[1]),
        tier("default", Action::Deny, &[0]),
    ];
    let node = |ipv4: &str, vtep| NodeInfo {
        ipv4: Some(ipv4.parse().expect("a range")),
        vtep,
        ..NodeInfo::default()
    };
    let vtep = margay_api::network::Vtep {
        address: "10.0.0.9".parse().expect("an address"),
        mac: margay_api::network::Mac([0x66; 6]),
    };
    BTreeMap::from([
        (
            RecordId::Settings,
            Record::Settings(FelixSettings::default()),
        ),
        (
            RecordId::Pool(mk_net("10.0.0.0/16")),
            Record::Pool(PoolRecord {
                nat_outgoing: true,
                encapsulation: Encapsulation::Vxlan,
            }),
        ),
        (
            RecordId::Node(NODE.to_owned()),
            Record::Node(node("192.0.2.1/24", Some(vtep))),
        ),
        (
            RecordId::Node("n2".to_owned()),
            Record::Node(node("192.0.2.2/24", None)),
        ),
        (
            RecordId::IpSet(mk_set_id(0)),
            set(&["10.0.0.1/32", "10.0.0.2/32"]),
        ),
        (
            RecordId::IpSet(mk_set_id(1)),
            set(&["10.0.0.7/32", "198.51.100.0/24", "198.51.100.128/25"]),
        ),
        (RecordId::Policy(mk_policy_key(0)), policy(vec![web])),
        (
            RecordId::Policy(mk_policy_key(1)),
            policy(vec![
                shun,
                RuleRecord {
                    source: from(0),
                    ..mk_rule(Action::Pass)
                },
            ]),
        ),
        endpoint(0, tiers.clone()),
        endpoint(1, tiers),
        endpoint(2, Vec::new()),
    ])
}

/// As [`mk_attached`], IPv4 only.
fn mk_attached4(number: usize) -> (String, Attached) {
    let (interface, pod) = mk_attached(number);
    (
        interface,
        Attached {
            addresses: vec![pod.addresses[0]],
            ..pod
        },
    )
}

fn mk_compiler(records: &Records) -> Compiler {
    let mut compiler = Compiler::new(NODE);
    compiler.apply(records, &all_dirty(records));
    for number in 0..3 {
        let (interface, pod) = mk_attached4(number);
        compiler.attach(interface, pod, records);
    }
    compiler
}

#[test]
fn the_table_of_a_small_node() {
    let records = mk_records();
    let compiler = mk_compiler(&records);
    assert_eq!(compiler.errors(), BTreeMap::new());
    let ruleset = compiler.ruleset(&records);
    assert_eq!(ruleset.check(), Ok(()));
    expect_file!["golden/small.nft"].assert_eq(&ruleset.to_string());
}

#[test]
fn one_member_is_one_element_and_one_rule_is_one_chain() {
    let mut records = mk_records();
    let mut compiler = mk_compiler(&records);
    let id = RecordId::IpSet(mk_set_id(0));
    let member = Member::Net(mk_net("10.0.0.5/32"));
    let Some(Record::IpSet(set)) = records.get_mut(&id) else {
        panic!("the sample has it")
    };
    set.members.insert(member.clone());
    let delta = margay_calc::flush::MemberDelta {
        added: [member].into(),
        removed: BTreeSet::new(),
    };
    let dirty = Dirty {
        records: BTreeSet::new(),
        members: BTreeMap::from([(mk_set_id(0), delta)]),
    };
    let transaction = compiler.apply(&records, &dirty);
    assert_eq!(transaction.ops().len(), 1, "{transaction}");

    let id = RecordId::Policy(mk_policy_key(0));
    let Some(Record::Policy(policy)) = records.get_mut(&id) else {
        panic!("the sample has it")
    };
    policy.ingress[0].protocol = Some(Protocol::UDP);
    let transaction = compiler.apply(
        &records,
        &Dirty {
            records: BTreeSet::from([id]),
            members: BTreeMap::new(),
        },
    );
    let touched: BTreeSet<String> = transaction
        .ops()
        .iter()
        .filter_map(|op| match op {
            TransactionOp::FlushChain(name) | TransactionOp::AppendRules(name, ..) => {
                Some(name.to_string())
            }
            TransactionOp::CreateTable => None,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(touched.len(), 1, "{transaction}");
}

#[test]
fn what_no_policy_can_allow() {
    let records = mk_records();
    let ruleset = mk_compiler(&records).ruleset(&records);
    let usual = mk_packet("10.0.0.2", "192.0.2.200");
    assert!(passes(&ruleset, &usual));
    let cali = |name: &str| IfName::new(name);
    let refused = [
        (
            "another's address",
            Packet {
                source: mk_address("10.0.0.1"),
                ..usual.clone()
            },
        ),
        (
            "an interface that is not known",
            Packet {
                input: cali("cali0123456789a"),
                ..usual.clone()
            },
        ),
        (
            "to an interface that is not known",
            Packet {
                input: cali("eth0"),
                output: cali("cali0123456789a"),
                ..usual.clone()
            },
        ),
        (
            "a tunnel of VXLAN",
            Packet {
                ports: Some((4000, 4789)),
                ..usual.clone()
            },
        ),
        (
            "a tunnel of IP in IP",
            Packet {
                protocol: 4,
                ports: None,
                ..usual.clone()
            },
        ),
        (
            "of no connection",
            Packet {
                state: CtState::INVALID,
                ..usual.clone()
            },
        ),
        ("IPv6 without such pods", mk_packet("fd00::2", "fd00::9:9")),
    ];
    for (what, packet) in refused {
        assert!(!passes(&ruleset, &packet), "{what}");
    }
}

#[test]
fn tunnel_packets_come_from_nodes_only_and_what_leaves_the_pools_is_masqueraded() {
    let vxlan = (17, Some((4000, 4789)), "vxlan.calico", "10.0.0.9");
    let ipip = (4, None, "tunl0", "10.0.0.8");
    tunnels_are_for_nodes(&mk_records(), vxlan);
    let mut records = mk_records();
    records.insert(
        RecordId::Pool(mk_net("10.0.0.0/16")),
        Record::Pool(PoolRecord {
            nat_outgoing: true,
            encapsulation: Encapsulation::IpipCrossSubnet,
        }),
    );
    if let Some(Record::Node(node)) = records.get_mut(&RecordId::Node(NODE.to_owned())) {
        node.ipip = Some([10, 0, 0, 8].into());
    }
    tunnels_are_for_nodes(&records, ipip);
}

fn tunnels_are_for_nodes(
    records: &Records,
    (protocol, ports, device, own): (u8, Option<(u16, u16)>, &str, &str),
) {
    let ruleset = mk_compiler(records).ruleset(records);
    assert_eq!(ruleset.check(), Ok(()));
    let input = |source: &str| {
        let packet = Packet {
            output: None,
            protocol,
            ports,
            ..mk_packet(source, "192.0.2.1")
        };
        simulate::run(&ruleset, Hook::Input, &packet).passed
    };
    assert!(input("192.0.2.2"), "{device}");
    assert!(!input("192.0.2.3"), "{device}");
    let masqueraded =
        |packet: Packet| simulate::run(&ruleset, Hook::Postrouting, &packet).masqueraded;
    assert!(masqueraded(mk_packet("10.0.0.2", "192.0.2.200")));
    assert!(!masqueraded(mk_packet("10.0.0.2", "10.0.3.3")));
    assert!(!masqueraded(mk_packet("192.0.2.200", "10.0.0.2")));
    let tunnel = |source: &str| Packet {
        output: IfName::new(device),
        from_host: true,
        ..mk_packet(source, "10.0.3.3")
    };
    assert!(masqueraded(tunnel("192.0.2.1")), "{device}");
    assert!(!masqueraded(tunnel(own)), "{device}");
}

#[test]
fn what_a_pod_may_send_to_its_node() {
    use margay_api::settings::EndpointToHostAction::{Accept, Drop, Return};
    for (action, expected) in [(Accept, true), (Return, true), (Drop, false)] {
        let mut records = mk_records();
        let settings = FelixSettings {
            endpoint_to_host: action,
            ..FelixSettings::default()
        };
        records.insert(RecordId::Settings, Record::Settings(settings));
        let ruleset = mk_compiler(&records).ruleset(&records);
        let fate = |packet: &Packet| simulate::run(&ruleset, Hook::Input, packet).passed;
        let packet = Packet {
            output: None,
            ..mk_packet("10.0.0.2", "192.0.2.1")
        };
        assert_eq!(fate(&packet), expected, "{action:?}");
        assert!(
            fate(&Packet {
                state: CtState::ESTABLISHED,
                ..packet
            }),
            "{action:?}: an answer to the host"
        );
    }
}

#[test]
fn a_refused_part_closes_what_depends_on_it_and_nothing_else() {
    let records = mk_records();
    let mut compiler = mk_compiler(&records);
    let open = mk_packet("10.0.0.1", "10.0.0.0");
    let open = Packet {
        protocol: 6,
        ports: Some((4000, 80)),
        ..open
    };
    let other = mk_packet("192.0.2.200", "10.0.0.2");
    assert!(passes(&compiler.ruleset(&records), &open));
    compiler.refuse(
        TablePart::Set(mk_set_id(0)),
        "an injected fault".to_owned(),
        &records,
    );
    let ruleset = compiler.ruleset(&records);
    assert_eq!(ruleset.check(), Ok(()));
    assert!(!passes(&ruleset, &open));
    assert!(passes(&ruleset, &other));
    let blamed: Vec<RecordId> = compiler.errors().into_keys().collect();
    let policies = [0, 1].map(|number| RecordId::Policy(mk_policy_key(number)));
    assert_eq!(
        blamed,
        [&[RecordId::IpSet(mk_set_id(0))][..], &policies].concat()
    );
    assert!(compiler.retry_refused(&records));
    assert_eq!(
        compiler.ruleset(&records),
        mk_compiler(&records).ruleset(&records)
    );
    assert_eq!(compiler.errors(), BTreeMap::new());
}

#[test]
fn a_record_decides_for_no_other_pod_of_its_name() {
    let (key, addresses) = mk_pod(0);
    let interface = interface_name(&key);
    let record = |uid: &str| {
        let (interface, uid) = (interface.clone(), uid.to_owned());
        let record = EndpointRecord {
            interface,
            uid,
            addresses: addresses.clone(),
            tiers: Vec::new(),
            unmatched: Action::Allow,
        };
        Records::from([(RecordId::Endpoint(key.clone()), Record::Endpoint(record))])
    };
    let mut compiler = Compiler::new(NODE);
    for (known, attached, decides) in [
        ("u1", "u1", true),
        ("u1", "u2", false),
        ("u2", "u2", true),
        ("", "u1", true),
        ("u1", "", true),
        ("", "", true),
    ] {
        let records = record(known);
        compiler.apply(&records, &all_dirty(&records));
        let pod = Attached {
            endpoint: key.clone(),
            uid: attached.to_owned(),
            addresses: addresses.clone(),
            host_ports: Vec::new(),
        };
        compiler.attach(interface.clone(), pod, &records);
        assert_eq!(
            compiler.has_policy(&interface),
            decides,
            "{known:?} for {attached:?}"
        );
        let dispatched = compiler.ruleset(&records).sets[&names::set(names::RECEIVERS)]
            .elements
            .len();
        assert_eq!(dispatched > 0, decides, "{known:?} for {attached:?}");
    }
}
