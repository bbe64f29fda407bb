//! Builds ValidatingAdmissionPolicies and their bindings, which have the same name.

use margay_api::storage::Mode;
use serde_json::{Value, json};

use super::{Context, labels};
use crate::manifest::Object;

/// Requests that a policy matches.
pub(super) struct Requests<'a> {
    /// API group and version.
    pub(super) api: (&'a str, &'a str),
    /// Plural names of the kinds.
    pub(super) resources: &'a [&'a str],
    /// Any of `CREATE`, `UPDATE`, `DELETE`.
    pub(super) operations: &'a [&'a str],
}

impl<'a> Requests<'a> {
    /// Creates requests for kinds of Calico, in that storage.
    pub(super) fn of_calico(
        mode: Mode,
        resources: &'a [&'a str],
        operations: &'a [&'a str],
    ) -> Self {
        Self {
            api: (mode.group(), mode.version()),
            resources,
            operations,
        }
    }

    /// Returns `matchConstraints` of a policy.
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

/// Returns the metadata of a component's policy, and of its binding.
pub(super) fn metadata(name: &str, component: &str) -> Value {
    json!({ "name": name, "labels": labels(component) })
}

/// Returns a policy and a binding that refuses its requests in every namespace.
pub(super) fn objects(
    context: &Context<'_>,
    name: &str,
    component: &str,
    spec: Value,
) -> [Object; 2] {
    bound(context, name, component, spec, json!({}))
}

/// Returns a policy and a binding with a parameter; `parameter` is the binding's `paramRef`.
pub(super) fn with_parameter(
    context: &Context<'_>,
    name: &str,
    component: &str,
    spec: Value,
    parameter: Value,
) -> [Object; 2] {
    bound(
        context,
        name,
        component,
        spec,
        json!({ "paramRef": parameter }),
    )
}

fn bound(
    context: &Context<'_>,
    name: &str,
    component: &str,
    spec: Value,
    mut binding: Value,
) -> [Object; 2] {
    let metadata = metadata(name, component);
    binding["policyName"] = name.into();
    binding["validationActions"] = json!(["Deny"]);
    [
        context.object(
            "ValidatingAdmissionPolicy",
            json!({ "metadata": metadata, "spec": spec }),
        ),
        context.object(
            "ValidatingAdmissionPolicyBinding",
            json!({ "metadata": metadata, "spec": binding }),
        ),
    ]
}
