//! Kinds of BGP: BGPConfiguration, BGPPeer and BGPFilter, as users write them.

use k8s_openapi::api::core::v1::SecretKeySelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::limits;

/// Settings of BGP: `default` for all nodes, `node.NAME` for a single node, whose object has a few
/// fields of its own.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "BGPConfiguration",
    plural = "bgpconfigurations",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::bgp_configuration_rules()))]
pub struct BGPConfigurationSpec {
    /// Level of log lines: Info by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_severity_screen: Option<String>,
    /// Peer every node with every other one. Default true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_to_node_mesh_enabled: Option<bool>,
    /// AS number of nodes that have none of their own. Default 64512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::as_number")]
    pub as_number: Option<AsNumber>,
    /// Port on which nodes take connections. Default 179.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub listen_port: Option<i32>,
    /// None (the default): listen on every address. NodeIP: on the node's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["None", "NodeIP"]))]
    pub bind_mode: Option<String>,
    /// Interfaces whose routes are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::interface_names")]
    pub ignored_interfaces: Option<Vec<String>>,
    /// Ranges of cluster IPs that are announced.
    #[serde(
        default,
        rename = "serviceClusterIPs",
        skip_serializing_if = "Option::is_none"
    )]
    pub service_cluster_ips: Option<Vec<CidrBlock>>,
    /// Ranges of external IPs of Services that are announced.
    #[serde(
        default,
        rename = "serviceExternalIPs",
        skip_serializing_if = "Option::is_none"
    )]
    pub service_external_ips: Option<Vec<CidrBlock>>,
    /// Ranges of load balancer IPs of Services that are announced.
    #[serde(
        default,
        rename = "serviceLoadBalancerIPs",
        skip_serializing_if = "Option::is_none"
    )]
    pub service_load_balancer_ips: Option<Vec<CidrBlock>>,
    /// Enabled (the default): announce load balancer ranges as a whole. Disabled: single addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Enabled", "Disabled"]))]
    pub service_load_balancer_aggregation: Option<String>,
    /// Names of communities, for prefixAdvertisements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 500))]
    pub communities: Option<Vec<NamedCommunity>>,
    /// Communities of routes within ranges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 500))]
    pub prefix_advertisements: Option<Vec<PrefixAdvertisement>>,
    /// Password of the sessions of the mesh. Only with the mesh on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_mesh_password: Option<BgpPassword>,
    /// Restart time of the sessions of the mesh, such as 120s (the default). Only with the mesh on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::duration")]
    pub node_mesh_max_restart_time: Option<String>,
    /// Address to which workloads of this node connect for BGP.
    #[serde(
        default,
        rename = "localWorkloadPeeringIPV4",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(max = 64))]
    pub local_workload_peering_ipv4: Option<String>,
    /// As localWorkloadPeeringIPV4, of IPv6.
    #[serde(
        default,
        rename = "localWorkloadPeeringIPV6",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(length(max = 64))]
    pub local_workload_peering_ipv6: Option<String>,
    /// Metric of IPv4 routes in the kernel. Default 1024.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2147483646))]
    pub ipv4_normal_route_priority: Option<i32>,
    /// Metric of IPv6 routes in the kernel. Default 1024.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2147483646))]
    pub ipv6_normal_route_priority: Option<i32>,
    /// Which program makes routes to other nodes. Preserved; Margay has one way to make them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Enabled", "Disabled", "EnabledIPIPOnly", "EnabledNoEncapOnly"]))]
    pub program_cluster_routes: Option<String>,
}

/// AS number: a number, or text such as 64512 or 1.10.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AsNumber {
    /// A number.
    Number(i64),
    /// Text.
    Text(String),
}

/// Range of addresses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CidrBlock {
    /// The range.
    #[schemars(length(max = 64))]
    pub cidr: String,
}

/// Name of a community.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct NamedCommunity {
    /// Name.
    #[schemars(length(max = 64))]
    pub name: String,
    /// Value: aa:nn or aa:nn:mm.
    #[schemars(schema_with = "limits::community")]
    pub value: String,
}

/// Communities of routes within a range.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PrefixAdvertisement {
    /// The range.
    #[schemars(length(max = 64))]
    pub cidr: String,
    /// Values, or names of communities.
    #[serde(default)]
    #[schemars(length(max = 50))]
    pub communities: Vec<String>,
}

/// Password of a session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BgpPassword {
    /// Key of a Secret in the namespace of the nodes' agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<SecretKeySelector>,
}

/// A peer of some or all nodes.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "BGPPeer",
    plural = "bgppeers",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::bgp_peer_rules()))]
