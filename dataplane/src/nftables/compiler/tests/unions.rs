//! Unions of sets: rules of many policies are few lookups, and a change costs few elements.

use std::net::{IpAddr, Ipv4Addr};

use margay_api::endpoint::interface_name;
use margay_api::rule::{Action, PortRange, Protocol};
use margay_calc::flush::MemberDelta;
use margay_calc::model::{
    EndpointRecord, Member, RuleRecord, SetKind as MemberKind, SideMatch, TierBinding,
};

use super::*;
use crate::nftables::sample::{mk_address, mk_net, mk_packet, mk_pod, mk_policy_key, mk_rule};
use crate::nftables::simulate::{self, Packet};
use margay_nft::Hook;

/// Rules of many policies for the same port, each with other senders, are one lookup; a new member
/// of one of them is one element.
#[test]
fn two_hundred_policies_are_one_rule() {
    let mut records = mk_records();
    let sets: Vec<SetId> = (0..200)
        .map(|number| SetId(format!("s:many{number}")))
        .collect();
    for (number, set) in sets.iter().enumerate() {
        let members = BTreeSet::from([Member::Net(mk_net(&format!("10.1.{number}.1/32")))]);
        records.insert(
            RecordId::IpSet(set.clone()),
            Record::IpSet(IpSetRecord {
                kind: MemberKind::Net,
                members,
            }),
        );
        let source = SideMatch {
            sets: vec![set.clone()],
            ..SideMatch::default()
        };
        let destination = SideMatch {
            ports: [PortRange::single(80)].into(),
            ..SideMatch::default()
        };
        let rule = RuleRecord {
            protocol: Some(Protocol::TCP),
            source,
            destination,
            ..mk_rule(Action::Allow)
        };
        let policy = PolicyRecord {
            ingress: vec![rule],
            egress: Vec::new(),
        };
        records.insert(
            RecordId::Policy(mk_policy_key(100 + number)),
            Record::Policy(policy),
        );
    }
    let (key, addresses) = mk_pod(0);
    let ingress = (0..200).map(|number| mk_policy_key(100 + number)).collect();
    let tier = TierBinding {
        name: "default".to_owned(),
        default_action: Action::Deny,
        ingress,
        egress: Vec::new(),
    };
    let endpoint = EndpointRecord {
        interface: interface_name(&key),
        uid: String::new(),
        addresses,
        tiers: vec![tier],
        unmatched: Action::Allow,
    };
    records.insert(RecordId::Endpoint(key), Record::Endpoint(endpoint));
    let mut compiler = mk_compiler(&records);
    let fate = |compiler: &Compiler, records: &Records, source: &str| {
        let packet = Packet {
            protocol: 6,
            ports: Some((4000, 80)),
            ..mk_packet(source, "10.0.0.0")
        };
        simulate::run(&compiler.ruleset(records), Hook::Forward, &packet)
    };
    let last = fate(&compiler, &records, "10.1.199.1");
    assert!(last.passed && last.rules < 20, "{last:?}");
    assert!(!fate(&compiler, &records, "10.1.199.2").passed);

    let member = Member::Net(mk_net("10.1.199.2/32"));
    let Some(Record::IpSet(set)) = records.get_mut(&RecordId::IpSet(sets[3].clone())) else {
        panic!("it was put there")
    };
    set.members.insert(member.clone());
    let delta = MemberDelta {
        added: [member].into(),
        removed: BTreeSet::new(),
    };
    let dirty = Dirty {
        records: BTreeSet::new(),
        members: BTreeMap::from([(sets[3].clone(), delta)]),
    };
    let transaction = compiler.apply(&records, &dirty);
    assert_eq!(transaction.ops().len(), 2, "{transaction}");
    assert!(fate(&compiler, &records, "10.1.199.2").passed);
}

