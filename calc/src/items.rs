//! Endpoints and network sets as stored: the members that they contribute to sets, and the
//! endpoints of each node.
//!
//! Pods and host endpoints share a type; their differences are in [`EndpointName`] and
//! [`Attachment`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, HostEndpoint, HostInterface, NamedPort, WorkloadEndpoint};
use margay_api::rule::Protocol;

use crate::flush::{Change, Flush};
use crate::index::ParentName;
use crate::interner::{Interner, Marks, NamePair, Symbol};
use crate::model::{HostInterfaces, Member, RecordId};
use crate::port_names::PortNames;
use crate::refcount::transition;
use crate::sets::{SetSpec, address};
use crate::store::{Column, Map};

/// Identity of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum EndpointName {
    /// A pod by namespace and name.
    Pod(Symbol, Symbol),
    /// A host endpoint.
    Host(Symbol),
}

/// Kind of endpoint, as far as policies distinguish them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    Workload,
    Host,
}

/// Value of an item: what it contributes to the sets that match it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Payload {
    Endpoint(Endpoint),
    NetworkSet(Box<[IpNet]>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) name: EndpointName,
    /// `None`: on no node, so its record is sent to none.
    pub(crate) node: Option<Symbol>,
    pub(crate) attachment: Attachment,
    pub(crate) addresses: Box<[IpAddr]>,
    pub(crate) ports: Box<[(Symbol, Protocol, u16)]>,
}

/// Where the endpoint's packets pass, and what decides those that no policy decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attachment {
    /// Host side interface of a pod's veth pair, and the pod's uid; the profile of its namespace
    /// decides.
    Pod(Box<str>, Box<str>),
    Host(Box<Host>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) interfaces: HostInterfaces,
    pub(crate) profiles: Box<[StoredProfile]>,
}

/// Decides packets of a host endpoint that no policy decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoredProfile {
    Allow,
    Deny,
    /// A namespace, or a service account.
    Of(ParentName),
}

impl StoredProfile {
    fn mark(&self, marks: &mut Marks) {
        if let Self::Of((namespace, account)) = *self {
            marks.mark(namespace);
            marks.mark_all(account);
        }
    }
}

impl Endpoint {
    pub(crate) fn pod(key: NamePair, endpoint: &WorkloadEndpoint, interner: &mut Interner) -> Self {
        Self {
            name: EndpointName::Pod(key.0, key.1),
            node: node(&endpoint.node, interner),
            attachment: Attachment::Pod(
                endpoint.interface.as_str().into(),
                endpoint.uid.as_str().into(),
            ),
            addresses: endpoint.addresses.as_slice().into(),
            ports: ports(&endpoint.ports, interner),
        }
    }

    pub(crate) fn host(
        name: Symbol,
        endpoint: &HostEndpoint,
        profiles: Box<[StoredProfile]>,
        interner: &mut Interner,
    ) -> Self {
        let interfaces = match &endpoint.interface {
            HostInterface::All => HostInterfaces::All,
            HostInterface::Named(name) => HostInterfaces::Named(name.clone()),
            HostInterface::ByAddress => {
                HostInterfaces::WithAddress(endpoint.addresses.iter().copied().collect())
            }
        };
        Self {
            name: EndpointName::Host(name),
            node: node(&endpoint.node, interner),
            attachment: Attachment::Host(Box::new(Host {
                interfaces,
                profiles,
            })),
            addresses: endpoint.addresses.as_slice().into(),
            ports: ports(&endpoint.ports, interner),
        }
    }

    pub(crate) fn subject(&self) -> Subject {
        match self.name {
            EndpointName::Pod(..) => Subject::Workload,
            EndpointName::Host(_) => Subject::Host,
        }
    }
}

fn node(name: &str, interner: &mut Interner) -> Option<Symbol> {
    (!name.is_empty()).then(|| interner.intern(name))
}

fn ports(ports: &[NamedPort], interner: &mut Interner) -> Box<[(Symbol, Protocol, u16)]> {
    ports
        .iter()
        .map(|port| (interner.intern(&port.name), port.protocol, port.port))
        .collect()
}

