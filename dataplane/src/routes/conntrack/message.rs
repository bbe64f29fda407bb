//! Builds the ctnetlink requests and parses entries.
//!
//! The kernel deletes all entries for a request without tuple and filter. Both kinds of requests
//! that can be built here have an address: a [`PurgeAddress`], which is never unspecified, or the
//! tuple of an [`Entry`] that was read.

use std::collections::BTreeSet;
use std::net::IpAddr;

use margay_api::host_port::HostPort;
use margay_api::rule::{IpVersion, Protocol};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};

use margay_netlink::wire::{Header, NF_HEADER_LEN, Writer, attribute, attribute_u32};

/// `NFNL_SUBSYS_CTNETLINK` of `linux/netfilter/nfnetlink.h`, in the upper byte of a message type.
const SUBSYSTEM: u16 = 1 << 8;
/// `IPCTNL_MSG_CT_GET` of `linux/netfilter/nfnetlink_conntrack.h`, as all `CTA_*` below.
const GET: u16 = SUBSYSTEM | 1;
/// `IPCTNL_MSG_CT_DELETE`.
const DELETE: u16 = SUBSYSTEM | 2;
/// `IPCTNL_MSG_CT_GET_STATS`.
const GET_STATS: u16 = SUBSYSTEM | 5;
/// `CTA_STATS_GLOBAL_ENTRIES`.
const CTA_STATS_GLOBAL_ENTRIES: u16 = 1;
/// `NLA_F_NESTED` of `linux/netlink.h`.
const NESTED: u16 = 1 << 15;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// `CTA_FILTER_F_CTA_IP_SRC` and `_DST` of the kernel's `nf_conntrack_netlink.c`.
const FILTER_SOURCE: u32 = 1;
const FILTER_DESTINATION: u32 = 2;

/// Address whose entries are to be deleted: never the unspecified one, which no pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PurgeAddress(IpAddr);

/// UDP port at an address of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LocalPort {
    address: IpAddr,
    port: u16,
}

impl LocalPort {
    /// The host ports at the addresses of the node.
    pub fn of_host_ports(ports: &[HostPort], local: &BTreeSet<IpAddr>) -> BTreeSet<Self> {
        let at = |host_port: &HostPort| {
            let (wanted, port) = (host_port.address, host_port.port);
            let is_meant = move |address: &&IpAddr| {
                wanted.is_none_or(|wanted| {
                    wanted == **address
                        || wanted.is_unspecified() && wanted.is_ipv4() == address.is_ipv4()
                })
            };
            let meant = local.iter().filter(is_meant);
            meant
                .map(move |address| Self {
                    address: *address,
                    port,
                })
                .collect::<Vec<_>>()
        };
        ports.iter().flat_map(at).collect()
    }

    /// IP version of the address.
    pub fn version(self) -> IpVersion {
        IpVersion::of(self.address)
    }
}

/// Which entries of a dump are meant.
#[derive(Clone, Copy, Debug)]
pub enum Selection<'a> {
    /// Those with one of the addresses in any field.
    Addresses(&'a BTreeSet<PurgeAddress>),
    /// Those of UDP packets to one of the ports whose destination was not translated.
    Untranslated(&'a BTreeSet<LocalPort>),
}

/// One of the four addresses of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TupleField {
    /// Source of the first packet.
    OriginalSource,
    /// Destination of the first packet.
    OriginalDestination,
    /// Source of replies: the destination after translation.
    ReplySource,
    /// Destination of replies: the source after translation.
    ReplyDestination,
}

/// An entry as read: what identifies it to the kernel, in the kernel's encoding.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    version: IpVersion,
    /// Content of `CTA_TUPLE_ORIG`, with both addresses.
    tuple: Vec<u8>,
    /// Content of `CTA_ZONE`.
    zone: Option<Vec<u8>>,
}

impl PurgeAddress {
    /// `None` for the unspecified address.
    pub fn new(address: IpAddr) -> Option<Self> {
        (!address.is_unspecified()).then_some(Self(address))
    }

    /// IP version of the address.
    pub fn version(self) -> IpVersion {
        IpVersion::of(self.0)
    }
}

/// Encodes the deletion of all entries with the address in this field: one walk of the kernel over
/// its table. Kernels before 6.11 do not support it and reject half a tuple as invalid.
pub fn encode_flush(subject: PurgeAddress, place: TupleField, sequence: u32) -> Vec<u8> {
    let (is_original, is_source) = match place {
        TupleField::OriginalSource => (true, true),
        TupleField::OriginalDestination => (true, false),
        TupleField::ReplySource => (false, true),
        TupleField::ReplyDestination => (false, false),
    };
    let flags = if is_source {
        FILTER_SOURCE
    } else {
        FILTER_DESTINATION
    };
    let (original, reply) = if is_original { (flags, 0) } else { (0, flags) };
    encode_request(DELETE, NLM_F_ACK, subject.version(), sequence, |writer| {
        let tuple = if is_original {
            CTA_TUPLE_ORIG
        } else {
            CTA_TUPLE_REPLY
        };
        writer.nest(tuple, |writer| {
            writer.nest(CTA_TUPLE_IP, |writer| {
                put_address(writer, subject.0, is_source)
            })
        });
        writer.nest(CTA_FILTER, |writer| {
            // These are in host byte order, unlike other attributes.
            writer.put(CTA_FILTER_ORIG_FLAGS, &original.to_ne_bytes());
            writer.put(CTA_FILTER_REPLY_FLAGS, &reply.to_ne_bytes());
        });
    })
}

