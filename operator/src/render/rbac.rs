//! Service accounts and their permissions. Each rule is here because the component sends exactly
//! that request.

use kube::ResourceExt;
use margay_api::crds;
use margay_api::k8s::cnp::DEFINITION;
use margay_api::report::CONFIG_MAP;
use margay_api::storage::{Kind, Mode};
use serde_json::{Value, json};

use super::{Context, NAMESPACE, NODE, TYPHA, labels};
use crate::manifest::Object;

const READ: [&str; 3] = ["get", "list", "watch"];

/// Kinds of `projectcalico.org/v3` that typha watches.
const TYPHA_KINDS: [&str; 15] = [
    "bgpconfigurations",
    "bgpfilters",
    "bgppeers",
    "felixconfigurations",
    "globalnetworkpolicies",
    "globalnetworksets",
    "hostendpoints",
    "ipamblocks",
    "ippools",
    "networkpolicies",
    "networksets",
    "stagedglobalnetworkpolicies",
    "stagedkubernetesnetworkpolicies",
    "stagednetworkpolicies",
    "tiers",
];

/// Returns service accounts, roles and bindings of both components.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    let mode = context.settings.mode;
    [(TYPHA, typha_rules(mode)), (NODE, node_rules(mode))]
        .into_iter()
        .flat_map(|(name, rules)| account(context, name, &rules))
        .collect()
}

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({ "apiGroups": groups, "resources": resources, "verbs": verbs })
}

/// Returns a rule for kinds of Calico, by their plural in `projectcalico.org/v3`, in that storage.
pub(crate) fn calico(mode: Mode, plurals: &[&str], verbs: &[&str]) -> Value {
    let resources: Vec<&str> = plurals
        .iter()
        .map(|plural| Kind::of_plural(plural).map_or(*plural, |kind| kind.plural_in(mode)))
        .collect();
    rule(&[mode.group()], &resources, verbs)
}

/// Names of definitions (CRDs) of kinds that a cluster may lack.
fn optional(mode: Mode) -> Vec<String> {
    let mut names = vec![DEFINITION.to_owned()];
    if mode == Mode::V1 {
        let later = crds::later().into_iter();
        let read =
            later.filter(|definition| TYPHA_KINDS.contains(&definition.spec.names.plural.as_str()));
        names.extend(read.map(|definition| definition.name_any()));
    }
    names
}

/// Typha reads the inputs of its computation, and reports problems: as events on objects, and in
/// its key of one ConfigMap.
pub(super) fn typha_rules(mode: Mode) -> Vec<Value> {
    vec![
        rule(
            &[""],
            &["namespaces", "nodes", "pods", "serviceaccounts", "services"],
            &READ,
        ),
        rule(&["networking.k8s.io"], &["networkpolicies"], &READ),
        rule(&["discovery.k8s.io"], &["endpointslices"], &READ),
        rule(
            &["policy.networking.k8s.io"],
            &["clusternetworkpolicies"],
            &READ,
        ),
        calico(mode, &TYPHA_KINDS, &READ),
        rule(&["events.k8s.io"], &["events"], &["create"]),
        json!({
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": [CONFIG_MAP],
            "verbs": ["create", "patch"],
        }),
        // Shows whether these kinds are served, and at which version.
        json!({
            "apiGroups": ["apiextensions.k8s.io"],
            "resources": ["customresourcedefinitions"],
            "resourceNames": optional(mode),
            "verbs": ["get"],
        }),
    ]
}

/// The agent writes objects of its own node; the admission policies in this folder check that they
/// are.
pub(super) fn node_rules(mode: Mode) -> Vec<Value> {
    vec![
        // Addresses, tunnels and interfaces of the node, as annotations.
        rule(&[""], &["nodes"], &["patch"]),
        // Addresses of pods, as annotations.
        rule(&[""], &["pods/status"], &["patch"]),
        // Restrictions of the pools for the pods of a namespace.
        rule(&[""], &["namespaces"], &["get"]),
        calico(
            mode,
            &["blockaffinities", "ipamblocks", "ipamhandles"],
            &["get", "create", "update", "delete"],
        ),
        calico(
            mode,
            &[
                "clusterinformations",
                "ipamconfigurations",
                "ippools",
                "ipreservations",
            ],
            &READ,
        ),
        // Its own certificate.
        rule(
            &["certificates.k8s.io"],
            &["certificatesigningrequests"],
            &["create", "get", "watch"],
        ),
    ]
}

fn account(context: &Context<'_>, name: &str, rules: &[Value]) -> [Object; 3] {
    [
        context.object(
            "ServiceAccount",
            json!({ "metadata": { "name": name, "namespace": NAMESPACE, "labels": labels(name) } }),
        ),
        context.object(
            "ClusterRole",
            json!({ "metadata": { "name": name, "labels": labels(name) }, "rules": rules }),
        ),
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
