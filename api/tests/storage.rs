//! The older storage: objects as clusters of several releases hold them, the user's form of them,
//! and the form that is written back.
//!
//! `storage/NAME.stored.yaml` is the object that the API server holds; `NAME.seen.yaml` is the
//! user's form, then the object that is written back. `UPDATE_EXPECT=1` rewrites the latter.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use expect_test::expect_file;
use margay_api::storage::{self, Decoded, Kind, METADATA, Mode, kind};
use proptest::collection::btree_map;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/storage")
}

fn kind_of(stored: &Value) -> &'static Kind {
    kind::ALL
        .iter()
        .find(|kind| stored["kind"] == kind.stored_kind)
        .expect("a kind of Calico's")
}

#[test]
fn stored_objects_of_several_releases() {
    let mut names: Vec<String> = fs::read_dir(folder())
        .unwrap()
        .filter_map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()?
                .strip_suffix(".stored.yaml")
                .map(str::to_owned)
        })
        .collect();
    names.sort();
    assert!(names.len() >= 10, "{names:?}");
    for name in names {
        let text = fs::read_to_string(folder().join(format!("{name}.stored.yaml"))).unwrap();
        let stored: Value = serde_yaml_ng::from_str(&text).unwrap();
        let kind = kind_of(&stored);
        let Decoded { object, problems } =
            storage::decode(kind, stored.to_string().as_bytes()).unwrap();
        let written = storage::write(kind, object.clone()).unwrap();
        let problems: String = problems
            .iter()
            .map(|problem| format!("# {problem}\n"))
            .collect();
        let yaml = |value: &Value| serde_yaml_ng::to_string(value).unwrap();
        let shown = format!("{problems}{}---\n{}", yaml(&object), yaml(&written));
        expect_file![folder().join(format!("{name}.seen.yaml"))].assert_eq(&shown);

        let again = storage::decode(kind, written.to_string().as_bytes()).unwrap();
        assert_eq!(
            again.object, object,
            "{name}: what was written is read as it was"
        );
    }
}

#[test]
fn typed_objects_are_read_from_either_storage() {
    use margay_api::v3::{BlockAffinity, IPAMConfiguration};
    let affinity = |deleted: Value| {
        let stored = json!({"apiVersion": "crd.projectcalico.org/v1", "kind": "BlockAffinity",
        "metadata": {"name": "a"},
        "spec": {
            "cidr": "10.0.0.0/26",
            "node": "n1",
            "state": "confirmed",
            "deleted": deleted,
        }});
        storage::decode_as::<BlockAffinity>(
            Mode::V1,
            Kind::of("BlockAffinity").unwrap(),
            stored.to_string().as_bytes(),
        )
        .map(|read| read.object)
    };
    for (text, deleted) in [
        (json!("true"), true),
        (json!("false"), false),
        (json!(""), false),
        (json!(true), true),
    ] {
        assert_eq!(
            affinity(text.clone()).unwrap().spec.deleted,
            deleted,
            "{text}"
        );
    }
    let error = affinity(json!("perhaps")).unwrap_err().to_string();
    assert_eq!(
        error,
        "spec.deleted: \"perhaps\": neither true nor false; use \"true\" or \"false\""
    );
    let gone = affinity(json!("true")).unwrap();
    let kind = Kind::of("BlockAffinity").unwrap();
    let (old, new) = (
        storage::encode(Mode::V1, kind, &gone).unwrap(),
        storage::encode(Mode::V3, kind, &gone).unwrap(),
    );
    assert_eq!(
        (&old["spec"]["deleted"], &new["spec"]["deleted"]),
        (&json!("true"), &json!(true))
    );
    assert_eq!(
        (&old["apiVersion"], &new["apiVersion"]),
        (
            &json!("crd.projectcalico.org/v1"),
            &json!("projectcalico.org/v3")
        )
    );

    let config = IPAMConfiguration::new("default", Default::default());
    let kind = Kind::of("IPAMConfiguration").unwrap();
    assert_eq!(
        storage::encode(Mode::V1, kind, &config).unwrap()["kind"],
        "IPAMConfig"
    );
    assert_eq!(
        kind.path(Mode::V1),
        "/apis/crd.projectcalico.org/v1/ipamconfigs"
    );
    assert_eq!(Kind::of_path(&kind.path(Mode::V3)), Some(kind));
    assert_eq!(Kind::of_path("/api/v1/pods"), None);
}

#[test]
fn the_users_own_metadata_annotation_never_becomes_the_stored_one() {
    let object = json!({
        "metadata": {"name": "s", "annotations": {METADATA: "{\"labels\":{\"role\":\"admin\"}}"}},
        "spec": {},
    });
    let kind = Kind::of("GlobalNetworkSet").unwrap();
    let stored = storage::write(kind, object).unwrap();
    assert_eq!(stored["metadata"]["annotations"], json!({METADATA: "{}"}));
    assert_eq!(
        storage::read(kind, stored).unwrap().object["metadata"].get("labels"),
        None
    );
}

