//! `deploy/operator.yaml` has every CRD, then the operator's own objects;
//! `deploy/operator-v1.yaml`, for clusters with the older storage, has the CRDs of neither storage;
//! `deploy/margay.yaml` has the components too, for an installation without an Installation.
//! The Helm chart's template has the operator's objects with places for values.
//! `UPDATE_EXPECT=1` rewrites all of them.

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
    let manifests = [
        (
            "operator.yaml",
            Mode::V3,
            install::objects(VERSION, Mode::V3),
        ),
        (
            "operator-v1.yaml",
            Mode::V1,
            install::objects(VERSION, Mode::V1),
        ),
        ("margay.yaml", Mode::V3, install::standalone(VERSION)),
    ];
    for (name, mode, objects) in manifests {
        let mut documents = custom_resource_definitions(mode);
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

/// Values of the chart that take the place of a field: a word that stands for it, and the value.
/// The field is left out if the value is empty.
const VALUES: [(&str, &str); 4] = [
    ("PULL_SECRETS", ".Values.imagePullSecrets"),
    ("RESOURCES", ".Values.operator.resources"),
    ("NODE_SELECTOR", ".Values.operator.nodeSelector"),
    ("TOLERATIONS", ".Values.operator.tolerations"),
];

/// The operator's objects as a template. Helm makes the namespace.
fn template() -> String {
    let mut objects = install::objects(VERSION, Mode::V3);
    objects.retain(|object| object.key.kind.kind != "Namespace");
    for object in &mut objects {
        let Some(pod) = object.body.pointer_mut("/spec/template/spec") else {
            continue;
        };
        pod["imagePullSecrets"] = "PULL_SECRETS".into();
        pod["nodeSelector"] = "NODE_SELECTOR".into();
        pod["tolerations"] = "TOLERATIONS".into();
        let container = &mut pod["containers"][0];
        container["image"] = "IMAGE".into();
        container["imagePullPolicy"] = "PULL_POLICY".into();
        container["resources"] = "RESOURCES".into();
        container["env"]
            .as_array_mut()
            .expect("variables")
            .push("ENV".into());
    }
    let documents: Vec<String> = objects
        .iter()
        .map(|object| serde_yaml_ng::to_string(&object.body).expect("JSON is YAML"))
        .collect();
    let lines = documents.join("---\n");
    let head = "# Generated from the operator by `make bless`.\n";
    head.to_owned() + &lines.lines().map(with_values).collect::<String>()
}

/// A line of the template, or several.
fn with_values(line: &str) -> String {
    let text = line.trim_start();
    let indent = line.len() - text.len();
    let space = " ".repeat(indent);
    let block = |value: &str, head: &str, depth: usize| {
        format!(
            "{space}{{{{- with {value} }}}}\n{head}{space}{{{{- toYaml . | nindent {depth} }}}}\n\
             {space}{{{{- end }}}}\n"
        )
    };
    if text == "- ENV" {
        return block(".Values.operator.env", "", indent);
    }
    let (field, value) = text.split_once(": ").unwrap_or((text, ""));
    if let Some((_, value)) = VALUES.iter().find(|(word, _)| *word == value) {
        return block(value, &format!("{space}{field}:\n"), indent + 2);
    }
    let value = match (field, value) {
        (_, "IMAGE") => "{{ include \"margay.image\" . }}",
        (_, "PULL_POLICY") => "{{ .Values.image.pullPolicy }}",
        ("namespace", _) => "{{ .Release.Namespace }}",
        _ => return format!("{line}\n"),
    };
    format!("{space}{field}: {value}\n")
}

#[test]
fn the_chart_is_the_operator_with_places_for_values() {
    let wanted = template();
    let file = deploy().join("helm/margay/templates/operator.yaml");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&file, &wanted).expect("a writable template");
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == wanted,
        "{} differs from the operator; rewrite it with `make bless`",
        file.display()
    );
    let chart = fs::read_to_string(deploy().join("helm/margay/Chart.yaml")).expect("a chart");
    assert!(
        chart.contains(&format!("appVersion: {VERSION}\n")),
        "{chart}"
    );
}

#[test]
fn the_sample_installation_is_a_good_one() {
    let text = fs::read_to_string(deploy().join("installation.yaml")).unwrap();
    let sample: Installation = serde_yaml_ng::from_str(&text).unwrap();
    assert_eq!(sample.metadata.name.as_deref(), Some("default"));
    assert_eq!(margay_operator::validate::installation(&sample.spec), []);
}
