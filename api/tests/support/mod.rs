//! Parsed policies as text.

use std::fmt::Write as _;

use margay_api::policy::{Policy, Traffic};
use margay_api::problem::Refusal;
use margay_api::rule::{EntityMatch, Port, Rule};

/// Formats a parse result: the policy, or the problems and the replacement.
pub fn show(parsed: Result<Policy, Refusal>) -> String {
    match parsed {
        Ok(policy) => show_policy(&policy),
        Err(refusal) => {
            let closed = match &refusal.closed {
                Some(policy) => show_policy(policy),
                None => "nothing\n".to_owned(),
            };
            format!("{refusal}\ninstead: {closed}")
        }
    }
}

fn show_policy(policy: &Policy) -> String {
    let mut text = format!("{} {:?} {}", policy.tier, policy.order.0, policy.selector);
    text += &match policy.traffic {
        Traffic::Normal => String::from("\n"),
        other => format!(" {other:?}\n"),
    };
    for (name, applies, rules) in [
        ("ingress", policy.applies_ingress, &policy.ingress),
        ("egress", policy.applies_egress, &policy.egress),
    ] {
        if applies || !rules.is_empty() {
            writeln!(
                text,
                "{name}{}",
                if applies { "" } else { " (does not apply)" }
            )
            .unwrap();
        }
        for rule in rules {
            writeln!(text, "  {}", show_rule(rule)).unwrap();
        }
    }
    text
}

fn show_rule(rule: &Rule) -> String {
    let mut text = format!("{:?}", rule.action);
    for (name, value) in [
        (
            "version",
            rule.ip_version.map(|version| format!("{version:?}")),
        ),
        (
            "protocol",
            rule.protocol.map(|protocol| protocol.0.to_string()),
        ),
        (
            "not protocol",
            rule.not_protocol.map(|protocol| protocol.0.to_string()),
        ),
        (
            "icmp",
            rule.icmp
                .map(|icmp| format!("{:?} {:?}", icmp.kind, icmp.code)),
        ),
        (
            "not icmp",
            rule.not_icmp
                .map(|icmp| format!("{:?} {:?}", icmp.kind, icmp.code)),
        ),
        ("from", show_entity(&rule.source)),
        ("to", show_entity(&rule.destination)),
    ] {
        if let Some(value) = value {
            write!(text, "; {name} {value}").unwrap();
        }
    }
    text
}

fn show_entity(entity: &EntityMatch) -> Option<String> {
    let list = |nets: &[ipnet::IpNet]| {
        nets.iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let ports = |ports: &[Port]| {
        let shown = ports.iter().map(|port| match port {
            Port::Range(range) => format!("{}-{}", range.first, range.last),
            Port::Named(name) => name.clone(),
        });
        shown.collect::<Vec<_>>().join(" ")
    };
    let parts = [
        ("nets", list(&entity.nets)),
        ("not nets", list(&entity.not_nets)),
        (
            "selector",
            entity
                .selector
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        ),
        (
            "not selector",
            entity
                .not_selector
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        ),
        ("ports", ports(&entity.ports)),
        ("not ports", ports(&entity.not_ports)),
        (
            "nodes",
            entity
                .nodes
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        ),
        (
            "service",
            entity
                .service
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        ),
    ];
    let shown: Vec<String> = parts
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    (!shown.is_empty()).then(|| shown.join(", "))
}
