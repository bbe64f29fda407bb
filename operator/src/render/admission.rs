//! What RBAC cannot say: an agent may write what belongs to its own node, and nothing else.
//!
//! The API server puts the node that an agent's token is bound to into the request; these policies compare it with what is written. One policy
//! for each kind, so that each is checked against that kind's schema, in the storage that the cluster has: IPAM's kinds have the same names and fields in both.

use margay_api::storage::Mode;
use margay_api::v3;
use serde_json::{Value, json};

use super::{Context, NODE, labels};
use crate::csr::{NODE_EXTRA, REQUESTER};
use crate::object::Object;

/// One policy: which requests, and what has to hold for them.
struct Guard {
    name: &'static str,
    group: &'static str,
    version: &'static str,
    resources: &'static [&'static str],
    operations: &'static [&'static str],
    variables: &'static [(&'static str, &'static str)],
    rules: &'static [(&'static str, &'static str)],
}

/// Annotations before and after.
const ANNOTATIONS: [(&str, &str); 2] = [
    ("before", "has(oldObject.metadata.annotations) ? oldObject.metadata.annotations : {}"),
    ("after", "has(object.metadata.annotations) ? object.metadata.annotations : {}"),
];
const SAME_LABELS: (&str, &str) = (
    "(has(object.metadata.labels) ? object.metadata.labels : {}) == \
     (has(oldObject.metadata.labels) ? oldObject.metadata.labels : {})",
    "an agent changes no labels",
);

static GUARDS: &[Guard] = &[
    Guard {
        name: "margay-node-nodes",
        group: "",
        version: "v1",
        resources: &["nodes", "nodes/status"],
        operations: &["UPDATE"],
        variables: &ANNOTATIONS,
        rules: &[
            ("object.metadata.name == variables.node", "an agent writes its own Node only"),
            SAME_LABELS,
            ("object.spec == oldObject.spec", "an agent changes no Node's spec"),
            (
                "variables.after.all(k, k.startsWith('projectcalico.org/') || \
                 (k in variables.before && variables.before[k] == variables.after[k])) && \
                 variables.before.all(k, k.startsWith('projectcalico.org/') || k in variables.after)",
                "an agent changes no annotations of a Node but projectcalico.org/*",
            ),
        ],
    },
    Guard {
        name: "margay-node-pods",
        group: "",
        version: "v1",
        resources: &["pods/status"],
        operations: &["UPDATE"],
        variables: &ANNOTATIONS,
        rules: &[
            (
                "has(object.spec.nodeName) && object.spec.nodeName == variables.node",
                "an agent writes Pods of its own node only",
            ),
            SAME_LABELS,
            ("object.status == oldObject.status", "an agent changes no Pod's status"),
            (
                "variables.after.all(k, k.startsWith('cni.projectcalico.org/') || \
                 (k in variables.before && variables.before[k] == variables.after[k])) && \
                 variables.before.all(k, k.startsWith('cni.projectcalico.org/') || k in variables.after)",
                "an agent changes no annotations of a Pod but cni.projectcalico.org/*",
            ),
        ],
    },
    Guard {
        name: "margay-node-blockaffinities",
        group: "projectcalico.org",
        version: "v3",
        resources: &["blockaffinities"],
        operations: &["CREATE", "UPDATE", "DELETE"],
        variables: &[],
        rules: &[(
            "(request.operation == 'DELETE' || object.spec.node == variables.node) && \
             (request.operation == 'CREATE' || oldObject.spec.node == variables.node)",
            "an agent writes BlockAffinities of its own node only",
        )],
    },
    Guard {
        name: "margay-node-ipamblocks",
        group: "projectcalico.org",
        version: "v3",
        resources: &["ipamblocks"],
        operations: &["CREATE", "UPDATE", "DELETE"],
        variables: &[
            ("mine", "'host:' + variables.node"),
            ("before", "request.operation == 'CREATE' || !has(oldObject.spec.affinity) ? '' : oldObject.spec.affinity"),
            ("after", "request.operation == 'DELETE' || !has(object.spec.affinity) ? '' : object.spec.affinity"),
        ],
        rules: &[
            (
                "(request.operation == 'UPDATE' && variables.before == variables.after) || \
                 (variables.before in ['', variables.mine] && variables.after in ['', variables.mine])",
                "an agent claims, gives up and deletes blocks of its own node only",
            ),
            ("request.operation != 'UPDATE' || object.spec.cidr == oldObject.spec.cidr", "a block keeps its range"),
            (
                "request.operation != 'UPDATE' || !has(oldObject.spec.attributes) || \
                 oldObject.spec.attributes.all(a, !has(a.secondary) || !('node' in a.secondary) || \
                 a.secondary['node'] == variables.node || \
                 (has(object.spec.attributes) && object.spec.attributes.exists(b, b == a)))",
                "an agent releases no address of another node",
            ),
        ],
    },
    Guard {
        name: "margay-node-ipamhandles",
        group: "projectcalico.org",
        version: "v3",
        resources: &["ipamhandles"],
        operations: &["CREATE", "UPDATE", "DELETE"],
        variables: &[("id", "request.operation == 'DELETE' ? oldObject.spec.handleID : object.spec.handleID")],
        rules: &[(
            "!variables.id.matches('^[a-z]+(-v6)?-tunnel-addr-') || \
             variables.id.endsWith('-tunnel-addr-' + variables.node)",
            "an agent writes the handle of its own tunnel only",
        )],
    },
    Guard {
        name: "margay-node-certificates",
        group: "certificates.k8s.io",
        version: "v1",
        resources: &["certificatesigningrequests"],
        operations: &["CREATE"],
        variables: &[],
        rules: &[
            ("object.spec.signerName == 'margay.io/node'", "an agent asks the signer margay.io/node only"),
            (
                "object.metadata.name.startsWith('margay-node-' + variables.node + '-')",
                "a request's name begins with margay-node- and the node's name",
            ),
        ],
    },
];

