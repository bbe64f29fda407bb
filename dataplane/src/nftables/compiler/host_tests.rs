//! Tests that the chains of host endpoints decide as the reference evaluator.

use expect_test::expect_file;
use margay_api::endpoint::EndpointKey;
use margay_api::network::{Failsafe, FelixSettings};
use margay_api::rule::{Action, PortRange, Protocol};
use margay_calc::evaluate::{Direction, HostStage};
use margay_calc::model::{HostEndpointRecord, HostInterfaces, RuleRecord, SideMatch, TierBinding};
use proptest::prelude::*;

use super::*;
use crate::Links;
use crate::nftables::sample::{self, NODE, mk_address, mk_links, mk_net, mk_pod, mk_policy_key, mk_rule, mk_set_id};
use crate::nftables::simulate::{self, Packet};
use margay_nft::{CtState, Hook};

fn compile(records: &Records, links: &Links) -> Compiler {
    let mut compiler = Compiler::new(NODE);
    compiler.set_links(links.clone());
    compiler.apply(records, &Dirty { records: records.keys().cloned().collect(), members: BTreeMap::new() });
    for number in 0..3 {
        let (endpoint, addresses) = mk_pod(number);
        let interface = margay_api::endpoint::interface_name(&endpoint);
        compiler.attach(interface, Attached { endpoint, uid: String::new(), addresses }, records);
    }
    compiler
}

/// Whether a packet passes the hooks on its way, and its log lines.
fn travel(ruleset: &Ruleset, packet: &Packet, way: &[Hook]) -> (bool, Vec<String>) {
    let (mut packet, mut logged) = (packet.clone(), Vec::new());
    for hook in way {
        let there = match hook {
            Hook::Prerouting | Hook::Input => Packet { output: None, ..packet.clone() },
            _ => packet.clone(),
        };
        let fate = simulate::run(ruleset, *hook, &there);
        logged.extend(fate.logged);
        if !fate.passed {
            return (false, logged);
        }
        packet.mark = fate.mark;
        if fate.untracked {
            // Packets without a connection are not translated.
            (packet.state, packet.translated) = (CtState::UNTRACKED, false);
        }
    }
    (true, logged)
}

/// The host endpoint of an interface, computed independently of the compiler.
fn owner(records: &Records, links: &Links, interface: IfName) -> Option<String> {
    let hosts = || {
        records.iter().filter_map(|(id, record)| match (id, record) {
            (RecordId::HostEndpoint(name), Record::HostEndpoint(host)) => Some((name, &host.interfaces)),
            _ => None,
        })
    };
    let name = interface.as_str();
    if name == "lo" || name.starts_with("cali") {
        return None;
    }
    let own = hosts().find(|(_, interfaces)| match interfaces {
        HostInterfaces::All => false,
        HostInterfaces::Named(wanted) => wanted == name,
        HostInterfaces::WithAddress(wanted) => {
            links.get(name).is_some_and(|own| own.iter().any(|address| wanted.contains(address)))
        }
    });
    let other = || hosts().find(|(_, interfaces)| **interfaces == HostInterfaces::All);
    own.or_else(other).map(|(name, _)| name.clone())
}

/// Expected verdict of a packet, stage by stage.
struct Oracle<'a> {
    view: &'a Records,
    packet: &'a Packet,
    /// Host endpoints of its input and output interface.
    ends: [Option<String>; 2],
    accepted: bool,
    reports: Vec<String>,
}

impl Oracle<'_> {
    /// Whether it passes this stage.
    fn host(&mut self, stage: HostStage, direction: Direction) -> bool {
        let end = &self.ends[usize::from(direction == Direction::Egress)];
        let (Some(host), false) = (end, self.accepted) else { return true };
        let (action, reports) = sample::decides_at_host(self.view, host, stage, direction, self.packet);
        self.reports.extend(reports);
        let goes_on = matches!(stage, HostStage::Untracked | HostStage::PreDnat);
        self.accepted = goes_on && action == Action::Allow;
        action != Action::Deny
    }

    fn pod(&mut self, address: IpAddr, direction: Direction) -> bool {
        let Some(pod) = pod_of(address) else { return true };
        let (allowed, reports) = sample::decides(self.view, &pod, direction, self.packet);
        self.reports.extend(reports);
        allowed
    }
}

