//! IPAM's stored kinds: blocks, affinities, handles, reservations and the configuration. Field names and shapes are Calico's to the byte, because
//! `calicoctl` and an existing cluster read the same objects.

use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A block of addresses and who has each of them.
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
    /// Owner: `host:NODE`, or `virtual:NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<String>,
    /// When the owner claimed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity_claim_time: Option<String>,
    /// One entry for each address (ordinal): an index into `attributes`, or null when it is free.
    pub allocations: Vec<Option<u32>>,
    /// Free ordinals, the one that has been free for longest first.
    pub unallocated: Vec<u32>,
    /// Who has the addresses.
    pub attributes: Vec<AllocationAttribute>,
    /// Grows with every write.
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

/// Who has an address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AllocationAttribute {
    /// Handle of the allocation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle_id: Option<String>,
    /// Node, namespace, pod, type, timestamp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secondary: Option<BTreeMap<String, String>>,
    /// Who else may come to use the address: where a virtual machine is about to move.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "alternateOwnerAttrs")]
    pub alternate_owner_attrs: Option<BTreeMap<String, String>>,
    /// When it was released, while it waits out the cooldown.
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "releasedAt")]
    pub released_at: Option<String>,
}

/// A node's claim on a block.
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
    /// Node that claims it.
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

/// The addresses that were assigned under one handle, counted by block.
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
    /// The handle, in its own spelling.
    #[serde(rename = "handleID")]
    pub handle_id: String,
    /// Number of addresses by block range.
    pub block: BTreeMap<String, u32>,
    /// First step of a deletion: readers treat the handle as gone.
    #[serde(default)]
    pub deleted: bool,
}

/// Addresses that are given to nobody who does not ask for them by name.
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
    /// Addresses, and ranges of them.
    #[serde(default, rename = "reservedCIDRs")]
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub reserved_cidrs: Vec<String>,
}

/// How addresses are handed out; the object `default`.
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
    /// A node takes addresses of its own blocks only, never of others'.
    #[serde(default)]
    pub strict_affinity: bool,
    /// A node that runs out may claim another block.
    #[serde(default = "yes")]
    pub auto_allocate_blocks: bool,
    /// Most blocks that one node may claim; 0 means 20.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub max_blocks_per_host: u32,
    /// How long a released address rests, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1200))]
    pub ip_cooldown_seconds: Option<u32>,
    /// Kept for other versions, Enabled or Disabled: a virtual machine gets another address when it moves.
    #[serde(default, rename = "kubeVirtVMAddressPersistence", skip_serializing_if = "Option::is_none")]
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