/// A pod with `policies` policies of one rule each, and a second pod with one policy.
fn mk_crowded(policies: usize, port: impl Fn(usize) -> u16) -> Records {
    let mut records = Records::new();
    for number in 0..policies {
        let source = SideMatch {
            sets: vec![SetId(format!("s:{number}"))],
            ..SideMatch::default()
        };
        let destination = SideMatch {
            ports: [PortRange::single(port(number))].into(),
            ..SideMatch::default()
        };
        let rule = RuleRecord {
            protocol: Some(Protocol::TCP),
            source,
            destination,
            ..mk_rule(Action::Allow)
        };
        let member = Member::Net(mk_net(&format!(
            "10.1.{}.{}/32",
            number / 256,
            number % 256
        )));
        let set = IpSetRecord {
            kind: MemberKind::Net,
            members: BTreeSet::from([member]),
        };
        records.insert(
            RecordId::IpSet(SetId(format!("s:{number}"))),
            Record::IpSet(set),
        );
        let policy = PolicyRecord {
            ingress: vec![rule],
            egress: Vec::new(),
        };
        records.insert(
            RecordId::Policy(mk_policy_key(number)),
            Record::Policy(policy),
        );
    }
    for (number, policies) in [(0, 0..policies), (1, 0..1)] {
        let (key, addresses) = mk_pod(number);
        let tier = TierBinding {
            name: "default".to_owned(),
            default_action: Action::Deny,
            ingress: policies.map(mk_policy_key).collect(),
            egress: Vec::new(),
        };
        let interface = interface_name(&key);
        let record = EndpointRecord {
            interface,
            uid: String::new(),
            addresses,
            tiers: vec![tier],
            unmatched: Action::Allow,
        };
        records.insert(RecordId::Endpoint(key), Record::Endpoint(record));
    }
    records
}

/// The names that a transaction touches.
fn touched(transaction: &Transaction) -> BTreeSet<String> {
    use TransactionOp as Op;
    let name = |op: &TransactionOp| match op {
        Op::PutChain(name, _)
        | Op::FlushChain(name)
        | Op::DeleteChain(name)
        | Op::AppendRules(name, ..) => name.to_string(),
        Op::CreateSet(name, _)
        | Op::DeleteSet(name)
        | Op::AddElements(name, _)
        | Op::DeleteElements(name, _) => name.to_string(),
        Op::CreateTable | Op::DeleteTable => "table".to_owned(),
    };
    transaction.ops().iter().map(name).collect()
}

#[test]
fn a_changed_rule_touches_its_chain_and_its_piece_of_a_union() {
    for own_ports in [false, true] {
        let mut records = mk_crowded(
            1000,
            |number| if own_ports { 1000 + number as u16 } else { 80 },
        );
        let mut compiler = fresh(&records, &[0, 1]);
        let chains = compiler.ruleset(&records).chains.len();
        let key = RecordId::Policy(mk_policy_key(500));
        let Some(Record::Policy(policy)) = records.get_mut(&key) else {
            panic!("it is there")
        };
        policy.ingress[0].source.sets = vec![SetId("s:7".to_owned())];
        policy.ingress[0].destination.ports = [PortRange::single(8443)].into();
        let dirty = Dirty {
            records: BTreeSet::from([key]),
            members: BTreeMap::new(),
        };
        let transaction = compiler.apply(&records, &dirty);
        let (sets, changed): (Vec<_>, Vec<_>) =
            touched(&transaction).into_iter().partition(|name| {
                name.starts_with("s4")
                    || name.starts_with("s6")
                    || name.starts_with("p4")
                    || name.starts_with("p6")
            });
        // One chain per family; and of the unions that the rule leaves and enters, the old and the
        // new set.
        assert_eq!(changed.len(), 2, "of {chains} chains: {changed:?}");
        assert!(sets.len() <= 8, "{sets:?}");
        let elements: usize = transaction
            .ops()
            .iter()
            .map(|op| {
                if let TransactionOp::AddElements(_, set) = op {
                    set.elements.len()
                } else {
                    0
                }
            })
            .sum();
        assert!(elements < 300, "{elements} elements of a thousand");
    }
}

