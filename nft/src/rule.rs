//! Rules: matches, and statements that act on the packet.
//!
//! Dependencies are implicit, as in nft: a match on an address implies the network protocol, a
//! match on a port of a transport implies that transport. The encoder adds these tests and the
//! printed text leaves them out.

use std::net::IpAddr;
use std::sync::Arc;

use crate::ruleset::{ChainName, SetName};
use crate::set::{CtState, Family, Field, FieldType, IfName, Key, Set, SetKind, Value};

/// One rule: statements evaluated from left to right, up to the first match that fails.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The statements in order.
    pub statements: Vec<Statement>,
}

/// A match or an action.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Statement {
    /// Continue only if this matches.
    Match(Match),
    /// `vmap`: apply the verdict that the map holds for the key; continue if it holds none.
    Vmap(Vec<Selector>, SetRef),
    /// `counter`: count packets and bytes.
    Counter,
    /// `log`: log the packet.
    Log(Log),
    /// `limit rate`: continue while below a rate, or only while above it.
    Limit(Limit),
    /// `meta mark set`: write bits of the packet mark.
    MarkSet(MarkSet),
    /// `notrack`: exempt the packet from connection tracking; needs a chain that runs before it
    /// (priority raw).
    Notrack,
    /// `masquerade`: translate the source to the address of the outgoing interface.
    Masquerade(Masquerade),
    /// `snat` or `dnat`.
    Nat(Nat),
    /// `reject`: drop the packet and notify the sender.
    Reject(Reject),
    /// End the rule with this verdict.
    Verdict(Verdict),
}

/// A match on a packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Match {
    /// Compares a field with a value, a range or a prefix.
    Is(Selector, CmpOp, Field),
    /// Compares the start of an interface name (`cali*`); the selector is `iifname` or `oifname`.
    NamePrefix(Selector, CmpOp, IfName),
    /// Looks up a field, or a concatenation of fields, in a set.
    In(Vec<Selector>, CmpOp, SetRef),
    /// Compares some bits of the packet mark.
    MarkBits {
        /// Bits to compare.
        mask: u32,
        /// Comparison operator.
        op: CmpOp,
        /// Expected bits, a subset of `mask`.
        value: u32,
    },
    /// `ct state`: any of these states (`Eq`), or none of them (`Ne`).
    CtState(CmpOp, CtState),
    /// `ct status dnat`: the connection's destination was translated (`Eq`) or not (`Ne`).
    CtDnat(CmpOp),
    /// `fib saddr . iif oif`: the reverse path filter, which looks for a route to the source
    /// through the incoming interface.
    ReversePath {
        /// Whether to match if there is a route, or if there is none.
        exists: bool,
        /// Whether the lookup includes the packet mark.
        with_mark: bool,
    },
    /// `fib saddr type` or `fib daddr type`: the type of an address in the routing table.
    AddressType(Side, CmpOp, AddressType),
    /// `ip frag-off & 8191 != 0`: an IPv4 fragment other than the first.
    LaterFragment,
}

/// The packet field or metadata that a match or a map reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// `iifname`: name of the incoming interface.
    Iifname,
    /// `oifname`: name of the outgoing interface.
    Oifname,
    /// `meta l4proto`: transport protocol.
    L4proto,
    /// `meta nfproto`: network protocol.
    Nfproto,
    /// `meta mark`: packet mark.
    Mark,
    /// `ip saddr`: IPv4 source address.
    Saddr4,
    /// `ip daddr`: IPv4 destination address.
    Daddr4,
    /// `ip6 saddr`: IPv6 source address.
    Saddr6,
    /// `ip6 daddr`: IPv6 destination address.
    Daddr6,
    /// `ether saddr`: Ethernet source address.
    EtherSaddr,
    /// `tcp sport` and the like: source port.
    Sport(Transport),
    /// `tcp dport` and the like: destination port.
    Dport(Transport),
    /// `ct state`, as the key of a verdict map; to match on it, use [`Match::CtState`].
    CtState,
    /// `icmp type`
    IcmpType,
    /// `icmp code`
    IcmpCode,
    /// `icmpv6 type`
    Icmp6Type,
    /// `icmpv6 code`
    Icmp6Code,
}

