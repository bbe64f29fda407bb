//! Frames and packets from values, with correct lengths and checksums unless the value overrides
//! them. Attacks need packets that a library such as etherparse refuses to build.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use margay_api::network::Mac;

/// Ethernet type of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethernet type of ARP.
pub const ARP: u16 = 0x0806;
/// Ethernet type of IPv6.
pub const IPV6: u16 = 0x86dd;
/// Ethernet type of a VLAN tag.
pub const VLAN: u16 = 0x8100;
/// Ethernet type of an outer VLAN tag.
pub const SERVICE_VLAN: u16 = 0x88a8;

/// Protocol numbers that have a form of their own here.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// UDP-Lite.
    pub const UDPLITE: u8 = 136;
}

const HOPS: u8 = 64;
const FRAGMENT_HEADER: u8 = 44;

/// Payload of the IP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// The first packet of a TCP connection, with data behind it.
    Syn {
        /// Source and destination port.
        ports: (u16, u16),
        /// Data.
        data: Vec<u8>,
    },
    /// A UDP datagram.
    Udp {
        /// Source and destination port.
        ports: (u16, u16),
        /// Data.
        data: Vec<u8>,
    },
    /// A UDP-Lite datagram whose checksum covers all of it.
    UdpLite {
        /// Source and destination port.
        ports: (u16, u16),
        /// Data.
        data: Vec<u8>,
    },
    /// The first packet of an SCTP association, with data as a parameter that a receiver skips.
    Init {
        /// Source and destination port.
        ports: (u16, u16),
        /// Data, at most a few hundred bytes.
        data: Vec<u8>,
    },
    /// An ICMP message, in the form of the packet's IP version.
    Icmp {
        /// Type and code.
        kind: (u8, u8),
        /// Everything behind the checksum.
        body: Vec<u8>,
    },
    /// Bytes of any protocol.
    Other {
        /// Protocol number.
        protocol: u8,
        /// The bytes.
        data: Vec<u8>,
    },
}

/// Which part of a bigger packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification of the bigger packet.
    pub id: u16,
    /// Offset in bytes; a multiple of 8.
    pub offset: u16,
    /// There are parts behind it.
    pub more: bool,
}

/// An IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same version.
    pub destination: IpAddr,
    /// Payload.
    pub transport: Transport,
    /// IPv4 options, padded to a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: protocol number of each, and what follows its first two bytes: 6
    /// bytes, or 8 more, and so on.
    pub extensions: Vec<(u8, Vec<u8>)>,
}

impl Packet {
    /// A packet without options.
    pub fn new(source: IpAddr, destination: IpAddr, transport: Transport) -> Self {
        Self {
            source,
            destination,
            transport,
            options: Vec::new(),
            extensions: Vec::new(),
        }
    }

    /// The Ethernet type that the packet goes by.
    pub fn ethertype(&self) -> u16 {
        if self.source.is_ipv4() { IPV4 } else { IPV6 }
    }

    /// The bytes of the packet.
    pub fn encode(&self) -> Vec<u8> {
        self.with_header(&self.transport_bytes(), None)
    }

    /// The packet in parts that begin at these offsets, in the order of the list. Where a part
    /// begins before the one in front of it in the packet has ended, they overlap: each entry is an
    /// offset and a length.
    pub fn fragments(&self, id: u16, parts: &[(u16, u16)]) -> Vec<Vec<u8>> {
        let bytes = self.transport_bytes();
        let part = |&(offset, length): &(u16, u16)| {
            let end = usize::from(offset + length).min(bytes.len());
            let more = end < bytes.len();
            self.with_header(
                &bytes[usize::from(offset)..end],
                Some(Fragment { id, offset, more }),
            )
        };
        parts.iter().map(part).collect()
    }

    /// Encodes the payload of the IP header.
    pub fn transport_bytes(&self) -> Vec<u8> {
        let protocol = self.transport.protocol(self.source.is_ipv4());
        let mut bytes = self.transport.bytes();
        match &self.transport {
            Transport::Syn { .. } => self.checksum(&mut bytes, protocol, 16),
            Transport::Udp { .. } | Transport::UdpLite { .. } => {
                self.checksum(&mut bytes, protocol, 6)
            }
            Transport::Icmp { .. } if self.source.is_ipv6() => {
                self.checksum(&mut bytes, protocol, 2)
            }
            Transport::Icmp { .. } => put_sum(&mut bytes, 2, 0),
            Transport::Init { .. } => {
                let sum = crc32c(&bytes);
                bytes[8..12].copy_from_slice(&sum.to_le_bytes());
            }
            Transport::Other { .. } => {}
        }
        bytes
    }