#[test]
fn a_member_of_a_union_costs_an_element_of_each_set() {
    let mut records = mk_crowded(1000, |number| 1000 + number as u16);
    let mut compiler = fresh(&records, &[0, 1]);
    let set = SetId("s:500".to_owned());
    let member = Member::Net(mk_net("10.9.9.9/32"));
    let Some(Record::IpSet(record)) = records.get_mut(&RecordId::IpSet(set.clone())) else {
        panic!("it is there")
    };
    record.members.insert(member.clone());
    let members = MemberDelta {
        added: BTreeSet::from([member]),
        removed: BTreeSet::new(),
    };
    let dirty = Dirty {
        records: BTreeSet::new(),
        members: BTreeMap::from([(set, members)]),
    };
    let transaction = compiler.apply(&records, &dirty);
    assert_eq!(
        transaction.ops().len(),
        2,
        "the set, and the union with its port:\n{transaction}"
    );
}

#[test]
fn a_packet_crosses_few_rules_under_a_thousand() {
    for own_ports in [false, true] {
        let records = mk_crowded(
            1000,
            |number| if own_ports { 1000 + number as u16 } else { 80 },
        );
        let ruleset = fresh(&records, &[0, 1]).ruleset(&records);
        let port = if own_ports { 1999 } else { 80 };
        let packet = Packet {
            source: mk_address("10.1.3.231"),
            protocol: Protocol::TCP.0,
            ports: Some((40_000, port)),
            ..mk_packet("192.0.2.7", "10.0.0.0")
        };
        let fate = simulate::run(&ruleset, Hook::Forward, &packet);
        assert!(fate.passed, "the last rule admits it");
        assert!(fate.rules <= 32, "{} rules", fate.rules);
        let other = Packet {
            source: mk_address("10.1.0.1"),
            ..packet
        };
        assert_eq!(
            simulate::run(&ruleset, Hook::Forward, &other).passed,
            !own_ports,
            "the ports of another rule"
        );
    }
}

/// Addresses are in a hash set and ranges in an interval set; a change costs one element, however
/// many there are.
#[test]
fn a_member_of_a_large_set_costs_one_element() {
    let set = SetId("s:0".to_owned());
    let single =
        |number: u32| Member::Net(IpAddr::from(Ipv4Addr::from_bits(0x0b00_0000 + number)).into());
    let range = |number: u32| {
        Member::Net(mk_net(&format!(
            "12.{}.{}.0/24",
            number / 256,
            number % 256
        )))
    };
    let mut records = mk_crowded(1, |_| 80);
    let mut members: BTreeSet<Member> = (0..100_000)
        .map(single)
        .chain((0..1000).map(range))
        .collect();
    let record = |members: &BTreeSet<Member>| {
        Record::IpSet(IpSetRecord {
            kind: MemberKind::Net,
            members: members.clone(),
        })
    };
    records.insert(RecordId::IpSet(set.clone()), record(&members));
    let mut compiler = fresh(&records, &[0, 1]);
    let sizes: Vec<usize> = compiler
        .ruleset(&records)
        .sets
        .values()
        .map(|set| set.elements.len())
        .collect();
    assert!(
        sizes.contains(&100_000) && sizes.contains(&1000),
        "{sizes:?}"
    );
    for (gone, new) in [(single(7), single(100_000)), (range(7), range(1000))] {
        members.remove(&gone);
        members.insert(new.clone());
        records.insert(RecordId::IpSet(set.clone()), record(&members));
        let delta = MemberDelta {
            added: BTreeSet::from([new]),
            removed: BTreeSet::from([gone]),
        };
        let dirty = Dirty {
            records: BTreeSet::new(),
            members: BTreeMap::from([(set.clone(), delta)]),
        };
        let transaction = compiler.apply(&records, &dirty);
        assert_eq!(
            transaction.ops().len(),
            2,
            "one goes, one comes:\n{transaction}"
        );
        assert!(
            transaction.to_string().len() < 400,
            "and no other is named:\n{transaction}"
        );
    }
    assert_eq!(
        compiler.ruleset(&records),
        fresh(&records, &[0, 1]).ruleset(&records),
        "as if it had always been so"
    );
}
