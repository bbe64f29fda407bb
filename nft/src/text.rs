//! Rulesets as text that `nft -f` loads, in the form that `nft list table` of nft 1.0.6 prints.
//!
//! Elements are printed one per line, in the order of their typed values.

use std::fmt::{self, Display, Formatter, Write};
use std::net::IpAddr;

use crate::rule::{
    AddressType, CmpOp, Limit, Log, LogTarget, MarkSet, Masquerade, Match, Nat, NatTarget, NatType,
    RateUnit, Reject, Rule, Selector, SetRef, Side, Statement, Transport, Verdict,
};
use crate::ruleset::{Base, Chain, ChainPolicy, ChainType, Hook, Ruleset};
use crate::set::{
    CtState, Datum, Family, Field, FieldType, Key, Proto, Set, SetKind, Value, ValueType,
};
use names::{ICMP_CODES, ICMP_TYPES, ICMP6_CODES, ICMP6_TYPES, PROTOCOLS};

mod names;

/// Prints items with a separator between them.
struct Joined<'a, T>(&'a [T], &'static str);

impl<T: Display> Display for Joined<'_, T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (index, item) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(self.1)?;
            }
            item.fmt(f)?;
        }
        Ok(())
    }
}

// --- The table ---

impl Display for Ruleset {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.table)?;
        let mut first = true;
        for (name, set) in &self.sets {
            separate(f, &mut first)?;
            let noun = if set.kind.value == ValueType::Member {
                "set"
            } else {
                "map"
            };
            writeln!(f, "\t{noun} {name} {{")?;
            write_set(f, set)?;
            writeln!(f, "\t}}")?;
        }
        for (name, chain) in &self.chains {
            separate(f, &mut first)?;
            writeln!(f, "\tchain {name} {{")?;
            chain.fmt(f)?;
            writeln!(f, "\t}}")?;
        }
        writeln!(f, "}}")
    }
}

fn separate(f: &mut Formatter<'_>, first: &mut bool) -> fmt::Result {
    if std::mem::take(first) {
        Ok(())
    } else {
        f.write_char('\n')
    }
}

fn write_set(f: &mut Formatter<'_>, set: &Set) -> fmt::Result {
    writeln!(f, "\t\ttype {}", set.kind)?;
    if set.kind.interval {
        writeln!(f, "\t\tflags interval")?;
    }
    if set.elements.is_empty() {
        return Ok(());
    }
    write!(f, "\t\telements = {{ ")?;
    write_elements(f, set, ",\n\t\t\t     ")?;
    writeln!(f, " }}")
}

fn write_elements(f: &mut Formatter<'_>, set: &Set, separator: &str) -> fmt::Result {
    for (index, (key, value)) in set.elements.iter().enumerate() {
        if index > 0 {
            f.write_str(separator)?;
        }
        write!(f, "{key}{value}")?;
    }
    Ok(())
}

impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(base) = &self.base {
            writeln!(f, "\t\t{base}")?;
        }
        for rule in &self.rules {
            writeln!(f, "\t\t{rule} comment \"{}\"", rule.comment())?;
        }
        Ok(())
    }
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ChainType::Filter => "filter",
            ChainType::Nat => "nat",
            ChainType::Route => "route",
        };
        let hook = match self.hook {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Forward => "forward",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        };
        let policy = match self.policy {
            ChainPolicy::Accept => "accept",
            ChainPolicy::Drop => "drop",
        };
        write!(f, "type {kind} hook {hook} priority ")?;
        write_priority(f, self.hook, self.priority)?;
        write!(f, "; policy {policy};")
    }
}

