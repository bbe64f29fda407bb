//! Ends of a connection, as a person names them.

use std::net::IpAddr;

use anyhow::{Result, bail};
use margay_api::endpoint::EndpointKey;
use margay_api::meta::NamespacedName;
use margay_api::rule::Protocol;
use margay_calc::explain::Party;

use crate::cluster::Cluster;
use crate::service::ServicePort;
use crate::workload::ClusterPod;

/// Maximal number of edits in a misspelt name.
const MISSPELT: usize = 3;

/// One end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// A pod.
    Pod(EndpointKey),
    /// A Service; as a destination only.
    Service(NamespacedName),
    /// An address.
    Address(IpAddr),
}

/// A packet's destination after the Service's address has been translated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Pod or address.
    pub party: Party,
    /// Protocol.
    pub protocol: String,
    /// Port.
    pub port: u16,
    /// Port of the Service that leads here, if one does.
    pub through: Option<String>,
}

impl End {
    /// Parses `[pod/][NAMESPACE/]NAME`, `svc/[NAMESPACE/]NAME`, `NAME.NAMESPACE.svc` or an address.
    pub fn parse(text: &str, namespace: &str) -> Result<Self> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let parts: Vec<&str> = text.split('/').collect();
        let name = |namespace: &str, name: &str| NamespacedName::new(namespace, name);
        let end = match parts.as_slice() {
            ["svc" | "service", service] => Self::Service(name(namespace, service)),
            ["svc" | "service", within, service] => Self::Service(name(within, service)),
            ["pod", pod] => Self::Pod(name(namespace, pod)),
            ["pod", within, pod] | [within, pod] => Self::Pod(name(within, pod)),
            [dns] if service_name(dns).is_some() => {
                service_name(dns).map_or(Self::Pod(name(namespace, dns)), Self::Service)
            }
            [pod] => Self::Pod(name(namespace, pod)),
            _ => bail!(
                "{text:?}: not an end of a connection; write [pod/]NAMESPACE/NAME, \
                 svc/NAMESPACE/NAME or an IP address"
            ),
        };
        if text.split('/').any(str::is_empty) {
            bail!(
                "{text:?}: a name is missing; write [pod/]NAMESPACE/NAME, svc/NAMESPACE/NAME or an \
                 IP address"
            );
        }
        Ok(end)
    }

    /// Returns it as a source.
    pub fn source(&self, cluster: &Cluster) -> Result<Party> {
        match self {
            Self::Service(name) => {
                bail!("svc/{name}: a Service opens no connections; name one of its pods")
            }
            Self::Address(address) => Ok(Party::Address(address.to_string())),
            Self::Pod(key) => find_pod(cluster, key).map(|_| Party::Pod(key.to_string())),
        }
    }

    /// Returns all destinations that are meant: those of every backend of a Service, and all ports
    /// that a pod declares if none is asked for.
    pub fn destinations(
        &self,
        cluster: &Cluster,
        protocol: Option<&str>,
        port: Option<&str>,
    ) -> Result<Vec<Destination>> {
        match self {
            Self::Service(name) => service_destinations(cluster, name, protocol, port),
            Self::Pod(key) => pod_destinations(key, find_pod(cluster, key)?, protocol, port),
            Self::Address(address) => {
                let party = Party::Address(address.to_string());
                let port = match port {
                    Some(text) => parse_port(text)?,
                    None if is_without_ports(protocol) => 0,
                    None => bail!(
                        "--port: missing; an address does not say which of its ports is meant"
                    ),
                };
                Ok(vec![Destination {
                    party,
                    protocol: protocol.unwrap_or("tcp").to_owned(),
                    port,
                    through: None,
                }])
            }
        }
    }
}

/// Name of a Service by its name in DNS, with or without the cluster's domain.
fn service_name(text: &str) -> Option<NamespacedName> {
    let mut labels = text.split('.');
    let (name, namespace, kind) = (labels.next()?, labels.next()?, labels.next()?);
    (kind == "svc" && !name.is_empty() && !namespace.is_empty())
        .then(|| NamespacedName::new(namespace, name))
}

fn find_pod<'a>(cluster: &'a Cluster, key: &EndpointKey) -> Result<&'a ClusterPod> {
    match cluster.pods.get(key) {
        Some(pod) if pod.endpoint.is_some() => Ok(pod),
        Some(_) => bail!(
            "pod {key} uses its host's network, so policies of pods do not apply to it; ask with \
             the address of its node"
        ),
        None => bail!(
            "there is no pod {key}{}",
            suggestion(&key.to_string(), cluster.pods.keys())
        ),
    }
}

/// `; did you mean ...?` with the most similar name.
fn suggestion<'a>(text: &str, names: impl Iterator<Item = &'a NamespacedName>) -> String {
    let distances = names.map(|name| (strsim::osa_distance(&name.to_string(), text), name));
    let nearest = distances.filter(|(edits, _)| *edits <= MISSPELT).min();
    nearest.map_or_else(
        || "; write NAMESPACE/NAME, or set --namespace".to_owned(),
        |(_, name)| format!("; did you mean {name}?"),
    )
}

