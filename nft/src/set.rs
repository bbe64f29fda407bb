//! Sets, maps and their elements: typed values, ranges of values, and concatenations.
//!
//! A range is stored as its first and last value, so a prefix and the equivalent range compare
//! equal.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::{BitOr, RangeInclusive};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::rule::Verdict;

/// A set or map with its elements: named as part of a table, anonymous as part of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Set {
    /// Types of keys and values. A named set whose kind changes is deleted and recreated.
    pub kind: SetKind,
    /// Elements by key; every value is of the type that `kind.value` names.
    pub elements: BTreeMap<Key, Value>,
}

/// Key type, value type and flags of a set, which cannot change while the set exists.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SetKind {
    /// Types of the key's fields; several for a concatenation.
    pub key: Vec<FieldType>,
    /// `flags interval`: whether keys may be ranges. Changing one element of an interval set takes
    /// longer the more it has (34 us at 1,000, 32 ms at 100,000); a plain set takes 5 us at any
    /// size. Keep single addresses in plain sets.
    pub interval: bool,
    /// Type of the values.
    pub value: ValueType,
}

/// The type of a set's values.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ValueType {
    /// No value: a set.
    Member,
    /// Verdicts: a verdict map.
    Verdict,
    /// Fields for use by a statement, such as the target of NAT: a data map.
    Data(Vec<FieldType>),
}

/// The value of one element, of the type that its set's [`ValueType`] names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// Element of a set.
    Member,
    /// Element of a verdict map.
    Verdict(Verdict),
    /// Element of a data map.
    Data(Box<[Datum]>),
}

/// The key of an element: one field, or several in a concatenation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// Key of a set with one field. Not boxed, because the large sets are of this kind.
    One(Field),
    /// Key of a concatenation, with fields in the order of [`SetKind::key`].
    Concat(Box<[Field]>),
}

/// One field of a key: all values from `first` to `last`, which are of the same type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Field {
    first: Datum,
    last: Datum,
}

/// A value of one of nft's data types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Datum {
    /// IPv4 address.
    Ipv4(Ipv4Addr),
    /// IPv6 address.
    Ipv6(Ipv6Addr),
    /// Ethernet address.
    Ether([u8; 6]),
    /// Transport protocol number.
    Proto(Proto),
    /// Transport port.
    Port(u16),
    /// Interface name.
    Iface(IfName),
    /// Packet mark.
    Mark(u32),
    /// Connection tracking states, one bit each.
    CtState(CtState),
    /// Network protocol.
    Family(Family),
    /// ICMP type.
    IcmpType(u8),
    /// ICMP code.
    IcmpCode(u8),
    /// ICMPv6 type.
    Icmp6Type(u8),
    /// ICMPv6 code.
    Icmp6Code(u8),
}

/// The type of a [`Datum`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FieldType {
    /// `ipv4_addr`
    Ipv4,
    /// `ipv6_addr`
    Ipv6,
    /// `ether_addr`
    Ether,
    /// `inet_proto`
    Proto,
    /// `inet_service`
    Port,
    /// `ifname`
    Iface,
    /// `mark`
    Mark,
    /// `ct_state`
    CtState,
    /// `nf_proto`
    Family,
    /// `icmp_type`
    IcmpType,
    /// `icmp_code`
    IcmpCode,
    /// `icmpv6_type`
    Icmp6Type,
    /// `icmpv6_code`
    Icmp6Code,
}

/// An IP protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Proto(pub u8);

/// A set of connection tracking states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CtState(pub u32);

/// Network protocol of a packet, as in `meta nfproto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// An interface name: at most 15 bytes, zero padded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName([u8; 16]);

// --- Set ---

impl Set {
    /// An empty set or map.
    pub fn new(kind: SetKind) -> Self {
        Self {
            kind,
            elements: BTreeMap::new(),
        }
    }

    /// A set with these elements.
    pub fn members(kind: SetKind, keys: impl IntoIterator<Item = impl Into<Key>>) -> Self {
        Self {
            kind,
            elements: keys
                .into_iter()
                .map(|key| (key.into(), Value::Member))
                .collect(),
        }
    }

    /// A verdict map with these elements.
    pub fn verdicts(
        kind: SetKind,
        entries: impl IntoIterator<Item = (impl Into<Key>, Verdict)>,
    ) -> Self {
        let elements = entries
            .into_iter()
            .map(|(key, verdict)| (key.into(), Value::Verdict(verdict)))
            .collect();
        Self { kind, elements }
    }
}

impl SetKind {
    /// A set of single values.
    pub fn of(key: impl Into<Vec<FieldType>>) -> Self {
        Self {
            key: key.into(),
            interval: false,
            value: ValueType::Member,
        }
    }

    /// The same with `flags interval`: keys may be ranges.
    pub fn with_intervals(self) -> Self {
        Self {
            interval: true,
            ..self
        }
    }

