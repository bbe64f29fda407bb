//! The namespace of the components.

use serde_json::json;

use super::{Context, NAMESPACE};
use crate::object::Object;

/// Agents are privileged, so pod security has to allow that there.
pub(super) fn namespace(context: &Context<'_>) -> Object {
    context.object(
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
