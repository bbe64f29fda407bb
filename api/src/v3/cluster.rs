//! FelixConfiguration and ClusterInformation: settings and identity of the whole cluster.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of the dataplane: `default` for all nodes, `node.NAME` for a single node, any other
/// name for the nodes of its nodeSelector. For each field, the object of the node takes precedence,
/// then those with a selector (the first by name), then `default`. Fields that Margay does not read
/// are preserved.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "FelixConfiguration",
    plural = "felixconfigurations",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct FelixConfigurationSpec {
    /// Action on packets from a workload to its own node after policy: Accept (the default), Drop
    /// or Return.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_endpoint_to_host_action: Option<String>,
    /// VXLAN network identifier. Default 4096.
    #[serde(default, rename = "vxlanVNI", skip_serializing_if = "Option::is_none")]
    pub vxlan_vni: Option<i64>,
    /// UDP port of VXLAN. Default 4789.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vxlan_port: Option<i64>,
    /// MTU of the VXLAN device in bytes; 0 (the default): derived from the node's interface.
    #[serde(default, rename = "vxlanMTU", skip_serializing_if = "Option::is_none")]
    pub vxlan_mtu: Option<i64>,
    /// MTU of the VXLAN device for IPv6 in bytes; 0 (the default): derived from the node's
    /// interface.
    #[serde(
        default,
        rename = "vxlanMTUV6",
        skip_serializing_if = "Option::is_none"
    )]
    pub vxlan_mtu_v6: Option<i64>,
    /// MTU of the IPIP device in bytes; 0 (the default): derived from the node's interface.
    #[serde(default, rename = "ipipMTU", skip_serializing_if = "Option::is_none")]
    pub ipip_mtu: Option<i64>,
    /// Features considered present or absent regardless of detection, as NAME=true or NAME=false
    /// separated by commas. Only ChecksumOffloadBroken is applied: with true, VXLAN devices leave
    /// no checksums to hardware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_detect_override: Option<String>,
    /// Destinations that outgoing NAT excludes: IPPoolsOnly (the default) or IPPoolsAndHostIPs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat_outgoing_exclusions: Option<String>,
    /// Accept packets that connection tracking considers invalid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disable_conntrack_invalid_check: Option<bool>,
    /// Prefix of log lines of rules with action Log. %t is replaced by the tier, %k by the short
    /// name of the policy's kind, %n by its name, %p by namespace/name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_prefix: Option<String>,
    /// Limit of the log lines of a rule with action Log, such as 10/second or 100/hour. Default: no
    /// limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = "^[1-9][0-9]{0,3}/(second|minute|hour|day)$"))]
    pub log_action_rate_limit: Option<String>,
    /// Burst of log lines that logActionRateLimit allows. Default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 9999))]
    pub log_action_rate_limit_burst: Option<i64>,
    /// Serve metrics at an address that Prometheus reaches, over plain HTTP. Default false; on the
    /// loopback of the node they are always served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prometheus_metrics_enabled: Option<bool>,
    /// IP address to serve metrics on. Default: all addresses of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prometheus_metrics_host: Option<String>,
    /// TCP port of metrics. Default 9091.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prometheus_metrics_port: Option<i64>,
    /// Nodes that the settings apply to, by their labels. Not for the names default and node.NAME.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub node_selector: Option<String>,
    /// Enables IPv6. Default true.
    #[serde(
        default,
        rename = "ipv6Support",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv6_support: Option<bool>,
    /// Ports on which hosts with host endpoints can be reached regardless of policy; an empty list
    /// allows none. Default: TCP 22, 179, 2379, 2380, 5473, 6443, 6666 and 6667, and UDP 68.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failsafe_inbound_host_ports: Option<Vec<HostPortSpec>>,
    /// Ports that hosts with host endpoints can reach regardless of policy; an empty list allows
    /// none. Default: TCP 179, 2379, 2380, 5473, 6443, 6666 and 6667, and UDP 53 and 67.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failsafe_outbound_host_ports: Option<Vec<HostPortSpec>>,
}

/// Failsafe port of hosts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HostPortSpec {
    /// Protocol: TCP (the default), UDP, SCTP or UDPLite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Destination port.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i64,
    /// Range of the other end of the connection. Default: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<String>,
}

/// Facts about the cluster; the object `default`, written by the system.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "ClusterInformation",
    plural = "clusterinformations",
    shortname = "clusterinfo",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct ClusterInformationSpec {
    /// Identity of the cluster: random, never changed.
    #[serde(
        default,
        rename = "clusterGUID",
        skip_serializing_if = "Option::is_none"
    )]
    pub cluster_guid: Option<String>,
    /// Origins of the cluster, as a comma-separated list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_type: Option<String>,
    /// Version of Calico that last wrote the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calico_version: Option<String>,
    /// False: the datastore is locked and must not be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datastore_ready: Option<bool>,
    /// Product variant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}
