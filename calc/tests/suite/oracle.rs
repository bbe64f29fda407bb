//! Graph and evaluator give every packet the verdict that the objects themselves demand, and no label that a tenant can write
//! reaches beyond the tenant's namespace.

use std::net::IpAddr;

use crate::reference::{Objects, order, tie};
use crate::world::{address, endpoint_key, port, protocol, update};
use margay_api::endpoint::{EndpointKey, WorkloadEndpoint};
use margay_api::meta::{Labels, NamespacedName};
use margay_api::network::NetworkSet;
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, StagedPolicy};
use margay_api::rule::{Action, EntityMatch, IpVersion, Port, Protocol, Rule};
use margay_api::selector::Selector;
use margay_calc::evaluate::{Direction, Packet, connect, evaluate};
use margay_calc::graph::Graph;
use margay_calc::model::{Record, RecordId};
use margay_calc::text;
use margay_calc::update::Update;
use proptest::prelude::*;

/// One side of a packet.
#[derive(Clone, Copy)]
struct Side<'a> {
    address: IpAddr,
    port: u16,
    protocol: Protocol,
    is_destination: bool,
    /// Protocol that the rule is limited to.
    limit: Option<Protocol>,
    /// What selects the endpoint on this side, when it is the policy's own.
    subject: Option<&'a Selector>,
}

/// The verdict by the objects: no set, no record, no index.
struct Naive<'a>(&'a Objects);

impl Naive<'_> {
    fn verdict(&self, key: &EndpointKey, direction: Direction, packet: &Packet) -> Action {
        let Some(endpoint) = self.0.endpoints.get(key).filter(|endpoint| !endpoint.node.is_empty()) else {
            return Action::Deny;
        };
        let labels = self.0.labels(key, endpoint);
        let policies = self.0.policies.iter().filter(|(_, policy)| {
            let applies = match direction {
                Direction::Ingress => policy.applies_ingress,
                Direction::Egress => policy.applies_egress,
            };
            applies && policy.selector.matches(&labels)
        });
        let mut policies: Vec<(&PolicyKey, &Policy)> = policies.collect();
        policies.sort_by_key(|(key, policy)| (order(policy.order), tie(key)));
        let mut existing: Vec<_> = self.0.tiers.iter().collect();
        existing.sort_by_key(|(name, tier)| (order(tier.order), *name));
        let mut tiers: Vec<(&str, Action)> =
            existing.into_iter().map(|(name, tier)| (name.as_str(), tier.default_action)).collect();
        for name in ["default", "early", "late"] {
            if !self.0.tiers.contains_key(name) {
                tiers.push((name, Action::Deny));
            }
        }
        for (tier, default_action) in tiers {
            let mut policies = policies.iter().filter(|(_, policy)| policy.tier == tier).peekable();
            if policies.peek().is_none() {
                continue;
            }
            let rules = policies.flat_map(|(_, policy)| {
                let rules = match direction {
                    Direction::Ingress => &policy.ingress,
                    Direction::Egress => &policy.egress,
                };
                rules.iter().map(move |rule| (policy, rule))
            });
            let decided = rules
                .filter(|(_, rule)| rule.action != Action::Log)
                .find(|(policy, rule)| self.matches(rule, (direction, &policy.selector), packet));
            match decided.map_or(default_action, |(_, rule)| rule.action) {
                Action::Pass => {}
                action => return action,
            }
        }
        match self.0.namespaces.contains_key(&key.namespace) {
            true => Action::Allow,
            false => Action::Deny,
        }
    }

    fn matches(&self, rule: &Rule, local: (Direction, &Selector), packet: &Packet) -> bool {
        let version = match packet.source {
            IpAddr::V4(_) => IpVersion::V4,
            IpAddr::V6(_) => IpVersion::V6,
        };
        let is_icmp = packet.protocol == Protocol::ICMP || packet.protocol == Protocol::ICMPV6;
        let icmp = |icmp: margay_api::rule::Icmp| {
            is_icmp
                && icmp.kind.unwrap_or(packet.icmp.0) == packet.icmp.0
                && icmp.code.unwrap_or(packet.icmp.1) == packet.icmp.1
        };
        let (direction, subject) = local;
        let source = Side {
            address: packet.source,
            port: packet.source_port,
            protocol: packet.protocol,
            is_destination: false,
            limit: rule.protocol,
            subject: (direction == Direction::Egress).then_some(subject),
        };
        let destination = Side {
            address: packet.destination,
            port: packet.destination_port,
            is_destination: true,
            subject: (direction == Direction::Ingress).then_some(subject),
            ..source
        };
        let criteria = [
            rule.ip_version.unwrap_or(version) == version,
            rule.protocol.unwrap_or(packet.protocol) == packet.protocol,
            rule.not_protocol != Some(packet.protocol),
            rule.icmp.is_none_or(icmp),
            !rule.not_icmp.is_some_and(icmp),
            self.meets(&rule.source, source),
            self.meets(&rule.destination, destination),
        ];
        criteria.into_iter().all(|met| met)
    }

    fn meets(&self, entity: &EntityMatch, side: Side<'_>) -> bool {
        let Side { address, port, protocol, is_destination, limit, subject } = side;
        let in_nets = |nets: &[ipnet::IpNet]| nets.iter().any(|net| net.contains(&address));
        let port_matches = |wanted: &Port| {
            protocol.has_ports()
                && match wanted {
                    Port::Range(range) => range.contains(port),
                    Port::Named(name) => self.owners(address).any(|(key, endpoint)| {
                        let selector = entity.selector.as_ref().or(subject);
                        selector.is_none_or(|selector| selector.matches(&self.0.labels(key, endpoint)))
                            && limit.is_none_or(|limit| limit == protocol)
                            && endpoint.ports.iter().any(|declared| {
                                declared.name == *name && declared.port == port && declared.protocol == protocol
                            })
                    }),
                }
        };
        let service = entity.service.as_ref().is_none_or(|service| {
            let backends = self.0.services.get(service).into_iter().flatten();
            { backends }.any(|backend| {
                backend.address == address
                    && (!is_destination || protocol.has_ports() && (backend.protocol, backend.port) == (protocol, port))
            })
        });
        (entity.nets.is_empty() || in_nets(&entity.nets))
            && !in_nets(&entity.not_nets)
            && entity.selector.as_ref().is_none_or(|selector| self.selects(selector, address))
            && !entity.not_selector.as_ref().is_some_and(|selector| self.selects(selector, address))
            && (entity.ports.is_empty() || entity.ports.iter().any(port_matches))
            && !entity.not_ports.iter().any(port_matches)
            && entity.nodes.as_ref().is_none_or(|selector| self.is_node(selector, address))
            && service
    }

    fn is_node(&self, selector: &Selector, address: IpAddr) -> bool {
        let selected = self.0.nodes.values().filter(|node| selector.matches(&node.labels));
        { selected }.any(|node| {
            node.ipv4.is_some_and(|net| IpAddr::V4(net.addr()) == address)
                || node.ipv6.is_some_and(|net| IpAddr::V6(net.addr()) == address)
        })
    }

    fn selects(&self, selector: &Selector, address: IpAddr) -> bool {
        let endpoint = self.owners(address).any(|(key, endpoint)| selector.matches(&self.0.labels(key, endpoint)));
        let mut sets = self.0.network_sets.iter();
        endpoint
            || sets.any(|(key, set)| {
                set.nets.iter().any(|net| net.contains(&address)) && selector.matches(&self.0.set_labels(key, set))
            })
    }

    fn owners(&self, address: IpAddr) -> impl Iterator<Item = (&EndpointKey, &WorkloadEndpoint)> {
        self.0.endpoints.iter().filter(move |(_, endpoint)| endpoint.addresses.contains(&address))
    }
}

