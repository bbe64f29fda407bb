//! Compiles one rule of a policy to nftables rules of one family.
//!
//! A rule has several conditions, some of which can be met in more than one way: an address is in
//! the hash set or the interval set of a selector; a port is listed or in a named port set.
//! [`super::demands`] combines them.

use std::sync::Arc;

use ipnet::IpNet;
use margay_api::policy::PolicyKey;
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_api::settings::{self, FelixSettings, LogRate, TimeUnit};
use margay_calc::model::{RuleRecord, SetId, SideMatch};

use super::demands::{Compiled, Demands, Tests};
use super::elements::{self, Shape};
use super::names::{self, Holds};
use super::stage::Stage;
use margay_nft::{
    CmpOp, Datum, Family, Field, Key, Limit, Log, LogTarget, Match, Proto, RateUnit, Selector, Set,
    SetKind, SetRef, Side, Statement, Transport, Value, Verdict,
};

/// Protocols whose first four bytes are source and destination port.
const PORTED: [Protocol; 4] = [
    Protocol::TCP,
    Protocol::UDP,
    Protocol::UDPLITE,
    Protocol::SCTP,
];
/// Syslog severity of logged packets: notice, as in Calico.
const LOG_LEVEL: u8 = 5;
/// Longest log prefix (`NF_LOG_PREFIXLEN` - 1 in `linux/netfilter/nf_log.h`).
const LOG_PREFIX_MAX: usize = 127;

/// Context of the compilation.
pub(super) struct Context<'a> {
    /// Family of the chain.
    pub(super) family: Family,
    /// Shape of a set, if the set exists.
    pub(super) shape: &'a dyn Fn(&SetId) -> Option<Shape>,
    /// Settings of Log rules.
    pub(super) logging: &'a Logging,
    /// Stage, which defines what Allow does.
    pub(super) stage: Stage,
}

/// Settings of rules with action Log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Logging {
    /// Template of the log prefix.
    pub(super) prefix: String,
    /// Rate limit per rule.
    pub(super) limit: Option<Limit>,
}

/// Policy of a rule, as named in its log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin<'a> {
    /// Tier of the policy.
    pub(super) tier: &'a str,
    /// The policy.
    pub(super) policy: &'a PolicyKey,
}

impl Logging {
    /// Extracts the log settings.
    pub(super) fn of(settings: &FelixSettings) -> Self {
        let limit = |rate: LogRate| Limit {
            rate: rate.count.into(),
            unit: match rate.unit {
                TimeUnit::Second => RateUnit::Second,
                TimeUnit::Minute => RateUnit::Minute,
                TimeUnit::Hour => RateUnit::Hour,
                TimeUnit::Day => RateUnit::Day,
            },
            burst: settings.log_burst.into(),
            over: false,
        };
        Self {
            prefix: settings.log_prefix.clone(),
            limit: settings.log_rate.map(limit),
        }
    }

    /// Expands the log prefix: characters that the kernel does not accept are removed, and what is
    /// too long is cut.
    pub(super) fn prefix(&self, origin: Origin<'_>) -> String {
        const END: &str = ": ";
        let printable = |c: &char| c.is_ascii() && !c.is_ascii_control() && *c != '"' && *c != '\\';
        let text = settings::log_prefix(&self.prefix, origin.tier, origin.policy);
        let mut kept: String = text
            .chars()
            .filter(printable)
            .take(LOG_PREFIX_MAX - END.len())
            .collect();
        kept += END;
        kept
    }

    /// Statements that log a packet.
    fn statements(&self, origin: Origin<'_>) -> Vec<Statement> {
        let log = Log {
            prefix: self.prefix(origin),
            target: LogTarget::Syslog(LOG_LEVEL),
        };
        self.limit
            .map(Statement::Limit)
            .into_iter()
            .chain([Statement::Log(log)])
            .collect()
    }
}

/// Whether a rule can match packets of the family.
#[derive(Debug, PartialEq, Eq)]
enum Applicability {
    /// Packets of the family can match.
    Possible,
    /// No packet of the family can match.
    Impossible,
    /// A set is missing, so it is unknown which packets match.
    Unknown,
}

