//! Objects of which any part is something else: that is reported, and no command ends by it.

use std::collections::BTreeSet;
use std::path::PathBuf;

use margay_ctl::cluster::Cluster;
use margay_ctl::manifest::{self, Origin};
use margay_ctl::objects::Objects;
use margay_ctl::unused::Schemas;
use serde_json::{Value, json};

/// Objects of the test data, one of each kind and more.
fn samples() -> Vec<Value> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut samples = vec![
        json!({
            "apiVersion": "crd.projectcalico.org/v1", "kind": "IPPool",
            "metadata": {"name": "a", "annotations": {"projectcalico.org/metadata": "{}"}},
            "spec": {"cidr": "10.0.0.0/16"},
        }),
        json!({
            "apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "a"},
            "spec": {"jobTemplate": {"spec": {"template": {
                "metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]},
            }}}},
        }),
        json!({
            "apiVersion": "v1", "kind": "PodList",
            "items": [{"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "a-"}}],
        }),
    ];
    for name in ["shop", "pods.yaml", "change.yaml"] {
        let path = folder.join(name).display().to_string();
        manifest::read(&path, &mut |document| {
            samples.push(document.expect("valid").1)
        })
        .expect("readable");
    }
    samples
}

/// Pointers to all parts of a value.
fn parts(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                parts(
                    value,
                    &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1")),
                    found,
                );
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                parts(value, &format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn whatever_stands_in_an_object_is_reported_and_not_fatal() {
    let (schemas, origin) = (
        Schemas::default(),
        Origin {
            file: "f".to_owned(),
            line: 1,
        },
    );
    let (mut examined, mut reported) = (0, 0);
    for sample in samples() {
        let mut pointers = Vec::new();
        parts(&sample, "", &mut pointers);
        for pointer in pointers {
            for other in [
                json!(null),
                json!(true),
                json!(-1),
                json!("x"),
                json!([[]]),
                json!({"x": {}}),
            ] {
                let mut object = sample.clone();
                *object.pointer_mut(&pointer).expect("a part of it") = other;
                let mut ignored = BTreeSet::new();
                schemas.find_ignored(&object, &mut ignored);
                let mut objects = Objects::default();
                objects.add(&origin, object, "default");
                let cluster = Cluster::of(&objects);
                examined += 1;
                reported +=
                    usize::from(!(cluster.refused.is_empty() && cluster.unreadable.is_empty()));
            }
        }
    }
    assert!(
        examined > 1000 && reported > 300,
        "{reported} of {examined}"
    );
}
