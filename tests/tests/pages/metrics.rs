//! Metrics, as the processes register them.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use prometheus_client::registry::Registry;

use crate::{cell, code, source};

const INTRODUCTION: &str = "<!-- Generated from what the processes register, by `make bless`. -->

# Metrics

OpenMetrics, on the loopback of each node;
[Observe](../operate/observe.md#health-and-metrics) has where Prometheus reaches them. Names of
objects and nodes are never labels; where a metric is counted by kind, the label is `kind`. Those
that begin with `typha_` and `felix_` are what Calico's dashboards ask for, as far as there is
something to count.
";

/// The page.
pub fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    let mut operator = Registry::default();
    margay_operator::metrics::Metrics::register(&mut operator);
    section(&mut page, "operator", 9097, &operator);
    let mut typha = Registry::default();
    let counters = margay_typha::metrics::Counters::register(&mut typha, Default::default());
    // A family without a member is not encoded.
    let kind = margay_typha::metrics::Kind { kind: "policy" };
    for family in [
        &counters.events,
        &counters.updates,
        &counters.watch_failures,
        &counters.lists_refused,
    ] {
        drop(family.get_or_create(&kind));
    }
    for family in [&counters.objects, &counters.refused] {
        drop(family.get_or_create(&kind));
    }
    section(&mut page, "typha", 9098, &typha);
    let mut node = Registry::default();
    let metrics = margay_node::metrics::Metrics::new(&mut node);
    drop(metrics.records.get_or_create(&margay_node::metrics::Kind {
        kind: "policy".to_owned(),
    }));
    let bgp = margay_node::bgp::metrics::BgpMetrics::new(&mut node);
    let peer = margay_node::bgp::metrics::PeerLabels {
        name: "rack".to_owned(),
        address: "192.0.2.1:179".to_owned(),
    };
    for family in [
        &bgp.established,
        &bgp.received,
        &bgp.sent,
        &bgp.updates,
        &bgp.ended,
    ] {
        drop(family.get_or_create(&peer));
    }
    section(&mut page, "agent", 9099, &node);
    page
}

#[test]
fn every_metric_that_is_registered_is_on_the_page() {
    let page = page();
    let shown: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let mut registered = BTreeSet::new();
    for source in source::shipped() {
        source.visit(&mut |level| {
            for name in ["register", "register_with_unit"] {
                let firsts = source::calls(level, name)
                    .filter_map(|call| source::text(source::parts(&call).first()?));
                registered.extend(firsts);
            }
        });
    }
    assert!(
        registered.len() > 20,
        "registrations are not found any more: {registered:?}"
    );
    // The page has them with their prefix, unit and the counters' end.
    let is_shown = |name: &String| {
        let ends = ["", "_total", "_seconds"].map(|end| format!("{name}{end}"));
        shown.iter().any(|metric| {
            ends.iter()
                .any(|end| metric == end || metric.ends_with(&format!("_{end}")))
        })
    };
    let missing: Vec<&String> = registered.iter().filter(|name| !is_shown(name)).collect();
    assert!(
        missing.is_empty(),
        "metrics that the page lacks; does their family have a member there? {missing:?}"
    );
}

fn section(page: &mut String, process: &str, port: u16, registry: &Registry) {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).expect("a text of the metrics");
    let described = |kind: &str| -> Vec<(String, String)> {
        let lines = text
            .lines()
            .filter_map(|line| line.strip_prefix(&format!("# {kind} ")));
        let pairs = lines.filter_map(|line| line.split_once(' '));
        pairs
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    };
    let types = described("TYPE");
    let mut rows: Vec<(String, String, String)> = Vec::new();
    for (name, help) in described("HELP") {
        let (_, kind) = types
            .iter()
            .find(|(other, _)| *other == name)
            .expect("a type of every metric");
        // A scraper sees a counter under this name.
        let shown = if kind == "counter" {
            format!("{name}_total")
        } else {
            name
        };
        rows.push((shown, kind.clone(), help));
    }
    assert!(
        rows.len() > 2,
        "metrics of {process} are not found any more"
    );
    rows.sort();
    let _ = write!(
        page,
        "\n## {process}, port {port}\n\n| Metric | Type | Meaning |\n|---|---|---|\n"
    );
    for (name, kind, help) in rows {
        let _ = writeln!(
            page,
            "| {} | {kind} | {} |",
            code(&name),
            cell(help.trim_end_matches('.'))
        );
    }
}
