//! Tests of the chains of host endpoints: as text, while interfaces come and go, and where nothing
//! can be enforced.

use expect_test::expect_file;
use margay_api::rule::{Action, PortRange, Protocol};
use margay_api::settings::{Failsafe, FelixSettings};
use margay_calc::model::{HostEndpointRecord, HostInterfaces, RuleRecord, SideMatch, TierBinding};

use super::*;
use crate::Links;
use crate::nftables::sample::{
    self, NODE, mk_address, mk_links, mk_net, mk_pod, mk_policy_key, mk_rule, mk_set_id,
};
use crate::nftables::simulate::{Packet, travel};
use margay_nft::{CtState, Hook, IfName};

fn compile(records: &Records, links: &Links) -> Compiler {
    let mut compiler = Compiler::new(NODE);
    compiler.set_links(links.clone());
    compiler.apply(
        records,
        &Dirty {
            records: records.keys().cloned().collect(),
            members: BTreeMap::new(),
        },
    );
    for number in 0..3 {
        let (endpoint, addresses) = mk_pod(number);
        let interface = margay_api::endpoint::interface_name(&endpoint);
        compiler.attach(
            interface,
            Attached {
                endpoint,
                uid: String::new(),
                addresses,
                host_ports: Vec::new(),
            },
            records,
        );
    }
    compiler
}

/// Hooks to the host, through it, and from it.
const WAYS: [&[Hook]; 3] = [
    &[Hook::Prerouting, Hook::Input],
    &[Hook::Prerouting, Hook::Forward],
    &[Hook::Output, Hook::Postrouting],
];

fn mk_tier(policies: &[usize]) -> Vec<TierBinding> {
    let keys: Vec<PolicyKey> = policies
        .iter()
        .map(|number| mk_policy_key(*number))
        .collect();
    let tier = TierBinding {
        name: "default".to_owned(),
        default_action: Action::Deny,
        ingress: keys.clone(),
        egress: keys,
    };
    vec![tier]
}

fn mk_host(interfaces: HostInterfaces) -> HostEndpointRecord {
    HostEndpointRecord {
        interfaces,
        normal: Vec::new(),
        forward: Vec::new(),
        pre_dnat: Vec::new(),
        untracked: Vec::new(),
        unmatched: Action::Deny,
    }
}

/// A node with an endpoint for one interface, and one for all others without policy.
fn mk_records() -> Records {
    let tcp = |port: u16| RuleRecord {
        protocol: Some(Protocol::TCP),
        destination: SideMatch {
            ports: [PortRange::single(port)].into(),
            ..SideMatch::default()
        },
        ..mk_rule(Action::Allow)
    };
    let policy = |rules: Vec<RuleRecord>| {
        Record::Policy(PolicyRecord {
            ingress: rules.clone(),
            egress: rules,
        })
    };
    let shun = RuleRecord {
        source: SideMatch {
            sets: vec![mk_set_id(1)],
            ..SideMatch::default()
        },
        ..mk_rule(Action::Deny)
    };
    let members = BTreeSet::from([margay_calc::model::Member::Net(mk_net("198.51.100.0/24"))]);
    let set = IpSetRecord {
        kind: margay_calc::model::SetKind::Net,
        members,
    };
    let outer = HostEndpointRecord {
        normal: mk_tier(&[0]),
        forward: mk_tier(&[0]),
        pre_dnat: mk_tier(&[1]),
        untracked: mk_tier(&[2]),
        ..mk_host(HostInterfaces::WithAddress(
            [mk_address("192.0.2.1")].into(),
        ))
    };
    let rest = HostEndpointRecord {
        unmatched: Action::Allow,
        ..mk_host(HostInterfaces::All)
    };
    let spared = |port, net: Option<&str>| Failsafe {
        protocol: Protocol::TCP,
        port,
        net: net.map(mk_net),
    };
    let settings = FelixSettings {
        failsafe_inbound: vec![spared(22, None), spared(6443, Some("192.0.2.0/24"))],
        failsafe_outbound: vec![spared(5473, None)],
        ..FelixSettings::default()
    };
    BTreeMap::from([
        (RecordId::Settings, Record::Settings(settings)),
        (RecordId::IpSet(mk_set_id(1)), Record::IpSet(set)),
        (RecordId::Policy(mk_policy_key(0)), policy(vec![tcp(80)])),
        (
            RecordId::Policy(mk_policy_key(1)),
            policy(vec![shun, tcp(8080)]),
        ),
        (RecordId::Policy(mk_policy_key(2)), policy(vec![tcp(5353)])),
        (
            RecordId::HostEndpoint("outer".to_owned()),
            Record::HostEndpoint(outer),
        ),
        (
            RecordId::HostEndpoint("rest".to_owned()),
            Record::HostEndpoint(rest),
        ),
    ])
}

