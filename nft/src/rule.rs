//! Rules: what they look at, what they compare it with and what they do.
//!
//! A rule states no dependency: an address match implies the network protocol, a port match of a transport implies
//! that transport. The encoder adds these tests, as `nft` does, and the printed text leaves them out.

use std::net::IpAddr;
use std::sync::Arc;

use super::ruleset::{ChainName, SetName};
use super::set::{CtState, Family, Field, FieldType, IfName, Key, Set, SetKind, Value};

/// One rule: statements from left to right, ended by the first test that fails.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    /// The statements in order.
    pub statements: Vec<Statement>,
}

/// A test or an action.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Statement {
    /// Go on only if this holds.
    Match(Match),
    /// Take the verdict found under the key; go on if there is none.
    Vmap(Vec<Selector>, SetRef),
    /// Count packets and bytes.
    Counter,
    /// Report the packet.
    Log(Log),
    /// Go on while below (or only when above) a rate.
    Limit(Limit),
    /// Change bits of the packet mark.
    MarkSet(MarkSet),
    /// Exempt the packet from connection tracking; only before tracking happens (priority raw).
    Notrack,
    /// Translate the source to the address of the outgoing interface.
    Masquerade(Masquerade),
    /// Translate source or destination.
    Nat(Nat),
    /// Drop the packet and tell the sender.
    Reject(Reject),
    /// End with this verdict.
    Verdict(Verdict),
}

/// A test on the packet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Match {
    /// A field equals a value, or lies in a range or prefix.
    Is(Selector, Op, Field),
    /// An interface name begins with this (`cali*`). The selector is one of the two names.
    NamePrefix(Selector, Op, IfName),
    /// A field, or a concatenation of fields, is in a set.
    In(Vec<Selector>, Op, SetRef),
    /// Some bits of the mark equal `value`.
    MarkBits {
        /// Bits looked at.
        mask: u32,
        /// Comparison.
        op: Op,
        /// Expected bits, a subset of `mask`.
        value: u32,
    },
    /// The tracking state is one of these (`Eq`) or none of these (`Ne`).
    CtState(Op, CtState),
    /// The connection has had its destination translated (`Eq`) or not (`Ne`).
    CtDnat(Op),
    /// Reverse path: whether a route back to the source exists through the interface the packet came from.
    ReversePath {
        /// Match when there is a route (`true`) or when there is none.
        exists: bool,
        /// Whether the packet's mark takes part in the lookup.
        with_mark: bool,
    },
    /// The kind of address, as the routing table sees it.
    AddressType(Side, Op, AddressType),
    /// The packet is an IPv4 fragment other than the first.
    LaterFragment,
}

/// What a test or a map looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// Name of the interface the packet came from.
    Iifname,
    /// Name of the interface the packet leaves by.
    Oifname,
    /// Transport protocol.
    L4proto,
    /// Network protocol.
    Nfproto,
    /// Packet mark.
    Mark,
    /// IPv4 source.
    Saddr4,
    /// IPv4 destination.
    Daddr4,
    /// IPv6 source.
    Saddr6,
    /// IPv6 destination.
    Daddr6,
    /// Ethernet source.
    EtherSaddr,
    /// Source port of a transport.
    Sport(Transport),
    /// Destination port of a transport.
    Dport(Transport),
    /// Connection tracking state, for verdict maps; rules test it with [`Match::CtState`].
    CtState,
    /// ICMP type.
    IcmpType,
    /// ICMP code.
    IcmpCode,
    /// ICMPv6 type.
    Icmp6Type,
    /// ICMPv6 code.
    Icmp6Code,
}

/// Which header a port is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// Whatever transport it is, untested: only sound next to a test of [`Selector::L4proto`].
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

/// Kind of an address in the routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AddressType {
    /// A unicast address elsewhere.
    Unicast,
    /// An address of this host.
    Local,
    /// A broadcast address.
    Broadcast,
    /// A multicast address.
    Multicast,
}

/// Sense of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Equal, within, one of.
    Eq,
    /// Different, outside, none of.
    Ne,
}

