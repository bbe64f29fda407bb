//! Graph and evaluator agree with the objects on every packet, and no label that a tenant can write
//! reaches beyond its namespace.

use crate::naive::Naive;
use crate::reference::Objects;
use crate::world::{address, endpoint_key, host_name, icmp_type, port, protocol, update};
use margay_api::endpoint::{EndpointKey, WorkloadEndpoint};
use margay_api::meta::{Labels, NamespacedName};
use margay_api::network::NetworkSet;
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, StagedPolicy, Traffic};
use margay_api::rule::{Action, EntityMatch, Protocol, Rule};
use margay_api::selector::Selector;
use margay_calc::evaluate::{Direction, HostStage, Packet, connect, evaluate, evaluate_host};
use margay_calc::graph::Graph;
use margay_calc::model::{Record, RecordId};
use margay_calc::text;
use margay_calc::update::{NamespaceInfo, Update};
use proptest::prelude::*;

fn packet() -> impl Strategy<Value = Packet> {
    let addresses = (address(), address()).prop_filter("of one version", |(from, to)| {
        from.is_ipv4() == to.is_ipv4()
    });
    (
        addresses,
        protocol(),
        port(),
        port(),
        (icmp_type(), 0..2_u8),
    )
        .prop_map(
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

fn stage() -> impl Strategy<Value = HostStage> {
    prop::sample::select(vec![
        HostStage::Untracked,
        HostStage::PreDnat,
        HostStage::Normal,
        HostStage::Forward,
    ])
}

/// Graph and objects after these updates.
fn apply_all(updates: Vec<Update>) -> (Graph, Objects) {
    let (mut graph, mut objects) = (Graph::default(), Objects::default());
    for update in updates {
        graph.apply(update.clone());
        objects.apply(update);
    }
    graph.flush();
    (graph, objects)
}

/// The objects as if staged policies were enforced.
fn staged_enforced(objects: &Objects) -> Objects {
    let mut objects = objects.clone();
    for (key, staged) in std::mem::take(&mut objects.staged) {
        let key = PolicyKey {
            kind: key.kind.enforced(),
            ..key
        };
        match staged {
            StagedPolicy::Set(policy) => objects.policies.insert(key, policy),
            StagedPolicy::Delete => objects.policies.remove(&key),
            StagedPolicy::Ignore => None,
        };
    }
    objects
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn verdicts_are_those_of_the_objects(
        updates in prop::collection::vec(update(), 20..80),
        packets in prop::collection::vec((endpoint_key(), any::<bool>(), packet()), 60),
    ) {
        let (graph, objects) = apply_all(updates);
        let would_be = staged_enforced(&objects);
        let pending = graph.staged_view();
        prop_assert_eq!(
            pending.is_some(),
            objects.staged.values().any(|staged| *staged != StagedPolicy::Ignore),
        );
        for (key, is_ingress, packet) in packets {
            let direction = if is_ingress { Direction::Ingress } else { Direction::Egress };
            let verdict = evaluate(&graph, &key, direction, &packet);
            let wanted = Naive(&objects).verdict(&key, direction, &packet);
            prop_assert_eq!(
                verdict.action,
                wanted,
                "{} {:?} {:?}\n{}",
                key,
                direction,
                packet,
                text::verdict(&verdict),
            );
            if let Some(pending) = pending {
                let verdict = evaluate(&pending, &key, direction, &packet);
                let wanted = Naive(&would_be).verdict(&key, direction, &packet);
                prop_assert_eq!(
                    verdict.action,
                    wanted,
                    "pending {} {:?}\n{}",
                    key,
                    packet,
                    text::verdict(&verdict),
                );
            }
            // A node evaluating the records it holds gets the same verdict.
            if let Some(endpoint) = objects.endpoints.get(&key).filter(
                |endpoint| !endpoint.node.is_empty(),
            ) {
                let local = evaluate(&graph.view(&endpoint.node), &key, direction, &packet);
                prop_assert_eq!(local, verdict);
            }
        }
    }

    #[test]
    fn verdicts_about_hosts_are_those_of_the_objects(
        updates in prop::collection::vec(update(), 20..80),
        packets in prop::collection::vec((host_name(), stage(), any::<bool>(), packet()), 60),
    ) {
        let (graph, objects) = apply_all(updates);
        let would_be = staged_enforced(&objects);
        for (name, stage, is_ingress, packet) in packets {
            let direction = if is_ingress { Direction::Ingress } else { Direction::Egress };
            let node = objects.hosts.get(name).map(|host| host.node.as_str()).unwrap_or_default();
            let verdict = evaluate_host(&graph.view(node), name, stage, direction, &packet);
            let wanted = Naive(&objects).host_verdict(name, stage, direction, &packet);
            prop_assert_eq!(
                verdict.action,
                wanted,
                "{} {:?} {:?} {:?}\n{}",
                name,
                stage,
                direction,
                packet,
                text::verdict(&verdict),
            );
            if let Some(pending) = graph.staged_view().filter(|_| objects.settings.is_empty()) {
                let verdict = evaluate_host(&pending, name, stage, direction, &packet);
                let wanted = Naive(&would_be).host_verdict(name, stage, direction, &packet);
                prop_assert_eq!(
                    verdict.action,
                    wanted,
                    "pending {} {:?}\n{}",
                    name,
                    packet,
                    text::verdict(&verdict),
                );
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
        graph.apply(Update::Namespace(String::from("tenant"), Some(NamespaceInfo::default())));
        graph.apply(Update::Namespace(String::from("victim"), Some(NamespaceInfo::default())));
        let trusted = label("team", "trusted").into();
        graph.apply(Update::Namespace(String::from("friend"), Some(trusted)));
        graph.apply(
            Update::ServiceAccount(
                NamespacedName::new("friend", "robot"),
                Some(label("role", "admin")),
            ),
        );
        // A tenant may also write network sets with any CIDR.
        let nets = vec!["10.0.0.1/32".parse().expect("a range")];
        graph.apply(
            Update::NetworkSet(
                NamespacedName::new("tenant", "nets"),
                Some(NetworkSet { labels: set_labels, nets }),
            ),
        );
        graph.apply(protection());
        graph.flush();
        let is_allowed = |from: &EndpointKey| {
            let connection = connect(&graph, from, &victim, Protocol::TCP, 80);
            connection.expect("both have addresses").is_allowed()
        };
        prop_assert!(is_allowed(&friend), "the policy lets friends in");
        prop_assert!(!is_allowed(&tenant), "the policy lets the tenant in");
        let record = graph.record(&RecordId::Endpoint(tenant));
        let is_free = matches!(
            record.as_deref(),
            Some(Record::Endpoint(endpoint)) if endpoint.tiers.is_empty(),
        );
        prop_assert!(is_free, "the policy takes hold of the tenant's pod");
    }
}

fn pod(
    graph: &mut Graph,
    namespace: &str,
    address: &str,
    labels: Labels,
    service_account: &str,
) -> EndpointKey {
    let key = EndpointKey::new(namespace, "pod");
    let endpoint = WorkloadEndpoint {
        node: String::from("n1"),
        labels,
        service_account: service_account.to_owned(),
        addresses: vec![address.parse().expect("an address")],
        ports: Vec::new(),
        uid: String::new(),
        interface: String::from("cali0"),
    };
    graph.apply(Update::Endpoint(key.clone(), Some(endpoint)));
    key
}

fn label(key: &str, value: &str) -> Labels {
    Labels::from([(key.to_owned(), value.to_owned())])
}

/// A policy that admits the victim itself and its friends, referred to in every possible way.
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
        source: EntityMatch {
            selector: Some(parse(source)),
            ..EntityMatch::default()
        },
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
            traffic: Traffic::Normal,
            applies_ingress: true,
            applies_egress: false,
            ingress: ingress.to_vec(),
            egress: Vec::new(),
        }),
    )
}

/// Labels that a tenant may write: reserved keys with values that would open something.
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
