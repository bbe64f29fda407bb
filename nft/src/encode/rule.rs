//! Encoding of rules as expressions of the nf_tables virtual machine.
//!
//! A match loads fields into registers and compares them or looks them up; a comparison that fails
//! ends the rule. Matches on addresses and ports are preceded by a test of the protocol that they
//! imply, once per rule, as in nft.

use std::net::IpAddr;

use super::set::{AnonymousId, Packed, field_width, put_verdict};
use crate::constants::*;
use crate::rule::{
    AddressType, CmpOp, Limit, Log, LogTarget, MarkSet, Masquerade, Match, Nat, NatTarget, NatType,
    RateUnit, Reject, Rule, Selector, SetRef, Side, Statement, Transport,
};
use crate::set::{CtState, Datum, Family, Field, IfName, Proto};
use margay_netlink::wire::Writer;

/// The first of the registers, which are four bytes each.
const FIRST_REGISTER: u32 = NFT_REG32_00;

/// Writes the expressions of a rule. `anonymous` are its anonymous sets, in the order of its
/// lookups.
pub fn put_expressions(w: &mut Writer, rule: &Rule, anonymous: &[AnonymousId]) {
    let mut program = Program {
        w,
        anonymous: anonymous.iter(),
        family: None,
        proto: None,
        ethernet: false,
    };
    for statement in &rule.statements {
        program.put_statement(statement);
    }
}

/// The expressions of a rule, with what they have established about the packet so far.
struct Program<'a> {
    w: &'a mut Writer,
    anonymous: std::slice::Iter<'a, AnonymousId>,
    family: Option<Family>,
    proto: Option<Proto>,
    ethernet: bool,
}

