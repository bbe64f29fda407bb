//! What a tenant writes affects no other tenant, and missing objects open nothing.

use std::cell::Cell;
use std::net::IpAddr;

use margay_api::endpoint::EndpointKey;
use margay_api::meta::LABEL_NAMESPACE;
use margay_api::policy::{Policy, PolicyKey, PolicyKind};
use margay_api::rule::{Action, EntityMatch, Rule};
use margay_api::selector::{Node, Selector};
use margay_calc::evaluate::{Direction, Packet, evaluate};
use margay_calc::graph::Graph;
use margay_calc::update::Update;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};

use crate::world::{NAMESPACES, port, protocol, update};

/// Namespace of the tenant that tries to reach others.
const TENANT: &str = "green";
const STRANGER: &str = "203.0.113.7";

/// The pod's address of the packet's IP version; labels have no influence on it.
fn address(key: &EndpointKey, is_ipv6: bool) -> IpAddr {
    let namespace = NAMESPACES
        .iter()
        .position(|name| *name == key.namespace)
        .unwrap_or_default();
    let pod = key.name.trim_start_matches('p');
    let text = if is_ipv6 {
        format!("fd00::{namespace}:{pod}")
    } else {
        format!("10.0.{namespace}.{pod}")
    };
    text.parse().expect("an address")
}

fn with_fixed_address(update: Update) -> Update {
    match update {
        Update::Endpoint(key, Some(mut endpoint)) => {
            endpoint.addresses = vec![address(&key, false), address(&key, true)];
            Update::Endpoint(key, Some(endpoint))
        }
        other => other,
    }
}

fn within(restriction: Node, selector: Selector) -> Selector {
    Selector {
        root: Node::And(vec![restriction, selector.root]),
    }
}

/// Keeps updates by other tenants and the administrator, with rules that do not refer to the
/// tenant's objects.
fn of_others(update: Update) -> Option<Update> {
    let of_tenant = |namespace: &str| namespace == TENANT;
    let kept = match &update {
        Update::Endpoint(key, _) => !of_tenant(&key.namespace),
        Update::ServiceAccount(key, _) | Update::Service(key, _) | Update::NetworkSet(key, _) => {
            !of_tenant(&key.namespace)
        }
        Update::Policy(key, _) => !of_tenant(&key.namespace),
        Update::Namespace(..) | Update::Tier(..) => true,
        _ => false,
    };
    let foreign = || Node::NotEquals(LABEL_NAMESPACE.to_owned(), TENANT.to_owned());
    let confine = |entity: &mut EntityMatch| {
        for selector in [&mut entity.selector, &mut entity.not_selector] {
            *selector = selector.take().map(|selector| within(foreign(), selector));
        }
        entity.service = entity
            .service
            .take()
            .filter(|service| !of_tenant(&service.namespace));
    };
    kept.then(|| match with_fixed_address(update) {
        Update::Policy(key, Some(mut policy)) => {
            policy
                .ingress
                .iter_mut()
                .chain(&mut policy.egress)
                .for_each(|rule| {
                    confine(&mut rule.source);
                    confine(&mut rule.destination);
                });
            Update::Policy(key, Some(policy))
        }
        other => other,
    })
}

/// The same update as the tenant could write it: in its namespace, with selectors as the parser
/// scopes them.
fn of_tenant(update: Update) -> Option<Update> {
    let own = || TENANT.to_owned();
    match update {
        Update::Endpoint(key, value) => Some(Update::Endpoint(
            EndpointKey {
                namespace: own(),
                ..key
            },
            value,
        )),
        Update::ServiceAccount(key, value) => Some(Update::ServiceAccount(
            EndpointKey {
                namespace: own(),
                ..key
            },
            value,
        )),
        Update::NetworkSet(key, value) => Some(Update::NetworkSet(
            EndpointKey {
                namespace: own(),
                ..key
            },
            value,
        )),
        Update::Service(key, value) => Some(Update::Service(
            EndpointKey {
                namespace: own(),
                ..key
            },
            value,
        )),
        Update::Policy(key, value) => {
            let kind = if key.kind == PolicyKind::GlobalNetworkPolicy {
                PolicyKind::NetworkPolicy
            } else {
                key.kind
            };
            let inside = || Node::Equals(LABEL_NAMESPACE.to_owned(), own());
            let value = value.map(|policy| Policy {
                selector: within(inside(), policy.selector.clone()),
                ..policy
            });
            Some(Update::Policy(
                PolicyKey {
                    kind,
                    namespace: own(),
                    ..key
                },
                value,
            ))
        }
        _ => None,
    }
    .map(with_fixed_address)
}