impl Context<'_> {
    /// Compiles a rule with its action.
    pub(super) fn decide(&self, rule: &RuleRecord) -> Compiled {
        self.compile(rule, None, self.decision(rule.action))
    }

    /// Compiles a rule with its action that also requires that one side's address, with protocol
    /// and destination port, is in a set.
    pub(super) fn decide_crossed(&self, rule: &RuleRecord, side: Side, set: &SetId) -> Compiled {
        self.compile(rule, Some((side, set)), self.decision(rule.action))
    }

    /// Statements of an action; Log lets the packet continue.
    fn decision(&self, action: Action) -> Vec<Statement> {
        vec![Statement::Verdict(match action {
            Action::Allow => return self.stage.grant(),
            Action::Deny => Verdict::Drop,
            Action::Pass => Verdict::Return,
            Action::Log => Verdict::Continue,
        })]
    }

    /// Compiles a rule to statements that log its packets.
    pub(super) fn report(&self, rule: &RuleRecord, origin: Origin<'_>) -> Compiled {
        self.compile(rule, None, self.logging.statements(origin))
    }

    /// Compiles a rule; empty if no packet of the family can match. Packets that would have to be
    /// looked up in a missing set are dropped.
    fn compile(
        &self,
        rule: &RuleRecord,
        crossed: Option<(Side, &SetId)>,
        statements: Vec<Statement>,
    ) -> Compiled {
        let mut demands = Demands::new(rule.action == Action::Log);
        let mut applicability = self.add_demands(rule, &mut demands);
        if let (Applicability::Possible, Some((side, set))) = (&applicability, crossed) {
            let key = vec![
                address(self.family, side),
                Selector::L4proto,
                port(Side::Destination),
            ];
            match (self.shape)(set) {
                Some(_) => demands.must(Match::In(
                    key,
                    CmpOp::Eq,
                    SetRef::Named(names::ip_set(set, Holds::Ports, self.family)),
                )),
                None => applicability = Applicability::Unknown,
            }
        }
        let statements = match applicability {
            Applicability::Impossible => return Compiled::default(),
            Applicability::Unknown => vec![Statement::Verdict(Verdict::Drop)],
            Applicability::Possible => statements,
        };
        demands.compile(statements)
    }

    /// Adds the conditions of a rule: header, then source, then destination, so that a missing set
    /// denies no packet that the conditions before it exclude.
    fn add_demands(&self, rule: &RuleRecord, all: &mut Demands) -> Applicability {
        let own = if self.family == Family::Ipv4 {
            IpVersion::V4
        } else {
            IpVersion::V6
        };
        if rule.ip_version.is_some_and(|version| version != own)
            || !add_protocol(rule, all)
            || !add_icmp(rule, own, all)
        {
            return Applicability::Impossible;
        }
        for (which, side) in [
            (Side::Source, &rule.source),
            (Side::Destination, &rule.destination),
        ] {
            if sets_of_side(side).any(|id| (self.shape)(id).is_none()) {
                return Applicability::Unknown;
            }
            if !self.add_ports(rule, side, which, all) || !self.add_addresses(side, which, all) {
                return Applicability::Impossible;
            }
        }
        Applicability::Possible
    }

    /// Adds the port conditions of one side, by number and by named port set.
    fn add_ports(
        &self,
        rule: &RuleRecord,
        side: &SideMatch,
        which: Side,
        all: &mut Demands,
    ) -> bool {
        let ported = rule
            .protocol
            .is_some_and(|protocol| PORTED.contains(&protocol));
        let possible = rule.protocol.is_none() || ported;
        let guard = || if ported { None } else { Some(has_ports()) };
        let port = port(which);
        if !side.ports.is_empty() || !side.port_sets.is_empty() {
            let mut ways = Vec::new();
            if !side.ports.is_empty() {
                ways.push(
                    guard()
                        .into_iter()
                        .chain([ranges(port, CmpOp::Eq, &side.ports)])
                        .collect(),
                );
            }
            for set in side.port_sets.iter() {
                ways.push(
                    guard()
                        .into_iter()
                        .chain([self.in_port_set(set, which, CmpOp::Eq)])
                        .collect(),
                );
            }
            all.any_of(ways);
            if !possible {
                return false;
            }
        }
        if let Some(set) = &side.service_set {
            guard().into_iter().for_each(|test| all.must(test));
            all.must(self.in_port_set(set, which, CmpOp::Eq));
            if !possible {
                return false;
            }
        }
        let mut none: Tests = Vec::new();
        if !side.not_ports.is_empty() {
            none.push(ranges(port, CmpOp::Ne, &side.not_ports));
        }
        for set in &side.not_port_sets {
            none.push(self.in_port_set(set, which, CmpOp::Ne));
        }
        if !none.is_empty() && possible {
            if ported {
                all.any_of(vec![none]);
            } else {
                // A packet without ports matches every negated port.
                let with: Tests = [has_ports()].into_iter().chain(none).collect();
                all.any_of(vec![vec![without_ports()], with]);
            }
        }
        true
    }

    fn in_port_set(&self, id: &SetId, side: Side, op: CmpOp) -> Match {
        let key = vec![address(self.family, side), Selector::L4proto, port(side)];
        Match::In(
            key,
            op,
            SetRef::Named(names::ip_set(id, Holds::Ports, self.family)),
        )
    }

    /// Adds the address conditions of one side, by range and by selector.
    fn add_addresses(&self, side: &SideMatch, which: Side, all: &mut Demands) -> bool {
        let address = address(self.family, which);
        if !side.nets.is_empty() {
            let Some(keys) = self.outermost_ranges(&side.nets) else {
                return false;
            };
            if !keys.iter().any(is_everything) {
                all.must(nets(address, CmpOp::Eq, keys));
            }
        }
        if let Some(keys) = self.outermost_ranges(&side.not_nets) {
            if keys.iter().any(is_everything) {
                return false;
            }
            all.must(nets(address, CmpOp::Ne, keys));
        }
        for id in &side.not_sets {
            self.net_sets(id)
                .into_iter()
                .for_each(|set| all.must(Match::In(vec![address], CmpOp::Ne, set)));
        }
        for id in &side.sets {
            let ways = self
                .net_sets(id)
                .into_iter()
                .map(|set| vec![Match::In(vec![address], CmpOp::Eq, set)]);
            all.any_of(ways.collect());
        }
        true
    }

    /// Kernel sets of a set of addresses.
    fn net_sets(&self, id: &SetId) -> Vec<SetRef> {
        let mut sets = vec![SetRef::Named(names::ip_set(
            id,
            Holds::Addresses,
            self.family,
        ))];
        if (self.shape)(id).is_some_and(|shape| shape.has_ranges(self.family)) {
            sets.push(SetRef::Named(names::ip_set(id, Holds::Ranges, self.family)));
        }
        sets
    }

    /// Outermost ranges of this family; `None` if there are none.
    fn outermost_ranges(&self, nets: &[IpNet]) -> Option<Vec<IpNet>> {
        let mut own: Vec<IpNet> = nets
            .iter()
            .map(IpNet::trunc)
            .filter(|net| elements::family(net.addr()) == self.family)
            .collect();
        own.sort_unstable();
        // Ranges nest or are disjoint, and of those that begin at one address the widest comes
        // first: whatever is inside another range is inside the last one kept.
        own.dedup_by(|inner, outer| outer.contains(&*inner));
        (!own.is_empty()).then_some(own)
    }
}

