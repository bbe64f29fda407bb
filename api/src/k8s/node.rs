//! Nodes: their addresses and the ends of their tunnels.

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use k8s_openapi::api::core::v1::Node;

use crate::meta::{
    self, ANNOTATION_IPIP, ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6, ANNOTATION_VXLAN_IPV4,
    ANNOTATION_VXLAN_IPV6, ANNOTATION_VXLAN_MAC, ANNOTATION_VXLAN_MAC_V6,
};
use crate::network::{NodeInfo, Standing, Vtep};

/// Reads the addresses and the tunnels of a node. Without the agent's annotations its address is
/// the one that kubelet reports, with a full prefix, so that packets to it are never sent
/// unencapsulated because of a guessed subnet.
pub fn node_info(node: &Node) -> NodeInfo {
    let annotation = |name: &str| {
        let annotations = node.metadata.annotations.as_ref()?;
        annotations.get(name).map(|text| text.trim())
    };
    let internal = || addresses(node, "InternalIP");
    let ipv4 = annotation(ANNOTATION_NODE_IPV4)
        .and_then(ipv4_net)
        .or_else(|| internal().find_map(ipv4_net));
    let ipv6 = annotation(ANNOTATION_NODE_IPV6)
        .and_then(ipv6_net)
        .or_else(|| internal().find_map(ipv6_net));
    let reported = |address: Option<IpAddr>| {
        address.is_some_and(|address| {
            addresses(node, "InternalIP").any(|text| text.parse() == Ok(address))
        })
    };
    let standing = Standing {
        ipv4_reported: reported(ipv4.map(|net| net.addr().into())),
        ipv6_reported: reported(ipv6.map(|net| net.addr().into())),
        created: meta::created(&node.metadata),
    };
    let vtep4 = || {
        vtep(
            annotation(ANNOTATION_VXLAN_IPV4)?,
            annotation(ANNOTATION_VXLAN_MAC)?,
        )
    };
    let vtep6 = || {
        vtep(
            annotation(ANNOTATION_VXLAN_IPV6)?,
            annotation(ANNOTATION_VXLAN_MAC_V6)?,
        )
    };
    NodeInfo {
        ipv4,
        ipv6,
        vtep: vtep4(),
        vtep6: vtep6(),
        ipip: annotation(ANNOTATION_IPIP)
            .and_then(|address| address.parse().ok())
            .filter(|address: &Ipv4Addr| !address.is_unspecified()),
        labels: node.metadata.labels.clone().unwrap_or_default(),
        standing,
    }
}

/// Returns the addresses of one type that kubelet reports.
fn addresses<'a>(node: &'a Node, kind: &'a str) -> impl Iterator<Item = &'a str> {
    let all = node
        .status
        .iter()
        .flat_map(|status| &status.addresses)
        .flatten();
    all.filter(move |address| address.type_ == kind)
        .map(|address| address.address.as_str())
}

fn vtep<A: FromStr>(address: &str, mac: &str) -> Option<Vtep<A>> {
    Some(Vtep {
        address: address.parse().ok()?,
        mac: mac.parse().ok()?,
    })
}

fn ipv4_net(text: &str) -> Option<Ipv4Net> {
    text.parse()
        .ok()
        .or_else(|| Ipv4Net::new(text.parse().ok()?, 32).ok())
}

fn ipv6_net(text: &str) -> Option<Ipv6Net> {
    text.parse()
        .ok()
        .or_else(|| Ipv6Net::new(text.parse().ok()?, 128).ok())
}
