//! Encoding of sets and their elements.

use super::{Batch, Origin};
use crate::constants::*;
use crate::rule::{Rule, SetRef, Verdict};
use crate::ruleset::TableName;
use crate::set::{Datum, Family, Field, FieldType, Key, Set, SetKind, Value, ValueType};
use margay_netlink::wire::Writer;

/// Bytes of elements after which a message ends: the length of the attribute that holds them is 16
/// bits.
const LIST_MAX: usize = 48 * 1024;
/// Upper bound of an element in bytes: two keys of five fields, and a verdict with a long chain
/// name.
const ELEMENT_MAX: usize = 1024;
const _: () = assert!(LIST_MAX + ELEMENT_MAX < u16::MAX as usize);

/// Name templates of anonymous sets, as in nft; the kernel fills in the number.
const ANONYMOUS_SET: &str = "__set%d";
const ANONYMOUS_MAP: &str = "__map%d";

/// The set that elements belong to.
#[derive(Clone, Copy)]
pub struct ElementList<'a> {
    /// Its table.
    pub table: &'a TableName,
    /// Its name, or the template of an anonymous set.
    pub name: &'a str,
    /// Its `NFTA_SET_ID` in this batch, for an anonymous set, which has no final name yet.
    pub id: Option<u32>,
}

/// A set to create.
pub struct SetCreation<'a> {
    /// Its name, or the template of an anonymous set.
    pub name: &'a str,
    /// Types and flags.
    pub kind: &'a SetKind,
    /// Its `NFTA_SET_ID` in this batch.
    pub id: u32,
    /// Flags in addition to those of the kind.
    pub extra_flags: u32,
    /// Number of elements, if the set is constant.
    pub size: Option<u32>,
}

/// An anonymous set of a rule: its name template and its `NFTA_SET_ID` in this batch.
pub type AnonymousId = (&'static str, u32);

impl Batch {
    /// Appends the messages that create and fill the anonymous sets of a rule, in the order of its
    /// lookups.
    pub(super) fn put_anonymous_sets(
        &mut self,
        table: &TableName,
        rule: &Rule,
        origin: Origin,
    ) -> Vec<AnonymousId> {
        let lookups = rule
            .statements
            .iter()
            .filter_map(|statement| statement.lookup());
        let sets = lookups.filter_map(|(_, set)| match set {
            SetRef::Anonymous(set) => Some(set),
            SetRef::Named(_) => None,
        });
        sets.map(|set| self.put_anonymous_set(table, set, origin))
            .collect()
    }

    fn put_anonymous_set(&mut self, table: &TableName, set: &Set, origin: Origin) -> AnonymousId {
        let name = if set.kind.value == ValueType::Member {
            ANONYMOUS_SET
        } else {
            ANONYMOUS_MAP
        };
        let id = self.take_set_id();
        let parts = if is_segmented(&set.kind) { 2 } else { 1 };
        let creation = SetCreation {
            name,
            kind: &set.kind,
            id,
            extra_flags: NFT_SET_ANONYMOUS | NFT_SET_CONSTANT,
            size: Some(set.elements.len() as u32 * parts),
        };
        self.put_message(NFT_MSG_NEWSET, NLM_F_CREATE, origin, |w| {
            put_set_attributes(w, table, creation)
        });
        self.put_elements(
            NFT_MSG_NEWSETELEM,
            ElementList {
                table,
                name,
                id: Some(id),
            },
            set,
            origin,
        );
        (name, id)
    }

    /// Appends the messages that add or delete elements, as many as their size requires.
    pub(super) fn put_elements(
        &mut self,
        kind: u16,
        list: ElementList<'_>,
        set: &Set,
        origin: Origin,
    ) {
        let flags = if kind == NFT_MSG_NEWSETELEM {
            NLM_F_CREATE
        } else {
            0
        };
        let with_values = kind == NFT_MSG_NEWSETELEM;
        let mut elements = set.elements.iter().peekable();
        while elements.peek().is_some() {
            self.put_message(kind, flags, origin, |w| {
                w.put_str(NFTA_SET_ELEM_LIST_TABLE, list.table.as_str());
                w.put_str(NFTA_SET_ELEM_LIST_SET, list.name);
                list.id
                    .iter()
                    .for_each(|id| w.put_u32(NFTA_SET_ELEM_LIST_SET_ID, *id));
                w.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |w| {
                    let end = w.bytes().len() + LIST_MAX;
                    while w.bytes().len() < end {
                        let Some((key, value)) = elements.next() else {
                            break;
                        };
                        put_element(w, &set.kind, key, with_values.then_some(value));
                    }
                });
            });
        }
    }
}

