//! SCTP without the kernel's, where it has none: as much of RFC 9260 as shows whether an
//! association could begin. Kernels without SCTP sockets still filter and track it, so a raw socket
//! on either side is enough to see what policy does to it.
//!
//! A question is an INIT; the answer is an INIT-ACK (yes) or an ABORT (nobody serves the port).
//! Checksums must be right, or connection tracking calls the packet invalid and everything looks
//! denied.

use std::sync::OnceLock;

use socket2::{Domain, Socket, Type};

/// IP protocol number.
pub const PROTOCOL: i32 = 132;

/// Returns whether this kernel has sockets of SCTP. Where it has, they serve: its own stack would
/// answer a raw socket's packets too.
pub fn has_sockets() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| Socket::new(Domain::IPV4, Type::STREAM, Some(PROTOCOL.into())).is_ok())
}

const HEADER: usize = 12;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
/// Parameter that an INIT-ACK must carry.
const STATE_COOKIE: [u8; 8] = [0, 7, 0, 8, b'm', b'g', b'a', b'y'];

/// First chunk of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// Request of an association; the tag that the server must use.
    Init(u32),
    /// Acceptance; the tag that the client must use.
    InitAck(u32),
    /// No association.
    Abort,
}

/// A packet with one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// Verification tag: zero for an INIT, otherwise what the receiver has chosen.
    pub tag: u32,
    /// The chunk.
    pub chunk: Chunk,
}

impl Packet {
    /// The packet without its IP header, its checksum filled in.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + 28);
        bytes.extend(self.source.to_be_bytes());
        bytes.extend(self.destination.to_be_bytes());
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        match self.chunk {
            Chunk::Init(tag) => association(&mut bytes, INIT, tag, &[]),
            Chunk::InitAck(tag) => association(&mut bytes, INIT_ACK, tag, &STATE_COOKIE),
            Chunk::Abort => bytes.extend([ABORT, 0, 0, 4]),
        }
        let checksum = crc32c(&bytes);
        bytes[8..HEADER].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads a packet without its IP header; none if it is damaged, or begins with another chunk
    /// than these three.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (ports, chunk) = (bytes.get(..HEADER)?, bytes.get(HEADER..)?);
        let mut unchecked = bytes.to_vec();
        unchecked[8..HEADER].fill(0);
        if crc32c(&unchecked).to_le_bytes() != bytes[8..HEADER] {
            return None;
        }
        let tag = || Some(u32::from_be_bytes(chunk.get(4..8)?.try_into().ok()?));
        let chunk = match *chunk.first()? {
            INIT => Chunk::Init(tag()?),
            INIT_ACK => Chunk::InitAck(tag()?),
            ABORT => Chunk::Abort,
            _ => return None,
        };
        Some(Self {
            source: u16::from_be_bytes([ports[0], ports[1]]),
            destination: u16::from_be_bytes([ports[2], ports[3]]),
            tag: u32::from_be_bytes(ports[4..8].try_into().ok()?),
            chunk,
        })
    }
}

/// An INIT or INIT-ACK: one stream either way, the tag also as first sequence number.
fn association(bytes: &mut Vec<u8>, kind: u8, tag: u32, parameter: &[u8]) {
    const WINDOW: u32 = 65_536;
    let length = 20 + parameter.len() as u16;
    bytes.extend([kind, 0]);
    bytes.extend(length.to_be_bytes());
    bytes.extend(tag.to_be_bytes());
    bytes.extend(WINDOW.to_be_bytes());
    bytes.extend([0, 1, 0, 1]);
    bytes.extend(tag.to_be_bytes());
    bytes.extend(parameter);
}

/// The payload of what a raw socket received: the kernel puts the IPv4 header before it, and no
/// IPv6 header.
pub fn payload(received: &[u8], is_ipv4: bool) -> Option<&[u8]> {
    if !is_ipv4 {
        return Some(received);
    }
    let words = received.first()? & 0x0f;
    received.get(usize::from(words) * 4..)
}

/// CRC32c (Castagnoli), as RFC 9260 appendix A has it.
pub fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    };
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value that catalogues of checksums give.
    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn what_is_written_can_be_read_and_damage_is_seen() {
        for chunk in [Chunk::Init(7), Chunk::InitAck(8), Chunk::Abort] {
            let packet = Packet {
                source: 40_000,
                destination: 80,
                tag: 0x0102_0304,
                chunk,
            };
            let bytes = packet.encode();
            assert_eq!(Packet::decode(&bytes), Some(packet));
            for index in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[index] ^= 1;
                assert_eq!(Packet::decode(&damaged), None, "byte {index} of {chunk:?}");
            }
            assert_eq!(Packet::decode(&bytes[..HEADER]), None);
        }
    }
}
