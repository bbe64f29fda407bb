//! Configuration and status of the installation (`operator.tigera.io/v1`): `Installation` and
//! `TigeraStatus`.
//!
//! Group, kinds and field names are Calico's, so that an existing object keeps working. Enumerated
//! fields are plain text here and carry no `enum` in the schema: the operator answers a bad value
//! with a Degraded condition that names field, value, rule and remedy, which is more helpful than
//! the API server's refusal, and an object written for a newer version still decodes. Fields that
//! Margay does not read are preserved.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{LocalObjectReference, ResourceRequirements, Toleration};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Name of the only Installation that the operator acts on.
pub const INSTALLATION_NAME: &str = "default";

/// Configuration of the installation. The operator fills in unset fields and writes them back, so
/// that a newer operator with other defaults does not change a running cluster.
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
    /// Product variant. Only `Calico` (the default) is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Registry of all images, ending with `/`. Unset or `UseDefault` means the built-in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// Path between registry and image name. Unset or `UseDefault` means the built-in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_path: Option<String>,
    /// Prefix of image names. Unset or `UseDefault` means none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_prefix: Option<String>,
    /// Secrets in the components' namespace that are used to pull images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_secrets: Option<Vec<LocalObjectReference>>,
    /// Pull policy of all containers: `Always`, `IfNotPresent` (the default) or `Never`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
    /// Kubernetes platform. For information only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes_provider: Option<String>,
    /// CNI plugin and IPAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniSpec>,
    /// Dataplane and addressing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calico_network: Option<CalicoNetworkSpec>,
    /// Labels that a node must have to run control plane components (typha).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_plane_node_selector: Option<BTreeMap<String, String>>,
    /// Tolerations added to the built-in ones of control plane components.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_plane_tolerations: Option<Vec<Toleration>>,
    /// Update strategy of the node agents. Only `RollingUpdate` is supported; `maxUnavailable` is 1
    /// by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_update_strategy: Option<NodeUpdateStrategy>,
    /// Resources per component (`Node` or `Typha`); the overrides per workload below take
    /// precedence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub component_resources: Option<Vec<ComponentResource>>,
    /// Overrides of the node agent's DaemonSet.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        rename = "calicoNodeDaemonSet"
    )]
    pub calico_node_daemon_set: Option<WorkloadOverride>,
    /// Overrides of typha's Deployment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub typha_deployment: Option<WorkloadOverride>,
    /// TCP port at which every node's agent serves metrics to Prometheus, over plain HTTP and on
    /// all addresses. Unset: as FelixConfiguration has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_metrics_port: Option<i32>,
    /// TCP port at which typha serves metrics to Prometheus, over plain HTTP and on all addresses.
    /// Unset: on the loopback of its node only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub typha_metrics_port: Option<i32>,
    /// Bounds of the number of typha replicas, which otherwise follows the number of nodes. A field
    /// of Margay's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub typha_replicas: Option<ReplicaBounds>,
}

/// CNI plugin, IPAM, and the host's folders of plugins and network configurations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct CniSpec {
    /// CNI plugin. Only `Calico` (the default) is supported.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// IPAM plugin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipam: Option<IpamSpec>,
    /// Version of the CNI specification: `Auto` (the default), the newest one that each container
    /// runtime supports of `1.0.0` and `1.1.0`; or `0.3.1`, `0.4.0`, `1.0.0` or `1.1.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec_version: Option<String>,
    /// Absolute path of the host's folder of plugin binaries. Default `/opt/cni/bin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bin_dir: Option<String>,
    /// Absolute path of the host's folder of network configurations. Default `/etc/cni/net.d`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conf_dir: Option<String>,
}

/// IPAM plugin.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct IpamSpec {
    /// Only `Calico` (the default) is supported.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
}

/// Dataplane and addressing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct CalicoNetworkSpec {
    /// Dataplane: `Nftables` (the default) or `Iptables`, both of which program nftables over
    /// netlink.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linux_dataplane: Option<String>,
    /// BGP: `Enabled` gives every node a speaker, as BGPConfiguration, BGPPeer and BGPFilter
    /// describe. Unset: `Enabled` if a pool has the encapsulation `None`, `IPIP` or
    /// `IPIPCrossSubnet`, else `Disabled`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bgp: Option<String>,
    /// Address pools, at most 25. Unset: one IPv4 pool of the cluster's pod CIDR, or none if pools
    /// exist already. Empty: no pool is created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["cidr"]))]
    pub ip_pools: Option<Vec<IpPoolSpec>>,
    /// MTU of pods and tunnels in bytes; 0 or unset: derived from the interface of each node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<i32>,
    /// Host ports of pods: `Enabled` (the default) or `Disabled`. A change applies to pods that are
    /// created after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ports: Option<String>,
    /// Time that creating a pod waits for its policy to be enforced, in seconds, before it fails
    /// and is retried. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linux_policy_setup_timeout_seconds: Option<i32>,
}