/// Writes the attributes of a new set.
pub fn put_set_attributes(w: &mut Writer, table: &TableName, creation: SetCreation<'_>) {
    let kind = creation.kind;
    w.put_str(NFTA_SET_TABLE, table.as_str());
    w.put_str(NFTA_SET_NAME, creation.name);
    w.put_u32(NFTA_SET_FLAGS, kind_flags(kind) | creation.extra_flags);
    w.put_u32(NFTA_SET_KEY_TYPE, concat_type(&kind.key));
    w.put_u32(NFTA_SET_KEY_LEN, data_length(&kind.key));
    match &kind.value {
        ValueType::Member => {}
        ValueType::Verdict => {
            w.put_u32(NFTA_SET_DATA_TYPE, NFT_DATA_VERDICT);
            w.put_u32(NFTA_SET_DATA_LEN, 0);
        }
        ValueType::Data(fields) => {
            w.put_u32(NFTA_SET_DATA_TYPE, concat_type(fields));
            w.put_u32(NFTA_SET_DATA_LEN, data_length(fields));
        }
    }
    w.put_u32(NFTA_SET_ID, creation.id);
    let ranges_of_fields = kind.interval && kind.key.len() > 1;
    if ranges_of_fields || creation.size.is_some() {
        w.nest(NFTA_SET_DESC, |w| {
            creation
                .size
                .iter()
                .for_each(|size| w.put_u32(NFTA_SET_DESC_SIZE, *size));
            if ranges_of_fields {
                w.nest(NFTA_SET_DESC_CONCAT, |w| {
                    kind.key
                        .iter()
                        .for_each(|field| put_field_length(w, *field))
                });
            }
        });
    }
    w.put(NFTA_SET_USERDATA, &byte_orders(kind));
}

fn put_field_length(w: &mut Writer, field: FieldType) {
    w.nest(NFTA_LIST_ELEM, |w| {
        w.put_u32(NFTA_SET_FIELD_LEN, field_width(field))
    });
}

fn kind_flags(kind: &SetKind) -> u32 {
    let interval = if kind.interval { NFT_SET_INTERVAL } else { 0 };
    let concat = if kind.interval && kind.key.len() > 1 {
        NFT_SET_CONCAT
    } else {
        0
    };
    let map = if kind.value == ValueType::Member {
        0
    } else {
        NFT_SET_MAP
    };
    interval | concat | map
}

/// The user data of a set. Without it, nft lists interface names and marks in the wrong byte order.
fn byte_orders(kind: &SetKind) -> Vec<u8> {
    let mut record = Vec::new();
    let mut put = |name: u8, order: u32| {
        record.extend_from_slice(&[name, 4]);
        record.extend_from_slice(&order.to_ne_bytes());
    };
    put(UDATA_SET_KEYBYTEORDER, byte_order(&kind.key));
    match &kind.value {
        ValueType::Member => {}
        ValueType::Verdict => put(UDATA_SET_DATABYTEORDER, BYTEORDER_INVALID),
        ValueType::Data(fields) => put(UDATA_SET_DATABYTEORDER, byte_order(fields)),
    }
    record
}

fn byte_order(fields: &[FieldType]) -> u32 {
    match fields {
        [FieldType::Iface | FieldType::Mark | FieldType::CtState] => BYTEORDER_HOST,
        [_] => BYTEORDER_BIG,
        _ => BYTEORDER_INVALID,
    }
}

/// Whether the kernel holds each range as two elements, the first value and the one after the last.
fn is_segmented(kind: &SetKind) -> bool {
    kind.interval && kind.key.len() == 1
}

fn put_element(w: &mut Writer, kind: &SetKind, key: &Key, value: Option<&Value>) {
    if !is_segmented(kind) {
        return w.nest(NFTA_LIST_ELEM, |w| {
            put_fields(w, NFTA_SET_ELEM_KEY, key.fields().iter().map(Field::first));
            if kind.interval {
                put_fields(
                    w,
                    NFTA_SET_ELEM_KEY_END,
                    key.fields().iter().map(Field::last),
                );
            }
            put_value(w, value);
        });
    }
    for field in key.fields() {
        w.nest(NFTA_LIST_ELEM, |w| {
            put_fields(w, NFTA_SET_ELEM_KEY, [field.first()].into_iter());
            put_value(w, value);
        });
        // A range up to the highest value has no end element.
        if let Some(end) = successor(field.last()) {
            w.nest(NFTA_LIST_ELEM, |w| {
                w.put_u32(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END);
                w.nest(NFTA_SET_ELEM_KEY, |w| {
                    w.put(NFTA_DATA_VALUE, end.as_slice())
                });
            });
        }
    }
}

fn put_fields(w: &mut Writer, attribute: u16, fields: impl ExactSizeIterator<Item = Datum>) {
    w.nest(attribute, |w| {
        w.put(NFTA_DATA_VALUE, Packed::of(fields).as_slice())
    });
}

fn put_value(w: &mut Writer, value: Option<&Value>) {
    match value {
        None | Some(Value::Member) => {}
        Some(Value::Verdict(verdict)) => w.nest(NFTA_SET_ELEM_DATA, |w| put_verdict(w, verdict)),
        Some(Value::Data(data)) => put_fields(w, NFTA_SET_ELEM_DATA, data.iter().copied()),
    }
}

