//! Random records, changes and trailers.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use margay_api::meta::NamespacedName;
use margay_api::network::{Encapsulation, Mac, NodeInfo, Vtep};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_api::settings::{EndpointToHostAction, Failsafe, FelixSettings, LogRate, TimeUnit};
use margay_calc::flush::MemberDelta;
use margay_calc::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, Member, PolicyRecord,
    PoolRecord, Record, RecordId, RouteRecord, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};
use margay_proto::sync::{Change, Trailer};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option::of;
use proptest::prelude::*;

use super::bgp::{bgp, node_bgp};

pub fn name() -> impl Strategy<Value = String> {
    "[a-zé.-]{1,12}"
}

pub fn net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<u32>(), 0..=32_u8)
            .prop_map(|(bits, len)| Ipv4Net::new(bits.into(), len).expect("length").into()),
        (any::<u128>(), 0..=128_u8)
            .prop_map(|(bits, len)| Ipv6Net::new(bits.into(), len).expect("length").into()),
    ]
}

fn encapsulation() -> impl Strategy<Value = Encapsulation> {
    prop::sample::select(vec![
        Encapsulation::None,
        Encapsulation::Vxlan,
        Encapsulation::VxlanCrossSubnet,
        Encapsulation::Ipip,
        Encapsulation::IpipCrossSubnet,
    ])
}

pub fn namespaced() -> impl Strategy<Value = NamespacedName> {
    (name(), name()).prop_map(|(namespace, name)| NamespacedName { namespace, name })
}

fn policy_key() -> impl Strategy<Value = PolicyKey> {
    (
        prop::sample::select(PolicyKind::ALL.to_vec()),
        "[a-z]{0,5}",
        name(),
    )
        .prop_map(|(kind, namespace, name)| PolicyKey {
            kind,
            namespace,
            name,
        })
}

fn set_id() -> impl Strategy<Value = SetId> {
    name().prop_map(SetId)
}

fn members(kind: SetKind) -> BoxedStrategy<BTreeSet<Member>> {
    let member = match kind {
        SetKind::Net => net().prop_map(Member::Net).boxed(),
        SetKind::AddressPort => (any::<IpAddr>(), any::<u8>(), any::<u16>())
            .prop_map(|(address, protocol, port)| {
                Member::AddressPort(address, Protocol(protocol), port)
            })
            .boxed(),
    };
    btree_set(member, 0..6).boxed()
}

fn set_kind() -> impl Strategy<Value = SetKind> {
    prop::sample::select(vec![SetKind::Net, SetKind::AddressPort])
}

fn port_range() -> impl Strategy<Value = PortRange> {
    (any::<u16>(), any::<u16>()).prop_map(|(a, b)| PortRange {
        first: a.min(b),
        last: a.max(b),
    })
}

