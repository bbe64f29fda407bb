//! What every implementation of [`Dataplane`] does: cases over random views, histories and packets.
//!
//! [`conformance!`](crate::conformance!) makes a test of each case for an implementation that is
//! named:
//!
//! ```ignore
//! margay_dataplane::conformance!(Simulated);
//! ```

mod host;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::net::IpAddr;
use std::time::Instant;

use margay_api::endpoint::{EndpointKey, interface_name};
use margay_calc::evaluate::Direction::{Egress, Ingress};
use margay_calc::model::{Record, RecordId};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::nftables::sample::{self, NODE, mk_links, mk_packet, mk_pod};
use crate::nftables::simulate::Packet;
use crate::{Attached, Committed, Dataplane, Dirty, Links, Records};

/// Random views, or histories, per case.
const CASES: u32 = 256;

/// An implementation together with the kernel that it programs.
pub trait Subject {
    /// Everything of ours that the kernel holds.
    type State: PartialEq + Debug;

    /// One for this node, whose kernel holds nothing of ours.
    fn new(node: &str) -> Self;
    /// The implementation.
    fn dataplane(&mut self) -> &mut dyn Dataplane;
    /// What the kernel holds; panics if the kernel would not take it.
    fn state(&self) -> Self::State;
    /// Whether a packet gets through by what the kernel holds, and the prefixes of the reports on
    /// its way.
    fn travel(&self, packet: &Packet, way: Way) -> (bool, Vec<String>);
    /// Takes away a part of what the kernel holds, as another program might.
    fn damage(&mut self);
}

/// Where a packet comes from and goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From outside or a pod to the node itself.
    ToHost,
    /// Through the node.
    Forwarded,
    /// From the node itself.
    FromHost,
}

/// Makes a test of every case for a [`Subject`](crate::conformance::Subject).
#[macro_export]
macro_rules! conformance {
    ($subject:ty) => {
        $crate::conformance! {
            $subject:
            a_packet_has_the_verdict_of_the_records
            a_packet_has_the_verdict_of_the_records_at_host_endpoints
            following_changes_ends_where_a_fresh_start_does
            a_commit_leaves_nothing_to_do
            what_others_take_away_is_put_back
            a_pod_without_a_record_is_cut_off
        }
    };
    ($subject:ty: $($case:ident)*) => {$(
        #[test]
        fn $case() {
            $crate::conformance::$case::<$subject>();
        }
    )*};
}

/// Every record, as after a start.
pub fn all_dirty(records: &Records) -> Dirty {
    Dirty {
        records: records.keys().cloned().collect(),
        members: BTreeMap::new(),
    }
}

/// The interface of a pod of the sample, and the pod.
pub fn mk_attached(number: usize) -> (String, Attached) {
    let (endpoint, addresses) = mk_pod(number);
    (
        interface_name(&endpoint),
        Attached {
            endpoint,
            uid: String::new(),
            addresses,
            host_ports: Vec::new(),
        },
    )
}

/// A fresh one that has committed this view.
fn fresh<S: Subject>(records: &Records, links: &Links, pods: impl IntoIterator<Item = usize>) -> S {
    let mut subject = S::new(NODE);
    let dataplane = subject.dataplane();
    dataplane.set_links(links.clone());
    dataplane.update(records, &all_dirty(records));
    for number in pods {
        let (interface, pod) = mk_attached(number);
        dataplane.attach(interface, pod, records);
    }
    commit(&mut subject, records);
    subject
}

fn commit(subject: &mut impl Subject, records: &Records) -> Committed {
    subject
        .dataplane()
        .commit(records, Instant::now())
        .expect("the kernel takes it")
}

fn pod_of(address: IpAddr) -> Option<EndpointKey> {
    (0..3)
        .map(mk_pod)
        .find(|(_, addresses)| addresses.contains(&address))
        .map(|(key, _)| key)
}

/// Forwarded packets pass and are reported as the reference evaluator says.
pub fn a_packet_has_the_verdict_of_the_records<S: Subject>() {
    proptest!(ProptestConfig::with_cases(CASES), |(
        view in sample::view(),
        packets in vec(sample::packet(), 60),
    )| {
        let subject: S = fresh(&view, &Links::new(), 0..3);
        for packet in packets {
            let says = |address, direction| match pod_of(address) {
                Some(pod) => sample::decides(&view, &pod, direction, &packet),
                None => (true, Vec::new()),
            };
            let (mut allowed, mut reports) = says(packet.source, Egress);
            if allowed {
                let (incoming, more) = says(packet.destination, Ingress);
                allowed = incoming;
                reports.extend(more);
            }
            let fate = subject.travel(&packet, Way::Forwarded);
            prop_assert_eq!(fate, (allowed, reports), "{:?}\n{:?}", packet, subject.state());
        }
    });
}

/// So do packets of interfaces that have host endpoints, whichever way they take.
pub fn a_packet_has_the_verdict_of_the_records_at_host_endpoints<S: Subject>() {
    let packets = vec(host::packet(), 60);
    proptest!(ProptestConfig::with_cases(CASES), |(
        view in sample::host_view(),
        packets in packets,
    )| {
        let links = mk_links();
        let subject: S = fresh(&view, &links, 0..3);
        for (packet, way) in packets {
            // Packets of a pod to its node are not subject to host endpoints.
            if pod_of(packet.source).is_some() && way != Way::Forwarded {
                continue;
            }
            let expected = host::oracle(&view, &links, &packet, way);
            prop_assert_eq!(
                subject.travel(&packet, way),
                expected,
                "{:?}\n{:?}",
                packet,
                subject.state(),
            );
        }
    });
}

