//! Cluster-wide configuration: created where it is absent, never changed afterwards, never owned.
//! It outlives an Installation.

use data_encoding::HEXLOWER;
use margay_api::v3::tier::BUILT_IN_TIERS;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Context, NAMESPACE};
use crate::manifest::Object;
use crate::names::CA_NAME;

/// Returns the configuration that is absent.
pub(super) fn objects(context: &Context<'_>) -> Vec<Object> {
    let inputs = context.inputs;
    let mut objects = Vec::new();
    if inputs
        .felix
        .as_ref()
        .is_some_and(|known| !known.contains_key("default"))
    {
        objects.push(named("FelixConfiguration", "default", json!({})));
    }
    if let Some(present) = &inputs.tiers {
        let absent = BUILT_IN_TIERS
            .iter()
            .filter(|(name, ..)| !present.contains(*name));
        objects.extend(absent.map(|(name, order, action)| {
            named(
                "Tier",
                name,
                json!({ "order": order, "defaultAction": action }),
            )
        }));
    }
    if let Some(present) = &inputs.cluster_information {
        objects.extend(cluster_information(context, present.as_ref()));
    }
    objects
}

/// Returns the ConfigMap with the trusted CAs.
pub(super) fn bundle(context: &Context<'_>) -> Option<Object> {
    let (authority, _) = context.inputs.certificates.authority.as_ref()?;
    Some(context.object(
        "ConfigMap",
        json!({
            "metadata": { "name": CA_NAME, "namespace": NAMESPACE },
            "data": { "ca.crt": authority.bundle() },
        }),
    ))
}

/// Returns the cluster's identity, derived from Kubernetes' own so that it is reproducible; an
/// existing one is kept.
fn cluster_information(context: &Context<'_>, present: Option<&Value>) -> Option<Object> {
    let has_guid = present
        .and_then(|spec| spec["clusterGUID"].as_str())
        .is_some_and(|guid| !guid.is_empty());
    if has_guid || context.inputs.cluster_id.is_empty() {
        return None;
    }
    let digest = Sha256::digest(context.inputs.cluster_id.as_bytes());
    let guid = HEXLOWER.encode(&digest[..16]);
    Some(named(
        "ClusterInformation",
        "default",
        json!({
            "clusterGUID": guid,
            "clusterType": "k8s,operator,kdd",
            "calicoVersion": context.settings.version,
            "datastoreReady": true,
        }),
    ))
}

fn named(kind: &str, name: &str, spec: Value) -> Object {
    Object::new(kind, json!({ "metadata": { "name": name }, "spec": spec }))
}