impl EndpointName {
    /// Id of the endpoint's record.
    pub(crate) fn id(self, interner: &Interner) -> RecordId {
        match self {
            Self::Pod(namespace, name) => RecordId::Endpoint(EndpointKey::new(
                interner.get(namespace),
                interner.get(name),
            )),
            Self::Host(name) => RecordId::HostEndpoint(interner.get(name).to_owned()),
        }
    }

    fn mark(self, marks: &mut Marks) {
        match self {
            Self::Pod(namespace, name) => marks.mark_all([namespace, name]),
            Self::Host(name) => marks.mark(name),
        }
    }
}

impl Payload {
    pub(crate) fn node(&self) -> Option<Symbol> {
        match self {
            Self::Endpoint(endpoint) => endpoint.node,
            Self::NetworkSet(_) => None,
        }
    }

    /// Kind of endpoint for policies that select the item; `None` for network sets.
    pub(crate) fn subject(&self) -> Option<Subject> {
        match self {
            Self::Endpoint(endpoint) => Some(endpoint.subject()),
            Self::NetworkSet(_) => None,
        }
    }

    /// Calls `visit` with every member that the item contributes to a set with this content, as
    /// often as it contributes it.
    pub(crate) fn members(
        &self,
        spec: SetSpec,
        port_names: &PortNames,
        mut visit: impl FnMut(Member),
    ) {
        match (self, spec) {
            (Self::Endpoint(endpoint), SetSpec::Selected(_)) => {
                endpoint.addresses.iter().for_each(|ip| visit(address(*ip)));
            }
            (Self::NetworkSet(nets), SetSpec::Selected(_)) => {
                nets.iter().for_each(|net| visit(Member::Net(*net)))
            }
            (Self::Endpoint(endpoint), SetSpec::NamedPorts(_, protocol, names)) => {
                let declared = endpoint.ports.iter().filter(|port| {
                    protocol.is_none_or(|protocol| protocol == port.1)
                        && port_names.contains(names, port.0)
                });
                for (_, protocol, port) in declared {
                    endpoint
                        .addresses
                        .iter()
                        .for_each(|ip| visit(Member::AddressPort(*ip, *protocol, *port)));
                }
            }
            (Self::NetworkSet(_), SetSpec::NamedPorts(..))
            | (_, SetSpec::Nodes(_) | SetSpec::Service(..) | SetSpec::ServiceAddresses(..)) => {}
        }
    }
}

/// All endpoints and network sets, by item of the index.
#[derive(Debug, Default)]
pub(crate) struct Items {
    payloads: Column<Payload>,
    endpoints: Map<EndpointName, u32>,
    network_sets: Map<NamePair, u32>,
    by_node: Map<Symbol, BTreeSet<u32>>,
    /// Endpoints whose record exists, with node and digest as last flushed.
    sent: Map<EndpointName, (Symbol, u64)>,
    dirty: BTreeSet<EndpointName>,
}

impl Items {
    pub(crate) fn find_endpoint(&self, name: EndpointName) -> Option<u32> {
        self.endpoints.get(&name).copied()
    }

    pub(crate) fn find_network_set(&self, key: NamePair) -> Option<u32> {
        self.network_sets.get(&key).copied()
    }

    pub(crate) fn name_network_set(&mut self, key: NamePair, item: u32) {
        self.network_sets.insert(key, item);
    }

    pub(crate) fn forget_network_set(&mut self, key: NamePair) {
        self.network_sets.remove(&key);
    }

    pub(crate) fn get(&self, item: u32) -> Option<&Payload> {
        self.payloads.get(item)
    }

    /// Sets or removes the payload of an item. Returns the previous one.
    pub(crate) fn put(&mut self, item: u32, payload: Option<Payload>) -> Option<Payload> {
        let node = payload.as_ref().and_then(Payload::node);
        if let Some(Payload::Endpoint(endpoint)) = &payload {
            self.endpoints.insert(endpoint.name, item);
            self.dirty.insert(endpoint.name);
        }
        let is_gone = payload.is_none();
        let before = self.payloads.put(item, payload);
        if let Some(Payload::Endpoint(endpoint)) = &before {
            self.dirty.insert(endpoint.name);
            if is_gone {
                self.endpoints.remove(&endpoint.name);
            }
        }
        let was = before.as_ref().and_then(Payload::node);
        if was != node {
            if let Some(was) = was
                && let Some(items) = self.by_node.get_mut(&was)
            {
                items.remove(&item);
                if items.is_empty() {
                    self.by_node.remove(&was);
                }
            }
            if let Some(node) = node {
                self.by_node.entry(node).or_default().insert(item);
            }
        }
        before
    }

