//! Simulates what the kernel does with a packet, given a ruleset: tests compare the compiler with
//! the reference evaluator.
//!
//! Covers what the compiler emits; anything else panics.

use std::net::IpAddr;

use margay_nft::{
    AddressType, Chain, ChainPolicy, CmpOp, CtState, Datum, Family, Field, Hook, IfName, Key,
    Match, Proto, Rule, Ruleset, Selector, Set, SetRef, Side, Statement, Value, Verdict,
};

/// A packet at a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Input interface; `None` for packets of the host.
    pub input: Option<IfName>,
    /// Output interface; `None` before routing and for packets to the host.
    pub output: Option<IfName>,
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the source's family.
    pub destination: IpAddr,
    /// Transport protocol.
    pub protocol: u8,
    /// Source and destination port, for protocols with ports.
    pub ports: Option<(u16, u16)>,
    /// ICMP type and code.
    pub icmp: Option<(u8, u8)>,
    /// State of the connection.
    pub state: CtState,
    /// Whether the source address is one of the host's.
    pub from_host: bool,
    /// Packet mark.
    pub mark: u32,
    /// Whether the connection's destination is translated.
    pub translated: bool,
}

/// Result of a packet's way through a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fate {
    /// Whether it passed every chain of the hook.
    pub passed: bool,
    /// Prefixes of the log lines that it caused.
    pub logged: Vec<String>,
    /// Whether it was masqueraded.
    pub masqueraded: bool,
    /// Mark after the hook.
    pub mark: u32,
    /// Whether it was exempted from connection tracking.
    pub untracked: bool,
    /// Number of rules evaluated.
    pub rules: usize,
}

/// Runs a packet through all base chains of a hook, in order of priority.
pub fn run(ruleset: &Ruleset, hook: Hook, packet: &Packet) -> Fate {
    let mut chains: Vec<&Chain> = ruleset
        .chains
        .values()
        .map(AsRef::as_ref)
        .filter(|chain| chain.base.is_some_and(|base| base.hook == hook))
        .collect();
    chains.sort_by_key(|chain| chain.base.map(|base| base.priority));
    let mut fate = Fate {
        passed: true,
        logged: Vec::new(),
        masqueraded: false,
        mark: packet.mark,
        untracked: false,
        rules: 0,
    };
    for chain in chains {
        let end = Machine {
            ruleset,
            packet,
            fate: &mut fate,
        }
        .run_chain(chain);
        let accepted = match end {
            Some(Verdict::Drop) => false,
            Some(Verdict::Accept) => true,
            _ => chain
                .base
                .is_none_or(|base| base.policy == ChainPolicy::Accept),
        };
        if !accepted {
            fate.passed = false;
            return fate;
        }
    }
    fate
}

/// Whether a packet passes the hooks on its way, and its log lines.
pub fn travel(ruleset: &Ruleset, packet: &Packet, way: &[Hook]) -> (bool, Vec<String>) {
    let (mut packet, mut logged) = (packet.clone(), Vec::new());
    for hook in way {
        let there = match hook {
            Hook::Prerouting | Hook::Input => Packet {
                output: None,
                ..packet.clone()
            },
            _ => packet.clone(),
        };
        let fate = run(ruleset, *hook, &there);
        logged.extend(fate.logged);
        if !fate.passed {
            return (false, logged);
        }
        packet.mark = fate.mark;
        if fate.untracked {
            // Packets without a connection are not translated.
            (packet.state, packet.translated) = (CtState::UNTRACKED, false);
        }
    }
    (true, logged)
}

struct Machine<'a> {
    ruleset: &'a Ruleset,
    packet: &'a Packet,
    fate: &'a mut Fate,
}

