//! Host endpoints: which interfaces each stands for, and the base chains in which packets meet them.
//!
//! Packets of the loopback interface and between the host and its own pods are nobody's business here. What the node cannot live without stands
//! before every policy, so that a policy that cannot be enforced, and denies therefore, does not cut the node off: neighbours, tunnel packets of
//! nodes, failsafe ports. Before policies of forwarded packets nothing of it stands, as no node lives by those.
//!
//! A packet that a policy has accepted for good carries a bit of its mark past the later chains. The first chain on a way clears it: a packet
//! that comes out of a tunnel has the mark of the one around it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::rule::Action;
use margay_api::settings::Failsafe;
use margay_calc::model::{HostEndpointRecord, HostInterfaces};

use super::base::{self, Fixed, Inputs};
use super::class::Class;
use super::names;
use super::stage::{ACCEPTED, Direction, Stage};
use crate::Links;
use crate::links::is_workload;
use margay_nft::{
    ChainType, CmpOp, Datum, Family, Field, Hook, IfName, Key, MarkSet, Match, Proto, Rule, Selector, Set, SetKind,
    Statement, Transport, Verdict,
};

/// Bit of the mark: sent by the host to an address that was translated, so judged where it leaves.
const DEFERRED: u32 = 0x0002_0000;
/// What every name of a chain or set here begins with.
const PREFIX: &str = "host-";
/// Set of interfaces that have a host endpoint.
const INTERFACES: &str = "host-interfaces";
const LOOPBACK: &str = "lo";
/// ICMPv6 without which a link carries nothing: who listens to which group, routers, neighbours.
const NEIGHBOURS: [u8; 8] = [130, 131, 132, 133, 134, 135, 136, 143];

/// Where packets meet host endpoints, in the order of a packet's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Point {
    UntrackedIn,
    PreDnat,
    ForwardIn,
    In,
    ForwardOut,
    UntrackedOut,
    Out,
}

/// Every point, in order.
pub(super) const POINTS: [Point; 7] = [
    Point::UntrackedIn,
    Point::PreDnat,
    Point::ForwardIn,
    Point::In,
    Point::ForwardOut,
    Point::UntrackedOut,
    Point::Out,
];

/// By point, where the packets of a host endpoint go, for IPv4 and IPv6.
pub(super) type Entries = BTreeMap<Point, [Verdict; 2]>;

/// Which host endpoint has which interface.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Claims<'a> {
    /// Those that have an endpoint of their own.
    interfaces: BTreeMap<IfName, &'a str>,
    /// The endpoint of all others.
    others: Option<&'a str>,
    /// Endpoints that have none, and why.
    pub(super) idle: BTreeMap<&'a str, String>,
}

/// Whether a name is of a chain or set of this part.
pub(super) fn is_host(name: &str) -> bool {
    name.starts_with(PREFIX)
}

impl Point {
    /// The class of an endpoint here.
    pub(super) fn class(self, endpoint: &HostEndpointRecord) -> Class {
        let (stage, tiers, unmatched) = match self {
            Self::UntrackedIn | Self::UntrackedOut => (Stage::Untracked, &endpoint.untracked, Action::Pass),
            Self::PreDnat => (Stage::PreDnat, &endpoint.pre_dnat, Action::Pass),
            Self::ForwardIn | Self::ForwardOut => (Stage::Host, &endpoint.forward, Action::Allow),
            Self::In | Self::Out => (Stage::Host, &endpoint.normal, endpoint.unmatched),
        };
        Class::new(stage, self.direction(), tiers, unmatched)
    }

    const fn direction(self) -> Direction {
        match self {
            Self::UntrackedIn | Self::PreDnat | Self::ForwardIn | Self::In => Direction::Ingress,
            Self::ForwardOut | Self::UntrackedOut | Self::Out => Direction::Egress,
        }
    }

