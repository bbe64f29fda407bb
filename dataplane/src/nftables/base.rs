//! The base part of the table: base chains for pods, and the sets that pools, nodes and settings
//! fill.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use margay_api::network::TunnelKind;
use margay_api::settings::{EndpointToHostAction, Failsafe, FelixSettings};
use margay_calc::model::{Record, RecordId, globals};

use super::elements;
use super::names;
use super::rule::Logging;
use crate::Links;
use crate::links::ipvs_services;
use crate::routes::tunnel::has_tunnel;
use margay_nft::{
    AddressType, Base, Chain, ChainName, ChainPolicy, ChainType, CmpOp, CtState, Datum, Family,
    Field, FieldType, Hook, IfName, Key, Masquerade, Match, Proto, Rule, Selector, Set, SetKind,
    SetName, Side, Statement, Transport, Verdict,
};

/// Set of the nodes' addresses, from which tunnel packets are accepted.
const NODES: &str = "nodes";
/// Set of ranges whose packets are masqueraded.
const NAT_POOLS: &str = "nat-pools";
/// Set of the ranges of all pools.
const POOLS: &str = "pools";
/// Set of interface and source address of the node's pods.
const PODS: &str = "pods";
/// IP in IP (`IPPROTO_IPIP`). A workload must not send it: the other end would take the inner
/// packet for a node's.
const IPIP: Proto = Proto(4);
/// Before connection tracking (`NF_IP_PRI_RAW`).
const RAW: i32 = -300;
/// After kube-proxy's masquerading (100, `NF_IP_PRI_NAT_SRC`): its mark must be used before the
/// packet is encapsulated.
const AFTER_KUBE_PROXY: i32 = 110;

/// Inputs of the base part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Inputs {
    settings: FelixSettings,
    pools: BTreeMap<IpNet, bool>,
    nodes: Vec<IpAddr>,
    /// Tunnels that pools use, with the addresses of this node's devices.
    tunnels: BTreeMap<TunnelKind, Option<IpAddr>>,
    /// Addresses of Services, in IPVS mode.
    services: Option<BTreeSet<IpAddr>>,
}

/// Chains and sets of one part of the table.
#[derive(Debug, Default)]
pub(super) struct Section {
    pub(super) chains: BTreeMap<ChainName, Chain>,
    pub(super) sets: BTreeMap<SetName, Set>,
}

impl Inputs {
    /// Gathers the inputs from the view of node `own` and its interfaces.
    pub(super) fn gather(own: &str, records: &BTreeMap<RecordId, Record>, links: &Links) -> Self {
        let mut inputs = Self {
            services: ipvs_services(links),
            ..Self::default()
        };
        let mut me = None;
        for (id, record) in globals(records) {
            match (id, record) {
                (RecordId::Settings, Record::Settings(settings)) => {
                    inputs.settings = settings.clone()
                }
                (RecordId::Pool(range), Record::Pool(pool)) => {
                    inputs.pools.insert(range.trunc(), pool.nat_outgoing);
                }
                (RecordId::Node(name), Record::Node(node)) => {
                    inputs
                        .nodes
                        .extend(node.ipv4.map(|net| IpAddr::V4(net.addr())));
                    inputs
                        .nodes
                        .extend(node.ipv6.map(|net| IpAddr::V6(net.addr())));
                    if name == own {
                        me = Some(node);
                    }
                }
                _ => {}
            }
        }
        let used = TunnelKind::ALL
            .into_iter()
            .filter(|kind| has_tunnel(records, *kind));
        inputs.tunnels = used
            .map(|kind| (kind, me.and_then(|me| me.tunnel_address(kind))))
            .collect();
        inputs
    }

    /// Settings of Log rules.
    pub(super) fn logging(&self) -> Logging {
        Logging::of(&self.settings)
    }

    /// Whether pods may have IPv6 addresses.
    pub(super) fn has_ipv6(&self) -> bool {
        self.settings.ipv6 && self.pools.keys().any(|pool| pool.addr().is_ipv6())
    }

    /// Updates the inputs that depend on interfaces; returns whether they changed.
    pub(super) fn set_links(&mut self, links: &Links) -> bool {
        let services = ipvs_services(links);
        let differs = services != self.services;
        self.services = services;
        differs
    }

    /// Addresses of Services, in IPVS mode.
    pub(super) fn services(&self) -> Option<&BTreeSet<IpAddr>> {
        self.services.as_ref()
    }