    /// The same as a verdict map.
    pub fn with_verdicts(self) -> Self {
        Self {
            value: ValueType::Verdict,
            ..self
        }
    }

    /// The same as a data map.
    pub fn with_data(self, fields: impl Into<Vec<FieldType>>) -> Self {
        Self {
            value: ValueType::Data(fields.into()),
            ..self
        }
    }
}

// --- Key and Field ---

impl Key {
    /// A concatenation of these fields, or the plain key if there is only one.
    pub fn concat(fields: impl IntoIterator<Item = Field>) -> Self {
        let fields: Vec<Field> = fields.into_iter().collect();
        match fields.as_slice() {
            [one] => Self::One(*one),
            _ => Self::Concat(fields.into()),
        }
    }

    /// The fields in order.
    pub fn fields(&self) -> &[Field] {
        match self {
            Self::One(field) => std::slice::from_ref(field),
            Self::Concat(fields) => fields,
        }
    }

    /// Whether some packet matches both keys. They must be of the same kind.
    pub fn overlaps(&self, other: &Self) -> bool {
        let mut fields = self.fields().iter().zip(other.fields());
        fields.all(|(ours, theirs)| ours.first() <= theirs.last() && theirs.first() <= ours.last())
    }

    /// Whether every field is a single value, which a set without intervals requires.
    pub fn is_single(&self) -> bool {
        self.fields().iter().all(Field::is_single)
    }
}

impl Field {
    /// The range from `first` to `last`, both included.
    ///
    /// # Panics
    /// If the two differ in type, or `first` is greater than `last`.
    pub fn range(first: Datum, last: Datum) -> Self {
        assert!(
            first.field_type() == last.field_type() && first <= last,
            "not a range: {first:?} to {last:?}"
        );
        Self { first, last }
    }

    /// A single value.
    pub const fn single(value: Datum) -> Self {
        Self {
            first: value,
            last: value,
        }
    }

    /// The lowest value.
    pub const fn first(&self) -> Datum {
        self.first
    }

    /// The highest value.
    pub const fn last(&self) -> Datum {
        self.last
    }

    /// Whether this is a single value.
    pub fn is_single(&self) -> bool {
        self.first == self.last
    }

    /// Whether the value is of the same type and inside the range.
    pub fn contains(&self, value: Datum) -> bool {
        self.first.field_type() == value.field_type() && self.first <= value && value <= self.last
    }

    /// Length of the prefix that covers exactly this range; `None` if there is none, or if these
    /// are not addresses.
    pub fn prefix_length(&self) -> Option<u8> {
        match (self.first, self.last) {
            (Datum::Ipv4(first), Datum::Ipv4(last)) => prefix_length(
                first.to_bits().into(),
                last.to_bits().into(),
                Ipv4Addr::BITS,
            ),
            (Datum::Ipv6(first), Datum::Ipv6(last)) => {
                prefix_length(first.to_bits(), last.to_bits(), Ipv6Addr::BITS)
            }
            _ => None,
        }
    }
}

/// Length of the prefix that covers exactly `first..=last`, for addresses of `width` bits.
fn prefix_length(first: u128, last: u128, width: u32) -> Option<u8> {
    let host = first ^ last;
    let aligned = first & host == 0;
    let host_bits = u128::BITS - host.leading_zeros();
    let contiguous = host.count_ones() == host_bits;
    (aligned && contiguous).then(|| (width - host_bits) as u8)
}

macro_rules! field_from {
    ($($from:ty => |$value:ident| $datum:expr),* $(,)?) => {$(
        impl From<$from> for Datum {
            fn from($value: $from) -> Self { $datum }
        }
        impl From<$from> for Field {
            fn from(value: $from) -> Self { Self::single(value.into()) }
        }
        impl From<$from> for Key {
            fn from(value: $from) -> Self { Self::One(value.into()) }
        }
    )*};
}

field_from! {
    Ipv4Addr => |address| Datum::Ipv4(address),
    Ipv6Addr => |address| Datum::Ipv6(address),
    IpAddr => |address| match address {
        IpAddr::V4(v4) => Datum::Ipv4(v4),
        IpAddr::V6(v6) => Datum::Ipv6(v6),
    },
    Proto => |proto| Datum::Proto(proto),
    IfName => |name| Datum::Iface(name),
    CtState => |state| Datum::CtState(state),
    Family => |family| Datum::Family(family),
}

impl From<Datum> for Field {
    fn from(value: Datum) -> Self {
        Self::single(value)
    }
}

impl From<Ipv4Net> for Field {
    fn from(net: Ipv4Net) -> Self {
        Self {
            first: Datum::Ipv4(net.network()),
            last: Datum::Ipv4(net.broadcast()),
        }
    }
}