fn add_protocol(rule: &RuleRecord, all: &mut Demands) -> bool {
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

/// Adds the ICMP conditions, for the family's ICMP version. Packets of other protocols have no type
/// and match every negated one.
fn add_icmp(rule: &RuleRecord, version: IpVersion, all: &mut Demands) -> bool {
    let own = Protocol::icmp_of(version);
    let possible = rule.protocol.is_none_or(|protocol| protocol == own);
    if let Some(icmp) = rule.icmp {
        if !possible {
            return false;
        }
        let (kind, code) = icmp_tests(own, icmp, CmpOp::Eq);
        all.any_of(vec![
            [is_protocol(own)]
                .into_iter()
                .chain(kind)
                .chain(code)
                .collect(),
        ]);
    }
    if let Some(icmp) = rule.not_icmp.filter(|_| possible) {
        let (same_kind, _) = icmp_tests(own, icmp, CmpOp::Eq);
        let (other_kind, other_code) = icmp_tests(own, icmp, CmpOp::Ne);
        let guard = is_protocol(own);
        let mut ways = vec![vec![Match::not(Selector::L4proto, Proto(own.0))]];
        ways.extend(other_kind.map(|test| vec![guard.clone(), test]));
        ways.extend(
            other_code.map(|test| [guard].into_iter().chain(same_kind).chain([test]).collect()),
        );
        all.any_of(ways);
    }
    true
}

fn icmp_tests(protocol: Protocol, icmp: Icmp, op: CmpOp) -> (Option<Match>, Option<Match>) {
    let test = |selector, value: Datum| Match::Is(selector, op, value.into());
    if protocol == Protocol::ICMP {
        let kind = icmp
            .kind
            .map(|kind| test(Selector::IcmpType, Datum::IcmpType(kind)));
        (
            kind,
            icmp.code
                .map(|code| test(Selector::IcmpCode, Datum::IcmpCode(code))),
        )
    } else {
        let kind = icmp
            .kind
            .map(|kind| test(Selector::Icmp6Type, Datum::Icmp6Type(kind)));
        (
            kind,
            icmp.code
                .map(|code| test(Selector::Icmp6Code, Datum::Icmp6Code(code))),
        )
    }
}

/// Sets named by one side of a rule.
pub(super) fn sets_of_side(side: &SideMatch) -> impl Iterator<Item = &SetId> {
    let lists: [&[SetId]; 4] = [
        &side.sets,
        &side.not_sets,
        &side.port_sets,
        &side.not_port_sets,
    ];
    lists.into_iter().flatten().chain(&side.service_set)
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

fn nets(selector: Selector, op: CmpOp, nets: Vec<IpNet>) -> Match {
    members(selector, op, nets.into_iter().map(Field::from).collect())
}

/// Matches ports, merged to ranges that neither overlap nor touch.
fn ranges(selector: Selector, op: CmpOp, ports: &[PortRange]) -> Match {
    let mut sorted = ports.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<PortRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => {
                last.last = last.last.max(range.last)
            }
            _ => merged.push(range),
        }
    }
    members(
        selector,
        op,
        merged
            .into_iter()
            .map(|range| Field::from(range.first..=range.last))
            .collect(),
    )
}

fn members(selector: Selector, op: CmpOp, fields: Vec<Field>) -> Match {
    if let [field] = fields.as_slice() {
        return Match::Is(selector, op, *field);
    }
    let kind = SetKind::of(selector.field_type());
    let kind = if fields.iter().all(Field::is_single) {
        kind
    } else {
        kind.with_intervals()
    };
    let elements = fields
        .into_iter()
        .map(|field| (Key::from(field), Value::Member))
        .collect();
    Match::In(
        vec![selector],
        op,
        SetRef::Anonymous(Arc::new(Set { kind, elements })),
    )
}