/// A step of a history.
#[derive(Clone, Debug)]
enum Step {
    View(Box<Records>),
    Attach(usize),
    Detach(usize),
    Links(Links),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => sample::host_view().prop_map(|view| Step::View(Box::new(view))),
        1 => select(vec![Links::new(), mk_links()]).prop_map(Step::Links),
        1 => (0..3_usize).prop_map(Step::Attach),
        1 => (0..3_usize).prop_map(Step::Detach),
    ]
}

/// The difference between the records held and the view, member by member for sets that stay.
fn difference(held: &Records, view: &Records) -> Dirty {
    let mut dirty = Dirty::default();
    let ids: BTreeSet<&RecordId> = held.keys().chain(view.keys()).collect();
    for id in ids {
        match (id, held.get(id), view.get(id)) {
            (RecordId::IpSet(set), Some(Record::IpSet(old)), Some(Record::IpSet(new)))
                if old.kind == new.kind =>
            {
                old.members
                    .symmetric_difference(&new.members)
                    .for_each(|member| {
                        dirty.mark_member(set, member.clone(), new.members.contains(member));
                    });
            }
            (_, old, new) if old != new => dirty.mark(id.clone()),
            _ => {}
        }
    }
    dirty
}

/// Whatever came before, the kernel ends up with what a new one would have made of the same view,
/// pods and links.
pub fn following_changes_ends_where_a_fresh_start_does<S: Subject>() {
    proptest!(ProptestConfig::with_cases(CASES), |(history in vec(step(), 1..8))| {
        let (mut records, mut pods, mut links) = (Records::new(), BTreeSet::new(), Links::new());
        let mut subject: S = fresh(&records, &links, []);
        for step in history {
            let dataplane = subject.dataplane();
            match step {
                Step::View(view) => {
                    let dirty = difference(&records, &view);
                    records = *view;
                    dataplane.update(&records, &dirty);
                }
                Step::Attach(number) => {
                    pods.insert(number);
                    let (interface, pod) = mk_attached(number);
                    dataplane.attach(interface, pod, &records);
                }
                Step::Detach(number) => {
                    pods.remove(&number);
                    dataplane.detach(&mk_attached(number).0, &records);
                }
                Step::Links(now) => {
                    links.clone_from(&now);
                    dataplane.set_links(now);
                }
            }
            commit(&mut subject, &records);
            let mut again: S = fresh(&records, &links, pods.iter().copied());
            prop_assert_eq!(subject.state(), again.state());
            let (dataplane, again) = (subject.dataplane(), again.dataplane());
            prop_assert_eq!(dataplane.errors(), again.errors());
            prop_assert_eq!(dataplane.dump(&records), again.dump(&records));
        }
    });
}

/// The kernel holds what is wanted once a commit has returned, and comparing it finds nothing.
pub fn a_commit_leaves_nothing_to_do<S: Subject>() {
    proptest!(ProptestConfig::with_cases(CASES / 4), |(view in sample::host_view())| {
        let mut subject: S = fresh(&view, &mk_links(), 0..3);
        prop_assert!(subject.dataplane().is_programmed().expect("the kernel answers"));
        prop_assert_eq!(commit(&mut subject, &view), Committed::default());
        subject.dataplane().request_comparison();
        prop_assert_eq!(commit(&mut subject, &view), Committed::default());
        subject.dataplane().invalidate();
        prop_assert_eq!(commit(&mut subject, &view), Committed::default());
    });
}

/// What another program has taken away comes back, whether that was noticed or is found by
/// comparing.
pub fn what_others_take_away_is_put_back<S: Subject>() {
    proptest!(ProptestConfig::with_cases(CASES / 4), |(
        view in sample::host_view(),
        is_noticed in any::<bool>(),
    )| {
        let mut subject: S = fresh(&view, &mk_links(), 0..3);
        let wanted = subject.state();
        subject.damage();
        match is_noticed {
            true => subject.dataplane().invalidate(),
            false => subject.dataplane().request_comparison(),
        }
        let committed = commit(&mut subject, &view);
        prop_assert!(committed.operations > 0 && committed.repairs == 1, "{:?}", committed);
        prop_assert_eq!(subject.state(), wanted);
    });
}

/// A pod of which the view says nothing is cut off in both directions, and so is an interface that
/// had one.
pub fn a_pod_without_a_record_is_cut_off<S: Subject>() {
    let records = Records::new();
    let (interface, _) = mk_attached(0);
    let ways = [
        mk_packet("10.0.0.0", "192.0.2.7"),
        mk_packet("192.0.2.7", "10.0.0.0"),
    ];
    let mut subject: S = fresh(&records, &Links::new(), [0]);
    assert!(!subject.dataplane().has_policy(&interface));
    for packet in &ways {
        assert!(!subject.travel(packet, Way::Forwarded).0, "{packet:?}");
    }
    subject.dataplane().detach(&interface, &records);
    commit(&mut subject, &records);
    assert!(subject.dataplane().attached().is_empty());
    for packet in &ways {
        assert!(!subject.travel(packet, Way::Forwarded).0, "{packet:?}");
    }
}