impl Machine<'_> {
    /// Accept or drop; `None` if the packet returns or reaches the end.
    fn run_chain(&mut self, chain: &Chain) -> Option<Verdict> {
        for rule in &chain.rules {
            self.fate.rules += 1;
            match self.run_rule(rule) {
                Some(Verdict::Jump(target)) => {
                    let called = self.ruleset.chains[&target].clone();
                    if let Some(end) = self.run_chain(&called) {
                        return Some(end);
                    }
                }
                Some(Verdict::Goto(target)) => {
                    let called = self.ruleset.chains[&target].clone();
                    return self.run_chain(&called);
                }
                Some(Verdict::Return) => return None,
                Some(Verdict::Continue) | None => {}
                end => return end,
            }
        }
        None
    }

    fn run_rule(&mut self, rule: &Rule) -> Option<Verdict> {
        for statement in &rule.statements {
            match statement {
                Statement::Match(test) => {
                    if !self.matches(test) {
                        return None;
                    }
                }
                Statement::Verdict(verdict) => return Some(verdict.clone()),
                Statement::Vmap(key, set) => match self.look_up(key, set)? {
                    Some(Value::Verdict(verdict)) => return Some(verdict),
                    _ => return None,
                },
                Statement::Log(log) => self.fate.logged.push(log.prefix.clone()),
                Statement::Masquerade(_) => {
                    self.fate.masqueraded = true;
                    return Some(Verdict::Accept);
                }
                // Packets of a test are so few that no limit is reached.
                Statement::Limit(limit) if limit.over => return None,
                Statement::MarkSet(set) => {
                    self.fate.mark = (self.fate.mark & !set.mask) | set.value
                }
                Statement::Notrack => self.fate.untracked = true,
                Statement::Counter | Statement::Limit(_) => {}
                other => unreachable!("the compiler does not emit {other:?}"),
            }
        }
        None
    }

    fn matches(&self, test: &Match) -> bool {
        let is = |op: &CmpOp, holds: bool| holds == (*op == CmpOp::Eq);
        match test {
            Match::Is(selector, op, field) => self
                .field_value(*selector)
                .is_some_and(|value| is(op, field.contains(value))),
            Match::NamePrefix(selector, op, prefix) => match self.field_value(*selector) {
                Some(Datum::Iface(name)) => is(op, name.as_str().starts_with(prefix.as_str())),
                // The kernel reads a missing interface name as an empty one.
                _ => is(op, false),
            },
            Match::In(key, op, set) => self
                .look_up(key, set)
                .is_some_and(|found| is(op, found.is_some())),
            Match::CtState(op, states) => is(op, states.0 & self.packet.state.0 != 0),
            Match::MarkBits { mask, op, value } => is(op, self.fate.mark & mask == *value),
            Match::CtDnat(op) => is(op, self.packet.translated),
            Match::AddressType(Side::Source, op, AddressType::Local) => {
                is(op, self.packet.from_host)
            }
            other => unreachable!("the compiler does not emit {other:?}"),
        }
    }

    /// `None` if the packet lacks one of the fields, else the lookup's result.
    fn look_up(&self, key: &[Selector], set: &SetRef) -> Option<Option<Value>> {
        let values: Option<Vec<Datum>> = key
            .iter()
            .map(|selector| self.field_value(*selector))
            .collect();
        let values = values?;
        let set: &Set = match set {
            SetRef::Named(name) => &self.ruleset.sets[name],
            SetRef::Anonymous(set) => set,
        };
        let holds = |fields: &[Field]| {
            fields
                .iter()
                .zip(&values)
                .all(|(field, value)| field.contains(*value))
        };
        if !set.kind.interval {
            let key = Key::concat(values.iter().map(|value| Field::from(*value)));
            return Some(set.elements.get(&key).cloned());
        }
        Some(
            set.elements
                .iter()
                .find(|(key, _)| holds(key.fields()))
                .map(|(_, value)| value.clone()),
        )
    }

    fn field_value(&self, selector: Selector) -> Option<Datum> {
        let packet = self.packet;
        let address = if matches!(selector, Selector::Daddr4 | Selector::Daddr6) {
            packet.destination
        } else {
            packet.source
        };
        let (v4, v6) = match address {
            IpAddr::V4(address) => (Some(Datum::Ipv4(address)), None),
            IpAddr::V6(address) => (None, Some(Datum::Ipv6(address))),
        };
        // The encoder tests the protocol before the ICMP type, as the kernel reads the bytes of any
        // packet.
        let icmp = |protocol: u8| {
            let own = if packet.source.is_ipv4() { 1 } else { 58 };
            packet
                .icmp
                .filter(|_| packet.protocol == protocol && protocol == own)
        };
        match selector {
            Selector::Iifname => packet.input.map(Datum::Iface),
            Selector::Oifname => packet.output.map(Datum::Iface),
            Selector::L4proto => Some(Datum::Proto(Proto(packet.protocol))),
            Selector::Nfproto => Some(Datum::Family(if packet.source.is_ipv4() {
                Family::Ipv4
            } else {
                Family::Ipv6
            })),
            Selector::Saddr4 | Selector::Daddr4 => v4,
            Selector::Saddr6 | Selector::Daddr6 => v6,
            Selector::Sport(transport) => {
                ports_of(packet, transport).map(|(source, _)| Datum::Port(source))
            }
            Selector::Dport(transport) => {
                ports_of(packet, transport).map(|(_, destination)| Datum::Port(destination))
            }
            Selector::CtState => Some(Datum::CtState(packet.state)),
            Selector::IcmpType => icmp(1).map(|(kind, _)| Datum::IcmpType(kind)),
            Selector::IcmpCode => icmp(1).map(|(_, code)| Datum::IcmpCode(code)),
            Selector::Icmp6Type => icmp(58).map(|(kind, _)| Datum::Icmp6Type(kind)),
            Selector::Icmp6Code => icmp(58).map(|(_, code)| Datum::Icmp6Code(code)),
            Selector::Mark | Selector::EtherSaddr => {
                unreachable!("the compiler does not look at {selector:?}")
            }
        }
    }
}

/// The ports as a rule reads them. Without a protocol test the kernel reads whatever bytes are
/// there, so the compiler never does that.
fn ports_of(packet: &Packet, transport: margay_nft::Transport) -> Option<(u16, u16)> {
    use margay_nft::Transport;
    let protocol = match transport {
        Transport::Any => return packet.ports.or(Some((0xdead, 0xdead))),
        Transport::Tcp => 6,
        Transport::Udp => 17,
        Transport::UdpLite => 136,
        Transport::Sctp => 132,
    };
    packet.ports.filter(|_| packet.protocol == protocol)
}
