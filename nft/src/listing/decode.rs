//! Decoding of the kernel's attributes into typed values. What the encoder never writes is reported
//! as unrecognised, never guessed at.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::constants::*;
use crate::encode::{chain_type_name, data_length, field_width, hook_number, nft_type};
use crate::rule::Verdict;
use crate::ruleset::{Base, ChainName, ChainPolicy, ChainType, Hook, SetName};
use crate::set::{
    CtState, Datum, Family, Field, FieldType, IfName, Key, Proto, Set, SetKind, Value, ValueType,
};
use margay_netlink::wire::{attribute, attribute_str, attribute_u32, attributes, str_of};

/// Decodes a chain's name and its hook, if it is a base chain.
pub fn chain(attributes: &[u8]) -> Result<(ChainName, Option<Base>), String> {
    let name = attribute_str(attributes, NFTA_CHAIN_NAME).unwrap_or_default();
    let name = ChainName::new(name).map_err(|error| error.to_string())?;
    let Some(hook) = attribute(attributes, NFTA_CHAIN_HOOK) else {
        return Ok((name, None));
    };
    match base(attributes, hook) {
        Some(base) => Ok((name, Some(base))),
        None => Err(format!("chain {name} has an unsupported type or hook")),
    }
}

fn base(attributes: &[u8], hook: &[u8]) -> Option<Base> {
    let number = attribute_u32(hook, NFTA_HOOK_HOOKNUM)?;
    let kind_name = attribute_str(attributes, NFTA_CHAIN_TYPE)?;
    let hooks = [
        Hook::Prerouting,
        Hook::Input,
        Hook::Forward,
        Hook::Output,
        Hook::Postrouting,
    ];
    let kinds = [ChainType::Filter, ChainType::Nat, ChainType::Route];
    Some(Base {
        kind: kinds
            .into_iter()
            .find(|kind| chain_type_name(*kind) == kind_name)?,
        hook: hooks
            .into_iter()
            .find(|hook| hook_number(*hook) == number)?,
        priority: attribute_u32(hook, NFTA_HOOK_PRIORITY)?.cast_signed(),
        policy: if attribute_u32(attributes, NFTA_CHAIN_POLICY)? == 0 {
            ChainPolicy::Drop
        } else {
            ChainPolicy::Accept
        },
    })
}

/// Decodes the fingerprint in a rule's comment, if there is one.
pub fn fingerprint(attributes: &[u8]) -> Option<u64> {
    let record = attribute(attributes, NFTA_RULE_USERDATA)?;
    let (&[kind, length], rest) = record.split_first_chunk()?;
    let comment = str_of(rest.get(..usize::from(length))?)?;
    (kind == UDATA_RULE_COMMENT && comment.len() == 16)
        .then(|| u64::from_str_radix(comment, 16).ok())
        .flatten()
}

/// Collects the elements of a set from a dump.
pub struct SetReader {
    name: SetName,
    set: Set,
    /// Start elements of an interval set without concatenation, which holds each range as two
    /// elements.
    starts: BTreeMap<Datum, Value>,
    /// End elements (`NFT_SET_ELEM_INTERVAL_END`): the first values after the ranges.
    ends: BTreeSet<Datum>,
    unrecognised: Option<String>,
}

impl SetReader {
    /// A reader for the set with these attributes; `None` for an anonymous set, which is part of a
    /// rule.
    pub fn of(attributes: &[u8]) -> Result<Option<Self>, String> {
        let flags = attribute_u32(attributes, NFTA_SET_FLAGS).unwrap_or_default();
        if flags & NFT_SET_ANONYMOUS != 0 {
            return Ok(None);
        }
        let name = attribute_str(attributes, NFTA_SET_NAME).unwrap_or_default();
        let name = SetName::new(name).map_err(|error| error.to_string())?;
        let kind = set_kind(attributes, flags)
            .ok_or_else(|| format!("set {name} has unsupported types or flags"))?;
        let (starts, ends) = Default::default();
        Ok(Some(Self {
            name,
            set: Set::new(kind),
            starts,
            ends,
            unrecognised: None,
        }))
    }

    /// The set's name.
    pub fn name(&self) -> &SetName {
        &self.name
    }

