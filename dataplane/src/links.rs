//! What the names of a node's interfaces mean.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::Links;

/// Prefix of the host interface of every pod, before the hash.
pub(crate) const WORKLOAD_PREFIX: &str = "cali";
/// Link that has the addresses of Services in IPVS mode: `DefaultDummyDevice` in kube-proxy.
pub(crate) const IPVS_INTERFACE: &str = "kube-ipvs0";

/// Whether an interface belongs to a pod.
pub(crate) fn is_workload(interface: &str) -> bool {
    interface.starts_with(WORKLOAD_PREFIX)
}

/// Addresses of Services, in IPVS mode.
pub(crate) fn ipvs_services(links: &Links) -> Option<BTreeSet<IpAddr>> {
    links.get(IPVS_INTERFACE).cloned()
}
