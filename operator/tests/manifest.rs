//! `deploy/operator.yaml` has every CRD, then the operator's own objects;
//! `deploy/operator-v1.yaml`, for clusters with the older storage, has the CRDs of neither storage.
//! `UPDATE_EXPECT=1` rewrites them.

use std::fs;
use std::path::{Path, PathBuf};

use margay_api::installation::Installation;
use margay_api::storage::Mode;
use margay_api::v3;
use margay_operator::{VERSION, install};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn custom_resource_definitions(mode: Mode) -> Vec<String> {
    let folder = deploy().join("crds");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder entry").path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .collect();
    files.sort();
    let is_data = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(v3::GROUP))
    };
    files.retain(|path| mode == Mode::V3 || !is_data(path));
    files
        .iter()
        .map(|path| fs::read_to_string(path).expect("a readable CRD"))
        .map(|text| format!("{}\n", text.trim_start_matches("---\n").trim_end()))
        .collect()
}

#[test]
fn the_manifests_are_the_crds_and_the_operator() {
    for (mode, name) in [(Mode::V3, "operator.yaml"), (Mode::V1, "operator-v1.yaml")] {
        let mut documents = custom_resource_definitions(mode);
        let objects = install::objects(VERSION, mode);
        documents.extend(
            objects
                .iter()
                .map(|object| serde_yaml_ng::to_string(&object.body).unwrap()),
        );
        let wanted = documents.join("---\n");
        let file = deploy().join(name);
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            fs::write(&file, &wanted).expect("a writable manifest");
        }
        let found = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            found == wanted,
            "{} differs from CRDs and operator; rewrite it with `make bless`",
            file.display()
        );
    }
}

#[test]
fn the_sample_installation_is_a_good_one() {
    let text = fs::read_to_string(deploy().join("installation.yaml")).unwrap();
    let sample: Installation = serde_yaml_ng::from_str(&text).unwrap();
    assert_eq!(sample.metadata.name.as_deref(), Some("default"));
    assert_eq!(margay_operator::validate::installation(&sample.spec), []);
}