pub struct BGPPeerSpec {
    /// Node that has this peer. Not with nodeSelector; without either every node has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// Nodes that have this peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub node_selector: Option<String>,
    /// Address of the peer, and its port if that is not 179: 192.0.2.1, 192.0.2.1:1179,
    /// [fd00::1]:1179.
    // The text is that of the definition, where brackets make no link.
    #[allow(rustdoc::broken_intra_doc_links)]
    #[serde(default, rename = "peerIP", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub peer_ip: Option<String>,
    /// Nodes that are the peers. Not with peerIP and asNumber.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub peer_selector: Option<String>,
    /// Workloads of the node that are the peers. Not with peerIP and peerSelector; needs asNumber.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub local_workload_selector: Option<String>,
    /// AS number of the peer. May be left out if the peer is a node. Not with peerSelector.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::as_number")]
    pub as_number: Option<AsNumber>,
    /// AS number of the node towards this peer.
    #[serde(
        default,
        rename = "localASNumber",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(schema_with = "limits::as_number")]
    pub local_as_number: Option<AsNumber>,
    /// How often the node's AS number may be in paths of the peer. Default 0.
    #[serde(
        default,
        rename = "numAllowedLocalASNumbers",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(range(min = 0, max = 255))]
    pub num_allowed_local_as_numbers: Option<i32>,
    /// Names of BGPFilters, in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filters: Option<Vec<String>>,
    /// Auto (the default): by RFC 4271. Self: the node's address always. Keep: as received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Auto", "Self", "Keep"]))]
    pub next_hop_mode: Option<String>,
    /// Older form of nextHopMode: Keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_original_next_hop: Option<bool>,
    /// TCP MD5 password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<BgpPassword>,
    /// UseNodeIP (the default): connect from the node's address. None: from whichever the kernel
    /// takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["UseNodeIP", "None"]))]
    pub source_address: Option<String>,
    /// Restart time of graceful restart, such as 120s (the default).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::duration")]
    pub max_restart_time: Option<String>,
    /// Time between keepalives, such as 10s. Default: a third of the hold time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "limits::duration")]
    pub keepalive_time: Option<String>,
    /// Number of hops to the peer, from which packets are taken (RFC 5082).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 255))]
    pub ttl_security: Option<i32>,
    /// Gateway to the peer, of the family of peerIP. Needs peerIP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reachable_by: Option<String>,
    /// Auto (the default): nodes that are peers have the session as well. Manual: they need an
    /// object of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Auto", "Manual"]))]
    pub reverse_peering: Option<String>,
}

/// Rules about the routes of peers that name it.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "BGPFilter",
    plural = "bgpfilters",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct BGPFilterSpec {
    /// Rules for IPv4 routes to the peer; the first that matches decides.
    #[serde(default, rename = "exportV4", skip_serializing_if = "Option::is_none")]
    pub export_v4: Option<Vec<BgpFilterRule>>,
    /// Rules for IPv4 routes of the peer.
    #[serde(default, rename = "importV4", skip_serializing_if = "Option::is_none")]
    pub import_v4: Option<Vec<BgpFilterRule>>,
    /// Rules for IPv6 routes to the peer.
    #[serde(default, rename = "exportV6", skip_serializing_if = "Option::is_none")]
    pub export_v6: Option<Vec<BgpFilterRule>>,
    /// Rules for IPv6 routes of the peer.
    #[serde(default, rename = "importV6", skip_serializing_if = "Option::is_none")]
    pub import_v6: Option<Vec<BgpFilterRule>>,
}

/// Rule of a filter. It matches routes that have all that it names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = limits::bgp_filter_rules()))]
pub struct BgpFilterRule {
    /// Accept or Reject.
    #[schemars(extend("enum" = ["Accept", "Reject"]))]
    pub action: String,
    /// Range that the prefix is compared with, by matchOperator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub cidr: Option<String>,
    /// Equal, NotEqual, In or NotIn. Together with cidr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Equal", "NotEqual", "In", "NotIn"]))]
    pub match_operator: Option<String>,
    /// Lengths of the prefix. Needs cidr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_length: Option<BgpPrefixLength>,
    /// RemotePeers: routes that a peer has sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["RemotePeers"]))]
    pub source: Option<String>,
    /// Name of the route's interface; * stands for any text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 15))]
    pub interface: Option<String>,
    /// Peers that the rule is for: eBGP or iBGP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["eBGP", "iBGP"]))]
    pub peer_type: Option<String>,
    /// Communities of the route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub communities: Option<BgpCommunityMatch>,
    /// Numbers that the AS path begins with.
    #[serde(
        default,
        rename = "asPathPrefix",
        skip_serializing_if = "Option::is_none"
    )]
    pub as_path_prefix: Option<Vec<i64>>,
    /// Metric of the route in the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2147483646))]
    pub priority: Option<i32>,
    /// Changes of the route. Only with Accept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 10))]
    pub operations: Option<Vec<BgpFilterOperation>>,
}

/// Range of prefix lengths.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BgpPrefixLength {
    /// Shortest. Default: that of cidr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 128))]
    pub min: Option<i32>,
    /// Longest. Default: that of an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 128))]
    pub max: Option<i32>,
}

/// Communities that a route must have.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BgpCommunityMatch {
    /// Exactly one: aa:nn or aa:nn:mm.
    #[schemars(length(min = 1, max = 1))]
    pub values: Vec<String>,
}

/// Change of a route: exactly one of its fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("minProperties" = 1, "maxProperties" = 1))]
pub struct BgpFilterOperation {
    /// Adds a community.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub add_community: Option<BgpCommunity>,
    /// Puts AS numbers in front of the path.
    #[serde(
        default,
        rename = "prependASPath",
        skip_serializing_if = "Option::is_none"
    )]
    pub prepend_as_path: Option<BgpAsPath>,
    /// Sets the metric in the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_priority: Option<BgpPriority>,
}

/// A community.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BgpCommunity {
    /// Value: aa:nn or aa:nn:mm.
    #[schemars(schema_with = "limits::community")]
    pub value: String,
}

/// AS numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BgpAsPath {
    /// The numbers, in their order.
    #[schemars(length(min = 1, max = 10))]
    pub prefix: Vec<i64>,
}

/// A metric.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BgpPriority {
    /// Value.
    #[schemars(range(min = 1, max = 2147483646))]
    pub value: i32,
}
