//! Calico's own kinds, `projectcalico.org/v3`: types as users write them, and their conversion to
//! the parsed forms.
//!
//! Types decode whatever the API server may hold: enumerated values are plain text and checked by
//! the parse functions, because an object that does not decode would break the whole list, and one
//! that decodes and does not parse affects only itself.

pub mod bgp;
pub mod cluster;
pub mod controllers;
pub mod host;
pub mod ipam;
mod limits;
pub mod netset;
pub mod parse;
pub mod policy;
pub mod pool;
pub mod rule;
pub mod tier;

pub use bgp::{BGPConfiguration, BGPFilter, BGPPeer};
pub use cluster::{ClusterInformation, FelixConfiguration};
pub use controllers::KubeControllersConfiguration;
pub use host::HostEndpoint;
pub use ipam::{BlockAffinity, IPAMBlock, IPAMConfiguration, IPAMHandle, IPReservation};
pub use netset::{GlobalNetworkSet, NetworkSet};
pub use policy::{
    GlobalNetworkPolicy, NetworkPolicy, StagedGlobalNetworkPolicy, StagedKubernetesNetworkPolicy,
    StagedNetworkPolicy,
};
pub use pool::IPPool;
pub use tier::Tier;

/// API group of Calico's kinds.
pub const GROUP: &str = "projectcalico.org";
/// Version of Calico's kinds.
pub const VERSION: &str = "v3";
/// Name of the object of kinds that exist once.
pub const SINGLETON: &str = "default";