#[test]
fn the_table_of_a_node_with_host_endpoints() {
    let records = mk_records();
    let mut compiler = Compiler::new(NODE);
    compiler.set_links(mk_links());
    compiler.apply(
        &records,
        &Dirty {
            records: records.keys().cloned().collect(),
            members: BTreeMap::new(),
        },
    );
    assert_eq!(compiler.errors(), BTreeMap::new());
    let ruleset = compiler.ruleset(&records);
    assert_eq!(ruleset.check(), Ok(()));
    expect_file!["golden/hosts.nft"].assert_eq(&ruleset.to_string());
}

fn mk_packet(port: u16) -> Packet {
    Packet {
        input: IfName::new("eth0"),
        output: None,
        protocol: 6,
        ports: Some((40_000, port)),
        ..sample::mk_packet("203.0.113.9", "192.0.2.1")
    }
}

#[test]
fn without_host_endpoints_nothing_is_in_the_table_and_with_one_that_no_interface_has_neither() {
    let mut records = mk_records();
    records.retain(|id, _| !matches!(id, RecordId::HostEndpoint(_)));
    let bare = compile(&records, &mk_links()).ruleset(&records);
    let hosts = |ruleset: &Ruleset| {
        ruleset
            .chains
            .keys()
            .filter(|name| name.as_str().starts_with("host-"))
            .count()
    };
    assert_eq!(hosts(&bare), 0);
    let nowhere = mk_host(HostInterfaces::WithAddress(
        [mk_address("192.0.2.77")].into(),
    ));
    let id = RecordId::HostEndpoint("nowhere".to_owned());
    records.insert(id.clone(), Record::HostEndpoint(nowhere));
    let mut compiler = compile(&records, &mk_links());
    assert_eq!(hosts(&compiler.ruleset(&records)), 0);
    assert!(
        compiler.errors()[&id].contains("expectedIPs"),
        "{:?}",
        compiler.errors()
    );
    compiler.set_links(Links::from([(
        "eth7".to_owned(),
        [mk_address("192.0.2.77")].into(),
    )]));
    assert_eq!(compiler.errors(), BTreeMap::new());
    let comes = |interface: &str| {
        let packet = Packet {
            input: IfName::new(interface),
            ..mk_packet(80)
        };
        travel(&compiler.ruleset(&records), &packet, WAYS[0]).0
    };
    assert!(!comes("eth7"), "nothing lets it in");
    assert!(comes("eth0"), "the endpoint is another interface's");
}

#[test]
fn of_two_for_one_interface_the_first_by_name_is_enforced_and_the_other_reported() {
    let open = |interfaces| HostEndpointRecord {
        unmatched: Action::Allow,
        ..mk_host(interfaces)
    };
    let named = || HostInterfaces::Named("eth0".to_owned());
    let id = |name: &str| RecordId::HostEndpoint(name.to_owned());
    let records = BTreeMap::from([
        (id("a"), Record::HostEndpoint(open(named()))),
        (id("b"), Record::HostEndpoint(mk_host(named()))),
        (id("c"), Record::HostEndpoint(mk_host(HostInterfaces::All))),
        (id("d"), Record::HostEndpoint(open(HostInterfaces::All))),
        (
            id("e"),
            Record::HostEndpoint(mk_host(HostInterfaces::Named("cali0".to_owned()))),
        ),
    ]);
    let compiler = compile(&records, &mk_links());
    let reported: Vec<RecordId> = compiler.errors().into_keys().collect();
    assert_eq!(reported, ["b", "d", "e"].map(id));
    let ruleset = compiler.ruleset(&records);
    let comes = |interface: &str| {
        travel(
            &ruleset,
            &Packet {
                input: IfName::new(interface),
                ..mk_packet(80)
            },
            WAYS[0],
        )
        .0
    };
    assert!(comes("eth0") && !comes("eth1") && comes("lo"));
}

