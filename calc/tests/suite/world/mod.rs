//! A small world with few names, labels and addresses, so that random updates interact.

mod policies;

use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::{
    EndpointKey, HostEndpoint, HostInterface, NamedPort, Profile, WorkloadEndpoint, interface_name,
};
use margay_api::hosts::{CREATED_BY, LABEL_CREATED_BY};
use margay_api::meta::{LABEL_ORCHESTRATOR, Labels, NamespacedName};
use margay_api::network::{
    BgpAnnotations, BlockInfo, Encapsulation, Mac, NetworkSet, NodeInfo, Pool, Standing, Vtep,
};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::Protocol;
use margay_api::selector::{Node, Selector};
use margay_api::settings::{Failsafe, FelixOverrides, SettingsScope};
use margay_calc::update::{Backend, NamespaceInfo, Update};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use policies::{policy, staged, tier};

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

/// Names of settings: of the cluster, of nodes, and with selectors.
const SETTINGS: [&str; 5] = ["default", "node.n1", "node.n2", "east", "west"];

/// One update of any kind.
pub fn update() -> impl Strategy<Value = Update> {
    prop_oneof![
        6 => (endpoint_key(), option::weighted(0.8, endpoint())).prop_map(|(key, value)| {
            let value = value.map(
                |endpoint| WorkloadEndpoint { interface: interface_name(&key), ..endpoint },
            );
            Update::Endpoint(key, value)
        }),
        3 => object(host_name(), 0.8, host_endpoint(), |name, host| {
            Update::HostEndpoint(name.to_owned(), host)
        }),
        3 => object(select(&NAMESPACES[..]), 0.7, namespace(), |name, namespace| {
            Update::Namespace(name.to_owned(), namespace)
        }),
        2 => object(account_key(), 0.7, parent_labels(), Update::ServiceAccount),
        6 => object(policy_key(), 0.75, policy(), Update::Policy),
        2 => object(policy_key(), 0.75, staged(), |key, staged| {
            let kind = key.kind.staged().expect("each of these kinds has one");
            Update::Staged(PolicyKey { kind, ..key }, staged)
        }),
        1 => object(tier_name(), 0.7, tier(), Update::Tier),
        2 => object(set_key(), 0.7, network_set(), Update::NetworkSet),
        1 => object(service_key(), 0.7, vec(backend(), 0..3), Update::Service),
        1 => object(select(&NODES[..]), 0.7, node(), |name, node| {
            Update::Node(name.to_owned(), node)
        }),
        1 => object(select(&["p1", "p2", "p3"][..]), 0.7, pool(), |name, pool| {
            Update::Pool(name.to_owned(), pool)
        }),
        1 => object(block_net(), 0.7, block(), Update::Block),
        1 => object(select(&SETTINGS[..]), 0.7, settings(), |name, settings| {
            let settings = settings.map(|(selector, settings)| scoped(name, selector, settings));
            Update::Settings(name.to_owned(), settings)
        }),
    ]
}

/// An object with this probability, else its deletion.
pub fn object<K, V>(
    key: impl Strategy<Value = K>,
    presence: f64,
    value: impl Strategy<Value = V>,
    update: impl Fn(K, Option<V>) -> Update,
) -> impl Strategy<Value = Update> {
    (key, option::weighted(presence, value)).prop_map(move |(key, value)| update(key, value))
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
    let texts = vec![
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.66",
        "10.1.0.3",
        "192.0.2.1",
        "fd00::1",
        "fd00::2",
    ];
    select(texts).prop_map(|text| text.parse().expect("an address"))
}

/// A protocol, with ports or without.
pub fn protocol() -> impl Strategy<Value = Protocol> {
    let rare = vec![
        Protocol::ICMPV6,
        Protocol::UDPLITE,
        Protocol(47),
        Protocol(253),
    ];
    let usual = vec![Protocol::TCP, Protocol::UDP, Protocol::SCTP, Protocol::ICMP];
    prop_oneof![4 => select(usual), 1 => select(rare)]
}

fn account_key() -> impl Strategy<Value = NamespacedName> {
    (select(&NAMESPACES[..]), select(&["robot", "default"][..]))
        .prop_map(|(namespace, name)| NamespacedName::new(namespace, name))
}

pub fn service_key() -> impl Strategy<Value = NamespacedName> {
    select(&["red", "green"][..]).prop_map(|namespace| NamespacedName::new(namespace, "svc"))
}

