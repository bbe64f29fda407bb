//! Parses FelixConfigurations.

use std::net::IpAddr;

use crate::network::parse_net;
use crate::problem::{Problems, Refusal};
use crate::rule::Protocol;
use crate::settings::{
    DEFAULT_SETTINGS, EndpointToHostAction, Failsafe, FelixOverrides, LogRate, LogRateError,
    NODE_SETTINGS, SettingsScope,
};
use crate::v3::cluster::{FelixConfiguration, FelixConfigurationSpec, HostPortSpec};

use super::rule::port_protocol;

type Parsed = Result<FelixOverrides, Refusal<FelixOverrides>>;

/// Parses the fields that an object sets. While a value is invalid, the last valid version of the
/// object stays in force, because a default may open more than the value would; without such a
/// version an invalid value counts as unset, and an object that applies to no node as absent.
pub fn overrides(configuration: &FelixConfiguration) -> Parsed {
    let spec = &configuration.spec;
    let mut problems = Problems::default();
    let Some(scope) = scope(&mut problems, configuration) else {
        return Err(Refusal::without_replacement(problems).or_former(true));
    };
    let overrides = FelixOverrides {
        scope,
        endpoint_to_host: endpoint_to_host(&mut problems, spec),
        vxlan_vni: number(
            &mut problems,
            "spec.vxlanVNI",
            spec.vxlan_vni,
            1..=0xff_ffff,
        ),
        vxlan_port: number(&mut problems, "spec.vxlanPort", spec.vxlan_port, 1..=65535),
        vxlan_mtu: number(&mut problems, "spec.vxlanMTU", spec.vxlan_mtu, 0..=65535),
        vxlan_mtu_v6: number(
            &mut problems,
            "spec.vxlanMTUV6",
            spec.vxlan_mtu_v6,
            0..=65535,
        ),
        ipip_mtu: number(&mut problems, "spec.ipipMTU", spec.ipip_mtu, 0..=65535),
        checksum_offload_broken: checksum_offload_broken(&mut problems, spec),
        no_namespace_names_pools: None,
        nat_exclude_hosts: nat_exclude_hosts(&mut problems, spec),
        allow_conntrack_invalid: spec.disable_conntrack_invalid_check,
        log_prefix: spec.log_prefix.clone().filter(|prefix| !prefix.is_empty()),
        log_rate: log_rate(&mut problems, spec).map(Some),
        log_burst: log_burst(&mut problems, spec),
        ipv6: spec.ipv6_support,
        failsafe_inbound: failsafes(
            &mut problems,
            "spec.failsafeInboundHostPorts",
            spec.failsafe_inbound_host_ports.as_deref(),
        ),
        failsafe_outbound: failsafes(
            &mut problems,
            "spec.failsafeOutboundHostPorts",
            spec.failsafe_outbound_host_ports.as_deref(),
        ),
        metrics_enabled: spec.prometheus_metrics_enabled,
        metrics_host: metrics_host(&mut problems, spec),
        metrics_port: number(
            &mut problems,
            "spec.prometheusMetricsPort",
            spec.prometheus_metrics_port,
            1..=65535,
        ),
    };
    problems
        .finish(overrides, Some)
        .map_err(|refusal| refusal.or_former(true))
}

fn scope(problems: &mut Problems, configuration: &FelixConfiguration) -> Option<SettingsScope> {
    const FIELD: &str = "spec.nodeSelector";
    let name = configuration.metadata.name.as_deref().unwrap_or_default();
    let selector = configuration
        .spec
        .node_selector
        .as_deref()
        .filter(|selector| !selector.is_empty());
    let named = match name.strip_prefix(NODE_SETTINGS) {
        Some(node) => Some(SettingsScope::Node(node.to_owned())),
        None => (name == DEFAULT_SETTINGS).then_some(SettingsScope::Cluster),
    };
    match (named, selector) {
        (Some(_), Some(selector)) => {
            problems.add(
                FIELD,
                selector,
                "the names default and node.NAME already determine the nodes",
                "remove nodeSelector, or give the object another name",
            );
            None
        }
        (Some(scope), None) => Some(scope),
        (None, Some(selector)) => problems
            .selector(FIELD, selector)
            .map(SettingsScope::Selected),
        (None, None) => {
            problems.add(
                FIELD,
                "",
                format!("FelixConfiguration {name} applies to no node"),
                "give a nodeSelector, or name the object default or node.NAME",
            );
            None
        }
    }
}

fn endpoint_to_host(
    problems: &mut Problems,
    spec: &FelixConfigurationSpec,
) -> Option<EndpointToHostAction> {
    let value = spec.default_endpoint_to_host_action.as_deref()?;
    match value.to_ascii_lowercase().as_str() {
        "accept" => Some(EndpointToHostAction::Accept),
        "drop" => Some(EndpointToHostAction::Drop),
        "return" => Some(EndpointToHostAction::Return),
        _ => {
            problems.add(
                "spec.defaultEndpointToHostAction",
                value,
                "not an action",
                "use Accept, Drop or Return",
            );
            None
        }
    }
}