fn packet() -> impl Strategy<Value = Packet> {
    let addresses = (address(), address()).prop_filter("of one version", |(from, to)| from.is_ipv4() == to.is_ipv4());
    (addresses, protocol(), port(), port(), (0..2_u8, 0..2_u8)).prop_map(
        |((source, destination), protocol, source_port, destination_port, icmp)| Packet {
            source,
            destination,
            protocol,
            source_port,
            destination_port,
            icmp,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn verdicts_are_those_of_the_objects(
        updates in prop::collection::vec(update(), 20..80),
        packets in prop::collection::vec((endpoint_key(), any::<bool>(), packet()), 60),
    ) {
        let (mut graph, mut objects) = (Graph::default(), Objects::default());
        for update in updates {
            graph.apply(update.clone());
            objects.apply(update);
        }
        graph.flush();
        let would_be = objects.with_staged_enforced();
        let pending = graph.pending();
        prop_assert_eq!(pending.is_some(), objects.staged.values().any(|staged| *staged != StagedPolicy::Ignore));
        for (key, is_ingress, packet) in packets {
            let direction = if is_ingress { Direction::Ingress } else { Direction::Egress };
            let verdict = evaluate(&graph, &key, direction, &packet);
            let wanted = Naive(&objects).verdict(&key, direction, &packet);
            prop_assert_eq!(verdict.action, wanted, "{} {:?} {:?}\n{}", key, direction, packet, text::verdict(&verdict));
            if let Some(pending) = pending {
                let verdict = evaluate(&pending, &key, direction, &packet);
                let wanted = Naive(&would_be).verdict(&key, direction, &packet);
                prop_assert_eq!(verdict.action, wanted, "pending {} {:?}\n{}", key, packet, text::verdict(&verdict));
            }
            // The node that enforces it comes to the same from what it holds.
            if let Some(endpoint) = objects.endpoints.get(&key).filter(|endpoint| !endpoint.node.is_empty()) {
                let local = evaluate(&graph.view(&endpoint.node), &key, direction, &packet);
                prop_assert_eq!(local, verdict);
            }
        }
    }

    #[test]
    fn no_label_of_a_tenant_reaches_beyond_its_namespace(
        pod_labels in tenant_labels(),
        set_labels in tenant_labels(),
        service_account in prop::sample::select(&["", "default", "guest"][..]),
    ) {
        let mut graph = Graph::default();
        let tenant = pod(&mut graph, "tenant", "10.0.0.1", pod_labels, service_account);
        let victim = pod(&mut graph, "victim", "10.0.0.2", Labels::new(), "default");
        let friend = pod(&mut graph, "friend", "10.0.0.3", Labels::new(), "robot");
        graph.apply(Update::Namespace(String::from("tenant"), Some(Labels::new())));
        graph.apply(Update::Namespace(String::from("victim"), Some(Labels::new())));
        graph.apply(Update::Namespace(String::from("friend"), Some(label("team", "trusted"))));
        graph.apply(Update::ServiceAccount(NamespacedName::new("friend", "robot"), Some(label("role", "admin"))));
        // A tenant may write network sets too, of any range.
        let nets = vec!["10.0.0.1/32".parse().expect("a range")];
        graph.apply(Update::NetworkSet(NamespacedName::new("tenant", "nets"), Some(NetworkSet { labels: set_labels, nets })));
        graph.apply(protection());
        graph.flush();
        let is_allowed = |from: &EndpointKey| {
            let connection = connect(&graph, from, &victim, Protocol::TCP, 80);
            connection.expect("both have addresses").is_allowed()
        };
        prop_assert!(is_allowed(&friend), "the policy lets friends in");
        prop_assert!(!is_allowed(&tenant), "the policy lets the tenant in");
        let record = graph.record(&RecordId::Endpoint(tenant));
        let is_free = matches!(record.as_deref(), Some(Record::Endpoint(endpoint)) if endpoint.tiers.is_empty());
        prop_assert!(is_free, "the policy takes hold of the tenant's pod");
    }
}

fn pod(graph: &mut Graph, namespace: &str, address: &str, labels: Labels, service_account: &str) -> EndpointKey {
    let key = EndpointKey::new(namespace, "pod");
    let endpoint = WorkloadEndpoint {
        node: String::from("n1"),
        labels,
        service_account: service_account.to_owned(),
        addresses: vec![address.parse().expect("an address")],
        ports: Vec::new(),
        interface: String::from("cali0"),
    };
    graph.apply(Update::Endpoint(key.clone(), Some(endpoint)));
    key
}

fn label(key: &str, value: &str) -> Labels {
    Labels::from([(key.to_owned(), value.to_owned())])
}

/// The victim lets in itself and its friends, in every way in which they can be named.
fn protection() -> Update {
    let parse = |text: &str| Selector::parse(text).expect("a selector");
    let sources = [
        "projectcalico.org/namespace == 'victim'",
        "projectcalico.org/namespace in {'victim', 'friend'} && has(projectcalico.org/namespace)",
        "pcns.team == 'trusted'",
        "pcns.projectcalico.org/name starts with 'f'",
        "pcsa.role == 'admin'",
        "pcsa.projectcalico.org/name contains 'rob'",
        "projectcalico.org/serviceaccount == 'robot'",
        "!has(projectcalico.org/namespace)",
    ];
    let ingress = sources.map(|source| Rule {
        source: EntityMatch { selector: Some(parse(source)), ..EntityMatch::default() },
        ..Rule::any(Action::Allow)
    });
    let key = PolicyKey {
        kind: PolicyKind::NetworkPolicy,
        namespace: String::from("victim"),
        name: String::from("protection"),
    };
    Update::Policy(
        key,
        Some(Policy {
            tier: String::from("default"),
            order: Order(None),
            selector: parse("projectcalico.org/namespace == 'victim'"),
            applies_ingress: true,
            applies_egress: false,
            ingress: ingress.to_vec(),
            egress: Vec::new(),
        }),
    )
}

/// Labels that a tenant may come to write: reserved keys with the values that would open something.
fn tenant_labels() -> impl Strategy<Value = Labels> {
    let keys = vec![
        "projectcalico.org/namespace",
        "projectcalico.org/serviceaccount",
        "pcns.team",
        "pcns.projectcalico.org/name",
        "pcsa.role",
        "pcsa.projectcalico.org/name",
        "app",
    ];
    let values = vec!["victim", "friend", "trusted", "admin", "robot"];
    let key = prop::sample::select(keys).prop_map(str::to_owned);
    let value = prop::sample::select(values).prop_map(str::to_owned);
    prop::collection::btree_map(key, value, 0..7)
}
