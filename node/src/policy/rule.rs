//! One rule of a policy as nftables rules of one family.
//!
//! A rule demands several things, and some of them in more than one way (an address is in the hash set or in the interval set of a selector; a port
//! is listed or belongs to a named port set). Each way is an alternative of its demand, and every combination of alternatives is one nftables rule.

use std::sync::Arc;

use ipnet::IpNet;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_calc::model::{RuleRecord, SetId, SideMatch};

use super::elements::{self, Shape};
use super::names::{self, Holds};
use crate::nft::{
    Datum, Family, Field, Key, Log, LogTarget, Match, Op, Proto, Rule, Selector, Set, SetKind, SetRef, Side, Statement,
    Transport, Value, Verdict,
};

/// Protocols whose first four bytes are source and destination port.
const PORTED: [Protocol; 4] = [Protocol::TCP, Protocol::UDP, Protocol::UDPLITE, Protocol::SCTP];
/// Syslog severity of logged packets: notice, as Calico's.
const LOG_LEVEL: u8 = 5;
/// The longest prefix that the kernel takes.
const LOG_PREFIX_MAX: usize = 127;

/// All the tests of one nftables rule.
pub(super) type Tests = Vec<Match>;

/// A set that a rule names is not there.
#[derive(Debug)]
pub(super) struct MissingSet(pub(super) SetId);

/// What a rule can be compiled with.
pub(super) struct Context<'a> {
    /// Family of the chain.
    pub(super) family: Family,
    /// Shapes of the sets that are there.
    pub(super) shape: &'a dyn Fn(&SetId) -> Option<Shape>,
    /// Put before reports of Log rules.
    pub(super) log_prefix: &'a str,
}

/// What the rule demands, as a list of demands each with its alternatives.
struct Demands {
    /// Alternatives exclude each other, so that a packet takes one of them only.
    exclusive: bool,
    demands: Vec<Vec<Tests>>,
}

