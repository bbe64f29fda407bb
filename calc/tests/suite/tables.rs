//! Tables of cases: actions, and packets that must or must not pass. Here for the graph and the
//! evaluator, elsewhere with real packets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::endpoint::EndpointKey;
use margay_api::k8s;
use margay_api::network::NodeInfo;
use margay_api::policy::{PolicyKey, PolicyKind, Tier};
use margay_api::rule::Action;
use margay_api::{meta, policy};
use margay_calc::evaluate::{Direction, Packet, connect, evaluate};
use margay_calc::graph::Graph;
use margay_calc::update::Update;
use serde_json::{Value, json};

use crate::notation::protocol;

const NETWORK_POLICY_API: &str = include_str!("../../../tests/data/network-policy-api.json");

#[test]
fn the_cases_of_network_policy_api() {
    let table: Value = serde_json::from_str(NETWORK_POLICY_API).expect("JSON");
    let mut rows = [0_u64; 2];
    for case in table["Cases"].as_array().expect("a list") {
        let mut world = World::new(&table["Fixture"]);
        for (number, step) in case["steps"].as_array().expect("a list").iter().enumerate() {
            let named = format!("case {}, step {number}", case["n"]);
            world.step(step, &named);
            for (count, field) in rows.iter_mut().zip(["Allowed", "Blocked"]) {
                *count += step[field].as_u64().expect("a number");
            }
        }
    }
    assert!(
        rows.iter().all(|count| *count > 800),
        "the table has teeth: {rows:?}"
    );
}

struct World {
    graph: Graph,
    addresses: BTreeMap<EndpointKey, IpAddr>,
}

impl World {
    fn new(fixture: &Value) -> Self {
        let mut graph = Graph::default();
        let tiers = [
            ("kube-admin", 1e3, Action::Pass),
            ("default", 1e6, Action::Deny),
            ("kube-baseline", 1e7, Action::Pass),
        ];
        for (name, order, default_action) in tiers {
            let tier = Tier {
                order: policy::Order(Some(order)),
                default_action,
            };
            graph.apply(Update::Tier(name.to_owned(), Some(tier)));
        }
        for index in 0..2_u8 {
            let info = NodeInfo {
                ipv4: Some(
                    format!("192.0.2.{}/24", index + 1)
                        .parse()
                        .expect("an address"),
                ),
                labels: meta::Labels::from([("kubernetes.io/os".to_owned(), "linux".to_owned())]),
                ..NodeInfo::default()
            };
            graph.apply(Update::Node(format!("n{index}"), Some(info)));
        }
        let mut world = Self {
            graph,
            addresses: BTreeMap::new(),
        };
        for namespace in fixture["Namespaces"].as_array().expect("a list") {
            let name = text(&namespace["Name"]);
            world.label_namespace(name, &namespace["Labels"]);
            for pod in namespace["Pods"].as_array().expect("a list") {
                world.add_pod(name, pod);
            }
        }
        world
    }

    fn label_namespace(&mut self, name: &str, labels: &Value) {
        let object: Namespace = decoded(json!({ "metadata": { "name": name, "labels": labels } }));
        let (name, labels) = k8s::namespace(&object);
        self.graph
            .apply(Update::Namespace(name, Some(labels.into())));
    }

    fn add_pod(&mut self, namespace: &str, pod: &Value) {
        let last = self.addresses.len() + 1;
        let ports: Vec<Value> = { pod["Ports"].as_array().expect("a list").iter() }
            .map(|port| {
                json!({
                    "name": port["Name"],
                    "protocol": port["Protocol"],
                    "containerPort": port["Port"],
                })
            })
            .collect();
        let object: Pod = decoded(json!({
            "metadata": { "namespace": namespace, "name": pod["Name"], "labels": pod["Labels"] },
            "spec": {
                "nodeName": format!("n{}", last % 2),
                "containers": [{ "name": "c", "ports": ports }],
            },
            "status": { "podIP": format!("10.0.0.{last}") },
        }));
        let (key, endpoint) = k8s::pod::workload_endpoint(&object).expect("it is on a node");
        self.addresses.insert(key.clone(), endpoint.addresses[0]);
        self.graph.apply(Update::Endpoint(key, Some(endpoint)));
    }

