//! Parses the settings of automatic host endpoints and of leaked addresses.

use std::time::Duration;

use super::reserved;
use crate::hosts::{AutoHostEndpoints, InterfacePattern, Template};
use crate::network::parse_net;
use crate::problem::{Problem, Problems, Refusal};
use crate::selector::Selector;
use crate::v3::controllers::{HostEndpointTemplateSpec, KubeControllersConfiguration};

type Parsed = Result<AutoHostEndpoints, Refusal<AutoHostEndpoints>>;

const AT: &str = "spec.controllers.node.hostEndpoint";

/// Parses the settings of automatic host endpoints. A refusal has no replacement: existing host
/// endpoints stay as they are.
pub fn host_endpoints(configuration: &KubeControllersConfiguration) -> Parsed {
    let node = configuration
        .spec
        .controllers
        .as_ref()
        .and_then(|controllers| controllers.node.as_ref());
    let Some(spec) = node.and_then(|node| node.host_endpoint.as_ref()) else {
        return Ok(AutoHostEndpoints::default());
    };
    let mut problems = Problems::default();
    let is_on = switch(&mut problems, "autoCreate", &spec.auto_create, false);
    let default = switch(
        &mut problems,
        "createDefaultHostEndpoint",
        &spec.create_default_host_endpoint,
        true,
    );
    let mut templates: Vec<Template> = Vec::with_capacity(spec.templates.len());
    for (index, written) in spec.templates.iter().enumerate() {
        let at = format!("{AT}.templates[{index}]");
        if templates
            .iter()
            .any(|other| other.name == written.generate_name)
        {
            let rule = "another template creates host endpoints of the same names";
            problems.add(
                format!("{at}.generateName"),
                &written.generate_name,
                rule,
                "give each template a different one",
            );
        }
        templates.extend(template(&mut problems, &at, written));
    }
    let wanted = if is_on {
        AutoHostEndpoints { default, templates }
    } else {
        AutoHostEndpoints::default()
    };
    problems.finish(wanted, |_| None)
}

/// Parses the time without a pod after which an address is released: none if unset, zero if
/// disabled.
pub fn leak_grace(
    configuration: &KubeControllersConfiguration,
) -> Result<Option<Duration>, Problem> {
    let node = configuration
        .spec
        .controllers
        .as_ref()
        .and_then(|controllers| controllers.node.as_ref());
    let Some(text) = node
        .and_then(|node| node.leak_grace_period.as_deref())
        .filter(|text| !text.is_empty())
    else {
        return Ok(None);
    };
    duration(text).map(Some).ok_or_else(|| {
        let rule = "not a duration that is not negative";
        Problem::new(
            "spec.controllers.node.leakGracePeriod",
            text,
            rule,
            "write it like 15m or 1h30m; 0s turns it off",
        )
    })
}

/// Units of a duration (Go's time.ParseDuration), longer names first, with their length in
/// nanoseconds.
const UNITS: [(&str, f64); 7] = [
    ("ns", 1.0),
    ("us", 1e3),
    ("µs", 1e3),
    ("ms", 1e6),
    ("s", 1e9),
    ("m", 60e9),
    ("h", 3600e9),
];

/// Parses a duration as Go writes it: numbers with units, or 0.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let text = text.strip_prefix('+').unwrap_or(text);
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut sum) = (text, 0.0);
    while !rest.is_empty() || text.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let (unit, length) = UNITS.iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        sum += number * length;
    }
    Duration::try_from_secs_f64(sum / 1e9).ok()
}

fn switch(problems: &mut Problems, field: &str, value: &Option<String>, otherwise: bool) -> bool {
    match value.as_deref().unwrap_or_default() {
        "" => otherwise,
        "Enabled" => true,
        "Disabled" => false,
        other => {
            problems.add(
                format!("{AT}.{field}"),
                other,
                "neither Enabled nor Disabled",
                "use Enabled or Disabled",
            );
            otherwise
        }
    }
}

fn template(
    problems: &mut Problems,
    at: &str,
    written: &HostEndpointTemplateSpec,
) -> Option<Template> {
    let name = &written.generate_name;
    let ends_well = !name.is_empty() && !name.starts_with('-') && !name.ends_with('-');
    if !ends_well
        || !name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    {
        let rule = "must have lower case letters, digits and '-', and not begin or end with '-'";
        problems.add(
            format!("{at}.generateName"),
            name,
            rule,
            "rename the template",
        );
    }
    let pattern = written
        .interface_pattern
        .as_deref()
        .filter(|pattern| !pattern.is_empty());
    let interfaces = pattern.and_then(|pattern| {
        let refused = |error| {
            let rule = format!("not a regular expression: {error}");
            problems.add(
                format!("{at}.interfacePattern"),
                pattern,
                rule,
                "write it like ^eth or eth0|eth1",
            );
        };
        InterfacePattern::parse(pattern).map_err(refused).ok()
    });
    let mut nets = Vec::with_capacity(written.interface_cidrs.len());
    for (index, cidr) in written.interface_cidrs.iter().enumerate() {
        match parse_net(cidr) {
            Some(net) => nets.push(net),
            None => {
                let remedy = "write it like 10.0.0.0/8 or fd00::/8";
                problems.add(
                    format!("{at}.interfaceCIDRs[{index}]"),
                    cidr,
                    "not an address range",
                    remedy,
                );
            }
        }
    }
    let labels = reserved::without(problems, &format!("{at}.labels"), &written.labels, &[]);
    let nodes = match written.node_selector.as_deref().unwrap_or_default() {
        "" => Some(Selector::all()),
        text => problems.selector(&format!("{at}.nodeSelector"), text),
    };
    Some(Template {
        name: name.clone(),
        nets,
        interfaces,
        labels,
        annotations: written.annotations.clone(),
        nodes: nodes?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_grace_is_a_duration_as_kubernetes_writes_it() {
        let grace = |text: &str| {
            let spec = json!({"controllers": {"node": {"leakGracePeriod": text}}});
            leak_grace(&KubeControllersConfiguration::new(
                "default",
                serde_json::from_value(spec).unwrap(),
            ))
        };
        for (text, seconds) in [
            ("15m", 900.0),
            ("1h30m", 5400.0),
            ("0", 0.0),
            ("0s", 0.0),
            ("1.5s", 1.5),
            ("20ms", 0.02),
        ] {
            assert_eq!(
                grace(text),
                Ok(Some(Duration::from_secs_f64(seconds))),
                "{text}"
            );
        }
        assert_eq!(grace(""), Ok(None));
        for text in ["15", "m", "-5m", "5 m", "5d", "1h x"] {
            let problem = grace(text).expect_err(text).to_string();
            assert!(
                problem.starts_with("spec.controllers.node.leakGracePeriod: "),
                "{problem}"
            );
        }
    }
}