    /// The IP header with these bytes behind it.
    pub fn with_header(&self, payload: &[u8], fragment: Option<Fragment>) -> Vec<u8> {
        let protocol = self.transport.protocol(self.source.is_ipv4());
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.ipv4((source, destination), protocol, payload, fragment)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.ipv6((source, destination), protocol, payload, fragment)
            }
            _ => panic!(
                "{} and {} are of two versions",
                self.source, self.destination
            ),
        }
    }

    fn ipv4(
        &self,
        ends: (Ipv4Addr, Ipv4Addr),
        protocol: u8,
        payload: &[u8],
        fragment: Option<Fragment>,
    ) -> Vec<u8> {
        let header = 20 + self.options.len();
        let (id, place) = fragment.map_or((0, 0x4000), |part| {
            (
                part.id,
                (part.offset / 8) | if part.more { 0x2000 } else { 0 },
            )
        });
        let mut bytes = vec![0x40 | (header / 4) as u8, 0];
        bytes.extend(((header + payload.len()) as u16).to_be_bytes());
        bytes.extend(id.to_be_bytes());
        bytes.extend(place.to_be_bytes());
        bytes.extend([HOPS, protocol, 0, 0]);
        bytes.extend(ends.0.octets());
        bytes.extend(ends.1.octets());
        bytes.extend(&self.options);
        put_sum(&mut bytes, 10, 0);
        bytes.extend(payload);
        bytes
    }

    fn ipv6(
        &self,
        ends: (Ipv6Addr, Ipv6Addr),
        protocol: u8,
        payload: &[u8],
        fragment: Option<Fragment>,
    ) -> Vec<u8> {
        let mut headers = self.extensions.clone();
        if let Some(part) = fragment {
            let mut body = (part.offset | u16::from(part.more)).to_be_bytes().to_vec();
            body.extend(u32::from(part.id).to_be_bytes());
            headers.push((FRAGMENT_HEADER, body));
        }
        let mut chain = Vec::new();
        for (index, (kind, body)) in headers.iter().enumerate() {
            let next = headers.get(index + 1).map_or(protocol, |(next, _)| *next);
            let length = if *kind == FRAGMENT_HEADER {
                0
            } else {
                ((body.len() + 2) / 8 - 1) as u8
            };
            chain.extend([next, length]);
            chain.extend(body);
        }
        let mut bytes = vec![0x60, 0, 0, 0];
        bytes.extend(((chain.len() + payload.len()) as u16).to_be_bytes());
        // Neighbour discovery is believed at the full hop limit only.
        let hops = if protocol == protocol::ICMPV6 {
            255
        } else {
            HOPS
        };
        bytes.extend([headers.first().map_or(protocol, |(kind, _)| *kind), hops]);
        bytes.extend(ends.0.octets());
        bytes.extend(ends.1.octets());
        bytes.extend(chain);
        bytes.extend(payload);
        bytes
    }

    fn checksum(&self, bytes: &mut [u8], protocol: u8, at: usize) {
        let mut sum = u32::from(protocol) + bytes.len() as u32;
        for address in [self.source, self.destination] {
            match address {
                IpAddr::V4(address) => sum += words(&address.octets()),
                IpAddr::V6(address) => sum += words(&address.octets()),
            }
        }
        put_sum(bytes, at, sum);
    }
}

impl Transport {
    /// Its protocol number.
    pub fn protocol(&self, ipv4: bool) -> u8 {
        match self {
            Self::Syn { .. } => protocol::TCP,
            Self::Udp { .. } => protocol::UDP,
            Self::UdpLite { .. } => protocol::UDPLITE,
            Self::Init { .. } => protocol::SCTP,
            Self::Icmp { .. } if ipv4 => protocol::ICMP,
            Self::Icmp { .. } => protocol::ICMPV6,
            Self::Other { protocol, .. } => *protocol,
        }
    }

