//! Rules as expressions of the kernel's virtual machine.
//!
//! A test loads fields into registers and compares or looks them up; a failed comparison ends the rule. Address and
//! port tests are preceded by a test of the protocol they imply, once per rule, as `nft` does.

use std::net::IpAddr;

use super::super::constants::*;
use super::super::rule::{
    AddressType, Limit, Log, LogTarget, MarkSet, Masquerade, Match, Nat, NatTarget, NatType, Op, RateUnit, Reject,
    Rule, Selector, SetRef, Side, Statement, Transport,
};
use super::super::set::{CtState, Datum, Family, Field, IfName, Proto};
use super::set::{AnonymousId, Packed, field_width, put_verdict};
use margay_netlink::wire::Writer;

/// The first register; four bytes each follow.
const FIRST: u32 = NFT_REG32_00;

/// Writes the expressions of a rule; `anonymous` are its anonymous sets in the order of its lookups.
pub fn put_expressions(w: &mut Writer, rule: &Rule, anonymous: &[AnonymousId]) {
    let mut program = Program { w, anonymous: anonymous.iter(), family: None, proto: None, ethernet: false };
    for statement in &rule.statements {
        program.statement(statement);
    }
}

/// Expressions written so far and what they have established about the packet.
struct Program<'a> {
    w: &'a mut Writer,
    anonymous: std::slice::Iter<'a, AnonymousId>,
    family: Option<Family>,
    proto: Option<Proto>,
    ethernet: bool,
}

