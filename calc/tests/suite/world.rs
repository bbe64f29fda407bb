//! A small world with few names, labels and addresses, so that random updates interact.

use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::{
    EndpointKey, HostEndpoint, HostInterface, NamedPort, Profile, WorkloadEndpoint, interface_name,
};
use margay_api::hosts::{CREATED_BY, LABEL_CREATED_BY};
use margay_api::meta::{LABEL_ORCHESTRATOR, Labels, NamespacedName};
use margay_api::network::{BlockInfo, Encapsulation, Mac, NetworkSet, NodeInfo, Pool, Standing, Vtep};
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, StagedPolicy, Tier, Traffic};
use margay_api::rule::{Action, EntityMatch, Icmp, IpVersion, Port, PortRange, Protocol, Rule};
use margay_api::selector::{Node, Selector};
use margay_api::settings::{Failsafe, FelixOverrides, SettingsScope};
use margay_calc::update::{Backend, Update};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

/// Namespaces of the world.
pub const NAMESPACES: [&str; 3] = ["red", "green", "blue"];
/// Nodes of the world.
pub const NODES: [&str; 3] = ["n1", "n2", "n3"];

/// Port names, common ones first.
const PORT_NAMES: [&str; 6] = ["http", "dns", "web", "alt", "admin", "sip"];

/// Selectors as parsed from policies, including some that tenants may try.
const SELECTORS: [&str; 20] = [
    "all()",
    "app == 'web'",
    "app != 'web'",
    "has(app)",
    "!has(app)",
    "app in {'web', 'db'} && tier == 'front'",
    "app == 'db' || tier == 'front'",
    "app starts with 'we'",
    "app contains 'b' && !(tier == 'back')",
    "projectcalico.org/namespace == 'red'",
    "projectcalico.org/namespace == 'red' && app == 'web'",
    "projectcalico.org/namespace == 'green' && projectcalico.org/orchestrator == 'k8s'",
    "projectcalico.org/namespace in {'red', 'blue'} && has(tier)",
    "pcns.team == 'a'",
    "pcns.team == 'a' && app == 'web'",
    "has(pcns.team) && !(pcns.team in {'b'})",
    "pcns.projectcalico.org/name == 'blue'",
    "pcsa.role == 'admin'",
    "projectcalico.org/serviceaccount in {'robot'}",
    "!has(projectcalico.org/namespace)",
];

/// One update of any kind.
pub fn update() -> impl Strategy<Value = Update> {
    prop_oneof![
        6 => (endpoint_key(), option::weighted(0.8, endpoint())).prop_map(|(key, value)| {
            let value = value.map(|endpoint| WorkloadEndpoint { interface: interface_name(&key), ..endpoint });
            Update::Endpoint(key, value)
        }),
        3 => (host_name(), option::weighted(0.8, host_endpoint())).prop_map(|(name, value)| Update::HostEndpoint(name.to_owned(), value)),
        3 => (select(&NAMESPACES[..]), option::weighted(0.7, parent_labels())).prop_map(|(name, labels)| Update::Namespace(name.to_owned(), labels)),
        2 => (account_key(), option::weighted(0.7, parent_labels())).prop_map(|(key, labels)| Update::ServiceAccount(key, labels)),
        6 => (policy_key(), option::weighted(0.75, policy())).prop_map(|(key, policy)| Update::Policy(key, policy)),
        2 => (policy_key(), option::weighted(0.75, staged())).prop_map(|(key, staged)| Update::Staged(PolicyKey { kind: key.kind.staged().expect("each of these kinds has one"), ..key }, staged)),
        1 => (tier_name(), option::weighted(0.7, tier())).prop_map(|(name, tier)| Update::Tier(name, tier)),
        2 => (set_key(), option::weighted(0.7, network_set())).prop_map(|(key, set)| Update::NetworkSet(key, set)),
        1 => (service_key(), option::weighted(0.7, vec(backend(), 0..3))).prop_map(|(key, backends)| Update::Service(key, backends)),
        1 => (select(&NODES[..]), option::weighted(0.7, node())).prop_map(|(name, node)| Update::Node(name.to_owned(), node)),
        1 => (select(&["p1", "p2", "p3"][..]), option::weighted(0.7, pool())).prop_map(|(name, pool)| Update::Pool(name.to_owned(), pool)),
        1 => (block_net(), option::weighted(0.7, block())).prop_map(|(net, block)| Update::Block(net, block)),
        1 => (select(&["default", "node.n1", "node.n2", "east", "west"][..]), option::weighted(0.7, settings())).prop_map(|(name, settings)| Update::Settings(name.to_owned(), settings.map(|(selector, settings)| scoped(name, selector, settings)))),
    ]
}

