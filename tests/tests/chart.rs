//! The Helm chart, rendered by Helm itself.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use margay_tests::cluster::{binaries, process};
use margay_tests::install::checkout;
use serde::Deserialize;
use serde_json::{Value, json};

/// Kind, namespace and name of an object.
type Identity = (String, String, String);

fn helm(arguments: &[&str]) -> String {
    let program = binaries::helm(&|line| eprintln!("{line}")).unwrap();
    let home = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("helm");
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(checkout())
        .env("HELM_CACHE_HOME", &home)
        .env("HELM_CONFIG_HOME", &home)
        .env("HELM_DATA_HOME", &home);
    process::run(&mut command).unwrap()
}

fn render(values: &[&str]) -> BTreeMap<Identity, Value> {
    let base = [
        "template",
        "margay",
        "deploy/helm/margay",
        "--namespace=margay-operator",
        "--include-crds",
    ];
    parse(&helm(&[&base[..], values].concat()))
}

fn parse(text: &str) -> BTreeMap<Identity, Value> {
    let documents = serde_yaml_ng::Deserializer::from_str(text).map(Value::deserialize);
    let objects = documents
        .map(Result::unwrap)
        .filter(|object| !object.is_null());
    objects
        .map(|object| {
            let text = |path: &str| {
                let found = object.pointer(path).and_then(Value::as_str);
                found.unwrap_or_default().to_owned()
            };
            let identity = (
                text("/kind"),
                text("/metadata/namespace"),
                text("/metadata/name"),
            );
            (identity, object)
        })
        .collect()
}

fn of(objects: &BTreeMap<Identity, Value>, kind: &str) -> Value {
    let found = objects.iter().find(|((of, ..), _)| of == kind);
    found.unwrap().1.clone()
}

#[test]
fn the_chart_installs_what_the_manifests_do() {
    let text = std::fs::read_to_string(checkout().join("deploy/operator.yaml")).unwrap();
    let mut wanted = parse(&text);
    // Helm makes the namespace of a release.
    wanted.retain(|(kind, ..), _| kind != "Namespace");
    let mut rendered = render(&[]);
    let installation = of(&rendered, "Installation");
    rendered.retain(|(kind, ..), _| kind != "Installation");
    for (identity, object) in &wanted {
        assert_eq!(rendered.get(identity), Some(object), "{identity:?}");
    }
    assert_eq!(rendered.len(), wanted.len());
    assert_eq!(installation["metadata"]["name"], "default");
    assert_eq!(
        installation["spec"],
        json!({"imagePullPolicy": "IfNotPresent"})
    );
}

#[test]
fn values_reach_the_operator_and_the_installation() {
    let rendered = render(&[
        "--set=image.registry=registry.test/,image.path=mirror,image.prefix=our-",
        "--set=imagePullSecrets[0].name=key",
        "--set=operator.env[0].name=MARGAY_LOG,operator.env[0].value=debug",
        "--set=operator.resources.requests.cpu=10m",
        "--set=installation.spec.calicoNetwork.mtu=1400,installation.spec.imagePrefix=their-",
    ]);
    let pod = &of(&rendered, "Deployment")["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let image = container["image"].as_str().unwrap();
    assert!(
        image.starts_with("registry.test/mirror/our-margay:v"),
        "{image}"
    );
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "key"}]));
    assert_eq!(container["resources"]["requests"]["cpu"], "10m");
    let variables = container["env"].as_array().unwrap();
    assert_eq!(variables.last().unwrap()["value"], "debug");
    let spec = of(&rendered, "Installation")["spec"].clone();
    assert_eq!(
        spec,
        json!({
            "registry": "registry.test/", "imagePath": "mirror", "imagePrefix": "their-",
            "imagePullPolicy": "IfNotPresent", "imagePullSecrets": [{"name": "key"}],
            "calicoNetwork": {"mtu": 1400},
        }),
        "what the Installation says itself counts"
    );
    let without = render(&["--set=installation.enabled=false"]);
    assert!(without.keys().all(|(kind, ..)| kind != "Installation"));
}

#[test]
fn helm_finds_nothing_wrong_with_the_chart() {
    let report = helm(&["lint", "--strict", "deploy/helm/margay"]);
    assert!(report.contains("0 chart(s) failed"), "{report}");
}
