//! Host endpoints: assignment of interfaces, and base chains.
//!
//! Packets on loopback and between the host and its own pods are not subject to host endpoints.
//! Traffic that the node needs comes before every policy, so that a policy that cannot be enforced,
//! and therefore denies, does not cut the node off: neighbour discovery, tunnel packets of nodes,
//! failsafe ports. It does not come before policies of forwarded packets, on which no node depends.
//!
//! A packet that a policy has accepted for good carries a mark bit past the later chains. The first
//! chain on its way clears the bit: a packet that comes out of a tunnel inherits the mark of the
//! outer one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use margay_api::rule::Action;
use margay_api::settings::Failsafe;
use margay_calc::model::{HostEndpointRecord, HostInterfaces};

use super::base::{self, Inputs, Section};
use super::class::Class;
use super::names;
use super::stage::{ACCEPTED, Direction, Stage};
use crate::Links;
use crate::links::is_workload;
use margay_nft::{
    ChainType, CmpOp, Datum, Family, Field, Hook, IfName, Key, MarkSet, Match, Proto, Rule,
    Selector, Set, SetKind, Statement, Transport, Verdict,
};

/// Mark bit: sent by the host to a translated address, so decided where it leaves.
const DEFERRED: u32 = 0x0002_0000;
/// Prefix of all chains and sets of host endpoints.
const PREFIX: &str = "host-";
/// Set of interfaces that have a host endpoint.
const INTERFACES: &str = "host-interfaces";
const LOOPBACK: &str = "lo";
/// ICMPv6 types that a link needs (RFC 4890, section 4.4.1): multicast listeners, routers,
/// neighbours.
const LINK_ICMPV6_TYPES: [u8; 8] = [130, 131, 132, 133, 134, 135, 136, 143];

/// Hooks of host endpoints, in the order in which a packet passes them.
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

/// All hooks, in order.
pub(super) const POINTS: [Point; 7] = [
    Point::UntrackedIn,
    Point::PreDnat,
    Point::ForwardIn,
    Point::In,
    Point::ForwardOut,
    Point::UntrackedOut,
    Point::Out,
];

/// Entry points of a host endpoint's classes by hook, for IPv4 and IPv6.
pub(super) type Entries = BTreeMap<Point, [Verdict; 2]>;

/// Assignment of interfaces to host endpoints.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Assignments<'a> {
    /// Interfaces with an endpoint of their own.
    interfaces: BTreeMap<IfName, &'a str>,
    /// Endpoint of all other interfaces.
    others: Option<&'a str>,
    /// Endpoints without an interface, with the reason.
    pub(super) unassigned: BTreeMap<&'a str, String>,
}

/// Whether a chain or set belongs to host endpoints.
pub(super) fn is_host(name: &str) -> bool {
    name.starts_with(PREFIX)
}