/// A pod of the world.
pub fn endpoint_key() -> impl Strategy<Value = EndpointKey> {
    (select(&NAMESPACES[..]), select(&["p0", "p1", "p2"][..]))
        .prop_map(|(namespace, name)| EndpointKey::new(namespace, name))
}

/// A host endpoint of the world.
pub fn host_name() -> impl Strategy<Value = &'static str> {
    select(&["h0", "h1", "h2"][..])
}

/// An address of a pod, or of none.
pub fn address() -> impl Strategy<Value = IpAddr> {
    let texts = vec!["10.0.0.1", "10.0.0.2", "10.0.0.66", "10.1.0.3", "192.0.2.1", "fd00::1", "fd00::2"];
    select(texts).prop_map(|text| text.parse().expect("an address"))
}

/// A protocol, with ports or without.
pub fn protocol() -> impl Strategy<Value = Protocol> {
    let rare = vec![Protocol::ICMPV6, Protocol::UDPLITE, Protocol(47), Protocol(253)];
    let usual = vec![Protocol::TCP, Protocol::UDP, Protocol::SCTP, Protocol::ICMP];
    prop_oneof![4 => select(usual), 1 => select(rare)]
}

fn account_key() -> impl Strategy<Value = NamespacedName> {
    (select(&NAMESPACES[..]), select(&["robot", "default"][..]))
        .prop_map(|(namespace, name)| NamespacedName::new(namespace, name))
}

fn service_key() -> impl Strategy<Value = NamespacedName> {
    select(&["red", "green"][..]).prop_map(|namespace| NamespacedName::new(namespace, "svc"))
}

fn set_key() -> impl Strategy<Value = NamespacedName> {
    select(&["red", "green", ""][..]).prop_map(|namespace| NamespacedName::new(namespace, "nets"))
}

fn tier_name() -> impl Strategy<Value = String> {
    select(&["default", "early", "late"][..]).prop_map(str::to_owned)
}

fn policy_key() -> impl Strategy<Value = PolicyKey> {
    let kinds = vec![PolicyKind::NetworkPolicy, PolicyKind::KubernetesNetworkPolicy, PolicyKind::GlobalNetworkPolicy];
    (select(kinds), select(&["red", "green", ""][..]), select(&["a", "a-b"][..]))
        .prop_map(|(kind, namespace, name)| PolicyKey { kind, namespace: namespace.to_owned(), name: name.to_owned() })
}

fn staged() -> impl Strategy<Value = StagedPolicy> {
    prop_oneof![
        4 => policy().prop_map(StagedPolicy::Set),
        1 => Just(StagedPolicy::Delete),
        1 => Just(StagedPolicy::Ignore),
    ]
}

fn own_labels() -> impl Strategy<Value = Labels> {
    let keys = vec![
        "app",
        "tier",
        "pcns.team",
        "pcsa.role",
        "projectcalico.org/namespace",
        "projectcalico.org/serviceaccount",
        "pcns.projectcalico.org/name",
    ];
    let values = vec!["web", "db", "front", "back", "a", "red", "blue", "admin"];
    labels(keys, values)
}

fn parent_labels() -> impl Strategy<Value = Labels> {
    labels(vec!["team", "role", "projectcalico.org/name"], vec!["a", "b", "admin", "blue"])
}

fn labels(keys: Vec<&'static str>, values: Vec<&'static str>) -> impl Strategy<Value = Labels> {
    btree_map(select(keys).prop_map(str::to_owned), select(values).prop_map(str::to_owned), 0..4)
}

