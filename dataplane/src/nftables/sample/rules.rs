//! Random rules of policies.

use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_calc::model::{RuleRecord, SetId, SideMatch};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::{NET_SETS, PORTS, PROTOCOLS, SETS, few, mk_rule, mk_set_id, nets};

fn ranges() -> impl Strategy<Value = Vec<PortRange>> {
    few(vec![
        PortRange::single(80),
        PortRange {
            first: 80,
            last: 81,
        },
        PortRange {
            first: 82,
            last: 500,
        },
        PortRange::single(5353),
    ])
}

fn sets(numbers: std::ops::Range<usize>) -> impl Strategy<Value = Vec<SetId>> {
    few(numbers.map(mk_set_id).collect())
}

fn side() -> impl Strategy<Value = SideMatch> {
    let ports = (
        ranges(),
        sets(NET_SETS..SETS),
        prop_oneof![4 => Just(Vec::new()), 1 => ranges()],
        sets(NET_SETS..SETS),
    );
    let service = prop_oneof![
        6 => Just(None),
        1 => select(vec![mk_set_id(NET_SETS), mk_set_id(NET_SETS + 1)]).prop_map(Some),
    ];
    (
        few(nets()),
        few(nets()),
        sets(0..NET_SETS),
        sets(0..NET_SETS),
        ports,
        service,
    )
        .prop_map(
            |(
                nets,
                not_nets,
                sets,
                not_sets,
                (ports, port_sets, not_ports, not_port_sets),
                service_set,
            )| SideMatch {
                nets,
                not_nets,
                sets,
                not_sets,
                ports: ports.into(),
                port_sets: port_sets.into(),
                not_ports,
                not_port_sets,
                service_set,
            },
        )
}

fn simple_side() -> impl Strategy<Value = SideMatch> {
    (sets(0..NET_SETS), few(nets())).prop_map(|(sets, nets)| SideMatch {
        sets,
        nets,
        ..SideMatch::default()
    })
}

fn icmp() -> impl Strategy<Value = Icmp> {
    (option::of(select(vec![0_u8, 8, 128])), option::of(0..2_u8)).prop_map(|(kind, code)| Icmp {
        kind,
        code: code.filter(|_| kind.is_some()),
    })
}

fn rarely<T: Clone + std::fmt::Debug>(
    strategy: impl Strategy<Value = T>,
) -> impl Strategy<Value = Option<T>> {
    option::weighted(0.15, strategy)
}

fn rule() -> impl Strategy<Value = RuleRecord> {
    let action = select(vec![
        Action::Allow,
        Action::Allow,
        Action::Allow,
        Action::Deny,
        Action::Pass,
        Action::Log,
    ]);
    let protocols = (
        option::of(select(PROTOCOLS.to_vec())),
        rarely(select(PROTOCOLS.to_vec())),
    );
    let broad = (
        rarely(select(vec![IpVersion::V4, IpVersion::V6])),
        protocols,
        rarely(icmp()),
        rarely(icmp()),
        side(),
        side(),
    );
    let broad = broad.prop_map(
        |(ip_version, (protocol, not_protocol), icmp, not_icmp, source, destination)| RuleRecord {
            action: Action::Allow,
            ip_version,
            protocol,
            not_protocol,
            icmp,
            not_icmp,
            source,
            destination,
        },
    );
    let usual = (
        select(vec![Protocol::TCP, Protocol::UDP]),
        ranges(),
        simple_side(),
        any::<bool>(),
    );
    let usual = usual.prop_map(|(protocol, ports, peer, outward)| {
        let ports = ports.into();
        let own = SideMatch::default();
        let (source, destination) = if outward {
            (own, SideMatch { ports, ..peer })
        } else {
            (peer, SideMatch { ports, ..own })
        };
        RuleRecord {
            protocol: Some(protocol),
            source,
            destination,
            ..mk_rule(Action::Allow)
        }
    });
    (action, prop_oneof![2 => broad, 4 => usual, 1 => crowded()])
        .prop_map(|(action, rule)| RuleRecord { action, ..rule })
}

/// A rule with many named ports on both sides.
fn crowded() -> impl Strategy<Value = RuleRecord> {
    let named = || {
        subsequence(
            (NET_SETS..SETS).map(mk_set_id).collect::<Vec<_>>(),
            3..=SETS - NET_SETS,
        )
    };
    let side = || {
        (simple_side(), ranges(), named()).prop_map(|(side, ports, named)| SideMatch {
            ports: ports.into(),
            port_sets: named.into(),
            ..side
        })
    };
    let protocol = option::of(select(vec![Protocol::TCP, Protocol::UDP]));
    (protocol, side(), side()).prop_map(|(protocol, source, destination)| RuleRecord {
        protocol,
        source,
        destination,
        ..mk_rule(Action::Allow)
    })
}

/// Rules that differ only in their peers, or in these and a port.
fn run() -> impl Strategy<Value = Vec<RuleRecord>> {
    let action = select(vec![Action::Allow, Action::Deny, Action::Pass]);
    let sets = subsequence(
        (0..NET_SETS).map(mk_set_id).collect::<Vec<_>>(),
        2..=NET_SETS,
    );
    let protocol = select(vec![Protocol::TCP, Protocol::UDP]);
    let own_ports = any::<bool>();
    (action, sets, protocol, ranges(), any::<bool>(), own_ports).prop_map(
        |(action, sets, protocol, ports, outward, own)| {
            let rule = |(index, set): (usize, SetId)| {
                let ports = if own {
                    vec![PortRange::single(PORTS[index % PORTS.len()])]
                } else {
                    ports.clone()
                };
                let ports = ports.into();
                let peer = SideMatch {
                    sets: vec![set],
                    ..SideMatch::default()
                };
                let (source, destination) = if outward {
                    (SideMatch::default(), SideMatch { ports, ..peer })
                } else {
                    (
                        peer,
                        SideMatch {
                            ports,
                            ..SideMatch::default()
                        },
                    )
                };
                RuleRecord {
                    protocol: Some(protocol),
                    source,
                    destination,
                    ..mk_rule(action)
                }
            };
            sets.into_iter().enumerate().map(rule).collect()
        },
    )
}

pub(super) fn rules() -> impl Strategy<Value = Vec<RuleRecord>> {
    vec(
        prop_oneof![3 => rule().prop_map(|rule| vec![rule]), 1 => run()],
        0..5,
    )
    .prop_map(|runs| runs.concat())
}