fn side() -> impl Strategy<Value = SideMatch> {
    let nets = || vec(net(), 0..2);
    let sets = || vec(set_id(), 0..2);
    let ports = || vec(port_range(), 0..2);
    (
        nets(),
        nets(),
        sets(),
        sets(),
        ports(),
        sets(),
        ports(),
        sets(),
        of(set_id()),
    )
        .prop_map(
            |(
                nets,
                not_nets,
                sets,
                not_sets,
                ports,
                port_sets,
                not_ports,
                not_port_sets,
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

fn action() -> impl Strategy<Value = Action> {
    prop::sample::select(vec![Action::Allow, Action::Deny, Action::Log, Action::Pass])
}

fn rule() -> impl Strategy<Value = RuleRecord> {
    let icmp =
        || of((of(any::<u8>()), of(any::<u8>())).prop_map(|(kind, code)| Icmp { kind, code }));
    let protocol = || of(any::<u8>().prop_map(Protocol));
    let version = of(prop::sample::select(vec![IpVersion::V4, IpVersion::V6]));
    (
        action(),
        version,
        protocol(),
        protocol(),
        icmp(),
        icmp(),
        side(),
        side(),
    )
        .prop_map(
            |(action, ip_version, protocol, not_protocol, icmp, not_icmp, source, destination)| {
                RuleRecord {
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

fn tiers() -> impl Strategy<Value = Vec<TierBinding>> {
    let tier = (
        name(),
        prop::sample::select(vec![Action::Deny, Action::Pass]),
        vec(policy_key(), 0..3),
        vec(policy_key(), 0..3),
    )
        .prop_map(|(name, default_action, ingress, egress)| TierBinding {
            name,
            default_action,
            ingress,
            egress,
        });
    vec(tier, 0..3)
}

fn unmatched() -> impl Strategy<Value = Action> {
    prop::sample::select(vec![Action::Allow, Action::Deny])
}

fn endpoint() -> impl Strategy<Value = EndpointRecord> {
    let uid = prop::sample::select(vec!["", "00000000-0000-4000-8000-000000000001"]);
    (
        name(),
        uid,
        vec(any::<IpAddr>(), 0..3),
        tiers(),
        unmatched(),
    )
        .prop_map(
            |(interface, uid, addresses, tiers, unmatched)| EndpointRecord {
                interface,
                uid: uid.to_owned(),
                addresses,
                tiers,
                unmatched,
            },
        )
}

fn host_endpoint() -> impl Strategy<Value = HostEndpointRecord> {
    let interfaces = prop_oneof![
        Just(HostInterfaces::All),
        name().prop_map(HostInterfaces::Named),
        btree_set(any::<IpAddr>(), 0..3).prop_map(HostInterfaces::WithAddress),
    ];
    (
        interfaces,
        [tiers(), tiers(), tiers(), tiers()],
        unmatched(),
    )
        .prop_map(|(interfaces, tiers, unmatched)| {
            let [normal, forward, pre_dnat, untracked] = tiers;
            HostEndpointRecord {
                interfaces,
                normal,
                forward,
                pre_dnat,
                untracked,
                unmatched,
            }
        })
}

/// Any value of a setting's type.
trait Sample: Sized {
    fn sample() -> BoxedStrategy<Self>;
}

impl Sample for u32 {
    fn sample() -> BoxedStrategy<Self> {
        any::<Self>().boxed()
    }
}

impl Sample for u16 {
    fn sample() -> BoxedStrategy<Self> {
        (1_u16..).boxed()
    }
}

impl Sample for bool {
    fn sample() -> BoxedStrategy<Self> {
        any::<Self>().boxed()
    }
}

impl Sample for String {
    fn sample() -> BoxedStrategy<Self> {
        "[a-z]{0,5}".boxed()
    }
}

impl Sample for EndpointToHostAction {
    fn sample() -> BoxedStrategy<Self> {
        prop::sample::select(vec![Self::Drop, Self::Accept, Self::Return]).boxed()
    }
}

impl Sample for Option<LogRate> {
    fn sample() -> BoxedStrategy<Self> {
        let unit = prop::sample::select(TimeUnit::ALL.to_vec());
        of((1_u16.., unit).prop_map(|(count, unit)| LogRate { count, unit })).boxed()
    }
}

impl Sample for Vec<Failsafe> {
    fn sample() -> BoxedStrategy<Self> {
        failsafes().boxed()
    }
}

macro_rules! sample_settings {
    ($($group:ident { $($(#[$doc:meta])+ $name:ident: $kind:ty = $default:expr;)* })*) => {
        /// Settings with any value of every row of the table.
        fn settings() -> impl Strategy<Value = FelixSettings> {
            let settings = Just(FelixSettings::default()).boxed();
            $($(
                let settings = (settings, <$kind>::sample())
                    .prop_map(|(settings, $name)| FelixSettings { $name, ..settings })
                    .boxed();
            )*)*
            settings
        }
    };
}

margay_api::felix_settings!(sample_settings);

fn failsafes() -> impl Strategy<Value = Vec<Failsafe>> {
    let failsafe =
        (any::<u8>(), any::<u16>(), of(net())).prop_map(|(protocol, port, net)| Failsafe {
            protocol: Protocol(protocol),
            port,
            net,
        });
    prop_oneof![
        Just(Failsafe::default_inbound()),
        Just(Failsafe::default_outbound()),
        vec(failsafe, 0..3)
    ]
}

fn node() -> impl Strategy<Value = NodeInfo> {
    let ipv4 = of((any::<u32>(), 0..=32_u8)
        .prop_map(|(bits, len)| Ipv4Net::new(bits.into(), len).expect("length")));
    let ipv6 = of((any::<u128>(), 0..=128_u8)
        .prop_map(|(bits, len)| Ipv6Net::new(bits.into(), len).expect("length")));
    let vtep = of(
        (any::<Ipv4Addr>(), any::<[u8; 6]>()).prop_map(|(address, mac)| Vtep {
            address,
            mac: Mac(mac),
        }),
    );
    let vtep6 = of(
        (any::<Ipv6Addr>(), any::<[u8; 6]>()).prop_map(|(address, mac)| Vtep {
            address,
            mac: Mac(mac),
        }),
    );
    // The unspecified address is none.
    let ipip = of((1_u32..).prop_map(Ipv4Addr::from_bits));
    let labels = btree_map(name(), name(), 0..3);
    let node = (ipv4, ipv6, vtep, vtep6, ipip, labels, of(node_bgp()));
    node.prop_map(|(ipv4, ipv6, vtep, vtep6, ipip, labels, bgp)| NodeInfo {
        ipv4,
        ipv6,
        vtep,
        vtep6,
        ipip,
        labels,
        bgp,
        ..NodeInfo::default()
    })
}

pub fn upsert() -> impl Strategy<Value = Change> {
    let made = |(id, record)| Change::Upsert(id, record);
    prop_oneof![
        settings()
            .prop_map(|value| (RecordId::Settings, Record::Settings(value)))
            .prop_map(made),
        (net(), any::<bool>(), encapsulation())
            .prop_map(|(range, nat_outgoing, encapsulation)| {
                let value = PoolRecord {
                    nat_outgoing,
                    encapsulation,
                };
                (RecordId::Pool(range), Record::Pool(value))
            })
            .prop_map(made),
        (name(), node())
            .prop_map(|(name, value)| (RecordId::Node(name), Record::Node(value)))
            .prop_map(made),
        (net(), name(), encapsulation())
            .prop_map(|(range, node, encapsulation)| {
                let value = RouteRecord {
                    node,
                    encapsulation,
                };
                (RecordId::Route(range), Record::Route(value))
            })
            .prop_map(made),
        (set_id(), set_kind())
            .prop_flat_map(|(id, kind)| (Just(id), Just(kind), members(kind)))
            .prop_map(|(id, kind, members)| {
                let value = IpSetRecord { kind, members };
                (RecordId::IpSet(id), Record::IpSet(value))
            })
            .prop_map(made),
        (policy_key(), vec(rule(), 0..3), vec(rule(), 0..3))
            .prop_map(|(key, ingress, egress)| {
                let value = PolicyRecord { ingress, egress };
                (RecordId::Policy(key), Record::Policy(value))
            })
            .prop_map(made),
        (namespaced(), endpoint())
            .prop_map(|(key, value)| (RecordId::Endpoint(key), Record::Endpoint(value)))
            .prop_map(made),
        (name(), host_endpoint())
            .prop_map(|(name, value)| (RecordId::HostEndpoint(name), Record::HostEndpoint(value)))
            .prop_map(made),
        bgp()
            .prop_map(|value| (RecordId::Bgp, Record::Bgp(Box::new(value))))
            .prop_map(made),
    ]
}

pub fn change() -> impl Strategy<Value = Change> {
    let delta = (set_id(), set_kind())
        .prop_flat_map(|(id, kind)| (Just(id), Just(kind), members(kind), members(kind)))
        .prop_map(|(id, kind, added, removed)| {
            Change::Members(id, kind, MemberDelta { added, removed })
        });
    prop_oneof![
        3 => upsert(),
        1 => delta,
        1 => upsert().prop_map(|change| match change {
            Change::Upsert(id, _) => Change::Remove(id),
            other => other,
        }),
    ]
}

pub fn trailer() -> impl Strategy<Value = Trailer> {
    (
        any::<u64>(),
        vec(0..256_u32, 0..4),
        any::<bool>(),
        "[0-9a-f-]{0,8}",
        any::<u64>(),
        btree_map("[A-Z][a-z]{1,8}", any::<u64>(), 0..4),
        vec("[0-9.]{7}:[0-9]{4}", 0..3),
    )
        .prop_map(
            |(
                revision,
                restated_buckets,
                in_sync,
                traceparent,
                event_unix_ns,
                versions,
                servers,
            )| {
                Trailer {
                    revision,
                    restated_buckets,
                    in_sync,
                    traceparent,
                    event_unix_ns,
                    versions,
                    servers,
                }
            },
        )
}

/// A policy whose rules use few distinct port lists, so that they are shared.
pub fn sharing() -> impl Strategy<Value = Change> {
    let lists = vec((vec(port_range(), 0..5), vec(set_id(), 0..5)), 1..4);
    (policy_key(), vec(rule(), 0..8), lists, any::<u8>()).prop_map(
        |(key, mut rules, lists, first)| {
            for (index, rule) in rules.iter_mut().enumerate() {
                let (ports, sets) = &lists[(index + usize::from(first)) % lists.len()];
                rule.destination.ports = ports.clone().into();
                rule.destination.port_sets = sets.clone().into();
            }
            let egress = rules.split_off(rules.len() / 2);
            Change::Upsert(
                RecordId::Policy(key),
                Record::Policy(PolicyRecord {
                    ingress: rules,
                    egress,
                }),
            )
        },
    )
}