fn endpoint() -> impl Strategy<Value = WorkloadEndpoint> {
    let node = select(&["n1", "n2", "n3", ""][..]);
    let account = select(&["", "default", "robot"][..]);
    let uid = select(&["", "u1", "u2"][..]);
    (node, own_labels(), account, vec(address(), 0..3), vec(named_port(), 0..3), uid).prop_map(
        |(node, mut labels, account, addresses, ports, uid)| {
            labels.insert(LABEL_ORCHESTRATOR.to_owned(), "k8s".to_owned());
            WorkloadEndpoint {
                node: node.to_owned(),
                labels,
                service_account: account.to_owned(),
                addresses,
                ports,
                uid: uid.to_owned(),
                interface: String::new(),
            }
        },
    )
}

fn host_endpoint() -> impl Strategy<Value = HostEndpoint> {
    let node = select(&["n1", "n2", ""][..]);
    let interface = select(vec![HostInterface::All, HostInterface::Named("eth0".to_owned()), HostInterface::ByAddress]);
    let account = account_key().prop_map(Profile::ServiceAccount);
    let namespace = select(&NAMESPACES[..]).prop_map(|name| Profile::Namespace(name.to_owned()));
    let profile = prop_oneof![1 => Just(Profile::Allow), 3 => namespace, 3 => account, 1 => Just(Profile::Unknown)];
    let addresses = btree_set(address(), 0..3).prop_map(|addresses| addresses.into_iter().collect());
    let created_by = option::of(Just((LABEL_CREATED_BY.to_owned(), CREATED_BY.to_owned())));
    let labels = (own_labels(), created_by).prop_map(|(mut labels, by)| {
        labels.extend(by);
        labels
    });
    (node, labels, interface, addresses, vec(named_port(), 0..3), vec(profile, 0..4)).prop_map(
        |(node, labels, interface, addresses, ports, profiles)| HostEndpoint {
            node: node.to_owned(),
            labels,
            interface,
            addresses,
            ports,
            profiles,
        },
    )
}

fn named_port() -> impl Strategy<Value = NamedPort> {
    (port_name(), protocol(), port()).prop_map(|(name, protocol, port)| NamedPort { name, protocol, port })
}

fn port_name() -> impl Strategy<Value = String> {
    prop_oneof![3 => select(&PORT_NAMES[..2]), 1 => select(&PORT_NAMES[..])].prop_map(str::to_owned)
}

/// A list of many named ports, as a rule may have on both sides.
fn many_ports() -> impl Strategy<Value = Vec<Port>> {
    (subsequence(&PORT_NAMES[..], 4..=PORT_NAMES.len()), option::weighted(0.3, rule_port()))
        .prop_map(|(names, other)| names.into_iter().map(|name| Port::Named(name.to_owned())).chain(other).collect())
}

/// One of a few port numbers.
pub fn port() -> impl Strategy<Value = u16> {
    select(&[53, 80, 81, 8080][..])
}

fn selector() -> impl Strategy<Value = Selector> {
    let written = select(&SELECTORS[..]).prop_map(|text| Selector::parse(text).expect("a selector"));
    prop_oneof![3 => written, 1 => tree().prop_map(|root| Selector { root })]
}

/// A tree of operations over few labels, so that several apply to the same label.
fn tree() -> impl Strategy<Value = Node> {
    let label = || {
        let labels = vec!["app", "tier", "pcns.team", "projectcalico.org/namespace"];
        select(labels).prop_map(str::to_owned)
    };
    let value = || select(vec!["web", "db", "front", "a", "red"]).prop_map(str::to_owned);
    let leaf = prop_oneof![
        label().prop_map(Node::Has),
        (label(), value()).prop_map(|(label, value)| Node::Equals(label, value)),
        (label(), value()).prop_map(|(label, value)| Node::NotEquals(label, value)),
        (label(), btree_set(value(), 0..3)).prop_map(|(label, values)| Node::In(label, values)),
        (label(), btree_set(value(), 0..3)).prop_map(|(label, values)| Node::NotIn(label, values)),
    ];
    leaf.prop_recursive(3, 8, 3, |operand| {
        prop_oneof![
            operand.clone().prop_map(|operand| Node::Not(Box::new(operand))),
            vec(operand.clone(), 1..4).prop_map(Node::And),
            vec(operand, 1..4).prop_map(Node::Or),
        ]
    })
}

fn tier() -> impl Strategy<Value = Tier> {
    (order(), select(&[Action::Deny, Action::Pass][..]))
        .prop_map(|(order, default_action)| Tier { order, default_action })
}

