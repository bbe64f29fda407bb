//! The form of a policy by which the API server validates requests, and of its binding, which has its name.

use margay_api::storage::Mode;
use serde_json::{Value, json};

use super::{Context, labels};
use crate::manifest::Object;

/// Which requests a policy is about.
pub(super) struct Requests<'a> {
    /// Group and version of the API.
    pub(super) api: (&'a str, &'a str),
    /// Collections.
    pub(super) resources: &'a [&'a str],
    /// `CREATE`, `UPDATE`, `DELETE`.
    pub(super) operations: &'a [&'a str],
}

impl<'a> Requests<'a> {
    /// Of kinds of Calico, in that storage.
    pub(super) fn of_calico(mode: Mode, resources: &'a [&'a str], operations: &'a [&'a str]) -> Self {
        Self { api: (mode.group(), mode.version()), resources, operations }
    }

    /// As `matchConstraints` of a policy.
    pub(super) fn constraints(&self) -> Value {
        let (group, version) = self.api;
        json!({
            "resourceRules": [{
                "apiGroups": [group],
                "apiVersions": [version],
                "operations": self.operations,
                "resources": self.resources,
                "scope": "*",
            }],
        })
    }
}

/// The metadata of a policy of that component, and of its binding.
pub(super) fn metadata(name: &str, component: &str) -> Value {
    json!({ "name": name, "labels": labels(component) })
}

/// A policy that refuses what it says, everywhere.
pub(super) fn objects(context: &Context<'_>, name: &str, component: &str, spec: Value) -> [Object; 2] {
    bound(context, name, component, spec, json!({}))
}

/// The same with a parameter, which `parameter` refers to as the field `paramRef` of a binding does.
pub(super) fn with_parameter(
    context: &Context<'_>,
    name: &str,
    component: &str,
    spec: Value,
    parameter: Value,
) -> [Object; 2] {
    bound(context, name, component, spec, json!({ "paramRef": parameter }))
}

fn bound(context: &Context<'_>, name: &str, component: &str, spec: Value, mut binding: Value) -> [Object; 2] {
    let metadata = metadata(name, component);
    binding["policyName"] = name.into();
    binding["validationActions"] = json!(["Deny"]);
    [
        context.object("ValidatingAdmissionPolicy", json!({ "metadata": metadata, "spec": spec })),
        context.object("ValidatingAdmissionPolicyBinding", json!({ "metadata": metadata, "spec": binding })),
    ]
}
