//! Endpoints and network sets as objects: what they add to sets, and the endpoints of each node.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, WorkloadEndpoint};
use margay_api::rule::Protocol;

use crate::counts::transition;
use crate::flush::{Change, Flush};
use crate::model::{Member, RecordId};
use crate::sets::{Spec, address};
use crate::store::{Column, Map};
use crate::texts::{Marks, Text, Texts};

/// Identity of an endpoint or network set: namespace and name.
pub(crate) type Key = (Text, Text);

/// What an item adds to the sets that hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Payload {
    Endpoint(Endpoint),
    NetworkSet(Box<[IpNet]>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) key: Key,
    /// None: on no node, so no node is told of it.
    pub(crate) node: Option<Text>,
    pub(crate) interface: Box<str>,
    pub(crate) addresses: Box<[IpAddr]>,
    pub(crate) ports: Box<[(Text, Protocol, u16)]>,
}

impl Endpoint {
    pub(crate) fn new(key: Key, endpoint: &WorkloadEndpoint, texts: &mut Texts) -> Self {
        let ports = endpoint.ports.iter().map(|port| (texts.intern(&port.name), port.protocol, port.port));
        Self {
            key,
            ports: ports.collect(),
            node: (!endpoint.node.is_empty()).then(|| texts.intern(&endpoint.node)),
            interface: endpoint.interface.as_str().into(),
            addresses: endpoint.addresses.as_slice().into(),
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

    /// Calls `see` with every member that the item adds to a set of this content; the same one more than once if it has it so.
    pub(crate) fn members(&self, spec: Spec, mut see: impl FnMut(Member)) {
        match (self, spec) {
            (Self::Endpoint(endpoint), Spec::Selected(_)) => {
                endpoint.addresses.iter().for_each(|ip| see(address(*ip)));
            }
            (Self::NetworkSet(nets), Spec::Selected(_)) => nets.iter().for_each(|net| see(Member::Net(*net))),
            (Self::Endpoint(endpoint), Spec::NamedPort(_, protocol, name)) => {
                let declared = endpoint
                    .ports
                    .iter()
                    .filter(|port| port.0 == name && protocol.is_none_or(|protocol| protocol == port.1));
                for (_, protocol, port) in declared {
                    endpoint.addresses.iter().for_each(|ip| see(Member::AddressPort(*ip, *protocol, *port)));
                }
            }
            (Self::NetworkSet(_), Spec::NamedPort(..))
            | (_, Spec::Nodes(_) | Spec::Service(..) | Spec::ServiceAddresses(..)) => {}
        }
    }
}

/// All endpoints and network sets, by item of the index.
#[derive(Debug, Default)]
pub(crate) struct Members {
    payloads: Column<Payload>,
    endpoints: Map<Key, u32>,
    network_sets: Map<Key, u32>,
    by_node: Map<Text, BTreeSet<u32>>,
    /// Endpoints whose record exists: on which node, and its digest.
    told: Map<Key, (Text, u64)>,
    dirty: BTreeSet<Key>,
}

impl Members {
    pub(crate) fn find_endpoint(&self, key: Key) -> Option<u32> {
        self.endpoints.get(&key).copied()
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
            self.endpoints.insert(endpoint.key, item);
            self.dirty.insert(endpoint.key);
        }
        let is_gone = payload.is_none();
        let before = self.payloads.put(item, payload);
        if let Some(Payload::Endpoint(endpoint)) = &before {
            self.dirty.insert(endpoint.key);
            if is_gone {
                self.endpoints.remove(&endpoint.key);
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
            self.dirty.insert(endpoint.key);
        }
    }

    pub(crate) fn on_node(&self, node: Text) -> impl Iterator<Item = u32> {
        self.by_node.get(&node).into_iter().flatten().copied()
    }

    /// Puts what changed into the flush. `digest` makes the digest of an endpoint's record.
    pub(crate) fn flush(
        &mut self,
        flush: &mut Flush,
        texts: &Texts,
        digest: impl Fn(u32, &Endpoint, &RecordId) -> u64,
    ) {
        for key in std::mem::take(&mut self.dirty) {
            let id = RecordId::Endpoint(name(key, texts));
            let item = self.endpoints.get(&key).copied();
            let now = item.and_then(|item| match self.payloads.get(item)? {
                Payload::Endpoint(endpoint) => Some((endpoint.node?, digest(item, endpoint, &id))),
                Payload::NetworkSet(_) => None,
            });
            let told = self.told.get(&key).copied();
            if now == told {
                continue;
            }
            let was: Vec<Text> = told.iter().map(|(node, _)| *node).collect();
            let is: Vec<Text> = now.iter().map(|(node, _)| *node).collect();
            if let Some(change) = transition(&was, &is, Change::Value, texts) {
                flush.records.insert(id, change);
            }
            match now {
                Some(now) => self.told.insert(key, now),
                None => self.told.remove(&key),
            };
        }
    }

    pub(crate) fn told(&self, key: Key) -> Option<(Text, u64)> {
        self.told.get(&key).copied()
    }

    /// Marks every text that is kept here.
    pub(crate) fn mark(&self, marks: &mut Marks) {
        for payload in self.payloads.values() {
            if let Payload::Endpoint(endpoint) = payload {
                marks.all([endpoint.key.0, endpoint.key.1]);
                marks.all(endpoint.node);
                marks.all(endpoint.ports.iter().map(|port| port.0));
            }
        }
        for (namespace, name) in self.network_sets.keys().chain(&self.dirty) {
            marks.all([*namespace, *name]);
        }
        for ((namespace, name), (node, _)) in &self.told {
            marks.all([*namespace, *name, *node]);
        }
    }
}

/// The key as others know it.
pub(crate) fn name((namespace, name): Key, texts: &Texts) -> EndpointKey {
    EndpointKey::new(texts.get(namespace), texts.get(name))
}