/// The transport header that a port is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// `th`: any transport. Implies no test of the protocol, so it needs a match on
    /// [`Selector::L4proto`] beside it.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// UDP-Lite.
    UdpLite,
    /// SCTP.
    Sctp,
}

/// Source or destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Source address.
    Source,
    /// Destination address.
    Destination,
}

/// The type of an address in the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressType {
    /// A unicast address of another host.
    Unicast,
    /// An address of this host.
    Local,
    /// A broadcast address.
    Broadcast,
    /// A multicast address.
    Multicast,
}

/// Comparison operator of a match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CmpOp {
    /// `==`: equal, inside a range, in a set.
    Eq,
    /// `!=`: different, outside a range, not in a set.
    Ne,
}

/// A reference from a rule to a set or map.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SetRef {
    /// A named set of the table.
    Named(SetName),
    /// An anonymous, constant set that belongs to the rule.
    Anonymous(Arc<Set>),
}

/// A verdict.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// `accept`: end this base chain; later chains of the hook and later hooks still see the
    /// packet.
    Accept,
    /// `drop`: discard the packet at once.
    Drop,
    /// `continue`: continue with the next rule.
    Continue,
    /// `return`: continue in the calling chain; in a base chain, apply its policy.
    Return,
    /// `jump`: evaluate a chain, then continue with the next rule.
    Jump(ChainName),
    /// `goto`: evaluate a chain without coming back.
    Goto(ChainName),
}

/// A `log` statement.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Log {
    /// Prefix of the message; at most 127 bytes, without quotes.
    pub prefix: String,
    /// Destination of the message.
    pub target: LogTarget,
}

/// The destination of log messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogTarget {
    /// The kernel log, at this syslog severity (0 to 7).
    Syslog(u8),
    /// An nfnetlink_log group.
    Group {
        /// Group number.
        group: u16,
        /// Bytes of the packet to copy; 0 leaves it to the listener.
        snaplen: u32,
        /// Packets to queue before the listener is woken; 0 leaves it to the listener.
        queue_threshold: u16,
    },
}

/// A `limit` statement: a token bucket of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limit {
    /// Packets per unit.
    pub rate: u64,
    /// Unit of time.
    pub unit: RateUnit,
    /// Packets that may exceed the rate at once; nft's default is [`Limit::DEFAULT_BURST`].
    pub burst: u32,
    /// `limit rate over`: match packets above the rate instead of those below.
    pub over: bool,
}

/// Time unit of a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RateUnit {
    /// One second.
    Second,
    /// One minute.
    Minute,
    /// One hour.
    Hour,
    /// One day.
    Day,
}

/// A `meta mark set` statement: `mark = (mark & !mask) | value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MarkSet {
    /// Bits to write.
    pub mask: u32,
    /// Their new value, a subset of `mask`.
    pub value: u32,
}

/// A `masquerade` statement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Masquerade {
    /// First and last source port to use; the rule must match the transport.
    pub ports: Option<(u16, u16)>,
    /// Draw ports at random for every connection.
    pub fully_random: bool,
}

/// A `snat` or `dnat` statement.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Nat {
    /// Which end of the connection is translated.
    pub kind: NatType,
    /// The new address and port.
    pub to: NatTarget,
    /// Draw ports at random for every connection.
    pub fully_random: bool,
}

/// The end of a connection that NAT translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NatType {
    /// `snat`
    Source,
    /// `dnat`
    Destination,
}

/// The new address of a translation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NatTarget {
    /// A fixed address, with an optional range of ports; with ports, the rule must match the
    /// transport.
    Address(IpAddr, Option<(u16, u16)>),
    /// The value that a data map holds for a key.
    Map {
        /// Family of the addresses in the map.
        family: Family,
        /// The key to look up.
        key: Vec<Selector>,
        /// The map.
        map: SetRef,
        /// Whether its values are address and port, or an address alone.
        with_port: bool,
    },
}