    /// Marks the endpoint's record dirty.
    pub(crate) fn mark_dirty(&mut self, item: u32) {
        if let Some(Payload::Endpoint(endpoint)) = self.payloads.get(item) {
            self.dirty.insert(endpoint.name);
        }
    }

    pub(crate) fn on_node(&self, node: Symbol) -> impl Iterator<Item = u32> {
        self.by_node.get(&node).into_iter().flatten().copied()
    }

    /// Host endpoints of nodes for which `is_known` is false, with the node.
    pub(crate) fn hosts_not_on(
        &self,
        is_known: impl Fn(Symbol) -> bool,
    ) -> impl Iterator<Item = (Symbol, Symbol)> {
        let elsewhere = self
            .by_node
            .iter()
            .filter(move |(node, _)| !is_known(**node));
        let items =
            elsewhere.flat_map(|(node, items)| items.iter().map(move |item| (*node, *item)));
        items.filter_map(|(node, item)| match self.payloads.get(item)? {
            Payload::Endpoint(Endpoint {
                name: EndpointName::Host(name),
                ..
            }) => Some((*name, node)),
            _ => None,
        })
    }

    /// Adds what changed to the flush. `digest` computes the digest of an endpoint's record.
    pub(crate) fn flush(
        &mut self,
        flush: &mut Flush,
        interner: &Interner,
        digest: impl Fn(u32, &Endpoint, &RecordId) -> u64,
    ) {
        for name in std::mem::take(&mut self.dirty) {
            let id = name.id(interner);
            let item = self.endpoints.get(&name).copied();
            let now = item.and_then(|item| match self.payloads.get(item)? {
                Payload::Endpoint(endpoint) => Some((endpoint.node?, digest(item, endpoint, &id))),
                Payload::NetworkSet(_) => None,
            });
            let sent = self.sent.get(&name).copied();
            if now == sent {
                continue;
            }
            let was: Vec<Symbol> = sent.iter().map(|(node, _)| *node).collect();
            let is: Vec<Symbol> = now.iter().map(|(node, _)| *node).collect();
            if let Some(change) = transition(&was, &is, Change::Value, interner) {
                flush.records.insert(id, change);
            }
            match now {
                Some(now) => self.sent.insert(name, now),
                None => self.sent.remove(&name),
            };
        }
    }

    /// Endpoints whose record exists, in no order.
    pub(crate) fn names(&self) -> impl Iterator<Item = EndpointName> {
        self.sent.keys().copied()
    }

    /// Pods that have the address, in no order.
    pub(crate) fn pods_at(&self, address: IpAddr) -> impl Iterator<Item = EndpointName> {
        let pods = self
            .payloads
            .values()
            .filter_map(move |payload| match payload {
                Payload::Endpoint(pod)
                    if pod.subject() == Subject::Workload && pod.addresses.contains(&address) =>
                {
                    Some(pod.name)
                }
                _ => None,
            });
        pods.filter(|name| self.sent.contains_key(name))
    }

    pub(crate) fn sent(&self, name: EndpointName) -> Option<(Symbol, u64)> {
        self.sent.get(&name).copied()
    }

    /// Marks the symbols in use.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for payload in self.payloads.values() {
            if let Payload::Endpoint(endpoint) = payload {
                endpoint.name.mark(marks);
                marks.mark_all(endpoint.node);
                marks.mark_all(endpoint.ports.iter().map(|port| port.0));
                if let Attachment::Host(host) = &endpoint.attachment {
                    host.profiles.iter().for_each(|profile| profile.mark(marks));
                }
            }
        }
        for (namespace, name) in self.network_sets.keys() {
            marks.mark_all([*namespace, *name]);
        }
        self.dirty.iter().for_each(|name| name.mark(marks));
        for (name, (node, _)) in &self.sent {
            name.mark(marks);
            marks.mark(*node);
        }
    }
}
