//! Random views and packets over a small vocabulary, so that rules, sets and packets meet, and the
//! expected verdict from the records alone.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, interface_name};
use margay_api::network::{Encapsulation, NodeInfo};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::{Action, Protocol};
use margay_api::settings::{EndpointToHostAction, Failsafe, FelixSettings, LogRate, TimeUnit};
use margay_calc::evaluate::{self, Direction, HostStage, Step, Verdict};
use margay_calc::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, Member, PolicyRecord,
    PoolRecord, Record, RecordId, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::rule::{Logging, Origin};
use super::simulate::Packet;
use crate::Links;
use margay_nft::{CtState, IfName};
use rules::rules;

mod rules;

pub type Records = BTreeMap<RecordId, Record>;

/// Name of the node whose view it is.
pub const NODE: &str = "n1";
const PODS: usize = 3;
const POLICIES: usize = 4;
/// Number of sets of addresses; sets of ports follow.
const NET_SETS: usize = 6;
const SETS: usize = NET_SETS + 6;

pub fn mk_address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub fn mk_net(text: &str) -> IpNet {
    text.parse().expect("a range")
}

/// Key and addresses of the pod with this number.
pub fn mk_pod(number: usize) -> (EndpointKey, Vec<IpAddr>) {
    (
        EndpointKey::new("x", format!("p{number}")),
        vec![
            mk_address(&format!("10.0.0.{number}")),
            mk_address(&format!("fd00::{number}")),
        ],
    )
}

pub fn mk_policy_key(number: usize) -> PolicyKey {
    PolicyKey {
        kind: PolicyKind::NetworkPolicy,
        namespace: "x".to_owned(),
        name: format!("policy{number}"),
    }
}

/// ID of the set with this number.
pub fn mk_set_id(number: usize) -> SetId {
    SetId(format!(
        "{}:{number}",
        if number < NET_SETS { 's' } else { 'n' }
    ))
}

fn addresses() -> Vec<IpAddr> {
    let pods = (0..PODS).flat_map(|number| mk_pod(number).1);
    pods.chain(["192.0.2.7", "10.0.9.9", "fd00::9:9"].map(mk_address))
        .collect()
}

fn nets() -> Vec<IpNet> {
    [
        "0.0.0.0/0",
        "10.0.0.0/24",
        "10.0.0.0/30",
        "10.0.0.1/32",
        "192.0.2.0/24",
        "fd00::/64",
        "fd00::1/128",
        "::/0",
    ]
    .map(mk_net)
    .to_vec()
}

const PORTS: [u16; 4] = [80, 81, 443, 5353];
const PROTOCOLS: [Protocol; 6] = [
    Protocol::TCP,
    Protocol::UDP,
    Protocol::SCTP,
    Protocol::ICMP,
    Protocol::ICMPV6,
    Protocol(47),
];

fn net_set() -> impl Strategy<Value = Record> {
    let single = select(addresses()).prop_map(|address| Member::Net(address.into()));
    let range = select(nets()).prop_map(Member::Net);
    btree_set(prop_oneof![3 => single, 1 => range], 0..5).prop_map(|members| {
        Record::IpSet(IpSetRecord {
            kind: SetKind::Net,
            members,
        })
    })
}

fn port_set() -> impl Strategy<Value = Record> {
    let member = (
        select(addresses()),
        select(vec![Protocol::TCP, Protocol::UDP]),
        select(PORTS.to_vec()),
    );
    btree_set(
        member.prop_map(|(address, protocol, port)| Member::AddressPort(address, protocol, port)),
        0..6,
    )
    .prop_map(|members| {
        Record::IpSet(IpSetRecord {
            kind: SetKind::AddressPort,
            members,
        })
    })
}

fn few<T: Clone + std::fmt::Debug + 'static>(values: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![3 => Just(Vec::new()), 1 => vec(select(values), 1..3)]
}

/// A rule that matches every packet.
pub fn mk_rule(action: Action) -> RuleRecord {
    RuleRecord {
        action,
        ip_version: None,
        protocol: None,
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: SideMatch::default(),
        destination: SideMatch::default(),
    }
}

fn policy() -> impl Strategy<Value = Record> {
    (rules(), rules())
        .prop_map(|(ingress, egress)| Record::Policy(PolicyRecord { ingress, egress }))
}

fn tiers() -> impl Strategy<Value = Vec<TierBinding>> {
    let keys = || few((0..POLICIES).map(mk_policy_key).collect());
    let tier = (keys(), keys(), any::<bool>()).prop_map(|(ingress, egress, pass)| TierBinding {
        name: "t".to_owned(),
        default_action: if pass { Action::Pass } else { Action::Deny },
        ingress,
        egress,
    });
    vec(tier, 0..3)
}

fn endpoint(number: usize) -> impl Strategy<Value = Record> {
    (tiers(), any::<bool>()).prop_map(move |(tiers, allow)| {
        let (key, addresses) = mk_pod(number);
        let unmatched = if allow { Action::Allow } else { Action::Deny };
        Record::Endpoint(EndpointRecord {
            interface: interface_name(&key),
            uid: String::new(),
            addresses,
            tiers,
            unmatched,
        })
    })
}