/// Prints a priority as nft does: relative to a standard priority of the hook that is at most 10
/// away.
fn write_priority(f: &mut Formatter<'_>, hook: Hook, priority: i32) -> fmt::Result {
    let names = [
        ("raw", -300),
        ("mangle", -150),
        ("dstnat", -100),
        ("filter", 0),
        ("security", 50),
        ("srcnat", 100),
    ];
    let allowed = |name: &str| match name {
        "dstnat" => hook == Hook::Prerouting,
        "srcnat" => hook == Hook::Postrouting,
        _ => true,
    };
    let near = names
        .iter()
        .find(|(name, value)| allowed(name) && (priority - value).abs() <= 10);
    match near.map(|(name, value)| (name, priority - value)) {
        None => write!(f, "{priority}"),
        Some((name, 0)) => f.write_str(name),
        Some((name, offset)) if offset > 0 => write!(f, "{name} + {offset}"),
        Some((name, offset)) => write!(f, "{name} - {}", -offset),
    }
}

// --- Sets and values ---

impl Display for SetKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Joined(&self.key, " . ").fmt(f)?;
        match &self.value {
            ValueType::Member => Ok(()),
            ValueType::Verdict => f.write_str(" : verdict"),
            ValueType::Data(fields) => write!(f, " : {}", Joined(fields, " . ")),
        }
    }
}

impl Display for FieldType {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "ipv4_addr",
            Self::Ipv6 => "ipv6_addr",
            Self::Ether => "ether_addr",
            Self::Proto => "inet_proto",
            Self::Port => "inet_service",
            Self::Iface => "ifname",
            Self::Mark => "mark",
            Self::CtState => "ct_state",
            Self::Family => "nf_proto",
            Self::IcmpType => "icmp_type",
            Self::IcmpCode => "icmp_code",
            Self::Icmp6Type => "icmpv6_type",
            Self::Icmp6Code => "icmpv6_code",
        })
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Joined(self.fields(), " . ").fmt(f)
    }
}

/// The part of an element after its key.
impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Member => Ok(()),
            Self::Verdict(verdict) => write!(f, " : {verdict}"),
            Self::Data(data) => write!(f, " : {}", Joined(data, " . ")),
        }
    }
}

impl Display for Field {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.is_single() {
            return self.first().fmt(f);
        }
        match self.prefix_length() {
            Some(length) => write!(f, "{}/{length}", self.first()),
            None => write!(f, "{}-{}", self.first(), self.last()),
        }
    }
}

impl Display for Datum {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ipv4(address) => address.fmt(f),
            Self::Ipv6(address) => address.fmt(f),
            Self::Ether([a, b, c, d, e, g]) => {
                write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
            }
            Self::Proto(proto) => proto.fmt(f),
            Self::Port(port) => port.fmt(f),
            Self::Iface(name) => write!(f, "\"{}\"", name.as_str()),
            Self::Mark(mark) => write!(f, "{mark:#010x}"),
            Self::CtState(state) => state.fmt(f),
            Self::Family(Family::Ipv4) => f.write_str("ipv4"),
            Self::Family(Family::Ipv6) => f.write_str("ipv6"),
            Self::IcmpType(value) => write_named(f, ICMP_TYPES, *value),
            Self::IcmpCode(value) => write_named(f, ICMP_CODES, *value),
            Self::Icmp6Type(value) => write_named(f, ICMP6_TYPES, *value),
            Self::Icmp6Code(value) => write_named(f, ICMP6_CODES, *value),
        }
    }
}

impl Display for Proto {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write_named(f, PROTOCOLS, self.0)
    }
}

impl Display for CtState {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let names = [
            (1, "invalid"),
            (2, "established"),
            (4, "related"),
            (8, "new"),
            (64, "untracked"),
        ];
        let set: Vec<&str> = names
            .iter()
            .filter(|(bit, _)| self.0 & bit != 0)
            .map(|(_, name)| *name)
            .collect();
        Joined(&set, ",").fmt(f)
    }
}

fn write_named(f: &mut Formatter<'_>, names: &[(u8, &str)], value: u8) -> fmt::Result {
    match names.iter().find(|(number, _)| *number == value) {
        Some((_, name)) => f.write_str(name),
        None => value.fmt(f),
    }
}