    /// Reads the elements of one message.
    pub fn read(&mut self, message: &[u8]) {
        let list = attribute(message, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
        for (_, element) in attributes(list) {
            if self.read_element(element).is_none() {
                self.unrecognised = Some(format!(
                    "set {} has an element that cannot be decoded",
                    self.name
                ));
            }
        }
    }

    /// Returns the set, with start and end elements paired into ranges: the dump is in no
    /// particular order.
    pub fn finish(mut self) -> Result<Set, String> {
        if let Some(unrecognised) = self.unrecognised {
            return Err(unrecognised);
        }
        while let Some((start, value)) = self.starts.pop_first() {
            let next_start = self.starts.first_key_value().map(|(start, _)| *start);
            let end = self.ends.iter().find(|end| **end > start).copied();
            let last = match (end, next_start) {
                (Some(end), Some(next)) if end > next => None,
                (Some(end), _) => predecessor(end),
                (None, _) => Some(highest(start.field_type())),
            };
            let last =
                last.ok_or_else(|| format!("set {} has a range without an end", self.name))?;
            self.ends = end.map(|end| self.ends.split_off(&end)).unwrap_or_default();
            self.set
                .elements
                .insert(Key::One(Field::range(start, last)), value);
        }
        Ok(self.set)
    }

    fn read_element(&mut self, element: &[u8]) -> Option<()> {
        let flags = attribute_u32(element, NFTA_SET_ELEM_FLAGS).unwrap_or_default();
        let kind = &self.set.kind;
        let first = fields(
            &kind.key,
            attribute(attribute(element, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?,
        )?;
        let segmented = kind.interval && kind.key.len() == 1;
        match (segmented, flags) {
            (true, NFT_SET_ELEM_INTERVAL_END) => {
                self.ends.insert(first[0]);
            }
            (true, 0) => {
                self.starts.insert(first[0], value(&kind.value, element)?);
            }
            (false, 0) => {
                let last = match attribute(element, NFTA_SET_ELEM_KEY_END) {
                    Some(end) => fields(&kind.key, attribute(end, NFTA_DATA_VALUE)?)?,
                    None => first.clone(),
                };
                let ordered = first.iter().zip(&last).all(|(first, last)| first <= last);
                let ranges = first
                    .iter()
                    .zip(&last)
                    .map(|(first, last)| Field::range(*first, *last));
                let key = ordered.then(|| Key::concat(ranges))?;
                self.set
                    .elements
                    .insert(key, value(&self.set.kind.value, element)?);
            }
            _ => return None,
        }
        Some(())
    }
}

fn set_kind(attributes: &[u8], flags: u32) -> Option<SetKind> {
    let key = fields_of_type(attribute_u32(attributes, NFTA_SET_KEY_TYPE)?)?;
    let value = match (
        flags & NFT_SET_MAP != 0,
        attribute_u32(attributes, NFTA_SET_DATA_TYPE),
    ) {
        (false, _) => ValueType::Member,
        (true, Some(NFT_DATA_VERDICT)) => ValueType::Verdict,
        (true, data) => ValueType::Data(fields_of_type(data?)?),
    };
    let lengths_agree = attribute_u32(attributes, NFTA_SET_KEY_LEN) == Some(data_length(&key))
        && match &value {
            ValueType::Data(fields) => {
                attribute_u32(attributes, NFTA_SET_DATA_LEN) == Some(data_length(fields))
            }
            ValueType::Member | ValueType::Verdict => true,
        };
    let interval = flags & NFT_SET_INTERVAL != 0;
    let known = NFT_SET_INTERVAL
        | NFT_SET_MAP
        | if interval && key.len() > 1 {
            NFT_SET_CONCAT
        } else {
            0
        };
    (lengths_agree && flags & !known == 0).then_some(SetKind {
        key,
        interval,
        value,
    })
}

/// Splits the type number of a concatenation, which has six bits per field.
fn fields_of_type(mut number: u32) -> Option<Vec<FieldType>> {
    const TYPES: [FieldType; 13] = [
        FieldType::Ipv4,
        FieldType::Ipv6,
        FieldType::Ether,
        FieldType::Proto,
        FieldType::Port,
        FieldType::Iface,
        FieldType::Mark,
        FieldType::CtState,
        FieldType::Family,
        FieldType::IcmpType,
        FieldType::IcmpCode,
        FieldType::Icmp6Type,
        FieldType::Icmp6Code,
    ];
    let mut fields = Vec::new();
    while number != 0 {
        fields.insert(
            0,
            TYPES
                .into_iter()
                .find(|field| nft_type(*field) == number & 0x3f)?,
        );
        number >>= 6;
    }
    (!fields.is_empty()).then_some(fields)
}

fn value(kind: &ValueType, element: &[u8]) -> Option<Value> {
    match kind {
        ValueType::Member => Some(Value::Member),
        ValueType::Verdict => {
            let data = attribute(element, NFTA_SET_ELEM_DATA)?;
            verdict(attribute(data, NFTA_DATA_VERDICT)?).map(Value::Verdict)
        }
        ValueType::Data(types) => {
            let data = attribute(element, NFTA_SET_ELEM_DATA)?;
            fields(types, attribute(data, NFTA_DATA_VALUE)?)
                .map(|fields| Value::Data(fields.into()))
        }
    }
}

fn verdict(data: &[u8]) -> Option<Verdict> {
    let chain = || ChainName::new(attribute_str(data, NFTA_VERDICT_CHAIN)?).ok();
    match attribute_u32(data, NFTA_VERDICT_CODE)?.cast_signed() {
        NF_ACCEPT => Some(Verdict::Accept),
        NF_DROP => Some(Verdict::Drop),
        NFT_CONTINUE => Some(Verdict::Continue),
        NFT_RETURN => Some(Verdict::Return),
        NFT_JUMP => chain().map(Verdict::Jump),
        NFT_GOTO => chain().map(Verdict::Goto),
        _ => None,
    }
}

/// Decodes the fields of a value. Each starts at a register, so at a multiple of four bytes.
fn fields(types: &[FieldType], bytes: &[u8]) -> Option<Vec<Datum>> {
    let mut offset = 0usize;
    let mut read = |field: &FieldType| {
        let width = field_width(*field) as usize;
        let bytes = bytes.get(offset..offset + width)?;
        offset = (offset + width).next_multiple_of(4);
        datum(*field, bytes)
    };
    types.iter().map(&mut read).collect()
}

fn datum(field: FieldType, bytes: &[u8]) -> Option<Datum> {
    Some(match field {
        FieldType::Ipv4 => Datum::Ipv4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        FieldType::Ipv6 => Datum::Ipv6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        FieldType::Ether => Datum::Ether(bytes.try_into().ok()?),
        FieldType::Proto => Datum::Proto(Proto(bytes[0])),
        FieldType::Port => Datum::Port(u16::from_be_bytes(bytes.try_into().ok()?)),
        FieldType::Iface => Datum::Iface(IfName::from_padded(bytes.try_into().ok()?)?),
        FieldType::Mark => Datum::Mark(u32::from_ne_bytes(bytes.try_into().ok()?)),
        FieldType::CtState => Datum::CtState(CtState(u32::from_ne_bytes(bytes.try_into().ok()?))),
        FieldType::Family => match bytes[0] {
            NFPROTO_IPV4 => Datum::Family(Family::Ipv4),
            NFPROTO_IPV6 => Datum::Family(Family::Ipv6),
            _ => return None,
        },
        FieldType::IcmpType => Datum::IcmpType(bytes[0]),
        FieldType::IcmpCode => Datum::IcmpCode(bytes[0]),
        FieldType::Icmp6Type => Datum::Icmp6Type(bytes[0]),
        FieldType::Icmp6Code => Datum::Icmp6Code(bytes[0]),
    })
}

/// The next lower value, for types that have ranges.
fn predecessor(value: Datum) -> Option<Datum> {
    Some(match value {
        Datum::Ipv4(address) => Datum::Ipv4(Ipv4Addr::from_bits(address.to_bits().checked_sub(1)?)),
        Datum::Ipv6(address) => Datum::Ipv6(Ipv6Addr::from_bits(address.to_bits().checked_sub(1)?)),
        Datum::Proto(Proto(number)) => Datum::Proto(Proto(number.checked_sub(1)?)),
        Datum::Port(port) => Datum::Port(port.checked_sub(1)?),
        Datum::IcmpType(number) => Datum::IcmpType(number.checked_sub(1)?),
        Datum::IcmpCode(number) => Datum::IcmpCode(number.checked_sub(1)?),
        Datum::Icmp6Type(number) => Datum::Icmp6Type(number.checked_sub(1)?),
        Datum::Icmp6Code(number) => Datum::Icmp6Code(number.checked_sub(1)?),
        Datum::Ether(_)
        | Datum::Iface(_)
        | Datum::Mark(_)
        | Datum::CtState(_)
        | Datum::Family(_) => return None,
    })
}

/// The highest value of a type: the last of a range without an end element.
fn highest(field: FieldType) -> Datum {
    match field {
        FieldType::Ipv4 => Datum::Ipv4(Ipv4Addr::BROADCAST),
        FieldType::Ipv6 => Datum::Ipv6(Ipv6Addr::from_bits(u128::MAX)),
        FieldType::Ether => Datum::Ether([u8::MAX; 6]),
        FieldType::Proto => Datum::Proto(Proto(u8::MAX)),
        FieldType::Port => Datum::Port(u16::MAX),
        FieldType::IcmpType => Datum::IcmpType(u8::MAX),
        FieldType::IcmpCode => Datum::IcmpCode(u8::MAX),
        FieldType::Icmp6Type => Datum::Icmp6Type(u8::MAX),
        FieldType::Icmp6Code => Datum::Icmp6Code(u8::MAX),
        FieldType::Mark => Datum::Mark(u32::MAX),
        FieldType::CtState => Datum::CtState(CtState(u32::MAX)),
        FieldType::Family => Datum::Family(Family::Ipv6),
        FieldType::Iface => Datum::Iface(IfName::new("~").expect("a valid name")),
    }
}
