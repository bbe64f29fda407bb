//! Nodes: where they are, and where their tunnels end.

use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use k8s_openapi::api::core::v1::Node;

use crate::meta::{
    ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6, ANNOTATION_VXLAN_IPV4, ANNOTATION_VXLAN_IPV6, ANNOTATION_VXLAN_MAC,
    ANNOTATION_VXLAN_MAC_V6,
};
use crate::network::{NodeInfo, Vtep};

/// What others need to know about a node. Without the agent's annotations its address is the kubelet's, in a subnet of its own, so that packets
/// to it are never sent unencapsulated by a guess.
pub fn node_info(node: &Node) -> NodeInfo {
    let annotation = |name: &str| {
        let annotations = node.metadata.annotations.as_ref()?;
        annotations.get(name).map(|text| text.trim())
    };
    let internal = || {
        let addresses = node.status.iter().flat_map(|status| &status.addresses);
        addresses.flatten().filter(|address| address.type_ == "InternalIP").map(|address| address.address.as_str())
    };
    let ipv4 = annotation(ANNOTATION_NODE_IPV4).and_then(ipv4_net);
    let ipv6 = annotation(ANNOTATION_NODE_IPV6).and_then(ipv6_net);
    let vtep4 = || vtep(annotation(ANNOTATION_VXLAN_IPV4)?, annotation(ANNOTATION_VXLAN_MAC)?);
    let vtep6 = || vtep(annotation(ANNOTATION_VXLAN_IPV6)?, annotation(ANNOTATION_VXLAN_MAC_V6)?);
    NodeInfo {
        ipv4: ipv4.or_else(|| internal().find_map(ipv4_net)),
        ipv6: ipv6.or_else(|| internal().find_map(ipv6_net)),
        vtep: vtep4(),
        vtep6: vtep6(),
        labels: node.metadata.labels.clone().unwrap_or_default(),
    }
}

fn vtep<A: FromStr>(address: &str, mac: &str) -> Option<Vtep<A>> {
    Some(Vtep { address: address.parse().ok()?, mac: mac.parse().ok()? })
}

fn ipv4_net(text: &str) -> Option<Ipv4Net> {
    text.parse().ok().or_else(|| Ipv4Net::new(text.parse().ok()?, 32).ok())
}

fn ipv6_net(text: &str) -> Option<Ipv6Net> {
    text.parse().ok().or_else(|| Ipv6Net::new(text.parse().ok()?, 128).ok())
}