impl Point {
    /// Class of an endpoint at this hook.
    pub(super) fn class(self, endpoint: &HostEndpointRecord) -> Class {
        let (stage, tiers, unmatched) = match self {
            Self::UntrackedIn | Self::UntrackedOut => {
                (Stage::Untracked, &endpoint.untracked, Action::Pass)
            }
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

    /// Field that selects the endpoint.
    const fn interface(self) -> Selector {
        match self.direction() {
            Direction::Ingress => Selector::Iifname,
            Direction::Egress => Selector::Oifname,
        }
    }

    /// Name of the base chain and of its map.
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

    /// netfilter hook and priority. Connections are tracked from -200 on, destinations translated
    /// at -100 (`linux/netfilter_ipv4.h`, `NF_IP_PRI_*`).
    const fn hook(self) -> (Hook, i32) {
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

/// Assigns interfaces: to the first endpoint by name that names the interface or one of its
/// addresses, else to the first one for all interfaces.
pub(super) fn assign_interfaces<'a>(
    endpoints: impl Iterator<Item = (&'a String, &'a HostInterfaces)> + Clone,
    links: &Links,
) -> Assignments<'a> {
    let mut assignments = Assignments::default();
    for (name, interfaces) in endpoints {
        let candidates: Vec<&String> = match interfaces {
            HostInterfaces::All => {
                match assignments.others {
                    Some(first) => drop(
                        assignments
                            .unassigned
                            .insert(name, duplicate_reason("every interface", first)),
                    ),
                    None => assignments.others = Some(name),
                }
                continue;
            }
            HostInterfaces::Named(interface) => vec![interface],
            HostInterfaces::WithAddress(wanted) => {
                let has_one = |addresses: &BTreeSet<IpAddr>| !addresses.is_disjoint(wanted);
                links
                    .iter()
                    .filter(|(_, addresses)| has_one(addresses))
                    .map(|(interface, _)| interface)
                    .collect()
            }
        };
        let mut reason = Some(
            "spec.expectedIPs: no interface of this node has one of these addresses; it is \
             enforced once one has"
                .to_owned(),
        );
        for interface in candidates {
            let Some(known) = IfName::new(interface).filter(|_| can_have_endpoint(interface))
            else {
                reason = Some(format!(
                    "interface {interface}: a host endpoint cannot apply to lo or cali*; name an \
                     interface that leads out of the node"
                ));
                continue;
            };
            match assignments.interfaces.get(&known) {
                Some(first) => {
                    reason = Some(duplicate_reason(&format!("interface {interface}"), first))
                }
                None => {
                    assignments.interfaces.insert(known, name);
                    reason = None;
                    continue;
                }
            }
        }
        let has_any = assignments.interfaces.values().any(|owner| *owner == name);
        if let Some(reason) = reason.filter(|_| !has_any) {
            assignments.unassigned.insert(name, reason);
        }
    }
    assignments
}

fn duplicate_reason(what: &str, first: &str) -> String {
    format!(
        "{what} already has host endpoint {first}, which is first by name, and only one is \
         enforced; remove one of them"
    )
}

fn can_have_endpoint(interface: &str) -> bool {
    interface != LOOPBACK && !is_workload(interface)
}

// --- Chains ---

/// Inputs of the base chains.
pub(super) struct Hooks<'a> {
    pub(super) inputs: &'a Inputs,
    pub(super) assignments: &'a Assignments<'a>,
    /// Entry points by name of the endpoint.
    pub(super) entries: &'a BTreeMap<&'a str, Entries>,
    /// Hooks at which some endpoint has a policy, and those of the host's own packets.
    pub(super) points: &'a BTreeSet<Point>,
}

impl Hooks<'_> {
    /// Renders base chains, maps and sets; empty if no host endpoint has an interface.
    pub(super) fn render(&self) -> Section {
        let mut section = Section::default();
        if self.assignments.interfaces.is_empty() && self.assignments.others.is_none() {
            return section;
        }
        for point in self.points {
            self.add_map(*point, &mut section);
            let (hook, priority) = point.hook();
            section.add_chain(
                point.name(),
                base::base_chain(ChainType::Filter, hook, priority),
                self.chain_rules(*point),
            );
        }
        let leave = base::base_chain(ChainType::Filter, Hook::Postrouting, 0);
        section.add_chain("host-leave", leave, self.leave_rules());
        if self.assignments.others.is_none() && !self.inputs.allows_invalid() {
            let keys = self
                .assignments
                .interfaces
                .keys()
                .map(|interface| Key::from(Datum::Iface(*interface)));
            section.add_set(
                &names::set(INTERFACES),
                SetKind::of(margay_nft::FieldType::Iface),
                keys,
            );
        }
        section
    }

    fn add_map(&self, point: Point, section: &mut Section) {
        let mut map = Set::new(base::dispatch_kind());
        for (interface, name) in &self.assignments.interfaces {
            for (family, entry) in Family::ALL.into_iter().zip(self.entry_of(name, point)) {
                map.elements.insert(
                    base::dispatch_key(family, *interface),
                    margay_nft::Value::Verdict(entry),
                );
            }
        }
        section.sets.insert(names::set(point.name()), map);
    }

    fn entry_of(&self, name: &str, point: Point) -> [Verdict; 2] {
        let entry = self
            .entries
            .get(name)
            .and_then(|entries| entries.get(&point));
        entry.cloned().unwrap_or([Verdict::Drop, Verdict::Drop])
    }

    fn chain_rules(&self, point: Point) -> Vec<Rule> {
        let mut rules = Vec::new();
        match point {
            Point::UntrackedIn | Point::UntrackedOut => rules.push(clear_mark()),
            Point::PreDnat => {
                rules.push(if self.has_policy_at(Point::UntrackedIn) {
                    accept_marked()
                } else {
                    clear_mark()
                });
                rules.push(base::accept_tracked());
            }
            Point::ForwardIn | Point::ForwardOut | Point::In => {
                rules.push(base::accept_tracked());
                if self.has_policy_at(Point::UntrackedIn) || self.has_policy_at(Point::PreDnat) {
                    rules.push(accept_marked());
                }
            }
            Point::Out => {
                rules.extend([base::accept_tracked(), mark_deferred()]);
                if self.has_policy_at(Point::UntrackedOut) {
                    rules.push(accept_marked());
                }
            }
        }
        rules.extend(accept_local(point.interface()));
        if !matches!(
            point,
            Point::UntrackedIn | Point::UntrackedOut | Point::PreDnat
        ) {
            rules.extend(self.drop_invalid(point.interface()));
        }
        if !matches!(point, Point::ForwardIn | Point::ForwardOut) {
            rules.extend(self.always_allowed(point));
        }
        rules.extend(self.dispatch_rules(point));
        rules
    }

    /// Rules for packets that the host sends to a Service: only after translation, where they
    /// leave, is their interface known.
    fn leave_rules(&self) -> Vec<Rule> {
        let mut rules = vec![
            Rule::new().when(Match::CtDnat(CmpOp::Ne)).accept(),
            Rule::new()
                .when(Match::MarkBits {
                    mask: DEFERRED,
                    op: CmpOp::Ne,
                    value: DEFERRED,
                })
                .accept(),
            base::accept_tracked(),
        ];
        rules.extend(accept_local(Selector::Oifname));
        rules.extend(self.always_allowed(Point::Out));
        rules.extend(self.dispatch_rules(Point::Out));
        rules
    }