fn settings() -> impl Strategy<Value = Record> {
    use EndpointToHostAction::{Accept, Drop, Return};
    let rate = LogRate {
        count: 3,
        unit: TimeUnit::Hour,
    };
    let log = (
        select(vec!["calico-packet", "%t|%k|%n|%p", "100%%x \"%"]),
        select(vec![None, Some(rate)]),
    );
    let spared = |protocol, port, net: Option<&str>| Failsafe {
        protocol,
        port,
        net: net.map(mk_net),
    };
    let odd = vec![
        spared(Protocol::TCP, 80, None),
        spared(Protocol::UDP, 5353, Some("10.0.0.0/24")),
        spared(Protocol::TCP, 443, Some("::/0")),
        spared(Protocol::TCP, 81, Some("192.0.2.0/24")),
    ];
    let failsafes = || {
        select(vec![
            Failsafe::default_inbound(),
            Vec::new(),
            odd.clone(),
            odd[..1].to_vec(),
        ])
    };
    let failsafes = (failsafes(), failsafes());
    (
        select(vec![Accept, Drop, Return]),
        any::<bool>(),
        any::<bool>(),
        log,
        failsafes,
    )
        .prop_map(
            |(
                endpoint_to_host,
                nat_exclude_hosts,
                allow_conntrack_invalid,
                (log_prefix, log_rate),
                failsafes,
            )| {
                Record::Settings(FelixSettings {
                    endpoint_to_host,
                    nat_exclude_hosts,
                    allow_conntrack_invalid,
                    log_prefix: log_prefix.to_owned(),
                    log_rate,
                    failsafe_inbound: failsafes.0,
                    failsafe_outbound: failsafes.1,
                    ..FelixSettings::default()
                })
            },
        )
}

fn globals() -> impl Strategy<Value = Records> {
    let pool = |v6: bool| {
        (
            any::<bool>(),
            select(vec![Encapsulation::None, Encapsulation::Vxlan]),
        )
            .prop_map(move |(nat_outgoing, encapsulation)| {
                let range = mk_net(if v6 { "fd00::/64" } else { "10.0.0.0/16" });
                (
                    RecordId::Pool(range),
                    Record::Pool(PoolRecord {
                        nat_outgoing,
                        encapsulation,
                    }),
                )
            })
    };
    let node = any::<bool>().prop_map(|there| {
        let info = NodeInfo {
            ipv4: there.then(|| "192.0.2.7/24".parse().expect("a range")),
            ..NodeInfo::default()
        };
        (RecordId::Node("n2".to_owned()), Record::Node(info))
    });
    let settings = settings().prop_map(|settings| (RecordId::Settings, settings));
    (
        option::of(pool(false)),
        option::of(pool(true)),
        option::of(node),
        option::of(settings),
    )
        .prop_map(|(v4, v6, node, settings)| {
            [v4, v6, node, settings].into_iter().flatten().collect()
        })
}

/// Any view; policies named by endpoints and sets named by policies may be missing.
pub fn view() -> impl Strategy<Value = Records> {
    let there = |record: BoxedStrategy<Record>| option::weighted(0.9, record);
    let sets = (0..SETS)
        .map(|number| {
            there(if number < NET_SETS {
                net_set().boxed()
            } else {
                port_set().boxed()
            })
        })
        .collect::<Vec<_>>();
    let policies = (0..POLICIES)
        .map(|_| there(policy().boxed()))
        .collect::<Vec<_>>();
    let endpoints = (0..PODS)
        .map(|number| there(endpoint(number).boxed()))
        .collect::<Vec<_>>();
    (globals(), sets, policies, endpoints).prop_map(|(mut records, sets, policies, endpoints)| {
        let named = |(number, set): (usize, Option<Record>)| {
            Some((RecordId::IpSet(mk_set_id(number)), set?))
        };
        records.extend(sets.into_iter().enumerate().filter_map(named));
        let named = |(number, policy): (usize, Option<Record>)| {
            Some((RecordId::Policy(mk_policy_key(number)), policy?))
        };
        records.extend(policies.into_iter().enumerate().filter_map(named));
        let named = |(number, endpoint): (usize, Option<Record>)| {
            Some((RecordId::Endpoint(mk_pod(number).0), endpoint?))
        };
        records.extend(endpoints.into_iter().enumerate().filter_map(named));
        records
    })
}

fn host_endpoint() -> impl Strategy<Value = Record> {
    let named =
        select(vec!["eth0", "eth1", "lo"]).prop_map(|name| HostInterfaces::Named(name.to_owned()));
    let address = btree_set(
        select(
            ["192.0.2.1", "192.0.2.2", "fd00::2:2", "192.0.2.99"]
                .map(mk_address)
                .to_vec(),
        ),
        1..3,
    );
    let interfaces = prop_oneof![
        1 => Just(HostInterfaces::All),
        2 => named,
        2 => address.prop_map(HostInterfaces::WithAddress),
    ];
    let few = || prop_oneof![1 => Just(Vec::new()), 1 => tiers()];
    (interfaces, few(), few(), few(), few(), any::<bool>()).prop_map(
        |(interfaces, normal, forward, pre_dnat, untracked, allow)| {
            let unmatched = if allow { Action::Allow } else { Action::Deny };
            Record::HostEndpoint(HostEndpointRecord {
                interfaces,
                normal,
                forward,
                pre_dnat,
                untracked,
                unmatched,
            })
        },
    )
}