fn pod_destinations(
    key: &EndpointKey,
    pod: &ClusterPod,
    protocol: Option<&str>,
    port: Option<&str>,
) -> Result<Vec<Destination>> {
    let destination = |protocol: &str, port: u16| Destination {
        party: Party::Pod(key.to_string()),
        protocol: protocol.to_owned(),
        port,
        through: None,
    };
    let transport = protocol.map(str::to_ascii_lowercase);
    if let Some(text) = port {
        if let Ok(number) = text.parse::<u16>() {
            return Ok(vec![destination(protocol.unwrap_or("tcp"), number)]);
        }
        let ports = pod.endpoint.iter().flat_map(|endpoint| &endpoint.ports);
        let of_protocol = |found: Protocol| {
            transport
                .as_deref()
                .is_none_or(|wanted| wanted == protocol_name(found))
        };
        let named = ports.filter(|port| port.name == text && of_protocol(port.protocol));
        let named: Vec<_> = named
            .map(|port| destination(&protocol_name(port.protocol), port.port))
            .collect();
        if named.is_empty() {
            bail!(
                "--port: {text:?}: pod {key} declares no port of this name; give a number from \
                 1 to 65535"
            );
        }
        return Ok(named);
    }
    if is_without_ports(protocol) {
        return Ok(vec![destination(protocol.unwrap_or_default(), 0)]);
    }
    let declared = pod
        .ports
        .iter()
        .map(|(protocol, port)| (protocol_name(*protocol), *port));
    let declared =
        declared.filter(|(name, _)| transport.as_deref().is_none_or(|wanted| wanted == name));
    let declared: Vec<_> = declared
        .map(|(name, port)| destination(&name, port))
        .collect();
    if declared.is_empty() {
        bail!("--port: missing; pod {key} declares no port of that protocol");
    }
    Ok(declared)
}

fn service_destinations(
    cluster: &Cluster,
    name: &NamespacedName,
    protocol: Option<&str>,
    port: Option<&str>,
) -> Result<Vec<Destination>> {
    let Some(ports) = cluster.services.get(name) else {
        bail!(
            "there is no Service {name}{}",
            suggestion(&name.to_string(), cluster.services.keys())
        );
    };
    let is_meant = |declared: &&ServicePort| {
        let is_port = port
            .is_none_or(|port| port == declared.name || port.parse::<u16>() == Ok(declared.port));
        is_port
            && protocol.is_none_or(|protocol| {
                protocol.eq_ignore_ascii_case(&protocol_name(declared.protocol))
            })
    };
    let meant: Vec<&ServicePort> = ports.iter().filter(is_meant).collect();
    if meant.is_empty() {
        let known: Vec<String> = ports
            .iter()
            .map(|port| format!("{} {}", protocol_name(port.protocol), port.port))
            .collect();
        bail!(
            "Service {name} has no such port; it has {}",
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            }
        );
    }
    let destinations = meant.iter().flat_map(|port| {
        let through = format!("svc/{name} {} {}", protocol_name(port.protocol), port.port);
        let pods = port
            .pods
            .iter()
            .map(|(key, number)| (Party::Pod(key.to_string()), *number));
        let is_pod = |address: IpAddr| cluster.graph.pod_at(address).is_some();
        let others = port
            .backends
            .iter()
            .filter(move |backend| !is_pod(backend.address));
        let others =
            others.map(|backend| (Party::Address(backend.address.to_string()), backend.port));
        pods.chain(others).map(move |(party, number)| Destination {
            party,
            protocol: protocol_name(port.protocol),
            port: number,
            through: Some(through.clone()),
        })
    });
    let destinations: Vec<_> = destinations.collect();
    if destinations.is_empty() {
        bail!(
            "Service {name} has no backends: no pod has the labels of its selector, and no \
             EndpointSlice names any"
        );
    }
    Ok(destinations)
}

fn parse_port(text: &str) -> Result<u16> {
    match text.parse() {
        Ok(port) => Ok(port),
        Err(_) => bail!("--port: {text:?}: must be a number from 0 to 65535"),
    }
}

/// Returns true for protocols that are asked for and have no ports.
fn is_without_ports(protocol: Option<&str>) -> bool {
    protocol.is_some_and(|name| {
        !["tcp", "udp", "sctp", "6", "17", "132"].contains(&name.to_ascii_lowercase().as_str())
    })
}

/// Name of a protocol, as questions have it.
pub fn protocol_name(protocol: Protocol) -> String {
    match protocol {
        Protocol::TCP => "tcp".to_owned(),
        Protocol::UDP => "udp".to_owned(),
        Protocol::SCTP => "sctp".to_owned(),
        Protocol::ICMP => "icmp".to_owned(),
        Protocol::ICMPV6 => "icmpv6".to_owned(),
        Protocol(number) => number.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_parsed() {
        let pod = |namespace: &str, name: &str| Some(End::Pod(EndpointKey::new(namespace, name)));
        let service =
            |namespace: &str, name: &str| Some(End::Service(NamespacedName::new(namespace, name)));
        let cases = [
            ("web", pod("here", "web")),
            ("shop/web", pod("shop", "web")),
            ("pod/web", pod("here", "web")),
            ("pod/svc/web", pod("svc", "web")),
            ("svc/web", service("here", "web")),
            ("service/shop/web", service("shop", "web")),
            ("web.shop.svc", service("shop", "web")),
            ("web.shop.svc.cluster.local", service("shop", "web")),
            ("web.shop", pod("here", "web.shop")),
            ("10.0.0.1", Some(End::Address([10, 0, 0, 1].into()))),
            (
                "fd00::1",
                Some(End::Address("fd00::1".parse().expect("an address"))),
            ),
            ("", None),
            ("a/", None),
            ("/b", None),
            ("a/b/c/d", None),
        ];
        for (text, wanted) in cases {
            assert_eq!(End::parse(text, "here").ok(), wanted, "{text}");
        }
    }
}