/// A `reject` statement: the answer that the sender gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reject {
    /// ICMP or ICMPv6: administratively prohibited.
    AdminProhibited,
    /// ICMP or ICMPv6: port unreachable.
    PortUnreachable,
    /// ICMP or ICMPv6: host unreachable.
    HostUnreachable,
    /// ICMP or ICMPv6: no route.
    NoRoute,
    /// TCP reset; the rule must match TCP.
    TcpReset,
}

// --- Rule ---

impl Rule {
    /// An empty rule, which matches every packet and does nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a match.
    pub fn when(mut self, test: Match) -> Self {
        self.statements.push(Statement::Match(test));
        self
    }

    /// Adds a statement.
    pub fn then(mut self, statement: Statement) -> Self {
        self.statements.push(statement);
        self
    }

    /// Adds `counter`.
    pub fn counter(self) -> Self {
        self.then(Statement::Counter)
    }

    /// Adds a verdict.
    pub fn verdict(self, verdict: Verdict) -> Self {
        self.then(Statement::Verdict(verdict))
    }

    /// Adds `accept`.
    pub fn accept(self) -> Self {
        self.verdict(Verdict::Accept)
    }

    /// Adds `drop`.
    pub fn drop(self) -> Self {
        self.verdict(Verdict::Drop)
    }

    /// Adds `return`.
    pub fn ret(self) -> Self {
        self.verdict(Verdict::Return)
    }

    /// Adds `jump chain`.
    pub fn jump(self, chain: &ChainName) -> Self {
        self.verdict(Verdict::Jump(chain.clone()))
    }

    /// Adds `goto chain`.
    pub fn goto(self, chain: &ChainName) -> Self {
        self.verdict(Verdict::Goto(chain.clone()))
    }

    /// Adds `vmap` with a named verdict map.
    pub fn vmap(self, key: impl Into<Vec<Selector>>, map: &SetName) -> Self {
        self.then(Statement::Vmap(key.into(), SetRef::Named(map.clone())))
    }

    /// Adds `vmap` with an anonymous verdict map.
    pub fn inline_vmap(
        self,
        key: impl Into<Vec<Selector>>,
        entries: impl IntoIterator<Item = (impl Into<Key>, Verdict)>,
    ) -> Self {
        let key = key.into();
        let elements = entries
            .into_iter()
            .map(|(key, verdict)| (key.into(), Value::Verdict(verdict)));
        let set = anonymous(&key, SetKind::with_verdicts, elements);
        self.then(Statement::Vmap(key, SetRef::Anonymous(Arc::new(set))))
    }
}

/// An anonymous set of the selectors' types, with intervals if an element is a range.
fn anonymous(
    key: &[Selector],
    shape: impl FnOnce(SetKind) -> SetKind,
    elements: impl Iterator<Item = (Key, Value)>,
) -> Set {
    let kind = shape(SetKind::of(
        key.iter().map(Selector::field_type).collect::<Vec<_>>(),
    ));
    let mut set = Set {
        kind,
        elements: elements.collect(),
    };
    set.kind.interval = !set.elements.keys().all(Key::is_single);
    set
}

// --- Match ---

impl Match {
    /// The field equals a value, or is inside a range or prefix.
    pub fn is(key: Selector, value: impl Into<Field>) -> Self {
        Self::Is(key, CmpOp::Eq, value.into())
    }

    /// The field differs from a value, or is outside a range or prefix.
    pub fn not(key: Selector, value: impl Into<Field>) -> Self {
        Self::Is(key, CmpOp::Ne, value.into())
    }

    /// The name of the incoming interface starts with a prefix.
    pub fn iif_prefix(prefix: IfName) -> Self {
        Self::NamePrefix(Selector::Iifname, CmpOp::Eq, prefix)
    }

    /// The name of the outgoing interface starts with a prefix.
    pub fn oif_prefix(prefix: IfName) -> Self {
        Self::NamePrefix(Selector::Oifname, CmpOp::Eq, prefix)
    }

