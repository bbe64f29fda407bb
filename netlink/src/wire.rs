//! Netlink messages and attributes: writing them into one growing buffer, reading them from a received one.
//!
//! Attributes are a 16-bit length, a 16-bit type and a value, padded to four bytes; nf_tables wants numbers in
//! network byte order. Message headers are in the order of the host.

/// Bytes of a message header.
pub const HEADER: usize = 16;
/// Bytes of the netfilter header that follows it.
pub const NF_HEADER: usize = 4;
const ATTRIBUTE: usize = 4;
/// Marks an attribute that holds attributes.
const NESTED: u16 = 1 << 15;
/// Type bits without the two flags.
const TYPE_MASK: u16 = 0x3fff;

/// Header of a message, without the length.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Message type.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// Sequence number, repeated in the reply.
    pub sequence: u32,
}

/// A buffer of consecutive messages.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// What has been written.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Forgets everything written, keeping at most `keep` bytes of memory.
    pub fn reset(&mut self, keep: usize) {
        self.bytes.clear();
        self.bytes.shrink_to(keep);
    }

    /// Writes one message of a netfilter subsystem.
    pub fn message(&mut self, header: Header, family: u8, resource: u16, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&header.kind.to_ne_bytes());
        self.bytes.extend_from_slice(&header.flags.to_ne_bytes());
        self.bytes.extend_from_slice(&header.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        body(self);
        let length = u32::try_from(self.bytes.len() - start).expect("a message is far below 4 GiB");
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Sets flags of the message that starts at `offset`.
    pub fn add_flags(&mut self, offset: usize, flags: u16) {
        let place = &mut self.bytes[offset + 6..offset + 8];
        let old = u16::from_ne_bytes([place[0], place[1]]);
        place.copy_from_slice(&(old | flags).to_ne_bytes());
    }

    /// Writes an attribute with these bytes.
    pub fn put(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(ATTRIBUTE + value.len()).expect("values are split before they reach 64 KiB");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    /// Writes a text, ended by a zero byte.
    pub fn put_str(&mut self, kind: u16, value: &str) {
        let length = u16::try_from(ATTRIBUTE + value.len() + 1).expect("names and prefixes are short");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    /// Writes a 16-bit number.
    pub fn put_u16(&mut self, kind: u16, value: u16) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Writes a 32-bit number.
    pub fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Writes a 64-bit number.
    pub fn put_u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Writes an attribute of attributes.
    pub fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        body(self);
        let length = u16::try_from(self.bytes.len() - start).expect("lists are split before they reach 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ATTRIBUTE), 0);
    }
}

/// The messages of a received datagram; ends at the first that is cut short.
pub fn messages(mut rest: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32_ne(rest, 0)? as usize;
        let body = rest.get(HEADER..length)?;
        let header = Header { kind: u16_ne(rest, 4)?, flags: u16_ne(rest, 6)?, sequence: u32_ne(rest, 8)? };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((header, body))
    })
}

/// The attributes in these bytes, types without flags; ends at the first that is cut short.
pub fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_ne(rest, 0)?);
        let kind = u16_ne(rest, 2)? & TYPE_MASK;
        let value = rest.get(ATTRIBUTE..length)?;
        rest = rest.get(length.next_multiple_of(ATTRIBUTE)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of this type.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

/// The number in an attribute of this type.
pub fn attribute_u32(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(attribute(bytes, kind)?.try_into().ok()?))
}

/// The text in an attribute of this type, without the zero byte.
pub fn attribute_str(bytes: &[u8], kind: u16) -> Option<&str> {
    text(attribute(bytes, kind)?)
}

/// Text up to the first zero byte.
pub fn text(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value.split(|byte| *byte == 0).next()?).ok()
}

/// A 32-bit number in the order of the host.
pub fn u32_ne(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

fn u16_ne(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}
