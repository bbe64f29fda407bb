//! Compact form of pods, in the cache and in a list that is being received: one allocation instead
//! of two per label.
//!
//! A cluster has a hundred thousand pods, and the graph has its own form of each. The parsed form
//! is needed only when a pod changes, so all fields are kept as length-prefixed bytes.

use std::borrow::Cow;
use std::net::IpAddr;

use margay_api::endpoint::{NamedPort, WorkloadEndpoint};
use margay_api::meta::Labels;
use margay_api::rule::Protocol;
use margay_calc::update::Update;

use crate::object::{ObjectKey, Observed};

/// Value of an object.
#[derive(Clone, Debug, PartialEq)]
pub enum PackedUpdate {
    /// It is irrelevant, or refused without a former value.
    Nothing,
    /// A pod whose endpoint has the object's key.
    Pod(PackedEndpoint),
    /// Any other object.
    Other(Box<Update>),
}

impl PackedUpdate {
    /// Packs the value of the object with this key.
    pub fn new(key: &ObjectKey, update: Option<Cow<'_, Update>>) -> Self {
        let Some(update) = update else {
            return Self::Nothing;
        };
        match &*update {
            Update::Endpoint(of, Some(endpoint)) if of == key => {
                Self::Pod(PackedEndpoint::new(endpoint))
            }
            _ => Self::Other(Box::new(update.into_owned())),
        }
    }

    /// The value as an update of the object.
    pub fn update(&self, key: &ObjectKey) -> Option<Cow<'_, Update>> {
        match self {
            Self::Nothing => None,
            Self::Pod(packed) => Some(Cow::Owned(Update::Endpoint(
                key.clone(),
                Some(packed.unpack()),
            ))),
            Self::Other(update) => Some(Cow::Borrowed(update)),
        }
    }

    /// Update that removes the object.
    pub fn removal(&self, key: &ObjectKey) -> Option<Update> {
        match self {
            Self::Nothing => None,
            Self::Pod(_) => Some(Update::Endpoint(key.clone(), None)),
            Self::Other(update) => Some(update.removal()),
        }
    }
}

/// A pod's endpoint as bytes. Equal endpoints have equal bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedEndpoint(Box<[u8]>);

impl PackedEndpoint {
    /// Packs an endpoint.
    pub fn new(endpoint: &WorkloadEndpoint) -> Self {
        let WorkloadEndpoint {
            node,
            labels,
            service_account,
            addresses,
            ports,
            uid,
            interface,
        } = endpoint;
        let mut writer = FieldWriter(Vec::with_capacity(512));
        writer.put_text(node);
        writer.put_text(service_account);
        writer.put_text(uid);
        writer.put_text(interface);
        writer.put_length(addresses.len());
        addresses
            .iter()
            .for_each(|address| writer.put_address(*address));
        writer.put_length(ports.len());
        for NamedPort {
            name,
            protocol,
            port,
        } in ports
        {
            writer.put_text(name);
            writer.0.push(protocol.0);
            writer.0.extend_from_slice(&port.to_be_bytes());
        }
        writer.put_length(labels.len());
        for (name, value) in labels {
            writer.put_text(name);
            writer.put_text(value);
        }
        Self(writer.0.into_boxed_slice())
    }

    /// The endpoint.
    pub fn unpack(&self) -> WorkloadEndpoint {
        let mut reader = FieldReader(&self.0);
        let (node, service_account, uid) = (reader.text(), reader.text(), reader.text());
        let interface = reader.text();
        let addresses = (0..reader.length()).map(|_| reader.address()).collect();
        let ports = (0..reader.length()).map(|_| {
            let (name, [protocol, high, low]) = (reader.text(), reader.array());
            NamedPort {
                name,
                protocol: Protocol(protocol),
                port: u16::from_be_bytes([high, low]),
            }
        });
        let ports = ports.collect();
        let labels = (0..reader.length()).map(|_| (reader.text(), reader.text()));
        let labels: Labels = labels.collect();
        WorkloadEndpoint {
            node,
            labels,
            service_account,
            addresses,
            ports,
            uid,
            interface,
        }
    }

    /// Node of the endpoint, without unpacking the rest.
    pub fn node(&self) -> &str {
        FieldReader(&self.0).str()
    }
}

/// Objects of a list.
#[derive(Debug, Default)]
pub struct PackedList(Vec<PackedObserved>);