/// Writes a verdict.
pub fn put_verdict(w: &mut Writer, verdict: &Verdict) {
    w.nest(NFTA_DATA_VERDICT, |w| {
        w.put(NFTA_VERDICT_CODE, &verdict_code(verdict).to_be_bytes());
        verdict
            .target()
            .iter()
            .for_each(|chain| w.put_str(NFTA_VERDICT_CHAIN, chain.as_str()));
    });
}

const fn verdict_code(verdict: &Verdict) -> i32 {
    match verdict {
        Verdict::Accept => NF_ACCEPT,
        Verdict::Drop => NF_DROP,
        Verdict::Continue => NFT_CONTINUE,
        Verdict::Return => NFT_RETURN,
        Verdict::Jump(_) => NFT_JUMP,
        Verdict::Goto(_) => NFT_GOTO,
    }
}

/// A value in the kernel's form: each field in its own byte order, padded to registers of four
/// bytes. The kernel has sixteen of them (`NFT_REG32_COUNT`).
#[derive(Clone, Copy)]
pub struct Packed {
    bytes: [u8; 64],
    length: usize,
}

impl Packed {
    /// Packs the fields of a concatenation, or a single field, which is not padded.
    pub fn of(fields: impl ExactSizeIterator<Item = Datum>) -> Self {
        let pads = fields.len() > 1;
        let mut packed = Self {
            bytes: [0; 64],
            length: 0,
        };
        for field in fields {
            packed.push(field);
            if pads {
                packed.length = packed.length.next_multiple_of(4);
            }
        }
        packed
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn push(&mut self, datum: Datum) {
        match datum {
            Datum::Ipv4(address) => self.extend(&address.octets()),
            Datum::Ipv6(address) => self.extend(&address.octets()),
            Datum::Ether(address) => self.extend(&address),
            Datum::Proto(proto) => self.extend(&[proto.0]),
            Datum::Port(port) => self.extend(&port.to_be_bytes()),
            Datum::Iface(name) => self.extend(name.padded()),
            Datum::Mark(mark) => self.extend(&mark.to_ne_bytes()),
            Datum::CtState(state) => self.extend(&state.0.to_ne_bytes()),
            Datum::Family(Family::Ipv4) => self.extend(&[NFPROTO_IPV4]),
            Datum::Family(Family::Ipv6) => self.extend(&[NFPROTO_IPV6]),
            Datum::IcmpType(value)
            | Datum::IcmpCode(value)
            | Datum::Icmp6Type(value)
            | Datum::Icmp6Code(value) => self.extend(&[value]),
        }
    }

    fn extend(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }
}

/// The next higher value; `None` after the highest.
fn successor(value: Datum) -> Option<Packed> {
    let mut packed = Packed::of([value].into_iter());
    for byte in packed.bytes[..packed.length].iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return Some(packed);
        }
    }
    None
}

/// Length in bytes of a value of these fields, each padded to registers if there are several.
pub const fn data_length(fields: &[FieldType]) -> u32 {
    if let [field] = fields {
        return field_width(*field);
    }
    let mut length = 0;
    let mut index = 0;
    while index < fields.len() {
        length += field_width(fields[index]).next_multiple_of(4);
        index += 1;
    }
    length
}

/// Length of one field in bytes.
pub const fn field_width(field: FieldType) -> u32 {
    match field {
        FieldType::Ipv6 | FieldType::Iface => 16,
        FieldType::Ether => 6,
        FieldType::Ipv4 | FieldType::Mark | FieldType::CtState => 4,
        FieldType::Port => 2,
        FieldType::Proto
        | FieldType::Family
        | FieldType::IcmpType
        | FieldType::IcmpCode
        | FieldType::Icmp6Type
        | FieldType::Icmp6Code => 1,
    }
}

/// The number of nft's data type (`enum datatypes` in nft's `include/datatype.h`); the kernel only
/// stores it.
pub const fn nft_type(field: FieldType) -> u32 {
    match field {
        FieldType::Family => 2,
        FieldType::Ipv4 => 7,
        FieldType::Ipv6 => 8,
        FieldType::Ether => 9,
        FieldType::Proto => 12,
        FieldType::Port => 13,
        FieldType::IcmpType => 14,
        FieldType::Mark => 19,
        FieldType::CtState => 26,
        FieldType::Icmp6Type => 29,
        FieldType::IcmpCode => 32,
        FieldType::Icmp6Code => 33,
        FieldType::Iface => 41,
    }
}

/// The type number of a concatenation: six bits per field (`TYPE_BITS` in nft), the first field
/// highest.
fn concat_type(fields: &[FieldType]) -> u32 {
    fields
        .iter()
        .fold(0, |types, field| types << 6 | nft_type(*field))
}