// --- Rules ---

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Joined(&self.statements, " ").fmt(f)
    }
}

impl Display for Statement {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match(test) => test.fmt(f),
            Self::Vmap(key, map) => write!(f, "{} vmap {map}", Joined(key, " . ")),
            Self::Counter => f.write_str("counter"),
            Self::Log(log) => log.fmt(f),
            Self::Limit(limit) => limit.fmt(f),
            Self::MarkSet(mark) => mark.fmt(f),
            Self::Notrack => f.write_str("notrack"),
            Self::Masquerade(masquerade) => masquerade.fmt(f),
            Self::Nat(nat) => nat.fmt(f),
            Self::Reject(reject) => reject.fmt(f),
            Self::Verdict(verdict) => verdict.fmt(f),
        }
    }
}

impl Display for Match {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(key, op, field) => write!(f, "{}{}{field}", key, negation(op)),
            Self::NamePrefix(key, op, prefix) => {
                write!(f, "{key}{}\"{}*\"", negation(op), prefix.as_str())
            }
            Self::In(key, op, set) => write!(f, "{}{}{set}", Joined(key, " . "), negation(op)),
            Self::MarkBits {
                mask: u32::MAX,
                op,
                value,
            } => write!(f, "meta mark{}{value:#010x}", negation(op)),
            Self::MarkBits { mask, op, value } => {
                let compare = if *op == CmpOp::Eq { "==" } else { "!=" };
                write!(f, "meta mark & {mask:#010x} {compare} {value:#010x}")
            }
            Self::CtState(op, state) => write!(f, "ct state{}{state}", bit_negation(op)),
            Self::CtDnat(op) => write!(f, "ct status{}dnat", bit_negation(op)),
            Self::ReversePath { exists, with_mark } => {
                let mark = if *with_mark { ". mark " } else { "" };
                write!(
                    f,
                    "fib saddr {mark}. iif oif {}",
                    if *exists { "exists" } else { "missing" }
                )
            }
            Self::AddressType(side, op, kind) => {
                let side = if *side == Side::Source {
                    "saddr"
                } else {
                    "daddr"
                };
                write!(f, "fib {side} type{}{kind}", negation(op))
            }
            Self::LaterFragment => f.write_str("ip frag-off & 8191 != 0"),
        }
    }
}

const fn negation(op: &CmpOp) -> &'static str {
    match op {
        CmpOp::Eq => " ",
        CmpOp::Ne => " != ",
    }
}

const fn bit_negation(op: &CmpOp) -> &'static str {
    match op {
        CmpOp::Eq => " ",
        CmpOp::Ne => " ! ",
    }
}

impl Display for AddressType {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unicast => "unicast",
            Self::Local => "local",
            Self::Broadcast => "broadcast",
            Self::Multicast => "multicast",
        })
    }
}

impl Display for Selector {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iifname => f.write_str("iifname"),
            Self::Oifname => f.write_str("oifname"),
            Self::L4proto => f.write_str("meta l4proto"),
            Self::Nfproto => f.write_str("meta nfproto"),
            Self::Mark => f.write_str("meta mark"),
            Self::Saddr4 => f.write_str("ip saddr"),
            Self::Daddr4 => f.write_str("ip daddr"),
            Self::Saddr6 => f.write_str("ip6 saddr"),
            Self::Daddr6 => f.write_str("ip6 daddr"),
            Self::EtherSaddr => f.write_str("ether saddr"),
            Self::Sport(transport) => write!(f, "{transport} sport"),
            Self::Dport(transport) => write!(f, "{transport} dport"),
            Self::CtState => f.write_str("ct state"),
            Self::IcmpType => f.write_str("icmp type"),
            Self::IcmpCode => f.write_str("icmp code"),
            Self::Icmp6Type => f.write_str("icmpv6 type"),
            Self::Icmp6Code => f.write_str("icmpv6 code"),
        }
    }
}

