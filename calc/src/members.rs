//! Endpoints and network sets as objects: what they add to sets, and the endpoints of each node.
//!
//! Pods and host endpoints are endpoints alike; what tells them apart is in their [`Name`] and [`Attachment`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, HostEndpoint, HostInterface, NamedPort, WorkloadEndpoint};
use margay_api::rule::Protocol;

use crate::counts::transition;
use crate::flush::{Change, Flush};
use crate::index::ParentName;
use crate::model::{HostInterfaces, Member, RecordId};
use crate::port_names::PortNames;
use crate::sets::{Spec, address};
use crate::store::{Column, Map};
use crate::texts::{Marks, Text, Texts};

/// Identity of a network set: namespace and name.
pub(crate) type Key = (Text, Text);

/// Identity of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Name {
    /// A pod by namespace and name.
    Pod(Text, Text),
    /// A host endpoint.
    Host(Text),
}

/// What policies tell apart in endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    Workload,
    Host,
}

/// What an item adds to the sets that hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Payload {
    Endpoint(Endpoint),
    NetworkSet(Box<[IpNet]>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) name: Name,
    /// None: on no node, so no node is told of it.
    pub(crate) node: Option<Text>,
    pub(crate) attachment: Attachment,
    pub(crate) addresses: Box<[IpAddr]>,
    pub(crate) ports: Box<[(Text, Protocol, u16)]>,
}

/// Where packets pass an endpoint, and who decides where no policy does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attachment {
    /// The host side of a pod's link, and the pod's uid; its namespace decides.
    Pod(Box<str>, Box<str>),
    Host(Box<Host>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) interfaces: HostInterfaces,
    pub(crate) profiles: Box<[Profile]>,
}

/// Who decides about packets of a host that no policy decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    Allow,
    Deny,
    /// A namespace, or a service account.
    Of(ParentName),
}

impl Profile {
    fn mark(&self, marks: &mut Marks) {
        if let Self::Of((namespace, account)) = *self {
            marks.mark(namespace);
            marks.all(account);
        }
    }
}

impl Endpoint {
    pub(crate) fn pod(key: Key, endpoint: &WorkloadEndpoint, texts: &mut Texts) -> Self {
        Self {
            name: Name::Pod(key.0, key.1),
            node: node(&endpoint.node, texts),
            attachment: Attachment::Pod(endpoint.interface.as_str().into(), endpoint.uid.as_str().into()),
            addresses: endpoint.addresses.as_slice().into(),
            ports: ports(&endpoint.ports, texts),
        }
    }

    pub(crate) fn host(name: Text, endpoint: &HostEndpoint, profiles: Box<[Profile]>, texts: &mut Texts) -> Self {
        let interfaces = match &endpoint.interface {
            HostInterface::All => HostInterfaces::All,
            HostInterface::Named(name) => HostInterfaces::Named(name.clone()),
            HostInterface::ByAddress => HostInterfaces::WithAddress(endpoint.addresses.iter().copied().collect()),
        };
        Self {
            name: Name::Host(name),
            node: node(&endpoint.node, texts),
            attachment: Attachment::Host(Box::new(Host { interfaces, profiles })),
            addresses: endpoint.addresses.as_slice().into(),
            ports: ports(&endpoint.ports, texts),
        }
    }

    pub(crate) fn subject(&self) -> Subject {
        match self.name {
            Name::Pod(..) => Subject::Workload,
            Name::Host(_) => Subject::Host,
        }
    }
}

fn node(name: &str, texts: &mut Texts) -> Option<Text> {
    (!name.is_empty()).then(|| texts.intern(name))
}

fn ports(ports: &[NamedPort], texts: &mut Texts) -> Box<[(Text, Protocol, u16)]> {
    ports.iter().map(|port| (texts.intern(&port.name), port.protocol, port.port)).collect()
}

impl Name {
    /// The id of the endpoint's record.
    pub(crate) fn id(self, texts: &Texts) -> RecordId {
        match self {
            Self::Pod(namespace, name) => RecordId::Endpoint(EndpointKey::new(texts.get(namespace), texts.get(name))),
            Self::Host(name) => RecordId::HostEndpoint(texts.get(name).to_owned()),
        }
    }

    fn mark(self, marks: &mut Marks) {
        match self {
            Self::Pod(namespace, name) => marks.all([namespace, name]),
            Self::Host(name) => marks.mark(name),
        }
    }
}

impl Payload {
    pub(crate) fn node(&self) -> Option<Text> {
        match self {
            Self::Endpoint(endpoint) => endpoint.node,
            Self::NetworkSet(_) => None,
        }
    }

    /// What policies that select the item apply to; none for network sets.
    pub(crate) fn subject(&self) -> Option<Subject> {
        match self {
            Self::Endpoint(endpoint) => Some(endpoint.subject()),
            Self::NetworkSet(_) => None,
        }
    }

