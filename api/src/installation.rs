//! What a user says about the whole installation (`operator.tigera.io/v1`): `Installation` and `TigeraStatus`.
//!
//! Group, kinds and field names are Calico's, so that an existing object keeps working. Enumerated fields are plain text here and carry no
//! `enum` in the schema: the operator answers a bad value with a Degraded condition that names field, value, rule and remedy, which says more
//! than the API server's refusal, and an object written for a newer version still decodes. Fields that Margay does not read are preserved.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{LocalObjectReference, ResourceRequirements, Toleration};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The one Installation name that is acted upon.
pub const INSTALLATION_NAME: &str = "default";

/// What is to be installed. Unset fields are filled in by the operator and written back, so that a newer operator with other defaults does not
/// change a running cluster.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "operator.tigera.io",
    version = "v1",
    kind = "Installation",
    plural = "installations",
    derive = "PartialEq",
    status = "InstallationStatus",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Degraded","type":"string","jsonPath":".status.conditions[?(@.type=='Degraded')].status"}"#,
    printcolumn = r#"{"name":"Version","type":"string","jsonPath":".status.calicoVersion"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct InstallationSpec {
    /// Product variant. Only `Calico` (the default) is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Registry of all images, ending with `/`. Unset or `UseDefault` is the built-in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// Replaces the path between registry and image name. Unset or `UseDefault` is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_path: Option<String>,
    /// Put before the image name. Unset or `UseDefault` is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_prefix: Option<String>,
    /// Secrets of the component namespace with which images are pulled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_secrets: Option<Vec<LocalObjectReference>>,
    /// `Always`, `IfNotPresent` (the default) or `Never`, for all containers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
    /// Platform. Informative: nothing depends on it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes_provider: Option<String>,
    /// Which CNI plugin and IPAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniSpec>,
    /// Data plane and addressing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calico_network: Option<CalicoNetworkSpec>,
    /// Where control plane components (typha) may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_plane_node_selector: Option<BTreeMap<String, String>>,
    /// Added to the built-in tolerations of control plane components.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_plane_tolerations: Option<Vec<Toleration>>,
    /// How the node agents are replaced. Only `RollingUpdate` is allowed; `maxUnavailable` is 1 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_update_strategy: Option<NodeUpdateStrategy>,
    /// Resources per component (`Node`, `Typha`; there are no others); the per-workload overrides below win.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component_resources: Option<Vec<ComponentResource>>,
    /// Overrides of the node agent's DaemonSet.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "calicoNodeDaemonSet")]
    pub calico_node_daemon_set: Option<WorkloadOverride>,
    /// Overrides of typha's Deployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub typha_deployment: Option<WorkloadOverride>,
    /// Bounds for the number of typha replicas, which otherwise follows the number of nodes. Margay's own field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub typha_replicas: Option<ReplicaBounds>,
}

/// Which CNI plugin and IPAM, and where the host keeps its plugins.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct CniSpec {
    /// Only `Calico` (the default).
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Who gives out addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipam: Option<IpamSpec>,
    /// The host's folder of plugin binaries, absolute. Default `/opt/cni/bin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bin_dir: Option<String>,
    /// The host's folder of network configurations, absolute. Default `/etc/cni/net.d`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conf_dir: Option<String>,
}

/// Who gives out addresses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct IpamSpec {
    /// Only `Calico` (the default).
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
}

/// Data plane and addressing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct CalicoNetworkSpec {
    /// `Nftables` (the default) or `Iptables`, both of which program nftables over netlink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linux_dataplane: Option<String>,
    /// Only `Disabled` (the default): routes between nodes come from the overlay or the shared segment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bgp: Option<String>,
    /// Address pools, at most 25. Unset: one IPv4 pool from the cluster's pod CIDR, or none if pools exist already. Empty: none is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["cidr"]))]
    pub ip_pools: Option<Vec<IpPoolSpec>>,
    /// MTU of pods and tunnel in bytes; 0 or unset takes it from the node's own interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<i32>,
    /// `Disabled` (the default) or `Enabled`. Enabled chains the `portmap` plugin, which the host has to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ports: Option<String>,
    /// How long creating a pod waits for its policy to be in force, in seconds, before it fails and is tried again. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linux_policy_setup_timeout_seconds: Option<i32>,
}

/// One address pool as written in an Installation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct IpPoolSpec {
    /// Name of the IPPool object. Default `default-ipv4-ippool` and `default-ipv6-ippool` for the first pool of each IP version, else made from the CIDR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The range, for example `10.244.0.0/16` or `fd00:10:244::/56`. Pods get an address of each IP version that has a pool.
    pub cidr: String,
    /// `VXLAN` (the default), `VXLANCrossSubnet` or `None`. Calico's own default is `IPIP`, which needs BGP; without BGP VXLAN is what works on
    /// any network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encapsulation: Option<String>,
    /// `Enabled` (the default for IPv4) or `Disabled` (for IPv6): whether what leaves the pools gets the node's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat_outgoing: Option<String>,
    /// Which nodes use the pool. Default `all()`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<String>,
    /// Prefix length of the blocks that nodes claim: 20 to 32 for IPv4 (default 26), 116 to 128 for IPv6 (default 122).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<i32>,
    /// Kept for other versions: there is no BGP here, and no pool is exported.
    #[serde(default, rename = "disableBGPExport", skip_serializing_if = "Option::is_none")]
    pub disable_bgp_export: Option<bool>,
    /// Whether the pool gives out no new addresses. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disable_new_allocations: Option<bool>,
    /// `Workload` and `Tunnel` (the default).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_uses: Option<Vec<String>>,
    /// `Automatic` (the default) or `Manual`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_mode: Option<String>,
}