    /// The field by which a packet belongs to an endpoint.
    const fn interface(self) -> Selector {
        match self.direction() {
            Direction::Ingress => Selector::Iifname,
            Direction::Egress => Selector::Oifname,
        }
    }

    /// Name of the base chain, and of the map that it looks into.
    const fn name(self) -> &'static str {
        match self {
            Self::UntrackedIn => "host-untracked-in",
            Self::PreDnat => "host-pre-dnat",
            Self::ForwardIn => "host-forward-in",
            Self::In => "host-in",
            Self::ForwardOut => "host-forward-out",
            Self::UntrackedOut => "host-untracked-out",
            Self::Out => "host-out",
        }
    }

    /// Hook and priority. Connections are known from -200 on, and destinations translated at -100.
    const fn place(self) -> (Hook, i32) {
        match self {
            Self::UntrackedIn => (Hook::Prerouting, -299),
            Self::PreDnat => (Hook::Prerouting, -150),
            Self::ForwardIn => (Hook::Forward, -1),
            Self::In => (Hook::Input, 2),
            Self::ForwardOut => (Hook::Forward, 2),
            Self::UntrackedOut => (Hook::Output, -300),
            Self::Out => (Hook::Output, 0),
        }
    }
}

// --- Interfaces ---

/// Who has which interface: the first by name of those that name it or one of its addresses, else the first of those for all interfaces.
pub(super) fn claims<'a>(
    endpoints: impl Iterator<Item = (&'a String, &'a HostInterfaces)> + Clone,
    links: &Links,
) -> Claims<'a> {
    let mut claims = Claims::default();
    for (name, interfaces) in endpoints {
        let claimed: Vec<&String> = match interfaces {
            HostInterfaces::All => {
                match claims.others {
                    Some(first) => drop(claims.idle.insert(name, taken("every interface", first))),
                    None => claims.others = Some(name),
                }
                continue;
            }
            HostInterfaces::Named(interface) => vec![interface],
            HostInterfaces::WithAddress(wanted) => {
                let has_one = |addresses: &BTreeSet<IpAddr>| !addresses.is_disjoint(wanted);
                links.iter().filter(|(_, addresses)| has_one(addresses)).map(|(interface, _)| interface).collect()
            }
        };
        let mut reason =
            Some("no interface of the node has one of spec.expectedIPs: it is enforced once one has".to_owned());
        for interface in claimed {
            let Some(known) = IfName::new(interface).filter(|_| may_have_one(interface)) else {
                reason = Some(format!(
                    "interface {interface}: a host endpoint is for interfaces that lead out of the node, not for lo or cali*"
                ));
                continue;
            };
            match claims.interfaces.get(&known) {
                Some(first) => reason = Some(taken(&format!("interface {interface}"), first)),
                None => {
                    claims.interfaces.insert(known, name);
                    reason = None;
                    continue;
                }
            }
        }
        let has_any = claims.interfaces.values().any(|owner| *owner == name);
        if let Some(reason) = reason.filter(|_| !has_any) {
            claims.idle.insert(name, reason);
        }
    }
    claims
}

fn taken(what: &str, first: &str) -> String {
    format!("{what} has host endpoint {first}, which comes first by name: only one is enforced, so remove one")
}

fn may_have_one(interface: &str) -> bool {
    interface != LOOPBACK && !is_workload(interface)
}

// --- Chains ---

/// What the base chains depend on.
pub(super) struct Hooks<'a> {
    pub(super) inputs: &'a Inputs,
    pub(super) claims: &'a Claims<'a>,
    /// By name of the endpoint.
    pub(super) entries: &'a BTreeMap<&'a str, Entries>,
    /// Points at which some endpoint has a policy, and those of the host's own packets.
    pub(super) points: &'a BTreeSet<Point>,
}

