//! What nobody may do by the way: delete the tiers that others rely upon, or give a pod another's address.

use margay_api::storage::Mode;
use serde_json::{Value, json};

use super::Context;
use super::validation::{self, Requests};
use crate::manifest::{MANAGER, Object};

/// Protection of the built-in tiers.
const TIERS: &str = "protect-builtin-tiers";
/// Protection of the addresses of pods.
const ADDRESSES: &str = "margay-pod-addresses";

/// Names of all policies, which are those of their bindings.
pub(super) const NAMES: [&str; 2] = [TIERS, ADDRESSES];

/// A policy and its binding for each.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    let both = [(TIERS, tiers(context.settings.mode)), (ADDRESSES, addresses())];
    both.into_iter().flat_map(|(name, spec)| validation::objects(context, name, MANAGER, spec)).collect()
}

fn tiers(mode: Mode) -> Value {
    json!({
        "failurePolicy": "Fail",
        "matchConstraints": Requests::of_calico(mode, &["tiers"], &["DELETE"]).constraints(),
        "validations": [{
            "expression": "!(oldObject.metadata.name in ['default', 'kube-admin', 'kube-baseline'])",
            "message": "this tier is built in: policies that name no tier, and Kubernetes' cluster-wide policies, are in such tiers; \
                delete the policies of the tier instead",
            "reason": "Forbidden",
        }],
    })
}

/// Addresses in annotations count until kubelet reports the pod's. So whoever may not write a pod's status may not write them either: he would
/// make others' addresses his pod's, for every policy that selects it.
fn addresses() -> Value {
    let annotations = |of: &str| format!("has({of}.metadata.annotations) ? {of}.metadata.annotations : {{}}");
    let before = format!("request.operation == 'CREATE' ? {{}} : {}", annotations("oldObject"));
    let requests = Requests { api: ("", "v1"), resources: &["pods"], operations: &["CREATE", "UPDATE"] };
    json!({
        "failurePolicy": "Fail",
        "matchConstraints": requests.constraints(),
        "variables": [
            { "name": "before", "expression": before },
            { "name": "after", "expression": annotations("object") },
        ],
        "validations": [{
            "expression": "['cni.projectcalico.org/podIP', 'cni.projectcalico.org/podIPs', 'cni.projectcalico.org/containerID']\
                .all(name, (name in variables.before ? variables.before[name] : '') == \
                (name in variables.after ? variables.after[name] : '')) || \
                authorizer.group('').resource('pods').subresource('status').namespace(request.namespace).check('patch').allowed()",
            "message": "annotations cni.projectcalico.org/podIP, podIPs and containerID are the network's: writing them takes the right to patch \
                pods/status; leave them out",
            "reason": "Forbidden",
        }],
    })
}
