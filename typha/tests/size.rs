//! What policies that multiply cost the others: hardly any memory, and nobody's changes wait. A program of its own, as it looks at the memory of the process.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::endpoint::{EndpointKey, WorkloadEndpoint, interface_name};
use margay_api::meta::{LABEL_NAMESPACE, LABEL_ORCHESTRATOR, Labels};
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, Tier};
use margay_api::problem::Refusal;
use margay_api::rule::Action;
use margay_api::{k8s, v3};
use margay_calc::model::{Record, RecordId};
use margay_calc::update::Update;
use margay_proto::sync::{Change, Frame, Joiner, PART, wire};
use margay_runtime::ready::Readiness;
use margay_typha::cache::{Cache, Observed};
use margay_typha::codec::FrameBytes;
use margay_typha::compute::{Event, Owner};
use margay_typha::hub::{Cause, Hello, Reads};
use margay_typha::metrics::Counters;
use margay_typha::registry::Registry;
use prometheus_client::registry::Registry as Metrics;
use prost::Message;
use tokio::sync::mpsc;
use tonic::Status;

#[path = "stream/large.rs"]
mod large;

/// What all of it may cost.
const ROOM: usize = 50 << 20;

/// A field of the process's status, in bytes.
fn memory(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().expect("a number") * 1024
}

/// By how much the process's memory grows at most while this is done.
fn growth(work: impl FnOnce()) -> usize {
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak is forgotten");
    let before = memory("VmRSS:");
    work();
    memory("VmHWM:").saturating_sub(before)
}

/// A typha whose API is the test, and the frames of its nodes.
struct Typha {
    owner: Owner,
    nodes: Vec<mpsc::Receiver<Result<FrameBytes, Status>>>,
}

impl Typha {
    fn new() -> Self {
        let registry = Registry::default();
        let counters = Counters::register(&mut Metrics::default(), registry.clone());
        let gate = Readiness::default().gate("sync", "starting");
        let mut owner = Owner::new(Cache::new([]), counters, registry, gate);
        let nodes = (1..=2).map(|number| {
            let (slot, frames) = mpsc::channel(1);
            owner.handle(Event::Hello(Hello {
                node: format!("n{number}"),
                session: number,
                agent_version: String::new(),
                buckets: Vec::new(),
                reads: Reads { host_endpoints: true, compact: true },
                slot,
                blocked: Arc::new(AtomicBool::new(false)),
            }));
            frames
        });
        let nodes = nodes.collect();
        Self { owner, nodes }
    }

    fn observe(&mut self, name: &str, update: Option<Update>, problems: Vec<String>) {
        let object =
            Observed { key: EndpointKey::new("x", name), uid: String::new(), update, prefers_former: false, problems };
        self.owner.handle(Event::Observed { kind: "Pod", objects: vec![object], cause: Cause::default() });
    }

    /// What is read from an object, as the watch of its kind has it.
    fn policy(&mut self, key: PolicyKey, parsed: Result<Policy, Refusal>) -> bool {
        let is_refused = parsed.is_err();
        let policy = parsed.or_else(|refusal| refusal.closed.ok_or(())).expect("its selector is known");
        self.observe(&key.to_string(), Some(Update::Policy(key.clone(), Some(policy))), Vec::new());
        is_refused
    }

    /// What each node is told; no message is larger than a part of a frame and one record may be.
    fn told(&mut self) -> Vec<Vec<Frame>> {
        let mut told = vec![Vec::new(); self.nodes.len()];
        for session in 1..=2 {
            self.owner.handle(Event::Ready { node: format!("n{session}"), session });
        }
        self.owner.flush();
        let mut is_over = true;
        for (frames, told) in self.nodes.iter_mut().zip(&mut told) {
            let mut parts = Joiner::default();
            while let Ok(frame) = frames.try_recv() {
                is_over = false;
                for message in frame.expect("the stream is open").into_messages() {
                    assert!(message.len() <= 2 * PART, "{} bytes", message.len());
                    let part = wire::Frame::decode(&*message.pieces().concat()).expect("a frame");
                    told.extend(parts.take(part).expect("what the model can hold"));
                }
            }
        }
        if !is_over {
            let more = self.told();
            told.iter_mut().zip(more).for_each(|(told, more)| told.extend(more));
        }
        told
    }
}

