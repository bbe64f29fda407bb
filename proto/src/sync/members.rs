//! Set members as entries of fixed length: 5 bytes for an IPv4 address instead of a message of 9.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::Bytes;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use margay_api::rule::Protocol;
use margay_calc::model::{Member, SetKind};

use super::{Error, wire};

/// Packs the members in chunks of at most `most`, in order; at least one chunk.
pub(super) fn pack_chunks(
    members: &BTreeSet<Member>,
    most: usize,
) -> impl Iterator<Item = wire::Members> {
    let mut rest = members.iter();
    let pieces = members.len().div_ceil(most).max(1);
    (0..pieces).map(move |_| pack(rest.by_ref().take(most)))
}

pub(super) fn pack<'a>(members: impl IntoIterator<Item = &'a Member>) -> wire::Members {
    let (mut net4, mut net6, mut port4, mut port6) = (vec![], vec![], vec![], vec![]);
    for member in members {
        match member {
            Member::Net(IpNet::V4(net)) => {
                net4.extend(net.addr().octets());
                net4.push(net.prefix_len());
            }
            Member::Net(IpNet::V6(net)) => {
                net6.extend(net.addr().octets());
                net6.push(net.prefix_len());
            }
            Member::AddressPort(IpAddr::V4(address), protocol, port) => {
                port4.extend(address.octets());
                port4.push(protocol.0);
                port4.extend(port.to_be_bytes());
            }
            Member::AddressPort(IpAddr::V6(address), protocol, port) => {
                port6.extend(address.octets());
                port6.push(protocol.0);
                port6.extend(port.to_be_bytes());
            }
        }
    }
    wire::Members {
        net4: net4.into(),
        net6: net6.into(),
        port4: port4.into(),
        port6: port6.into(),
    }
}

pub(super) fn unpack(kind: SetKind, packed: &wire::Members) -> Result<BTreeSet<Member>, Error> {
    let (nets, ports) = ([&packed.net4, &packed.net6], [&packed.port4, &packed.port6]);
    let others = match kind {
        SetKind::Net => ports,
        SetKind::AddressPort => nets,
    };
    if let Some(stray) = others.into_iter().find(|bytes| !bytes.is_empty()) {
        return Err(Error::Length {
            field: "members",
            length: stray.len(),
            rule: "0, as the set is of the other kind",
        });
    }
    let mut members = BTreeSet::new();
    for entry in entries::<5>("members.net4", &packed.net4)? {
        let [a, b, c, d, length] = *entry;
        let net = Ipv4Net::new(Ipv4Addr::new(a, b, c, d), length)
            .map_err(|_| prefix(length, "0..=32"))?;
        members.insert(Member::Net(net.into()));
    }
    for entry in entries::<17>("members.net6", &packed.net6)? {
        let (address, [length]) = split::<17, 16, 1>(entry);
        let net =
            Ipv6Net::new(Ipv6Addr::from(address), length).map_err(|_| prefix(length, "0..=128"))?;
        members.insert(Member::Net(net.into()));
    }
    for entry in entries::<7>("members.port4", &packed.port4)? {
        let (address, rest) = split::<7, 4, 3>(entry);
        members.insert(address_port(Ipv4Addr::from(address).into(), rest));
    }
    for entry in entries::<19>("members.port6", &packed.port6)? {
        let (address, rest) = split::<19, 16, 3>(entry);
        members.insert(address_port(Ipv6Addr::from(address).into(), rest));
    }
    Ok(members)
}

fn entries<'a, const N: usize>(
    field: &'static str,
    bytes: &'a Bytes,
) -> Result<&'a [[u8; N]], Error> {
    match bytes.as_chunks::<N>() {
        (entries, []) => Ok(entries),
        _ => Err(Error::Length {
            field,
            length: bytes.len(),
            rule: "a whole number of entries",
        }),
    }
}

fn split<const N: usize, const A: usize, const B: usize>(entry: &[u8; N]) -> ([u8; A], [u8; B]) {
    const { assert!(A + B == N) };
    let (mut first, mut second) = ([0; A], [0; B]);
    first.copy_from_slice(&entry[..A]);
    second.copy_from_slice(&entry[A..]);
    (first, second)
}

fn address_port(address: IpAddr, [protocol, high, low]: [u8; 3]) -> Member {
    Member::AddressPort(address, Protocol(protocol), u16::from_be_bytes([high, low]))
}

fn prefix(length: u8, rule: &'static str) -> Error {
    Error::Number {
        field: "members.prefix_length",
        value: length.into(),
        rule,
    }
}
