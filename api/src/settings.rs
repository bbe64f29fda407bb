//! Effective settings of a node: FelixConfigurations, their precedence, and the formats of their
//! values.

use std::fmt;
use std::str::FromStr;

use crate::meta::Labels;
use crate::network::{EndpointToHostAction, Failsafe, FelixSettings};
use crate::policy::PolicyKey;
use crate::selector::Selector;

/// Name of the FelixConfiguration for all nodes.
pub const DEFAULT_SETTINGS: &str = "default";
/// Prefix of the name of the FelixConfiguration of a single node.
pub const NODE_SETTINGS: &str = "node.";

/// Nodes that a FelixConfiguration applies to, in ascending order of precedence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SettingsScope {
    /// All nodes.
    Cluster,
    /// Nodes whose labels match.
    Selected(Selector),
    /// The node of this name.
    Node(String),
}

/// Fields that one FelixConfiguration sets. Unset fields come from one of lower precedence, or from
/// the built-in default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FelixOverrides {
    /// Nodes that it applies to.
    pub scope: SettingsScope,
    /// See [`FelixSettings::endpoint_to_host`].
    pub endpoint_to_host: Option<EndpointToHostAction>,
    /// See [`FelixSettings::vxlan_vni`].
    pub vxlan_vni: Option<u32>,
    /// See [`FelixSettings::vxlan_port`].
    pub vxlan_port: Option<u16>,
    /// See [`FelixSettings::vxlan_mtu`].
    pub vxlan_mtu: Option<u32>,
    /// See [`FelixSettings::vxlan_mtu_v6`].
    pub vxlan_mtu_v6: Option<u32>,
    /// See [`FelixSettings::checksum_offload_broken`].
    pub checksum_offload_broken: Option<bool>,
    /// See [`FelixSettings::nat_exclude_hosts`].
    pub nat_exclude_hosts: Option<bool>,
    /// See [`FelixSettings::allow_conntrack_invalid`].
    pub allow_conntrack_invalid: Option<bool>,
    /// See [`FelixSettings::log_prefix`].
    pub log_prefix: Option<String>,
    /// See [`FelixSettings::log_rate`].
    pub log_rate: Option<LogRate>,
    /// See [`FelixSettings::log_burst`].
    pub log_burst: Option<u16>,
    /// See [`FelixSettings::ipv6`].
    pub ipv6: Option<bool>,
    /// See [`FelixSettings::failsafe_inbound`]; an empty list means none.
    pub failsafe_inbound: Option<Box<[Failsafe]>>,
    /// See [`FelixSettings::failsafe_outbound`]; an empty list means none.
    pub failsafe_outbound: Option<Box<[Failsafe]>>,
}

impl FelixOverrides {
    /// Returns overrides that set nothing.
    pub fn none(scope: SettingsScope) -> Self {
        Self {
            scope,
            endpoint_to_host: None,
            vxlan_vni: None,
            vxlan_port: None,
            vxlan_mtu: None,
            vxlan_mtu_v6: None,
            checksum_offload_broken: None,
            nat_exclude_hosts: None,
            allow_conntrack_invalid: None,
            log_prefix: None,
            log_rate: None,
            log_burst: None,
            ipv6: None,
            failsafe_inbound: None,
            failsafe_outbound: None,
        }
    }