fn graph_of(updates: impl IntoIterator<Item = Update>) -> Graph {
    let mut graph = Graph::default();
    updates.into_iter().for_each(|update| graph.apply(update));
    graph.flush();
    graph
}

/// Verdict at a pod on a packet to or from a peer; `None` is an address outside of the cluster.
#[derive(Clone, Debug)]
struct Question {
    pod: EndpointKey,
    peer: Option<EndpointKey>,
    direction: Direction,
    packet: Packet,
}

fn question(namespaces: &'static [&'static str]) -> impl Strategy<Value = Question> {
    let pod = || {
        (select(namespaces), select(&["p0", "p1", "p2"][..]))
            .prop_map(|(namespace, name)| EndpointKey::new(namespace, name))
    };
    let icmp = (0..2_u8, 0..2_u8);
    (
        pod(),
        prop::option::weighted(0.8, pod()),
        any::<(bool, bool)>(),
        protocol(),
        port(),
        port(),
        icmp,
    )
        .prop_map(
            |(pod, peer, (is_ingress, is_ipv6), protocol, source_port, destination_port, icmp)| {
                let is_ipv6 = is_ipv6 && peer.is_some();
                let stranger = || STRANGER.parse().expect("an address");
                let own = address(&pod, is_ipv6);
                let other = peer
                    .as_ref()
                    .map_or_else(stranger, |peer| address(peer, is_ipv6));
                let (source, destination) = if is_ingress {
                    (other, own)
                } else {
                    (own, other)
                };
                let direction = if is_ingress {
                    Direction::Ingress
                } else {
                    Direction::Egress
                };
                let packet = Packet {
                    source,
                    destination,
                    protocol,
                    source_port,
                    destination_port,
                    icmp,
                };
                Question {
                    pod,
                    peer,
                    direction,
                    packet,
                }
            },
        )
}

fn answer(graph: &Graph, question: &Question) -> Action {
    evaluate(graph, &question.pod, question.direction, &question.packet).action
}