#[derive(Debug)]
struct PackedObserved {
    key: ObjectKey,
    uid: Box<str>,
    value: PackedUpdate,
    prefers_former: bool,
    problems: Vec<String>,
}

impl PackedList {
    /// Adds an object.
    pub fn push(&mut self, observed: Observed) {
        let Observed {
            key,
            uid,
            update,
            prefers_former,
            problems,
        } = observed;
        let value = PackedUpdate::new(&key, update.map(Cow::Owned));
        self.0.push(PackedObserved {
            key,
            uid: uid.into(),
            value,
            prefers_former,
            problems,
        });
    }

    /// Removes the object with this key.
    pub fn remove(&mut self, key: &ObjectKey) {
        self.0.retain(|listed| listed.key != *key);
    }

    /// Removes all objects.
    pub fn clear(&mut self) {
        self.0 = Vec::new();
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns true if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl IntoIterator for PackedList {
    type Item = Observed;
    type IntoIter = UnpackedObjects;

    fn into_iter(self) -> UnpackedObjects {
        UnpackedObjects(self.0.into_iter())
    }
}

/// Objects of a list, each unpacked when it is taken.
#[derive(Debug)]
pub struct UnpackedObjects(std::vec::IntoIter<PackedObserved>);

impl Iterator for UnpackedObjects {
    type Item = Observed;

    fn next(&mut self) -> Option<Observed> {
        let PackedObserved {
            key,
            uid,
            value,
            prefers_former,
            problems,
        } = self.0.next()?;
        let update = value.update(&key).map(Cow::into_owned);
        Some(Observed {
            key,
            uid: uid.into(),
            update,
            prefers_former,
            problems,
        })
    }
}

struct FieldWriter(Vec<u8>);

impl FieldWriter {
    /// Seven bits per byte, the lowest first.
    fn put_length(&mut self, mut length: usize) {
        while length >= 0x80 {
            self.0.push(length as u8 | 0x80);
            length >>= 7;
        }
        self.0.push(length as u8);
    }

    fn put_text(&mut self, text: &str) {
        self.put_length(text.len());
        self.0.extend_from_slice(text.as_bytes());
    }

    fn put_address(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(address) => {
                self.0.push(4);
                self.0.extend_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                self.0.push(16);
                self.0.extend_from_slice(&address.octets());
            }
        }
    }
}

/// Reads what a [`FieldWriter`] wrote.
struct FieldReader<'a>(&'a [u8]);

impl<'a> FieldReader<'a> {
    fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N));
        array
    }

    fn length(&mut self) -> usize {
        let mut length = 0;
        for shift in (0..usize::BITS).step_by(7) {
            let [byte] = self.array();
            length |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        length
    }

    fn str(&mut self) -> &'a str {
        let length = self.length();
        std::str::from_utf8(self.bytes(length)).expect("packed from a str")
    }

    fn text(&mut self) -> String {
        self.str().to_owned()
    }

    fn address(&mut self) -> IpAddr {
        let [length] = self.array();
        if length == 4 {
            IpAddr::from(self.array::<4>())
        } else {
            IpAddr::from(self.array::<16>())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoints() -> impl Strategy<Value = WorkloadEndpoint> {
        let text = || "[a-zü/.]{0,200}";
        let ports = proptest::collection::vec((text(), any::<u8>(), any::<u16>()), 0..4);
        let labels = proptest::collection::btree_map(text(), text(), 0..20);
        let addresses = proptest::collection::vec(any::<IpAddr>(), 0..4);
        (
            text(),
            labels,
            text(),
            addresses,
            ports,
            text(),
            "[a-z]{0,15}",
        )
            .prop_map(
                |(node, labels, service_account, addresses, ports, uid, interface)| {
                    let ports = ports.into_iter();
                    let ports = ports
                        .map(|(name, protocol, port)| NamedPort {
                            name,
                            protocol: Protocol(protocol),
                            port,
                        })
                        .collect();
                    WorkloadEndpoint {
                        node,
                        labels,
                        service_account,
                        addresses,
                        ports,
                        uid,
                        interface,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn nothing_is_lost(one in endpoints(), other in endpoints()) {
            let (packed, second) = (PackedEndpoint::new(&one), PackedEndpoint::new(&other));
            prop_assert_eq!(packed.unpack(), one.clone());
            prop_assert_eq!(packed.node(), &one.node);
            prop_assert_eq!(packed == second, one == other);
        }
    }
}
