//! Endpoint slices as backends of Services.

use k8s_openapi::api::discovery::v1::EndpointSlice;

use crate::endpoint::Backend;
use crate::meta::NamespacedName;

use super::pod::protocol;

/// Label of a slice: its Service.
const LABEL_SERVICE: &str = "kubernetes.io/service-name";

/// The Service that a slice belongs to; `None` for slices of nobody.
pub fn service_of(slice: &EndpointSlice) -> Option<NamespacedName> {
    let name = slice.metadata.labels.as_ref()?.get(LABEL_SERVICE)?;
    let namespace = slice.metadata.namespace.clone()?;
    (!name.is_empty()).then(|| NamespacedName::new(namespace, name))
}

/// Backends in a slice, whether ready or not: a policy does not follow readiness, or connections would break when it flaps.
/// Slices of names instead of addresses have none.
pub fn backends(slice: &EndpointSlice) -> Vec<Backend> {
    let ports = || {
        slice.ports.iter().flatten().filter_map(|port| {
            let number = u16::try_from(port.port?).ok()?;
            Some((protocol(port.protocol.as_deref())?, number))
        })
    };
    let addresses = slice
        .endpoints
        .iter()
        .flatten()
        .flat_map(|endpoint| &endpoint.addresses)
        .filter_map(|address| address.parse().ok());
    let mut backends: Vec<Backend> = addresses
        .flat_map(|address| ports().map(move |(protocol, port)| Backend { address, protocol, port }))
        .collect();
    backends.sort();
    backends.dedup();
    backends
}
