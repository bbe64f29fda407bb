//! Conversion of pods to workload endpoints.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::endpoint::{EndpointKey, NamedPort, WorkloadEndpoint, interface_name};
use crate::meta::{
    ANNOTATION_POD_IP, ANNOTATION_POD_IPS, LABEL_NAMESPACE, LABEL_ORCHESTRATOR,
    LABEL_SERVICE_ACCOUNT, Labels, without_reserved,
};
use crate::rule::Protocol;

/// Annotation of the mirror pod of a static pod: the uid that kubelet uses.
const ANNOTATION_MIRROR: &str = "kubernetes.io/config.mirror";
/// Value of the orchestrator label of pods.
pub const ORCHESTRATOR: &str = "k8s";
/// Names of service accounts of at least this length are not put into a label, because label values
/// are shorter (Kubernetes: 63).
const MAX_ACCOUNT_LABEL: usize = 63;

/// Converts a pod; `None` if it uses the host's network or is not scheduled yet.
pub fn workload_endpoint(pod: &Pod) -> Option<(EndpointKey, WorkloadEndpoint)> {
    let spec = pod.spec.as_ref()?;
    let node = spec.node_name.clone().filter(|node| !node.is_empty())?;
    if spec.host_network == Some(true) {
        return None;
    }
    let key = EndpointKey::new(pod.metadata.namespace.clone()?, pod.metadata.name.clone()?);
    let service_account = spec.service_account_name.clone().unwrap_or_default();
    let addresses = if is_finished(pod) {
        vec![]
    } else {
        addresses(pod)
    };
    let containers = spec.init_containers.iter().flatten();
    let endpoint = WorkloadEndpoint {
        labels: labels(pod, &key, &service_account),
        ports: named_ports(containers.chain(&spec.containers)),
        uid: uid(pod),
        interface: interface_name(&key),
        node,
        service_account,
        addresses,
    };
    Some((key, endpoint))
}

/// Returns the uid that kubelet passes to the container runtime. For a static pod that is the hash
/// of its file; the object in the API is a mirror with a uid of its own.
fn uid(pod: &Pod) -> String {
    let mirrored = annotation(pod, ANNOTATION_MIRROR)
        .filter(|uid| !uid.is_empty())
        .map(str::to_owned);
    mirrored
        .or_else(|| pod.metadata.uid.clone())
        .unwrap_or_default()
}

/// Returns the pod's labels and those that identify it; the latter are ours, whatever a user wrote
/// there.
fn labels(pod: &Pod, key: &EndpointKey, service_account: &str) -> Labels {
    let mut labels = without_reserved(pod.metadata.labels.iter().flatten());
    labels.insert(LABEL_NAMESPACE.to_owned(), key.namespace.clone());
    labels.insert(LABEL_ORCHESTRATOR.to_owned(), ORCHESTRATOR.to_owned());
    if !service_account.is_empty() && service_account.len() < MAX_ACCOUNT_LABEL {
        labels.insert(LABEL_SERVICE_ACCOUNT.to_owned(), service_account.to_owned());
    }
    labels
}

/// A finished pod keeps its object but not its addresses: another pod may have them.
fn is_finished(pod: &Pod) -> bool {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let released = annotation(pod, ANNOTATION_POD_IP).is_some_and(str::is_empty);
    matches!(phase, Some("Succeeded" | "Failed" | "Completed"))
        || (pod.metadata.deletion_timestamp.is_some() && released)
}

/// Kubelet's report takes precedence. Annotations, which are written as soon as an address is
/// assigned, count until then: users may be able to write them, and must not give a running pod the
/// address of another one. The report of the pod's own node overrides both, in typha.
fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let reported = reported(pod);
    if !reported.is_empty() {
        return reported;
    }
    let annotated = [ANNOTATION_POD_IPS, ANNOTATION_POD_IP]
        .into_iter()
        .filter_map(|name| annotation(pod, name))
        .map(|text| text.split(',').filter_map(address).collect::<Vec<_>>());
    { annotated }
        .find(|addresses| !addresses.is_empty())
        .unwrap_or_default()
}

fn reported(pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else {
        return Vec::new();
    };
    let many: Vec<IpAddr> = status
        .pod_ips
        .iter()
        .flatten()
        .filter_map(|entry| address(&entry.ip))
        .collect();
    if many.is_empty() {
        status
            .pod_ip
            .as_deref()
            .and_then(address)
            .into_iter()
            .collect()
    } else {
        many
    }
}

fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let annotations = pod.metadata.annotations.as_ref()?;
    annotations.get(name).map(String::as_str)
}

/// Parses an address with or without a prefix length.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let address = text.split_once('/').map_or(text, |(address, _)| address);
    address.parse().ok()
}

fn named_ports<'a>(containers: impl Iterator<Item = &'a Container>) -> Vec<NamedPort> {
    let named = |port: &k8s_openapi::api::core::v1::ContainerPort| {
        Some(NamedPort {
            name: port.name.clone().filter(|name| !name.is_empty())?,
            protocol: protocol(port.protocol.as_deref())?,
            port: u16::try_from(port.container_port)
                .ok()
                .filter(|port| *port > 0)?,
        })
    };
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    let mut ports: Vec<NamedPort> = ports.filter_map(named).collect();
    ports.sort();
    ports.dedup();
    ports
}

/// Parses a transport protocol by its name in Kubernetes; TCP if there is none.
pub(super) fn protocol(name: Option<&str>) -> Option<Protocol> {
    match name.unwrap_or("TCP") {
        "" | "TCP" => Some(Protocol::TCP),
        "UDP" => Some(Protocol::UDP),
        "SCTP" => Some(Protocol::SCTP),
        _ => None,
    }
}