impl Hooks<'_> {
    /// The base chains, maps and sets; nothing where no host endpoint has an interface.
    pub(super) fn render(&self) -> Fixed {
        let mut fixed = Fixed::default();
        if self.claims.interfaces.is_empty() && self.claims.others.is_none() {
            return fixed;
        }
        for point in self.points {
            self.map(*point, &mut fixed);
            let (hook, priority) = point.place();
            fixed.chain(point.name(), base::base(ChainType::Filter, hook, priority), self.rules(*point));
        }
        let leave = base::base(ChainType::Filter, Hook::Postrouting, 0);
        fixed.chain("host-leave", leave, self.leave());
        if self.claims.others.is_none() && !self.inputs.allows_invalid() {
            let keys = self.claims.interfaces.keys().map(|interface| Key::from(Datum::Iface(*interface)));
            fixed.set(&names::set(INTERFACES), SetKind::of(margay_nft::FieldType::Iface), keys);
        }
        fixed
    }

    fn map(&self, point: Point, fixed: &mut Fixed) {
        let mut map = Set::new(base::dispatch_kind());
        for (interface, name) in &self.claims.interfaces {
            for (family, entry) in Family::ALL.into_iter().zip(self.entry(name, point)) {
                map.elements.insert(base::dispatch_key(family, *interface), margay_nft::Value::Verdict(entry));
            }
        }
        fixed.sets.insert(names::set(point.name()), map);
    }

    fn entry(&self, name: &str, point: Point) -> [Verdict; 2] {
        let entry = self.entries.get(name).and_then(|entries| entries.get(&point));
        entry.cloned().unwrap_or([Verdict::Drop, Verdict::Drop])
    }

    fn rules(&self, point: Point) -> Vec<Rule> {
        let mut rules = Vec::new();
        match point {
            Point::UntrackedIn | Point::UntrackedOut => rules.push(clear_mark()),
            Point::PreDnat => {
                rules.push(if self.has(Point::UntrackedIn) { accepted() } else { clear_mark() });
                rules.push(base::tracked());
            }
            Point::ForwardIn | Point::ForwardOut | Point::In => {
                rules.push(base::tracked());
                if self.has(Point::UntrackedIn) || self.has(Point::PreDnat) {
                    rules.push(accepted());
                }
            }
            Point::Out => {
                rules.extend([base::tracked(), defer()]);
                if self.has(Point::UntrackedOut) {
                    rules.push(accepted());
                }
            }
        }
        rules.extend(not_outside(point.interface()));
        if !matches!(point, Point::UntrackedIn | Point::UntrackedOut | Point::PreDnat) {
            rules.extend(self.invalid(point.interface()));
        }
        if !matches!(point, Point::ForwardIn | Point::ForwardOut) {
            rules.extend(self.lifelines(point));
        }
        rules.extend(self.dispatch(point));
        rules
    }

    /// What the host sends to a Service has its interface only here, where it leaves.
    fn leave(&self) -> Vec<Rule> {
        let mut rules = vec![
            Rule::new().when(Match::CtDnat(CmpOp::Ne)).accept(),
            Rule::new().when(Match::MarkBits { mask: DEFERRED, op: CmpOp::Ne, value: DEFERRED }).accept(),
            base::tracked(),
        ];
        rules.extend(not_outside(Selector::Oifname));
        rules.extend(self.lifelines(Point::Out));
        rules.extend(self.dispatch(Point::Out));
        rules
    }

    fn has(&self, point: Point) -> bool {
        self.points.contains(&point)
    }

    /// Drops packets of no connection at interfaces that have an endpoint, unless configured otherwise.
    fn invalid(&self, interface: Selector) -> Option<Rule> {
        let rule = match self.claims.others {
            Some(_) => Rule::new(),
            None => Rule::new().when(Match::in_set(interface, &names::set(INTERFACES))),
        };
        (!self.inputs.allows_invalid())
            .then(|| rule.when(Match::CtState(CmpOp::Eq, margay_nft::CtState::INVALID)).counter().drop())
    }

    /// What no policy has a say about.
    fn lifelines(&self, point: Point) -> Vec<Rule> {
        let peer: fn(Family) -> Selector = match point.direction() {
            Direction::Ingress => base::source,
            Direction::Egress => base::destination,
        };
        let kinds = NEIGHBOURS.map(|kind| Key::from(Datum::Icmp6Type(kind)));
        let mut rules = vec![Rule::new().when(Match::any_of(Selector::Icmp6Type, kinds)).accept()];
        if let Some(port) = self.inputs.tunnel_port() {
            let port = Match::is(Selector::Dport(Transport::Udp), Datum::Port(port));
            let from_node = |family| Match::in_set(peer(family), &base::nodes(family));
            rules.extend(Family::ALL.map(|family| Rule::new().when(port.clone()).when(from_node(family)).accept()));
        }
        let (inbound, outbound) = self.inputs.failsafes();
        let (asked, answered) = match point.direction() {
            Direction::Ingress => (inbound, outbound),
            Direction::Egress => (outbound, inbound),
        };
        rules.extend(failsafes(asked, Selector::Dport(Transport::Any), peer));
        if matches!(point, Point::UntrackedIn | Point::UntrackedOut) {
            // Nobody knows yet which packets answer.
            rules.extend(failsafes(answered, Selector::Sport(Transport::Any), peer));
        }
        rules
    }

    /// To the endpoint of the interface, or to that of all others.
    fn dispatch(&self, point: Point) -> Vec<Rule> {
        let key = vec![Selector::Nfproto, point.interface()];
        let mut rules = vec![Rule::new().vmap(key, &names::set(point.name()))];
        if let Some(name) = self.claims.others {
            let entries = Family::ALL.into_iter().zip(self.entry(name, point));
            let of = |family: Family| Rule::new().when(Match::is(Selector::Nfproto, Field::from(family)));
            rules.extend(entries.map(|(family, entry)| of(family).verdict(entry)));
        }
        rules
    }
}