fn pod_of(address: IpAddr) -> Option<EndpointKey> {
    (0..3).map(mk_pod).find(|(_, addresses)| addresses.contains(&address)).map(|(key, _)| key)
}

/// Expected result of a packet by the records.
fn oracle(view: &Records, links: &Links, packet: &Packet, way: &[Hook]) -> (bool, Vec<String>) {
    use Direction::{Egress, Ingress};
    let owner = |interface: Option<IfName>| interface.and_then(|interface| owner(view, links, interface));
    let ends = [owner(packet.input), owner(packet.output)];
    let mut oracle = Oracle { view, packet, ends, accepted: false, reports: Vec::new() };
    let passed = match way.last() {
        Some(Hook::Input) => {
            oracle.host(HostStage::Untracked, Ingress)
                && oracle.host(HostStage::PreDnat, Ingress)
                && oracle.host(HostStage::Normal, Ingress)
        }
        Some(Hook::Forward) => {
            oracle.host(HostStage::Untracked, Ingress)
                && oracle.host(HostStage::PreDnat, Ingress)
                && oracle.host(HostStage::Forward, Ingress)
                && oracle.pod(packet.source, Egress)
                && oracle.pod(packet.destination, Ingress)
                && oracle.host(HostStage::Forward, Egress)
        }
        _ => oracle.host(HostStage::Untracked, Egress) && oracle.host(HostStage::Normal, Egress),
    };
    (passed, oracle.reports)
}

const WAYS: [&[Hook]; 3] =
    [&[Hook::Prerouting, Hook::Input], &[Hook::Prerouting, Hook::Forward], &[Hook::Output, Hook::Postrouting]];

