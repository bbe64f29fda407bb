//! The namespace of the components.

use serde_json::json;

use super::{Context, NAMESPACE};
use crate::object::Object;

/// The namespace, without an owner. Agents are privileged, so pod security has to allow that there.
pub(super) fn object() -> Object {
    Object::new(
        "Namespace",
        json!({
            "metadata": {
                "name": NAMESPACE,
                "labels": {
                    "app.kubernetes.io/part-of": "margay",
                    "pod-security.kubernetes.io/enforce": "privileged",
                    "pod-security.kubernetes.io/enforce-version": "latest",
                },
            },
        }),
    )
}

pub(super) fn namespace(context: &Context<'_>) -> Object {
    object().owned_by(context.owner)
}
