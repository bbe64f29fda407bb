//! The custom resource definitions of every kind that Margay serves, as they are installed.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt as _;

use crate::installation::{Installation, TigeraStatus};
use crate::v3;

/// Every definition, in order of group and plural name.
pub fn all() -> Vec<CustomResourceDefinition> {
    let mut all = vec![
        Installation::crd(),
        TigeraStatus::crd(),
        v3::BlockAffinity::crd(),
        v3::ClusterInformation::crd(),
        v3::FelixConfiguration::crd(),
        v3::GlobalNetworkPolicy::crd(),
        v3::GlobalNetworkSet::crd(),
        v3::IPAMBlock::crd(),
        v3::IPAMConfiguration::crd(),
        v3::IPAMHandle::crd(),
        v3::IPPool::crd(),
        v3::NetworkPolicy::crd(),
        v3::NetworkSet::crd(),
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

/// Takes out of a derived schema what only looks right: `nullable` on optional fields (without it the API server drops an explicit null, and
/// defaults apply), formats of numbers that the API server does not know, and a description that every port would repeat.
fn normalise(schema: &mut JSONSchemaProps) {
    if schema.x_kubernetes_int_or_string == Some(true) {
        let of_field = |text: &String| !text.starts_with("IntOrString");
        schema.description = schema.description.take().filter(of_field);
    }
    let is_known = |format: &String| !format.starts_with("uint");
    schema.format = schema.format.take().filter(is_known);
    schema.default = schema.default.take().filter(|default| !default.0.is_null());
    for property in schema.properties.iter_mut().flatten().map(|(_, property)| property) {
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
