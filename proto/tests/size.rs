//! Sizes of messages.
#![cfg(feature = "sync")]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use bytes::Bytes;
use ipnet::Ipv4Net;
use margay_api::policy::{PolicyKey, PolicyKind};
use margay_api::rule::{Action, PortRange, Protocol};
use margay_calc::flush::MemberDelta;
use margay_calc::model::{
    IpSetRecord, Member, PolicyRecord, Record, RecordId, RuleRecord, SetId, SetKind, SideMatch,
};
use margay_proto::sync::{
    Ack, Change, MAX_UP, PART_SIZE, decode_frame, decode_local_endpoint, encode_ack,
    encode_compact, split, wire,
};
use prost::Message;

#[test]
fn a_rule_for_each_of_many_peers_costs_the_peer_and_not_its_ports() {
    let ports: Arc<[PortRange]> = (0..1000).map(|port| PortRange::single(2 * port)).collect();
    let port_sets: Arc<[SetId]> = (0..1000)
        .map(|number| SetId(format!("n:{number:040}")))
        .collect();
    let rule = |number: usize| RuleRecord {
        action: Action::Allow,
        ip_version: None,
        protocol: Some(Protocol::TCP),
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: SideMatch {
            sets: vec![SetId(format!("s:{number:040}"))],
            ..SideMatch::default()
        },
        destination: SideMatch {
            ports: ports.clone(),
            port_sets: port_sets.clone(),
            ..SideMatch::default()
        },
    };
    let policy = PolicyRecord {
        ingress: (0..1000).map(rule).collect(),
        egress: Vec::new(),
    };
    let key = PolicyKey {
        kind: PolicyKind::NetworkPolicy,
        namespace: "x".into(),
        name: "p".into(),
    };
    let change = Change::Upsert(RecordId::Policy(key), Record::Policy(policy));
    let bytes = encode_compact((&change).into());
    assert!(bytes.len() < 150_000, "{}", bytes.len());
    let frame = decode_frame(wire::Frame::decode(bytes).expect("a frame"))
        .expect("what the model can hold");
    let Change::Upsert(_, Record::Policy(decoded)) = &frame.changes[0] else {
        panic!("{frame:?}")
    };
    let lists: BTreeSet<_> = decoded
        .ingress
        .iter()
        .map(|rule| rule.destination.port_sets.as_ptr())
        .collect();
    assert_eq!(lists.len(), 1, "one list in memory");
    assert_eq!(frame.changes, [change]);
}

#[test]
fn a_large_set_comes_in_several_changes() {
    let members = |from: u32, to: u32| {
        (from..to)
            .map(|i| Member::Net(Ipv4Net::from(Ipv4Addr::from(i)).into()))
            .collect()
    };
    let set = SetId("s:x".into());
    let record = Record::IpSet(IpSetRecord {
        kind: SetKind::Net,
        members: members(0, 100_000),
    });
    let delta = MemberDelta {
        added: members(0, 50_000),
        removed: members(60_000, 99_000),
    };
    for change in [
        Change::Upsert(RecordId::IpSet(set.clone()), record),
        Change::Members(set, SetKind::Net, delta),
    ] {
        let bytes = encode_compact((&change).into());
        let mut part = split(vec![bytes.clone(), Bytes::new()], PART_SIZE / 8)
            .into_iter()
            .map(|part| part.iter().map(Bytes::len).sum::<usize>());
        assert!(part.all(|length| length <= PART_SIZE / 8));
        let frame = decode_frame(wire::Frame::decode(bytes).expect("a frame"))
            .expect("what the model can hold");
        assert!(frame.changes.len() > 3);
        let mut all = MemberDelta::default();
        for one in frame.changes {
            match one {
                Change::Upsert(_, Record::IpSet(first)) => all.added.extend(first.members),
                Change::Members(_, _, delta) => {
                    all.added.extend(delta.added);
                    all.removed.extend(delta.removed);
                }
                other => panic!("{other:?}"),
            }
        }
        match change {
            Change::Upsert(_, Record::IpSet(whole)) => assert_eq!(all.added, whole.members),
            Change::Members(_, _, delta) => assert_eq!(all, delta),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn messages_of_nodes_are_short() {
    let message = |name: &str, addresses: usize, uid: &str| wire::LocalEndpoint {
        namespace: "x".into(),
        name: name.into(),
        addresses: vec!["10.0.0.1".into(); addresses],
        uid: uid.into(),
    };
    let long = "x".repeat(254);
    for (endpoint, fits) in [
        (message("a", 8, "u"), true),
        (message("a", 9, "u"), false),
        (message(&long[1..], 1, "u"), true),
        (message(&long, 1, "u"), false),
        (message("a", 1, &long), false),
    ] {
        assert_eq!(
            decode_local_endpoint(endpoint.clone()).is_ok(),
            fits,
            "{endpoint:?}"
        );
    }
    let key = |number: usize| PolicyKey {
        kind: PolicyKind::StagedGlobalNetworkPolicy,
        namespace: long.clone(),
        name: format!("{number}{}", &long[5..]),
    };
    let errors = (0..10_000).map(|number| (RecordId::Policy(key(number)), "é".repeat(4000)));
    let ack = encode_ack(&Ack {
        errors: errors.collect(),
        ..Ack::default()
    });
    assert!(ack.encoded_len() <= MAX_UP, "{}", ack.encoded_len());
}