/// Address on which metrics are served; empty: all.
fn metrics_host(problems: &mut Problems, spec: &FelixConfigurationSpec) -> Option<String> {
    let host = spec.prometheus_metrics_host.as_deref()?;
    if host.is_empty() || host.parse::<IpAddr>().is_ok() {
        return Some(host.to_owned());
    }
    problems.add(
        "spec.prometheusMetricsHost",
        host,
        "not an IP address",
        "write an address of the node, or remove the field to listen on all of them",
    );
    None
}

/// Value of ChecksumOffloadBroken in the list of overridden features; `None`: to be detected, also
/// where the list has it without a value.
fn checksum_offload_broken(problems: &mut Problems, spec: &FelixConfigurationSpec) -> Option<bool> {
    let list = spec.feature_detect_override.as_deref()?;
    let mut found = None;
    for entry in list
        .split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
    {
        let (feature, value) = entry
            .split_once('=')
            .map_or((entry, None), |(feature, value)| (feature, Some(value)));
        let is_followed = feature.trim().eq_ignore_ascii_case("ChecksumOffloadBroken");
        match value
            .map(|value| value.trim().to_ascii_lowercase())
            .as_deref()
        {
            Some("true") if is_followed => found = Some(true),
            Some("false") if is_followed => found = Some(false),
            Some("" | "true" | "false") => {}
            _ => {
                let remedy = "write it like ChecksumOffloadBroken=true, with true or false, and \
                              commas between several";
                problems.add(
                    "spec.featureDetectOverride",
                    entry,
                    "not a feature with a value",
                    remedy,
                );
            }
        }
    }
    found
}

fn nat_exclude_hosts(problems: &mut Problems, spec: &FelixConfigurationSpec) -> Option<bool> {
    let value = spec.nat_outgoing_exclusions.as_deref()?;
    match value {
        "IPPoolsOnly" => Some(false),
        "IPPoolsAndHostIPs" => Some(true),
        _ => {
            problems.add(
                "spec.natOutgoingExclusions",
                value,
                "not a known value",
                "use IPPoolsOnly or IPPoolsAndHostIPs",
            );
            None
        }
    }
}

fn log_rate(problems: &mut Problems, spec: &FelixConfigurationSpec) -> Option<LogRate> {
    let value = spec
        .log_action_rate_limit
        .as_deref()
        .filter(|value| !value.is_empty())?;
    let rate: Result<LogRate, LogRateError> = value.parse();
    if rate.is_err() {
        let remedy =
            "write it like 10/second, with a number from 1 to 9999 and second, minute, hour or day";
        problems.add("spec.logActionRateLimit", value, "not a rate", remedy);
    }
    rate.ok()
}

/// A burst of 0 would allow no lines at all. The kernel replaces 0 by its default
/// (net/netfilter/nft_limit.c), so 0 is replaced here, too.
fn log_burst(problems: &mut Problems, spec: &FelixConfigurationSpec) -> Option<u16> {
    let burst = number(
        problems,
        "spec.logActionRateLimitBurst",
        spec.log_action_rate_limit_burst,
        0..=9999,
    )?;
    Some(if burst == 0 { LogRate::BURST } else { burst })
}

/// With an invalid entry the list counts as unset: without that entry it could lock somebody out,
/// or allow nothing at all.
fn failsafes(
    problems: &mut Problems,
    field: &str,
    ports: Option<&[HostPortSpec]>,
) -> Option<Vec<Failsafe>> {
    let entries = ports?.iter().enumerate();
    let entries: Vec<_> = entries
        .map(|(index, port)| failsafe(problems, &format!("{field}[{index}]"), port))
        .collect();
    let mut failsafes = entries.into_iter().collect::<Option<Vec<Failsafe>>>()?;
    failsafes.sort_unstable();
    failsafes.dedup();
    Some(failsafes)
}

fn failsafe(problems: &mut Problems, at: &str, entry: &HostPortSpec) -> Option<Failsafe> {
    let protocol = match entry.protocol.as_deref().unwrap_or_default() {
        "" => Some(Protocol::TCP),
        name => port_protocol(problems, format!("{at}.protocol"), name),
    };
    let port = number(problems, &format!("{at}.port"), Some(entry.port), 1..=65535);
    let net = match entry.net.as_deref().filter(|net| !net.is_empty()) {
        None => Some(None),
        Some(text) => {
            let net = parse_net(text);
            if net.is_none() {
                let remedy = "write it like 10.0.0.0/8, 10.1.2.3, fd00::/8 or fd00::1";
                problems.add(format!("{at}.net"), text, "not an address or range", remedy);
            }
            net.map(Some)
        }
    };
    Some(Failsafe {
        protocol: protocol?,
        port: port?,
        net: net?,
    })
}

fn number<T: TryFrom<i64>>(
    problems: &mut Problems,
    field: &str,
    value: Option<i64>,
    range: std::ops::RangeInclusive<i64>,
) -> Option<T> {
    let value = value?;
    let number = T::try_from(value).ok().filter(|_| range.contains(&value));
    if number.is_none() {
        let rule = format!("not from {} to {}", range.start(), range.end());
        problems.add(
            field,
            value,
            rule,
            "use a number in that range, or remove the field",
        );
    }
    number
}
