//! What the names of a node's interfaces tell.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::Links;

/// What the host side of every pod's link is called by, before the hash.
pub(crate) const WORKLOAD_PREFIX: &str = "cali";
/// The link that has the addresses of Services where kube-proxy is in IPVS mode, and no other: kube-proxy's
/// `DefaultDummyDevice`.
pub(crate) const IPVS_INTERFACE: &str = "kube-ipvs0";

/// Whether the interface is of a pod.
pub(crate) fn is_workload(interface: &str) -> bool {
    interface.starts_with(WORKLOAD_PREFIX)
}

/// The addresses of Services, where IPVS serves them.
pub(crate) fn ipvs_services(links: &Links) -> Option<BTreeSet<IpAddr>> {
    links.get(IPVS_INTERFACE).cloned()
}
