//! Restricts agents beyond RBAC: an agent may write objects of its own node, and no others.
//!
//! The API server adds the node that an agent's token is bound to to the request; these admission
//! policies compare it with the object. There is one policy per kind, so that each is checked
//! against that kind's schema, in the storage that the cluster has: IPAM's kinds have the same
//! names and fields in both.

mod ipam;

use margay_api::storage::{Kind, Mode};
use margay_api::{meta, v3};
use serde_json::{Value, json};

use super::validating_policy::{self, Requests};
use super::{Context, NODE};
use crate::csr_policy::{NODE_EXTRA, REQUESTER, SIGNER};
use crate::manifest::Object;

/// An admission policy: the requests that it matches, and its rules.
struct Guard {
    name: &'static str,
    group: &'static str,
    version: &'static str,
    resources: Vec<&'static str>,
    operations: &'static [&'static str],
    variables: Vec<(&'static str, String)>,
    rules: Vec<(String, &'static str)>,
}

impl Guard {
    /// Creates a policy for a kind of Calico.
    fn new(
        name: &'static str,
        resource: &'static str,
        operations: &'static [&'static str],
    ) -> Self {
        let (variables, rules) = (Vec::new(), Vec::new());
        Self {
            name,
            group: v3::GROUP,
            version: "v3",
            resources: vec![resource],
            operations,
            variables,
            rules,
        }
    }

    fn of(self, group: &'static str, version: &'static str) -> Self {
        Self {
            group,
            version,
            ..self
        }
    }

    fn variables(self, variables: Vec<(&'static str, String)>) -> Self {
        Self { variables, ..self }
    }

    fn rules(self, rules: Vec<(String, &'static str)>) -> Self {
        Self { rules, ..self }
    }
}

/// Name of the policy for `strictAffinity`.
const STRICT: &str = "margay-node-strict-affinity";

/// Annotations before and after the request.
fn annotations() -> Vec<(&'static str, String)> {
    let of = |object: &str| {
        format!("has({object}.metadata.annotations) ? {object}.metadata.annotations : {{}}")
    };
    vec![("before", of("oldObject")), ("after", of("object"))]
}

/// Requires that no annotation changes except those for whose key `k` `is_own` holds.
fn same_annotations_but(is_own: &str) -> String {
    format!(
        "variables.after.all(k, {is_own} || (k in variables.before && variables.before[k] == \
         variables.after[k])) && variables.before.all(k, {is_own} || k in variables.after)"
    )
}

const SAME_LABELS: (&str, &str) = (
    "(has(object.metadata.labels) ? object.metadata.labels : {}) == \
     (has(oldObject.metadata.labels) ? oldObject.metadata.labels : {})",
    "an agent changes no labels",
);

/// Annotations of Nodes that agents write.
const OF_NODES: [&str; 8] = [
    meta::ANNOTATION_NODE_IPV4,
    meta::ANNOTATION_NODE_IPV6,
    meta::ANNOTATION_IPIP,
    meta::ANNOTATION_VXLAN_IPV4,
    meta::ANNOTATION_VXLAN_MAC,
    meta::ANNOTATION_VXLAN_IPV6,
    meta::ANNOTATION_VXLAN_MAC_V6,
    meta::ANNOTATION_NODE_INTERFACES,
];

fn nodes() -> Guard {
    let own: Vec<String> = OF_NODES.iter().map(|name| format!("'{name}'")).collect();
    Guard {
        resources: vec!["nodes", "nodes/status"],
        ..Guard::new("margay-node-nodes", "nodes", &["UPDATE"])
    }
    .of("", "v1")
    .variables(annotations())
    .rules(vec![
        (
            "object.metadata.name == variables.node".into(),
            "an agent writes its own Node only",
        ),
        (SAME_LABELS.0.into(), SAME_LABELS.1),
        (
            "object.spec == oldObject.spec".into(),
            "an agent changes no Node's spec",
        ),
        (
            "(has(object.status) ? object.status : {}) == (has(oldObject.status) ? \
             oldObject.status : {})"
                .into(),
            "an agent changes no Node's status",
        ),
        (
            same_annotations_but(&format!("k in [{}]", own.join(", "))),
            "an agent changes no annotations of a Node but those of its addresses, tunnels and \
             interfaces",
        ),
    ])
}

fn pods() -> Guard {
    Guard::new("margay-node-pods", "pods/status", &["UPDATE"])
        .of("", "v1")
        .variables(annotations())
        .rules(vec![
            (
                "has(object.spec.nodeName) && object.spec.nodeName == variables.node".into(),
                "an agent writes Pods of its own node only",
            ),
            (SAME_LABELS.0.into(), SAME_LABELS.1),
            (
                "object.status == oldObject.status".into(),
                "an agent changes no Pod's status",
            ),
            (
                same_annotations_but("k.startsWith('cni.projectcalico.org/')"),
                "an agent changes no annotations of a Pod but cni.projectcalico.org/*",
            ),
        ])
}

fn certificates() -> Guard {
    Guard::new(
        "margay-node-certificates",
        "certificatesigningrequests",
        &["CREATE"],
    )
    .of("certificates.k8s.io", "v1")
    .rules(vec![
        (
            format!("object.spec.signerName == '{SIGNER}'"),
            "an agent asks the signer margay.io/node only",
        ),
        (
            "object.metadata.name.startsWith('margay-node-' + variables.node + '-')".into(),
            "a request's name begins with margay-node- and the node's name",
        ),
    ])
}

fn guards() -> Vec<Guard> {
    vec![
        nodes(),
        pods(),
        ipam::affinities(),
        ipam::blocks(),
        ipam::handles(),
        certificates(),
    ]
}

/// Requires unchanged owners and finalizers: owners determine garbage collection, and finalizers
/// prevent deletion, so both would have effects beyond what the rules check.
fn same_owners() -> String {
    let of = |object: &str, field: &str| {
        format!("(has({object}.metadata.{field}) ? size({object}.metadata.{field}) : 0)")
    };
    let kept = |field: &str| {
        format!(
            "(request.operation == 'CREATE' ? {new} == 0 : {new} == {old} && ({new} == 0 || \
             object.metadata.{field} == oldObject.metadata.{field}))",
            new = of("object", field),
            old = of("oldObject", field),
        )
    };
    format!(
        "request.operation == 'DELETE' || ({} && {})",
        kept("ownerReferences"),
        kept("finalizers")
    )
}

/// Names of all policies, which their bindings share.
pub(super) fn names() -> Vec<&'static str> {
    guards()
        .iter()
        .map(|guard| guard.name)
        .chain([STRICT])
        .collect()
}

/// Returns a policy and its binding for each kind that agents write.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    let bound = |guard: &Guard| {
        validating_policy::objects(
            context,
            guard.name,
            NODE,
            policy(guard, context.settings.mode),
        )
    };
    guards()
        .iter()
        .flat_map(bound)
        .chain(strict(context))
        .collect()
}