    /// Calls `see` with every member that the item adds to a set of this content; the same one more than once if it has it so.
    pub(crate) fn members(&self, spec: Spec, lists: &PortNames, mut see: impl FnMut(Member)) {
        match (self, spec) {
            (Self::Endpoint(endpoint), Spec::Selected(_)) => {
                endpoint.addresses.iter().for_each(|ip| see(address(*ip)));
            }
            (Self::NetworkSet(nets), Spec::Selected(_)) => nets.iter().for_each(|net| see(Member::Net(*net))),
            (Self::Endpoint(endpoint), Spec::NamedPorts(_, protocol, names)) => {
                let declared = endpoint
                    .ports
                    .iter()
                    .filter(|port| protocol.is_none_or(|protocol| protocol == port.1) && lists.has(names, port.0));
                for (_, protocol, port) in declared {
                    endpoint.addresses.iter().for_each(|ip| see(Member::AddressPort(*ip, *protocol, *port)));
                }
            }
            (Self::NetworkSet(_), Spec::NamedPorts(..))
            | (_, Spec::Nodes(_) | Spec::Service(..) | Spec::ServiceAddresses(..)) => {}
        }
    }
}

/// All endpoints and network sets, by item of the index.
#[derive(Debug, Default)]
pub(crate) struct Members {
    payloads: Column<Payload>,
    endpoints: Map<Name, u32>,
    network_sets: Map<Key, u32>,
    by_node: Map<Text, BTreeSet<u32>>,
    /// Endpoints whose record exists: on which node, and its digest.
    told: Map<Name, (Text, u64)>,
    dirty: BTreeSet<Name>,
}

impl Members {
    pub(crate) fn find_endpoint(&self, name: Name) -> Option<u32> {
        self.endpoints.get(&name).copied()
    }

    pub(crate) fn find_network_set(&self, key: Key) -> Option<u32> {
        self.network_sets.get(&key).copied()
    }

    pub(crate) fn name_network_set(&mut self, key: Key, item: u32) {
        self.network_sets.insert(key, item);
    }

    pub(crate) fn forget_network_set(&mut self, key: Key) {
        self.network_sets.remove(&key);
    }

    pub(crate) fn get(&self, item: u32) -> Option<&Payload> {
        self.payloads.get(item)
    }

    /// Gives an item another payload, or none. Answers with the former one.
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

    /// The endpoint's record is compared at the next flush.
    pub(crate) fn touch(&mut self, item: u32) {
        if let Some(Payload::Endpoint(endpoint)) = self.payloads.get(item) {
            self.dirty.insert(endpoint.name);
        }
    }

    pub(crate) fn on_node(&self, node: Text) -> impl Iterator<Item = u32> {
        self.by_node.get(&node).into_iter().flatten().copied()
    }

    /// Host endpoints of other nodes than those, with the node.
    pub(crate) fn hosts_not_on(&self, is_known: impl Fn(Text) -> bool) -> impl Iterator<Item = (Text, Text)> {
        let elsewhere = self.by_node.iter().filter(move |(node, _)| !is_known(**node));
        let items = elsewhere.flat_map(|(node, items)| items.iter().map(move |item| (*node, *item)));
        items.filter_map(|(node, item)| match self.payloads.get(item)? {
            Payload::Endpoint(Endpoint { name: Name::Host(name), .. }) => Some((*name, node)),
            _ => None,
        })
    }

    /// Puts what changed into the flush. `digest` makes the digest of an endpoint's record.
    pub(crate) fn flush(
        &mut self,
        flush: &mut Flush,
        texts: &Texts,
        digest: impl Fn(u32, &Endpoint, &RecordId) -> u64,
    ) {
        for name in std::mem::take(&mut self.dirty) {
            let id = name.id(texts);
            let item = self.endpoints.get(&name).copied();
            let now = item.and_then(|item| match self.payloads.get(item)? {
                Payload::Endpoint(endpoint) => Some((endpoint.node?, digest(item, endpoint, &id))),
                Payload::NetworkSet(_) => None,
            });
            let told = self.told.get(&name).copied();
            if now == told {
                continue;
            }
            let was: Vec<Text> = told.iter().map(|(node, _)| *node).collect();
            let is: Vec<Text> = now.iter().map(|(node, _)| *node).collect();
            if let Some(change) = transition(&was, &is, Change::Value, texts) {
                flush.records.insert(id, change);
            }
            match now {
                Some(now) => self.told.insert(name, now),
                None => self.told.remove(&name),
            };
        }
    }

    /// Endpoints whose record exists, in no order.
    pub(crate) fn names(&self) -> impl Iterator<Item = Name> {
        self.told.keys().copied()
    }

    /// Pods that have the address, in no order.
    pub(crate) fn pods_at(&self, address: IpAddr) -> impl Iterator<Item = Name> {
        let pods = self.payloads.values().filter_map(move |payload| match payload {
            Payload::Endpoint(pod) if pod.subject() == Subject::Workload && pod.addresses.contains(&address) => {
                Some(pod.name)
            }
            _ => None,
        });
        pods.filter(|name| self.told.contains_key(name))
    }

    pub(crate) fn told(&self, name: Name) -> Option<(Text, u64)> {
        self.told.get(&name).copied()
    }

    /// Marks every text that is kept here.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for payload in self.payloads.values() {
            if let Payload::Endpoint(endpoint) = payload {
                endpoint.name.mark(marks);
                marks.all(endpoint.node);
                marks.all(endpoint.ports.iter().map(|port| port.0));
                if let Attachment::Host(host) = &endpoint.attachment {
                    host.profiles.iter().for_each(|profile| profile.mark(marks));
                }
            }
        }
        for (namespace, name) in self.network_sets.keys() {
            marks.all([*namespace, *name]);
        }
        self.dirty.iter().for_each(|name| name.mark(marks));
        for (name, (node, _)) in &self.told {
            name.mark(marks);
            marks.mark(*node);
        }
    }
}