    fn step(&mut self, step: &Value, named: &str) {
        for action in step["Actions"].as_array().expect("a list") {
            self.act(action);
        }
        self.graph.flush();
        let rows = step["Rows"].as_array().expect("a list");
        for row in rows.iter().map(text) {
            let [from, to, port, wanted] = row.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{named}: {row}")
            };
            let (allowed, why) = self.ask(from, to, port);
            assert_eq!(allowed, wanted == "allowed", "{named}: {row}\n{why}");
        }
        let allowed = rows
            .iter()
            .filter(|row| text(row).ends_with(" allowed"))
            .count() as u64;
        let counts = (Some(allowed), Some(rows.len() as u64 - allowed));
        assert_eq!(
            (step["Allowed"].as_u64(), step["Blocked"].as_u64()),
            counts,
            "{named}: counts of rows"
        );
    }

    fn act(&mut self, action: &Value) {
        let (verb, what) = action
            .as_object()
            .and_then(|action| action.iter().next())
            .expect("one action");
        match verb.as_str() {
            "CreateClusterPolicy" | "UpdateClusterPolicy" => {
                let object = self.with_addresses(&what["Policy"]);
                let object: k8s::cnp::ClusterNetworkPolicy = decoded(object);
                let parsed = k8s::cnp::policy(&object).expect("a sound policy");
                self.graph
                    .apply(Update::Policy(k8s::cnp::key(&object), Some(parsed)));
            }
            "DeleteClusterPolicy" => {
                let kind = PolicyKind::KubernetesClusterNetworkPolicy;
                self.remove(kind, "", text(&what["Name"]));
            }
            "CreatePolicy" | "UpdatePolicy" => {
                let object: NetworkPolicy = decoded(what["Policy"].clone());
                let (key, parsed) = k8s::netpol::policy(&object).expect("a sound policy");
                self.graph.apply(Update::Policy(key, Some(parsed)));
            }
            "DeletePolicy" => {
                let kind = PolicyKind::KubernetesNetworkPolicy;
                self.remove(kind, text(&what["Namespace"]), text(&what["Name"]));
            }
            "SetNamespaceLabels" => self.label_namespace(text(&what["Namespace"]), &what["Labels"]),
            other => panic!("unknown action {other}"),
        }
    }

    fn remove(&mut self, kind: PolicyKind, namespace: &str, name: &str) {
        let key = PolicyKey {
            kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        };
        self.graph.apply(Update::Policy(key, None));
    }

    /// Replaces `{{ip NAMESPACE/POD}}` with the pod's address.
    fn with_addresses(&self, object: &Value) -> Value {
        let mut written = object.to_string();
        for (key, address) in &self.addresses {
            written = written.replace(&format!("{{{{ip {key}}}}}"), &address.to_string());
        }
        assert!(!written.contains("{{"), "{written}");
        serde_json::from_str(&written).expect("JSON")
    }

    /// Returns whether a packet arrives, and the trace.
    fn ask(&self, from: &str, to: &str, port: &str) -> (bool, String) {
        let (protocol_name, port) = port.split_once('/').expect("PROTOCOL/port");
        let (protocol, port) = (
            protocol(&protocol_name.to_lowercase()),
            port.parse().expect("a port"),
        );
        let key = |name: &str| {
            let (namespace, pod) = name.split_once('/').expect("namespace/pod");
            EndpointKey::new(namespace, pod)
        };
        let from = key(from);
        if let Some(index) = to.strip_prefix("node:") {
            let index: u8 = index.parse().expect("a number");
            let packet = Packet {
                source: self.addresses[&from],
                destination: IpAddr::from([192, 0, 2, index + 1]),
                protocol,
                source_port: 49_152,
                destination_port: port,
                icmp: (8, 0),
            };
            let verdict = evaluate(&self.graph, &from, Direction::Egress, &packet);
            return (
                verdict.action == Action::Allow,
                margay_calc::text::verdict(&verdict),
            );
        }
        let connection =
            connect(&self.graph, &from, &key(to), protocol, port).expect("both have addresses");
        let why = margay_calc::text::verdict(&connection.egress)
            + &margay_calc::text::verdict(&connection.ingress);
        (connection.is_allowed(), why)
    }
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

fn decoded<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("an object of its kind")
}