    /// Its bytes, the checksum zero.
    fn bytes(&self) -> Vec<u8> {
        let ported = |ports: &(u16, u16)| [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
        let mut bytes = match self {
            Self::Syn { ports, .. } | Self::Udp { ports, .. } => ported(ports),
            Self::UdpLite { ports, .. } | Self::Init { ports, .. } => ported(ports),
            Self::Icmp { kind, .. } => vec![kind.0, kind.1, 0, 0],
            Self::Other { .. } => Vec::new(),
        };
        match self {
            Self::Syn { data, .. } => {
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
                bytes.extend(data);
            }
            Self::Udp { data, .. } => {
                bytes.extend(((data.len() + 8) as u16).to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(data);
            }
            Self::UdpLite { data, .. } => {
                bytes.extend([0, 0, 0, 0]);
                bytes.extend(data);
            }
            Self::Init { data, .. } => {
                // A parameter whose type's upper bits mean: skip it and go on.
                let padded = data.len().next_multiple_of(4);
                bytes.extend([0; 8]);
                bytes.extend([1, 0]);
                bytes.extend(((20 + 4 + data.len()) as u16).to_be_bytes());
                bytes.extend([0, 0, 0, 9, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
                bytes.extend([0x80, 0x99]);
                bytes.extend(((4 + data.len()) as u16).to_be_bytes());
                bytes.extend(data);
                bytes.resize(bytes.len() + padded - data.len(), 0);
            }
            Self::Icmp { body, .. } => bytes.extend(body),
            Self::Other { data, .. } => bytes.extend(data),
        }
        bytes
    }
}

/// A frame.
pub fn ethernet(destination: Mac, source: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [
        &destination.0[..],
        &source.0,
        &ethertype.to_be_bytes(),
        payload,
    ]
    .concat()
}

/// The frame with a VLAN tag in front of what it carries.
pub fn tagged(frame: &[u8], ethertype: u16, vlan: u16) -> Vec<u8> {
    [
        &frame[..12],
        &ethertype.to_be_bytes(),
        &vlan.to_be_bytes(),
        &frame[12..],
    ]
    .concat()
}

/// The frame in the form of IEEE 802.3 with LLC and SNAP headers instead of an Ethernet type.
pub fn snap(frame: &[u8]) -> Vec<u8> {
    let length = (frame.len() - 12 + 6) as u16;
    [
        &frame[..12],
        &length.to_be_bytes(),
        &[0xaa, 0xaa, 3, 0, 0, 0],
        &frame[12..],
    ]
    .concat()
}

/// An ARP message of IPv4 over Ethernet: request 1, answer 2.
pub fn arp(operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut bytes = vec![0, 1, 8, 0, 6, 4];
    bytes.extend(operation.to_be_bytes());
    for (mac, address) in [sender, target] {
        bytes.extend(mac.0);
        bytes.extend(address.octets());
    }
    bytes
}

fn words(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum()
}

/// Puts the internet checksum over the bytes and what was summed before.
fn put_sum(bytes: &mut [u8], at: usize, before: u32) {
    let mut sum = before + words(bytes);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Zero would mean that there is none.
    let sum = match !(sum as u16) {
        0 => 0xffff,
        sum => sum,
    };
    bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// CRC32c, the checksum of SCTP.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ POLYNOMIAL
            } else {
                crc >> 1
            }
        })
    };
    !bytes.iter().fold(u32::MAX, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standards() {
        // The check value of CRC-32/ISCSI.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        // A message together with its checksum sums up to all ones.
        for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (source, destination): (IpAddr, IpAddr) = (
                source.parse().expect("an address"),
                destination.parse().expect("an address"),
            );
            let data = b"odd".to_vec();
            let transports = [
                Transport::Udp {
                    ports: (1, 2),
                    data: data.clone(),
                },
                Transport::Syn {
                    ports: (1, 2),
                    data: data.clone(),
                },
                Transport::UdpLite {
                    ports: (1, 2),
                    data,
                },
            ];
            for transport in transports {
                let packet = Packet::new(source, destination, transport);
                let mut bytes = packet.transport_bytes();
                let at = if matches!(packet.transport, Transport::Syn { .. }) {
                    16
                } else {
                    6
                };
                let written = [bytes[at], bytes[at + 1]];
                bytes[at..at + 2].copy_from_slice(&[0, 0]);
                let protocol = packet.transport.protocol(source.is_ipv4());
                packet.checksum(&mut bytes, protocol, at);
                assert_eq!(written, [bytes[at], bytes[at + 1]]);
                assert_ne!(written, [0, 0]);
            }
        }
    }

    #[test]
    fn parts_of_a_packet_carry_all_of_it() {
        let ends: [IpAddr; 2] =
            ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().expect("an address"));
        let packet = Packet::new(
            ends[0],
            ends[1],
            Transport::Udp {
                ports: (1, 2),
                data: vec![7; 32],
            },
        );
        let whole = packet.transport_bytes();
        let parts = packet.fragments(9, &[(0, 24), (24, 24)]);
        let joined: Vec<u8> = parts.iter().flat_map(|part| part[20..].to_vec()).collect();
        assert_eq!(joined, whole);
        assert_eq!(
            [parts[0][6], parts[0][7]],
            [0x20, 0],
            "the first has the flag of more fragments"
        );
        assert_eq!(
            [parts[1][6], parts[1][7]],
            [0, 3],
            "the last has its offset in units of eight bytes"
        );
    }
}
