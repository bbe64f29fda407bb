//! Names, labels, and the label and annotation keys that are part of Calico's API.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Labels of one object, ordered so that every output that shows them is stable.
pub type Labels = BTreeMap<String, String>;

/// A namespaced name. The derived order is by namespace, then name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespacedName {
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
}

impl NamespacedName {
    /// Creates the name `namespace/name`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Creation time of an object, in seconds since 1970; 0: not known.
pub(crate) fn created(metadata: &ObjectMeta) -> i64 {
    metadata
        .creation_timestamp
        .as_ref()
        .map_or(0, |time| time.0.as_second())
}

/// Label that every workload endpoint and namespaced network set carries: its namespace.
pub const LABEL_NAMESPACE: &str = "projectcalico.org/namespace";
/// Label of workload endpoints: the orchestrator; `k8s` for pods.
pub const LABEL_ORCHESTRATOR: &str = "projectcalico.org/orchestrator";
/// Label of workload endpoints: the service account's name, if it is shorter than 63 characters.
pub const LABEL_SERVICE_ACCOUNT: &str = "projectcalico.org/serviceaccount";
/// Prefix under which an endpoint inherits the labels of its namespace.
pub const PREFIX_NAMESPACE: &str = "pcns.";
/// Prefix under which an endpoint inherits the labels of its service account.
pub const PREFIX_SERVICE_ACCOUNT: &str = "pcsa.";
/// Inherited label (behind a prefix) that carries the name of the namespace or service account.
pub const LABEL_PARENT_NAME: &str = "projectcalico.org/name";

/// Pod annotation with the pod's first address, written by the CNI plugin's agent before kubelet
/// reports a status.
pub const ANNOTATION_POD_IP: &str = "cni.projectcalico.org/podIP";
/// Pod annotation with all addresses of the pod, comma separated, each with its prefix length.
pub const ANNOTATION_POD_IPS: &str = "cni.projectcalico.org/podIPs";
/// Pod annotation that requests addresses for the pod, a JSON list: one of IPv4, one of IPv6, or
/// one of each.
pub const ANNOTATION_POD_ADDRESSES: &str = "cni.projectcalico.org/ipAddrs";
/// Pod annotation that requests addresses for the pod that IPAM does not manage.
pub const ANNOTATION_POD_ADDRESSES_NO_IPAM: &str = "cni.projectcalico.org/ipAddrsNoIpam";
/// Pod annotation that restricts the IPv4 pools of the pod's address: a JSON list of names and
/// ranges.
pub const ANNOTATION_POD_POOLS_V4: &str = "cni.projectcalico.org/ipv4pools";
/// Pod annotation that restricts the IPv6 pools of the pod's address: a JSON list of names and
/// ranges.
pub const ANNOTATION_POD_POOLS_V6: &str = "cni.projectcalico.org/ipv6pools";
/// Pod annotation with the id of the sandbox that has the addresses.
pub const ANNOTATION_CONTAINER_ID: &str = "cni.projectcalico.org/containerID";
/// Node annotation: the node's IPv4 address with the prefix length of its subnet.
pub const ANNOTATION_NODE_IPV4: &str = "projectcalico.org/IPv4Address";
/// Node annotation: the node's IPv6 address with the prefix length of its subnet.
pub const ANNOTATION_NODE_IPV6: &str = "projectcalico.org/IPv6Address";
/// Annotation with the AS number of a node.
pub const ANNOTATION_NODE_ASN: &str = "projectcalico.org/ASNumber";
/// Annotation with the cluster of a node that is a route reflector.
pub const ANNOTATION_ROUTE_REFLECTOR: &str = "projectcalico.org/RouteReflectorClusterID";
/// Node annotation: the IPv4 address of the node's VXLAN device.
pub const ANNOTATION_VXLAN_IPV4: &str = "projectcalico.org/IPv4VXLANTunnelAddr";
/// Node annotation: the MAC address of the node's IPv4 VXLAN device.
pub const ANNOTATION_VXLAN_MAC: &str = "projectcalico.org/VXLANTunnelMACAddr";
/// Node annotation: the IPv6 address of the node's VXLAN device for IPv6.
pub const ANNOTATION_VXLAN_IPV6: &str = "projectcalico.org/IPv6VXLANTunnelAddr";
/// Node annotation: the MAC address of the node's VXLAN device for IPv6.
pub const ANNOTATION_VXLAN_MAC_V6: &str = "projectcalico.org/VXLANTunnelMACAddrV6";
/// Node annotation: the address of the node's IPIP device.
pub const ANNOTATION_IPIP: &str = "projectcalico.org/IPv4IPIPTunnelAddr";
/// Node annotation: the node's interfaces with their addresses, as JSON; see
/// [`NodeInterface`](crate::hosts::NodeInterface).
pub const ANNOTATION_NODE_INTERFACES: &str = "projectcalico.org/Interfaces";

/// Labels that identify an object, and are therefore never taken from where a user can write them.
const RESERVED: [&str; 3] = [LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_SERVICE_ACCOUNT];

/// Removes those of a user's labels that would make the object pose as one of another namespace,
/// service account or kind.
pub fn without_reserved<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Labels {
    let is_reserved = |name: &str| {
        RESERVED.contains(&name)
            || name.starts_with(PREFIX_NAMESPACE)
            || name.starts_with(PREFIX_SERVICE_ACCOUNT)
    };
    labels
        .into_iter()
        .filter(|(name, _)| !is_reserved(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// Returns true when Kubernetes accepts the text as the key of a label or annotation.
pub fn is_qualified_name(text: &str) -> bool {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    let ends_well = |text: &str| {
        let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        alphanumeric(text.chars().next()) && alphanumeric(text.chars().next_back())
    };
    let is_label = |label: &str| {
        ends_well(label)
            && label
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    };
    let is_name = name.len() <= 63
        && ends_well(name)
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    is_name && prefix.is_none_or(|prefix| prefix.len() <= 253 && prefix.split('.').all(is_label))
}
