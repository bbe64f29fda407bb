use kube::CustomResourceExt;

use super::*;
use crate::installation::Installation;
use crate::v3::{
    BGPConfiguration, FelixConfiguration, IPAMConfiguration, IPPool, KubeControllersConfiguration,
};

fn tables() -> [(&'static str, &'static Table, Value); 6] {
    let schema = |crd: Value| {
        crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone()
    };
    let of = |crd| schema(serde_json::to_value(crd).unwrap());
    [
        ("Installation", &*INSTALLATION, of(Installation::crd())),
        ("BGPConfiguration", &*BGP, of(BGPConfiguration::crd())),
        ("FelixConfiguration", &*FELIX, of(FelixConfiguration::crd())),
        ("IPPool", &*POOL, of(IPPool::crd())),
        ("IPAMConfiguration", &*IPAM, of(IPAMConfiguration::crd())),
        (
            "KubeControllersConfiguration",
            &*CONTROLLERS,
            of(KubeControllersConfiguration::crd()),
        ),
    ]
}

/// Collects paths of a schema's leaves that no rule covers.
fn missing(table: &Table, path: &str, schema: &Value, found: &mut Vec<String>) {
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        let below = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        if table.0.contains_key(below.as_str())
            || table.0.contains_key(format!("{below}.*").as_str())
        {
            continue;
        }
        match (
            schema["items"]["properties"].is_object(),
            schema["properties"].is_object(),
        ) {
            (true, _) => missing(table, &format!("{below}[]"), &schema["items"], found),
            (_, true) => missing(table, &below, schema, found),
            _ => found.push(below),
        }
    }
}

#[test]
fn every_field_of_a_definition_is_in_its_table() {
    for (kind, table, schema) in tables() {
        let mut found = Vec::new();
        missing(table, "", &schema, &mut found);
        assert_eq!(found, [""; 0], "{kind}");
    }
    // Including Calico's fields that our definitions lack.
    assert!(
        FELIX.0.len() > 180 && INSTALLATION.0.len() > 100,
        "{} {}",
        FELIX.0.len(),
        INSTALLATION.0.len()
    );
}

#[test]
fn fields_without_effect_have_a_consequence() {
    for (kind, table, _) in tables() {
        for (field, rule) in &table.0 {
            assert_eq!(
                rule.effect == Effect::Acts,
                rule.meaning.is_empty(),
                "{kind} {field}"
            );
            let is_plain = rule
                .meaning
                .chars()
                .next()
                .is_none_or(|first| first.is_lowercase() || field.len() > 1);
            assert!(is_plain && !rule.meaning.ends_with('.'), "{kind} {field}");
        }
    }
}

#[test]
fn fields_that_a_schema_lacks_are_found_with_the_name_that_is_meant() {
    let schema = serde_json::to_value(crate::v3::NetworkPolicy::crd()).unwrap();
    let schema = &schema["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let spec = serde_json::json!({
        "selector": "all()", "ingres": [{"action": "Deny"}],
        "egress": [{"action": "Allow", "source": {"netz": ["::/0"]}}],
        "colour": "red", "shade": null,
    });
    let mut found = BTreeSet::new();
    find_unknown("NetworkPolicy a", schema, &spec, &mut found);
    let found: Vec<String> = found
        .iter()
        .map(|one| format!("{} {} {}", one.is_unsafe, one.field, one.meaning))
        .collect();
    let unknown = "this version does not know the field, and it has no effect";
    let meant =
        |name: &str| format!("there is no such field, so it has no effect; did you mean {name}?");
    assert_eq!(
        found,
        [
            format!("false spec.colour is red {unknown}"),
            format!(
                "true spec.egress[0].source.netz is [\"::/0\"] {}",
                meant("nets")
            ),
            format!(
                "true spec.ingres is [{{\"action\":\"Deny\"}}] {}",
                meant("ingress")
            ),
        ]
    );
}
