//! Tests of the owner with a model of the kernel.

use std::collections::BTreeSet;
use std::time::Duration;

use margay_api::endpoint::interface_name;
use margay_api::rule::Action;
use margay_calc::model::{EndpointRecord, PolicyRecord, RouteRecord, TierBinding};
use margay_proto::sync::{Change, Trailer};
use prometheus_client::registry::Registry;

use super::*;
use margay_dataplane::nftables::Nftables;
use margay_dataplane::nftables::model::Model;
use margay_dataplane::nftables::sample::{NODE, mk_pod, mk_policy_key, mk_rule};
use margay_dataplane::routes::driver::RoutingPart;
use margay_dataplane::routes::plan::LocalPods;
use margay_nft::TransactionOp;

/// Time limit of a wait for something that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

type Records = BTreeMap<RecordId, Record>;

/// Pods with these numbers, each with a policy of its number, which allows or denies everything.
pub(super) fn mk_records(pods: &[(usize, Action)]) -> Records {
    let mut records = Records::new();
    for (number, action) in pods {
        let (key, addresses) = mk_pod(*number);
        let policy = PolicyRecord {
            ingress: vec![mk_rule(*action)],
            egress: Vec::new(),
        };
        records.insert(
            RecordId::Policy(mk_policy_key(*number)),
            Record::Policy(policy),
        );
        let tier = TierBinding {
            name: "default".to_owned(),
            default_action: Action::Deny,
            ingress: vec![mk_policy_key(*number)],
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
    }
    records
}

pub(super) fn mk_frame(revision: u64, records: &Records, in_sync: bool) -> Box<Frame> {
    let changes = records
        .iter()
        .map(|(id, record)| Change::Upsert(id.clone(), record.clone()))
        .collect();
    Box::new(Frame {
        changes,
        trailer: Trailer {
            revision,
            in_sync,
            ..Trailer::default()
        },
    })
}

struct Rig {
    kernel: Model,
    agent: AgentHandle,
    fatal: oneshot::Receiver<RetriesExhausted>,
    faults: Option<oneshot::Receiver<ViewError>>,
}

/// Routes that are applied on request of the test.
struct Slow {
    wanted: watch::Sender<u64>,
    progress: watch::Receiver<Progress>,
}

impl Routes for Slow {
    fn set_plan(&mut self, _: Plan) -> u64 {
        self.wanted.send_modify(|generation| *generation += 1);
        *self.wanted.borrow()
    }

    fn set_pods(&mut self, _: LocalPods) -> u64 {
        self.wanted.send_modify(|generation| *generation += 1);
        *self.wanted.borrow()
    }

    fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

impl Rig {
    fn new(kernel: Model, view: Records) -> Self {
        Self::with_routes(kernel, view, None)
    }

    fn with_routes(kernel: Model, view: Records, routes: Option<Box<dyn Routes>>) -> Self {
        let parts = AgentParts {
            node: NODE.to_owned(),
            view,
            attached: BTreeMap::new(),
            links: BTreeMap::new(),
            dataplane: Box::new(Nftables::new(NODE, Box::new(kernel.clone()))),
            routes,
            store: None,
            bgp: Default::default(),
            metrics: Metrics::new(&mut Registry::default()),
        };
        let (agent, fatal) = spawn(parts).expect("a thread");
        Self {
            kernel,
            agent,
            fatal,
            faults: None,
        }
    }

    async fn connect(&mut self, stream: u64) {
        let (hello, held) = oneshot::channel();
        let (fault, faults) = oneshot::channel();
        self.agent
            .send(AgentEvent::Connected {
                stream,
                hello,
                fault,
                server: "typha".to_owned(),
            })
            .await;
        self.faults = Some(faults);
        held.await.expect("the agent lives");
    }

    async fn send(&self, stream: u64, frame: Box<Frame>) {
        assert!(self.agent.send(AgentEvent::Frame { stream, frame }).await);
    }

    /// The acknowledgement of this revision.
    async fn acked(&self, revision: u64) -> Ack {
        let mut acks = self.agent.acks();
        let wanted = acks.wait_for(|ack| ack.as_ref().is_some_and(|ack| ack.revision >= revision));
        let ack = tokio::time::timeout(PATIENCE, wanted)
            .await
            .expect("in time")
            .expect("the agent lives");
        ack.as_deref().expect("it was waited for").clone()
    }

    async fn attach(&self, number: usize) -> Result<(), NotEnforced> {
        let (key, addresses) = mk_pod(number);
        let interface = interface_name(&key);
        let pod = Attached {
            endpoint: key,
            uid: String::new(),
            addresses,
            host_ports: Vec::new(),
        };
        tokio::time::timeout(PATIENCE, self.agent.attach(interface, pod))
            .await
            .expect("in time")
    }

    /// Waits until all events sent before are handled.
    async fn drain_events(&self) {
        self.agent
            .inspect(|_, _| ())
            .await
            .expect("the agent lives");
    }

    /// Pods that packets can reach with this table.
    fn dispatched(&self) -> BTreeSet<usize> {
        let Some(table) = self.kernel.table() else {
            return BTreeSet::new();
        };
        let text = table.sets["receivers"]
            .elements
            .keys()
            .map(|key| format!("{key}"))
            .collect::<String>();
        (0..9)
            .filter(|number| text.contains(&interface_name(&mk_pod(*number).0)))
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_before_the_whole_view_and_then_all_of_it_at_once() {
    let mut rig = Rig::new(Model::new(), Records::new());
    rig.connect(1).await;
    let records = mk_records(&[(0, Action::Allow), (1, Action::Deny)]);
    rig.send(1, mk_frame(1, &records, false)).await;
    rig.drain_events().await;
    assert_eq!(rig.kernel.table(), None);
    assert!(rig.agent.status().not_ready_reason().is_some());
    rig.send(1, mk_frame(2, &Records::new(), true)).await;
    assert_eq!(rig.acked(2).await.errors, []);
    assert_eq!(rig.kernel.lock().commits, 1);
    assert_eq!(rig.agent.status().not_ready_reason(), None);
    tokio::time::timeout(PATIENCE, rig.agent.wait_in_sync())
        .await
        .expect("in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_attached_when_its_record_is_there_and_in_the_kernel() {
    let mut rig = Rig::new(Model::new(), Records::new());
    rig.connect(1).await;
    rig.send(1, mk_frame(1, &mk_records(&[(0, Action::Allow)]), true))
        .await;
    assert_eq!(rig.attach(0).await, Ok(()));
    assert_eq!(rig.dispatched(), [0].into());

    let agent = rig.agent.clone();
    let early = tokio::spawn(async move {
        let (key, addresses) = mk_pod(1);
        let interface = interface_name(&key);
        agent
            .attach(
                interface,
                Attached {
                    endpoint: key,
                    uid: String::new(),
                    addresses,
                    host_ports: Vec::new(),
                },
            )
            .await
    });
    rig.drain_events().await;
    assert!(!early.is_finished());
    rig.send(1, mk_frame(2, &mk_records(&[(1, Action::Allow)]), true))
        .await;
    assert_eq!(
        tokio::time::timeout(PATIENCE, early)
            .await
            .expect("in time")
            .expect("no panic"),
        Ok(())
    );
    assert_eq!(rig.dispatched(), [0, 1].into());

    let key = mk_pod(1).0;
    rig.agent.detach(mk_pod(0).0, interface_name(&key)).await;
    assert_eq!(
        rig.dispatched(),
        [0, 1].into(),
        "another pod's link is not taken down"
    );
    rig.agent.detach(key.clone(), interface_name(&key)).await;
    assert_eq!(rig.dispatched(), [0].into());
    rig.agent.detach(key.clone(), interface_name(&key)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_refuses_is_denied_and_everything_else_enforced() {
    let mut rig = Rig::new(Model::new(), Records::new());
    let records = mk_records(&[(0, Action::Allow), (1, Action::Deny)]);
    rig.connect(1).await;
    rig.kernel.lock().refuses = Box::new(|op| match op {
        TransactionOp::AppendRules(name, chain, _) => {
            name.as_str().starts_with('i')
                && chain
                    .rules
                    .iter()
                    .any(|rule| rule.to_string().contains("accept"))
        }
        _ => false,
    });
    rig.send(1, mk_frame(1, &records, true)).await;
    let ack = rig.acked(1).await;
    let blamed: Vec<RecordId> = ack.errors.into_iter().map(|(id, _)| id).collect();
    assert_eq!(blamed, [RecordId::Policy(mk_policy_key(0))]);
    assert!(matches!(rig.attach(0).await, Err(NotEnforced::Refused(_))));
    assert_eq!(rig.attach(1).await, Ok(()));

    // The policy changed: it is retried at once.
    rig.kernel.lock().refuses = Box::new(|_| false);
    let mut records = records;
    let policy = PolicyRecord {
        ingress: vec![mk_rule(Action::Allow), mk_rule(Action::Deny)],
        egress: Vec::new(),
    };
    records.insert(RecordId::Policy(mk_policy_key(0)), Record::Policy(policy));
    rig.send(1, mk_frame(2, &records, true)).await;
    assert_eq!(rig.acked(2).await.errors, []);
    assert_eq!(rig.attach(0).await, Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_passing_failure_is_tried_again_and_a_lasting_one_is_the_end() {
    let mut rig = Rig::new(Model::new(), Records::new());
    rig.connect(1).await;
    rig.kernel.lock().outages = 3;
    rig.send(1, mk_frame(1, &mk_records(&[(0, Action::Allow)]), true))
        .await;
    assert_eq!(rig.acked(1).await.revision, 1);
    let before = rig.kernel.table();
    rig.kernel.lock().outages = usize::MAX;
    rig.send(1, mk_frame(2, &mk_records(&[(1, Action::Allow)]), true))
        .await;
    let fatal = tokio::time::timeout(PATIENCE, &mut rig.fatal)
        .await
        .expect("in time")
        .expect("a reason");
    assert!(fatal.to_string().contains("stays enforced"), "{fatal}");
    assert_eq!(rig.kernel.table(), before);
}

/// The largest part of what does not fit is denied, and everything else is enforced.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_the_kernel_has_no_room_for_costs_its_largest_class_alone() {
    for error in [libc::EMSGSIZE, libc::ENOMEM, libc::ENOBUFS] {
        let mut rig = Rig::new(Model::new(), Records::new());
        rig.connect(1).await;
        rig.send(1, mk_frame(1, &mk_records(&[(1, Action::Allow)]), true))
            .await;
        rig.acked(1).await;
        rig.kernel.lock().room = (200, error);
        let mut records = mk_records(&[(0, Action::Allow), (1, Action::Deny)]);
        let large = PolicyRecord {
            ingress: vec![mk_rule(Action::Log); 300],
            egress: Vec::new(),
        };
        records.insert(RecordId::Policy(mk_policy_key(0)), Record::Policy(large));
        rig.send(1, mk_frame(2, &records, true)).await;
        let ack = rig.acked(2).await;
        let [(RecordId::Policy(key), reason)] = &*ack.errors else {
            panic!("{ack:?}")
        };
        assert_eq!(*key, mk_policy_key(0));
        assert!(reason.contains("too large"), "{reason}");
        assert!(
            matches!(rig.attach(0).await, Err(NotEnforced::Refused(_))),
            "{error}"
        );
        assert_eq!(rig.attach(1).await, Ok(()), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_view_is_enforced_after_a_boot_and_not_after_a_mere_restart() {
    let records = mk_records(&[(0, Action::Allow)]);
    let booted = Rig::new(Model::new(), records.clone());
    booted.drain_events().await;
    assert_eq!(booted.agent.status().not_ready_reason(), None);
    assert_eq!(booted.attach(0).await, Ok(()));

    // The same kernel, with a saved view older than what it enforces.
    let before = booted.kernel.table();
    let mut restarted = Rig::new(booted.kernel.clone(), mk_records(&[(1, Action::Allow)]));
    restarted.drain_events().await;
    assert_eq!(restarted.kernel.table(), before);
    assert!(restarted.agent.status().not_ready_reason().is_some());
    let (key, _) = mk_pod(1);
    let gone = restarted.agent.detach(key.clone(), interface_name(&key));
    tokio::time::timeout(PATIENCE, gone)
        .await
        .expect("nobody waits for a view to let a pod go");
    restarted.connect(1).await;
    restarted.send(1, mk_frame(1, &records, true)).await;
    restarted.acked(1).await;
    assert_eq!(restarted.attach(0).await, Ok(()));
    assert_eq!(restarted.dispatched(), [0].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn drift_is_repaired_and_a_frame_that_does_not_fit_ends_its_stream() {
    let mut rig = Rig::new(Model::new(), Records::new());
    rig.connect(1).await;
    rig.send(1, mk_frame(1, &mk_records(&[(0, Action::Allow)]), true))
        .await;
    rig.acked(1).await;
    let wanted = rig.kernel.table();
    rig.kernel.lock().table = None;
    rig.agent.send(AgentEvent::Drift).await;
    rig.drain_events().await;
    assert_eq!(rig.kernel.table(), wanted);

    let strange = Change::Members(
        margay_calc::model::SetId("s:unknown".to_owned()),
        margay_calc::model::SetKind::Net,
        margay_calc::flush::MemberDelta::default(),
    );
    let frame = Frame {
        changes: vec![strange],
        trailer: Trailer {
            revision: 2,
            ..Trailer::default()
        },
    };
    rig.send(1, Box::new(frame)).await;
    let fault = rig
        .faults
        .take()
        .expect("a stream")
        .await
        .expect("a reason");
    assert!(matches!(fault, ViewError::UnknownSet(_)));
    // Later frames of the same stream are ignored.
    rig.send(1, mk_frame(9, &mk_records(&[(1, Action::Allow)]), true))
        .await;
    rig.connect(2).await;
    assert!(!rig.agent.status().in_sync);
    rig.send(2, mk_frame(3, &mk_records(&[(0, Action::Allow)]), true))
        .await;
    assert_eq!(rig.acked(3).await.revision, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_is_acknowledged_when_its_routes_are_in_the_kernel_or_with_what_they_lack() {
    let (wanted, mut planned) = watch::channel(0);
    let (progress, seen) = watch::channel(Progress::default());
    let routes = Slow {
        wanted,
        progress: seen,
    };
    let mut rig = Rig::with_routes(Model::new(), Records::new(), Some(Box::new(routes)));
    rig.connect(1).await;
    let range: ipnet::IpNet = "10.9.9.0/26".parse().expect("a range");
    let mut records = mk_records(&[(0, Action::Allow)]);
    let far = RouteRecord {
        node: "far".to_owned(),
        encapsulation: margay_api::network::Encapsulation::Vxlan,
    };
    records.insert(RecordId::Route(range), Record::Route(far));
    rig.send(1, mk_frame(1, &records, true)).await;
    // The pod does not wait for other pods' routes.
    assert_eq!(rig.attach(0).await, Ok(()));
    planned
        .wait_for(|generation| *generation > 0)
        .await
        .expect("the agent lives");
    rig.drain_events().await;
    assert!(
        rig.agent.acks().borrow().is_none(),
        "the routes of the revision are not in the kernel"
    );

    let failed = BTreeMap::from([(RoutingPart::Route(range), "ENETUNREACH".to_owned())]);
    progress.send_modify(|progress| (progress.generation, progress.failed) = (u64::MAX, failed));
    let ack = rig.acked(1).await;
    assert_eq!(
        ack.errors,
        [(
            RecordId::Route(range),
            format!("route {range}: ENETUNREACH")
        )]
    );
    // A flap does not make it unready, and the end of the failure is reported without another
    // frame.
    assert_eq!(rig.agent.status().not_ready_reason(), None);
    progress.send_modify(|progress| progress.failed.clear());
    let mut acks = rig.agent.acks();
    let repaired = acks.wait_for(|ack| ack.as_ref().is_some_and(|ack| ack.errors.is_empty()));
    let repaired = tokio::time::timeout(PATIENCE, repaired)
        .await
        .expect("in time")
        .expect("the agent lives");
    assert_eq!(repaired.as_ref().map(|ack| ack.revision), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_served_where_the_settings_have_them() {
    let mut rig = Rig::new(Model::new(), Records::new());
    let problems = crate::problems::Problems::default();
    tokio::spawn(crate::metrics_port::run(
        None,
        Arc::new(Registry::default()),
        rig.agent.clone(),
        problems.clone(),
    ));
    rig.connect(1).await;
    let any = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let taken = any.expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let frame = |revision, metrics_enabled| {
        let settings = margay_api::settings::FelixSettings {
            metrics_enabled,
            metrics_host: "127.0.0.1".to_owned(),
            metrics_port: port,
            ..Default::default()
        };
        let records = [(RecordId::Settings, Record::Settings(settings))];
        mk_frame(revision, &records.into(), revision == 1)
    };
    let until = async |is_reached: &dyn Fn() -> bool| {
        let wait = async {
            while !is_reached() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("in time");
    };
    let is_open = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    // Somebody else has the port: the node has a problem until it is free.
    rig.send(1, frame(1, true)).await;
    until(&|| {
        let list = problems.list();
        list.iter().any(|problem| problem.code == "metrics-port")
    })
    .await;
    drop(taken);
    until(&is_open).await;
    until(&|| problems.list().is_empty()).await;
    rig.send(1, frame(2, false)).await;
    until(&|| !is_open()).await;
}
