//! Conversion of EndpointSlices to backends of Services.

use k8s_openapi::api::discovery::v1::EndpointSlice;

use crate::endpoint::Backend;
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
    let addresses = slice
        .endpoints
        .iter()
        .flatten()
        .flat_map(|endpoint| &endpoint.addresses)
        .filter_map(|address| address.parse().ok());
    let mut backends: Vec<Backend> = addresses
        .flat_map(|address| {
            ports().map(move |(protocol, port)| Backend {
                address,
                protocol,
                port,
            })
        })
        .collect();
    backends.sort();
    backends.dedup();
    backends
}