/// One pod on each node, of one namespace.
fn world(typha: &mut Typha) {
    typha.observe("ns", Some(Update::Namespace("x".to_owned(), Some(Labels::new()))), Vec::new());
    let tier = Tier { order: Order(None), default_action: Action::Deny };
    typha.observe("tier", Some(Update::Tier("default".to_owned(), Some(tier))), Vec::new());
    for number in 1..=2 {
        let key = EndpointKey::new("x", format!("p{number}"));
        let labels = [(LABEL_NAMESPACE, "x"), (LABEL_ORCHESTRATOR, "k8s"), ("app", "a1")];
        let endpoint = WorkloadEndpoint {
            node: format!("n{number}"),
            labels: labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            service_account: String::new(),
            addresses: vec![format!("10.0.0.{number}").parse().expect("an address")],
            ports: Vec::new(),
            uid: String::new(),
            interface: interface_name(&key),
        };
        typha.observe(&key.name, Some(Update::Endpoint(key.clone(), Some(endpoint))), Vec::new());
    }
    typha.told();
}

/// A policy of Kubernetes as it is stored.
fn kubernetes(typha: &mut Typha, name: &str, spec: &str) -> bool {
    let text = large::object("networking.k8s.io/v1", "x", name, spec);
    let object: NetworkPolicy = serde_json::from_str(&text).expect("a policy");
    typha.policy(k8s::netpol::key(&object), k8s::netpol::policy(&object).map(|(_, policy)| policy))
}

/// A policy of Calico as it is stored.
fn calico(typha: &mut Typha, name: &str, spec: &str) -> bool {
    let text = large::object("projectcalico.org/v3", "x", name, spec);
    let object: v3::NetworkPolicy = serde_json::from_str(&text).expect("a policy");
    let key = PolicyKey::of(PolicyKind::NetworkPolicy, &object.metadata);
    typha.policy(key, v3::policy::network_policy(&object))
}

fn change_of<'a>(told: &'a [Frame], name: &str) -> Option<&'a Change> {
    let is = |id: &RecordId| matches!(id, RecordId::Policy(key) if key.name == name);
    let mut changes = told.iter().flat_map(|frame| &frame.changes);
    changes.find(|change| matches!(change, Change::Upsert(id, _) if is(id)))
}

#[test]
fn policies_that_multiply_cost_little_and_the_others_are_told() {
    let mut typha = Typha::new();
    world(&mut typha);
    for number in 0..100 {
        let spec = format!(r#"{{"podSelector":{{}},"ingress":[{{"from":{}}}]}}"#, large::peers(1 + number % 7));
        assert!(!kubernetes(&mut typha, &format!("small{number}"), &spec));
    }
    typha.told();
    let (inwards, outwards) = (large::inwards(20_000, 20_000), large::outwards(20_000, 20_000));
    let (largest, multiplied) = (large::inwards(200, 300), large::multiplied());
    let mut round = 0;
    for (what, policy, is_beyond) in [
        ("inwards", &inwards, true),
        ("outwards", &outwards, true),
        ("largest", &largest, false),
        ("multiplied", &multiplied, true),
    ] {
        let mut told = Vec::new();
        let grown = growth(|| {
            let is_refused = match what {
                "multiplied" => calico(&mut typha, what, policy),
                _ => kubernetes(&mut typha, what, policy),
            };
            assert_eq!(is_refused, is_beyond, "{what}");
            told = typha.told();
        });
        assert!(grown < ROOM, "{what}: {grown} bytes");
        for told in &told {
            let Some(Change::Upsert(_, Record::Policy(policy))) = change_of(told, what) else { panic!("{what}") };
            let rules = policy.ingress.len() + policy.egress.len();
            assert_eq!(rules, if is_beyond { 0 } else { 200 }, "{what}: what is refused is closed");
        }
        // Somebody else's policy changes.
        round += 1;
        let spec = format!(r#"{{"podSelector":{{}},"ingress":[{{"from":{}}}]}}"#, large::peers(10 + round));
        assert!(!kubernetes(&mut typha, "small7", &spec));
        for told in typha.told() {
            assert!(change_of(&told, "small7").is_some(), "{what}: the others are told");
        }
    }
}
