//! Converts objects as the API has them to the events of typha's watches.

use anyhow::{Context, Result, bail};
use margay_api::meta::NamespacedName;
use margay_typha::kinds::KINDS;
use margay_typha::object::{self, ObjectKey, Observed};
use serde_json::{Value, json};

/// A kind: API group (empty for the core), name, name in typha's cache.
type Line = (&'static str, &'static str, &'static str);

/// Group of Calico's kinds.
const CALICO: &str = "projectcalico.org";

#[rustfmt::skip]
const TABLE: &[Line] = &[
    ("", "Pod", object::POD),
    ("", "Namespace", "Namespace"),
    ("", "Node", "Node"),
    ("", "ServiceAccount", "ServiceAccount"),
    ("discovery.k8s.io", "EndpointSlice", "EndpointSlice"),
    ("networking.k8s.io", "NetworkPolicy", "KubernetesNetworkPolicy"),
    ("policy.networking.k8s.io", "ClusterNetworkPolicy", "KubernetesClusterNetworkPolicy"),
    (CALICO, "NetworkPolicy", "NetworkPolicy"),
    (CALICO, "GlobalNetworkPolicy", "GlobalNetworkPolicy"),
    (CALICO, "StagedNetworkPolicy", "StagedNetworkPolicy"),
    (CALICO, "StagedGlobalNetworkPolicy", "StagedGlobalNetworkPolicy"),
    (CALICO, "StagedKubernetesNetworkPolicy", "StagedKubernetesNetworkPolicy"),
    (CALICO, "Tier", "Tier"),
    (CALICO, "NetworkSet", "NetworkSet"),
    (CALICO, "GlobalNetworkSet", "GlobalNetworkSet"),
    (CALICO, "HostEndpoint", "HostEndpoint"),
    (CALICO, "IPPool", "IPPool"),
    (CALICO, "IPAMBlock", object::BLOCK),
    (CALICO, "FelixConfiguration", "FelixConfiguration"),
];

/// Initial objects: the tiers of an installation, settings, and the pool.
pub fn initial(pool: &Value) -> Vec<Value> {
    let of = |kind: &str, name: &str, spec: Value| {
        json!({
            "apiVersion": "projectcalico.org/v3",
            "kind": kind,
            "metadata": {"name": name},
            "spec": spec,
        })
    };
    vec![
        of(
            "Tier",
            "kube-admin",
            json!({"order": 1_000, "defaultAction": "Pass"}),
        ),
        of(
            "Tier",
            "default",
            json!({"order": 1_000_000, "defaultAction": "Deny"}),
        ),
        of(
            "Tier",
            "kube-baseline",
            json!({"order": 10_000_000, "defaultAction": "Pass"}),
        ),
        of("FelixConfiguration", "default", json!({})),
        of("IPPool", super::POOL, pool.clone()),
    ]
}

/// The object as a watch sees it, with its kind in typha's cache.
pub fn observe(object: &Value) -> Result<(&'static str, Observed)> {
    let (kind, key) = identity(object)?;
    let mut object = object.clone();
    if object["kind"] == "Namespace" {
        // The API server does this itself.
        object["metadata"]["labels"]["kubernetes.io/metadata.name"] = key.name.clone().into();
    }
    let uid = object["metadata"]["uid"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let spec = KINDS
        .iter()
        .find(|spec| spec.name == kind)
        .with_context(|| format!("typha does not watch {kind}"))?;
    let parsed = spec
        .ingest(object)
        .with_context(|| format!("{kind} {key:?}: not what its kind is"))?;
    Ok((
        kind,
        Observed {
            key,
            uid,
            update: parsed.update,
            prefers_former: parsed.prefers_former,
            problems: parsed.problems,
        },
    ))
}

/// Which object of which kind it is.
pub fn identity(object: &Value) -> Result<(&'static str, ObjectKey)> {
    let text = |pointer: &str| {
        object
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let (group, _) = text("/apiVersion").rsplit_once('/').unwrap_or_default();
    let found = TABLE
        .iter()
        .find(|line| line.0 == group && line.1 == text("/kind"));
    let Some((_, _, kind)) = found else {
        bail!(
            "{} {}: a lab knows nothing of this kind",
            text("/apiVersion"),
            text("/kind")
        );
    };
    Ok((
        kind,
        NamespacedName::new(text("/metadata/namespace"), text("/metadata/name")),
    ))
}