fn order() -> impl Strategy<Value = Order> {
    option::of(select(&[f64::MIN, -1.0, -0.0, 0.0, 5e-324, 1.0, 1000.0, f64::MAX][..])).prop_map(Order)
}

fn policy() -> impl Strategy<Value = Policy> {
    let rules = || vec(rule(), 0..3);
    (tier_name(), order(), selector(), traffic(), any::<(bool, bool)>(), rules(), rules()).prop_map(
        |(tier, order, selector, traffic, (applies_ingress, applies_egress), ingress, egress)| Policy {
            tier,
            order,
            selector,
            traffic,
            applies_ingress,
            applies_egress: applies_egress && traffic != Traffic::PreDnat,
            ingress,
            egress,
        },
    )
}

fn traffic() -> impl Strategy<Value = Traffic> {
    prop_oneof![
        4 => Just(Traffic::Normal),
        2 => Just(Traffic::Forwarded),
        1 => Just(Traffic::PreDnat),
        1 => Just(Traffic::Untracked),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    let action = select(&[Action::Allow, Action::Deny, Action::Log, Action::Pass][..]);
    let version = option::weighted(0.1, select(&[IpVersion::V4, IpVersion::V6][..]));
    let icmp = || {
        option::weighted(
            0.1,
            (option::of(icmp_type()), option::of(0..2_u8))
                .prop_map(|(kind, code)| Icmp { kind, code: code.filter(|_| kind.is_some()) }),
        )
    };
    let protocols = (option::weighted(0.4, protocol()), option::weighted(0.1, protocol()));
    let crowded = option::weighted(0.1, (many_ports(), many_ports()));
    let sides = (entity(), entity(), crowded).prop_map(|(source, destination, crowded)| match crowded {
        None => (source, destination),
        Some((from, to)) => {
            (EntityMatch { ports: from.into(), ..source }, EntityMatch { ports: to.into(), ..destination })
        }
    });
    (action, version, protocols, icmp(), icmp(), sides).prop_map(
        |(action, ip_version, (protocol, not_protocol), icmp, not_icmp, (source, destination))| Rule {
            action,
            ip_version,
            protocol,
            not_protocol,
            icmp,
            not_icmp,
            source,
            destination,
        },
    )
}

fn entity() -> impl Strategy<Value = EntityMatch> {
    let nets = || prop_oneof![4 => Just(Vec::new()), 1 => vec(net(), 1..3)];
    let selectors = || option::weighted(0.3, selector());
    let ports = || prop_oneof![4 => Just(Vec::new()), 1 => vec(rule_port(), 1..3)];
    let service = option::weighted(0.1, service_key());
    let nodes = option::weighted(0.05, node_selector());
    (nets(), nets(), selectors(), option::weighted(0.1, selector()), ports(), ports(), nodes, service).prop_map(
        |(nets, not_nets, selector, not_selector, ports, not_ports, nodes, service)| EntityMatch {
            nets,
            not_nets,
            selector,
            not_selector,
            ports: ports.into(),
            not_ports,
            nodes,
            service,
        },
    )
}

/// An ICMP type: requests, replies and errors of both versions.
pub fn icmp_type() -> impl Strategy<Value = u8> {
    select(&[0_u8, 1, 3, 8, 13, 128, 129, 135, 254][..])
}

fn rule_port() -> impl Strategy<Value = Port> {
    prop_oneof![
        4 => (port(), 0..3_u16).prop_map(|(first, more)| Port::Range(PortRange { first, last: first + more })),
        1 => Just(Port::Range(PortRange { first: 1, last: u16::MAX })),
        4 => port_name().prop_map(Port::Named),
    ]
}

fn net() -> impl Strategy<Value = IpNet> {
    let texts = vec![
        "10.0.0.0/8",
        "10.0.0.0/24",
        "10.0.0.0/31",
        "10.0.0.1/32",
        "10.0.0.66/26",
        "128.0.0.0/1",
        "0.0.0.0/0",
        "fd00::/64",
        "fd00::2/127",
        "::/0",
    ];
    select(texts).prop_map(|text| text.parse().expect("a range"))
}

fn network_set() -> impl Strategy<Value = NetworkSet> {
    (own_labels(), vec(net(), 0..3)).prop_map(|(labels, nets)| NetworkSet { labels, nets })
}

fn backend() -> impl Strategy<Value = Backend> {
    (address(), protocol(), port()).prop_map(|(address, protocol, port)| Backend { address, protocol, port })
}

fn node() -> impl Strategy<Value = NodeInfo> {
    // The last of each is a pod's.
    let ipv4 = select(&["192.0.2.1/24", "192.0.2.2/24", "10.0.0.65/24"][..]);
    let ipv6 = option::of(select(&["fd01::1/64", "fd01::2/64", "fd00::1/64"][..]));
    let vtep6 = option::of(select(&["fd00::1", "fd00::41"][..]));
    let standing = (any::<bool>(), any::<bool>(), 0..3_i64);
    let standing =
        standing.prop_map(|(ipv4_reported, ipv6_reported, created)| Standing { ipv4_reported, ipv6_reported, created });
    let labels = labels(vec!["zone"], vec!["a", "b"]);
    (ipv4, ipv6, vtep6, labels, standing).prop_map(|(ipv4, ipv6, vtep6, labels, standing)| NodeInfo {
        ipv4: Some(ipv4.parse().expect("an address")),
        ipv6: ipv6.map(|text| text.parse().expect("an address")),
        vtep6: vtep6.map(|text| Vtep { address: text.parse().expect("an address"), mac: Mac([0x66, 0, 0, 0, 0, 6]) }),
        labels,
        standing,
        ..NodeInfo::default()
    })
}

fn pool() -> impl Strategy<Value = Pool> {
    let encapsulations = vec![Encapsulation::None, Encapsulation::Vxlan, Encapsulation::VxlanCrossSubnet];
    let pool = (net(), select(encapsulations), any::<bool>(), 0..3_i64);
    pool.prop_map(|(cidr, encapsulation, nat_outgoing, created)| Pool {
        cidr,
        encapsulation,
        nat_outgoing,
        block_size: Pool::default_block_size(cidr),
        created,
    })
}

fn block_net() -> impl Strategy<Value = IpNet> {
    let texts = vec!["10.0.0.0/26", "10.0.0.64/26", "10.0.0.1/32", "fd00::/122"];
    select(texts).prop_map(|text| text.parse().expect("a range"))
}

fn block() -> impl Strategy<Value = BlockInfo> {
    let node = || select(&NODES[..]).prop_map(str::to_owned);
    let uses = || vec((address(), node()), 0..3);
    (option::weighted(0.8, node()), uses(), uses(), 0..3_i64).prop_map(|(node, borrowed, tunnels, created)| BlockInfo {
        node,
        borrowed,
        tunnels,
        created,
    })
}

fn node_selector() -> impl Strategy<Value = Selector> {
    select(&["all()", "zone == 'a'", "!has(zone)"][..]).prop_map(|text| Selector::parse(text).expect("a selector"))
}

/// Settings, and a selector of nodes for those whose name gives no scope.
fn settings() -> impl Strategy<Value = (Selector, FelixOverrides)> {
    let fields = (option::of(select(&[0, 1400][..])), option::of(1..3_u16), option::of(select(&["x", "%t"][..])));
    let failsafes = (option::of(failsafes()), option::of(failsafes()));
    (node_selector(), fields, failsafes).prop_map(|(selector, (vxlan_mtu, vxlan_port, log_prefix), failsafes)| {
        let overrides = FelixOverrides {
            vxlan_mtu,
            vxlan_port,
            log_prefix: log_prefix.map(str::to_owned),
            failsafe_inbound: failsafes.0,
            failsafe_outbound: failsafes.1,
            ..FelixOverrides::none(SettingsScope::Cluster)
        };
        (selector, overrides)
    })
}

fn failsafes() -> impl Strategy<Value = Vec<Failsafe>> {
    let failsafe = (protocol(), port(), option::of(net()));
    let failsafe = failsafe.prop_map(|(protocol, port, net)| Failsafe { protocol, port, net });
    vec(failsafe, 0..3)
}

fn scoped(name: &str, selector: Selector, overrides: FelixOverrides) -> FelixOverrides {
    let scope = match name.split_once('.') {
        Some((_, node)) => SettingsScope::Node(node.to_owned()),
        None if name == "default" => SettingsScope::Cluster,
        None => SettingsScope::Selected(selector),
    };
    FelixOverrides { scope, ..overrides }
}
