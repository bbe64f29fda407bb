//! Rules as they are kept: selectors, named ports and Services are sets, sets are numbers, and a side that demands nothing is not there.

use ipnet::IpNet;
use margay_api::meta::NamespacedName;
use margay_api::rule::{Action, EntityMatch, Icmp, IpVersion, Port, PortRange, Protocol, Rule};
use margay_api::selector::Selector;

use crate::model::{RuleRecord, SetId, SideMatch};

/// What a rule refers to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reference<'a> {
    /// What a selector selects.
    Selected(&'a Selector),
    /// The port of this name and protocol at what a selector selects, or at anybody.
    NamedPort(Option<&'a Selector>, Option<Protocol>, &'a str),
    /// Backends of a Service.
    Service(&'a NamespacedName),
    /// Addresses of the backends of a Service.
    ServiceAddresses(&'a NamespacedName),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StoredRule {
    action: Action,
    ip_version: Option<IpVersion>,
    protocol: Option<Protocol>,
    not_protocol: Option<Protocol>,
    icmp: Option<Icmp>,
    not_icmp: Option<Icmp>,
    source: Option<Box<StoredSide>>,
    destination: Option<Box<StoredSide>>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct StoredSide {
    nets: Box<[IpNet]>,
    not_nets: Box<[IpNet]>,
    sets: Box<[u32]>,
    not_sets: Box<[u32]>,
    ports: Box<[PortRange]>,
    port_sets: Box<[u32]>,
    not_ports: Box<[PortRange]>,
    not_port_sets: Box<[u32]>,
    service_set: Option<u32>,
}

/// The rule as it is kept. `set` answers every reference with the number of a set.
pub(crate) fn store(rule: &Rule, set: &mut impl FnMut(Reference<'_>) -> u32) -> StoredRule {
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
    let mut from = side(source, *protocol, set);
    // A packet from a Service carries a backend's address, and a port of the client's choice.
    if let Some(service) = &source.service {
        let mut sets = from.sets.into_vec();
        sets.push(set(Reference::ServiceAddresses(service)));
        from.sets = sets.into();
    }
    let mut to = side(destination, *protocol, set);
    to.service_set = destination
        .service
        .as_ref()
        .map(|service| set(Reference::Service(service)));
    let kept = |side: StoredSide| (side != StoredSide::default()).then(|| Box::new(side));
    StoredRule {
        action: *action,
        ip_version: *ip_version,
        protocol: *protocol,
        not_protocol: *not_protocol,
        icmp: *icmp,
        not_icmp: *not_icmp,
        source: kept(from),
        destination: kept(to),
    }
}

fn side(
    entity: &EntityMatch,
    protocol: Option<Protocol>,
    set: &mut impl FnMut(Reference<'_>) -> u32,
) -> StoredSide {
    let EntityMatch {
        nets,
        not_nets,
        selector,
        not_selector,
        ports,
        not_ports,
        service: _,
    } = entity;
    let mut named = |ports: &[Port]| -> Box<[u32]> {
        let names = ports.iter().filter_map(|port| match port {
            Port::Named(name) => Some(name.as_str()),
            Port::Range(_) => None,
        });
        names
            .map(|name| set(Reference::NamedPort(selector.as_ref(), protocol, name)))
            .collect()
    };
    let (port_sets, not_port_sets) = (named(ports), named(not_ports));
    let mut selected = |selector: &Option<Selector>| {
        selector
            .iter()
            .map(|selector| set(Reference::Selected(selector)))
            .collect()
    };
    StoredSide {
        nets: nets.iter().map(IpNet::trunc).collect(),
        not_nets: not_nets.iter().map(IpNet::trunc).collect(),
        sets: selected(selector),
        not_sets: selected(not_selector),
        ports: ranges(ports),
        port_sets,
        not_ports: ranges(not_ports),
        not_port_sets,
        service_set: None,
    }
}

fn ranges(ports: &[Port]) -> Box<[PortRange]> {
    let ranges = ports.iter().filter_map(|port| match port {
        Port::Range(range) => Some(*range),
        Port::Named(_) => None,
    });
    ranges.collect()
}

impl StoredRule {
    /// The rule as a node sees it.
    pub(crate) fn record(&self, id: &impl Fn(u32) -> SetId) -> RuleRecord {
        let side = |side: &Option<Box<StoredSide>>| {
            side.as_ref()
                .map(|side| side.record(id))
                .unwrap_or_default()
        };
        RuleRecord {
            action: self.action,
            ip_version: self.ip_version,
            protocol: self.protocol,
            not_protocol: self.not_protocol,
            icmp: self.icmp,
            not_icmp: self.not_icmp,
            source: side(&self.source),
            destination: side(&self.destination),
        }
    }
}

impl StoredSide {
    fn record(&self, id: &impl Fn(u32) -> SetId) -> SideMatch {
        let ids = |sets: &[u32]| sets.iter().map(|set| id(*set)).collect();
        SideMatch {
            nets: self.nets.to_vec(),
            not_nets: self.not_nets.to_vec(),
            sets: ids(&self.sets),
            not_sets: ids(&self.not_sets),
            ports: self.ports.to_vec(),
            port_sets: ids(&self.port_sets),
            not_ports: self.not_ports.to_vec(),
            not_port_sets: ids(&self.not_port_sets),
            service_set: self.service_set.map(id),
        }
    }
}
