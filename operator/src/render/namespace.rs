//! The namespace of the components.

use serde_json::json;

use super::{Context, NAMESPACE};
use crate::manifest::Object;

/// Agents are privileged, so pod security admission must allow that in the namespace.
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
