//! The manifests in deploy/crds and deploy/crds-v1 are generated from the types. `UPDATE_EXPECT=1`
//! rewrites them.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use margay_api::crds;
use serde_json::Value;

/// Folders under deploy, each with its definitions.
fn folders() -> [(PathBuf, Vec<CustomResourceDefinition>); 2] {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    [
        (deploy.join("crds"), crds::all()),
        (deploy.join("crds-v1"), crds::stored()),
    ]
}

fn file_of(definition: &CustomResourceDefinition) -> String {
    let spec = &definition.spec;
    format!("{}_{}.yaml", spec.group, spec.names.plural)
}

fn manifest_of(definition: &CustomResourceDefinition) -> String {
    serde_yaml_ng::to_string(&serde_json::to_value(definition).unwrap()).unwrap()
}

#[test]
fn manifests_are_generated_from_the_types() {
    for (folder, definitions) in folders() {
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            for definition in &definitions {
                std::fs::write(folder.join(file_of(definition)), manifest_of(definition)).unwrap();
            }
        }
        for definition in &definitions {
            let file = folder.join(file_of(definition));
            let found = std::fs::read_to_string(&file).unwrap_or_default();
            assert!(
                found == manifest_of(definition),
                "{} differs from the types; run `UPDATE_EXPECT=1 cargo test -p margay-api --test \
                 crds`",
                file.display()
            );
        }
        let wanted: BTreeSet<String> = definitions.iter().map(file_of).collect();
        let found: BTreeSet<String> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(found, wanted, "files of {}", folder.display());
    }
}

/// Visits every schema of a definition with its path.
fn visit(path: &str, schema: &Value, seen: &mut dyn FnMut(&str, &Value)) {
    seen(path, schema);
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        visit(&format!("{path}.{name}"), property, seen);
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            visit(&format!("{path}[]"), &schema[inner], seen);
        }
    }
}

#[test]
fn schemas_are_structural_and_small() {
    for definition in crds::all().into_iter().chain(crds::stored()) {
        let name = definition.metadata.name.clone().unwrap();
        let value = serde_json::to_value(&definition).unwrap();
        let root = &value["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        visit(&name, root, &mut |path, schema| {
            let is_open = [
                "x-kubernetes-int-or-string",
                "x-kubernetes-preserve-unknown-fields",
            ]
            .iter()
            .any(|key| schema[*key] == true);
            assert!(
                schema["type"].is_string() || is_open,
                "{path} has no type: {schema}"
            );
            for key in ["anyOf", "oneOf", "$ref"] {
                assert!(schema.get(key).is_none(), "{path} has {key}");
            }
            // The API server refuses a definition whose default breaks its own pattern.
            let is_bounded = schema.get("pattern").or(schema.get("enum")).is_some();
            assert!(
                schema["default"] != "" || !is_bounded,
                "{path} is empty by default, which it may not be"
            );
            let may_be_null = path.ends_with(".allocations[]");
            assert_eq!(schema["nullable"] == true, may_be_null, "{path}");
        });
        // A client-side apply keeps the object in an annotation of at most 256 KiB.
        let size = serde_json::to_string(&definition).unwrap().len();
        assert!(size < 200 * 1024, "{name} has {size} bytes");
    }
}

#[test]
fn policies_are_selectable_by_tier() {
    for definition in crds::all() {
        let plural = definition.spec.names.plural.as_str();
        let is_policy = [
            "globalnetworkpolicies",
            "networkpolicies",
            "stagedglobalnetworkpolicies",
            "stagednetworkpolicies",
        ]
        .contains(&plural);
        let fields = definition.spec.versions[0]
            .selectable_fields
            .iter()
            .flatten();
        let paths: Vec<&str> = fields.map(|field| field.json_path.as_str()).collect();
        assert_eq!(
            paths,
            if is_policy {
                vec![".spec.tier"]
            } else {
                vec![]
            },
            "{plural}"
        );
    }
}
