//! Cost of policies that multiply: hardly any memory, and changes of others are not delayed. A
//! program of its own, because it measures the memory of the process.

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
use margay_proto::sync::{Change, Frame, Joiner, PART_SIZE, Versions, wire};
use margay_runtime::ready::Readiness;
use margay_typha::cache::Cache;
use margay_typha::cause::Cause;
use margay_typha::codec::FrameBytes;
use margay_typha::compute::GraphOwner;
use margay_typha::event::Event;
use margay_typha::hello::{Capabilities, Hello};
use margay_typha::metrics::Counters;
use margay_typha::object::Observed;
use margay_typha::registry::Registry;
use prometheus_client::registry::Registry as Metrics;
use prost::Message;
use tokio::sync::mpsc;
use tonic::Status;

#[path = "stream/large.rs"]
mod large;

/// Limit for each of them.
const MEMORY_LIMIT: usize = 50 << 20;

/// A field of `/proc/self/status`, in bytes.
fn memory(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .expect("the field");
    line.trim_matches(|c: char| !c.is_ascii_digit())
        .parse::<usize>()
        .expect("a number")
        * 1024
}

/// Growth of the peak memory of the process during `work`, in bytes.
fn growth(work: impl FnOnce()) -> usize {
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak is reset");
    let before = memory("VmRSS:");
    work();
    memory("VmHWM:").saturating_sub(before)
}

/// A typha whose API is the test, and the frames of its nodes.
struct Typha {
    owner: GraphOwner,
    nodes: Vec<mpsc::Receiver<Result<FrameBytes, Status>>>,
}

impl Typha {
    fn new() -> Self {
        let registry = Registry::default();
        let counters = Counters::register(&mut Metrics::default(), registry.clone());
        let gate = Readiness::default().gate("sync", "starting");
        let mut owner = GraphOwner::new(Cache::new([]), counters, registry, gate);
        let nodes = (1..=2).map(|number| {
            let (slot, frames) = mpsc::channel(1);
            owner.handle(Event::Hello(Hello {
                node: format!("n{number}"),
                session: number,
                agent_version: String::new(),
                buckets: Vec::new(),
                versions: Versions::new(),
                has_alternatives: false,
                capabilities: Capabilities {
                    host_endpoints: true,
                    bgp: true,
                    compact: true,
                },
                slot,
                blocked: Arc::new(AtomicBool::new(false)),
            }));
            frames
        });
        let nodes = nodes.collect();
        Self { owner, nodes }
    }

    fn observe(&mut self, name: &str, update: Option<Update>, problems: Vec<String>) {
        let object = Observed {
            key: EndpointKey::new("x", name),
            uid: String::new(),
            update,
            prefers_former: false,
            problems,
        };
        self.owner.handle(Event::Observed {
            kind: "Pod",
            objects: vec![object],
            cause: Cause::default(),
        });
    }

    /// Applies a policy as parsed by the watch of its kind; returns true if it was refused.
    fn policy(&mut self, key: PolicyKey, parsed: Result<Policy, Refusal>) -> bool {
        let is_refused = parsed.is_err();
        let policy = parsed
            .or_else(|refusal| refusal.closed.ok_or(()))
            .expect("its selector is known");
        self.observe(
            &key.to_string(),
            Some(Update::Policy(key.clone(), Some(policy))),
            Vec::new(),
        );
        is_refused
    }

    /// Drains the frames of each node, checking that no message is larger than a part and one
    /// record.
    fn drain_frames(&mut self) -> Vec<Vec<Frame>> {
        let mut frames = vec![Vec::new(); self.nodes.len()];
        for session in 1..=2 {
            self.owner.handle(Event::SlotFree {
                node: format!("n{session}"),
                session,
            });
        }
        self.owner.flush();
        let mut is_over = true;
        for (slot, frames) in self.nodes.iter_mut().zip(&mut frames) {
            let mut parts = Joiner::default();
            while let Ok(frame) = slot.try_recv() {
                is_over = false;
                for message in frame.expect("the stream is open").into_messages() {
                    assert!(message.len() <= 2 * PART_SIZE, "{} bytes", message.len());
                    let part = wire::Frame::decode(&*message.chunks().concat()).expect("a frame");
                    frames.extend(parts.push(part).expect("a valid frame"));
                }
            }
        }
        if !is_over {
            let more = self.drain_frames();
            frames
                .iter_mut()
                .zip(more)
                .for_each(|(frames, more)| frames.extend(more));
        }
        frames
    }
}

