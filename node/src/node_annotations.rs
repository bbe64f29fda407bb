//! Annotations of this node that others need: its addresses with their subnets, its interfaces, and
//! the endpoints of its tunnels.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use margay_api::hosts::NodeInterface;
use margay_api::meta::{
    ANNOTATION_IPIP, ANNOTATION_NODE_INTERFACES, ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6,
    ANNOTATION_VXLAN_IPV4, ANNOTATION_VXLAN_IPV6, ANNOTATION_VXLAN_MAC, ANNOTATION_VXLAN_MAC_V6,
};
use margay_api::network::{Mac, TunnelKind};
use margay_api::rule::IpVersion;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::config::NodeIps;
use crate::pods::ViewInputs;
use crate::problems::Problems;
use crate::requests::bounded;
use margay_dataplane::routes::driver::Driver;
use margay_ipam::addresses::NodeAddresses;

/// Delay before a failed API request is repeated.
const RETRY: Duration = Duration::from_secs(2);
/// Maximal length of the annotation with the node's interfaces, in bytes: a quarter of what all
/// annotations of an object may have (`TotalAnnotationSizeLimitB` in Kubernetes' apimachinery).
const MAX_INTERFACES: usize = 64 << 10;

/// Maintains the annotations of this node: its addresses with their subnets, its interfaces, and
/// its tunnel endpoints while there is encapsulation.
pub(crate) async fn maintain(
    node: String,
    own: NodeIps,
    client: Client,
    addresses: NodeAddresses,
    mut inputs: watch::Receiver<ViewInputs>,
    problems: Problems,
) {
    let nodes: Api<Node> = Api::all(client);
    // The view does not contain this annotation, so it is written at start and whenever the
    // interfaces change.
    let mut written = None;
    let mut pools = addresses.pools();
    loop {
        let changed = tokio::select! {
            changed = inputs.changed() => changed,
            // The tunnel's address may have to move to another pool.
            changed = pools.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        loop {
            let seen = inputs.borrow_and_update().clone();
            problems.report(
                "interfaces",
                false,
                interfaces_text(&seen.interfaces).err().as_deref(),
            );
            match put_annotations(&nodes, &node, own, &addresses, &seen, written.as_ref()).await {
                Ok(()) => {
                    written = Some(seen.interfaces);
                    break;
                }
                Err(error) => tracing::warn!(
                    error = format!("{error:#}"),
                    "the annotations of the node could not be written; trying again"
                ),
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn put_annotations(
    nodes: &Api<Node>,
    node: &str,
    own: NodeIps,
    addresses: &NodeAddresses,
    seen: &ViewInputs,
    written: Option<&Vec<NodeInterface>>,
) -> Result<()> {
    let mut wanted = Map::new();
    let subnets = node_subnets(own, seen.has_ipv6)?;
    for (version, subnet) in &subnets {
        let (present, annotation) = match version {
            IpVersion::V4 => (seen.own.ipv4.map(IpNet::V4), ANNOTATION_NODE_IPV4),
            IpVersion::V6 => (seen.own.ipv6.map(IpNet::V6), ANNOTATION_NODE_IPV6),
        };
        if present != Some(*subnet) {
            wanted.insert(annotation.to_owned(), json!(subnet));
        }
    }
    for kind in TunnelKind::ALL {
        let has_address = subnets.contains_key(&kind.version());
        let present = seen.own.tunnel_address(kind);
        let is_due = present.is_none_or(|address| addresses.has_to_move(&[address.into()]));
        if has_address && seen.tunnels.contains_key(&kind) && is_due {
            let claimed = addresses
                .tunnel(kind)
                .await
                .with_context(|| format!("address of {}", kind.device_name()))?;
            if let Some(address) = claimed.first() {
                let (name, mac) = tunnel_annotations(kind);
                wanted.insert(name.to_owned(), json!(address.addr()));
                if let Some(mac) = mac {
                    let value = tunnel_mac(node, kind.version()).to_string();
                    wanted.insert(mac.to_owned(), json!(value));
                }
            }
        }
    }
    // A Node that lacks our other annotations may have been recreated, and lost this one as well.
    if (written != Some(&seen.interfaces) || !wanted.is_empty())
        && let Ok(text) = interfaces_text(&seen.interfaces)
    {
        wanted.insert(ANNOTATION_NODE_INTERFACES.to_owned(), json!(text));
    }
    if wanted.is_empty() {
        return Ok(());
    }
    let patch = json!({"metadata": {"annotations": Value::Object(wanted)}});
    bounded(nodes.patch(node, &PatchParams::default(), &Patch::Merge(patch)))
        .await
        .with_context(|| format!("annotate Node {node}"))?;
    Ok(())
}

/// Annotations with the address of a tunnel device and with its MAC address, if it has one.
const fn tunnel_annotations(kind: TunnelKind) -> (&'static str, Option<&'static str>) {
    match kind {
        TunnelKind::Vxlan(IpVersion::V4) => (ANNOTATION_VXLAN_IPV4, Some(ANNOTATION_VXLAN_MAC)),
        TunnelKind::Vxlan(IpVersion::V6) => (ANNOTATION_VXLAN_IPV6, Some(ANNOTATION_VXLAN_MAC_V6)),
        TunnelKind::Ipip => (ANNOTATION_IPIP, None),
    }
}

/// Text of the annotation with the interfaces. Kubernetes refuses a Node whose annotations are too
/// long, and with it the addresses of its tunnels, so a text that takes a large part of that is a
/// problem instead.
fn interfaces_text(interfaces: &[NodeInterface]) -> Result<String, String> {
    let text = json!(interfaces).to_string();
    if text.len() <= MAX_INTERFACES {
        return Ok(text);
    }
    Err(format!(
        "the {} interfaces of this node, with their addresses, take {} bytes, more than the \
         {MAX_INTERFACES} that annotation {ANNOTATION_NODE_INTERFACES} may have: automatic host \
         endpoints by interface stay as they are; remove interfaces or addresses that are not \
         needed",
        interfaces.len(),
        text.len()
    ))
}

/// The node's addresses with their subnets. If there is an IPv6 pool and the kubelet reports no
/// IPv6 address, the one beside the other address on its link is used.
fn node_subnets(own: NodeIps, has_ipv6: bool) -> Result<BTreeMap<IpVersion, IpNet>> {
    let mut driver = Driver::open()?;
    let mut found = BTreeMap::new();
    for version in IpVersion::ALL {
        if let Some(address) = own.of(version) {
            found.extend(driver.find_subnet(address)?.map(|subnet| (version, subnet)));
        }
    }
    if has_ipv6 && own.of(IpVersion::V6).is_none() {
        found.extend(
            driver
                .find_ipv6_beside(own.first())?
                .map(|subnet| (IpVersion::V6, IpNet::V6(subnet))),
        );
    }
    Ok(found)
}

/// MAC address of a node's VXLAN device, as Felix computes it
/// (`calico/felix/dataplane/linux/vxlan_mgr.go`): 0x66 and the first five bytes of SHA-1 of the
/// node's name, for IPv6 with `-v6` appended.
fn tunnel_mac(node: &str, version: IpVersion) -> Mac {
    use sha1::{Digest, Sha1};
    let hash = match version {
        IpVersion::V4 => Sha1::digest(node.as_bytes()),
        IpVersion::V6 => Sha1::digest(format!("{node}-v6").as_bytes()),
    };
    Mac([0x66, hash[0], hash[1], hash[2], hash[3], hash[4]])
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn interfaces_that_do_not_fit_an_annotation_are_a_problem() {
        let interface = |number: u32| NodeInterface {
            name: format!("eth{number}"),
            addresses: (0..10)
                .map(|last| {
                    IpAddr::from(std::net::Ipv4Addr::from_bits(
                        (198 << 24) + number * 16 + last,
                    ))
                })
                .collect(),
        };
        let text = interfaces_text(&(0..100).map(interface).collect::<Vec<_>>()).expect("they fit");
        assert_eq!(
            serde_json::from_str::<Vec<NodeInterface>>(&text)
                .expect("JSON")
                .len(),
            100
        );
        let problem = interfaces_text(&(0..1000).map(interface).collect::<Vec<_>>())
            .expect_err("they do not");
        assert!(
            problem.contains("the 1000 interfaces")
                && problem.contains("projectcalico.org/Interfaces"),
            "{problem}"
        );
    }
}