impl From<Ipv6Net> for Field {
    fn from(net: Ipv6Net) -> Self {
        Self {
            first: Datum::Ipv6(net.network()),
            last: Datum::Ipv6(net.broadcast()),
        }
    }
}

impl From<IpNet> for Field {
    fn from(net: IpNet) -> Self {
        match net {
            IpNet::V4(net) => net.into(),
            IpNet::V6(net) => net.into(),
        }
    }
}

/// A range of ports. Panics like [`Field::range`] if the range is empty.
impl From<RangeInclusive<u16>> for Field {
    fn from(ports: RangeInclusive<u16>) -> Self {
        Self::range(Datum::Port(*ports.start()), Datum::Port(*ports.end()))
    }
}

impl From<Datum> for Key {
    fn from(value: Datum) -> Self {
        Self::One(value.into())
    }
}

impl From<Field> for Key {
    fn from(field: Field) -> Self {
        Self::One(field)
    }
}

macro_rules! key_from_field {
    ($($from:ty),*) => {$(
        impl From<$from> for Key {
            fn from(field: $from) -> Self {
                Self::One(field.into())
            }
        }
    )*};
}

key_from_field!(IpNet, Ipv4Net, Ipv6Net, RangeInclusive<u16>);

impl<const N: usize> From<[Field; N]> for Key {
    fn from(fields: [Field; N]) -> Self {
        Self::concat(fields)
    }
}

// --- Datum ---

impl Datum {
    /// The type of this value.
    pub const fn field_type(&self) -> FieldType {
        match self {
            Self::Ipv4(_) => FieldType::Ipv4,
            Self::Ipv6(_) => FieldType::Ipv6,
            Self::Ether(_) => FieldType::Ether,
            Self::Proto(_) => FieldType::Proto,
            Self::Port(_) => FieldType::Port,
            Self::Iface(_) => FieldType::Iface,
            Self::Mark(_) => FieldType::Mark,
            Self::CtState(_) => FieldType::CtState,
            Self::Family(_) => FieldType::Family,
            Self::IcmpType(_) => FieldType::IcmpType,
            Self::IcmpCode(_) => FieldType::IcmpCode,
            Self::Icmp6Type(_) => FieldType::Icmp6Type,
            Self::Icmp6Code(_) => FieldType::Icmp6Code,
        }
    }
}

impl Family {
    /// Both families.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// The type of the family's addresses.
    pub const fn address_type(self) -> FieldType {
        match self {
            Self::Ipv4 => FieldType::Ipv4,
            Self::Ipv6 => FieldType::Ipv6,
        }
    }
}

impl Proto {
    /// ICMP.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// SCTP.
    pub const SCTP: Self = Self(132);
    /// UDP-Lite.
    pub const UDPLITE: Self = Self(136);
}

impl CtState {
    // Bits as in `NF_CT_STATE_BIT` (linux/netfilter/nf_conntrack_common.h).

    /// `invalid`: belongs to no connection.
    pub const INVALID: Self = Self(1);
    /// `established`: the connection has seen packets in both directions.
    pub const ESTABLISHED: Self = Self(2);
    /// `related`: a new connection that another one expects.
    pub const RELATED: Self = Self(4);
    /// `new`: the first packet of a connection.
    pub const NEW: Self = Self(8);
    /// `untracked`: exempt from connection tracking.
    pub const UNTRACKED: Self = Self(64);
}

impl BitOr for CtState {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

// --- IfName ---

impl IfName {
    /// Longest name that the kernel accepts: `IFNAMSIZ` - 1 (`linux/if.h`).
    pub const MAX: usize = 15;

    /// Validates a name: `None` if it is empty, longer than [`IfName::MAX`], not printable ASCII,
    /// or has a character that the kernel refuses (`/`) or that nft would read as syntax (`"`,
    /// `*`).
    pub fn new(name: &str) -> Option<Self> {
        let bytes = name.as_bytes();
        let valid = !bytes.is_empty()
            && bytes.len() <= Self::MAX
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'"' | b'*'));
        valid.then(|| {
            let mut padded = [0; 16];
            padded[..bytes.len()].copy_from_slice(bytes);
            Self(padded)
        })
    }

    /// Reads a name in the kernel's zero padded form; `None` if it is not valid.
    pub fn from_padded(padded: [u8; 16]) -> Option<Self> {
        let length = padded.iter().position(|byte| *byte == 0)?;
        Self::new(std::str::from_utf8(&padded[..length]).ok()?).filter(|name| name.0 == padded)
    }

    /// The name in the kernel's zero padded form.
    pub const fn padded(&self) -> &[u8; 16] {
        &self.0
    }

    /// The name as a string slice.
    pub fn as_str(&self) -> &str {
        let length = self
            .0
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(self.0.len());
        std::str::from_utf8(&self.0[..length]).unwrap_or_default()
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}