/// An address pool as specified in an Installation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct IpPoolSpec {
    /// Name of the IPPool object. Default `default-ipv4-ippool` and `default-ipv6-ippool` for the
    /// first pool of each IP version, else made from the CIDR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Range of the pool, for example `10.244.0.0/16` or `fd00:10:244::/56`. Pods get an address of
    /// each IP version that has a pool.
    pub cidr: String,
    /// Encapsulation of traffic between nodes: `VXLAN` (the default), `VXLANCrossSubnet`, `IPIP` or
    /// `IPIPCrossSubnet` (IPv4 only), or `None`. Networks of some clouds drop IPIP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encapsulation: Option<String>,
    /// Masquerading of traffic from the pool to addresses outside of all pools: `Enabled` (the
    /// default for IPv4) or `Disabled` (the default for IPv6).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nat_outgoing: Option<String>,
    /// Selector of the nodes that use the pool. Default `all()`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<String>,
    /// Prefix length of the blocks that nodes claim: 20 to 32 for IPv4 (default 26), 116 to 128 for
    /// IPv6 (default 122).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<i32>,
    /// True keeps BGP from announcing the pool's routes. Default false.
    #[serde(
        default,
        rename = "disableBGPExport",
        skip_serializing_if = "Option::is_none"
    )]
    pub disable_bgp_export: Option<bool>,
    /// True stops allocations of new addresses from the pool. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disable_new_allocations: Option<bool>,
    /// Uses of the pool's addresses: `Workload` and `Tunnel` (the default is both).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_uses: Option<Vec<String>>,
    /// `Automatic` (the default), or `Manual` for addresses that are assigned only by request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment_mode: Option<String>,
}

/// Update strategy of the node agents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct NodeUpdateStrategy {
    /// Only `RollingUpdate` is supported.
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
    /// Maximum number of nodes without an agent at the same time, as a number or a percentage.
    /// Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "int_or_string")]
    pub max_unavailable: Option<Value>,
}

/// Resources of one component.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct ComponentResource {
    /// Component: `Node` or `Typha`.
    pub component_name: String,
    /// Requests and limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_requirements: Option<ResourceRequirements>,
}

/// Overrides of a workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct WorkloadOverride {
    /// Labels and annotations added to the workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataOverride>,
    /// Overrides of the workload's spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<WorkloadSpecOverride>,
}

/// Labels and annotations to add. Those that the operator sets itself take precedence.
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

/// Overrides of a workload's spec.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct WorkloadSpecOverride {
    /// Time that a pod must be ready before it counts as available, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_ready_seconds: Option<i32>,
    /// Overrides of the pod template.
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
    /// Overrides of the pods' spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<PodSpecOverride>,
}

/// Overrides of a pod's spec.
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
    /// Labels that a node must have, in addition to the built-in ones.
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
    /// Name of the container; Calico's names (`calico-node`, `calico-typha`, `install-cni`) are
    /// accepted too.
    pub name: String,
    /// Requests and limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
}

/// Bounds of a replica count.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaBounds {
    /// Minimum. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum: Option<i32>,
    /// Maximum. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maximum: Option<i32>,
}

/// Observed state of the installation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct InstallationStatus {
    /// Installed variant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// MTU in use; absent when each node detects its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<i32>,
    /// Installed version, under the name that Calico's tools read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calico_version: Option<String>,
    /// Conditions: `Ready`, `Progressing`, `Degraded`.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<StatusCondition>,
}

/// Status of one part of the installation: `calico`, `ippools` or `policies`.
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

/// Conditions of one part of the installation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TigeraStatusStatus {
    /// Conditions: `Available`, `Progressing`, `Degraded`.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<StatusCondition>,
}

/// One condition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatusCondition {
    /// Type of the condition.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Time when `status` last changed (RFC 3339).
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// Reason in CamelCase, from Calico's list (for example `AllObjectsAvailable`,
    /// `InvalidConfigurationError`).
    #[serde(default)]
    pub reason: String,
    /// Explanation for people: the object, the cause and the remedy.
    #[serde(default)]
    pub message: String,
    /// Generation of the Installation that the condition was computed from.
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
        assert_eq!(
            spec["x-kubernetes-preserve-unknown-fields"], true,
            "{spec:#}"
        );
        let pools = &spec["properties"]["calicoNetwork"]["properties"]["ipPools"];
        assert_eq!(pools["x-kubernetes-list-map-keys"][0], "cidr");
        assert_eq!(pools["items"]["required"][0], "cidr");
        assert_eq!(
            spec["properties"]["calicoNetwork"]["properties"]["mtu"]["type"],
            "integer"
        );
        assert!(spec["properties"]["calicoNodeDaemonSet"].is_object());
        assert!(
            !crd.to_string().contains("\"anyOf\""),
            "no anyOf in a structural schema outside int-or-string"
        );
    }

    #[test]
    fn calicos_own_example_decodes() {
        let spec: InstallationSpec = serde_json::from_value(serde_json::json!({
            "variant": "Calico", "fipsMode": "Disabled", "flexVolumePath": "None",
            "calicoNetwork": {
                "bgp": "Disabled", "hostPorts": "Enabled", "multiInterfaceMode": "None",
                "nodeAddressAutodetectionV4": {"firstFound": true},
                "ipPools": [{
                    "cidr": "10.244.0.0/16",
                    "encapsulation": "VXLANCrossSubnet",
                    "disableBGPExport": false,
                }]
            },
            "nodeUpdateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}
        }))
        .unwrap();
        let network = spec.calico_network.unwrap();
        assert_eq!(network.ip_pools.unwrap()[0].disable_bgp_export, Some(false));
    }
}