/// Names of all policies, which are those of their bindings.
pub(super) fn names() -> Vec<&'static str> {
    GUARDS.iter().map(|guard| guard.name).collect()
}

/// A policy and its binding for each kind that agents write.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    GUARDS
        .iter()
        .flat_map(|guard| {
            [
                context.object("ValidatingAdmissionPolicy", policy(guard, context.settings.mode)),
                context.object("ValidatingAdmissionPolicyBinding", binding(guard.name)),
            ]
        })
        .collect()
}

fn policy(guard: &Guard, mode: Mode) -> Value {
    let (group, version) =
        if guard.group == v3::GROUP { (mode.group(), mode.version()) } else { (guard.group, guard.version) };
    let node = format!(
        "has(request.userInfo.extra) && '{NODE_EXTRA}' in request.userInfo.extra ? \
         request.userInfo.extra['{NODE_EXTRA}'][0] : ''"
    );
    let mut variables = vec![json!({ "name": "node", "expression": node })];
    let own = guard.variables.iter();
    variables.extend(own.map(|(name, text)| json!({ "name": name, "expression": text })));
    let mut rules = vec![json!({
        "expression": "variables.node != ''",
        "message": "the agent's token is not bound to a node; Kubernetes 1.30 or later binds tokens of pods",
        "reason": "Forbidden",
    })];
    let own = guard.rules.iter();
    rules.extend(own.map(|(text, message)| json!({ "expression": text, "message": message, "reason": "Forbidden" })));
    json!({
        "metadata": { "name": guard.name, "labels": labels(NODE) },
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "resourceRules": [{
                    "apiGroups": [group],
                    "apiVersions": [version],
                    "operations": guard.operations,
                    "resources": guard.resources,
                    "scope": "*",
                }],
            },
            "matchConditions": [{
                "name": "by-an-agent",
                "expression": format!("request.userInfo.username == '{REQUESTER}'"),
            }],
            "variables": variables,
            "validations": rules,
        },
    })
}

fn binding(name: &str) -> Value {
    json!({
        "metadata": { "name": name, "labels": labels(NODE) },
        "spec": { "policyName": name, "validationActions": ["Deny"] },
    })
}
