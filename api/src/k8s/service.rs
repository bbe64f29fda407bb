//! Conversion of EndpointSlices to backends of Services, and of Services to their addresses.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use crate::endpoint::{Backend, ServiceAddresses};
use crate::meta::NamespacedName;

use super::pod::protocol;

/// Label of a slice: its Service.
const LABEL_SERVICE: &str = "kubernetes.io/service-name";

/// Returns the Service that a slice belongs to; `None` if it belongs to none.
pub fn service_of(slice: &EndpointSlice) -> Option<NamespacedName> {
    let name = slice.metadata.labels.as_ref()?.get(LABEL_SERVICE)?;
    let namespace = slice.metadata.namespace.clone()?;
    (!name.is_empty()).then(|| NamespacedName::new(namespace, name))
}

/// Returns the backends of a slice, ready or not: if policies followed readiness, a flapping probe
/// would break established connections. Slices of host names have none.
pub fn backends(slice: &EndpointSlice) -> Vec<Backend> {
    let ports = || {
        slice.ports.iter().flatten().filter_map(|port| {
            let number = u16::try_from(port.port?).ok()?;
            Some((protocol(port.protocol.as_deref())?, number))
        })
    };
    let addresses = slice.endpoints.iter().flatten().flat_map(|endpoint| {
        let node = ready_on(endpoint);
        let addresses = endpoint.addresses.iter();
        addresses.filter_map(move |address| Some((address.parse().ok()?, node.clone())))
    });
    let mut backends: Vec<Backend> = addresses
        .flat_map(|(address, node): (_, Option<Arc<str>>)| {
            ports().map(move |(protocol, port)| Backend {
                address,
                protocol,
                port,
                ready_on: node.clone(),
            })
        })
        .collect();
    backends.sort();
    backends.dedup();
    backends
}

/// Node of a ready endpoint; one without the condition is ready.
fn ready_on(endpoint: &Endpoint) -> Option<Arc<str>> {
    let ready = endpoint
        .conditions
        .as_ref()
        .and_then(|conditions| conditions.ready);
    let node = endpoint.node_name.as_deref();
    node.filter(|_| ready.unwrap_or(true)).map(Arc::from)
}

/// Returns the addresses of a Service that nodes may announce; `None` if it has none: a headless
/// one, or the name of something outside.
pub fn addresses(service: &Service) -> Option<ServiceAddresses> {
    let spec = service.spec.as_ref()?;
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    if !["ClusterIP", "NodePort", "LoadBalancer"].contains(&kind) {
        return None;
    }
    let cluster_ips = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    let cluster_ips = parse_all(cluster_ips.map(String::as_str));
    if cluster_ips.is_empty() {
        return None;
    }
    let status = service.status.as_ref();
    let ingress = status
        .and_then(|status| status.load_balancer.as_ref()?.ingress.as_deref())
        .unwrap_or_default();
    let assigned = ingress.iter().filter_map(|ingress| ingress.ip.as_deref());
    let requested = spec.load_balancer_ip.as_deref();
    let balanced = assigned.chain(requested).filter(|_| kind == "LoadBalancer");
    Some(ServiceAddresses {
        cluster_ips,
        external_ips: parse_all(spec.external_ips.iter().flatten().map(String::as_str)),
        load_balancer_ips: parse_all(balanced),
        is_local: spec.external_traffic_policy.as_deref() == Some("Local"),
    })
}

fn parse_all<'a>(texts: impl Iterator<Item = &'a str>) -> BTreeSet<IpAddr> {
    texts.filter_map(|text| text.parse().ok()).collect()
}