    /// The key is in a named set.
    pub fn in_set(key: impl Into<Vec<Selector>>, set: &SetName) -> Self {
        Self::In(key.into(), CmpOp::Eq, SetRef::Named(set.clone()))
    }

    /// The key is not in a named set.
    pub fn not_in_set(key: impl Into<Vec<Selector>>, set: &SetName) -> Self {
        Self::In(key.into(), CmpOp::Ne, SetRef::Named(set.clone()))
    }

    /// The key is one of these: an anonymous set, or a plain comparison if there is only one.
    pub fn any_of(
        key: impl Into<Vec<Selector>>,
        keys: impl IntoIterator<Item = impl Into<Key>>,
    ) -> Self {
        Self::inline(key.into(), CmpOp::Eq, keys)
    }

    /// The key is none of these: an anonymous set, or a plain comparison if there is only one.
    pub fn none_of(
        key: impl Into<Vec<Selector>>,
        keys: impl IntoIterator<Item = impl Into<Key>>,
    ) -> Self {
        Self::inline(key.into(), CmpOp::Ne, keys)
    }

    /// An anonymous set of one simple element becomes a comparison, as in nft, so that both list
    /// the same.
    fn inline(
        key: Vec<Selector>,
        op: CmpOp,
        keys: impl IntoIterator<Item = impl Into<Key>>,
    ) -> Self {
        let set = anonymous(
            &key,
            |kind| kind,
            keys.into_iter().map(|key| (key.into(), Value::Member)),
        );
        match (
            key.as_slice(),
            set.elements.len(),
            set.elements.keys().next(),
        ) {
            ([selector], 1, Some(Key::One(field))) => Self::Is(*selector, op, *field),
            _ => Self::In(key, op, SetRef::Anonymous(Arc::new(set))),
        }
    }
}

impl Selector {
    /// The type of the field.
    pub const fn field_type(&self) -> FieldType {
        match self {
            Self::Iifname | Self::Oifname => FieldType::Iface,
            Self::L4proto => FieldType::Proto,
            Self::Nfproto => FieldType::Family,
            Self::Mark => FieldType::Mark,
            Self::Saddr4 | Self::Daddr4 => FieldType::Ipv4,
            Self::Saddr6 | Self::Daddr6 => FieldType::Ipv6,
            Self::EtherSaddr => FieldType::Ether,
            Self::Sport(_) | Self::Dport(_) => FieldType::Port,
            Self::CtState => FieldType::CtState,
            Self::IcmpType => FieldType::IcmpType,
            Self::IcmpCode => FieldType::IcmpCode,
            Self::Icmp6Type => FieldType::Icmp6Type,
            Self::Icmp6Code => FieldType::Icmp6Code,
        }
    }
}

impl From<Selector> for Vec<Selector> {
    fn from(selector: Selector) -> Self {
        vec![selector]
    }
}

impl From<FieldType> for Vec<FieldType> {
    fn from(field: FieldType) -> Self {
        vec![field]
    }
}

impl Limit {
    /// nft's default burst, which its listing leaves out.
    pub const DEFAULT_BURST: u32 = 5;
}

impl Verdict {
    /// The chain to jump or go to.
    pub const fn target(&self) -> Option<&ChainName> {
        match self {
            Self::Jump(chain) | Self::Goto(chain) => Some(chain),
            Self::Accept | Self::Drop | Self::Continue | Self::Return => None,
        }
    }
}

impl SetRef {
    /// The name; `None` for an anonymous set.
    pub const fn name(&self) -> Option<&SetName> {
        match self {
            Self::Named(name) => Some(name),
            Self::Anonymous(_) => None,
        }
    }
}

impl Statement {
    /// The key and the set of a statement that does a lookup.
    pub fn lookup(&self) -> Option<(&[Selector], &SetRef)> {
        match self {
            Self::Match(Match::In(key, _, set)) | Self::Vmap(key, set) => Some((key, set)),
            Self::Nat(Nat {
                to: NatTarget::Map { key, map: set, .. },
                ..
            }) => Some((key, set)),
            _ => None,
        }
    }
}
