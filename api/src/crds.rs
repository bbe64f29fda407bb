//! Definitions (CustomResourceDefinitions) of every kind that Margay serves, as they are installed.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt as _;
use serde_json::{Map, Value, json};

use crate::installation::{Installation, TigeraStatus};
use crate::storage::{Kind, Mode, kind};
use crate::{k8s, v3};

/// Returns every definition, in order of group and plural name.
pub fn all() -> Vec<CustomResourceDefinition> {
    let mut all = vec![
        k8s::cnp::ClusterNetworkPolicy::crd(),
        Installation::crd(),
        TigeraStatus::crd(),
        v3::BGPConfiguration::crd(),
        v3::BGPFilter::crd(),
        v3::BGPPeer::crd(),
        v3::BlockAffinity::crd(),
        v3::ClusterInformation::crd(),
        v3::FelixConfiguration::crd(),
        v3::GlobalNetworkPolicy::crd(),
        v3::GlobalNetworkSet::crd(),
        v3::HostEndpoint::crd(),
        v3::IPAMBlock::crd(),
        v3::IPAMConfiguration::crd(),
        v3::IPAMHandle::crd(),
        v3::IPPool::crd(),
        v3::IPReservation::crd(),
        v3::KubeControllersConfiguration::crd(),
        v3::NetworkPolicy::crd(),
        v3::NetworkSet::crd(),
        v3::StagedGlobalNetworkPolicy::crd(),
        v3::StagedKubernetesNetworkPolicy::crd(),
        v3::StagedNetworkPolicy::crd(),
        v3::Tier::crd(),
    ];
    for definition in &mut all {
        for version in &mut definition.spec.versions {
            let schema = version.schema.as_mut();
            if let Some(root) = schema.and_then(|schema| schema.open_api_v3_schema.as_mut()) {
                root.description = None;
                normalise(root);
            }
        }
    }
    all
}

/// Removes from a derived schema what the API server rejects or misreads: `nullable` on optional
/// fields (without it the API server drops an explicit null, and defaults apply), formats of
/// numbers that it does not know, and the description that schemars repeats for every
/// `IntOrString`.
fn normalise(schema: &mut JSONSchemaProps) {
    if schema.x_kubernetes_int_or_string == Some(true) {
        let of_field = |text: &String| !text.starts_with("IntOrString");
        schema.description = schema.description.take().filter(of_field);
    }
    let is_known = |format: &String| !format.starts_with("uint");
    schema.format = schema.format.take().filter(is_known);
    schema.default = schema.default.take().filter(|default| !default.0.is_null());
    for property in schema
        .properties
        .iter_mut()
        .flatten()
        .map(|(_, property)| property)
    {
        property.nullable = None;
        normalise(property);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        normalise(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        normalise(values);
    }
}

/// Returns the definitions of `crd.projectcalico.org/v1`, in order of plural name. They are loose,
/// as Calico's are: objects there were validated by the program that wrote them, and fields of
/// other versions must survive.
pub fn stored() -> Vec<CustomResourceDefinition> {
    let ours = all();
    kind::ALL
        .iter()
        .map(|kind| stored_definition(kind, &ours))
        .collect()
}

/// Returns those definitions of `crd.projectcalico.org/v1` that a cluster may lack because its
/// Calico is older than the kind, and that Margay reads.
pub fn later() -> Vec<CustomResourceDefinition> {
    let ours = all();
    let is_read = |kind: &&Kind| {
        let same = |definition: &CustomResourceDefinition| {
            definition.spec.group == v3::GROUP && definition.spec.names.plural == kind.plural
        };
        !kind.classic && ours.iter().any(same)
    };
    kind::ALL
        .iter()
        .filter(is_read)
        .map(|kind| stored_definition(kind, &ours))
        .collect()
}

fn stored_definition(kind: &Kind, ours: &[CustomResourceDefinition]) -> CustomResourceDefinition {
    let same = |definition: &&CustomResourceDefinition| {
        definition.spec.group == v3::GROUP && definition.spec.names.plural == kind.plural
    };
    let strict = ours
        .iter()
        .find(same)
        .and_then(|definition| definition.spec.versions.first());
    let strict = strict
        .and_then(|version| serde_json::to_value(&version.schema).ok())
        .unwrap_or_default();
    let mut spec = loose(&strict["openAPIV3Schema"]["properties"]["spec"]);
    spec["type"] = "object".into();
    spec["x-kubernetes-preserve-unknown-fields"] = true.into();
    if kind.kind == "BlockAffinity" {
        spec["properties"]["deleted"]["type"] = "string".into();
        spec["required"] = json!(["cidr", "deleted", "node", "state"]);
    }
    let names = |name: &str| format!("{name}List");
    let definition = json!({
        "metadata": { "name": format!("{}.{}", kind.stored_plural, Mode::V1.group()) },
        "spec": {
            "group": Mode::V1.group(),
            "names": {
                "kind": kind.stored_kind,
                "listKind": names(kind.stored_kind),
                "plural": kind.stored_plural,
                "singular": kind.stored_kind.to_lowercase(),
            },
            "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
            "versions": [{
                "name": Mode::V1.version(),
                "served": true,
                "storage": true,
                "schema": {
                    "openAPIV3Schema": { "type": "object", "properties": { "spec": spec } },
                },
            }],
        },
    });
    serde_json::from_value(definition).expect("a definition has the fields of a definition")
}

/// Keywords of a schema that state the type of a field.
const TYPES: [&str; 3] = ["type", "nullable", "x-kubernetes-int-or-string"];

fn loose(schema: &Value) -> Value {
    let kept = TYPES
        .iter()
        .filter_map(|key| Some(((*key).to_owned(), schema.get(*key)?.clone())));
    let mut kept: Map<String, Value> = kept.collect();
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        let properties: Map<String, Value> = properties
            .iter()
            .map(|(name, schema)| (name.clone(), loose(schema)))
            .collect();
        kept.insert("properties".to_owned(), Value::Object(properties));
        kept.insert(
            "x-kubernetes-preserve-unknown-fields".to_owned(),
            true.into(),
        );
    }
    for inner in ["items", "additionalProperties"] {
        if let Some(schema) = schema.get(inner).filter(|schema| schema.is_object()) {
            kept.insert(inner.to_owned(), loose(schema));
        }
    }
    Value::Object(kept)
}