impl Display for Transport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "th",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::UdpLite => "udplite",
            Self::Sctp => "sctp",
        })
    }
}

impl Display for SetRef {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => write!(f, "@{name}"),
            Self::Anonymous(set) => {
                f.write_str("{ ")?;
                write_elements(f, set, ", ")?;
                f.write_str(" }")
            }
        }
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Continue => f.write_str("continue"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

// --- Statements ---

impl Display for Log {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "log prefix \"{}\"", self.prefix)?;
        match self.target {
            LogTarget::Syslog(4) => Ok(()),
            LogTarget::Syslog(level) => {
                let names = [
                    "emerg", "alert", "crit", "err", "warn", "notice", "info", "debug",
                ];
                write!(f, " level {}", names[usize::from(level.min(7))])
            }
            LogTarget::Group {
                group,
                snaplen,
                queue_threshold,
            } => {
                write!(f, " group {group}")?;
                if snaplen > 0 {
                    write!(f, " snaplen {snaplen}")?;
                }
                if queue_threshold > 0 {
                    write!(f, " queue-threshold {queue_threshold}")?;
                }
                Ok(())
            }
        }
    }
}

impl Display for Limit {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            RateUnit::Second => "second",
            RateUnit::Minute => "minute",
            RateUnit::Hour => "hour",
            RateUnit::Day => "day",
        };
        write!(
            f,
            "limit rate {}{}/{unit}",
            if self.over { "over " } else { "" },
            self.rate
        )?;
        match self.burst {
            Limit::DEFAULT_BURST => Ok(()),
            burst => write!(f, " burst {burst} packets"),
        }
    }
}

impl Display for MarkSet {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { mask, value } = *self;
        let keep = !mask;
        if mask == u32::MAX {
            write!(f, "meta mark set {value:#010x}")
        } else if value == 0 {
            write!(f, "meta mark set meta mark & {keep:#010x}")
        } else if value == mask {
            write!(f, "meta mark set meta mark | {value:#010x}")
        } else {
            write!(
                f,
                "meta mark set meta mark & {:#010x} | {value:#010x}",
                keep | value
            )
        }
    }
}

impl Display for Masquerade {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("masquerade")?;
        if let Some(ports) = self.ports {
            f.write_str(" to ")?;
            write_ports(f, ports)?;
        }
        if self.fully_random {
            f.write_str(" fully-random")
        } else {
            Ok(())
        }
    }
}

impl Display for Nat {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            NatType::Source => "snat",
            NatType::Destination => "dnat",
        })?;
        match &self.to {
            NatTarget::Address(IpAddr::V4(address), ports) => {
                write!(f, " ip to {address}")?;
                ports.map_or(Ok(()), |ports| write_ports(f, ports))?;
            }
            NatTarget::Address(IpAddr::V6(address), None) => write!(f, " ip6 to {address}")?,
            NatTarget::Address(IpAddr::V6(address), Some(ports)) => {
                write!(f, " ip6 to [{address}]")?;
                write_ports(f, *ports)?;
            }
            NatTarget::Map {
                family, key, map, ..
            } => {
                let family = if *family == Family::Ipv4 { "ip" } else { "ip6" };
                write!(f, " {family} to {} map {map}", Joined(key, " . "))?;
            }
        }
        if self.fully_random {
            f.write_str(" fully-random")
        } else {
            Ok(())
        }
    }
}

fn write_ports(f: &mut Formatter<'_>, (first, last): (u16, u16)) -> fmt::Result {
    if first == last {
        write!(f, ":{first}")
    } else {
        write!(f, ":{first}-{last}")
    }
}

impl Display for Reject {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AdminProhibited => "reject with icmpx admin-prohibited",
            Self::PortUnreachable => "reject",
            Self::HostUnreachable => "reject with icmpx host-unreachable",
            Self::NoRoute => "reject with icmpx no-route",
            Self::TcpReset => "reject with tcp reset",
        })
    }
}