/// One pod of one namespace on each node.
fn world(typha: &mut Typha) {
    typha.observe(
        "ns",
        Some(Update::Namespace(
            "x".to_owned(),
            Some(Labels::new().into()),
        )),
        Vec::new(),
    );
    let tier = Tier {
        order: Order(None),
        default_action: Action::Deny,
    };
    typha.observe(
        "tier",
        Some(Update::Tier("default".to_owned(), Some(tier))),
        Vec::new(),
    );
    for number in 1..=2 {
        let key = EndpointKey::new("x", format!("p{number}"));
        let labels = [
            (LABEL_NAMESPACE, "x"),
            (LABEL_ORCHESTRATOR, "k8s"),
            ("app", "a1"),
        ];
        let endpoint = WorkloadEndpoint {
            node: format!("n{number}"),
            labels: labels
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            service_account: String::new(),
            addresses: vec![format!("10.0.0.{number}").parse().expect("an address")],
            ports: Vec::new(),
            uid: String::new(),
            interface: interface_name(&key),
        };
        typha.observe(
            &key.name,
            Some(Update::Endpoint(key.clone(), Some(endpoint))),
            Vec::new(),
        );
    }
    typha.drain_frames();
}

/// Applies a Kubernetes NetworkPolicy.
fn kubernetes(typha: &mut Typha, name: &str, spec: &str) -> bool {
    let text = large::object("networking.k8s.io/v1", "x", name, spec);
    let object: NetworkPolicy = serde_json::from_str(&text).expect("a policy");
    typha.policy(
        k8s::netpol::key(&object),
        k8s::netpol::policy(&object).map(|(_, policy)| policy),
    )
}

/// Applies a NetworkPolicy of Calico.
fn calico(typha: &mut Typha, name: &str, spec: &str) -> bool {
    let text = large::object("projectcalico.org/v3", "x", name, spec);
    let object: v3::NetworkPolicy = serde_json::from_str(&text).expect("a policy");
    let key = PolicyKey::of(PolicyKind::NetworkPolicy, &object.metadata);
    typha.policy(key, v3::parse::policy::network_policy(&object))
}

fn change_of<'a>(frames: &'a [Frame], name: &str) -> Option<&'a Change> {
    let is = |id: &RecordId| matches!(id, RecordId::Policy(key) if key.name == name);
    let mut changes = frames.iter().flat_map(|frame| &frame.changes);
    changes.find(|change| matches!(change, Change::Upsert(id, _) if is(id)))
}

#[test]
fn policies_that_multiply_cost_little_and_do_not_delay_others() {
    let mut typha = Typha::new();
    world(&mut typha);
    for number in 0..100 {
        let spec = format!(
            r#"{{"podSelector":{{}},"ingress":[{{"from":{}}}]}}"#,
            large::peers(1 + number % 7)
        );
        assert!(!kubernetes(&mut typha, &format!("small{number}"), &spec));
    }
    typha.drain_frames();
    let (inwards, outwards) = (
        large::inwards(20_000, 20_000),
        large::outwards(20_000, 20_000),
    );
    let (largest, multiplied) = (large::inwards(200, 300), large::multiplied());
    let mut changes = 0;
    for (what, policy, is_beyond) in [
        ("inwards", &inwards, true),
        ("outwards", &outwards, true),
        ("largest", &largest, false),
        ("multiplied", &multiplied, true),
    ] {
        let mut frames = Vec::new();
        let grown = growth(|| {
            let is_refused = match what {
                "multiplied" => calico(&mut typha, what, policy),
                _ => kubernetes(&mut typha, what, policy),
            };
            assert_eq!(is_refused, is_beyond, "{what}");
            frames = typha.drain_frames();
        });
        assert!(grown < MEMORY_LIMIT, "{what}: {grown} bytes");
        for frames in &frames {
            let Some(Change::Upsert(_, Record::Policy(policy))) = change_of(frames, what) else {
                panic!("{what}")
            };
            let rules = policy.ingress.len() + policy.egress.len();
            assert_eq!(
                rules,
                if is_beyond { 0 } else { 200 },
                "{what}: a refused policy is closed"
            );
        }
        // A small policy changes beside it.
        changes += 1;
        let spec = format!(
            r#"{{"podSelector":{{}},"ingress":[{{"from":{}}}]}}"#,
            large::peers(10 + changes)
        );
        assert!(!kubernetes(&mut typha, "small7", &spec));
        for frames in typha.drain_frames() {
            assert!(
                change_of(&frames, "small7").is_some(),
                "{what}: changes of others are sent"
            );
        }
    }
}