impl Program<'_> {
    fn put_statement(&mut self, statement: &Statement) {
        match statement {
            Statement::Match(test) => self.put_test(test),
            Statement::Vmap(key, map) => {
                self.load_all(key);
                self.put_lookup(map, LookupMode::Into(NFT_REG_VERDICT));
            }
            Statement::Counter => self.put_expression("counter", |_| {}),
            Statement::Log(log) => self.put_log(log),
            Statement::Limit(limit) => self.put_limit(limit),
            Statement::MarkSet(mark) => self.put_mark_set(mark),
            Statement::Notrack => self.put_expression("notrack", |_| {}),
            Statement::Masquerade(masquerade) => self.put_masquerade(masquerade),
            Statement::Nat(nat) => self.put_nat(nat),
            Statement::Reject(reject) => self.put_reject(*reject),
            Statement::Verdict(verdict) => self.put_expression("immediate", |w| {
                w.put_u32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
                w.nest(NFTA_IMMEDIATE_DATA, |w| put_verdict(w, verdict));
            }),
        }
    }

    fn put_expression(&mut self, name: &str, data: impl FnOnce(&mut Writer)) {
        self.w.nest(NFTA_LIST_ELEM, |w| {
            w.put_str(NFTA_EXPR_NAME, name);
            w.nest(NFTA_EXPR_DATA, data);
        });
    }

    // --- Matches ---

    fn put_test(&mut self, test: &Match) {
        match test {
            Match::Is(key, op, field) => self.compare_field(*key, *op, field),
            Match::NamePrefix(key, op, prefix) => self.compare_name_prefix(*key, *op, prefix),
            Match::In(key, op, set) => {
                self.load_all(key);
                self.put_lookup(
                    set,
                    if *op == CmpOp::Eq {
                        LookupMode::Within
                    } else {
                        LookupMode::Outside
                    },
                );
            }
            Match::MarkBits { mask, op, value } => {
                self.load(Selector::Mark, FIRST_REGISTER);
                if *mask != u32::MAX {
                    self.apply_mask(&mask.to_ne_bytes(), &[0; 4]);
                }
                self.compare(cmp_op(*op), &value.to_ne_bytes());
            }
            Match::CtState(op, CtState(bits)) => self.compare_ct_bits(NFT_CT_STATE, *op, *bits),
            Match::CtDnat(op) => self.compare_ct_bits(NFT_CT_STATUS, *op, IPS_DST_NAT),
            Match::ReversePath { exists, with_mark } => {
                let mark = if *with_mark { NFTA_FIB_F_MARK } else { 0 };
                let flags = NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF | NFTA_FIB_F_PRESENT | mark;
                self.load_fib(NFT_FIB_RESULT_OIF, flags);
                self.compare(NFT_CMP_EQ, &u32::from(*exists).to_ne_bytes());
            }
            Match::AddressType(side, op, kind) => {
                let side = if *side == Side::Source {
                    NFTA_FIB_F_SADDR
                } else {
                    NFTA_FIB_F_DADDR
                };
                self.load_fib(NFT_FIB_RESULT_ADDRTYPE, side);
                self.compare(cmp_op(*op), &address_type(*kind).to_ne_bytes());
            }
            Match::LaterFragment => {
                self.require_family(Family::Ipv4);
                self.load_payload(NFT_PAYLOAD_NETWORK_HEADER, 6, 2, FIRST_REGISTER);
                self.apply_mask(&0x1fffu16.to_be_bytes(), &[0; 2]);
                self.compare(NFT_CMP_NEQ, &[0; 2]);
            }
        }
    }

    fn compare_field(&mut self, key: Selector, op: CmpOp, field: &Field) {
        match (field.prefix_length(), op) {
            _ if field.is_single() => {
                self.load(key, FIRST_REGISTER);
                self.compare(cmp_op(op), single(field.first()).as_slice());
                self.learn(key, op, field.first());
            }
            (Some(length), _) => self.compare_prefix(key, op, field.first(), length),
            (None, CmpOp::Eq) => {
                self.load(key, FIRST_REGISTER);
                self.compare(NFT_CMP_GTE, single(field.first()).as_slice());
                self.compare(NFT_CMP_LTE, single(field.last()).as_slice());
            }
            (None, CmpOp::Ne) => {
                self.load(key, FIRST_REGISTER);
                self.put_expression("range", |w| {
                    w.put_u32(NFTA_RANGE_SREG, FIRST_REGISTER);
                    w.put_u32(NFTA_RANGE_OP, NFT_RANGE_NEQ);
                    w.nest(NFTA_RANGE_FROM_DATA, |w| {
                        w.put(NFTA_DATA_VALUE, single(field.first()).as_slice())
                    });
                    w.nest(NFTA_RANGE_TO_DATA, |w| {
                        w.put(NFTA_DATA_VALUE, single(field.last()).as_slice())
                    });
                });
            }
        }
    }

    /// Loads and compares only the bytes of the prefix if it ends at a byte, and masks the address
    /// otherwise, as nft does.
    fn compare_prefix(&mut self, key: Selector, op: CmpOp, first: Datum, length: u8) {
        let bytes = usize::from(length / 8);
        let address = single(first);
        if length.is_multiple_of(8) && length > 0 {
            self.require(key);
            let (base, offset) = header_offset(key)
                .expect("only addresses have prefixes, and they are in the packet");
            self.load_payload(base, offset, bytes as u32, FIRST_REGISTER);
            return self.compare(cmp_op(op), &address.as_slice()[..bytes]);
        }
        self.load(key, FIRST_REGISTER);
        let width = address.as_slice().len();
        let mut mask = [0; 16];
        mask[..bytes].fill(0xff);
        if !length.is_multiple_of(8) {
            mask[bytes] = 0xff << (8 - length % 8);
        }
        self.apply_mask(&mask[..width], &[0; 16][..width]);
        self.compare(cmp_op(op), address.as_slice());
    }

    fn compare_name_prefix(&mut self, key: Selector, op: CmpOp, prefix: &IfName) {
        self.load(key, FIRST_REGISTER);
        self.compare(cmp_op(op), prefix.as_str().as_bytes());
    }

    fn compare_ct_bits(&mut self, key: u32, op: CmpOp, bits: u32) {
        self.put_expression("ct", |w| {
            w.put_u32(NFTA_CT_KEY, key);
            w.put_u32(NFTA_CT_DREG, FIRST_REGISTER);
        });
        self.apply_mask(&bits.to_ne_bytes(), &[0; 4]);
        let any = if op == CmpOp::Eq {
            NFT_CMP_NEQ
        } else {
            NFT_CMP_EQ
        };
        self.compare(any, &[0; 4]);
    }

    fn load_fib(&mut self, result: u32, flags: u32) {
        self.put_expression("fib", |w| {
            w.put_u32(NFTA_FIB_FLAGS, flags);
            w.put_u32(NFTA_FIB_RESULT, result);
            w.put_u32(NFTA_FIB_DREG, FIRST_REGISTER);
        });
    }

    fn compare(&mut self, op: u32, value: &[u8]) {
        self.put_expression("cmp", |w| {
            w.put_u32(NFTA_CMP_SREG, FIRST_REGISTER);
            w.put_u32(NFTA_CMP_OP, op);
            w.nest(NFTA_CMP_DATA, |w| w.put(NFTA_DATA_VALUE, value));
        });
    }

    /// Sets the first register to `(register & mask) ^ xor`.
    fn apply_mask(&mut self, mask: &[u8], xor: &[u8]) {
        self.put_expression("bitwise", |w| {
            w.put_u32(NFTA_BITWISE_SREG, FIRST_REGISTER);
            w.put_u32(NFTA_BITWISE_DREG, FIRST_REGISTER);
            w.put_u32(NFTA_BITWISE_LEN, mask.len() as u32);
            w.nest(NFTA_BITWISE_MASK, |w| w.put(NFTA_DATA_VALUE, mask));
            w.nest(NFTA_BITWISE_XOR, |w| w.put(NFTA_DATA_VALUE, xor));
        });
    }

    // --- Loading ---

    /// Loads a concatenation, each field at the next free register. The protocols that the fields
    /// imply are tested before the first is loaded, because those tests use the same registers.
    fn load_all(&mut self, key: &[Selector]) {
        key.iter().for_each(|selector| self.require(*selector));
        let mut register = FIRST_REGISTER;
        for selector in key {
            self.load(*selector, register);
            register += field_width(selector.field_type()).div_ceil(4);
        }
    }

    fn load(&mut self, key: Selector, register: u32) {
        self.require(key);
        if let Some((base, offset)) = header_offset(key) {
            return self.load_payload(base, offset, field_width(key.field_type()), register);
        }
        match key {
            Selector::Iifname => self.load_meta(NFT_META_IIFNAME, register),
            Selector::Oifname => self.load_meta(NFT_META_OIFNAME, register),
            Selector::Nfproto => self.load_meta(NFT_META_NFPROTO, register),
            Selector::L4proto => self.load_meta(NFT_META_L4PROTO, register),
            Selector::Mark => self.load_meta(NFT_META_MARK, register),
            _ => self.put_expression("ct", |w| {
                w.put_u32(NFTA_CT_KEY, NFT_CT_STATE);
                w.put_u32(NFTA_CT_DREG, register);
            }),
        }
    }

    fn load_meta(&mut self, key: u32, register: u32) {
        self.put_expression("meta", |w| {
            w.put_u32(NFTA_META_KEY, key);
            w.put_u32(NFTA_META_DREG, register);
        });
    }

    fn load_payload(&mut self, base: u32, offset: u32, length: u32, register: u32) {
        self.put_expression("payload", |w| {
            w.put_u32(NFTA_PAYLOAD_DREG, register);
            w.put_u32(NFTA_PAYLOAD_BASE, base);
            w.put_u32(NFTA_PAYLOAD_OFFSET, offset);
            w.put_u32(NFTA_PAYLOAD_LEN, length);
        });
    }

    fn put_lookup(&mut self, set: &SetRef, mode: LookupMode) {
        let anonymous = matches!(set, SetRef::Anonymous(_))
            .then(|| self.anonymous.next())
            .flatten();
        self.put_expression("lookup", |w| {
            match (set, anonymous) {
                (SetRef::Named(name), _) => w.put_str(NFTA_LOOKUP_SET, name.as_str()),
                (SetRef::Anonymous(_), id) => {
                    let (name, id) =
                        id.expect("every anonymous set of the rule was made before it");
                    w.put_str(NFTA_LOOKUP_SET, name);
                    w.put_u32(NFTA_LOOKUP_SET_ID, *id);
                }
            }
            w.put_u32(NFTA_LOOKUP_SREG, FIRST_REGISTER);
            match mode {
                LookupMode::Within => {}
                LookupMode::Outside => w.put_u32(NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV),
                LookupMode::Into(register) => w.put_u32(NFTA_LOOKUP_DREG, register),
            }
        });
    }

    // --- Implied tests ---

    fn require(&mut self, key: Selector) {
        match key {
            Selector::Saddr4 | Selector::Daddr4 => self.require_family(Family::Ipv4),
            Selector::Saddr6 | Selector::Daddr6 => self.require_family(Family::Ipv6),
            Selector::Sport(transport) | Selector::Dport(transport) => {
                protocol(transport)
                    .into_iter()
                    .for_each(|proto| self.require_proto(proto));
            }
            Selector::IcmpType | Selector::IcmpCode => {
                self.require_family(Family::Ipv4);
                self.require_proto(Proto::ICMP);
            }
            Selector::Icmp6Type | Selector::Icmp6Code => {
                self.require_family(Family::Ipv6);
                self.require_proto(Proto::ICMPV6);
            }
            Selector::EtherSaddr => self.require_ethernet(),
            Selector::Iifname
            | Selector::Oifname
            | Selector::L4proto
            | Selector::Nfproto
            | Selector::Mark
            | Selector::CtState => {}
        }
    }

    fn require_family(&mut self, family: Family) {
        if self.family.replace(family) != Some(family) {
            self.load_meta(NFT_META_NFPROTO, FIRST_REGISTER);
            self.compare(NFT_CMP_EQ, single(family.into()).as_slice());
        }
    }

    fn require_proto(&mut self, proto: Proto) {
        if self.proto.replace(proto) != Some(proto) {
            self.load_meta(NFT_META_L4PROTO, FIRST_REGISTER);
            self.compare(NFT_CMP_EQ, single(proto.into()).as_slice());
        }
    }

    fn require_ethernet(&mut self) {
        if !std::mem::replace(&mut self.ethernet, true) {
            self.load_meta(NFT_META_IIFTYPE, FIRST_REGISTER);
            self.compare(NFT_CMP_EQ, &ARPHRD_ETHER.to_ne_bytes());
        }
    }

    /// Records what a match establishes about the packet, so that it is not tested again.
    fn learn(&mut self, key: Selector, op: CmpOp, value: Datum) {
        match (key, op, value) {
            (Selector::Nfproto, CmpOp::Eq, Datum::Family(family)) => self.family = Some(family),
            (Selector::L4proto, CmpOp::Eq, Datum::Proto(proto)) => self.proto = Some(proto),
            _ => {}
        }
    }

    // --- Actions ---

    fn put_log(&mut self, log: &Log) {
        self.put_expression("log", |w| {
            w.put_str(NFTA_LOG_PREFIX, &log.prefix);
            match log.target {
                LogTarget::Syslog(level) => w.put_u32(NFTA_LOG_LEVEL, level.into()),
                LogTarget::Group {
                    group,
                    snaplen,
                    queue_threshold,
                } => {
                    w.put_u16(NFTA_LOG_GROUP, group);
                    if snaplen > 0 {
                        w.put_u32(NFTA_LOG_SNAPLEN, snaplen);
                    }
                    if queue_threshold > 0 {
                        w.put_u16(NFTA_LOG_QTHRESHOLD, queue_threshold);
                    }
                }
            }
        });
    }

    fn put_limit(&mut self, limit: &Limit) {
        let seconds = match limit.unit {
            RateUnit::Second => 1,
            RateUnit::Minute => 60,
            RateUnit::Hour => 60 * 60,
            RateUnit::Day => 24 * 60 * 60,
        };
        self.put_expression("limit", |w| {
            w.put_u64(NFTA_LIMIT_RATE, limit.rate);
            w.put_u64(NFTA_LIMIT_UNIT, seconds);
            w.put_u32(NFTA_LIMIT_BURST, limit.burst);
            w.put_u32(NFTA_LIMIT_TYPE, NFT_LIMIT_PKTS);
            w.put_u32(
                NFTA_LIMIT_FLAGS,
                if limit.over { NFT_LIMIT_F_INV } else { 0 },
            );
        });
    }

    fn put_mark_set(&mut self, mark: &MarkSet) {
        if mark.mask == u32::MAX {
            self.load_immediate(FIRST_REGISTER, &mark.value.to_ne_bytes());
        } else {
            self.load(Selector::Mark, FIRST_REGISTER);
            self.apply_mask(&(!mark.mask).to_ne_bytes(), &mark.value.to_ne_bytes());
        }
        self.put_expression("meta", |w| {
            w.put_u32(NFTA_META_KEY, NFT_META_MARK);
            w.put_u32(NFTA_META_SREG, FIRST_REGISTER);
        });
    }

    fn put_masquerade(&mut self, masquerade: &Masquerade) {
        if let Some((first, last)) = masquerade.ports {
            self.load_immediate(FIRST_REGISTER, &first.to_be_bytes());
            self.load_immediate(FIRST_REGISTER + 1, &last.to_be_bytes());
        }
        let flags = nat_flags(masquerade.ports.is_some(), masquerade.fully_random);
        self.put_expression("masq", |w| {
            if flags != 0 {
                w.put_u32(NFTA_MASQ_FLAGS, flags);
            }
            if let Some((first, last)) = masquerade.ports {
                w.put_u32(NFTA_MASQ_REG_PROTO_MIN, FIRST_REGISTER);
                if first != last {
                    w.put_u32(NFTA_MASQ_REG_PROTO_MAX, FIRST_REGISTER + 1);
                }
            }
        });
    }

    fn put_nat(&mut self, nat: &Nat) {
        let (family, ports, mapped_port) = match &nat.to {
            NatTarget::Address(address, ports) => (self.load_nat_address(*address), *ports, false),
            NatTarget::Map {
                family,
                key,
                map,
                with_port,
            } => {
                self.load_all(key);
                self.put_lookup(map, LookupMode::Into(FIRST_REGISTER));
                (*family, None, *with_port)
            }
        };
        let port_register = FIRST_REGISTER + field_width(family.address_type()) / 4;
        if let Some((first, last)) = ports {
            self.load_immediate(port_register, &first.to_be_bytes());
            self.load_immediate(port_register + 1, &last.to_be_bytes());
        }
        let flags = nat_flags(ports.is_some(), nat.fully_random);
        self.put_expression("nat", |w| {
            w.put_u32(
                NFTA_NAT_TYPE,
                if nat.kind == NatType::Source {
                    NFT_NAT_SNAT
                } else {
                    NFT_NAT_DNAT
                },
            );
            w.put_u32(
                NFTA_NAT_FAMILY,
                if family == Family::Ipv4 {
                    NFPROTO_IPV4
                } else {
                    NFPROTO_IPV6
                }
                .into(),
            );
            w.put_u32(NFTA_NAT_REG_ADDR_MIN, FIRST_REGISTER);
            if ports.is_some() || mapped_port {
                w.put_u32(NFTA_NAT_REG_PROTO_MIN, port_register);
            }
            if ports.is_some_and(|(first, last)| first != last) {
                w.put_u32(NFTA_NAT_REG_PROTO_MAX, port_register + 1);
            }
            if flags != 0 {
                w.put_u32(NFTA_NAT_FLAGS, flags);
            }
        });
    }

    fn load_nat_address(&mut self, address: IpAddr) -> Family {
        self.load_immediate(FIRST_REGISTER, single(address.into()).as_slice());
        if address.is_ipv4() {
            Family::Ipv4
        } else {
            Family::Ipv6
        }
    }

    fn put_reject(&mut self, reject: Reject) {
        let (kind, code) = match reject {
            Reject::NoRoute => (NFT_REJECT_ICMPX_UNREACH, 0),
            Reject::PortUnreachable => (NFT_REJECT_ICMPX_UNREACH, 1),
            Reject::HostUnreachable => (NFT_REJECT_ICMPX_UNREACH, 2),
            Reject::AdminProhibited => (NFT_REJECT_ICMPX_UNREACH, 3),
            Reject::TcpReset => (NFT_REJECT_TCP_RST, 0),
        };
        self.put_expression("reject", |w| {
            w.put_u32(NFTA_REJECT_TYPE, kind);
            w.put(NFTA_REJECT_ICMP_CODE, &[code]);
        });
    }

    fn load_immediate(&mut self, register: u32, value: &[u8]) {
        self.put_expression("immediate", |w| {
            w.put_u32(NFTA_IMMEDIATE_DREG, register);
            w.nest(NFTA_IMMEDIATE_DATA, |w| w.put(NFTA_DATA_VALUE, value));
        });
    }
}