fn set_key() -> impl Strategy<Value = NamespacedName> {
    select(&["red", "green", ""][..]).prop_map(|namespace| NamespacedName::new(namespace, "nets"))
}

fn tier_name() -> impl Strategy<Value = String> {
    select(&["default", "early", "late"][..]).prop_map(str::to_owned)
}

fn policy_key() -> impl Strategy<Value = PolicyKey> {
    let kinds = vec![
        PolicyKind::NetworkPolicy,
        PolicyKind::KubernetesNetworkPolicy,
        PolicyKind::GlobalNetworkPolicy,
    ];
    (
        select(kinds),
        select(&["red", "green", ""][..]),
        select(&["a", "a-b"][..]),
    )
        .prop_map(|(kind, namespace, name)| PolicyKey {
            kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
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

fn namespace() -> impl Strategy<Value = NamespaceInfo> {
    (parent_labels(), prop::bool::weighted(0.2)).prop_map(|(labels, names_pools)| NamespaceInfo {
        labels,
        names_pools,
    })
}

fn parent_labels() -> impl Strategy<Value = Labels> {
    labels(
        vec!["team", "role", "projectcalico.org/name"],
        vec!["a", "b", "admin", "blue"],
    )
}

fn labels(keys: Vec<&'static str>, values: Vec<&'static str>) -> impl Strategy<Value = Labels> {
    btree_map(
        select(keys).prop_map(str::to_owned),
        select(values).prop_map(str::to_owned),
        0..4,
    )
}

fn endpoint() -> impl Strategy<Value = WorkloadEndpoint> {
    let node = select(&["n1", "n2", "n3", ""][..]);
    let account = select(&["", "default", "robot"][..]);
    let uid = select(&["", "u1", "u2"][..]);
    (
        node,
        own_labels(),
        account,
        vec(address(), 0..3),
        vec(named_port(), 0..3),
        uid,
    )
        .prop_map(|(node, mut labels, account, addresses, ports, uid)| {
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
        })
}

fn host_endpoint() -> impl Strategy<Value = HostEndpoint> {
    let node = select(&["n1", "n2", ""][..]);
    let interface = select(vec![
        HostInterface::All,
        HostInterface::Named("eth0".to_owned()),
        HostInterface::ByAddress,
    ]);
    let account = account_key().prop_map(Profile::ServiceAccount);
    let namespace = select(&NAMESPACES[..]).prop_map(|name| Profile::Namespace(name.to_owned()));
    let profile = prop_oneof![
        1 => Just(Profile::Allow),
        3 => namespace,
        3 => account,
        1 => Just(Profile::Unknown),
    ];
    let addresses =
        btree_set(address(), 0..3).prop_map(|addresses| addresses.into_iter().collect());
    let created_by = option::of(Just((LABEL_CREATED_BY.to_owned(), CREATED_BY.to_owned())));
    let labels = (own_labels(), created_by).prop_map(|(mut labels, by)| {
        labels.extend(by);
        labels
    });
    (
        node,
        labels,
        interface,
        addresses,
        vec(named_port(), 0..3),
        vec(profile, 0..4),
    )
        .prop_map(
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
    (port_name(), protocol(), port()).prop_map(|(name, protocol, port)| NamedPort {
        name,
        protocol,
        port,
    })
}

fn port_name() -> impl Strategy<Value = String> {
    prop_oneof![3 => select(&PORT_NAMES[..2]), 1 => select(&PORT_NAMES[..])].prop_map(str::to_owned)
}

/// One of a few port numbers.
pub fn port() -> impl Strategy<Value = u16> {
    select(&[53, 80, 81, 8080][..])
}

fn selector() -> impl Strategy<Value = Selector> {
    let written =
        select(&SELECTORS[..]).prop_map(|text| Selector::parse(text).expect("a selector"));
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
            operand
                .clone()
                .prop_map(|operand| Node::Not(Box::new(operand))),
            vec(operand.clone(), 1..4).prop_map(Node::And),
            vec(operand, 1..4).prop_map(Node::Or),
        ]
    })
}

/// An ICMP type: requests, replies and errors of both versions.
pub fn icmp_type() -> impl Strategy<Value = u8> {
    select(&[0_u8, 1, 3, 8, 13, 128, 129, 135, 254][..])
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
    let ready_on = option::of(select(&NODES[..]));
    (address(), protocol(), port(), ready_on).prop_map(|(address, protocol, port, ready_on)| {
        Backend {
            address,
            protocol,
            port,
            ready_on: ready_on.map(Into::into),
        }
    })
}

fn node() -> impl Strategy<Value = NodeInfo> {
    // The last of each is a pod's.
    let ipv4 = select(&["192.0.2.1/24", "192.0.2.2/24", "10.0.0.65/24"][..]);
    let ipv6 = option::of(select(&["fd01::1/64", "fd01::2/64", "fd00::1/64"][..]));
    let vtep6 = option::of(select(&["fd00::1", "fd00::41"][..]));
    let standing = (any::<bool>(), any::<bool>(), 0..3_i64);
    let standing = standing.prop_map(|(ipv4_reported, ipv6_reported, created)| Standing {
        ipv4_reported,
        ipv6_reported,
        created,
    });
    let labels = labels(vec!["zone"], vec!["a", "b"]);
    let bgp = (option::of(64513..64515_u32), option::of(1..3_u32));
    let bgp = bgp.prop_map(|(asn, cluster_id)| BgpAnnotations {
        asn,
        cluster_id: cluster_id.map(Into::into),
    });
    let ipip = option::of(select(&["10.0.0.1", "10.0.0.65"][..]));
    let node = (ipv4, ipv6, vtep6, ipip, labels, standing, bgp);
    node.prop_map(
        |(ipv4, ipv6, vtep6, ipip, labels, standing, bgp_annotations)| NodeInfo {
            bgp_annotations,
            ipip: ipip.map(|text| text.parse().expect("an address")),
            ipv4: Some(ipv4.parse().expect("an address")),
            ipv6: ipv6.map(|text| text.parse().expect("an address")),
            vtep6: vtep6.map(|text| Vtep {
                address: text.parse().expect("an address"),
                mac: Mac([0x66, 0, 0, 0, 0, 6]),
            }),
            labels,
            standing,
            ..NodeInfo::default()
        },
    )
}

fn pool() -> impl Strategy<Value = Pool> {
    let encapsulations = vec![
        Encapsulation::None,
        Encapsulation::Vxlan,
        Encapsulation::VxlanCrossSubnet,
    ];
    let pool = (
        net(),
        select(encapsulations),
        any::<bool>(),
        any::<bool>(),
        0..3_i64,
    );
    pool.prop_map(
        |(cidr, encapsulation, nat_outgoing, is_exported, created)| Pool {
            is_exported,
            cidr,
            encapsulation,
            nat_outgoing,
            block_size: Pool::default_block_size(cidr),
            created,
        },
    )
}

fn block_net() -> impl Strategy<Value = IpNet> {
    let texts = vec!["10.0.0.0/26", "10.0.0.64/26", "10.0.0.1/32", "fd00::/122"];
    select(texts).prop_map(|text| text.parse().expect("a range"))
}

fn block() -> impl Strategy<Value = BlockInfo> {
    let node = || select(&NODES[..]).prop_map(str::to_owned);
    let uses = || vec((address(), node()), 0..3);
    (option::weighted(0.8, node()), uses(), uses(), 0..3_i64).prop_map(
        |(node, borrowed, tunnels, created)| BlockInfo {
            node,
            borrowed,
            tunnels,
            created,
        },
    )
}

fn node_selector() -> impl Strategy<Value = Selector> {
    select(&["all()", "zone == 'a'", "!has(zone)"][..])
        .prop_map(|text| Selector::parse(text).expect("a selector"))
}

/// Settings, and a selector of nodes for those whose name gives no scope.
fn settings() -> impl Strategy<Value = (Selector, FelixOverrides)> {
    let fields = (
        option::of(select(&[0, 1400][..])),
        option::of(1..3_u16),
        option::of(select(&["x", "%t"][..])),
    );
    let failsafes = (option::of(failsafes()), option::of(failsafes()));
    (node_selector(), fields, failsafes).prop_map(
        |(selector, (vxlan_mtu, vxlan_port, log_prefix), failsafes)| {
            let overrides = FelixOverrides {
                vxlan_mtu,
                vxlan_port,
                log_prefix: log_prefix.map(str::to_owned),
                failsafe_inbound: failsafes.0,
                failsafe_outbound: failsafes.1,
                ..FelixOverrides::none(SettingsScope::Cluster)
            };
            (selector, overrides)
        },
    )
}

fn failsafes() -> impl Strategy<Value = Vec<Failsafe>> {
    let failsafe = (protocol(), port(), option::of(net()));
    let failsafe = failsafe.prop_map(|(protocol, port, net)| Failsafe {
        protocol,
        port,
        net,
    });
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
