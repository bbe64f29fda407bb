//! Random tiers, policies and rules.

use margay_api::policy::{Order, Policy, StagedPolicy, Tier, Traffic};
use margay_api::rule::{Action, EntityMatch, Icmp, IpVersion, Port, PortRange, Rule};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::{
    PORT_NAMES, icmp_type, net, node_selector, port, port_name, protocol, selector, service_key,
    tier_name,
};

pub(super) fn staged() -> impl Strategy<Value = StagedPolicy> {
    prop_oneof![
        4 => policy().prop_map(StagedPolicy::Set),
        1 => Just(StagedPolicy::Delete),
        1 => Just(StagedPolicy::Ignore),
    ]
}

/// A list of many named ports, as a rule may have on both sides.
fn many_ports() -> impl Strategy<Value = Vec<Port>> {
    (
        subsequence(&PORT_NAMES[..], 4..=PORT_NAMES.len()),
        option::weighted(0.3, rule_port()),
    )
        .prop_map(|(names, other)| {
            names
                .into_iter()
                .map(|name| Port::Named(name.to_owned()))
                .chain(other)
                .collect()
        })
}

pub(super) fn tier() -> impl Strategy<Value = Tier> {
    (order(), select(&[Action::Deny, Action::Pass][..])).prop_map(|(order, default_action)| Tier {
        order,
        default_action,
    })
}

fn order() -> impl Strategy<Value = Order> {
    option::of(select(
        &[f64::MIN, -1.0, -0.0, 0.0, 5e-324, 1.0, 1000.0, f64::MAX][..],
    ))
    .prop_map(Order)
}

pub(super) fn policy() -> impl Strategy<Value = Policy> {
    let rules = || vec(rule(), 0..3);
    (
        tier_name(),
        order(),
        selector(),
        traffic(),
        any::<(bool, bool)>(),
        rules(),
        rules(),
    )
        .prop_map(
            |(
                tier,
                order,
                selector,
                traffic,
                (applies_ingress, applies_egress),
                ingress,
                egress,
            )| Policy {
                tier,
                order,
                selector,
                traffic,
                applies_ingress,
                applies_egress: applies_egress && traffic != Traffic::PreDnat,
                ingress,
                egress,
            },
        )
}

fn traffic() -> impl Strategy<Value = Traffic> {
    prop_oneof![
        4 => Just(Traffic::Normal),
        2 => Just(Traffic::Forwarded),
        1 => Just(Traffic::PreDnat),
        1 => Just(Traffic::Untracked),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    let action = select(&[Action::Allow, Action::Deny, Action::Log, Action::Pass][..]);
    let version = option::weighted(0.1, select(&[IpVersion::V4, IpVersion::V6][..]));
    let icmp = || {
        option::weighted(
            0.1,
            (option::of(icmp_type()), option::of(0..2_u8)).prop_map(|(kind, code)| Icmp {
                kind,
                code: code.filter(|_| kind.is_some()),
            }),
        )
    };
    let protocols = (
        option::weighted(0.4, protocol()),
        option::weighted(0.1, protocol()),
    );
    let crowded = option::weighted(0.1, (many_ports(), many_ports()));
    let sides =
        (entity(), entity(), crowded).prop_map(|(source, destination, crowded)| match crowded {
            None => (source, destination),
            Some((from, to)) => (
                EntityMatch {
                    ports: from.into(),
                    ..source
                },
                EntityMatch {
                    ports: to.into(),
                    ..destination
                },
            ),
        });
    (action, version, protocols, icmp(), icmp(), sides).prop_map(
        |(action, ip_version, (protocol, not_protocol), icmp, not_icmp, (source, destination))| {
            Rule {
                action,
                ip_version,
                protocol,
                not_protocol,
                icmp,
                not_icmp,
                source,
                destination,
            }
        },
    )
}

fn entity() -> impl Strategy<Value = EntityMatch> {
    let nets = || prop_oneof![4 => Just(Vec::new()), 1 => vec(net(), 1..3)];
    let selectors = || option::weighted(0.3, selector());
    let ports = || prop_oneof![4 => Just(Vec::new()), 1 => vec(rule_port(), 1..3)];
    let service = option::weighted(0.1, service_key());
    let nodes = option::weighted(0.05, node_selector());
    (
        nets(),
        nets(),
        selectors(),
        option::weighted(0.1, selector()),
        ports(),
        ports(),
        nodes,
        service,
    )
        .prop_map(
            |(nets, not_nets, selector, not_selector, ports, not_ports, nodes, service)| {
                EntityMatch {
                    nets,
                    not_nets,
                    selector,
                    not_selector,
                    ports: ports.into(),
                    not_ports,
                    nodes,
                    service,
                }
            },
        )
}

fn rule_port() -> impl Strategy<Value = Port> {
    prop_oneof![
        4 => (port(), 0..3_u16).prop_map(
            |(first, more)| Port::Range(PortRange { first, last: first + more }),
        ),
        1 => Just(Port::Range(PortRange { first: 1, last: u16::MAX })),
        4 => port_name().prop_map(Port::Named),
    ]
}