/// Addresses of the node's interfaces.
pub fn mk_links() -> Links {
    let links = [
        ("eth0", vec!["192.0.2.1"]),
        ("eth1", vec!["192.0.2.2", "fd00::2:2"]),
        ("eth2", vec!["192.0.2.3"]),
    ];
    links
        .map(|(name, own)| (name.to_owned(), own.into_iter().map(mk_address).collect()))
        .into()
}

/// As [`view`], with host endpoints.
pub fn host_view() -> impl Strategy<Value = Records> {
    (view(), vec(option::weighted(0.7, host_endpoint()), 3)).prop_map(|(mut records, hosts)| {
        let named = |(number, host): (usize, Option<Record>)| {
            Some((RecordId::HostEndpoint(format!("h{number}")), host?))
        };
        records.extend(hosts.into_iter().enumerate().filter_map(named));
        records
    })
}

/// The first packet of a connection between any two addresses of one family of the vocabulary.
pub fn packet() -> impl Strategy<Value = Packet> {
    let ports = (select(PORTS.to_vec()), select(PORTS.to_vec()));
    let icmp = (select(vec![0_u8, 8, 128]), 0..2_u8);
    let pair = |v4: bool| {
        let own: Vec<IpAddr> = addresses()
            .into_iter()
            .filter(|address| address.is_ipv4() == v4)
            .collect();
        (select(own.clone()), select(own))
    };
    (
        prop_oneof![pair(true), pair(false)],
        select(PROTOCOLS.to_vec()),
        ports,
        icmp,
    )
        .prop_map(|((source, destination), protocol, ports, icmp)| Packet {
            input: interface_of(source),
            output: interface_of(destination),
            source,
            destination,
            protocol: protocol.0,
            ports: protocol.has_ports().then_some(ports),
            icmp: matches!(protocol, Protocol::ICMP | Protocol::ICMPV6).then_some(icmp),
            state: CtState::NEW,
            from_host: false,
            mark: 0,
            translated: false,
        })
}

/// A first packet of UDP to port 53, forwarded between the interfaces of these addresses.
pub fn mk_packet(source: &str, destination: &str) -> Packet {
    let (source, destination) = (mk_address(source), mk_address(destination));
    Packet {
        input: interface_of(source),
        output: interface_of(destination),
        source,
        destination,
        protocol: 17,
        ports: Some((4000, 53)),
        icmp: None,
        state: CtState::NEW,
        from_host: false,
        mark: 0,
        translated: false,
    }
}

/// Interface of the pod with this address, or that of the outside.
pub fn interface_of(address: IpAddr) -> Option<IfName> {
    let pod = (0..PODS)
        .map(mk_pod)
        .find(|(_, addresses)| addresses.contains(&address));
    IfName::new(&pod.map_or_else(|| "eth0".to_owned(), |(key, _)| interface_name(&key)))
}

/// Expected verdict of a packet from or to a pod by the records: whether it passes, and the
/// prefixes of its log lines.
pub fn decides(
    records: &Records,
    pod: &EndpointKey,
    direction: Direction,
    packet: &Packet,
) -> (bool, Vec<String>) {
    let verdict = evaluate::evaluate(records, pod, direction, &seen(packet));
    (verdict.action == Action::Allow, reports(records, &verdict))
}

/// Expected verdict of a packet at a stage of a host endpoint.
pub fn decides_at_host(
    records: &Records,
    host: &str,
    stage: HostStage,
    direction: Direction,
    packet: &Packet,
) -> (Action, Vec<String>) {
    let verdict = evaluate::evaluate_host(records, host, stage, direction, &seen(packet));
    (verdict.action, reports(records, &verdict))
}

fn seen(packet: &Packet) -> evaluate::Packet {
    let (source_port, destination_port) = packet.ports.unwrap_or_default();
    evaluate::Packet {
        source: packet.source,
        destination: packet.destination,
        protocol: Protocol(packet.protocol),
        source_port,
        destination_port,
        icmp: packet.icmp.unwrap_or_default(),
    }
}

fn reports(records: &Records, verdict: &Verdict) -> Vec<String> {
    let settings = match records.get(&RecordId::Settings) {
        Some(Record::Settings(settings)) => settings.clone(),
        _ => FelixSettings::default(),
    };
    let logging = Logging::of(&settings);
    let reports = verdict.trace.iter().filter_map(|step| match step {
        Step::Rule {
            tier,
            policy,
            action: Action::Log,
            ..
        } => Some(logging.prefix(Origin { tier, policy })),
        _ => None,
    });
    reports.collect()
}