    /// Whether packets of pods to their node are dropped, whatever policy says.
    pub(super) fn drops_to_host(&self) -> bool {
        self.settings.endpoint_to_host == EndpointToHostAction::Drop
    }

    /// Whether packets in conntrack state INVALID are allowed.
    pub(super) fn allows_invalid(&self) -> bool {
        self.settings.allow_conntrack_invalid
    }

    /// Matches of the packets of tunnels that pools use; their endpoints are in [`nodes_set`].
    pub(super) fn tunnel_packets(&self) -> Vec<Match> {
        let is_used = |wanted: &dyn Fn(&TunnelKind) -> bool| self.tunnels.keys().any(wanted);
        let vxlan = is_used(&|kind| matches!(kind, TunnelKind::Vxlan(_)));
        let ipip = is_used(&|kind| *kind == TunnelKind::Ipip);
        let vxlan = vxlan.then(|| self.vxlan_packets());
        vxlan.into_iter().chain(ipip.then(ipip_packets)).collect()
    }

    fn vxlan_packets(&self) -> Match {
        Match::is(
            Selector::Dport(Transport::Udp),
            Datum::Port(self.settings.vxlan_port),
        )
    }

    /// Inbound and outbound failsafe ports.
    pub(super) fn failsafes(&self) -> (&[Failsafe], &[Failsafe]) {
        (
            &self.settings.failsafe_inbound,
            &self.settings.failsafe_outbound,
        )
    }

    /// Renders the base part. The compiler owns the maps [`names::SENDERS`] and
    /// [`names::RECEIVERS`] and the set of pods.
    pub(super) fn render(&self, families: &[Family]) -> Section {
        let mut section = Section::default();
        self.add_guard(families, &mut section);
        self.add_to_host(families, &mut section);
        self.add_forward(&mut section);
        self.add_ipvs(families, &mut section);
        self.add_masquerade(families, &mut section);
        section
    }

    fn add_guard(&self, families: &[Family], section: &mut Section) {
        let mut rules = vec![accept_not_from_workload()];
        for family in families {
            rules.push(
                Rule::new()
                    .when(Match::in_set(
                        vec![Selector::Iifname, source(*family)],
                        &pods_set(*family),
                    ))
                    .accept(),
            );
        }
        if families.contains(&Family::Ipv6) {
            // Neighbour discovery uses the pod's link-local address, and the unspecified one during
            // duplicate address detection (RFC 4861, RFC 4862).
            let link_local: Ipv6Net = "fe80::/10".parse().expect("a constant range");
            let unspecified: Ipv6Net = "::/128".parse().expect("a constant range");
            rules.push(
                Rule::new()
                    .when(Match::is(Selector::Saddr6, link_local))
                    .when(neighbour_discovery_types())
                    .accept(),
            );
            rules.push(
                Rule::new()
                    .when(Match::is(Selector::Saddr6, unspecified))
                    .when(solicitation_types())
                    .accept(),
            );
        }
        rules.push(Rule::new().counter().drop());
        section.add_chain(
            names::GUARD,
            base_chain(ChainType::Filter, Hook::Prerouting, RAW),
            rules,
        );
    }

    fn add_to_host(&self, families: &[Family], section: &mut Section) {
        let mut rules = Vec::new();
        for packets in self.tunnel_packets() {
            for family in Family::ALL {
                section.add_set(
                    &nodes_set(family),
                    SetKind::of(family.address_type()),
                    self.node_addresses(family).map(Key::from),
                );
                rules.push(
                    Rule::new()
                        .when(packets.clone())
                        .when(Match::in_set(source(family), &nodes_set(family)))
                        .accept(),
                );
            }
            rules.push(Rule::new().when(packets).counter().drop());
        }
        rules.push(accept_not_from_workload());
        rules.push(accept_tracked());
        rules.extend(self.drop_invalid());
        rules.push(
            Rule::new()
                .when(Match::is(Selector::Daddr4, loopback_net()))
                .counter()
                .drop(),
        );
        if families.contains(&Family::Ipv6) {
            rules.push(Rule::new().when(neighbour_discovery_types()).accept());
        }
        rules.extend(self.drop_tunnels());
        rules.extend(self.accept_ipvs_services(families));
        rules.push(Rule::new().vmap(
            vec![Selector::Nfproto, Selector::Iifname],
            &names::set(names::SENDERS),
        ));
        rules.push(Rule::new().counter().drop());
        section.add_chain(
            names::TO_HOST,
            base_chain(ChainType::Filter, Hook::Input, 0),
            rules,
        );
        if self.drops_to_host() {
            // Reached by packets that egress policy has accepted.
            let mut rules = vec![accept_not_from_workload(), accept_tracked()];
            if families.contains(&Family::Ipv6) {
                rules.push(Rule::new().when(neighbour_discovery_types()).accept());
            }
            rules.extend(self.accept_ipvs_services(families));
            rules.push(Rule::new().counter().drop());
            section.add_chain(
                "to-host-2",
                base_chain(ChainType::Filter, Hook::Input, 1),
                rules,
            );
        }
    }