#[test]
fn every_kind_of_the_classic_manifest_is_known() {
    assert_eq!(kind::ALL.len(), 22);
    assert_eq!(kind::ALL.iter().filter(|kind| kind.classic).count(), 15);
    assert!(
        kind::ALL.windows(2).all(|pair| pair[0].kind < pair[1].kind),
        "in order"
    );
}

fn pairs() -> impl Strategy<Value = Map<String, Value>> {
    let key = prop_oneof![
        "[a-z]{1,6}",
        "projectcalico.org/[a-z]{1,6}",
        "operator.tigera.io/[a-z]{1,4}",
        "x.projectcalico.org/[a-z]"
    ];
    btree_map(key, "\\PC{0,8}", 0..4).prop_map(|pairs| {
        pairs
            .into_iter()
            .map(|(key, value)| (key, Value::from(value)))
            .collect()
    })
}

fn uid() -> impl Strategy<Value = String> {
    "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-8[0-9a-f]{3}-[0-9a-f]{12}"
}

prop_compose! {
    fn metadata(kind: &'static Kind)(
        name in "[a-z][a-z0-9-]{0,8}(\\.[a-z]{1,4})?",
        uid in proptest::option::of(uid()),
        labels in pairs(),
        annotations in pairs(),
        owner in proptest::option::of(
            (uid(), prop_oneof![Just("projectcalico.org/v3"), Just("apps/v1")]),
        ),
        time in proptest::option::of(Just("2026-01-01T00:00:00Z")),
        version in proptest::option::of(Just("17")),
    ) -> Value {
        let mut metadata = json!({"name": name});
        let mut put = |field: &str, value: Value| { metadata[field] = value; };
        if kind.namespaced { put("namespace", json!("ns")); }
        if let Some(uid) = uid { put("uid", json!(uid)); }
        if !labels.is_empty() { put("labels", Value::Object(labels)); }
        if !annotations.is_empty() { put("annotations", Value::Object(annotations)); }
        if let Some((uid, version)) = owner {
            put(
                "ownerReferences",
                json!([{"apiVersion": version, "kind": "Tier", "name": "t", "uid": uid}]),
            );
        }
        if let Some(time) = time { put("creationTimestamp", json!(time)); }
        if let Some(version) = version { put("resourceVersion", json!(version)); }
        metadata
    }
}

fn object() -> impl Strategy<Value = (&'static Kind, Value)> {
    (0..kind::ALL.len()).prop_flat_map(|index| {
        let kind = &kind::ALL[index];
        (metadata(kind), any::<bool>()).prop_map(move |(metadata, flag)| {
            let spec = match kind.kind {
                "BlockAffinity" => json!({
                    "cidr": "10.0.0.0/26",
                    "node": "n",
                    "state": "confirmed",
                    "deleted": flag,
                }),
                "IPAMConfiguration" => {
                    json!({
                        "strictAffinity": flag,
                        "autoAllocateBlocks": true,
                        "maxBlocksPerHost": 3,
                    })
                }
                _ => json!({"any": flag, "nested": [{"field": null_free()}]}),
            };
            (
                kind,
                json!({
                    "apiVersion": "projectcalico.org/v3",
                    "kind": kind.kind,
                    "metadata": metadata,
                    "spec": spec,
                }),
            )
        })
    })
}

fn null_free() -> Value {
    json!([1, null, 2])
}

proptest! {
    #[test]
    fn what_is_written_is_read_as_it_was((kind, object) in object()) {
        let stored = storage::write(kind, object.clone()).unwrap();
        prop_assert_eq!(&stored["apiVersion"], "crd.projectcalico.org/v1");
        let Decoded { object: seen, problems } = storage::read(kind, stored.clone()).unwrap();
        prop_assert_eq!(problems, vec![]);
        prop_assert_eq!(&seen, &object);
        prop_assert_eq!(storage::write(kind, seen).unwrap(), stored);
    }

    #[test]
    fn completing_twice_is_completing_once((kind, mut object) in object()) {
        storage::complete(kind, &mut object);
        let once = object.clone();
        storage::complete(kind, &mut object);
        prop_assert_eq!(object, once);
    }

    #[test]
    fn no_bytes_make_decoding_panic(
        index in 0..kind::ALL.len(),
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        text in "\\PC{0,40}",
    ) {
        let kind = &kind::ALL[index];
        let _any = storage::decode(kind, &bytes);
        for stored in [
            json!({
                "metadata": {"annotations": {METADATA: text}, "uid": text, "name": text},
                "spec": {"deleted": text, "cidr": text},
            }),
            json!({
                "metadata": {"annotations": text, "labels": [text]},
                "spec": {"ipip": text, "types": text},
            }),
            json!({
                "metadata": {
                    "annotations": {
                        METADATA: json!({
                            "labels": text,
                            "ownerReferences": [text, {"uid": text}],
                            "name": 1,
                        }).to_string(),
                    },
                },
                "spec": text,
            }),
        ] {
            if let Ok(Decoded { object, .. }) = storage::decode(
                kind,
                stored.to_string().as_bytes(),
            ) {
                let _any = storage::write(kind, object);
            }
        }
    }
}