/// However a policy is lost, the node keeps its failsafe ports, and what the policy might have
/// denied is denied.
#[test]
fn failsafes_stay_open_when_nothing_can_be_enforced() {
    let whole = mk_records();
    let passes = |compiler: &Compiler, records: &Records, packet: &Packet| {
        travel(&compiler.ruleset(records), packet, WAYS[0]).0
    };
    let mut missing = whole.clone();
    missing.retain(|id, _| !matches!(id, RecordId::Policy(_)));
    let mut refused = compile(&whole, &mk_links());
    let classes: Vec<TablePart> = refused
        .classes
        .keys()
        .map(|class| TablePart::Class(Class::clone(class)))
        .collect();
    classes
        .into_iter()
        .for_each(|part| refused.refuse(part, "an injected fault".to_owned(), &whole));
    let cases = [
        ("whole", compile(&whole, &mk_links()), &whole, true),
        (
            "policies are missing",
            compile(&missing, &mk_links()),
            &missing,
            false,
        ),
        ("the kernel refuses", refused, &whole, false),
    ];
    for (what, compiler, records, web) in cases {
        assert!(passes(&compiler, records, &mk_packet(22)), "{what}: ssh");
        assert_eq!(
            passes(&compiler, records, &mk_packet(80)),
            web,
            "{what}: web"
        );
        let near = Packet {
            source: mk_address("192.0.2.50"),
            ..mk_packet(6443)
        };
        assert!(
            passes(&compiler, records, &near),
            "{what}: the API server from the net that may"
        );
        assert!(
            !passes(&compiler, records, &mk_packet(6443)),
            "{what}: the API server from elsewhere"
        );
        let answer = Packet {
            ports: Some((5473, 40_000)),
            state: CtState::ESTABLISHED,
            ..mk_packet(0)
        };
        assert!(
            passes(&compiler, records, &answer),
            "{what}: an answer of typha"
        );
        let asks = Packet {
            input: None,
            output: IfName::new("eth0"),
            source: mk_address("192.0.2.1"),
            destination: mk_address("203.0.113.9"),
            ..mk_packet(5473)
        };
        assert!(
            travel(&compiler.ruleset(records), &asks, WAYS[2]).0,
            "{what}: to typha"
        );
        let translated = Packet {
            translated: true,
            ..asks.clone()
        };
        assert!(
            travel(&compiler.ruleset(records), &translated, WAYS[2]).0,
            "{what}: to typha's Service"
        );
        let other = Packet {
            ports: Some((40_000, 9)),
            ..asks
        };
        assert!(
            !travel(&compiler.ruleset(records), &other, WAYS[2]).0,
            "{what}: elsewhere"
        );
    }
}

#[test]
fn one_host_endpoint_more_touches_its_own_chains_and_elements() {
    let mut records = mk_records();
    let mut compiler = compile(&records, &mk_links());
    let id = RecordId::HostEndpoint("new".to_owned());
    let host = HostEndpointRecord {
        normal: mk_tier(&[1]),
        ..mk_host(HostInterfaces::Named("eth1".to_owned()))
    };
    records.insert(id.clone(), Record::HostEndpoint(host));
    let transaction = compiler.apply(
        &records,
        &Dirty {
            records: BTreeSet::from([id]),
            members: BTreeMap::new(),
        },
    );
    for op in transaction.ops() {
        match op {
            TransactionOp::FlushChain(name) | TransactionOp::DeleteChain(name) => {
                panic!("{name}\n{transaction}")
            }
            TransactionOp::AddElements(name, set) => {
                assert!(
                    name.as_str().starts_with("host-") && set.elements.len() == 2,
                    "{transaction}"
                );
            }
            TransactionOp::DeleteElements(..) | TransactionOp::DeleteSet(_) => {
                panic!("{transaction}")
            }
            _ => {}
        }
    }
}
