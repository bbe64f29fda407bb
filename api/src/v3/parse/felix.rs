//! Settings of the data plane.

use crate::network::{EndpointToHostAction, FelixSettings};
use crate::problem::{Problems, Refusal};
use crate::v3::cluster::{FelixConfiguration, FelixConfigurationSpec};

type Parsed = Result<FelixSettings, Refusal<FelixSettings>>;

/// Settings of an object alone, over the built-in defaults. A bad value counts as not given, and is reported.
pub fn settings(configuration: &FelixConfiguration) -> Parsed {
    settings_over(&FelixSettings::default(), configuration)
}

/// Settings of an object over those of a weaker one: `node.NAME` over `default`.
pub fn settings_over(base: &FelixSettings, configuration: &FelixConfiguration) -> Parsed {
    let spec = &configuration.spec;
    let mut problems = Problems::default();
    let settings = FelixSettings {
        endpoint_to_host: endpoint_to_host(&mut problems, spec).unwrap_or(base.endpoint_to_host),
        vxlan_vni: number(&mut problems, "spec.vxlanVNI", spec.vxlan_vni, 1..=0xff_ffff).unwrap_or(base.vxlan_vni),
        vxlan_port: number(&mut problems, "spec.vxlanPort", spec.vxlan_port, 1..=65535).unwrap_or(base.vxlan_port),
        vxlan_mtu: number(&mut problems, "spec.vxlanMTU", spec.vxlan_mtu, 0..=65535).unwrap_or(base.vxlan_mtu),
        vxlan_mtu_v6: number(&mut problems, "spec.vxlanMTUV6", spec.vxlan_mtu_v6, 0..=65535)
            .unwrap_or(base.vxlan_mtu_v6),
        nat_exclude_hosts: nat_exclude_hosts(&mut problems, spec).unwrap_or(base.nat_exclude_hosts),
        allow_conntrack_invalid: spec.disable_conntrack_invalid_check.unwrap_or(base.allow_conntrack_invalid),
        log_prefix: spec.log_prefix.clone().unwrap_or_else(|| base.log_prefix.clone()),
        ipv6: spec.ipv6_support.unwrap_or(base.ipv6),
    };
    problems.finish(settings, Some)
}

fn endpoint_to_host(problems: &mut Problems, spec: &FelixConfigurationSpec) -> Option<EndpointToHostAction> {
    let value = spec.default_endpoint_to_host_action.as_deref()?;
    match value.to_ascii_lowercase().as_str() {
        "accept" => Some(EndpointToHostAction::Accept),
        "drop" => Some(EndpointToHostAction::Drop),
        "return" => Some(EndpointToHostAction::Return),
        _ => {
            problems.add("spec.defaultEndpointToHostAction", value, "not an action", "use Accept, Drop or Return");
            None
        }
    }
}

fn nat_exclude_hosts(problems: &mut Problems, spec: &FelixConfigurationSpec) -> Option<bool> {
    let value = spec.nat_outgoing_exclusions.as_deref()?;
    match value {
        "IPPoolsOnly" => Some(false),
        "IPPoolsAndHostIPs" => Some(true),
        _ => {
            problems.add("spec.natOutgoingExclusions", value, "not known", "use IPPoolsOnly or IPPoolsAndHostIPs");
            None
        }
    }
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
        problems.add(field, value, rule, "use a number of that range, or leave the field out");
    }
    number
}
