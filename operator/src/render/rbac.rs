//! Service accounts and what they may do. Each rule is here because a line of the component does exactly that.

use serde_json::{Value, json};

use super::{Context, NAMESPACE, NODE, TYPHA, labels};
use crate::object::Object;

const READ: [&str; 3] = ["get", "list", "watch"];

/// Kinds of `projectcalico.org/v3` that typha reads.
const TYPHA_KINDS: [&str; 14] = [
    "blockaffinities",
    "clusterinformations",
    "felixconfigurations",
    "globalnetworkpolicies",
    "globalnetworksets",
    "ipamblocks",
    "ipamconfigurations",
    "ippools",
    "networkpolicies",
    "networksets",
    "stagedglobalnetworkpolicies",
    "stagedkubernetesnetworkpolicies",
    "stagednetworkpolicies",
    "tiers",
];

/// Service accounts, roles and bindings of both components.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    [(TYPHA, typha_rules()), (NODE, node_rules())]
        .into_iter()
        .flat_map(|(name, rules)| account(context, name, &rules))
        .collect()
}

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({ "apiGroups": groups, "resources": resources, "verbs": verbs })
}

/// Typha reads what the computation takes as input, and writes nothing.
pub(super) fn typha_rules() -> Vec<Value> {
    vec![
        rule(&[""], &["namespaces", "nodes", "pods", "serviceaccounts"], &READ),
        rule(&["networking.k8s.io"], &["networkpolicies"], &READ),
        rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
        rule(&["policy.networking.k8s.io"], &["clusternetworkpolicies"], &READ),
        rule(&["projectcalico.org"], &TYPHA_KINDS, &READ),
        // Whether that kind is served at all, and at which version.
        json!({
            "apiGroups": ["apiextensions.k8s.io"],
            "resources": ["customresourcedefinitions"],
            "resourceNames": ["clusternetworkpolicies.policy.networking.k8s.io"],
            "verbs": ["get"],
        }),
    ]
}

/// The agent writes what is its node's own; that it is its own is checked by the admission policies beside this file.
pub(super) fn node_rules() -> Vec<Value> {
    vec![
        // Addresses and tunnel of the node, and the condition that the network is up.
        rule(&[""], &["nodes"], &["get", "patch"]),
        rule(&[""], &["nodes/status"], &["patch"]),
        // Addresses of pods, as annotations.
        rule(&[""], &["pods/status"], &["patch"]),
        rule(
            &["projectcalico.org"],
            &["blockaffinities", "ipamblocks", "ipamhandles"],
            &["get", "list", "watch", "create", "update", "delete"],
        ),
        rule(
            &["projectcalico.org"],
            &["clusterinformations", "ipamconfigurations", "ippools", "ipreservations"],
            &READ,
        ),
        // Its own certificate.
        rule(&["certificates.k8s.io"], &["certificatesigningrequests"], &["create", "get", "watch"]),
    ]
}

fn account(context: &Context<'_>, name: &str, rules: &[Value]) -> [Object; 3] {
    [
        context.object(
            "ServiceAccount",
            json!({ "metadata": { "name": name, "namespace": NAMESPACE, "labels": labels(name) } }),
        ),
        context.object("ClusterRole", json!({ "metadata": { "name": name, "labels": labels(name) }, "rules": rules })),
        context.object(
            "ClusterRoleBinding",
            json!({
                "metadata": { "name": name, "labels": labels(name) },
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "ClusterRole",
                    "name": name,
                },
                "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": NAMESPACE }],
            }),
        ),
    ]
}