/// Forbids borrowing while IPAMConfiguration `default` has `strictAffinity`; borrowed addresses are
/// released as ever. It is a separate policy, and an error of its parameter refuses nothing,
/// because agents obey the setting themselves.
fn strict(context: &Context<'_>) -> [Object; 2] {
    let mode = context.settings.mode;
    let mut spec = policy(&ipam::strict(), mode);
    let kind = Kind::of("IPAMConfiguration").map_or("IPAMConfiguration", |kind| kind.kind_in(mode));
    spec["failurePolicy"] = "Ignore".into();
    spec["paramKind"] = json!({ "apiVersion": mode.api_version(), "kind": kind });
    let parameter = json!({ "name": v3::SINGLETON, "parameterNotFoundAction": "Allow" });
    validating_policy::with_parameter(context, STRICT, NODE, spec, parameter)
}

/// Returns the spec of a guard's policy.
fn policy(guard: &Guard, mode: Mode) -> Value {
    let (group, version) = if guard.group == v3::GROUP {
        (mode.group(), mode.version())
    } else {
        (guard.group, guard.version)
    };
    let node = format!(
        "has(request.userInfo.extra) && '{NODE_EXTRA}' in request.userInfo.extra ? \
         request.userInfo.extra['{NODE_EXTRA}'][0] : ''"
    );
    let mut variables = vec![json!({ "name": "node", "expression": node })];
    let own = guard.variables.iter();
    variables.extend(own.map(|(name, text)| json!({ "name": name, "expression": text })));
    let rule = |text: &str, message: &str| {
        json!({
            "expression": text,
            "message": message,
            "reason": "Forbidden",
        })
    };
    let mut rules = vec![
        rule(
            "variables.node != ''",
            "the agent's token is not bound to a node; Kubernetes 1.30 or later binds tokens of \
             pods",
        ),
        rule(&same_owners(), "an agent changes no owners and finalizers"),
    ];
    rules.extend(
        guard
            .rules
            .iter()
            .map(|(text, message)| rule(text, message)),
    );
    let requests = Requests {
        api: (group, version),
        resources: &guard.resources,
        operations: guard.operations,
    };
    json!({
        "failurePolicy": "Fail",
        "matchConstraints": requests.constraints(),
        "matchConditions": [{
            "name": "by-an-agent",
            "expression": format!("request.userInfo.username == '{REQUESTER}'"),
        }],
        "variables": variables,
        "validations": rules,
    })
}

#[cfg(test)]
#[path = "admission_tests.rs"]
mod tests;
