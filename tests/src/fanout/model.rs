//! The seeded model: nodes, namespaces of 100 pods with two policies each, and pods with nine
//! labels, as JSON of the API.
//!
//! Twenty consecutive nodes form a group that shares a few namespaces, each on twelve of them, so a
//! change of a pod concerns twelve nodes. The event is a pod that comes back with another address:
//! the sets of its namespace change, and with [`everything`] a set that all nodes have.

use std::net::Ipv4Addr;

use serde_json::json;

/// Pods per namespace.
pub const NAMESPACE_PODS: usize = 100;
/// Nodes that a namespace's pods are on.
pub const NAMESPACE_NODES: usize = 12;
/// Nodes that share namespaces.
const GROUP: usize = 20;
/// Pods per node.
const NODE_PODS: usize = 20;
/// First address of pods as they are listed.
const LISTED: u32 = u32::from_be_bytes([10, 0, 0, 0]);
/// Address of event 0; that of event N is N higher.
const EVENTS: u32 = u32::from_be_bytes([11, 0, 0, 0]);
/// Number of addresses for events.
const EVENT_ADDRESSES: u32 = 1 << 24;

/// Name of a node.
pub fn node_name(node: usize) -> String {
    format!("node-{node:05}")
}

/// Address that the pod has after this event.
pub fn event_address(event: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(EVENTS + event % EVENT_ADDRESSES)
}

/// Number of the event that assigned an address; `None` for addresses of the list.
pub fn event_of(address: Ipv4Addr) -> Option<u32> {
    address
        .to_bits()
        .checked_sub(EVENTS)
        .filter(|event| *event < EVENT_ADDRESSES)
}

/// Pseudo-random numbers (SplitMix64).
#[derive(Debug, Clone)]
pub struct Numbers(u64);

impl Numbers {
    /// Numbers that follow from the seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Takes the next number.
    pub fn take(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Takes the next number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.take() % limit.max(1) as u64) as usize
    }
}

/// Size and seed of a model.
#[derive(Debug, Clone, Copy)]
pub struct ClusterModel {
    /// Number of pods.
    pub pods: usize,
    /// Number of nodes.
    pub nodes: usize,
    seed: u64,
}

impl ClusterModel {
    /// A model of `pods` pods, twenty per node, but on at least `nodes` nodes.
    pub fn new(pods: usize, nodes: usize, seed: u64) -> Self {
        let nodes = nodes.max(pods / NODE_PODS).next_multiple_of(GROUP);
        Self { pods, nodes, seed }
    }

    /// Number of namespaces.
    pub fn namespaces(&self) -> usize {
        self.pods.div_ceil(NAMESPACE_PODS)
    }

    fn per_group(&self) -> usize {
        (self.namespaces() * GROUP).div_ceil(self.nodes).max(1)
    }

    /// Node of a pod.
    pub fn node_of(&self, pod: usize) -> usize {
        let (namespace, place) = (pod / NAMESPACE_PODS, pod % NAMESPACE_PODS);
        let (group, number) = (namespace / self.per_group(), namespace % self.per_group());
        let mut order: Vec<usize> = (0..GROUP).collect();
        let mut numbers = Numbers::new(self.seed ^ group as u64);
        for last in (1..GROUP).rev() {
            order.swap(last, numbers.below(last + 1));
        }
        group * GROUP + order[(number * NAMESPACE_NODES + place % NAMESPACE_NODES) % GROUP]
    }

    /// Number of the pods, from the first on, that are in namespaces of which all nodes are among
    /// the first `nodes`.
    pub fn pods_within(&self, nodes: usize) -> usize {
        (nodes / GROUP * self.per_group() * NAMESPACE_PODS).min(self.pods)
    }