/// A set in the table, or one that belongs to its rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SetRef {
    /// A set of the ruleset.
    Named(SetName),
    /// A constant set that lives and dies with the rule.
    Anonymous(Arc<Set>),
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Leave this hook; later hooks still see the packet.
    Accept,
    /// Discard at once.
    Drop,
    /// Go on with the next rule.
    Continue,
    /// Back to the calling chain, or to the policy.
    Return,
    /// Call a chain.
    Jump(ChainName),
    /// Continue in a chain without coming back.
    Goto(ChainName),
}

/// How a packet is reported.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Log {
    /// Text put before the report; at most 127 bytes, no quotes.
    pub prefix: String,
    /// Where the report goes.
    pub target: LogTarget,
}

/// Where a report goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogTarget {
    /// The kernel log, at this syslog severity (0 to 7).
    Syslog(u8),
    /// Listeners of a netlink log group.
    Group {
        /// Group number.
        group: u16,
        /// Bytes of the packet to copy; 0 for the listener's choice.
        snaplen: u32,
        /// Packets to gather before the listener is woken; 0 for the listener's choice.
        queue_threshold: u16,
    },
}

/// A token bucket on packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limit {
    /// Packets per unit.
    pub rate: u64,
    /// Unit of time.
    pub unit: RateUnit,
    /// Packets that may pass at once, as [`Limit::DEFAULT_BURST`].
    pub burst: u32,
    /// Match what exceeds the rate instead of what stays below.
    pub over: bool,
}

/// Unit of time of a rate.
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

/// `mark = (mark & !mask) | value`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MarkSet {
    /// Bits written.
    pub mask: u32,
    /// Their new value, a subset of `mask`.
    pub value: u32,
}

/// How source ports are chosen when masquerading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Masquerade {
    /// First and last port to use; needs a rule that tests the transport.
    pub ports: Option<(u16, u16)>,
    /// Draw ports at random for every connection.
    pub fully_random: bool,
}

/// A translation of addresses and ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Nat {
    /// Source or destination.
    pub kind: NatType,
    /// What it becomes.
    pub to: NatTarget,
    /// Draw ports at random for every connection.
    pub fully_random: bool,
}

/// Which end is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NatType {
    /// Source.
    Source,
    /// Destination.
    Destination,
}

/// What an address becomes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NatTarget {
    /// This address, and a port of this range if given (then the rule must test the transport).
    Address(IpAddr, Option<(u16, u16)>),
    /// What a data map yields.
    Map {
        /// Family of the addresses in the map.
        family: Family,
        /// Key that is looked up.
        key: Vec<Selector>,
        /// The map.
        map: SetRef,
        /// Whether it yields address and port, or the address alone.
        with_port: bool,
    },
}

/// How a sender is told.
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
    /// TCP reset; the rule must test for TCP.
    TcpReset,
}

// --- Rule ---

impl Rule {
    /// An empty rule, which does nothing to every packet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a test.
    pub fn when(mut self, test: Match) -> Self {
        self.statements.push(Statement::Match(test));
        self
    }

    /// Adds a statement.
    pub fn then(mut self, statement: Statement) -> Self {
        self.statements.push(statement);
        self
    }

    /// Adds a counter.
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

    /// Adds a verdict map of the ruleset.
    pub fn vmap(self, key: impl Into<Vec<Selector>>, map: &SetName) -> Self {
        self.then(Statement::Vmap(key.into(), SetRef::Named(map.clone())))
    }

    /// Adds a verdict map that belongs to this rule.
    pub fn inline_vmap(
        self,
        key: impl Into<Vec<Selector>>,
        entries: impl IntoIterator<Item = (impl Into<Key>, Verdict)>,
    ) -> Self {
        let key = key.into();
        let elements = entries.into_iter().map(|(key, verdict)| (key.into(), Value::Verdict(verdict)));
        let set = anonymous(&key, SetKind::to_verdict, elements);
        self.then(Statement::Vmap(key, SetRef::Anonymous(Arc::new(set))))
    }
}