impl Context<'_> {
    /// The nftables rules; none if no packet of the family can match.
    pub(super) fn compile(&self, rule: &RuleRecord) -> Result<Vec<Rule>, MissingSet> {
        let Some(demands) = self.demands(rule)? else { return Ok(Vec::new()) };
        let statement = match rule.action {
            Action::Allow => Statement::Verdict(Verdict::Accept),
            Action::Deny => Statement::Verdict(Verdict::Drop),
            Action::Pass => Statement::Verdict(Verdict::Return),
            Action::Log => Statement::Log(Log { prefix: self.prefix(), target: LogTarget::Syslog(LOG_LEVEL) }),
        };
        let rule = |tests: Tests| tests.into_iter().fold(Rule::new(), Rule::when).then(statement.clone());
        Ok(demands.product().into_iter().map(rule).collect())
    }

    fn prefix(&self) -> String {
        let printable = |c: &char| c.is_ascii() && !c.is_ascii_control() && *c != '"' && *c != '\\';
        let kept: String = self.log_prefix.chars().filter(printable).take(LOG_PREFIX_MAX - 2).collect();
        format!("{kept}: ")
    }

    fn demands(&self, rule: &RuleRecord) -> Result<Option<Demands>, MissingSet> {
        let mut all = Demands { exclusive: rule.action == Action::Log, demands: Vec::new() };
        let version =
            |version| if self.family == Family::Ipv4 { version == IpVersion::V4 } else { version == IpVersion::V6 };
        let possible = rule.ip_version.is_none_or(version)
            && self.protocol(rule, &mut all)
            && self.icmp(rule, &mut all)
            && self.ports(rule, &rule.source, Side::Source, &mut all)?
            && self.ports(rule, &rule.destination, Side::Destination, &mut all)?
            && self.addresses(&rule.source, Side::Source, &mut all)?
            && self.addresses(&rule.destination, Side::Destination, &mut all)?;
        Ok(possible.then_some(all))
    }

    fn protocol(&self, rule: &RuleRecord, all: &mut Demands) -> bool {
        if let Some(protocol) = rule.protocol {
            if rule.not_protocol == Some(protocol) {
                return false;
            }
            all.must(is_protocol(protocol));
        } else if let Some(protocol) = rule.not_protocol {
            all.must(Match::not(Selector::L4proto, Proto(protocol.0)));
        }
        true
    }

    fn icmp(&self, rule: &RuleRecord, all: &mut Demands) -> bool {
        let own = if self.family == Family::Ipv4 { Protocol::ICMP } else { Protocol::ICMPV6 };
        if let Some(icmp) = rule.icmp {
            if rule.protocol.is_some_and(|protocol| protocol != own) {
                return false;
            }
            if rule.protocol.is_none() {
                all.must(is_protocol(own));
            }
            let (kind, code) = self.icmp_tests(icmp, Op::Eq);
            kind.into_iter().chain(code).for_each(|test| all.must(test));
        }
        if let Some(icmp) = rule.not_icmp
            && rule.protocol.is_none_or(|protocol| protocol == own)
        {
            let mut ways = Vec::new();
            if rule.protocol.is_none() {
                ways.push(vec![Match::not(Selector::L4proto, Proto(own.0))]);
            }
            let (same_kind, _) = self.icmp_tests(icmp, Op::Eq);
            let (other_kind, other_code) = self.icmp_tests(icmp, Op::Ne);
            let guard = is_protocol(own);
            ways.extend(other_kind.map(|test| vec![guard.clone(), test]));
            ways.extend(other_code.map(|test| [guard].into_iter().chain(same_kind).chain([test]).collect()));
            all.demands.push(ways);
        }
        true
    }

    fn icmp_tests(&self, icmp: Icmp, op: Op) -> (Option<Match>, Option<Match>) {
        let test = |selector, value: Datum| Match::Is(selector, op, value.into());
        match self.family {
            Family::Ipv4 => (
                icmp.kind.map(|kind| test(Selector::IcmpType, Datum::IcmpType(kind))),
                icmp.code.map(|code| test(Selector::IcmpCode, Datum::IcmpCode(code))),
            ),
            Family::Ipv6 => (
                icmp.kind.map(|kind| test(Selector::Icmp6Type, Datum::Icmp6Type(kind))),
                icmp.code.map(|code| test(Selector::Icmp6Code, Datum::Icmp6Code(code))),
            ),
        }
    }

    /// Ports of one side, by number and by named port set.
    fn ports(&self, rule: &RuleRecord, side: &SideMatch, which: Side, all: &mut Demands) -> Result<bool, MissingSet> {
        let ported = rule.protocol.is_some_and(|protocol| PORTED.contains(&protocol));
        let possible = rule.protocol.is_none() || ported;
        let guard = || if ported { None } else { Some(has_ports()) };
        let port = port(which);
        if !side.ports.is_empty() || !side.port_sets.is_empty() {
            let mut ways = Vec::new();
            if !side.ports.is_empty() {
                ways.push(guard().into_iter().chain([ranges(port, Op::Eq, &side.ports)]).collect());
            }
            for set in &side.port_sets {
                ways.push(guard().into_iter().chain([self.in_port_set(set, which, Op::Eq)?]).collect());
            }
            all.demands.push(ways);
            if !possible {
                return Ok(false);
            }
        }
        if let Some(set) = &side.service_set {
            guard().into_iter().for_each(|test| all.must(test));
            all.must(self.in_port_set(set, which, Op::Eq)?);
            if !possible {
                return Ok(false);
            }
        }
        let mut none: Tests = Vec::new();
        if !side.not_ports.is_empty() {
            none.push(ranges(port, Op::Ne, &side.not_ports));
        }
        for set in &side.not_port_sets {
            none.push(self.in_port_set(set, which, Op::Ne)?);
        }
        if !none.is_empty() && possible {
            if ported {
                all.demands.push(vec![none]);
            } else {
                // A packet without ports has none of them.
                let with: Tests = [has_ports()].into_iter().chain(none).collect();
                all.demands.push(vec![vec![without_ports()], with]);
            }
        }
        Ok(true)
    }

    fn in_port_set(&self, id: &SetId, side: Side, op: Op) -> Result<Match, MissingSet> {
        match (self.shape)(id) {
            Some(Shape::AddressPort) => {
                let key = vec![address(self.family, side), Selector::L4proto, port(side)];
                Ok(Match::In(key, op, SetRef::Named(names::ip_set(id, Holds::Ports, self.family))))
            }
            _ => Err(MissingSet(id.clone())),
        }
    }

    /// Addresses of one side, by range and by selector.
    fn addresses(&self, side: &SideMatch, which: Side, all: &mut Demands) -> Result<bool, MissingSet> {
        let address = address(self.family, which);
        if !side.nets.is_empty() {
            let Some(keys) = self.outermost(&side.nets) else { return Ok(false) };
            if !keys.iter().any(is_everything) {
                all.must(nets(address, Op::Eq, keys));
            }
        }
        if let Some(keys) = self.outermost(&side.not_nets) {
            if keys.iter().any(is_everything) {
                return Ok(false);
            }
            all.must(nets(address, Op::Ne, keys));
        }
        for id in &side.not_sets {
            self.net_sets(id)?.into_iter().for_each(|set| all.must(Match::In(vec![address], Op::Ne, set)));
        }
        for id in &side.sets {
            let ways = self.net_sets(id)?.into_iter().map(|set| vec![Match::In(vec![address], Op::Eq, set)]);
            all.demands.push(ways.collect());
        }
        Ok(true)
    }

    /// The kernel sets of a set of addresses.
    fn net_sets(&self, id: &SetId) -> Result<Vec<SetRef>, MissingSet> {
        let shape =
            (self.shape)(id).filter(|shape| *shape != Shape::AddressPort).ok_or_else(|| MissingSet(id.clone()))?;
        let mut sets = vec![SetRef::Named(names::ip_set(id, Holds::Addresses, self.family))];
        if shape.has_ranges(self.family) {
            sets.push(SetRef::Named(names::ip_set(id, Holds::Ranges, self.family)));
        }
        Ok(sets)
    }

    /// The ranges of this family that are in no other; none if there are none of this family.
    fn outermost(&self, nets: &[IpNet]) -> Option<Vec<IpNet>> {
        let own: Vec<IpNet> =
            nets.iter().map(IpNet::trunc).filter(|net| elements::family(net.addr()) == self.family).collect();
        let mut kept: Vec<IpNet> =
            own.iter().filter(|net| !own.iter().any(|other| other != *net && other.contains(*net))).copied().collect();
        kept.sort_unstable();
        kept.dedup();
        (!kept.is_empty()).then_some(kept)
    }
}

