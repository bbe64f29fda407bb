//! Decoding inverts encoding; unknown fields are ignored; malformed messages are refused without a
//! panic.
#![cfg(feature = "sync")]

mod bgp;
mod strategies;

use std::net::{IpAddr, Ipv4Addr};

use bytes::{Bytes, BytesMut};
use ipnet::Ipv4Net;
use margay_api::settings::Failsafe;
use margay_calc::model::{IpSetRecord, Member, Record, RecordId, SetId, SetKind};
use margay_proto::sync::{
    Ack, Change, Error, Frame, Joiner, LocalEndpoint, NodeProblem, Trailer, decode_ack,
    decode_frame, decode_local_endpoint, decode_problems, decode_record, encode_ack, encode_change,
    encode_compact, encode_local_endpoint, encode_problems, encode_trailer, split, wire,
};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

use strategies::{change, namespaced, sharing, trailer, upsert};

fn bytes_of(frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::new();
    for change in &frame.changes {
        bytes.extend_from_slice(&encode_change(change.into()));
    }
    bytes.extend_from_slice(&encode_trailer(&frame.trailer));
    bytes
}

proptest! {
    #[test]
    fn the_compact_form_means_the_same(
        changes in vec(prop_oneof![1 => change(), 2 => sharing()], 0..5),
        trailer in trailer(),
    ) {
        let frame = Frame { changes, trailer };
        let mut bytes = BytesMut::new();
        frame.changes.iter().for_each(
            |change| bytes.extend_from_slice(&encode_compact(change.into())),
        );
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
            prop_assert!(
                bytes.len() <= most.max(longest + 2),
                "{} of {most}, longest {longest}",
                bytes.len(),
            );
            let joined = joiner.push(wire::Frame::decode(&*bytes).expect("a frame")).expect(
                "what the model can hold",
            );
            prop_assert_eq!(joined.is_some(), index + 1 == count);
            if let Some(joined) = joined {
                prop_assert_eq!(&joined, &frame);
            }
        }
    }

    #[test]
    fn frames_survive(changes in vec(change(), 0..5), trailer in trailer()) {
        let frame = Frame { changes, trailer };
        let wire = wire::Frame::decode(bytes_of(&frame).freeze()).expect(
            "frames are valid protobuf",
        );
        prop_assert_eq!(decode_frame(wire), Ok(frame));
    }

    #[test]
    fn unknown_fields_are_ignored(
        changes in vec(change(), 0..3),
        trailer in trailer(),
        payload in vec(any::<u8>(), 0..9),
    ) {
        let frame = Frame { changes, trailer };
        let mut bytes = bytes_of(&frame);
        prost::encoding::bytes::encode(999, &payload, &mut bytes);
        let wire = wire::Frame::decode(bytes.freeze()).expect("still valid");
        prop_assert_eq!(decode_frame(wire), Ok(frame));
    }

    /// One damaged byte is refused by protobuf, refused with an error that names the field, or
    /// gives a different value; it never panics.
    #[test]
    fn damage_never_panics(
        changes in vec(change(), 1..4),
        at in any::<prop::sample::Index>(),
        with in any::<u8>(),
    ) {
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
        if let Ok(
            wire::Up { message: Some(wire::up::Message::Ack(ack)) },
        ) = wire::Up::decode(&bytes[..]) {
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
        let ack = Ack {
            revision,
            errors: vec![(id, message)],
            plan_us: 1,
            commit_us: 2,
            traceparent: "t".into(), waited_us: 3,
        };
        let Some(wire::up::Message::Ack(sent)) = encode_ack(&ack).message else {
            panic!("not an ack")
        };
        prop_assert_eq!(decode_ack(sent), Ok(ack));
        let local = LocalEndpoint { key, addresses, uid: "u".into() };
        let Some(
            wire::up::Message::LocalEndpoint(sent),
        ) = encode_local_endpoint(&local).message else { panic!("not an endpoint") };
        prop_assert_eq!(decode_local_endpoint(sent), Ok(local));
        let problems = vec![NodeProblem::new("routes", "there is none", revision % 2 == 0)];
        let Some(wire::up::Message::Problems(sent)) = encode_problems(&problems).message else {
            panic!("no problems")
        };
        prop_assert_eq!(decode_problems(sent), Ok(problems));
    }
}

fn refusal(record: wire::Record) -> Error {
    let change = wire::Change {
        change: Some(wire::change::Change::Upsert(record)),
    };
    let frame = wire::Frame {
        changes: vec![change],
        ..Default::default()
    };
    decode_frame(frame).expect_err("malformed")
}

