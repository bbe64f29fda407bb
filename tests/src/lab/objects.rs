//! Converts objects as the API has them to the events of typha's watches.

use anyhow::{Context, Result, bail};
use margay_api::meta::NamespacedName;
use margay_api::v3::tier::BUILT_IN_TIERS;
use margay_calc::kinds::{self, KindName};
use margay_typha::object::{ObjectKey, Observed};
use serde_json::{Value, json};

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
    let tiers = BUILT_IN_TIERS.iter().map(|(name, order, action)| {
        of(
            "Tier",
            name,
            json!({"order": order, "defaultAction": action}),
        )
    });
    let others = [
        of("FelixConfiguration", "default", json!({})),
        of("IPPool", super::POOL, pool.clone()),
    ];
    tiers.chain(others).collect()
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
    let parsed =
        kinds::ingest(kind, object).with_context(|| format!("typha does not watch {kind}"))?;
    let parsed = parsed.with_context(|| format!("{kind} {key:?}: not what its kind is"))?;
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
    let Some(kind) = KindName::of(text("/apiVersion"), text("/kind")) else {
        bail!(
            "{} {}: a lab knows nothing of this kind",
            text("/apiVersion"),
            text("/kind")
        );
    };
    Ok((
        kind.name,
        NamespacedName::new(text("/metadata/namespace"), text("/metadata/name")),
    ))
}
