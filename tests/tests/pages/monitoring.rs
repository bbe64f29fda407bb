//! The dashboard and the alert rules of deploy/monitoring ask for metrics that are exposed.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

use crate::{metrics, root};

const FOLDER: &str = "deploy/monitoring";

/// Metrics as Prometheus stores them, from the page that lists all of them.
fn exposed() -> BTreeSet<String> {
    let page = metrics::page();
    let rows = page.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|');
        let name = cells.next()?.trim().trim_end_matches('`').to_owned();
        Some((name, cells.next()?.trim().to_owned()))
    });
    let series = rows.flat_map(|(name, kind)| match kind.as_str() {
        "histogram" => ["_bucket", "_sum", "_count"]
            .map(|end| format!("{name}{end}"))
            .to_vec(),
        _ => vec![name],
    });
    series.collect()
}

/// Names of metrics in a query: words with the prefix of a component.
fn metrics_of(query: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words = query.split(|c| !is_part(c));
    let prefixes = ["margay_", "typha_", "felix_", "process_"];
    words
        .filter(|word| prefixes.iter().any(|prefix| word.starts_with(prefix)))
        .map(str::to_owned)
        .collect()
}

/// Checks a query: its brackets match, and it asks for what is exposed.
fn check(place: &str, query: &str, exposed: &BTreeSet<String>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut open = Vec::new();
    for c in query.chars() {
        match c {
            '(' => open.push(')'),
            '[' => open.push(']'),
            '{' => open.push('}'),
            ')' | ']' | '}' if open.pop() != Some(c) => {
                problems.push(format!("{place}: {c} without its partner in {query}"));
            }
            _ => {}
        }
    }
    if !open.is_empty() {
        problems.push(format!("{place}: {open:?} is missing in {query}"));
    }
    let asked = metrics_of(query);
    if asked.is_empty() {
        problems.push(format!("{place}: no metric in {query}"));
    }
    let unknown = asked.difference(exposed);
    problems.extend(unknown.map(|name| format!("{place}: {name} is not exposed")));
    problems
}

#[test]
fn the_dashboard_asks_for_what_is_exposed() {
    let path = root().join(FOLDER).join("grafana-dashboard.json");
    let text = fs::read_to_string(path).expect("the dashboard is there");
    let dashboard: Value = serde_json::from_str(&text).expect("a dashboard");
    let exposed = exposed();
    let (mut problems, mut ids) = (Vec::new(), BTreeSet::new());
    let panels = dashboard["panels"].as_array().expect("panels");
    for panel in panels {
        let title = panel["title"].as_str().unwrap_or_default();
        assert!(
            !title.is_empty() && ids.insert(panel["id"].as_u64()),
            "{panel}"
        );
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().expect("a query");
            problems.extend(check(title, query, &exposed));
        }
    }
    assert!(panels.len() > 15, "panels are not found any more");
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn alerts_ask_for_what_is_exposed_and_say_what_to_do() {
    let path = root().join(FOLDER).join("alerts.yaml");
    let text = fs::read_to_string(path).expect("the rules are there");
    let rules: Value = serde_yaml_ng::from_str(&text).expect("rules");
    let exposed = exposed();
    let (mut problems, mut names) = (Vec::new(), BTreeSet::new());
    for group in rules["groups"].as_array().expect("groups") {
        for rule in group["rules"].as_array().expect("rules") {
            let name = rule["alert"].as_str().expect("a name");
            assert!(names.insert(name), "{name} twice");
            problems.extend(check(
                name,
                rule["expr"].as_str().expect("a query"),
                &exposed,
            ));
            for field in ["summary", "description"] {
                let text = rule["annotations"][field].as_str().unwrap_or_default();
                assert!(text.len() > 10, "{name} has no {field}");
            }
            let severity = rule["labels"]["severity"].as_str().unwrap_or_default();
            assert!(
                ["warning", "critical"].contains(&severity),
                "{name}: {severity:?}"
            );
        }
    }
    assert!(names.len() > 10, "rules are not found any more");
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn a_query_of_something_else_is_found() {
    let exposed = BTreeSet::from(["margay_a_total".to_owned()]);
    let good = "sum by (kind) (rate(margay_a_total{kind=\"x\"}[5m])) > 0";
    assert_eq!(check("p", good, &exposed), [""; 0]);
    for bad in [
        "rate(margay_a[5m])",
        "sum(margay_a_total",
        "margay_a_total]",
        "up",
    ] {
        assert!(!check("p", bad, &exposed).is_empty(), "{bad}");
    }
}
