//! Rules as they are kept: selectors, named ports and Services are sets, sets are numbers, and a side that demands nothing is not there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

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
    /// The ports of these names and this protocol at what a selector selects, or at anybody.
    NamedPorts(Option<&'a Selector>, Option<Protocol>, &'a [&'a str]),
    /// Addresses of the nodes that a selector selects.
    Nodes(&'a Selector),
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
    source: StoredSide,
    destination: StoredSide,
}

/// What one side of a packet has to meet: only what is demanded takes room, as most rules demand one or two things.
type StoredSide = Box<[Criterion]>;

/// One list of a [`SideMatch`].
#[derive(Debug, PartialEq, Eq)]
enum Criterion {
    Nets(Box<[IpNet]>),
    NotNets(Box<[IpNet]>),
    Sets(Box<[u32]>),
    NotSets(Box<[u32]>),
    Ports(Arc<[PortRange]>),
    PortSet(u32),
    NotPorts(Box<[PortRange]>),
    NotPortSet(u32),
    Service(u32),
}

/// Lists of ports that rules of one policy share: a rule for each of many peers costs the peer.
pub(crate) type Lists = BTreeSet<Arc<[PortRange]>>;

/// Lists of the one set of named ports of a side, by its number, that the records of a policy's rules share.
pub(crate) type SharedSets = BTreeMap<u32, Arc<[SetId]>>;

/// Which side of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// The rule as it is kept. `set` answers every reference with the number of a set; `local` is the side on which the policy's own endpoint
/// stands, and what selects it.
pub(crate) fn store(
    rule: &Rule,
    local: (End, &Selector),
    lists: &mut Lists,
    set: &mut impl FnMut(Reference<'_>) -> u32,
) -> StoredRule {
    let Rule { action, ip_version, protocol, not_protocol, icmp, not_icmp, source, destination } = rule;
    StoredRule {
        action: *action,
        ip_version: *ip_version,
        protocol: *protocol,
        not_protocol: *not_protocol,
        icmp: *icmp,
        not_icmp: *not_icmp,
        source: side(source, (End::Source, local), *protocol, lists, set),
        destination: side(destination, (End::Destination, local), *protocol, lists, set),
    }
}

fn side(
    entity: &EntityMatch,
    (end, local): (End, (End, &Selector)),
    protocol: Option<Protocol>,
    lists: &mut Lists,
    set: &mut impl FnMut(Reference<'_>) -> u32,
) -> StoredSide {
    let EntityMatch { nets, not_nets, selector, not_selector, ports, not_ports, nodes, service } = entity;
    let mut sets: Vec<u32> = Vec::new();
    sets.extend(selector.iter().map(|selector| set(Reference::Selected(selector))));
    sets.extend(nodes.iter().map(|selector| set(Reference::Nodes(selector))));
    let mut service_set = None;
    if let Some(service) = service {
        match end {
            // A packet from a Service carries a backend's address, and a port of the client's choice.
            End::Source => sets.push(set(Reference::ServiceAddresses(service))),
            End::Destination => service_set = Some(set(Reference::Service(service))),
        }
    }
    let not_sets = not_selector.iter().map(|selector| set(Reference::Selected(selector))).collect();
    // Ports of the policy's own endpoint are its own: a set of its kind, not of everybody who has such a port.
    let declared_by = selector.as_ref().or((end == local.0).then_some(local.1));
    let mut named = |ports: &[Port]| -> Option<u32> {
        let names = ports.iter().filter_map(|port| match port {
            Port::Named(name) => Some(name.as_str()),
            Port::Range(_) => None,
        });
        let names: Vec<&str> = names.collect();
        (!names.is_empty()).then(|| set(Reference::NamedPorts(declared_by, protocol, &names)))
    };
    let (port_set, not_port_set) = (named(ports), named(not_ports));
    let criteria = [
        Criterion::Nets(nets.iter().map(IpNet::trunc).collect()),
        Criterion::NotNets(not_nets.iter().map(IpNet::trunc).collect()),
        Criterion::Sets(sets.into()),
        Criterion::NotSets(not_sets),
        Criterion::Ports(shared(lists, ranges(ports))),
        Criterion::NotPorts(ranges(not_ports).into()),
    ];
    let demanded = criteria.into_iter().filter(|criterion| !criterion.is_empty());
    let numbers = [
        port_set.map(Criterion::PortSet),
        not_port_set.map(Criterion::NotPortSet),
        service_set.map(Criterion::Service),
    ];
    demanded.chain(numbers.into_iter().flatten()).collect()
}

/// The list as it is shared.
fn shared(lists: &mut Lists, list: Vec<PortRange>) -> Arc<[PortRange]> {
    if let Some(known) = lists.get(&*list) {
        return known.clone();
    }
    let new: Arc<[PortRange]> = list.into();
    lists.insert(new.clone());
    new
}

fn ranges(ports: &[Port]) -> Vec<PortRange> {
    let ranges = ports.iter().filter_map(|port| match port {
        Port::Range(range) => Some(*range),
        Port::Named(_) => None,
    });
    ranges.collect()
}

impl Criterion {
    fn is_empty(&self) -> bool {
        match self {
            Self::Nets(nets) | Self::NotNets(nets) => nets.is_empty(),
            Self::Sets(sets) | Self::NotSets(sets) => sets.is_empty(),
            Self::Ports(ports) => ports.is_empty(),
            Self::NotPorts(ports) => ports.is_empty(),
            Self::PortSet(_) | Self::NotPortSet(_) | Self::Service(_) => false,
        }
    }
}

impl StoredRule {
    /// The rule as a node sees it. `shared` is for all rules of the policy.
    pub(crate) fn record(&self, id: &impl Fn(u32) -> SetId, shared: &mut SharedSets) -> RuleRecord {
        RuleRecord {
            action: self.action,
            ip_version: self.ip_version,
            protocol: self.protocol,
            not_protocol: self.not_protocol,
            icmp: self.icmp,
            not_icmp: self.not_icmp,
            source: side_record(&self.source, id, shared),
            destination: side_record(&self.destination, id, shared),
        }
    }
}

fn side_record(side: &[Criterion], id: &impl Fn(u32) -> SetId, shared: &mut SharedSets) -> SideMatch {
    let ids = |sets: &[u32]| -> Vec<SetId> { sets.iter().map(|set| id(*set)).collect() };
    let mut record = SideMatch::default();
    for criterion in side {
        match criterion {
            Criterion::Nets(nets) => record.nets = nets.to_vec(),
            Criterion::NotNets(nets) => record.not_nets = nets.to_vec(),
            Criterion::Sets(sets) => record.sets = ids(sets),
            Criterion::NotSets(sets) => record.not_sets = ids(sets),
            Criterion::Ports(ports) => record.ports = ports.clone(),
            Criterion::PortSet(set) => {
                record.port_sets = shared.entry(*set).or_insert_with(|| [id(*set)].into()).clone();
            }
            Criterion::NotPorts(ports) => record.not_ports = ports.to_vec(),
            Criterion::NotPortSet(set) => record.not_port_sets = vec![id(*set)],
            Criterion::Service(set) => record.service_set = Some(id(*set)),
        }
    }
    record
}