    /// The pod as a watch event; `event` is the last event of it, if there was one.
    pub fn pod(&self, kind: &str, pod: usize, event: Option<u32>) -> String {
        let namespace = pod / NAMESPACE_PODS;
        let mut numbers = Numbers::new(self.seed ^ (pod as u64) << 20);
        let address = event.map_or_else(
            || Ipv4Addr::from_bits(LISTED + 256 + pod as u32),
            event_address,
        );
        let container: String = (0..4).map(|_| format!("{:016x}", numbers.take())).collect();
        let set = numbers.take() as u32;
        let role = if pod.is_multiple_of(10) { "db" } else { "web" };
        let revision = u64::from(event.unwrap_or_default()) + 1000;
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("service-{:08x}-{pod:06}", set >> 8),
                "namespace": namespace_name(namespace),
                "uid": uid(&mut numbers),
                "resourceVersion": revision.to_string(),
                "labels": {
                    "app": format!("service-{}", namespace % 40),
                    "role": role,
                    "team": format!("team-{}", namespace % 25),
                    "app.kubernetes.io/instance": format!("instance-{pod}"),
                    "app.kubernetes.io/version": "1.7.3",
                    "app.kubernetes.io/component": "backend",
                    "app.kubernetes.io/part-of": "shop",
                    "pod-template-hash": format!("{set:08x}"),
                    "statefulset.kubernetes.io/pod-name": format!("pod-{pod}"),
                },
                "annotations": {"cni.projectcalico.org/containerID": container},
            },
            "spec": {
                "nodeName": node_name(self.node_of(pod)), "serviceAccountName": "default",
                "containers": [{
                    "name": "main",
                    "image": "example/service:1.7.3",
                    "ports": [{"name": "http", "containerPort": 8080}],
                }],
            },
            "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
        });
        line(kind, &object)
    }

    /// The namespace as a watch event.
    pub fn namespace(&self, namespace: usize) -> String {
        let name = namespace_name(namespace);
        let labels =
            json!({"kubernetes.io/metadata.name": name, "tier": format!("tier-{}", namespace % 3)});
        let metadata = json!({"name": name, "resourceVersion": "1", "labels": labels});
        line(
            "ADDED",
            &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}),
        )
    }

    /// The two policies of a namespace as watch events: its pods accept each other, and its
    /// databases only its web servers.
    pub fn policies(&self, namespace: usize) -> [String; 2] {
        let policy = |name: &str, spec: serde_json::Value| {
            let metadata = json!({
                "name": name,
                "namespace": namespace_name(namespace),
                "resourceVersion": "1",
            });
            let object = json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": metadata,
                "spec": spec,
            });
            line("ADDED", &object)
        };
        let web = json!([
            {
                "from": [{"podSelector": {"matchLabels": {"role": "web"}}}],
                "ports": [{"port": 5432}],
            },
        ]);
        [
            policy(
                "same-namespace",
                json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}),
            ),
            policy(
                "databases",
                json!({"podSelector": {"matchLabels": {"role": "db"}}, "ingress": web}),
            ),
        ]
    }
}

/// A policy that applies to what the selector selects and refers to all pods, as a watch event:
/// each of their nodes has a set of all addresses.
pub fn everything(name: &str, selector: &str) -> String {
    let rule = json!({"action": "Allow", "source": {"selector": format!("!has(no-{name})")}});
    let spec = json!({
        "tier": "default",
        "order": 10,
        "selector": selector,
        "types": ["Ingress"],
        "ingress": [rule],
    });
    let metadata = json!({"name": format!("default.{name}"), "resourceVersion": "5"});
    line(
        "ADDED",
        &json!({
            "apiVersion": "projectcalico.org/v3",
            "kind": "GlobalNetworkPolicy",
            "metadata": metadata,
            "spec": spec,
        }),
    )
}

/// The default tier as a watch event.
pub fn tier() -> String {
    let metadata = json!({"name": "default", "resourceVersion": "1"});
    let spec = json!({"defaultAction": "Deny"});
    line(
        "ADDED",
        &json!({
            "apiVersion": "projectcalico.org/v3",
            "kind": "Tier",
            "metadata": metadata,
            "spec": spec,
        }),
    )
}

/// End of a streamed list.
pub fn list_end() -> String {
    let annotations = json!({"k8s.io/initial-events-end": "true"});
    line(
        "BOOKMARK",
        &json!({"metadata": {"resourceVersion": "4", "annotations": annotations}}),
    )
}

fn line(kind: &str, object: &serde_json::Value) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

fn namespace_name(namespace: usize) -> String {
    format!("namespace-{namespace:05}")
}

fn uid(numbers: &mut Numbers) -> String {
    let (high, low) = (numbers.take(), numbers.take());
    let [a, b, c] = [high >> 32, (high >> 16) & 0xffff, high & 0xffff];
    format!(
        "{a:08x}-{b:04x}-{c:04x}-{:04x}-{:012x}",
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    #[test]
    fn a_namespace_is_on_twelve_nodes_and_every_node_has_pods() {
        for (pods, nodes) in [(10_000, 64), (10_000, 1000), (100_000, 400)] {
            let model = ClusterModel::new(pods, nodes, 7);
            let mut of: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
            let mut used = BTreeSet::new();
            for pod in 0..pods {
                let node = model.node_of(pod);
                assert!(node < model.nodes);
                of.entry(pod / NAMESPACE_PODS).or_default().insert(node);
                used.insert(node);
            }
            assert!(
                of.values().all(|nodes| nodes.len() == NAMESPACE_NODES),
                "{pods}"
            );
            assert_eq!(used.len(), model.nodes, "{pods} on {nodes}");
            let within = model.pods_within(nodes);
            assert!(within > 0 && (0..within).all(|pod| model.node_of(pod) < nodes));
        }
    }

    #[test]
    fn an_address_names_its_event() {
        assert_eq!(event_of(event_address(70_000)), Some(70_000));
        assert_eq!(event_of(Ipv4Addr::new(10, 9, 8, 7)), None);
        assert_eq!(event_of(Ipv4Addr::new(12, 0, 0, 0)), None);
    }
}