    fn add_forward(&self, section: &mut Section) {
        let mut from = vec![accept_tracked(), accept_not_from_workload()];
        from.extend(self.drop_invalid());
        from.extend(self.drop_tunnels());
        from.push(Rule::new().vmap(
            vec![Selector::Nfproto, Selector::Iifname],
            &names::set(names::SENDERS),
        ));
        from.push(Rule::new().counter().drop());
        section.add_chain(
            names::FROM_WORKLOAD,
            base_chain(ChainType::Filter, Hook::Forward, 0),
            from,
        );

        let elsewhere = Match::NamePrefix(Selector::Oifname, CmpOp::Ne, names::workload_prefix());
        let mut to = vec![accept_tracked(), Rule::new().when(elsewhere).accept()];
        to.extend(self.drop_invalid());
        to.push(Rule::new().vmap(
            vec![Selector::Nfproto, Selector::Oifname],
            &names::set(names::RECEIVERS),
        ));
        to.push(Rule::new().counter().drop());
        section.add_chain(
            names::TO_WORKLOAD,
            base_chain(ChainType::Filter, Hook::Forward, 1),
            to,
        );
    }

    fn add_masquerade(&self, families: &[Family], section: &mut Section) {
        let masquerade = Statement::Masquerade(Masquerade {
            ports: None,
            fully_random: true,
        });
        let mut rules = Vec::new();
        for family in families {
            let ranges = |nat_only: bool| {
                outermost_ranges(
                    self.pools
                        .iter()
                        .filter(move |(_, nat)| **nat || !nat_only)
                        .map(|(range, _)| *range),
                    *family,
                )
            };
            if ranges(true).is_empty() {
                continue;
            }
            let kind = SetKind::of(family.address_type()).with_intervals();
            section.add_set(
                &set_name(NAT_POOLS, *family),
                kind.clone(),
                ranges(true).into_iter().map(Key::from),
            );
            section.add_set(
                &set_name(POOLS, *family),
                kind,
                ranges(false).into_iter().map(Key::from),
            );
            let mut rule = Rule::new()
                .when(Match::in_set(
                    source(*family),
                    &set_name(NAT_POOLS, *family),
                ))
                .when(Match::not_in_set(
                    destination(*family),
                    &set_name(POOLS, *family),
                ));
            if self.settings.nat_exclude_hosts {
                section.add_set(
                    &nodes_set(*family),
                    SetKind::of(family.address_type()),
                    self.node_addresses(*family).map(Key::from),
                );
                rule = rule.when(Match::not_in_set(destination(*family), &nodes_set(*family)));
            }
            rules.push(rule.then(masquerade.clone()));
        }
        for (kind, address) in &self.tunnels {
            let Some(address) = address else { continue };
            // If a process of the node chose another of its addresses, the reply would bypass the
            // tunnel and be dropped as spoofed.
            let device = IfName::new(kind.device_name()).expect("a constant name");
            let not_own = match address {
                IpAddr::V4(address) => Match::not(Selector::Saddr4, *address),
                IpAddr::V6(address) => Match::not(Selector::Saddr6, *address),
            };
            rules.push(
                Rule::new()
                    .when(Match::is(Selector::Oifname, device))
                    .when(not_own)
                    .when(Match::AddressType(
                        Side::Source,
                        CmpOp::Eq,
                        AddressType::Local,
                    ))
                    .then(masquerade.clone()),
            );
        }
        section.add_chain(
            names::MASQUERADE,
            base_chain(ChainType::Nat, Hook::Postrouting, AFTER_KUBE_PROXY),
            rules,
        );
    }

    fn node_addresses(&self, family: Family) -> impl Iterator<Item = IpAddr> {
        self.nodes
            .iter()
            .copied()
            .filter(move |address| elements::family(*address) == family)
    }