    fn has_policy_at(&self, point: Point) -> bool {
        self.points.contains(&point)
    }

    /// Drops packets in conntrack state INVALID on interfaces with an endpoint, unless configured
    /// otherwise.
    fn drop_invalid(&self, interface: Selector) -> Option<Rule> {
        let rule = match self.assignments.others {
            Some(_) => Rule::new(),
            None => Rule::new().when(Match::in_set(interface, &names::set(INTERFACES))),
        };
        (!self.inputs.allows_invalid()).then(|| {
            rule.when(Match::CtState(CmpOp::Eq, margay_nft::CtState::INVALID))
                .counter()
                .drop()
        })
    }

    /// Accepts the traffic that no policy can deny.
    fn always_allowed(&self, point: Point) -> Vec<Rule> {
        let peer: fn(Family) -> Selector = match point.direction() {
            Direction::Ingress => base::source,
            Direction::Egress => base::destination,
        };
        let kinds = LINK_ICMPV6_TYPES.map(|kind| Key::from(Datum::Icmp6Type(kind)));
        let mut rules = vec![
            Rule::new()
                .when(Match::any_of(Selector::Icmp6Type, kinds))
                .accept(),
        ];
        for packets in self.inputs.tunnel_packets() {
            let of_node = |family| Match::in_set(peer(family), &base::nodes_set(family));
            rules.extend(Family::ALL.map(|family| {
                Rule::new()
                    .when(packets.clone())
                    .when(of_node(family))
                    .accept()
            }));
        }
        let (inbound, outbound) = self.inputs.failsafes();
        let (asked, answered) = match point.direction() {
            Direction::Ingress => (inbound, outbound),
            Direction::Egress => (outbound, inbound),
        };
        rules.extend(failsafe_rules(asked, Selector::Dport(Transport::Any), peer));
        if matches!(point, Point::UntrackedIn | Point::UntrackedOut) {
            // Replies cannot be recognised by their connection yet: connection tracking comes
            // later.
            rules.extend(failsafe_rules(
                answered,
                Selector::Sport(Transport::Any),
                peer,
            ));
        }
        rules
    }

    /// Sends packets to the class of the interface's endpoint, or of that of all other interfaces.
    fn dispatch_rules(&self, point: Point) -> Vec<Rule> {
        let key = vec![Selector::Nfproto, point.interface()];
        let mut rules = vec![Rule::new().vmap(key, &names::set(point.name()))];
        if let Some(name) = self.assignments.others {
            let entries = Family::ALL.into_iter().zip(self.entry_of(name, point));
            let of = |family: Family| {
                Rule::new().when(Match::is(Selector::Nfproto, Field::from(family)))
            };
            rules.extend(entries.map(|(family, entry)| of(family).verdict(entry)));
        }
        rules
    }
}

/// Accepts packets on loopback and on pods' interfaces.
fn accept_local(interface: Selector) -> [Rule; 2] {
    let loopback = IfName::new(LOOPBACK).expect("a constant name");
    [
        Rule::new().when(Match::is(interface, loopback)).accept(),
        Rule::new()
            .when(Match::NamePrefix(
                interface,
                CmpOp::Eq,
                names::workload_prefix(),
            ))
            .accept(),
    ]
}

fn clear_mark() -> Rule {
    Rule::new().then(Statement::MarkSet(MarkSet {
        mask: ACCEPTED,
        value: 0,
    }))
}

fn accept_marked() -> Rule {
    Rule::new()
        .when(Match::MarkBits {
            mask: ACCEPTED,
            op: CmpOp::Eq,
            value: ACCEPTED,
        })
        .accept()
}

fn mark_deferred() -> Rule {
    let mark = Statement::MarkSet(MarkSet {
        mask: DEFERRED,
        value: DEFERRED,
    });
    Rule::new()
        .when(Match::CtDnat(CmpOp::Eq))
        .then(mark)
        .accept()
}

/// Accepts failsafe ports, with one rule per network of the peer.
fn failsafe_rules(
    failsafes: &[Failsafe],
    port: Selector,
    peer: fn(Family) -> Selector,
) -> Vec<Rule> {
    let mut by_net: BTreeMap<Option<IpNet>, BTreeSet<Key>> = BTreeMap::new();
    for failsafe in failsafes {
        let key = [
            Field::from(Proto(failsafe.protocol.0)),
            Field::from(Datum::Port(failsafe.port)),
        ];
        by_net
            .entry(failsafe.net)
            .or_default()
            .insert(Key::from(key));
    }
    let rule = |(net, ports): (Option<IpNet>, BTreeSet<Key>)| {
        let rule = net.into_iter().fold(Rule::new(), |rule, net| {
            let family = super::elements::family(net.addr());
            rule.when(match net.prefix_len() {
                0 => Match::is(Selector::Nfproto, Field::from(family)),
                _ => Match::is(peer(family), net.trunc()),
            })
        });
        rule.when(Match::any_of(vec![Selector::L4proto, port], ports))
            .accept()
    };
    by_net.into_iter().map(rule).collect()
}