impl Demands {
    fn must(&mut self, test: Match) {
        self.demands.push(vec![vec![test]]);
    }

    /// Every combination of alternatives.
    fn product(self) -> Vec<Tests> {
        let mut combined: Vec<Tests> = vec![Vec::new()];
        for ways in self.demands {
            let ways = if self.exclusive { exclude(ways) } else { ways };
            combined = combined
                .iter()
                .flat_map(|tests| ways.iter().map(|way| tests.iter().chain(way).cloned().collect()))
                .collect();
        }
        combined
    }
}

/// Makes alternatives exclude each other: each demands that the former ones' last test fails. Their other tests are guards that the alternatives share
/// or that exclude each other already.
fn exclude(ways: Vec<Tests>) -> Vec<Tests> {
    let mut before: Vec<Match> = Vec::new();
    let mut exclusive = Vec::new();
    for way in ways {
        let negated = way.last().and_then(negate);
        exclusive.push(way.into_iter().chain(before.iter().cloned()).collect());
        before.extend(negated);
    }
    exclusive
}

/// The opposite of a test, for those that are alternatives of one demand.
fn negate(test: &Match) -> Option<Match> {
    let flip = |op: &Op| if *op == Op::Eq { Op::Ne } else { Op::Eq };
    match test {
        Match::In(key, op, set) => Some(Match::In(key.clone(), flip(op), set.clone())),
        Match::Is(selector, op, field) => Some(Match::Is(*selector, flip(op), *field)),
        _ => None,
    }
}

fn is_protocol(protocol: Protocol) -> Match {
    Match::is(Selector::L4proto, Proto(protocol.0))
}

fn has_ports() -> Match {
    Match::any_of(Selector::L4proto, PORTED.map(|protocol| Proto(protocol.0)))
}

fn without_ports() -> Match {
    Match::none_of(Selector::L4proto, PORTED.map(|protocol| Proto(protocol.0)))
}

const fn address(family: Family, side: Side) -> Selector {
    match (family, side) {
        (Family::Ipv4, Side::Source) => Selector::Saddr4,
        (Family::Ipv4, Side::Destination) => Selector::Daddr4,
        (Family::Ipv6, Side::Source) => Selector::Saddr6,
        (Family::Ipv6, Side::Destination) => Selector::Daddr6,
    }
}

const fn port(side: Side) -> Selector {
    match side {
        Side::Source => Selector::Sport(Transport::Any),
        Side::Destination => Selector::Dport(Transport::Any),
    }
}

fn is_everything(net: &IpNet) -> bool {
    net.prefix_len() == 0
}

fn nets(selector: Selector, op: Op, nets: Vec<IpNet>) -> Match {
    members(selector, op, nets.into_iter().map(Field::from).collect())
}

/// Ports as ranges that neither overlap nor touch.
fn ranges(selector: Selector, op: Op, ports: &[PortRange]) -> Match {
    let mut sorted = ports.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<PortRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => last.last = last.last.max(range.last),
            _ => merged.push(range),
        }
    }
    members(selector, op, merged.into_iter().map(|range| Field::from(range.first..=range.last)).collect())
}

fn members(selector: Selector, op: Op, fields: Vec<Field>) -> Match {
    if let [field] = fields.as_slice() {
        return Match::Is(selector, op, *field);
    }
    let kind = SetKind::of(selector.field_type());
    let kind = if fields.iter().all(Field::is_single) { kind } else { kind.with_intervals() };
    let elements = fields.into_iter().map(|field| (Key::from(field), Value::Member)).collect();
    Match::In(vec![selector], op, SetRef::Anonymous(Arc::new(Set { kind, elements })))
}