    /// Drops packets in conntrack state INVALID, unless configured otherwise.
    pub(super) fn drop_invalid(&self) -> Option<Rule> {
        (!self.settings.allow_conntrack_invalid).then(|| {
            Rule::new()
                .when(Match::CtState(CmpOp::Eq, CtState::INVALID))
                .counter()
                .drop()
        })
    }

    /// Drops tunnel packets of workloads, which would hide their inner packets from policy.
    fn drop_tunnels(&self) -> [Rule; 2] {
        [ipip_packets(), self.vxlan_packets()]
            .map(|packets| Rule::new().when(packets).counter().drop())
    }
}

impl Section {
    pub(super) fn add_chain(&mut self, name: &str, base: Base, rules: Vec<Rule>) {
        self.chains.insert(
            names::chain(name),
            Chain {
                base: Some(base),
                rules,
            },
        );
    }

    pub(super) fn add_set(
        &mut self,
        name: &SetName,
        kind: SetKind,
        keys: impl Iterator<Item = Key>,
    ) {
        self.sets.insert(name.clone(), Set::members(kind, keys));
    }
}

fn ipip_packets() -> Match {
    Match::is(Selector::L4proto, IPIP)
}

/// Name of the set of pods' interfaces and addresses.
pub(super) fn pods_set(family: Family) -> SetName {
    set_name(PODS, family)
}

/// Kind of the set of pods' interfaces and addresses.
pub(super) fn pods_kind(family: Family) -> SetKind {
    SetKind::of(vec![FieldType::Iface, family.address_type()])
}

/// Kind of the maps from family and interface to class.
pub(super) fn dispatch_kind() -> SetKind {
    SetKind::of(vec![FieldType::Family, FieldType::Iface]).with_verdicts()
}

/// Key in the maps from family and interface to class.
pub(super) fn dispatch_key(family: Family, interface: IfName) -> Key {
    Key::from([Field::from(family), Field::from(interface)])
}

/// Name of the set of the nodes' addresses.
pub(super) fn nodes_set(family: Family) -> SetName {
    set_name(NODES, family)
}

fn set_name(name: &str, family: Family) -> SetName {
    names::set(&format!("{name}-{}", names::digit(family)))
}

/// Base chain with policy accept.
pub(super) const fn base_chain(kind: ChainType, hook: Hook, priority: i32) -> Base {
    Base {
        kind,
        hook,
        priority,
        policy: ChainPolicy::Accept,
    }
}

pub(super) fn accept_not_from_workload() -> Rule {
    Rule::new()
        .when(Match::NamePrefix(
            Selector::Iifname,
            CmpOp::Ne,
            names::workload_prefix(),
        ))
        .accept()
}

/// Accepts packets of established and related connections.
pub(super) fn accept_tracked() -> Rule {
    let states = [CtState::ESTABLISHED, CtState::RELATED];
    Rule::new().inline_vmap(
        Selector::CtState,
        states.map(|state| (Key::from(state), Verdict::Accept)),
    )
}

/// Loopback addresses. Pods' links route them (`route_localnet`), so that ports of the node can
/// lead into pods; only replies may use that way.
pub(super) fn loopback_net() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)
}

/// ICMPv6 types of neighbour discovery that a pod may send (RFC 4861): router solicitation,
/// neighbour solicitation and advertisement, never a router advertisement.
pub(super) fn neighbour_discovery_types() -> Match {
    const KINDS: [u8; 3] = [133, 135, 136];
    Match::any_of(
        Selector::Icmp6Type,
        KINDS.map(|kind| Key::from(Datum::Icmp6Type(kind))),
    )
}

/// ICMPv6 types that a pod may send from the unspecified address (RFC 4861): router and neighbour
/// solicitation.
fn solicitation_types() -> Match {
    const KINDS: [u8; 2] = [133, 135];
    Match::any_of(
        Selector::Icmp6Type,
        KINDS.map(|kind| Key::from(Datum::Icmp6Type(kind))),
    )
}

/// Field of the source address.
pub(super) const fn source(family: Family) -> Selector {
    match family {
        Family::Ipv4 => Selector::Saddr4,
        Family::Ipv6 => Selector::Saddr6,
    }
}

/// Field of the destination address.
pub(super) const fn destination(family: Family) -> Selector {
    match family {
        Family::Ipv4 => Selector::Daddr4,
        Family::Ipv6 => Selector::Daddr6,
    }
}

fn outermost_ranges(ranges: impl Iterator<Item = IpNet>, family: Family) -> Vec<IpNet> {
    IpNet::aggregate(
        &ranges
            .filter(|range| elements::family(range.addr()) == family)
            .collect(),
    )
}
