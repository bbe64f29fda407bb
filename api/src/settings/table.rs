//! The one description of every setting that nodes obey.
//!
//! A row of [`felix_settings`](crate::felix_settings) is a field of [`FelixSettings`], its default,
//! its override and its [`Setting`], which digest and text are made from; `margay-proto` makes the
//! wire from the same rows.

use super::{EndpointToHostAction, Failsafe, LogRate, SettingsScope};

/// Calls a macro with the rows of all settings: `GROUP { DOCS NAME: TYPE = DEFAULT; … } …`, where a
/// group is a variant of [`Digested`].
///
/// The order of rows is part of the digest: a new one is the last of `IfSet`, and none moves.
#[macro_export]
macro_rules! felix_settings {
    ($callback:ident) => {
        $callback! {
            Always {
                /// `defaultEndpointToHostAction`.
                endpoint_to_host: $crate::settings::EndpointToHostAction =
                    $crate::settings::EndpointToHostAction::Accept;
                /// `vxlanVNI`.
                vxlan_vni: u32 = 4096;
                /// `vxlanPort`.
                vxlan_port: u16 = 4789;
                /// `vxlanMTU`; 0: detected.
                vxlan_mtu: u32 = 0;
                /// `natOutgoingExclusions: IPPoolsAndHostIPs`: packets to nodes' own addresses are
                /// not masqueraded either.
                nat_exclude_hosts: bool = false;
                /// `disableConntrackInvalidCheck`.
                allow_conntrack_invalid: bool = false;
                /// `logPrefix`: template of the prefix of log lines of rules with action Log; see
                /// [`log_prefix`](crate::settings::log_prefix).
                log_prefix: String = "calico-packet".to_owned();
                /// `logActionRateLimit`: limit of the log lines of a rule with action Log; none: no
                /// limit.
                log_rate: Option<$crate::settings::LogRate> = None;
                /// `logActionRateLimitBurst`: burst of log lines that the rate limit allows, at
                /// least 1.
                log_burst: u16 = $crate::settings::LogRate::BURST;
                /// `ipv6Support`.
                ipv6: bool = true;
            }
            IfSet {
                /// `vxlanMTUV6`; 0: detected.
                vxlan_mtu_v6: u32 = 0;
                /// `ChecksumOffloadBroken=true` in `featureDetectOverride`: VXLAN devices leave no
                /// checksums to hardware.
                checksum_offload_broken: bool = false;
                /// `failsafeInboundHostPorts`, in order, each once.
                failsafe_inbound: Vec<$crate::settings::Failsafe> =
                    $crate::settings::Failsafe::default_inbound();
                /// `failsafeOutboundHostPorts`, in order, each once.
                failsafe_outbound: Vec<$crate::settings::Failsafe> =
                    $crate::settings::Failsafe::default_outbound();
                /// No field of FelixConfiguration but what the cluster's Namespaces say: none names
                /// pools for its pods, so nobody has to read a pod's Namespace to assign its
                /// address. False if it is not known, as from a server of an older version.
                no_namespace_names_pools: bool = false;
                /// `prometheusMetricsEnabled`: metrics are served at an address that Prometheus
                /// reaches.
                metrics_enabled: bool = false;
                /// `prometheusMetricsHost`: address to listen on; empty: all.
                metrics_host: String = String::new();
                /// `prometheusMetricsPort`.
                metrics_port: u16 = 9091;
                /// `ipipMTU`; 0: detected.
                ipip_mtu: u32 = 0;
            }
        }
    };
}

macro_rules! define {
    ($($group:ident { $($(#[$doc:meta])+ $name:ident: $kind:ty = $default:expr;)* })*) => {
        /// Settings of FelixConfiguration that Margay reads, with defaults filled in.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct FelixSettings {
            $($($(#[$doc])+ pub $name: $kind,)*)*
        }

        /// Fields that one FelixConfiguration sets. Unset fields come from one of lower precedence,
        /// or from the built-in default.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct FelixOverrides {
            /// Nodes that it applies to.
            pub scope: SettingsScope,
            $($(
                #[doc = concat!("See [`FelixSettings::", stringify!($name), "`].")]
                pub $name: Option<$kind>,
            )*)*
        }

        impl Default for FelixSettings {
            fn default() -> Self {
                Self { $($($name: $default,)*)* }
            }
        }

        impl FelixSettings {
            /// Every setting, in order of the table.
            pub fn fields(&self) -> Vec<Setting<'_>> {
                let default = Self::default();
                vec![$($(
                    Setting {
                        name: stringify!($name),
                        digested: Digested::$group,
                        is_default: self.$name == default.$name,
                        value: SettingValue::from(&self.$name),
                    },
                )*)*]
            }
        }

        impl FelixOverrides {
            /// Returns overrides that set nothing.
            pub fn none(scope: SettingsScope) -> Self {
                Self { scope, $($($name: None,)*)* }
            }

            /// Returns `base` with the fields that are set here replaced.
            pub fn over(&self, base: FelixSettings) -> FelixSettings {
                FelixSettings { $($($name: Option::clone(&self.$name).unwrap_or(base.$name),)*)* }
            }
        }
    };
}

felix_settings!(define);

/// A setting of a node, for whatever treats all of them alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting<'a> {
    /// Name of the field of [`FelixSettings`].
    pub name: &'static str,
    /// Presence in digests.
    pub digested: Digested,
    /// True when the value is the default.
    pub is_default: bool,
    /// The value.
    pub value: SettingValue<'a>,
}

/// Presence of a setting in digests, which agents and servers of other versions compute too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Digested {
    /// Its value, in the order of the table: every version knows it.
    Always,
    /// After these, its name and value if it differs from the default, so that settings which older
    /// versions support keep their digest.
    IfSet,
}

/// Value of a setting. Settings of one type are digested, printed and sent alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingValue<'a> {
    /// Number or port.
    Number(u64),
    /// Switch.
    Flag(bool),
    /// Text.
    Text(&'a str),
    /// Action on packets to the own node.
    ToHost(EndpointToHostAction),
    /// Rate limit; none: no limit.
    Rate(Option<LogRate>),
    /// Failsafe ports.
    Failsafes(&'a [Failsafe]),
}

impl From<&u32> for SettingValue<'_> {
    fn from(value: &u32) -> Self {
        Self::Number((*value).into())
    }
}

impl From<&u16> for SettingValue<'_> {
    fn from(value: &u16) -> Self {
        Self::Number((*value).into())
    }
}

impl From<&bool> for SettingValue<'_> {
    fn from(value: &bool) -> Self {
        Self::Flag(*value)
    }
}

impl<'a> From<&'a String> for SettingValue<'a> {
    fn from(value: &'a String) -> Self {
        Self::Text(value)
    }
}

impl From<&EndpointToHostAction> for SettingValue<'_> {
    fn from(value: &EndpointToHostAction) -> Self {
        Self::ToHost(*value)
    }
}

impl From<&Option<LogRate>> for SettingValue<'_> {
    fn from(value: &Option<LogRate>) -> Self {
        Self::Rate(*value)
    }
}

impl<'a> From<&'a Vec<Failsafe>> for SettingValue<'a> {
    fn from(value: &'a Vec<Failsafe>) -> Self {
        Self::Failsafes(value)
    }
}
