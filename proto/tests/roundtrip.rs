//! Decoding inverts encoding; unknown fields are ignored; malformed messages are refused
//! without a panic.
#![cfg(feature = "sync")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::{Bytes, BytesMut};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use margay_api::meta::NamespacedName;
use margay_api::network::{Encapsulation, Mac, NodeInfo, Vtep};
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::{Action, Icmp, IpVersion, PortRange, Protocol};
use margay_api::settings::{EndpointToHostAction, Failsafe, FelixSettings, LogRate, TimeUnit};
use margay_calc::flush::MemberDelta;
use margay_calc::model::{
    EndpointRecord, HostEndpointRecord, HostInterfaces, IpSetRecord, Member, PolicyRecord, PoolRecord, Record,
    RecordId, RouteRecord, RuleRecord, SetId, SetKind, SideMatch, TierBinding,
};
use margay_proto::sync::{
    Ack, Change, Error, Frame, Joiner, LocalEndpoint, NodeProblem, Trailer, decode_ack, decode_frame,
    decode_local_endpoint, decode_problems, decode_record, encode_ack, encode_change, encode_compact,
    encode_local_endpoint, encode_problems, encode_trailer, split, wire,
};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option::of;
use proptest::prelude::*;
use prost::Message;

fn name() -> impl Strategy<Value = String> {
    "[a-zé.-]{1,12}"
}

fn net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<u32>(), 0..=32_u8).prop_map(|(bits, len)| Ipv4Net::new(bits.into(), len).expect("length").into()),
        (any::<u128>(), 0..=128_u8).prop_map(|(bits, len)| Ipv6Net::new(bits.into(), len).expect("length").into()),
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

fn namespaced() -> impl Strategy<Value = NamespacedName> {
    (name(), name()).prop_map(|(namespace, name)| NamespacedName { namespace, name })
}

fn policy_key() -> impl Strategy<Value = PolicyKey> {
    (prop::sample::select(PolicyKind::ALL.to_vec()), "[a-z]{0,5}", name())
        .prop_map(|(kind, namespace, name)| PolicyKey { kind, namespace, name })
}

fn set_id() -> impl Strategy<Value = SetId> {
    name().prop_map(SetId)
}

fn members(kind: SetKind) -> BoxedStrategy<BTreeSet<Member>> {
    let member = match kind {
        SetKind::Net => net().prop_map(Member::Net).boxed(),
        SetKind::AddressPort => (any::<IpAddr>(), any::<u8>(), any::<u16>())
            .prop_map(|(address, protocol, port)| Member::AddressPort(address, Protocol(protocol), port))
            .boxed(),
    };
    btree_set(member, 0..6).boxed()
}

fn set_kind() -> impl Strategy<Value = SetKind> {
    prop::sample::select(vec![SetKind::Net, SetKind::AddressPort])
}

fn port_range() -> impl Strategy<Value = PortRange> {
    (any::<u16>(), any::<u16>()).prop_map(|(a, b)| PortRange { first: a.min(b), last: a.max(b) })
}

