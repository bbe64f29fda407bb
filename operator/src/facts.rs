//! Facts of objects: the fields that decisions depend on, as plain values.

use std::collections::BTreeSet;
use std::net::IpAddr;

use kube::ResourceExt;
use kube::api::DynamicObject;
use margay_api::hosts::NodeInterface;
use margay_api::meta::{
    ANNOTATION_IPIP, ANNOTATION_NODE_INTERFACES, ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6,
    ANNOTATION_VXLAN_IPV4, ANNOTATION_VXLAN_IPV6,
};
use serde_json::Value;

use crate::inputs::{HostFacts, NodeFacts, PoolFacts, Present, Request};
use crate::manifest::{MANAGED_BY, MANAGER, Owner, version_of};

/// Reads an Installation.
pub fn request_of(object: &DynamicObject) -> Request {
    let written = object
        .managed_fields()
        .iter()
        .find(|entry| {
            entry.manager.as_deref() == Some(MANAGER)
                && entry.operation.as_deref() == Some("Apply")
                && entry.subresource.as_deref().unwrap_or_default().is_empty()
        })
        .and_then(|entry| entry.fields_v1.as_ref())
        .map(|fields| fields.0["f:spec"].clone());
    let conditions = &object.data["status"]["conditions"];
    Request {
        owner: Owner {
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
        },
        generation: object.metadata.generation.unwrap_or_default(),
        spec: object.data["spec"].clone(),
        written: written.unwrap_or(Value::Null),
        conditions: serde_json::from_value(conditions.clone()).unwrap_or_default(),
    }
}

/// Reads the facts of an owned object.
pub fn present(object: &DynamicObject) -> Present {
    let owner = object.owner_references().first().map(|o| o.uid.clone());
    Present {
        version: version_of(object),
        uid: object.uid().unwrap_or_default(),
        owner: owner.unwrap_or_default(),
        terminating: object.metadata.deletion_timestamp.is_some(),
    }
}

/// Reads the facts of a Node.
pub fn node_facts(node: &DynamicObject) -> NodeFacts {
    let cordoned = node.data["spec"]["unschedulable"].as_bool() == Some(true);
    let linux = node
        .labels()
        .get("kubernetes.io/os")
        .is_none_or(|os| os == "linux");
    let interfaces = node_interfaces(node);
    let on_links = interfaces
        .iter()
        .flatten()
        .flatten()
        .flat_map(|one| one.addresses.iter().copied());
    let (reported, own) = (
        reported_addresses(node),
        annotated_addresses(node, OWN_ADDRESSES),
    );
    let tunnels = annotated_addresses(node, TUNNEL_ADDRESSES);
    let claimed: BTreeSet<IpAddr> = own.union(&tunnels).copied().collect();
    NodeFacts {
        name: node.name_any(),
        usable: linux && !cordoned,
        is_linux: linux,
        labels: node.labels().clone(),
        taints: serde_json::from_value(node.data["spec"]["taints"].clone()).unwrap_or_default(),
        created: node
            .metadata
            .creation_timestamp
            .as_ref()
            .map(|time| time.0.to_string())
            .unwrap_or_default(),
        addresses: reported
            .iter()
            .chain(&claimed)
            .copied()
            .chain(on_links)
            .collect(),
        reported,
        claimed,
        tunnels,
        interfaces,
    }
}

fn node_interfaces(node: &DynamicObject) -> Option<Result<Vec<NodeInterface>, String>> {
    let text = node.annotations().get(ANNOTATION_NODE_INTERFACES)?;
    Some(serde_json::from_str(text).map_err(|error| format!("{text:?}: {error}")))
}

/// Annotations with a node's own addresses, with or without prefix length.
const OWN_ADDRESSES: [&str; 2] = [ANNOTATION_NODE_IPV4, ANNOTATION_NODE_IPV6];
/// Annotations with the addresses of a node's tunnels.
const TUNNEL_ADDRESSES: [&str; 3] = [
    ANNOTATION_VXLAN_IPV4,
    ANNOTATION_VXLAN_IPV6,
    ANNOTATION_IPIP,
];

/// Returns the internal addresses that kubelet reports.
fn reported_addresses(node: &DynamicObject) -> BTreeSet<IpAddr> {
    let reported = node.data["status"]["addresses"]
        .as_array()
        .into_iter()
        .flatten();
    let internal = reported
        .filter(|entry| entry["type"] == "InternalIP")
        .filter_map(|entry| entry["address"].as_str());
    internal.filter_map(|text| text.parse().ok()).collect()
}

/// Returns the addresses that the agent has written into those annotations.
fn annotated_addresses<const N: usize>(
    node: &DynamicObject,
    annotations: [&str; N],
) -> BTreeSet<IpAddr> {
    let written = annotations
        .into_iter()
        .filter_map(|name| node.annotations().get(name));
    let written = written.map(|text| {
        text.split_once('/')
            .map_or(text.as_str(), |(address, _)| address)
    });
    written.filter_map(|text| text.parse().ok()).collect()
}

/// Reads the facts of a HostEndpoint.
pub fn host_facts(host: &DynamicObject) -> HostFacts {
    HostFacts {
        name: host.name_any(),
        uid: host.uid().unwrap_or_default(),
        version: host.resource_version().unwrap_or_default(),
        labels: host.labels().clone(),
        annotations: host.annotations().clone(),
        spec: host.data["spec"].clone(),
    }
}

/// Reads the facts of an IPPool.
pub fn pool_facts(pool: &DynamicObject) -> PoolFacts {
    PoolFacts {
        name: pool.name_any(),
        spec: pool.data["spec"].clone(),
        managed: pool
            .labels()
            .get(MANAGED_BY)
            .is_some_and(|by| by == MANAGER),
        created: pool
            .metadata
            .creation_timestamp
            .as_ref()
            .map(|time| time.0.to_string())
            .unwrap_or_default(),
        terminating: pool.metadata.deletion_timestamp.is_some(),
        finalizers: pool.finalizers().to_vec(),
        version: pool.resource_version().unwrap_or_default(),
        conditions: pool.data["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default(),
    }
}

#[cfg(test)]
#[path = "facts_tests.rs"]
mod tests;
