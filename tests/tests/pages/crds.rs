//! Kinds that users write, from their definitions.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use serde_json::Value;

use crate::{cell, code, root};

const INDEX: &str = "<!-- Generated from deploy/crds by `make bless`. -->

# Kinds

Every kind that Margay serves on a cluster of its own. `kubectl explain KIND.spec` shows the same.

| Kind | Group and version | Scope | |
|---|---|---|---|
";

/// Pages by their path in the reference: one of every kind, and one that lists them.
pub fn pages() -> BTreeMap<String, String> {
    let folder = root().join("deploy/crds");
    let entries =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut index = INDEX.to_owned();
    let mut pages = BTreeMap::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("a definition");
        let definition: Value = serde_yaml_ng::from_str(&text).expect("YAML of a definition");
        let spec = &definition["spec"];
        let kind = spec["names"]["kind"].as_str().expect("a kind");
        let version = spec["versions"][0]["name"].as_str().expect("a version");
        let group = format!("{}/{version}", spec["group"].as_str().expect("a group"));
        let scope = if spec["scope"] == "Namespaced" {
            "namespace"
        } else {
            "cluster"
        };
        let schema = &spec["versions"][0]["schema"]["openAPIV3Schema"];
        let name = format!("{}.md", kind.to_lowercase());
        let about = cell(description(&schema["properties"]["spec"]));
        let _ = writeln!(
            index,
            "| [{kind}]({name}) | {} | {scope} | {about} |",
            code(&group)
        );
        let plural = spec["names"]["plural"].as_str().unwrap_or_default();
        let head = format!(
            "<!-- Generated from deploy/crds by `make bless`. -->\n\
             \n\
             # {kind}\n\
             \n\
             {}, of the {scope}: `kubectl get {plural}.{}`\n\
             \n\
             {}\n",
            code(&group),
            spec["group"].as_str().unwrap_or_default(),
            description(&schema["properties"]["spec"]).replace('<', "&lt;"),
        );
        pages.insert(
            format!("crds/{name}"),
            head + &fields(schema) + &rules(schema),
        );
    }
    pages.insert("crds/index.md".to_owned(), index);
    pages
}

fn description(schema: &Value) -> &str {
    schema["description"].as_str().unwrap_or_default()
}

fn fields(root: &Value) -> String {
    let mut table = "\n| Field | Type | Meaning |\n|---|---|---|\n".to_owned();
    walk("", root, &mut |path, schema, is_required| {
        if path.is_empty() || ["apiVersion", "kind", "metadata"].contains(&path) {
            return;
        }
        let required = if is_required { ", required" } else { "" };
        let about = [description(schema).to_owned(), bounds(schema)].join(" ");
        let _ = writeln!(
            table,
            "| {} | {}{required} | {} |",
            code(path),
            name_of(schema),
            cell(&about)
        );
    });
    table
}

/// Returns what the API server checks beyond types.
fn rules(root: &Value) -> String {
    let mut list = String::new();
    walk("", root, &mut |path, schema, _| {
        for rule in schema["x-kubernetes-validations"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let place = if path.is_empty() {
                String::new()
            } else {
                format!("{}: ", code(path))
            };
            let _ = writeln!(
                list,
                "- {place}{}",
                cell(rule["message"].as_str().unwrap_or_default())
            );
        }
    });
    if list.is_empty() {
        list
    } else {
        format!("\n## Refused when written\n\n{list}")
    }
}

/// Calls `visit` with every schema, its path, and whether it is required where it stands; parents
/// before children.
fn walk(path: &str, schema: &Value, visit: &mut dyn FnMut(&str, &Value, bool)) {
    descend(path, schema, false, visit);
}

fn descend(
    path: &str,
    schema: &Value,
    is_required: bool,
    visit: &mut dyn FnMut(&str, &Value, bool),
) {
    visit(path, schema, is_required);
    below(path, schema, visit);
}

fn below(path: &str, schema: &Value, visit: &mut dyn FnMut(&str, &Value, bool)) {
    let required: Vec<&str> = schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        descend(&path, property, required.contains(&name.as_str()), visit);
    }
    // Elements have no line of their own: their type is in that of the list, and their fields
    // follow.
    for (inner, mark) in [("items", "[]"), ("additionalProperties", ".*")] {
        if schema[inner].is_object() {
            below(&format!("{path}{mark}"), &schema[inner], visit);
        }
    }
}

fn name_of(schema: &Value) -> String {
    if schema["x-kubernetes-int-or-string"] == true {
        return "integer or string".to_owned();
    }
    match schema["type"].as_str() {
        Some("array") => format!("list of {}", name_of(&schema["items"])),
        Some("object") if schema["additionalProperties"].is_object() => {
            format!("map of {}", name_of(&schema["additionalProperties"]))
        }
        Some(name) => name.to_owned(),
        None => "any".to_owned(),
    }
}

/// Bounds of a value, or of the elements of a list.
fn bounds(schema: &Value) -> String {
    let mut bounds = Vec::new();
    let values = schema["enum"]
        .as_array()
        .or(schema["items"]["enum"].as_array());
    if let Some(values) = values {
        let values: Vec<String> = values
            .iter()
            .map(|value| code(value.as_str().unwrap_or_default()))
            .collect();
        bounds.push(format!("One of {}.", values.join(", ")));
    }
    let number = |key: &str| schema[key].as_f64();
    match (number("minimum"), number("maximum")) {
        (Some(low), Some(high)) => bounds.push(format!("From {low} to {high}.")),
        (Some(low), None) => bounds.push(format!("At least {low}.")),
        (None, Some(high)) => bounds.push(format!("At most {high}.")),
        (None, None) => {}
    }
    for (key, what) in [
        ("maxItems", "elements"),
        ("maxLength", "characters"),
        ("maxProperties", "entries"),
    ] {
        if let Some(most) = number(key) {
            bounds.push(format!("At most {most} {what}."));
        }
    }
    if let Some(pattern) = schema["pattern"].as_str() {
        bounds.push(format!("Matches {}.", code(pattern)));
    }
    match &schema["default"] {
        Value::Null => {}
        Value::String(text) => bounds.push(format!("Default {}.", code(text))),
        other => bounds.push(format!("Default {}.", code(&other.to_string()))),
    }
    bounds.join(" ")
}