/// A constant set of the selectors' types, with intervals if an element needs them.
fn anonymous(
    key: &[Selector],
    shape: impl FnOnce(SetKind) -> SetKind,
    elements: impl Iterator<Item = (Key, Value)>,
) -> Set {
    let kind = shape(SetKind::of(key.iter().map(Selector::field_type).collect::<Vec<_>>()));
    let mut set = Set { kind, elements: elements.collect() };
    set.kind.interval = !set.elements.keys().all(Key::is_single);
    set
}

// --- Match ---

impl Match {
    /// The field is this value, or within this range.
    pub fn is(key: Selector, value: impl Into<Field>) -> Self {
        Self::Is(key, Op::Eq, value.into())
    }

    /// The field is not this value, or outside this range.
    pub fn not(key: Selector, value: impl Into<Field>) -> Self {
        Self::Is(key, Op::Ne, value.into())
    }

    /// The packet came from an interface whose name begins so.
    pub fn iif_prefix(prefix: IfName) -> Self {
        Self::NamePrefix(Selector::Iifname, Op::Eq, prefix)
    }

    /// The packet leaves by an interface whose name begins so.
    pub fn oif_prefix(prefix: IfName) -> Self {
        Self::NamePrefix(Selector::Oifname, Op::Eq, prefix)
    }

    /// The key is in a set of the ruleset.
    pub fn in_set(key: impl Into<Vec<Selector>>, set: &SetName) -> Self {
        Self::In(key.into(), Op::Eq, SetRef::Named(set.clone()))
    }

    /// The key is not in a set of the ruleset.
    pub fn not_in_set(key: impl Into<Vec<Selector>>, set: &SetName) -> Self {
        Self::In(key.into(), Op::Ne, SetRef::Named(set.clone()))
    }

    /// The key is one of these.
    pub fn any_of(key: impl Into<Vec<Selector>>, keys: impl IntoIterator<Item = impl Into<Key>>) -> Self {
        Self::inline(key.into(), Op::Eq, keys)
    }

    /// The key is none of these.
    pub fn none_of(key: impl Into<Vec<Selector>>, keys: impl IntoIterator<Item = impl Into<Key>>) -> Self {
        Self::inline(key.into(), Op::Ne, keys)
    }

    /// A set of one plain element is a comparison, as it is for `nft`.
    fn inline(key: Vec<Selector>, op: Op, keys: impl IntoIterator<Item = impl Into<Key>>) -> Self {
        let set = anonymous(&key, |kind| kind, keys.into_iter().map(|key| (key.into(), Value::Member)));
        match (key.as_slice(), set.elements.len(), set.elements.keys().next()) {
            ([selector], 1, Some(Key::One(field))) => Self::Is(*selector, op, *field),
            _ => Self::In(key, op, SetRef::Anonymous(Arc::new(set))),
        }
    }
}

impl Selector {
    /// The type of what it looks at.
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
    /// The burst that nft takes and prints as its default.
    pub const DEFAULT_BURST: u32 = 5;
}

impl Verdict {
    /// The chain it leads to.
    pub const fn target(&self) -> Option<&ChainName> {
        match self {
            Self::Jump(chain) | Self::Goto(chain) => Some(chain),
            Self::Accept | Self::Drop | Self::Continue | Self::Return => None,
        }
    }
}

impl SetRef {
    /// The name, unless the set belongs to its rule.
    pub const fn name(&self) -> Option<&SetName> {
        match self {
            Self::Named(name) => Some(name),
            Self::Anonymous(_) => None,
        }
    }
}

impl Statement {
    /// The key and the set this statement looks up, if it does.
    pub fn lookup(&self) -> Option<(&[Selector], &SetRef)> {
        match self {
            Self::Match(Match::In(key, _, set)) | Self::Vmap(key, set) => Some((key, set)),
            Self::Nat(Nat { to: NatTarget::Map { key, map: set, .. }, .. }) => Some((key, set)),
            _ => None,
        }
    }
}
