//! Protects built-in tiers from deletion, and the addresses of pods from other pods' annotations.

use margay_api::storage::Mode;
use serde_json::{Value, json};

use super::Context;
use super::validating_policy::{self, Requests};
use crate::manifest::{MANAGER, Object};

/// Name of the policy that protects built-in tiers.
const TIERS: &str = "protect-builtin-tiers";
/// Name of the policy that protects the addresses of pods.
const ADDRESSES: &str = "margay-pod-addresses";

/// Names of all policies, which their bindings share.
pub(super) const NAMES: [&str; 2] = [TIERS, ADDRESSES];

/// Returns the policies and their bindings.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    let both = [
        (TIERS, tiers(context.settings.mode)),
        (ADDRESSES, addresses()),
    ];
    both.into_iter()
        .flat_map(|(name, spec)| validating_policy::objects(context, name, MANAGER, spec))
        .collect()
}

fn tiers(mode: Mode) -> Value {
    json!({
        "failurePolicy": "Fail",
        "matchConstraints": Requests::of_calico(mode, &["tiers"], &["DELETE"]).constraints(),
        "validations": [{
            "expression": "!(oldObject.metadata.name in ['default', 'kube-admin', \
                           'kube-baseline'])",
            "message": "this tier is built in: policies that specify no tier, and Kubernetes' \
                        cluster-wide policies, are in such tiers; delete the policies of the tier \
                        instead",
            "reason": "Forbidden",
        }],
    })
}

/// Addresses in annotations count until kubelet reports the pod's. So a user who may not write a
/// pod's status may not write them either: he could give his pod another pod's address, for every
/// policy that selects it.
fn addresses() -> Value {
    let annotations =
        |of: &str| format!("has({of}.metadata.annotations) ? {of}.metadata.annotations : {{}}");
    let before = format!(
        "request.operation == 'CREATE' ? {{}} : {}",
        annotations("oldObject")
    );
    let requests = Requests {
        api: ("", "v1"),
        resources: &["pods"],
        operations: &["CREATE", "UPDATE"],
    };
    json!({
        "failurePolicy": "Fail",
        "matchConstraints": requests.constraints(),
        "variables": [
            { "name": "before", "expression": before },
            { "name": "after", "expression": annotations("object") },
        ],
        "validations": [{
            "expression": "['cni.projectcalico.org/podIP', 'cni.projectcalico.org/podIPs', \
                           'cni.projectcalico.org/containerID'].all(name, (name in \
                           variables.before ? variables.before[name] : '') == (name in \
                           variables.after ? variables.after[name] : '')) || \
                           authorizer.group('').resource('pods').subresource('status')\
                           .namespace(request.namespace).check('patch').allowed()",
            "message": "annotations cni.projectcalico.org/podIP, podIPs and containerID are set by \
                        the network: writing them requires permission to patch pods/status; remove \
                        them",
            "reason": "Forbidden",
        }],
    })
}
