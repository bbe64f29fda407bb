//! IPAM kinds: blocks, affinities, handles, reservations and the configuration. Field names and
//! formats are exactly Calico's, because `calicoctl` and the programs of an existing cluster read
//! the same objects.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// IPAM block: a range of addresses and their allocations.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "IPAMBlock",
    plural = "ipamblocks",
    singular = "ipamblock",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct IPAMBlockSpec {
    /// Range of the block.
    pub cidr: String,
    /// Owner of the block: `host:NODE` or `virtual:NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<String>,
    /// Time when the owner claimed the block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity_claim_time: Option<String>,
    /// One entry per address (ordinal): an index into `attributes`, or null when it is free.
    pub allocations: Vec<Option<u32>>,
    /// Free ordinals, in the order in which they became free.
    pub unallocated: Vec<u32>,
    /// Attributes of the allocations.
    pub attributes: Vec<AllocationAttribute>,
    /// Incremented by every change.
    #[serde(default)]
    pub sequence_number: u64,
    /// Value of `sequence_number` when each allocated ordinal was assigned; the key is the ordinal.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sequence_number_for_allocation: BTreeMap<String, u64>,
    /// Superseded by the IPAM configuration; kept because old readers expect it.
    #[serde(default)]
    pub strict_affinity: bool,
    /// First step of a deletion: readers treat the block as gone.
    #[serde(default)]
    pub deleted: bool,
}

/// Attributes of an allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AllocationAttribute {
    /// Handle of the allocation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle_id: Option<String>,
    /// Node, namespace, pod, type, timestamp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secondary: Option<BTreeMap<String, String>>,
    /// Attributes of the next owner, while a virtual machine migrates.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        rename = "alternateOwnerAttrs"
    )]
    pub alternate_owner_attrs: Option<BTreeMap<String, String>>,
    /// Time of its release, during the cooldown.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        rename = "releasedAt"
    )]
    pub released_at: Option<String>,
}

/// Affinity of a node to a block: the node assigns addresses from it.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "BlockAffinity",
    plural = "blockaffinities",
    singular = "blockaffinity",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct BlockAffinitySpec {
    /// Range of the block.
    pub cidr: String,
    /// Node that has the affinity.
    pub node: String,
    /// `pending`, `confirmed` or `pendingDeletion`.
    pub state: String,
    /// `host` (also when absent) or `virtual`.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "type")]
    pub kind: Option<String>,
    /// First step of a deletion: readers treat the affinity as gone.
    #[serde(default)]
    pub deleted: bool,
}

/// Addresses assigned under one handle, counted by block.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "IPAMHandle",
    plural = "ipamhandles",
    singular = "ipamhandle",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct IPAMHandleSpec {
    /// The handle in its original spelling.
    #[serde(rename = "handleID")]
    pub handle_id: String,
    /// Number of addresses by block range.
    pub block: BTreeMap<String, u32>,
    /// First step of a deletion: readers treat the handle as gone.
    #[serde(default)]
    pub deleted: bool,
}

/// Reserved addresses, which are assigned only by explicit request.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "IPReservation",
    plural = "ipreservations",
    singular = "ipreservation",
    derive = "PartialEq"
)]
pub struct IPReservationSpec {
    /// Addresses and address ranges.
    #[serde(default, rename = "reservedCIDRs")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub reserved_cidrs: Vec<String>,
}

/// Settings of IPAM, in the object `default`.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "projectcalico.org",
    version = "v3",
    kind = "IPAMConfiguration",
    plural = "ipamconfigurations",
    singular = "ipamconfiguration",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct IPAMConfigurationSpec {
    /// A node assigns addresses from its own blocks only.
    #[serde(default)]
    pub strict_affinity: bool,
    /// A node claims another block when it needs one.
    #[serde(default = "yes")]
    pub auto_allocate_blocks: bool,
    /// Maximum number of blocks per node; 0 means 20.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_blocks_per_host: u32,
    /// Time before a released address is assigned again, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1200))]
    pub ip_cooldown_seconds: Option<u32>,
    /// Accepted and ignored: Enabled or Disabled. Margay does not persist addresses of virtual
    /// machines.
    #[serde(
        default,
        rename = "kubeVirtVMAddressPersistence",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(extend("enum" = ["Enabled", "Disabled"]))]
    pub kube_virt_vm_address_persistence: Option<String>,
}

impl Default for IPAMConfigurationSpec {
    fn default() -> Self {
        Self {
            strict_affinity: false,
            auto_allocate_blocks: true,
            max_blocks_per_host: 0,
            ip_cooldown_seconds: None,
            kube_virt_vm_address_persistence: None,
        }
    }
}

fn yes() -> bool {
    true
}