impl Program<'_> {
    fn statement(&mut self, statement: &Statement) {
        match statement {
            Statement::Match(test) => self.test(test),
            Statement::Vmap(key, map) => {
                self.load_all(key);
                self.lookup(map, Lookup::Into(NFT_REG_VERDICT));
            }
            Statement::Counter => self.expression("counter", |_| {}),
            Statement::Log(log) => self.log(log),
            Statement::Limit(limit) => self.limit(limit),
            Statement::MarkSet(mark) => self.mark_set(mark),
            Statement::Notrack => self.expression("notrack", |_| {}),
            Statement::Masquerade(masquerade) => self.masquerade(masquerade),
            Statement::Nat(nat) => self.nat(nat),
            Statement::Reject(reject) => self.reject(*reject),
            Statement::Verdict(verdict) => self.expression("immediate", |w| {
                w.put_u32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
                w.nest(NFTA_IMMEDIATE_DATA, |w| put_verdict(w, verdict));
            }),
        }
    }

    fn expression(&mut self, name: &str, data: impl FnOnce(&mut Writer)) {
        self.w.nest(NFTA_LIST_ELEM, |w| {
            w.put_str(NFTA_EXPR_NAME, name);
            w.nest(NFTA_EXPR_DATA, data);
        });
    }

    // --- Tests ---

    fn test(&mut self, test: &Match) {
        match test {
            Match::Is(key, op, field) => self.compare_field(*key, *op, field),
            Match::NamePrefix(key, op, prefix) => self.compare_name_prefix(*key, *op, prefix),
            Match::In(key, op, set) => {
                self.load_all(key);
                self.lookup(set, if *op == Op::Eq { Lookup::Within } else { Lookup::Outside });
            }
            Match::MarkBits { mask, op, value } => {
                self.load(Selector::Mark, FIRST);
                if *mask != u32::MAX {
                    self.mask(&mask.to_ne_bytes(), &[0; 4]);
                }
                self.compare(equality(*op), &value.to_ne_bytes());
            }
            Match::CtState(op, CtState(bits)) => self.any_ct_bit(NFT_CT_STATE, *op, *bits),
            Match::CtDnat(op) => self.any_ct_bit(NFT_CT_STATUS, *op, IPS_DST_NAT),
            Match::ReversePath { exists, with_mark } => {
                let mark = if *with_mark { NFTA_FIB_F_MARK } else { 0 };
                let flags = NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF | NFTA_FIB_F_PRESENT | mark;
                self.fib(NFT_FIB_RESULT_OIF, flags);
                self.compare(NFT_CMP_EQ, &u32::from(*exists).to_ne_bytes());
            }
            Match::AddressType(side, op, kind) => {
                let side = if *side == Side::Source { NFTA_FIB_F_SADDR } else { NFTA_FIB_F_DADDR };
                self.fib(NFT_FIB_RESULT_ADDRTYPE, side);
                self.compare(equality(*op), &address_type(*kind).to_ne_bytes());
            }
            Match::LaterFragment => {
                self.require_family(Family::Ipv4);
                self.payload(NFT_PAYLOAD_NETWORK_HEADER, 6, 2, FIRST);
                self.mask(&0x1fffu16.to_be_bytes(), &[0; 2]);
                self.compare(NFT_CMP_NEQ, &[0; 2]);
            }
        }
    }

    fn compare_field(&mut self, key: Selector, op: Op, field: &Field) {
        match (field.prefix_length(), op) {
            _ if field.is_single() => {
                self.load(key, FIRST);
                self.compare(equality(op), single(field.first()).as_slice());
                self.learn(key, op, field.first());
            }
            (Some(length), _) => self.compare_prefix(key, op, field.first(), length),
            (None, Op::Eq) => {
                self.load(key, FIRST);
                self.compare(NFT_CMP_GTE, single(field.first()).as_slice());
                self.compare(NFT_CMP_LTE, single(field.last()).as_slice());
            }
            (None, Op::Ne) => {
                self.load(key, FIRST);
                self.expression("range", |w| {
                    w.put_u32(NFTA_RANGE_SREG, FIRST);
                    w.put_u32(NFTA_RANGE_OP, NFT_RANGE_NEQ);
                    w.nest(NFTA_RANGE_FROM_DATA, |w| w.put(NFTA_DATA_VALUE, single(field.first()).as_slice()));
                    w.nest(NFTA_RANGE_TO_DATA, |w| w.put(NFTA_DATA_VALUE, single(field.last()).as_slice()));
                });
            }
        }
    }

    /// Compares only the bytes of the prefix when it ends between bytes, and masks otherwise.
    fn compare_prefix(&mut self, key: Selector, op: Op, first: Datum, length: u8) {
        let bytes = usize::from(length / 8);
        let address = single(first);
        if length.is_multiple_of(8) && length > 0 {
            self.require(key);
            let (base, offset) = place(key).expect("only addresses have prefixes, and they are in the packet");
            self.payload(base, offset, bytes as u32, FIRST);
            return self.compare(equality(op), &address.as_slice()[..bytes]);
        }
        self.load(key, FIRST);
        let width = address.as_slice().len();
        let mut mask = [0; 16];
        mask[..bytes].fill(0xff);
        if !length.is_multiple_of(8) {
            mask[bytes] = 0xff << (8 - length % 8);
        }
        self.mask(&mask[..width], &[0; 16][..width]);
        self.compare(equality(op), address.as_slice());
    }

    fn compare_name_prefix(&mut self, key: Selector, op: Op, prefix: &IfName) {
        self.load(key, FIRST);
        self.compare(equality(op), prefix.as_str().as_bytes());
    }

    fn any_ct_bit(&mut self, key: u32, op: Op, bits: u32) {
        self.expression("ct", |w| {
            w.put_u32(NFTA_CT_KEY, key);
            w.put_u32(NFTA_CT_DREG, FIRST);
        });
        self.mask(&bits.to_ne_bytes(), &[0; 4]);
        let any = if op == Op::Eq { NFT_CMP_NEQ } else { NFT_CMP_EQ };
        self.compare(any, &[0; 4]);
    }

    fn fib(&mut self, result: u32, flags: u32) {
        self.expression("fib", |w| {
            w.put_u32(NFTA_FIB_FLAGS, flags);
            w.put_u32(NFTA_FIB_RESULT, result);
            w.put_u32(NFTA_FIB_DREG, FIRST);
        });
    }

    fn compare(&mut self, op: u32, value: &[u8]) {
        self.expression("cmp", |w| {
            w.put_u32(NFTA_CMP_SREG, FIRST);
            w.put_u32(NFTA_CMP_OP, op);
            w.nest(NFTA_CMP_DATA, |w| w.put(NFTA_DATA_VALUE, value));
        });
    }

    /// The first register becomes `(register & mask) ^ xor`.
    fn mask(&mut self, mask: &[u8], xor: &[u8]) {
        self.expression("bitwise", |w| {
            w.put_u32(NFTA_BITWISE_SREG, FIRST);
            w.put_u32(NFTA_BITWISE_DREG, FIRST);
            w.put_u32(NFTA_BITWISE_LEN, mask.len() as u32);
            w.nest(NFTA_BITWISE_MASK, |w| w.put(NFTA_DATA_VALUE, mask));
            w.nest(NFTA_BITWISE_XOR, |w| w.put(NFTA_DATA_VALUE, xor));
        });
    }

    // --- Loading ---

    /// Loads a concatenation, each field at the next free register. What the fields imply is tested before the first
    /// is loaded, since a test uses the same registers.
    fn load_all(&mut self, key: &[Selector]) {
        key.iter().for_each(|selector| self.require(*selector));
        let mut register = FIRST;
        for selector in key {
            self.load(*selector, register);
            register += field_width(selector.field_type()).div_ceil(4);
        }
    }

    fn load(&mut self, key: Selector, register: u32) {
        self.require(key);
        if let Some((base, offset)) = place(key) {
            return self.payload(base, offset, field_width(key.field_type()), register);
        }
        match key {
            Selector::Iifname => self.meta(NFT_META_IIFNAME, register),
            Selector::Oifname => self.meta(NFT_META_OIFNAME, register),
            Selector::Nfproto => self.meta(NFT_META_NFPROTO, register),
            Selector::L4proto => self.meta(NFT_META_L4PROTO, register),
            Selector::Mark => self.meta(NFT_META_MARK, register),
            _ => self.expression("ct", |w| {
                w.put_u32(NFTA_CT_KEY, NFT_CT_STATE);
                w.put_u32(NFTA_CT_DREG, register);
            }),
        }
    }

    fn meta(&mut self, key: u32, register: u32) {
        self.expression("meta", |w| {
            w.put_u32(NFTA_META_KEY, key);
            w.put_u32(NFTA_META_DREG, register);
        });
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) {
        self.expression("payload", |w| {
            w.put_u32(NFTA_PAYLOAD_DREG, register);
            w.put_u32(NFTA_PAYLOAD_BASE, base);
            w.put_u32(NFTA_PAYLOAD_OFFSET, offset);
            w.put_u32(NFTA_PAYLOAD_LEN, length);
        });
    }

    fn lookup(&mut self, set: &SetRef, lookup: Lookup) {
        let anonymous = matches!(set, SetRef::Anonymous(_)).then(|| self.anonymous.next()).flatten();
        self.expression("lookup", |w| {
            match (set, anonymous) {
                (SetRef::Named(name), _) => w.put_str(NFTA_LOOKUP_SET, name.as_str()),
                (SetRef::Anonymous(_), id) => {
                    let (name, id) = id.expect("every anonymous set of the rule was made before it");
                    w.put_str(NFTA_LOOKUP_SET, name);
                    w.put_u32(NFTA_LOOKUP_SET_ID, *id);
                }
            }
            w.put_u32(NFTA_LOOKUP_SREG, FIRST);
            match lookup {
                Lookup::Within => {}
                Lookup::Outside => w.put_u32(NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV),
                Lookup::Into(register) => w.put_u32(NFTA_LOOKUP_DREG, register),
            }
        });
    }

    // --- Implied tests ---

    fn require(&mut self, key: Selector) {
        match key {
            Selector::Saddr4 | Selector::Daddr4 => self.require_family(Family::Ipv4),
            Selector::Saddr6 | Selector::Daddr6 => self.require_family(Family::Ipv6),
            Selector::Sport(transport) | Selector::Dport(transport) => {
                protocol(transport).into_iter().for_each(|proto| self.require_proto(proto));
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
            self.meta(NFT_META_NFPROTO, FIRST);
            self.compare(NFT_CMP_EQ, single(family.into()).as_slice());
        }
    }

    fn require_proto(&mut self, proto: Proto) {
        if self.proto.replace(proto) != Some(proto) {
            self.meta(NFT_META_L4PROTO, FIRST);
            self.compare(NFT_CMP_EQ, single(proto.into()).as_slice());
        }
    }

    fn require_ethernet(&mut self) {
        if !std::mem::replace(&mut self.ethernet, true) {
            self.meta(NFT_META_IIFTYPE, FIRST);
            self.compare(NFT_CMP_EQ, &ARPHRD_ETHER.to_ne_bytes());
        }
    }

    /// Notes what the rule's own tests establish, so that it is not tested twice.
    fn learn(&mut self, key: Selector, op: Op, value: Datum) {
        match (key, op, value) {
            (Selector::Nfproto, Op::Eq, Datum::Family(family)) => self.family = Some(family),
            (Selector::L4proto, Op::Eq, Datum::Proto(proto)) => self.proto = Some(proto),
            _ => {}
        }
    }

    // --- Actions ---

    fn log(&mut self, log: &Log) {
        self.expression("log", |w| {
            w.put_str(NFTA_LOG_PREFIX, &log.prefix);
            match log.target {
                LogTarget::Syslog(level) => w.put_u32(NFTA_LOG_LEVEL, level.into()),
                LogTarget::Group { group, snaplen, queue_threshold } => {
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

    fn limit(&mut self, limit: &Limit) {
        let seconds = match limit.unit {
            RateUnit::Second => 1,
            RateUnit::Minute => 60,
            RateUnit::Hour => 60 * 60,
            RateUnit::Day => 24 * 60 * 60,
        };
        self.expression("limit", |w| {
            w.put_u64(NFTA_LIMIT_RATE, limit.rate);
            w.put_u64(NFTA_LIMIT_UNIT, seconds);
            w.put_u32(NFTA_LIMIT_BURST, limit.burst);
            w.put_u32(NFTA_LIMIT_TYPE, NFT_LIMIT_PKTS);
            w.put_u32(NFTA_LIMIT_FLAGS, if limit.over { NFT_LIMIT_F_INV } else { 0 });
        });
    }

    fn mark_set(&mut self, mark: &MarkSet) {
        if mark.mask == u32::MAX {
            self.immediate(FIRST, &mark.value.to_ne_bytes());
        } else {
            self.load(Selector::Mark, FIRST);
            self.mask(&(!mark.mask).to_ne_bytes(), &mark.value.to_ne_bytes());
        }
        self.expression("meta", |w| {
            w.put_u32(NFTA_META_KEY, NFT_META_MARK);
            w.put_u32(NFTA_META_SREG, FIRST);
        });
    }

    fn masquerade(&mut self, masquerade: &Masquerade) {
        if let Some((first, last)) = masquerade.ports {
            self.immediate(FIRST, &first.to_be_bytes());
            self.immediate(FIRST + 1, &last.to_be_bytes());
        }
        let flags = nat_flags(masquerade.ports.is_some(), masquerade.fully_random);
        self.expression("masq", |w| {
            if flags != 0 {
                w.put_u32(NFTA_MASQ_FLAGS, flags);
            }
            if let Some((first, last)) = masquerade.ports {
                w.put_u32(NFTA_MASQ_REG_PROTO_MIN, FIRST);
                if first != last {
                    w.put_u32(NFTA_MASQ_REG_PROTO_MAX, FIRST + 1);
                }
            }
        });
    }

    fn nat(&mut self, nat: &Nat) {
        let (family, ports, mapped_port) = match &nat.to {
            NatTarget::Address(address, ports) => (self.nat_address(*address), *ports, false),
            NatTarget::Map { family, key, map, with_port } => {
                self.load_all(key);
                self.lookup(map, Lookup::Into(FIRST));
                (*family, None, *with_port)
            }
        };
        let port_register = FIRST + field_width(family.address_type()) / 4;
        if let Some((first, last)) = ports {
            self.immediate(port_register, &first.to_be_bytes());
            self.immediate(port_register + 1, &last.to_be_bytes());
        }
        let flags = nat_flags(ports.is_some(), nat.fully_random);
        self.expression("nat", |w| {
            w.put_u32(NFTA_NAT_TYPE, if nat.kind == NatType::Source { NFT_NAT_SNAT } else { NFT_NAT_DNAT });
            w.put_u32(NFTA_NAT_FAMILY, if family == Family::Ipv4 { NFPROTO_IPV4 } else { NFPROTO_IPV6 }.into());
            w.put_u32(NFTA_NAT_REG_ADDR_MIN, FIRST);
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

    fn nat_address(&mut self, address: IpAddr) -> Family {
        self.immediate(FIRST, single(address.into()).as_slice());
        if address.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 }
    }

    fn reject(&mut self, reject: Reject) {
        let (kind, code) = match reject {
            Reject::NoRoute => (NFT_REJECT_ICMPX_UNREACH, 0),
            Reject::PortUnreachable => (NFT_REJECT_ICMPX_UNREACH, 1),
            Reject::HostUnreachable => (NFT_REJECT_ICMPX_UNREACH, 2),
            Reject::AdminProhibited => (NFT_REJECT_ICMPX_UNREACH, 3),
            Reject::TcpReset => (NFT_REJECT_TCP_RST, 0),
        };
        self.expression("reject", |w| {
            w.put_u32(NFTA_REJECT_TYPE, kind);
            w.put(NFTA_REJECT_ICMP_CODE, &[code]);
        });
    }

    fn immediate(&mut self, register: u32, value: &[u8]) {
        self.expression("immediate", |w| {
            w.put_u32(NFTA_IMMEDIATE_DREG, register);
            w.nest(NFTA_IMMEDIATE_DATA, |w| w.put(NFTA_DATA_VALUE, value));
        });
    }
}

/// What a lookup is for.
#[derive(Clone, Copy)]
enum Lookup {
    /// Go on if the key is in the set.
    Within,
    /// Go on if it is not.
    Outside,
    /// Put what the map yields into this register; go on if there is something.
    Into(u32),
}

fn single(value: Datum) -> Packed {
    Packed::of([value].into_iter())
}

/// Where in the packet a selector's field is: header and offset in bytes.
const fn place(key: Selector) -> Option<(u32, u32)> {
    match key {
        Selector::Saddr4 => Some((NFT_PAYLOAD_NETWORK_HEADER, 12)),
        Selector::Daddr4 => Some((NFT_PAYLOAD_NETWORK_HEADER, 16)),
        Selector::Saddr6 => Some((NFT_PAYLOAD_NETWORK_HEADER, 8)),
        Selector::Daddr6 => Some((NFT_PAYLOAD_NETWORK_HEADER, 24)),
        Selector::EtherSaddr => Some((NFT_PAYLOAD_LL_HEADER, 6)),
        Selector::Sport(_) | Selector::IcmpType | Selector::Icmp6Type => Some((NFT_PAYLOAD_TRANSPORT_HEADER, 0)),
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

const fn equality(op: Op) -> u32 {
    match op {
        Op::Eq => NFT_CMP_EQ,
        Op::Ne => NFT_CMP_NEQ,
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
    let specified = if ports { NF_NAT_RANGE_PROTO_SPECIFIED } else { 0 };
    let random = if fully_random { NF_NAT_RANGE_PROTO_RANDOM_FULLY } else { 0 };
    specified | random
}