/// A packet with one of these input interfaces, and one of these output interfaces unless its
/// destination is a pod.
fn packet() -> impl Strategy<Value = (Packet, &'static [Hook])> {
    let outside = || prop::sample::select(vec!["eth0", "eth1", "eth2"]);
    (sample::packet(), outside(), outside(), prop::sample::select(WAYS.to_vec()), any::<bool>()).prop_map(
        |(packet, input, output, way, translated)| {
            let end = |address, outside: &str| match pod_of(address) {
                Some(_) => sample::interface_of(address),
                None => IfName::new(outside),
            };
            let packet = match way.last() {
                Some(Hook::Input) => Packet { input: IfName::new(input), output: None, ..packet },
                Some(Hook::Forward) => {
                    let (input, output) = (end(packet.source, input), end(packet.destination, output));
                    Packet { input, output, ..packet }
                }
                _ => {
                    let output = end(packet.destination, output);
                    Packet { input: None, output, translated, from_host: true, ..packet }
                }
            };
            (packet, way)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn a_packet_fares_at_host_endpoints_as_the_records_say(
        view in sample::host_view(),
        packets in prop::collection::vec(packet(), 60),
    ) {
        let links = mk_links();
        let ruleset = compile(&view, &links).ruleset(&view);
        prop_assert_eq!(ruleset.check(), Ok(()));
        for (packet, way) in packets {
            // Packets of a pod to its node are not subject to host endpoints.
            let from_pod = pod_of(packet.source).is_some();
            if from_pod && !matches!(way.last(), Some(Hook::Forward)) {
                continue;
            }
            let (passed, reports) = oracle(&view, &links, &packet, way);
            prop_assert_eq!(travel(&ruleset, &packet, way), (passed, reports), "{:?}\n{}", packet, ruleset);
        }
    }
}

fn mk_tier(policies: &[usize]) -> Vec<TierBinding> {
    let keys: Vec<PolicyKey> = policies.iter().map(|number| mk_policy_key(*number)).collect();
    let tier =
        TierBinding { name: "default".to_owned(), default_action: Action::Deny, ingress: keys.clone(), egress: keys };
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
        destination: SideMatch { ports: [PortRange::single(port)].into(), ..SideMatch::default() },
        ..mk_rule(Action::Allow)
    };
    let policy = |rules: Vec<RuleRecord>| Record::Policy(PolicyRecord { ingress: rules.clone(), egress: rules });
    let shun =
        RuleRecord { source: SideMatch { sets: vec![mk_set_id(1)], ..SideMatch::default() }, ..mk_rule(Action::Deny) };
    let members = BTreeSet::from([margay_calc::model::Member::Net(mk_net("198.51.100.0/24"))]);
    let set = IpSetRecord { kind: margay_calc::model::SetKind::Net, members };
    let outer = HostEndpointRecord {
        normal: mk_tier(&[0]),
        forward: mk_tier(&[0]),
        pre_dnat: mk_tier(&[1]),
        untracked: mk_tier(&[2]),
        ..mk_host(HostInterfaces::WithAddress([mk_address("192.0.2.1")].into()))
    };
    let rest = HostEndpointRecord { unmatched: Action::Allow, ..mk_host(HostInterfaces::All) };
    let spared = |port, net: Option<&str>| Failsafe { protocol: Protocol::TCP, port, net: net.map(mk_net) };
    let settings = FelixSettings {
        failsafe_inbound: vec![spared(22, None), spared(6443, Some("192.0.2.0/24"))],
        failsafe_outbound: vec![spared(5473, None)],
        ..FelixSettings::default()
    };
    BTreeMap::from([
        (RecordId::Settings, Record::Settings(settings)),
        (RecordId::IpSet(mk_set_id(1)), Record::IpSet(set)),
        (RecordId::Policy(mk_policy_key(0)), policy(vec![tcp(80)])),
        (RecordId::Policy(mk_policy_key(1)), policy(vec![shun, tcp(8080)])),
        (RecordId::Policy(mk_policy_key(2)), policy(vec![tcp(5353)])),
        (RecordId::HostEndpoint("outer".to_owned()), Record::HostEndpoint(outer)),
        (RecordId::HostEndpoint("rest".to_owned()), Record::HostEndpoint(rest)),
    ])
}

#[test]
fn the_table_of_a_node_with_host_endpoints() {
    let records = mk_records();
    let mut compiler = Compiler::new(NODE);
    compiler.set_links(mk_links());
    compiler.apply(&records, &Dirty { records: records.keys().cloned().collect(), members: BTreeMap::new() });
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
    let hosts = |ruleset: &Ruleset| ruleset.chains.keys().filter(|name| name.as_str().starts_with("host-")).count();
    assert_eq!(hosts(&bare), 0);
    let nowhere = mk_host(HostInterfaces::WithAddress([mk_address("192.0.2.77")].into()));
    let id = RecordId::HostEndpoint("nowhere".to_owned());
    records.insert(id.clone(), Record::HostEndpoint(nowhere));
    let mut compiler = compile(&records, &mk_links());
    assert_eq!(hosts(&compiler.ruleset(&records)), 0);
    assert!(compiler.errors()[&id].contains("expectedIPs"), "{:?}", compiler.errors());
    compiler.set_links(Links::from([("eth7".to_owned(), [mk_address("192.0.2.77")].into())]));
    assert_eq!(compiler.errors(), BTreeMap::new());
    let comes = |interface: &str| {
        let packet = Packet { input: IfName::new(interface), ..mk_packet(80) };
        travel(&compiler.ruleset(&records), &packet, WAYS[0]).0
    };
    assert!(!comes("eth7"), "nothing lets it in");
    assert!(comes("eth0"), "the endpoint is another interface's");
}

#[test]
fn of_two_for_one_interface_the_first_by_name_is_enforced_and_the_other_reported() {
    let open = |interfaces| HostEndpointRecord { unmatched: Action::Allow, ..mk_host(interfaces) };
    let named = || HostInterfaces::Named("eth0".to_owned());
    let id = |name: &str| RecordId::HostEndpoint(name.to_owned());
    let records = BTreeMap::from([
        (id("a"), Record::HostEndpoint(open(named()))),
        (id("b"), Record::HostEndpoint(mk_host(named()))),
        (id("c"), Record::HostEndpoint(mk_host(HostInterfaces::All))),
        (id("d"), Record::HostEndpoint(open(HostInterfaces::All))),
        (id("e"), Record::HostEndpoint(mk_host(HostInterfaces::Named("cali0".to_owned())))),
    ]);
    let compiler = compile(&records, &mk_links());
    let reported: Vec<RecordId> = compiler.errors().into_keys().collect();
    assert_eq!(reported, ["b", "d", "e"].map(id));
    let ruleset = compiler.ruleset(&records);
    let comes =
        |interface: &str| travel(&ruleset, &Packet { input: IfName::new(interface), ..mk_packet(80) }, WAYS[0]).0;
    assert!(comes("eth0") && !comes("eth1") && comes("lo"));
}

/// However a policy is lost, the node keeps its failsafe ports, and what the policy might have
/// denied is denied.
#[test]
fn failsafes_stay_open_when_nothing_can_be_enforced() {
    let whole = mk_records();
    let passes =
        |compiler: &Compiler, records: &Records, packet: &Packet| travel(&compiler.ruleset(records), packet, WAYS[0]).0;
    let mut missing = whole.clone();
    missing.retain(|id, _| !matches!(id, RecordId::Policy(_)));
    let mut refused = compile(&whole, &mk_links());
    let classes: Vec<TablePart> = refused.classes.keys().map(|class| TablePart::Class(Class::clone(class))).collect();
    classes.into_iter().for_each(|part| refused.refuse(part, "an injected fault".to_owned(), &whole));
    let cases = [
        ("whole", compile(&whole, &mk_links()), &whole, true),
        ("policies are missing", compile(&missing, &mk_links()), &missing, false),
        ("the kernel refuses", refused, &whole, false),
    ];
    for (what, compiler, records, web) in cases {
        assert!(passes(&compiler, records, &mk_packet(22)), "{what}: ssh");
        assert_eq!(passes(&compiler, records, &mk_packet(80)), web, "{what}: web");
        let near = Packet { source: mk_address("192.0.2.50"), ..mk_packet(6443) };
        assert!(passes(&compiler, records, &near), "{what}: the API server from the net that may");
        assert!(!passes(&compiler, records, &mk_packet(6443)), "{what}: the API server from elsewhere");
        let answer = Packet { ports: Some((5473, 40_000)), state: CtState::ESTABLISHED, ..mk_packet(0) };
        assert!(passes(&compiler, records, &answer), "{what}: an answer of typha");
        let asks = Packet {
            input: None,
            output: IfName::new("eth0"),
            source: mk_address("192.0.2.1"),
            destination: mk_address("203.0.113.9"),
            ..mk_packet(5473)
        };
        assert!(travel(&compiler.ruleset(records), &asks, WAYS[2]).0, "{what}: to typha");
        let translated = Packet { translated: true, ..asks.clone() };
        assert!(travel(&compiler.ruleset(records), &translated, WAYS[2]).0, "{what}: to typha's Service");
        let other = Packet { ports: Some((40_000, 9)), ..asks };
        assert!(!travel(&compiler.ruleset(records), &other, WAYS[2]).0, "{what}: elsewhere");
    }
}

#[test]
fn one_host_endpoint_more_touches_its_own_chains_and_elements() {
    let mut records = mk_records();
    let mut compiler = compile(&records, &mk_links());
    let id = RecordId::HostEndpoint("new".to_owned());
    let host = HostEndpointRecord { normal: mk_tier(&[1]), ..mk_host(HostInterfaces::Named("eth1".to_owned())) };
    records.insert(id.clone(), Record::HostEndpoint(host));
    let transaction = compiler.apply(&records, &Dirty { records: BTreeSet::from([id]), members: BTreeMap::new() });
    for op in transaction.ops() {
        match op {
            TransactionOp::FlushChain(name) | TransactionOp::DeleteChain(name) => panic!("{name}\n{transaction}"),
            TransactionOp::AddElements(name, set) => {
                assert!(name.as_str().starts_with("host-") && set.elements.len() == 2, "{transaction}");
            }
            TransactionOp::DeleteElements(..) | TransactionOp::DeleteSet(_) => panic!("{transaction}"),
            _ => {}
        }
    }
}