    /// Returns `base` with the fields that are set here replaced.
    pub fn over(&self, base: FelixSettings) -> FelixSettings {
        FelixSettings {
            endpoint_to_host: self.endpoint_to_host.unwrap_or(base.endpoint_to_host),
            vxlan_vni: self.vxlan_vni.unwrap_or(base.vxlan_vni),
            vxlan_port: self.vxlan_port.unwrap_or(base.vxlan_port),
            vxlan_mtu: self.vxlan_mtu.unwrap_or(base.vxlan_mtu),
            vxlan_mtu_v6: self.vxlan_mtu_v6.unwrap_or(base.vxlan_mtu_v6),
            checksum_offload_broken: self.checksum_offload_broken.unwrap_or(base.checksum_offload_broken),
            nat_exclude_hosts: self.nat_exclude_hosts.unwrap_or(base.nat_exclude_hosts),
            allow_conntrack_invalid: self.allow_conntrack_invalid.unwrap_or(base.allow_conntrack_invalid),
            log_prefix: self.log_prefix.clone().unwrap_or(base.log_prefix),
            log_rate: self.log_rate.or(base.log_rate),
            log_burst: self.log_burst.unwrap_or(base.log_burst),
            ipv6: self.ipv6.unwrap_or(base.ipv6),
            failsafe_inbound: self.failsafe_inbound.as_ref().map_or(base.failsafe_inbound, |ports| ports.to_vec()),
            failsafe_outbound: self.failsafe_outbound.as_ref().map_or(base.failsafe_outbound, |ports| ports.to_vec()),
        }
    }

    /// Returns true when it applies to the node of this name and these labels; none: labels not
    /// known yet.
    pub fn is_for(&self, node: &str, labels: Option<&Labels>) -> bool {
        match &self.scope {
            SettingsScope::Cluster => true,
            SettingsScope::Selected(selector) => labels.is_some_and(|labels| selector.matches(labels)),
            SettingsScope::Node(name) => name == node,
        }
    }
}

/// Rate limit of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogRate {
    /// Number of lines per unit, 1 to 9999.
    pub count: u16,
    /// Unit of time.
    pub unit: TimeUnit,
}

impl LogRate {
    /// Default burst (Calico's `logActionRateLimitBurst`).
    pub const BURST: u16 = 5;
}

/// Unit of time of a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TimeUnit {
    /// One second.
    Second,
    /// One minute.
    Minute,
    /// One hour.
    Hour,
    /// One day.
    Day,
}

impl TimeUnit {
    /// Every unit, the shortest first.
    pub const ALL: [Self; 4] = [Self::Second, Self::Minute, Self::Hour, Self::Day];

    /// Name in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Second => "second",
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }
}

/// A text that is not a rate limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a rate; write it like 10/second, with a number from 1 to 9999 and second, minute, hour or day")]
pub struct LogRateError(String);

impl FromStr for LogRate {
    type Err = LogRateError;

    fn from_str(text: &str) -> Result<Self, LogRateError> {
        let parse = || {
            let (count, unit) = text.split_once('/')?;
            let is_plain = count.len() <= 4 && count.bytes().all(|byte| byte.is_ascii_digit());
            let count = is_plain.then(|| count.parse().ok()).flatten().filter(|count| *count > 0)?;
            let unit = TimeUnit::ALL.into_iter().find(|known| known.as_str() == unit)?;
            Some(Self { count, unit })
        };
        parse().ok_or_else(|| LogRateError(text.to_owned()))
    }
}

impl fmt::Display for LogRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.count, self.unit.as_str())
    }
}

/// Returns the prefix of log lines of rules with action Log, without the `: ` that ends it: the
/// template with `%t` replaced by the tier, `%k` by the short name of the policy's kind, `%n` by
/// its name, and `%p` by `namespace/name`, or the name of a cluster-scoped policy. Other text is
/// kept.
pub fn log_prefix(template: &str, tier: &str, policy: &PolicyKey) -> String {
    let mut text = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find('%') {
        text += &rest[..at];
        let mut after = rest[at + 1..].chars();
        match after.next() {
            Some('t') => text += tier,
            Some('k') => text += policy.kind.short_name(),
            Some('n') => text += &policy.name,
            Some('p') if policy.namespace.is_empty() => text += &policy.name,
            Some('p') => text += &format!("{}/{}", policy.namespace, policy.name),
            _ => {
                text.push('%');
                after = rest[at + 1..].chars();
            }
        }
        rest = after.as_str();
    }
    text + rest
}