/// How the node agents are replaced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct NodeUpdateStrategy {
    /// Only `RollingUpdate`.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Bounds of the rolling update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rolling_update: Option<RollingUpdate>,
}

/// Bounds of a rolling update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct RollingUpdate {
    /// How many nodes may be without an agent at once, as a number or per cent. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "int_or_string")]
    pub max_unavailable: Option<Value>,
}

/// Resources of one component.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct ComponentResource {
    /// `Node` or `Typha`.
    pub component_name: String,
    /// Requests and limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_requirements: Option<ResourceRequirements>,
}

/// What may be overridden on a workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct WorkloadOverride {
    /// Labels and annotations added to the workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataOverride>,
    /// The workload itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<WorkloadSpecOverride>,
}

/// Labels and annotations to add. Those that the operator sets itself win.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MetadataOverride {
    /// Labels to add.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations to add.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Overrides below `spec` of a workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct WorkloadSpecOverride {
    /// How long a pod has to be ready before it counts as available, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_ready_seconds: Option<i32>,
    /// The pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<PodTemplateOverride>,
}

/// Overrides of a pod template.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct PodTemplateOverride {
    /// Labels and annotations added to the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataOverride>,
    /// The pods' own fields.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<PodSpecOverride>,
}

/// Overrides of a pod's fields.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct PodSpecOverride {
    /// Resources per container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub containers: Vec<ContainerOverride>,
    /// Resources per init container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub init_containers: Vec<ContainerOverride>,
    /// Replaces the built-in affinity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub affinity: Option<Value>,
    /// Labels that a node must have, besides the built-in operating system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<BTreeMap<String, String>>,
    /// Replaces the built-in tolerations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerations: Option<Vec<Toleration>>,
    /// Replaces the built-in priority class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// Replaces the built-in time between SIGTERM and SIGKILL, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_grace_period_seconds: Option<i64>,
}

/// Override of one container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct ContainerOverride {
    /// The container's name; Calico's names (`calico-node`, `calico-typha`, `install-cni`) mean ours.
    pub name: String,
    /// Requests and limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
}

/// Bounds for a replica count.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaBounds {
    /// At least so many. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum: Option<i32>,
    /// At most so many. Default: no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum: Option<i32>,
}

/// What the operator says about the installation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct InstallationStatus {
    /// The variant that is installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// The MTU in use; absent where every node finds its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<i32>,
    /// The version that is installed, under the name that Calico's tools read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calico_version: Option<String>,
    /// `Ready`, `Progressing`, `Degraded`.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<StatusCondition>,
}

/// The state of one part of the installation: `calico` or `ippools`.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "operator.tigera.io",
    version = "v1",
    kind = "TigeraStatus",
    plural = "tigerastatuses",
    derive = "PartialEq",
    status = "TigeraStatusStatus",
    printcolumn = r#"{"name":"Available","type":"string","jsonPath":".status.conditions[?(@.type=='Available')].status"}"#,
    printcolumn = r#"{"name":"Progressing","type":"string","jsonPath":".status.conditions[?(@.type=='Progressing')].status"}"#,
    printcolumn = r#"{"name":"Degraded","type":"string","jsonPath":".status.conditions[?(@.type=='Degraded')].status"}"#,
    printcolumn = r#"{"name":"Since","type":"date","jsonPath":".status.conditions[?(@.status=='True')].lastTransitionTime"}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.conditions[?(@.status=='True')].message"}"#
)]
pub struct TigeraStatusSpec {}

/// The conditions of one part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TigeraStatusStatus {
    /// `Available`, `Progressing`, `Degraded`.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<StatusCondition>,
}

/// One condition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatusCondition {
    /// Which one.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// When `status` last changed (RFC 3339).
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// One word for machines, from Calico's list (for example `AllObjectsAvailable`, `InvalidConfigurationError`).
    #[serde(default)]
    pub reason: String,
    /// What, where and what to do about it.
    #[serde(default)]
    pub message: String,
    /// The generation of the Installation that this is about.
    #[serde(default)]
    pub observed_generation: i64,
}

fn int_or_string(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "x-kubernetes-int-or-string": true })
}

fn any_object(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::CustomResourceExt;

    #[test]
    fn schema_is_structural_and_preserves_the_unknown() {
        let crd = serde_json::to_value(Installation::crd()).unwrap();
        let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
        assert_eq!(spec["x-kubernetes-preserve-unknown-fields"], true, "{spec:#}");
        let pools = &spec["properties"]["calicoNetwork"]["properties"]["ipPools"];
        assert_eq!(pools["x-kubernetes-list-map-keys"][0], "cidr");
        assert_eq!(pools["items"]["required"][0], "cidr");
        assert_eq!(spec["properties"]["calicoNetwork"]["properties"]["mtu"]["type"], "integer");
        assert!(spec["properties"]["calicoNodeDaemonSet"].is_object());
        assert!(!crd.to_string().contains("\"anyOf\""), "no anyOf in a structural schema outside int-or-string");
    }

    #[test]
    fn calicos_own_example_decodes() {
        let spec: InstallationSpec = serde_json::from_value(serde_json::json!({
            "variant": "Calico", "fipsMode": "Disabled", "flexVolumePath": "None",
            "calicoNetwork": {
                "bgp": "Disabled", "hostPorts": "Enabled", "multiInterfaceMode": "None",
                "nodeAddressAutodetectionV4": {"firstFound": true},
                "ipPools": [{"cidr": "10.244.0.0/16", "encapsulation": "VXLANCrossSubnet", "disableBGPExport": false}]
            },
            "nodeUpdateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}
        }))
        .unwrap();
        let network = spec.calico_network.unwrap();
        assert_eq!(network.ip_pools.unwrap()[0].disable_bgp_export, Some(false));
    }
}
