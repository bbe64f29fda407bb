//! Effective settings of a node: FelixConfigurations, their precedence, and the formats of their
//! values. The settings themselves are the rows of [`felix_settings`](crate::felix_settings).

mod table;

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;

use crate::meta::Labels;
use crate::policy::PolicyKey;
use crate::rule::Protocol;
use crate::selector::Selector;

pub use table::{Digested, FelixOverrides, FelixSettings, Setting, SettingValue};

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

impl FelixOverrides {
    /// Returns true when it applies to the node of this name and these labels; none: labels not
    /// known yet.
    pub fn is_for(&self, node: &str, labels: Option<&Labels>) -> bool {
        match &self.scope {
            SettingsScope::Cluster => true,
            SettingsScope::Selected(selector) => {
                labels.is_some_and(|labels| selector.matches(labels))
            }
            SettingsScope::Node(name) => name == node,
        }
    }
}

/// Action on packets from a workload to its own node that its egress policy has allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointToHostAction {
    /// Drop: Felix's own default.
    Drop,
    /// Accept: the value that Calico's operator and manifests set.
    Accept,
    /// Continue with the host's own rules.
    Return,
}

/// Failsafe port: traffic of a host that no policy can block, so that a mistake in one locks nobody
/// out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Failsafe {
    /// Protocol of the packet, which must have ports.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
    /// Range of the other end of the connection; none: any.
    pub net: Option<IpNet>,
}

impl Failsafe {
    /// Default inbound failsafes (Calico's FelixConfiguration): SSH, DHCP, BGP, etcd, typha and the
    /// API server.
    pub fn default_inbound() -> Vec<Self> {
        let tcp = [22, 179, 2379, 2380, 5473, 6443, 6666, 6667];
        Self::anywhere(&tcp, &[68])
    }

    /// Default outbound failsafes (Calico's FelixConfiguration): DNS, DHCP, BGP, etcd, typha and
    /// the API server.
    pub fn default_outbound() -> Vec<Self> {
        let tcp = [179, 2379, 2380, 5473, 6443, 6666, 6667];
        Self::anywhere(&tcp, &[53, 67])
    }

    /// Returns them in order, as lists of failsafes are.
    fn anywhere(tcp: &[u16], udp: &[u16]) -> Vec<Self> {
        let of = |protocol, ports: &[u16]| -> Vec<Self> {
            ports
                .iter()
                .map(|port| Self {
                    protocol,
                    port: *port,
                    net: None,
                })
                .collect()
        };
        [of(Protocol::TCP, tcp), of(Protocol::UDP, udp)].concat()
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
#[error(
    "{0:?} is not a rate; write it like 10/second, with a number from 1 to 9999 and second, \
     minute, hour or day"
)]
pub struct LogRateError(String);

impl FromStr for LogRate {
    type Err = LogRateError;

    fn from_str(text: &str) -> Result<Self, LogRateError> {
        let parse = || {
            let (count, unit) = text.split_once('/')?;
            let is_plain = count.len() <= 4 && count.bytes().all(|byte| byte.is_ascii_digit());
            let count = is_plain
                .then(|| count.parse().ok())
                .flatten()
                .filter(|count| *count > 0)?;
            let unit = TimeUnit::ALL
                .into_iter()
                .find(|known| known.as_str() == unit)?;
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
