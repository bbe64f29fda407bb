//! Large sets: a change is flushed as a delta, not as the whole set.

use std::net::Ipv4Addr;

use ipnet::IpNet;
use margay_api::endpoint::{EndpointKey, WorkloadEndpoint};
use margay_api::meta::NamespacedName;
use margay_api::network::NetworkSet;
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, Traffic};
use margay_api::rule::{Action, EntityMatch, Rule};
use margay_api::selector::Selector;
use margay_calc::flush::Change;
use margay_calc::graph::Graph;
use margay_calc::model::{Member, Record, RecordId};
use margay_calc::update::Update;

/// Members of a set.
const MANY: u32 = 100_000;

/// Addresses in a row, as ranges of one.
fn nets(numbers: std::ops::Range<u32>) -> impl Iterator<Item = IpNet> {
    numbers.map(|number| {
        IpNet::from(std::net::IpAddr::V4(Ipv4Addr::from_bits(
            0x0b00_0000 + number,
        )))
    })
}

fn set(name: &str, nets: impl Iterator<Item = IpNet>) -> Update {
    let labels = [("kind".to_owned(), "listed".to_owned())].into();
    Update::NetworkSet(
        NamespacedName::new("", name),
        Some(NetworkSet {
            labels,
            nets: nets.collect(),
        }),
    )
}

/// A graph with a pod on n1 that the listed addresses may reach, and two sets with one address in
/// common.
fn mk_graph() -> Graph {
    let source = Selector::parse("kind == 'listed'").expect("a selector");
    let source = EntityMatch {
        selector: Some(source),
        ..EntityMatch::default()
    };
    let policy = Policy {
        tier: "default".to_owned(),
        order: Order(None),
        selector: Selector::parse("all()").expect("a selector"),
        traffic: Traffic::Normal,
        applies_ingress: true,
        applies_egress: false,
        ingress: vec![Rule {
            source,
            ..Rule::any(Action::Allow)
        }],
        egress: Vec::new(),
    };
    let key = PolicyKey {
        kind: PolicyKind::GlobalNetworkPolicy,
        namespace: String::new(),
        name: "listed".to_owned(),
    };
    let pod = WorkloadEndpoint {
        node: "n1".to_owned(),
        labels: [].into(),
        service_account: String::new(),
        addresses: vec![Ipv4Addr::new(10, 0, 0, 1).into()],
        ports: Vec::new(),
        uid: String::new(),
        interface: "cali1".to_owned(),
    };
    let mut graph = Graph::default();
    graph.apply(Update::Policy(key, Some(policy)));
    graph.apply(Update::Endpoint(EndpointKey::new("red", "pod"), Some(pod)));
    graph.apply(set("large", nets(0..MANY)));
    graph.apply(set("other", nets(0..1)));
    graph.flush();
    graph
}

/// Flushes, and returns the members that the only changed record gained and lost.
fn flush_delta(graph: &mut Graph) -> (Vec<Member>, Vec<Member>) {
    let flush = graph.flush();
    let changes: Vec<_> = flush.records.iter().collect();
    let [(RecordId::IpSet(_), change)] = changes[..] else {
        panic!("{changes:?}")
    };
    assert!(
        change.gained.is_empty() && change.lost.is_empty() && change.kept.contains("n1"),
        "{change:?}"
    );
    let Change::Members(delta) = &change.change else {
        panic!("a delta is flushed")
    };
    (
        delta.added.iter().cloned().collect(),
        delta.removed.iter().cloned().collect(),
    )
}

fn members(numbers: std::ops::Range<u32>) -> Vec<Member> {
    nets(numbers).map(Member::Net).collect()
}

#[test]
fn a_change_of_a_large_set_is_flushed_as_a_delta() {
    let mut graph = mk_graph();
    graph.apply(set("large", nets(1..MANY + 1)));
    // The first one is still in the other set.
    assert_eq!(
        flush_delta(&mut graph),
        (members(MANY..MANY + 1), Vec::new())
    );
    graph.apply(set("other", [].into_iter()));
    assert_eq!(flush_delta(&mut graph), (Vec::new(), members(0..1)));
    graph.apply(set(
        "large",
        nets(1..MANY + 1).collect::<Vec<_>>().into_iter().rev(),
    ));
    assert!(
        graph.flush().records.is_empty(),
        "another order of the same members is no change"
    );
}

#[test]
fn what_is_listed_twice_is_a_member_once() {
    let mut graph = mk_graph();
    graph.apply(set("large", nets(0..MANY).chain(nets(0..MANY))));
    assert!(graph.flush().records.is_empty());
    let view = graph.view("n1");
    let sizes: Vec<usize> = view
        .ids()
        .filter_map(|id| match view.record(&id)?.as_ref() {
            Record::IpSet(set) => Some(set.members.len()),
            _ => None,
        })
        .collect();
    assert_eq!(sizes, [MANY as usize]);
}