/// Encodes a dump of all entries of an IP version.
pub fn encode_list(version: IpVersion, sequence: u32) -> Vec<u8> {
    encode_request(GET, NLM_F_DUMP, version, sequence, |_| {})
}

/// Encodes a request for the number of entries.
pub fn encode_count(sequence: u32) -> Vec<u8> {
    encode_request(GET_STATS, NLM_F_ACK, IpVersion::V4, sequence, |_| {})
}

/// Parses the number in a response to [`encode_count`].
pub fn parse_count(body: &[u8]) -> Option<u32> {
    attribute_u32(body.get(NF_HEADER_LEN..)?, CTA_STATS_GLOBAL_ENTRIES)
}

/// Encodes the deletion of one entry.
pub fn encode_delete(entry: &Entry, sequence: u32) -> Vec<u8> {
    encode_request(DELETE, NLM_F_ACK, entry.version, sequence, |writer| {
        writer.put(CTA_TUPLE_ORIG | NESTED, &entry.tuple);
        if let Some(zone) = &entry.zone {
            writer.put(CTA_ZONE, zone);
        }
    })
}

/// Parses an entry of a dump, if it is among these.
pub fn parse_entry(version: IpVersion, body: &[u8], wanted: Selection<'_>) -> Option<Entry> {
    let attributes = body.get(NF_HEADER_LEN..)?;
    let (original, reply) = (
        attribute(attributes, CTA_TUPLE_ORIG)?,
        attribute(attributes, CTA_TUPLE_REPLY)?,
    );
    let [source, destination] = parse_addresses(version, original)?;
    let [answering, answered] = parse_addresses(version, reply)?;
    let is_wanted = match wanted {
        Selection::Addresses(subjects) => [source, destination, answering, answered]
            .into_iter()
            .any(|address| subjects.contains(&PurgeAddress(address))),
        Selection::Untranslated(ports) => {
            let port = parse_udp_port(original).map(|port| LocalPort {
                address: destination,
                port,
            });
            destination == answering && port.is_some_and(|port| ports.contains(&port))
        }
    };
    is_wanted.then(|| Entry {
        version,
        tuple: original.to_vec(),
        zone: attribute(attributes, CTA_ZONE).map(<[u8]>::to_vec),
    })
}

/// Destination port of a tuple of UDP.
fn parse_udp_port(tuple: &[u8]) -> Option<u16> {
    let transport = attribute(tuple, CTA_TUPLE_PROTO)?;
    let is_udp = attribute(transport, CTA_PROTO_NUM)? == [Protocol::UDP.0];
    let port = attribute(transport, CTA_PROTO_DST_PORT)?;
    is_udp.then(|| port.try_into().ok().map(u16::from_be_bytes))?
}

/// Source and destination of a tuple.
fn parse_addresses(version: IpVersion, tuple: &[u8]) -> Option<[IpAddr; 2]> {
    let addresses = attribute(tuple, CTA_TUPLE_IP)?;
    let read = |kind| {
        let bytes = attribute(addresses, kind)?;
        match version {
            IpVersion::V4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
            IpVersion::V6 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        }
    };
    Some([
        read(address_kind(version, true))?,
        read(address_kind(version, false))?,
    ])
}

fn put_address(writer: &mut Writer, address: IpAddr, is_source: bool) {
    let kind = address_kind(IpVersion::of(address), is_source);
    match address {
        IpAddr::V4(address) => writer.put(kind, &address.octets()),
        IpAddr::V6(address) => writer.put(kind, &address.octets()),
    }
}

const fn address_kind(version: IpVersion, is_source: bool) -> u16 {
    match (version, is_source) {
        (IpVersion::V4, true) => CTA_IP_V4_SRC,
        (IpVersion::V4, false) => CTA_IP_V4_DST,
        (IpVersion::V6, true) => CTA_IP_V6_SRC,
        (IpVersion::V6, false) => CTA_IP_V6_DST,
    }
}

fn encode_request(
    kind: u16,
    flags: u16,
    version: IpVersion,
    sequence: u32,
    body: impl FnOnce(&mut Writer),
) -> Vec<u8> {
    let family = match version {
        IpVersion::V4 => libc::AF_INET as u8,
        IpVersion::V6 => libc::AF_INET6 as u8,
    };
    let mut writer = Writer::default();
    writer.put_message(
        Header {
            kind,
            flags: NLM_F_REQUEST | flags,
            sequence,
        },
        family,
        0,
        body,
    );
    writer.bytes().to_vec()
}