fn record(id: wire::record_id::Id, value: wire::record::Value) -> wire::Record {
    wire::Record {
        id: Some(wire::RecordId { id: Some(id) }),
        value: Some(value),
    }
}

/// One line per kind of error: the message names the field, the value and the rule.
#[test]
fn an_older_server_means_the_failsafe_ports_that_it_had() {
    let settings = wire::Settings {
        endpoint_to_host: wire::EndpointToHost::Drop.into(),
        ..wire::Settings::default()
    };
    let id = wire::RecordId {
        id: Some(wire::record_id::Id::Settings(true)),
    };
    let value = |settings| Some(wire::record::Value::Settings(settings));
    let decode = |settings| match decode_record(wire::Record {
        id: Some(id.clone()),
        value: value(settings),
    }) {
        Ok((_, Record::Settings(settings))) => {
            (settings.failsafe_inbound, settings.failsafe_outbound)
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(
        decode(settings.clone()),
        (Failsafe::default_inbound(), Failsafe::default_outbound())
    );
    let none = wire::Settings {
        failsafe_outbound: Some(wire::Failsafes::default()),
        ..settings
    };
    assert_eq!(decode(none), (Failsafe::default_inbound(), Vec::new()));
}

#[test]
fn faults_are_named() {
    use wire::record::Value;
    use wire::record_id::Id;
    let set = |members: wire::Members| {
        let kind = wire::SetKind::Net.into();
        record(
            Id::IpSet("s".into()),
            Value::IpSet(wire::IpSet {
                kind,
                members: Some(members),
            }),
        )
    };
    let policy = |rule: wire::Rule| {
        let key = wire::PolicyKey {
            kind: "NetworkPolicy".into(),
            namespace: "a".into(),
            name: "b".into(),
        };
        record(
            Id::Policy(key),
            Value::Policy(wire::Policy {
                ingress: vec![rule],
                ..Default::default()
            }),
        )
    };
    let allow = || wire::Rule {
        action: wire::Action::Allow.into(),
        ..Default::default()
    };
    let listed = |place| {
        policy(wire::Rule {
            source: Some(wire::Side {
                port_list: Some(place),
                ..Default::default()
            }),
            ..allow()
        })
    };
    let ports = |first, last| {
        let ports = vec![wire::PortRange { first, last }];
        policy(wire::Rule {
            source: Some(wire::Side {
                ports,
                ..Default::default()
            }),
            ..allow()
        })
    };
    let table = [
        (
            wire::Record::default(),
            "record.id: missing, or of a kind that this version does not know",
        ),
        (
            record(Id::Pool("x".into()), Value::Pool(wire::Pool::default())),
            "record_id.pool: \"x\" is not an IP range ADDRESS/LENGTH",
        ),
        (
            record(
                Id::Pool("10.0.0.0/8".into()),
                Value::Pool(wire::Pool::default()),
            ),
            "encapsulation: missing, or of a kind that this version does not know",
        ),
        (
            record(Id::Settings(true), Value::Pool(wire::Pool::default())),
            "record Settings: its value is of another kind than its id",
        ),
        (
            record(
                Id::Node("n".into()),
                Value::Node(wire::Node {
                    vtep_mac: vec![1].into(),
                    ..Default::default()
                }),
            ),
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
            set(wire::Members {
                net4: vec![10, 0, 0, 1].into(),
                ..Default::default()
            }),
            "members.net4: 4 bytes, which is not a whole number of entries",
        ),
        (
            set(wire::Members {
                net4: vec![10, 0, 0, 1, 33].into(),
                ..Default::default()
            }),
            "members.prefix_length: 33 is not within 0..=32",
        ),
        (
            set(wire::Members {
                port4: vec![0; 7].into(),
                ..Default::default()
            }),
            "members: 7 bytes, which is not 0, as the set is of the other kind",
        ),
        (
            policy(wire::Rule::default()),
            "rule.action: missing, or of a kind that this version does not know",
        ),
        (
            policy(wire::Rule {
                ip_version: 5,
                ..allow()
            }),
            "rule.ip_version: 5 is not within 0, 4 or 6",
        ),
        (
            policy(wire::Rule {
                protocol: Some(256),
                ..allow()
            }),
            "rule.protocol: 256 is not within 0..=255",
        ),
        (
            listed(0),
            "side.port_list: 0 is not within the lists of the policy, alone",
        ),
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
    let record = Record::IpSet(IpSetRecord {
        kind: SetKind::Net,
        members: members.collect(),
    });
    let change = Change::Upsert(RecordId::IpSet(SetId("s:x".into())), record);
    assert!(encode_change((&change).into()).len() < 5000 + 40);
}
