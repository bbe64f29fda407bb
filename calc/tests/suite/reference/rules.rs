//! Converts rules with selectors to rules with sets: the sets that a rule refers to, and the rule
//! as a node gets it.

use std::collections::BTreeSet;

use data_encoding::HEXLOWER;
use ipnet::IpNet;
use margay_api::meta::NamespacedName;
use margay_api::rule::{EntityMatch, Port, PortRange, Protocol, Rule};
use margay_api::selector::Selector;
use sha2::{Digest, Sha256};

use margay_calc::evaluate::Direction;
use margay_calc::model::{RuleRecord, SetId, SetKind, SideMatch};

/// Content of a set. The id is derived from it, so equal content has the same id whichever policy
/// refers to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SetSpec {
    /// Addresses of the endpoints and ranges of the network sets that the selector selects.
    Selected(Selector),
    /// Address, protocol and port of the selected endpoints that declare a port with one of these
    /// names; `None`: of any protocol.
    NamedPorts(Selector, Option<Protocol>, BTreeSet<String>),
    /// Addresses of the nodes that the selector selects.
    Nodes(Selector),
    /// Address, protocol and port of the backends of a Service.
    Service(NamespacedName),
    /// Addresses of the backends of a Service: the source of packets that come from one.
    ServiceAddresses(NamespacedName),
}

impl SetSpec {
    /// Id of the set.
    pub fn id(&self) -> SetId {
        SetId(match self {
            Self::Selected(selector) => selector.id(),
            Self::NamedPorts(selector, protocol, names) => {
                let protocol =
                    protocol.map_or(String::from("any"), |protocol| protocol.0.to_string());
                let names = names
                    .iter()
                    .map(String::as_str)
                    .collect::<Vec<_>>()
                    .join(",");
                let content = format!("n:{},{protocol},{names}", selector.id());
                format!("n:{}", hex(content.as_bytes()))
            }
            Self::Nodes(selector) => {
                format!("nodes:{}", hex(format!("nodes:{selector}").as_bytes()))
            }
            Self::Service(name) => format!("svc:{name}"),
            Self::ServiceAddresses(name) => format!("svcaddr:{name}"),
        })
    }

    /// Type of the members.
    pub fn kind(&self) -> SetKind {
        match self {
            Self::Selected(_) | Self::Nodes(_) | Self::ServiceAddresses(_) => SetKind::Net,
            Self::NamedPorts(..) | Self::Service(_) => SetKind::AddressPort,
        }
    }
}

/// The first 20 bytes of SHA-256, in hexadecimal.
fn hex(content: &[u8]) -> String {
    HEXLOWER.encode(&Sha256::digest(content)[..20])
}

/// The rule as a node gets it. `set` is called with every set that the rule refers to and returns
/// its id.
pub fn resolve(
    rule: &Rule,
    direction: Direction,
    subject: &Selector,
    set: &mut impl FnMut(SetSpec) -> SetId,
) -> RuleRecord {
    let Rule {
        action,
        ip_version,
        protocol,
        not_protocol,
        icmp,
        not_icmp,
        source,
        destination,
    } = rule;
    // On the side of the policy's own endpoint, named ports are those that its subject declares.
    let (local_source, local_destination) = match direction {
        Direction::Ingress => (None, Some(subject)),
        Direction::Egress => (Some(subject), None),
    };
    let mut from = side(source, local_source, *protocol, set);
    from.sets.extend(
        source
            .service
            .clone()
            .map(|name| set(SetSpec::ServiceAddresses(name))),
    );
    let mut to = side(destination, local_destination, *protocol, set);
    to.service_set = destination
        .service
        .clone()
        .map(|name| set(SetSpec::Service(name)));
    RuleRecord {
        action: *action,
        ip_version: *ip_version,
        protocol: *protocol,
        not_protocol: *not_protocol,
        icmp: *icmp,
        not_icmp: *not_icmp,
        source: from,
        destination: to,
    }
}

fn side(
    entity: &EntityMatch,
    local: Option<&Selector>,
    protocol: Option<Protocol>,
    set: &mut impl FnMut(SetSpec) -> SetId,
) -> SideMatch {
    let EntityMatch {
        nets,
        not_nets,
        selector,
        not_selector,
        ports,
        not_ports,
        nodes,
        service: _,
    } = entity;
    // A named port is declared by the selected endpoints; without a selector, by any endpoint.
    let declared_by = || {
        selector
            .as_ref()
            .or(local)
            .cloned()
            .unwrap_or_else(Selector::all)
    };
    let mut named = |ports: &[Port]| -> Option<SetId> {
        let names = ports.iter().filter_map(|port| match port {
            Port::Named(name) => Some(name.clone()),
            Port::Range(_) => None,
        });
        let names: BTreeSet<String> = names.collect();
        (!names.is_empty()).then(|| set(SetSpec::NamedPorts(declared_by(), protocol, names)))
    };
    let (port_sets, not_port_sets) = (named(ports), named(not_ports));
    let mut sets: Vec<SetId> = selector
        .iter()
        .map(|selector| set(SetSpec::Selected(selector.clone())))
        .collect();
    sets.extend(
        nodes
            .iter()
            .map(|selector| set(SetSpec::Nodes(selector.clone()))),
    );
    SideMatch {
        nets: nets.iter().map(IpNet::trunc).collect(),
        not_nets: not_nets.iter().map(IpNet::trunc).collect(),
        sets,
        not_sets: not_selector
            .iter()
            .map(|selector| set(SetSpec::Selected(selector.clone())))
            .collect(),
        ports: ranges(ports).into(),
        port_sets: port_sets.into_iter().collect(),
        not_ports: ranges(not_ports),
        not_port_sets: not_port_sets.into_iter().collect(),
        service_set: None,
    }
}

fn ranges(ports: &[Port]) -> Vec<PortRange> {
    let ranges = ports.iter().filter_map(|port| match port {
        Port::Range(range) => Some(*range),
        Port::Named(_) => None,
    });
    ranges.collect()
}
