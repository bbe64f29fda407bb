//! Services: which pods are behind them, from their EndpointSlices or, where there are none, from
//! their selectors.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{self, Service};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use margay_api::endpoint::{EndpointKey, WorkloadEndpoint};
use margay_api::meta::NamespacedName;
use margay_api::rule::Protocol;
use margay_calc::update::{Backend, Update};

use crate::objects::{Content, Objects};
use crate::workload::{self, ClusterPod};

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty if it has none.
    pub name: String,
    /// Port of the Service.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// Pods behind it, with the port of each.
    pub pods: Vec<(EndpointKey, u16)>,
    /// Their addresses and ports, and those of backends that are no pods.
    pub backends: BTreeSet<Backend>,
}

/// Backends of each Service, as EndpointSlices have them.
pub type Slices = BTreeMap<NamespacedName, BTreeSet<Backend>>;

/// Merges the EndpointSlices of each Service.
pub fn slices(objects: &Objects) -> Slices {
    let mut merged = Slices::new();
    for object in objects.known.values() {
        if let Content::Ingested(ingested) = &object.content
            && let Some(Update::Service(service, Some(backends))) = &ingested.update
        {
            merged
                .entry(service.clone())
                .or_default()
                .extend(backends.iter().cloned());
        }
    }
    merged
}

/// Ports of every Service with the pods behind them.
pub fn services(
    objects: &Objects,
    pods: &BTreeMap<EndpointKey, ClusterPod>,
    slices: &Slices,
) -> BTreeMap<NamespacedName, Vec<ServicePort>> {
    let owners: BTreeMap<IpAddr, &EndpointKey> = pods
        .iter()
        .flat_map(|(key, pod)| {
            pod.endpoint
                .iter()
                .flat_map(move |end| end.addresses.iter().map(move |a| (*a, key)))
        })
        .collect();
    let services = objects
        .known
        .iter()
        .filter_map(|(name, object)| match &object.content {
            Content::Service(service) => Some((
                NamespacedName::new(name.namespace.as_str(), name.name.as_str()),
                service,
            )),
            _ => None,
        });
    services
        .map(|(name, service)| {
            let ports = match slices.get(&name) {
                Some(backends) => from_slices(service, backends, &owners),
                None => from_selector(&name.namespace, service, pods),
            };
            (name, ports)
        })
        .collect()
}

/// Updates of the graph: what slices say, and for Services without any what their selectors say.
pub fn updates(
    services: &BTreeMap<NamespacedName, Vec<ServicePort>>,
    slices: Slices,
) -> Vec<Update> {
    let mut backends = slices;
    for (name, ports) in services {
        let own = ports.iter().flat_map(|port| port.backends.iter().cloned());
        if !backends.contains_key(name) {
            backends.insert(name.clone(), own.collect());
        }
    }
    backends
        .into_iter()
        .map(|(name, backends)| Update::Service(name, Some(backends.into_iter().collect())))
        .collect()
}

/// Slices do not say which port of the Service a backend is for, so one without a number of its own
/// is taken for all of its protocol.
fn from_slices(
    service: &Service,
    backends: &BTreeSet<Backend>,
    owners: &BTreeMap<IpAddr, &EndpointKey>,
) -> Vec<ServicePort> {
    let ports = declared(service);
    let numbers: BTreeMap<(Protocol, u16), usize> = ports
        .iter()
        .enumerate()
        .filter_map(|(index, (port, target))| match target {
            Target::Number(number) => Some(((port.protocol, *number), index)),
            Target::Name(_) => None,
        })
        .collect();
    let mut ports: Vec<ServicePort> = ports.into_iter().map(|(port, _)| port).collect();
    for backend in backends {
        let known = numbers.get(&(backend.protocol, backend.port)).copied();
        for (index, port) in ports.iter_mut().enumerate() {
            let is_of = known.map_or(
                port.protocol == backend.protocol && !numbers.values().any(|i| *i == index),
                |known| known == index,
            );
            if is_of {
                port.backends.insert(backend.clone());
                port.pods.extend(
                    owners
                        .get(&backend.address)
                        .map(|key| ((*key).clone(), backend.port)),
                );
            }
        }
    }
    ports.iter_mut().for_each(|port| port.pods.sort());
    ports.iter_mut().for_each(|port| port.pods.dedup());
    ports
}

fn from_selector(
    namespace: &str,
    service: &Service,
    pods: &BTreeMap<EndpointKey, ClusterPod>,
) -> Vec<ServicePort> {
    let selector = service
        .spec
        .as_ref()
        .and_then(|spec| spec.selector.as_ref())
        .filter(|selector| !selector.is_empty());
    let is_selected = |endpoint: &WorkloadEndpoint| {
        selector.is_some_and(|selector| {
            selector
                .iter()
                .all(|(key, value)| endpoint.labels.get(key) == Some(value))
        })
    };
    let mut ports = declared(service);
    for (key, pod) in pods.iter().filter(|(key, _)| key.namespace == namespace) {
        let Some(endpoint) = pod
            .endpoint
            .as_ref()
            .filter(|endpoint| is_selected(endpoint))
        else {
            continue;
        };
        for (port, target) in &mut ports {
            let Some(number) = target.resolve(endpoint, port.protocol) else {
                continue;
            };
            let backend = |address: &IpAddr| Backend {
                address: *address,
                protocol: port.protocol,
                port: number,
                ready_on: Some(endpoint.node.as_str().into()),
            };
            port.backends.extend(endpoint.addresses.iter().map(backend));
            port.pods.push((key.clone(), number));
        }
    }
    ports.into_iter().map(|(port, _)| port).collect()
}

/// Port of a backend.
enum Target {
    Number(u16),
    Name(String),
}

impl Target {
    fn of(port: &v1::ServicePort) -> Option<Self> {
        match &port.target_port {
            None | Some(IntOrString::Int(0)) => u16::try_from(port.port).ok().map(Self::Number),
            Some(IntOrString::Int(number)) => u16::try_from(*number).ok().map(Self::Number),
            Some(IntOrString::String(name)) => Some(
                name.parse()
                    .map_or_else(|_| Self::Name(name.clone()), Self::Number),
            ),
        }
    }

    fn resolve(&self, endpoint: &WorkloadEndpoint, protocol: Protocol) -> Option<u16> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Name(name) => {
                let mut ports = endpoint.ports.iter();
                ports
                    .find(|port| port.protocol == protocol && port.name == *name)
                    .map(|port| port.port)
            }
        }
    }
}

/// Ports of a Service, without backends yet.
fn declared(service: &Service) -> Vec<(ServicePort, Target)> {
    let ports = service
        .spec
        .iter()
        .flat_map(|spec| spec.ports.iter().flatten());
    let declared = ports.filter_map(|port| {
        let declared = ServicePort {
            name: port.name.clone().unwrap_or_default(),
            port: u16::try_from(port.port).ok()?,
            protocol: workload::protocol(port.protocol.as_deref())?,
            pods: Vec::new(),
            backends: BTreeSet::new(),
        };
        Some((declared, Target::of(port)?))
    });
    declared.collect()
}
