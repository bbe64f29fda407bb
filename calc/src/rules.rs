//! Rules as stored: selectors, named ports and Services become sets, sets become handles, and
//! criteria that are absent use no memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::meta::NamespacedName;
use margay_api::rule::{Action, EntityMatch, Icmp, IpVersion, Port, PortRange, Protocol, Rule};
use margay_api::selector::Selector;

use crate::model::{RuleRecord, SetId, SideMatch};

/// Reference of a rule to a set.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reference<'a> {
    /// Endpoints and network sets that a selector matches.
    Selected(&'a Selector),
    /// Ports with these names and this protocol at the endpoints that a selector matches, or at any
    /// endpoint.
    NamedPorts(Option<&'a Selector>, Option<Protocol>, &'a [&'a str]),
    /// Addresses of the nodes that a selector matches.
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

/// Criteria of one side of a packet; most rules have one or two.
type StoredSide = Box<[Criterion]>;

/// One field of a [`SideMatch`].
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

/// Port lists that rules of one policy share, so that a rule per peer does not cost a list per
/// peer.
pub(crate) type SharedLists = BTreeSet<Arc<[PortRange]>>;

/// Set id of the named ports of a side, as the list that the records of a policy's rules share, by
/// the handle of the set.
pub(crate) type SharedSets = BTreeMap<u32, Arc<[SetId]>>;

/// Side of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// Converts a rule to its stored form. `set` returns the handle of the set for a reference; `local`
/// is the side of the policy's own endpoint, and its selector.
pub(crate) fn store_rule(
    rule: &Rule,
    local: (Side, &Selector),
    lists: &mut SharedLists,
    set: &mut impl FnMut(Reference<'_>) -> u32,
) -> StoredRule {
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
    StoredRule {
        action: *action,
        ip_version: *ip_version,
        protocol: *protocol,
        not_protocol: *not_protocol,
        icmp: *icmp,
        not_icmp: *not_icmp,
        source: side(source, (Side::Source, local), *protocol, lists, set),
        destination: side(
            destination,
            (Side::Destination, local),
            *protocol,
            lists,
            set,
        ),
    }
}

fn side(
    entity: &EntityMatch,
    (end, local): (Side, (Side, &Selector)),
    protocol: Option<Protocol>,
    lists: &mut SharedLists,
    set: &mut impl FnMut(Reference<'_>) -> u32,
) -> StoredSide {
    let EntityMatch {
        nets,
        not_nets,
        selector,
        not_selector,
        ports,
        not_ports,
        nodes,
        service,
    } = entity;
    let mut sets: Vec<u32> = Vec::new();
    sets.extend(
        selector
            .iter()
            .map(|selector| set(Reference::Selected(selector))),
    );
    sets.extend(nodes.iter().map(|selector| set(Reference::Nodes(selector))));
    let mut service_set = None;
    if let Some(service) = service {
        match end {
            // A packet from a Service has a backend's address, but a source port of the client's
            // choice.
            Side::Source => sets.push(set(Reference::ServiceAddresses(service))),
            Side::Destination => service_set = Some(set(Reference::Service(service))),
        }
    }
    let not_sets = not_selector
        .iter()
        .map(|selector| set(Reference::Selected(selector)))
        .collect();
    // A named port of the policy's own endpoint is one that its subject declares, not one that any
    // endpoint declares.
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
    let demanded = criteria
        .into_iter()
        .filter(|criterion| !criterion.is_empty());
    let of_handles = [
        port_set.map(Criterion::PortSet),
        not_port_set.map(Criterion::NotPortSet),
        service_set.map(Criterion::Service),
    ];
    demanded.chain(of_handles.into_iter().flatten()).collect()
}

/// Returns the shared copy of the list.
fn shared(lists: &mut SharedLists, list: Vec<PortRange>) -> Arc<[PortRange]> {
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
    /// Converts to the form that nodes get. `shared` is common to all rules of the policy.
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

fn side_record(
    side: &[Criterion],
    id: &impl Fn(u32) -> SetId,
    shared: &mut SharedSets,
) -> SideMatch {
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
                record.port_sets = shared
                    .entry(*set)
                    .or_insert_with(|| [id(*set)].into())
                    .clone();
            }
            Criterion::NotPorts(ports) => record.not_ports = ports.to_vec(),
            Criterion::NotPortSet(set) => record.not_port_sets = vec![id(*set)],
            Criterion::Service(set) => record.service_set = Some(id(*set)),
        }
    }
    record
}
