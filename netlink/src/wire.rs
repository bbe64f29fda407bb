//! Netlink messages and attributes as bytes: encoding into one growing buffer, decoding of received
//! datagrams.
//!
//! Attributes are a 16-bit length, a 16-bit type and a value, padded to four bytes. Headers of
//! messages and attributes are in host byte order; netfilter subsystems take numbers in attributes
//! in network byte order.

/// Length of a message header: `struct nlmsghdr` (`linux/netlink.h`).
pub const HEADER_LEN: usize = 16;
/// Length of the netfilter header that follows it: `struct nfgenmsg`
/// (`linux/netfilter/nfnetlink.h`).
pub const NF_HEADER_LEN: usize = 4;
/// Length of an attribute header: `struct nlattr` (`linux/netlink.h`).
const ATTRIBUTE_HEADER_LEN: usize = 4;
/// `NLMSG_ALIGNTO` and `NLA_ALIGNTO` (`linux/netlink.h`).
const ALIGNMENT: usize = 4;
/// `NLA_F_NESTED` (`linux/netlink.h`): the value is attributes.
const NESTED: u16 = 1 << 15;
/// `NLA_TYPE_MASK` (`linux/netlink.h`): an attribute's type without its flags.
const TYPE_MASK: u16 = 0x3fff;

/// A message header, without the length and the port ID.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Message type.
    pub kind: u16,
    /// `NLM_F_*` flags.
    pub flags: u16,
    /// Sequence number, which the reply repeats.
    pub sequence: u32,
}

/// A received message.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// The header.
    pub header: Header,
    /// What follows the header.
    pub body: &'a [u8],
    /// The whole message, header included.
    pub bytes: &'a [u8],
}

/// The messages of a received datagram; ends at the first that is malformed.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

/// An encoder of consecutive messages.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// The encoded messages.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Discards everything, and keeps at most `keep` bytes of memory.
    pub fn reset(&mut self, keep: usize) {
        self.bytes.clear();
        self.bytes.shrink_to(keep);
    }

    /// Appends a message of a netfilter subsystem.
    pub fn put_message(
        &mut self,
        header: Header,
        family: u8,
        resource: u16,
        body: impl FnOnce(&mut Self),
    ) {
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

    /// Sets flags in the header of the message that starts at `offset`.
    pub fn add_flags(&mut self, offset: usize, flags: u16) {
        let field = &mut self.bytes[offset + 6..offset + 8];
        let old = u16::from_ne_bytes([field[0], field[1]]);
        field.copy_from_slice(&(old | flags).to_ne_bytes());
    }

    /// Appends an attribute.
    pub fn put(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(ATTRIBUTE_HEADER_LEN + value.len())
            .expect("callers split values before 64 KiB");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    /// Appends a string attribute, with its terminating zero byte.
    pub fn put_str(&mut self, kind: u16, value: &str) {
        let length = u16::try_from(ATTRIBUTE_HEADER_LEN + value.len() + 1)
            .expect("names and prefixes are short");
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    /// Appends a 16-bit number in network byte order.
    pub fn put_u16(&mut self, kind: u16, value: u16) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Appends a 32-bit number in network byte order.
    pub fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Appends a 64-bit number in network byte order.
    pub fn put_u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Appends an attribute whose value is attributes.
    pub fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        body(self);
        let length =
            u16::try_from(self.bytes.len() - start).expect("callers split lists before 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn pad(&mut self) {
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

/// The messages of a received datagram.
pub const fn messages(datagram: &[u8]) -> Messages<'_> {
    Messages { rest: datagram }
}

impl<'a> Messages<'a> {
    /// The bytes after the last message: empty, or malformed.
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let rest = self.rest;
        let length = u32_ne(rest, 0)? as usize;
        let body = rest.get(HEADER_LEN..length)?;
        let header = Header {
            kind: u16_ne(rest, 4)?,
            flags: u16_ne(rest, 6)?,
            sequence: u32_ne(rest, 8)?,
        };
        self.rest = rest
            .get(length.next_multiple_of(ALIGNMENT)..)
            .unwrap_or_default();
        Some(Message {
            header,
            body,
            bytes: &rest[..length],
        })
    }
}

/// The attributes in these bytes, as types without flags and values; ends at the first that is
/// malformed.
pub fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_ne(rest, 0)?);
        let kind = u16_ne(rest, 2)? & TYPE_MASK;
        let value = rest.get(ATTRIBUTE_HEADER_LEN..length)?;
        rest = rest
            .get(length.next_multiple_of(ALIGNMENT)..)
            .unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

/// The number in the first attribute of a type, which is in network byte order.
pub fn attribute_u32(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(attribute(bytes, kind)?.try_into().ok()?))
}

/// The string in the first attribute of a type, without its terminating zero byte.
pub fn attribute_str(bytes: &[u8], kind: u16) -> Option<&str> {
    str_of(attribute(bytes, kind)?)
}

/// The string up to the first zero byte; `None` if it is not UTF-8.
pub fn str_of(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value.split(|byte| *byte == 0).next()?).ok()
}

/// The 32-bit number at an offset, in host byte order.
pub fn u32_ne(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(
        bytes.get(offset..offset + 4)?.try_into().ok()?,
    ))
}

fn u16_ne(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(
        bytes.get(offset..offset + 2)?.try_into().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_LEN + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize(HEADER_LEN, 0);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }

    #[test]
    fn messages_end_at_the_first_that_is_malformed() {
        let datagram = [
            mk_message(16, &[1, 2, 3]),
            mk_message(17, &[]),
            mk_message(18, &[4; 8]),
        ]
        .concat();
        let found: Vec<_> = messages(&datagram)
            .map(|message| (message.header.kind, message.body.to_vec()))
            .collect();
        assert_eq!(found, [(16, vec![1, 2, 3]), (17, vec![]), (18, vec![4; 8])]);
        for length in 0..datagram.len() {
            let mut found = messages(&datagram[..length]);
            let complete = [19, 36, 60]
                .into_iter()
                .filter(|end| *end <= length)
                .count();
            assert_eq!(found.by_ref().count(), complete, "{length} bytes");
            assert!(found.rest().len() < 24, "{length} bytes");
        }
        for length in [0u32, 15, u32::MAX] {
            let mut datagram = mk_message(16, &[]);
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(
                messages(&datagram).count(),
                0,
                "a message that claims {length} bytes"
            );
        }
    }
}