fn side() -> impl Strategy<Value = SideMatch> {
    let nets = || vec(net(), 0..2);
    let sets = || vec(set_id(), 0..2);
    let ports = || vec(port_range(), 0..2);
    (nets(), nets(), sets(), sets(), ports(), sets(), ports(), sets(), of(set_id())).prop_map(
        |(nets, not_nets, sets, not_sets, ports, port_sets, not_ports, not_port_sets, service_set)| SideMatch {
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
    let icmp = || of((of(any::<u8>()), of(any::<u8>())).prop_map(|(kind, code)| Icmp { kind, code }));
    let protocol = || of(any::<u8>().prop_map(Protocol));
    let version = of(prop::sample::select(vec![IpVersion::V4, IpVersion::V6]));
    (action(), version, protocol(), protocol(), icmp(), icmp(), side(), side()).prop_map(
        |(action, ip_version, protocol, not_protocol, icmp, not_icmp, source, destination)| RuleRecord {
            action,
            ip_version,
            protocol,
            not_protocol,
            icmp,
            not_icmp,
            source,
            destination,
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
        .prop_map(|(name, default_action, ingress, egress)| TierBinding { name, default_action, ingress, egress });
    vec(tier, 0..3)
}

fn unmatched() -> impl Strategy<Value = Action> {
    prop::sample::select(vec![Action::Allow, Action::Deny])
}

fn endpoint() -> impl Strategy<Value = EndpointRecord> {
    let uid = prop::sample::select(vec!["", "00000000-0000-4000-8000-000000000001"]);
    (name(), uid, vec(any::<IpAddr>(), 0..3), tiers(), unmatched()).prop_map(
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
    (interfaces, [tiers(), tiers(), tiers(), tiers()], unmatched()).prop_map(|(interfaces, tiers, unmatched)| {
        let [normal, forward, pre_dnat, untracked] = tiers;
        HostEndpointRecord { interfaces, normal, forward, pre_dnat, untracked, unmatched }
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
    let failsafe = (any::<u8>(), any::<u16>(), of(net())).prop_map(|(protocol, port, net)| Failsafe {
        protocol: Protocol(protocol),
        port,
        net,
    });
    prop_oneof![Just(Failsafe::default_inbound()), Just(Failsafe::default_outbound()), vec(failsafe, 0..3)]
}

fn node() -> impl Strategy<Value = NodeInfo> {
    let ipv4 = of((any::<u32>(), 0..=32_u8).prop_map(|(bits, len)| Ipv4Net::new(bits.into(), len).expect("length")));
    let ipv6 = of((any::<u128>(), 0..=128_u8).prop_map(|(bits, len)| Ipv6Net::new(bits.into(), len).expect("length")));
    let vtep = of((any::<Ipv4Addr>(), any::<[u8; 6]>()).prop_map(|(address, mac)| Vtep { address, mac: Mac(mac) }));
    let vtep6 = of((any::<Ipv6Addr>(), any::<[u8; 6]>()).prop_map(|(address, mac)| Vtep { address, mac: Mac(mac) }));
    (ipv4, ipv6, vtep, vtep6, btree_map(name(), name(), 0..3)).prop_map(|(ipv4, ipv6, vtep, vtep6, labels)| NodeInfo {
        ipv4,
        ipv6,
        vtep,
        vtep6,
        labels,
        ..NodeInfo::default()
    })
}

fn upsert() -> impl Strategy<Value = Change> {
    let made = |(id, record)| Change::Upsert(id, record);
    prop_oneof![
        settings().prop_map(|value| (RecordId::Settings, Record::Settings(value))).prop_map(made),
        (net(), any::<bool>(), encapsulation())
            .prop_map(|(range, nat_outgoing, encapsulation)| {
                let value = PoolRecord { nat_outgoing, encapsulation };
                (RecordId::Pool(range), Record::Pool(value))
            })
            .prop_map(made),
        (name(), node()).prop_map(|(name, value)| (RecordId::Node(name), Record::Node(value))).prop_map(made),
        (net(), name(), encapsulation())
            .prop_map(|(range, node, encapsulation)| {
                let value = RouteRecord { node, encapsulation };
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
    ]
}

fn change() -> impl Strategy<Value = Change> {
    let delta = (set_id(), set_kind())
        .prop_flat_map(|(id, kind)| (Just(id), Just(kind), members(kind), members(kind)))
        .prop_map(|(id, kind, added, removed)| Change::Members(id, kind, MemberDelta { added, removed }));
    prop_oneof![
        3 => upsert(),
        1 => delta,
        1 => upsert().prop_map(|change| match change {
            Change::Upsert(id, _) => Change::Remove(id),
            other => other,
        }),
    ]
}

fn trailer() -> impl Strategy<Value = Trailer> {
    (any::<u64>(), vec(0..256_u32, 0..4), any::<bool>(), "[0-9a-f-]{0,8}", any::<u64>()).prop_map(
        |(revision, restated_buckets, in_sync, traceparent, event_unix_ns)| Trailer {
            revision,
            restated_buckets,
            in_sync,
            traceparent,
            event_unix_ns,
        },
    )
}

fn bytes_of(frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::new();
    for change in &frame.changes {
        bytes.extend_from_slice(&encode_change(change.into()));
    }
    bytes.extend_from_slice(&encode_trailer(&frame.trailer));
    bytes
}

/// A policy whose rules use few distinct port lists, so that they are shared.
fn sharing() -> impl Strategy<Value = Change> {
    let lists = vec((vec(port_range(), 0..5), vec(set_id(), 0..5)), 1..4);
    (policy_key(), vec(rule(), 0..8), lists, any::<u8>()).prop_map(|(key, mut rules, lists, first)| {
        for (index, rule) in rules.iter_mut().enumerate() {
            let (ports, sets) = &lists[(index + usize::from(first)) % lists.len()];
            rule.destination.ports = ports.clone().into();
            rule.destination.port_sets = sets.clone().into();
        }
        let egress = rules.split_off(rules.len() / 2);
        Change::Upsert(RecordId::Policy(key), Record::Policy(PolicyRecord { ingress: rules, egress }))
    })
}

proptest! {
    #[test]
    fn the_compact_form_means_the_same(changes in vec(prop_oneof![1 => change(), 2 => sharing()], 0..5), trailer in trailer()) {
        let frame = Frame { changes, trailer };
        let mut bytes = BytesMut::new();
        frame.changes.iter().for_each(|change| bytes.extend_from_slice(&encode_compact(change.into())));
        bytes.extend_from_slice(&encode_trailer(&frame.trailer));
        let wire = wire::Frame::decode(bytes.freeze()).expect("frames are valid protobuf");
        prop_assert_eq!(decode_frame(wire), Ok(frame));
    }

    /// Wherever a frame is split, joining its parts restores it, and only a single larger change
    /// makes a larger part.
    #[test]
    fn parts_of_a_frame_are_the_frame(
        changes in vec(change(), 0..9),
        trailer in trailer(),
        most in 3..400_usize,
        joined in vec(any::<bool>(), 9),
    ) {
        let frame = Frame { changes, trailer };
        let mut pieces: Vec<Bytes> = Vec::new();
        let mut longest = encode_trailer(&frame.trailer).len();
        for (change, joined) in frame.changes.iter().zip(joined) {
            let bytes = encode_compact(change.into());
            longest = longest.max(bytes.len());
            match pieces.last_mut().filter(|_| joined) {
                Some(last) => *last = [last.as_ref(), bytes.as_ref()].concat().into(),
                None => pieces.push(bytes),
            }
        }
        pieces.push(encode_trailer(&frame.trailer));
        let mut joiner = Joiner::default();
        let parts = split(pieces, most);
        let count = parts.len();
        for (index, part) in parts.into_iter().enumerate() {
            let bytes = part.concat();
            prop_assert!(bytes.len() <= most.max(longest + 2), "{} of {most}, longest {longest}", bytes.len());
            let joined = joiner.push(wire::Frame::decode(&*bytes).expect("a frame")).expect("what the model can hold");
            prop_assert_eq!(joined.is_some(), index + 1 == count);
            if let Some(joined) = joined {
                prop_assert_eq!(&joined, &frame);
            }
        }
    }

    #[test]
    fn frames_survive(changes in vec(change(), 0..5), trailer in trailer()) {
        let frame = Frame { changes, trailer };
        let wire = wire::Frame::decode(bytes_of(&frame).freeze()).expect("frames are valid protobuf");
        prop_assert_eq!(decode_frame(wire), Ok(frame));
    }

    #[test]
    fn unknown_fields_are_ignored(changes in vec(change(), 0..3), trailer in trailer(), payload in vec(any::<u8>(), 0..9)) {
        let frame = Frame { changes, trailer };
        let mut bytes = bytes_of(&frame);
        prost::encoding::bytes::encode(999, &payload, &mut bytes);
        let wire = wire::Frame::decode(bytes.freeze()).expect("still valid");
        prop_assert_eq!(decode_frame(wire), Ok(frame));
    }

    /// One damaged byte is refused by protobuf, refused with an error that names the field, or
    /// gives a different value; it never panics.
    #[test]
    fn damage_never_panics(changes in vec(change(), 1..4), at in any::<prop::sample::Index>(), with in any::<u8>()) {
        let frame = Frame { changes, trailer: Trailer::default() };
        let mut bytes = bytes_of(&frame);
        let at = at.index(bytes.len());
        bytes[at] = with;
        if let Ok(wire) = wire::Frame::decode(bytes.freeze()) {
            let _ = decode_frame(wire);
        }
    }

    #[test]
    fn noise_never_panics(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(wire) = wire::Frame::decode(&bytes[..]) {
            let _ = decode_frame(wire);
        }
        if let Ok(wire::Up { message: Some(wire::up::Message::Ack(ack)) }) = wire::Up::decode(&bytes[..]) {
            let _ = decode_ack(ack);
        }
    }

    #[test]
    fn messages_of_nodes_survive(
        change in upsert(),
        revision in any::<u64>(),
        message in "[a-z]{0,5}",
        key in namespaced(),
        addresses in vec(any::<IpAddr>(), 0..3),
    ) {
        let Change::Upsert(id, _) = change else { unreachable!("upsert makes upserts") };
        let ack = Ack { revision, errors: vec![(id, message)], plan_us: 1, commit_us: 2, traceparent: "t".into(), waited_us: 3 };
        let Some(wire::up::Message::Ack(sent)) = encode_ack(&ack).message else { panic!("not an ack") };
        prop_assert_eq!(decode_ack(sent), Ok(ack));
        let local = LocalEndpoint { key, addresses, uid: "u".into() };
        let Some(wire::up::Message::LocalEndpoint(sent)) = encode_local_endpoint(&local).message else { panic!("not an endpoint") };
        prop_assert_eq!(decode_local_endpoint(sent), Ok(local));
        let problems = vec![NodeProblem::new("routes", "there is none", revision % 2 == 0)];
        let Some(wire::up::Message::Problems(sent)) = encode_problems(&problems).message else { panic!("no problems") };
        prop_assert_eq!(decode_problems(sent), Ok(problems));
    }
}

fn refusal(record: wire::Record) -> Error {
    let change = wire::Change { change: Some(wire::change::Change::Upsert(record)) };
    let frame = wire::Frame { changes: vec![change], ..Default::default() };
    decode_frame(frame).expect_err("malformed")
}

fn record(id: wire::record_id::Id, value: wire::record::Value) -> wire::Record {
    wire::Record { id: Some(wire::RecordId { id: Some(id) }), value: Some(value) }
}

/// One line per kind of error: the message names the field, the value and the rule.
#[test]
fn an_older_server_means_the_failsafe_ports_that_it_had() {
    let settings = wire::Settings { endpoint_to_host: wire::EndpointToHost::Drop.into(), ..wire::Settings::default() };
    let id = wire::RecordId { id: Some(wire::record_id::Id::Settings(true)) };
    let value = |settings| Some(wire::record::Value::Settings(settings));
    let decode = |settings| match decode_record(wire::Record { id: Some(id.clone()), value: value(settings) }) {
        Ok((_, Record::Settings(settings))) => (settings.failsafe_inbound, settings.failsafe_outbound),
        other => panic!("{other:?}"),
    };
    assert_eq!(decode(settings.clone()), (Failsafe::default_inbound(), Failsafe::default_outbound()));
    let none = wire::Settings { failsafe_outbound: Some(wire::Failsafes::default()), ..settings };
    assert_eq!(decode(none), (Failsafe::default_inbound(), Vec::new()));
}

#[test]
fn faults_are_named() {
    use wire::record::Value;
    use wire::record_id::Id;
    let set = |members: wire::Members| {
        let kind = wire::SetKind::Net.into();
        record(Id::IpSet("s".into()), Value::IpSet(wire::IpSet { kind, members: Some(members) }))
    };
    let policy = |rule: wire::Rule| {
        let key = wire::PolicyKey { kind: "NetworkPolicy".into(), namespace: "a".into(), name: "b".into() };
        record(Id::Policy(key), Value::Policy(wire::Policy { ingress: vec![rule], ..Default::default() }))
    };
    let allow = || wire::Rule { action: wire::Action::Allow.into(), ..Default::default() };
    let listed = |place| {
        policy(wire::Rule { source: Some(wire::Side { port_list: Some(place), ..Default::default() }), ..allow() })
    };
    let ports = |first, last| {
        let ports = vec![wire::PortRange { first, last }];
        policy(wire::Rule { source: Some(wire::Side { ports, ..Default::default() }), ..allow() })
    };
    let table = [
        (wire::Record::default(), "record.id: missing, or of a kind that this version does not know"),
        (
            record(Id::Pool("x".into()), Value::Pool(wire::Pool::default())),
            "record_id.pool: \"x\" is not an IP range ADDRESS/LENGTH",
        ),
        (
            record(Id::Pool("10.0.0.0/8".into()), Value::Pool(wire::Pool::default())),
            "encapsulation: missing, or of a kind that this version does not know",
        ),
        (
            record(Id::Settings(true), Value::Pool(wire::Pool::default())),
            "record Settings: its value is of another kind than its id",
        ),
        (
            record(Id::Node("n".into()), Value::Node(wire::Node { vtep_mac: vec![1].into(), ..Default::default() })),
            "node.vtep_mac: 1 bytes, which is not 6",
        ),
        (
            record(
                Id::Node("n".into()),
                Value::Node(wire::Node {
                    vtep6_mac: vec![1; 6].into(),
                    vtep6_address: vec![1; 4].into(),
                    ..Default::default()
                }),
            ),
            "node.vtep6_address: 4 bytes, which is not 16",
        ),
        (
            set(wire::Members { net4: vec![10, 0, 0, 1].into(), ..Default::default() }),
            "members.net4: 4 bytes, which is not a whole number of entries",
        ),
        (
            set(wire::Members { net4: vec![10, 0, 0, 1, 33].into(), ..Default::default() }),
            "members.prefix_length: 33 is not within 0..=32",
        ),
        (
            set(wire::Members { port4: vec![0; 7].into(), ..Default::default() }),
            "members: 7 bytes, which is not 0, as the set is of the other kind",
        ),
        (policy(wire::Rule::default()), "rule.action: missing, or of a kind that this version does not know"),
        (policy(wire::Rule { ip_version: 5, ..allow() }), "rule.ip_version: 5 is not within 0, 4 or 6"),
        (policy(wire::Rule { protocol: Some(256), ..allow() }), "rule.protocol: 256 is not within 0..=255"),
        (listed(0), "side.port_list: 0 is not within the lists of the policy, alone"),
        (ports(2, 1), "ports.first: 2 is not within 0..=last"),
        (ports(0, 65536), "ports.last: 65536 is not within 0..=65535"),
    ];
    for (record, wanted) in table {
        assert_eq!(refusal(record).to_string(), wanted);
    }
}

#[test]
fn a_member_costs_five_bytes() {
    let members = (0..1000_u32).map(|i| Member::Net(Ipv4Net::from(Ipv4Addr::from(i)).into()));
    let record = Record::IpSet(IpSetRecord { kind: SetKind::Net, members: members.collect() });
    let change = Change::Upsert(RecordId::IpSet(SetId("s:x".into())), record);
    assert!(encode_change((&change).into()).len() < 5000 + 40);
}
