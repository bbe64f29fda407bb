//! Nodes: their addresses and the ends of their tunnels.

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};
use k8s_openapi::api::core::v1::Node;

use crate::bgp;
use crate::meta::{
    self, ANNOTATION_IPIP, ANNOTATION_NODE_ASN, ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6,
    ANNOTATION_ROUTE_REFLECTOR, ANNOTATION_VXLAN_IPV4, ANNOTATION_VXLAN_IPV6, ANNOTATION_VXLAN_MAC,
    ANNOTATION_VXLAN_MAC_V6,
};
use crate::network::{BgpAnnotations, NodeInfo, Standing, Vtep};
use crate::problem::{Problem, Problems};

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
        bgp: None,
        bgp_annotations: bgp_annotations(node, &mut Problems::default()),
        standing,
    }
}

/// Problems of a Node's annotations for BGP. A bad one counts as not given.
pub fn problems(node: &Node) -> Vec<Problem> {
    let mut problems = Problems::default();
    bgp_annotations(node, &mut problems);
    problems.into_vec()
}

fn bgp_annotations(node: &Node, problems: &mut Problems) -> BgpAnnotations {
    let annotation = |name: &str| {
        let annotations = node.metadata.annotations.as_ref()?;
        annotations
            .get(name)
            .map(|text| text.trim())
            .filter(|text| !text.is_empty())
    };
    let field = |name: &str| format!("metadata.annotations[{name}]");
    let asn = annotation(ANNOTATION_NODE_ASN).and_then(|text| {
        let asn = bgp::parse_asn(text);
        if asn.is_none() {
            let rule = "not an AS number, so the node has that of its BGPConfiguration";
            problems.add(field(ANNOTATION_NODE_ASN), text, rule, bgp::ASN_REMEDY);
        }
        asn
    });
    let cluster_id = annotation(ANNOTATION_ROUTE_REFLECTOR).and_then(|text| {
        let cluster_id = text.parse().ok();
        if cluster_id.is_none() {
            let rule = "not in the form of an IPv4 address, so the node is no route reflector";
            let remedy = "write it like 244.0.0.1";
            problems.add(field(ANNOTATION_ROUTE_REFLECTOR), text, rule, remedy);
        }
        cluster_id
    });
    BgpAnnotations { asn, cluster_id }
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
