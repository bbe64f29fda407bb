//! Settings and bookkeeping of the whole cluster.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use super::parse::felix::overrides;

/// Settings of the data plane: `default` for all nodes, `node.NAME` for one, any other name for those of its nodeSelector. Where several say
/// something, that of the node counts, then those by selector (the first by name), then `default`. Fields that nothing here reads are kept.
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
    /// What happens to packets from a workload to its own node after policy: Accept (the default), Drop or Return.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_endpoint_to_host_action: Option<String>,
    /// VXLAN network identifier, 4096 by default.
    #[serde(default, rename = "vxlanVNI", skip_serializing_if = "Option::is_none")]
    pub vxlan_vni: Option<i64>,
    /// VXLAN UDP port, 4789 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vxlan_port: Option<i64>,
    /// MTU of the VXLAN device in bytes; 0, the default, takes it from the node's own interface.
    #[serde(default, rename = "vxlanMTU", skip_serializing_if = "Option::is_none")]
    pub vxlan_mtu: Option<i64>,
    /// MTU of the VXLAN device for IPv6 in bytes; 0, the default, takes it from the node's own interface.
    #[serde(default, rename = "vxlanMTUV6", skip_serializing_if = "Option::is_none")]
    pub vxlan_mtu_v6: Option<i64>,
    /// Features that are taken to be there or not, whatever the agent finds, as NAME=true or NAME=false parted by commas. Of them ChecksumOffloadBroken is
    /// followed: with true, VXLAN devices leave no checksums to hardware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_detect_override: Option<String>,
    /// IPPoolsOnly (the default) or IPPoolsAndHostIPs: what outgoing NAT leaves alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat_outgoing_exclusions: Option<String>,
    /// Let packets pass that connection tracking calls invalid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disable_conntrack_invalid_check: Option<bool>,
    /// What log lines of rules with action Log begin with. %t stands for the tier, %k for the short kind, %n for the name of the policy,
    /// %p for namespace/name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_prefix: Option<String>,
    /// How often a rule with action Log reports at most, like 10/second or 100/hour; always by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = "^[1-9][0-9]{0,3}/(second|minute|hour|day)$"))]
    pub log_action_rate_limit: Option<String>,
    /// Reports that may come at once under logActionRateLimit, 5 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 9999))]
    pub log_action_rate_limit_burst: Option<i64>,
    /// Nodes that the settings are for, by their labels. Not for the names default and node.NAME.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub node_selector: Option<String>,
    /// Whether IPv6 is programmed; true by default.
    #[serde(default, rename = "ipv6Support", skip_serializing_if = "Option::is_none")]
    pub ipv6_support: Option<bool>,
    /// What a host with host endpoints can be reached by whatever policies say; an empty list is nothing. By default TCP 22, 179, 2379, 2380,
    /// 5473, 6443, 6666 and 6667, and UDP 68.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failsafe_inbound_host_ports: Option<Vec<HostPortSpec>>,
    /// What a host with host endpoints can reach whatever policies say; an empty list is nothing. By default TCP 179, 2379, 2380, 5473, 6443,
    /// 6666 and 6667, and UDP 53 and 67.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failsafe_outbound_host_ports: Option<Vec<HostPortSpec>>,
}

/// A port of hosts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HostPortSpec {
    /// TCP (the default), UDP, SCTP or UDPLite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// The port that packets go to.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i64,
    /// Only with the other side in this range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<String>,
}

/// What is known about the cluster; the object `default`, written by the system.
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
    /// Identity of the cluster, random and kept.
    #[serde(default, rename = "clusterGUID", skip_serializing_if = "Option::is_none")]
    pub cluster_guid: Option<String>,
    /// How the cluster came about, as words between commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_type: Option<String>,
    /// Version that wrote the data last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calico_version: Option<String>,
    /// False: nobody may write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datastore_ready: Option<bool>,
    /// Product variant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}
