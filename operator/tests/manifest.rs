//! `deploy/operator.yaml` is what people apply: every CRD, then the operator's own objects. `UPDATE_EXPECT=1` rewrites it.

use std::fs;
use std::path::{Path, PathBuf};

use margay_api::installation::Installation;
use margay_operator::{VERSION, install};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn custom_resource_definitions() -> Vec<String> {
    let folder = deploy().join("crds");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder entry").path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .collect();
    files.sort();
    files
        .iter()
        .map(|path| fs::read_to_string(path).expect("a readable CRD"))
        .map(|text| format!("{}\n", text.trim_start_matches("---\n").trim_end()))
        .collect()
}

#[test]
fn the_manifest_is_the_crds_and_the_operator() {
    let mut documents = custom_resource_definitions();
    documents.extend(install::objects(VERSION).iter().map(|object| serde_yaml_ng::to_string(&object.body).unwrap()));
    let wanted = documents.join("---\n");
    let file = deploy().join("operator.yaml");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&file, &wanted).expect("a writable manifest");
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(found == wanted, "{} differs from CRDs and operator; write it anew with `make bless`", file.display());
}

#[test]
fn the_sample_installation_is_a_good_one() {
    let text = fs::read_to_string(deploy().join("installation.yaml")).unwrap();
    let sample: Installation = serde_yaml_ng::from_str(&text).unwrap();
    assert_eq!(sample.metadata.name.as_deref(), Some("default"));
    assert_eq!(margay_operator::validate::installation(&sample.spec), []);
}