/// Lets by what is no packet of the outside.
fn not_outside(interface: Selector) -> [Rule; 2] {
    let loopback = IfName::new(LOOPBACK).expect("a constant name");
    [
        Rule::new().when(Match::is(interface, loopback)).accept(),
        Rule::new().when(Match::NamePrefix(interface, CmpOp::Eq, names::workload_prefix())).accept(),
    ]
}

fn clear_mark() -> Rule {
    Rule::new().then(Statement::MarkSet(MarkSet { mask: ACCEPTED, value: 0 }))
}

fn accepted() -> Rule {
    Rule::new().when(Match::MarkBits { mask: ACCEPTED, op: CmpOp::Eq, value: ACCEPTED }).accept()
}

fn defer() -> Rule {
    let mark = Statement::MarkSet(MarkSet { mask: DEFERRED, value: DEFERRED });
    Rule::new().when(Match::CtDnat(CmpOp::Eq)).then(mark).accept()
}

/// Accepts these ports, a rule for each range of the other side.
fn failsafes(failsafes: &[Failsafe], port: Selector, peer: fn(Family) -> Selector) -> Vec<Rule> {
    let mut by_net: BTreeMap<Option<IpNet>, BTreeSet<Key>> = BTreeMap::new();
    for failsafe in failsafes {
        let key = [Field::from(Proto(failsafe.protocol.0)), Field::from(Datum::Port(failsafe.port))];
        by_net.entry(failsafe.net).or_default().insert(Key::from(key));
    }
    let rule = |(net, ports): (Option<IpNet>, BTreeSet<Key>)| {
        let rule = net.into_iter().fold(Rule::new(), |rule, net| {
            let family = super::elements::family(net.addr());
            rule.when(match net.prefix_len() {
                0 => Match::is(Selector::Nfproto, Field::from(family)),
                _ => Match::is(peer(family), net.trunc()),
            })
        });
        rule.when(Match::any_of(vec![Selector::L4proto, port], ports)).accept()
    };
    by_net.into_iter().map(rule).collect()
}