/// Runs a property that returns for each case how often it checked something, and fails if that was
/// too rare.
fn often<S: Strategy>(strategy: &S, property: impl Fn(S::Value) -> Result<usize, TestCaseError>) {
    let config = Config {
        cases: 400,
        failure_persistence: None,
        ..Config::default()
    };
    let sum = Cell::new(0);
    let result = TestRunner::new_with_rng(config.clone(), rng(&config)).run(strategy, |value| {
        sum.set(sum.get() + property(value)?);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
    // A property that never sees an allowed packet shows nothing.
    assert!(sum.get() > 200, "it came up {} times only", sum.get());
}

fn rng(config: &Config) -> proptest::test_runner::TestRng {
    proptest::test_runner::TestRng::deterministic_rng(config.rng_algorithm)
}

#[test]
fn nothing_that_a_tenant_writes_changes_what_happens_among_others() {
    let strategy = (
        vec(update(), 20..70),
        vec(update(), 10..60),
        vec(question(&["red", "blue"]), 40),
    );
    often(&strategy, |(common, tenants, questions)| {
        let others: Vec<Update> = common.into_iter().filter_map(of_others).collect();
        let without = graph_of(others.clone());
        let with = graph_of(
            others
                .into_iter()
                .chain(tenants.into_iter().filter_map(of_tenant)),
        );
        let mut allowed = 0;
        for question in questions {
            let (before, after) = (answer(&without, &question), answer(&with, &question));
            prop_assert_eq!(
                before,
                after,
                "{:?} for {:?}",
                question.packet,
                (&question.pod, &question.peer)
            );
            allowed += usize::from(after == Action::Allow);
        }
        Ok(allowed)
    });
}

/// Returns true if a selector matches by what exists, so that fewer labels never match more.
fn is_positive(node: &Node) -> bool {
    match node {
        Node::Has(_) | Node::Equals(..) | Node::In(..) => true,
        Node::Contains(..) | Node::StartsWith(..) | Node::EndsWith(..) => true,
        Node::And(nodes) | Node::Or(nodes) => nodes.iter().all(is_positive),
        Node::All | Node::Global | Node::NotEquals(..) | Node::NotIn(..) | Node::Not(_) => false,
    }
}

/// Policies of one tier for all pods that only allow, and only by positive criteria.
fn opening(update: Update) -> Update {
    let positive = |entity: &mut EntityMatch| {
        (entity.not_nets, entity.not_selector, entity.not_ports) = (Vec::new(), None, Vec::new());
        entity.selector = entity.selector.take().map(|selector| {
            if is_positive(&selector.root) {
                selector
            } else {
                Selector {
                    root: Node::Has("app".to_owned()),
                }
            }
        });
    };
    match with_fixed_address(update) {
        Update::Policy(key, Some(policy)) => {
            let allow = |rules: Vec<Rule>| {
                let rules = rules.into_iter().map(|mut rule| {
                    positive(&mut rule.source);
                    positive(&mut rule.destination);
                    Rule {
                        action: Action::Allow,
                        not_protocol: None,
                        not_icmp: None,
                        ..rule
                    }
                });
                rules.collect()
            };
            let policy = Policy {
                tier: "default".to_owned(),
                selector: Selector { root: Node::All },
                ingress: allow(policy.ingress),
                egress: allow(policy.egress),
                ..policy
            };
            Update::Policy(
                PolicyKey {
                    kind: PolicyKind::GlobalNetworkPolicy,
                    namespace: String::new(),
                    ..key
                },
                Some(policy),
            )
        }
        other => other,
    }
}

/// Update that removes the objects that rules refer to.
fn gone(update: &Update) -> Option<Update> {
    match update {
        Update::Endpoint(key, Some(_)) => Some(Update::Endpoint(key.clone(), None)),
        Update::HostEndpoint(name, Some(_)) => Some(Update::HostEndpoint(name.clone(), None)),
        Update::Namespace(name, Some(_)) => Some(Update::Namespace(name.clone(), None)),
        Update::ServiceAccount(key, Some(_)) => Some(Update::ServiceAccount(key.clone(), None)),
        Update::NetworkSet(key, Some(_)) => Some(Update::NetworkSet(key.clone(), None)),
        Update::Service(key, Some(_)) => Some(Update::Service(key.clone(), None)),
        Update::Tier(name, Some(_)) => Some(Update::Tier(name.clone(), None)),
        _ => None,
    }
}

#[test]
fn what_is_missing_opens_nothing() {
    let strategy = (
        vec(update(), 30..80),
        vec(any::<Index>(), 1..8),
        vec(question(&NAMESPACES), 40),
    );
    often(&strategy, |(updates, missing, questions)| {
        let updates: Vec<Update> = updates.into_iter().map(opening).collect();
        let removals: Vec<Update> = missing
            .iter()
            .filter_map(|index| gone(index.get(&updates)))
            .collect();
        let complete = graph_of(updates.clone());
        let partial = graph_of(updates.into_iter().chain(removals.clone()));
        let mut allowed = 0;
        for question in questions {
            let (before, after) = (answer(&complete, &question), answer(&partial, &question));
            prop_assert!(
                before == Action::Allow || after != Action::Allow,
                "{:?} is allowed to {:?} once there is nothing of {removals:?}",
                question.packet,
                question.pod
            );
            allowed += usize::from(before == Action::Allow);
        }
        Ok(allowed)
    });
}