/// The purpose of a lookup.
#[derive(Clone, Copy)]
enum LookupMode {
    /// Continue if the key is in the set.
    Within,
    /// Continue if the key is not in the set.
    Outside,
    /// Load the value that the map holds for the key into a register; continue if there is one.
    Into(u32),
}

fn single(value: Datum) -> Packed {
    Packed::of([value].into_iter())
}

/// The header with a selector's field, and the offset in bytes; `None` for metadata.
const fn header_offset(key: Selector) -> Option<(u32, u32)> {
    match key {
        Selector::Saddr4 => Some((NFT_PAYLOAD_NETWORK_HEADER, 12)),
        Selector::Daddr4 => Some((NFT_PAYLOAD_NETWORK_HEADER, 16)),
        Selector::Saddr6 => Some((NFT_PAYLOAD_NETWORK_HEADER, 8)),
        Selector::Daddr6 => Some((NFT_PAYLOAD_NETWORK_HEADER, 24)),
        Selector::EtherSaddr => Some((NFT_PAYLOAD_LL_HEADER, 6)),
        Selector::Sport(_) | Selector::IcmpType | Selector::Icmp6Type => {
            Some((NFT_PAYLOAD_TRANSPORT_HEADER, 0))
        }
        Selector::IcmpCode | Selector::Icmp6Code => Some((NFT_PAYLOAD_TRANSPORT_HEADER, 1)),
        Selector::Dport(_) => Some((NFT_PAYLOAD_TRANSPORT_HEADER, 2)),
        Selector::Iifname
        | Selector::Oifname
        | Selector::L4proto
        | Selector::Nfproto
        | Selector::Mark
        | Selector::CtState => None,
    }
}

const fn protocol(transport: Transport) -> Option<Proto> {
    match transport {
        Transport::Any => None,
        Transport::Tcp => Some(Proto::TCP),
        Transport::Udp => Some(Proto::UDP),
        Transport::UdpLite => Some(Proto::UDPLITE),
        Transport::Sctp => Some(Proto::SCTP),
    }
}

const fn cmp_op(op: CmpOp) -> u32 {
    match op {
        CmpOp::Eq => NFT_CMP_EQ,
        CmpOp::Ne => NFT_CMP_NEQ,
    }
}

const fn address_type(kind: AddressType) -> u32 {
    match kind {
        AddressType::Unicast => RTN_UNICAST,
        AddressType::Local => RTN_LOCAL,
        AddressType::Broadcast => RTN_BROADCAST,
        AddressType::Multicast => RTN_MULTICAST,
    }
}

const fn nat_flags(ports: bool, fully_random: bool) -> u32 {
    let specified = if ports {
        NF_NAT_RANGE_PROTO_SPECIFIED
    } else {
        0
    };
    let random = if fully_random {
        NF_NAT_RANGE_PROTO_RANDOM_FULLY
    } else {
        0
    };
    specified | random
}
