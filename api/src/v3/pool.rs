//! IP pools as users write them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::limits;

/// Range from which addresses of pods and tunnels are assigned, and the encapsulation of their
/// packets.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "IPPool",
    plural = "ippools",
    derive = "PartialEq",
    status = "IPPoolStatus",
    printcolumn = r#"{"name":"CIDR","type":"string","jsonPath":".spec.cidr"}"#,
    printcolumn = r#"{"name":"VXLAN","type":"string","jsonPath":".spec.vxlanMode"}"#,
    printcolumn = r#"{"name":"NAT","type":"boolean","jsonPath":".spec.natOutgoing"}"#,
    printcolumn = r#"{"name":"Disabled","type":"boolean","jsonPath":".spec.disabled"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::pool_rules()))]
pub struct IPPoolSpec {
    /// Range of the pool.
    #[schemars(length(max = 48), extend("format" = "cidr"))]
    pub cidr: String,
    /// Prefix length of blocks: 20 to 32 for IPv4 (default 26), 116 to 128 for IPv6 (default 122).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 128))]
    pub block_size: Option<i32>,
    /// Never (the default). Other modes are preserved and reported: Margay has no IPIP, and packets
    /// of such a pool reach no other node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::encapsulation_mode")]
    pub ipip_mode: Option<String>,
    /// VXLAN encapsulation: Never (the default), Always, or CrossSubnet for packets to nodes of
    /// other subnets only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::encapsulation_mode")]
    pub vxlan_mode: Option<String>,
    /// Masquerade packets to addresses outside of all pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat_outgoing: Option<bool>,
    /// Assign no new addresses from the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
    /// True keeps BGP from announcing the pool's routes. Default false.
    #[serde(
        default,
        rename = "disableBGPExport",
        skip_serializing_if = "Option::is_none"
    )]
    pub disable_bgp_export: Option<bool>,
    /// Nodes that may assign addresses from the pool. Default all().
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub node_selector: Option<String>,
    /// Namespaces whose pods may get addresses from the pool. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub namespace_selector: Option<String>,
    /// Uses of the addresses. Default: Workload and Tunnel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::allowed_uses")]
    pub allowed_uses: Option<Vec<String>>,
    /// Automatic (the default), or Manual for addresses that are assigned only by request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Automatic", "Manual"]))]
    pub assignment_mode: Option<String>,
}

/// Observed state of a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IPPoolStatus {
    /// Conditions: `Allocatable`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
