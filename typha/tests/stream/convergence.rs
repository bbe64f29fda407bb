//! Convergence: whatever a node misses, in whatever order it reads and whichever replica it
//! connects to, it ends with exactly its view.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use margay_api::bgp::{BgpNextHopMode, BgpPeer, BgpSettings, NodePeers, PeerTarget};
use margay_api::endpoint::{
    EndpointKey, HostEndpoint, HostInterface, WorkloadEndpoint, interface_name,
};
use margay_api::meta::{LABEL_NAMESPACE, Labels};
use margay_api::network::{BlockInfo, Encapsulation, NodeInfo, Pool};
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, Tier, Traffic};
use margay_api::rule::{Action, EntityMatch, Rule};
use margay_api::selector::{Node as Selection, Selector};
use margay_api::settings::{FelixOverrides, SettingsScope};
use margay_calc::digest;
use margay_calc::model::RecordId;
use margay_calc::update::{NamespaceInfo, Update};
use margay_proto::sync::{Change, Frame, Versions};
use margay_typha::cause::Cause;
use margay_typha::codec::FrameBytes;
use margay_typha::hello::{Capabilities, Hello};
use margay_typha::hub::Hub;
use margay_typha::metrics::Counters;
use margay_typha::registry::Registry;
use prometheus_client::registry::Registry as Metrics;
use proptest::prelude::*;
use tokio::sync::mpsc;
use tonic::Status;

use crate::held::{Held, apply, buckets, decode};

const NODES: [&str; 2] = ["n0", "n1"];
/// The node whose agent does not support host endpoints.
const OLDER: usize = 1;

#[derive(Clone, Debug)]
enum Step {
    /// Both replicas receive an update.
    Update(Box<Update>),
    /// A replica flushes.
    Flush(usize),
    /// A node reads the frame in its slot.
    Read(usize),
    /// A node loses its stream and connects to a replica.
    Connect(usize, usize),
}

fn mk_endpoint(namespace: u8, pod: u8, node: u8, app: u8, address: Option<u8>) -> Update {
    let key = EndpointKey::new(format!("ns{namespace}"), format!("p{pod}"));
    let labels = Labels::from([
        ("app".to_owned(), format!("a{app}")),
        (LABEL_NAMESPACE.to_owned(), key.namespace.clone()),
    ]);
    let endpoint = WorkloadEndpoint {
        node: format!("n{node}"),
        labels,
        service_account: String::new(),
        addresses: address
            .map(|last| IpAddr::from(Ipv4Addr::new(10, 0, 0, last)))
            .into_iter()
            .collect(),
        ports: Vec::new(),
        uid: String::new(),
        interface: interface_name(&key),
    };
    Update::Endpoint(key, Some(endpoint))
}

fn mk_policy(namespace: u8, name: u8, target: u8, peer: u8, action: bool) -> Update {
    let label = |label: &str, value: String| Selection::Equals(label.to_owned(), value);
    let selector = |app: u8| Selector {
        root: Selection::And(vec![
            label(LABEL_NAMESPACE, format!("ns{namespace}")),
            label("app", format!("a{app}")),
        ]),
    };
    let mut rule = Rule::any(if action { Action::Allow } else { Action::Deny });
    rule.source = EntityMatch {
        selector: Some(selector(peer)),
        ..EntityMatch::default()
    };
    let policy = Policy {
        tier: "default".to_owned(),
        order: Order(None),
        selector: selector(target),
        traffic: Traffic::Normal,
        applies_ingress: true,
        applies_egress: false,
        ingress: vec![rule],
        egress: Vec::new(),
    };
    Update::Policy(policy_key(namespace, name), Some(policy))
}

fn mk_host(node: u8) -> HostEndpoint {
    HostEndpoint {
        node: format!("n{node}"),
        labels: Labels::new(),
        interface: HostInterface::All,
        addresses: Vec::new(),
        ports: Vec::new(),
        profiles: Vec::new(),
    }
}

fn policy_key(namespace: u8, name: u8) -> PolicyKey {
    PolicyKey {
        kind: PolicyKind::NetworkPolicy,
        namespace: format!("ns{namespace}"),
        name: format!("p{name}"),
    }
}

fn update() -> impl Strategy<Value = Update> {
    let endpoint_key = (0..2_u8, 0..5_u8)
        .prop_map(|(ns, pod)| EndpointKey::new(format!("ns{ns}"), format!("p{pod}")));
    let block = |third: u8| format!("10.0.{third}.0/26").parse().expect("a block");
    prop_oneof![
        6 => (0..2_u8, 0..5_u8, 0..2_u8, 0..3_u8, proptest::option::of(0..8_u8))
            .prop_map(|(ns, pod, node, app, address)| mk_endpoint(ns, pod, node, app, address)),
        2 => endpoint_key.prop_map(|key| Update::Endpoint(key, None)),
        4 => (0..2_u8, 0..3_u8, 0..3_u8, 0..3_u8, any::<bool>())
            .prop_map(|(ns, name, target, peer, action)| mk_policy(ns, name, target, peer, action)),
        1 => (0..2_u8, 0..3_u8).prop_map(|(ns, name)| Update::Policy(policy_key(ns, name), None)),
        2 => (0..2_u8, 0..2_u8, any::<bool>()).prop_map(|(name, node, there)| {
            Update::HostEndpoint(format!("h{name}"), there.then(|| mk_host(node)))
        }),
        1 => proptest::option::of(0..3_u8).prop_map(|peer| {
            let key = PolicyKey {
                kind: PolicyKind::GlobalNetworkPolicy,
                namespace: String::new(),
                name: "hosts".to_owned(),
            };
            match peer.map(|peer| mk_policy(0, 0, 0, peer, true)) {
                Some(Update::Policy(_, Some(policy))) => {
                    Update::Policy(
                        key,
                        Some(
                            Policy {
                                selector: Selector::all(),
                                traffic: Traffic::PreDnat,
                                ..policy
                            },
                        ),
                    )
                }
                _ => Update::Policy(key, None),
            }
        }),
        1 => (0..2_u8, any::<bool>()).prop_map(|(ns, there)| {
            Update::Namespace(format!("ns{ns}"), there.then(NamespaceInfo::default))
        }),
        1 => any::<bool>().prop_map(|there| {
            let tier = Tier { order: Order(None), default_action: Action::Deny };
            Update::Tier("default".to_owned(), there.then_some(tier))
        }),
        1 => (0..2_u8, any::<u8>()).prop_map(|(node, last)| {
            let address = Ipv4Addr::new(192, 0, 2, last);
            let info = NodeInfo { ipv4: Some(address.into()), ..NodeInfo::default() };
            Update::Node(format!("n{node}"), Some(info))
        }),
        1 => (0..2_u8, 0..2_u8).prop_map(move |(third, node)| {
            let info = BlockInfo { node: Some(format!("n{node}")), ..BlockInfo::default() };
            Update::Block(block(third), Some(info))
        }),
        1 => any::<bool>().prop_map(|nat_outgoing| {
            let cidr = "10.0.0.0/16".parse().expect("a range");
            let pool = Pool {
                cidr,
                encapsulation: Encapsulation::Vxlan,
                nat_outgoing,
                block_size: 26,
                is_exported: nat_outgoing,
                created: 0,
            };
            Update::Pool("pool".to_owned(), Some(pool))
        }),
        1 => (prop::sample::select(
            vec!["default", "node.n0"],
        ), 1400..1402_u32).prop_map(|(name, vxlan_mtu)| {
            let scope = match name.strip_prefix("node.") {
                Some(node) => SettingsScope::Node(node.to_owned()),
                None => SettingsScope::Cluster,
            };
            let overrides = FelixOverrides {
                vxlan_mtu: Some(vxlan_mtu),
                ..FelixOverrides::none(scope)
            };
            Update::Settings(name.to_owned(), Some(overrides))
        }),
        1 => (prop::sample::select(vec!["default", "node.n1"]), 0..3_u16).prop_map(|(name, port)| {
            let settings = (port > 0).then(|| BgpSettings {
                listen_port: Some(port),
                ..BgpSettings::default()
            });
            Update::BgpSettings(name.to_owned(), settings)
        }),
        1 => (0..2_u8, any::<bool>()).prop_map(|(node, there)| {
            let peer = BgpPeer {
                nodes: NodePeers::Node(format!("n{node}")),
                target: PeerTarget::Address(([192, 0, 2, 200], 0).into()),
                asn: Some(65001),
                local_asn: None,
                allowed_local_asn: 0,
                filters: vec!["missing".to_owned()],
                next_hop_mode: BgpNextHopMode::Auto,
                password: None,
                uses_node_address: true,
                restart_time: None,
                keepalive: None,
                ttl_security: None,
                reachable_by: None,
                is_reversed: true,
            };
            Update::BgpPeer(format!("p{node}"), there.then_some(peer))
        }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => update().prop_map(|update| Step::Update(Box::new(update))),
        4 => (0..2_usize).prop_map(Step::Flush),
        4 => (0..2_usize).prop_map(Step::Read),
        1 => (0..2_usize, 0..2_usize).prop_map(|(node, replica)| Step::Connect(node, replica)),
    ]
}

/// A node: its records and its stream.
#[derive(Default)]
struct Agent {
    held: Held,
    stream: Option<Stream>,
}

struct Stream {
    replica: usize,
    session: u64,
    blocked: Arc<AtomicBool>,
    frames: mpsc::Receiver<Result<FrameBytes, Status>>,
}

struct World {
    replicas: [Hub; 2],
    registries: [Registry; 2],
    agents: [Agent; 2],
    sessions: u64,
}

fn mk_hub(registry: &Registry) -> Hub {
    let counters = Counters::register(&mut Metrics::default(), registry.clone());
    let mut hub = Hub::new(registry.clone(), counters);
    hub.graph.set_bgp(true);
    hub
}

impl World {
    fn new() -> Self {
        let registries: [Registry; 2] = Default::default();
        let replicas = registries.each_ref().map(mk_hub);
        Self {
            replicas,
            registries,
            agents: Default::default(),
            sessions: 0,
        }
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Update(update) => {
                for replica in &mut self.replicas {
                    replica.graph.apply((*update).clone());
                }
            }
            Step::Flush(replica) => self.replicas[replica].flush(Cause::default()),
            Step::Read(node) => {
                self.read(node);
            }
            Step::Connect(node, replica) => self.connect(node, replica),
        }
    }

    /// Pending records of the node, as the registry reports them and as they are.
    fn pending(&self, node: usize) -> (usize, usize) {
        let stream = self.agents[node].stream.as_ref().expect("connected");
        let known = self.registries[stream.replica]
            .get(NODES[node], stream.session)
            .expect("its session");
        (
            known.progress().pending,
            self.replicas[stream.replica].pending(NODES[node]),
        )
    }

    /// Applies one frame; returns false if there is none.
    fn read(&mut self, node: usize) -> bool {
        let agent = &mut self.agents[node];
        let Some(stream) = &mut agent.stream else {
            return false;
        };
        let Ok(Ok(frame)) = stream.frames.try_recv() else {
            return false;
        };
        let (replica, session) = (stream.replica, stream.session);
        let was_blocked = stream.blocked.swap(false, Ordering::SeqCst);
        apply(&mut agent.held, &decode(&frame));
        let hub = &mut self.replicas[replica];
        if was_blocked && hub.is_waiting(NODES[node], session) {
            hub.flush(Cause::default());
        }
        true
    }

    /// Sends hello with the digests of the agent's records; the first frame must resend only
    /// buckets that differ.
    fn connect(&mut self, node: usize, replica: usize) {
        self.sessions += 1;
        let session = self.sessions;
        if let Some(former) = self.agents[node].stream.take() {
            self.replicas[former.replica].close_session(NODES[node], former.session);
        }
        let (slot, frames) = mpsc::channel(1);
        let blocked = Arc::new(AtomicBool::new(false));
        let agent = &mut self.agents[node];
        let buckets = buckets(&agent.held);
        let hub = &mut self.replicas[replica];
        hub.flush(Cause::default());
        hub.open_session(Hello {
            node: NODES[node].to_owned(),
            session,
            agent_version: String::new(),
            buckets: buckets.clone(),
            versions: Versions::new(),
            has_alternatives: false,
            capabilities: Capabilities {
                host_endpoints: node != OLDER,
                bgp: node != OLDER,
                compact: node != OLDER,
            },
            slot,
            blocked: blocked.clone(),
        });
        agent.stream = Some(Stream {
            replica,
            session,
            blocked,
            frames,
        });
        let stream = agent.stream.as_mut().expect("just put there");
        let first = decode(
            &stream
                .frames
                .try_recv()
                .expect("an answer")
                .expect("a frame"),
        );
        check_first(hub, NODES[node], &buckets, &first);
        apply(&mut agent.held, &first);
        assert_eq!(agent.held, view(hub, NODES[node]), "after hello");
    }

    fn converge(&mut self) {
        for replica in &mut self.replicas {
            replica.flush(Cause::default());
        }
        for node in 0..NODES.len() {
            while self.read(node) {}
        }
    }
}

fn check_first(hub: &Hub, node: &str, held: &[u64], first: &Frame) {
    let view = view(hub, node);
    let wanted = buckets(&view);
    let differ = (0..digest::BUCKETS).filter(|index| held[*index] != wanted[*index]);
    let differ: Vec<u32> = differ.map(|index| index as u32).collect();
    assert_eq!(first.trailer.restated_buckets, differ);
    assert!(first.trailer.in_sync);
    let sent = first.changes.iter().map(|change| match change {
        Change::Upsert(id, _) => id.clone(),
        other => panic!("{other:?} in a first frame"),
    });
    assert!(
        sent.eq(view
            .into_keys()
            .filter(|id| differ.contains(&digest::bucket(id))))
    );
}

fn view(hub: &Hub, node: &str) -> Held {
    let view = hub.graph.view(node);
    let is_older = node == NODES[OLDER];
    let known = view
        .ids()
        .filter(|id| !is_older || !matches!(**id, RecordId::HostEndpoint(_) | RecordId::Bgp));
    let records = known.map(|id| {
        let record = view.record(&id).expect("a record of the view");
        (id.into_owned(), record.into_owned())
    });
    records.collect()
}

#[test]
fn changes_that_cancel_each_other_out_are_not_pending() {
    let mut world = World::new();
    world.connect(0, 0);
    let pod = |pod: u8| mk_endpoint(0, pod, 0, 0, Some(pod));
    let Update::Endpoint(key, _) = pod(2) else {
        unreachable!("a pod is an endpoint")
    };
    // The first one fills the slot, which the node does not read.
    for (update, waits) in [(pod(1), 0), (pod(2), 1), (Update::Endpoint(key, None), 0)] {
        world.run(Step::Update(Box::new(update)));
        world.run(Step::Flush(0));
        assert_eq!(world.pending(0), (waits, waits));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn every_node_ends_with_its_view(
        early in proptest::collection::vec(update(), 0..12),
        steps in proptest::collection::vec(step(), 0..60),
    ) {
        let mut world = World::new();
        for update in early {
            world.run(Step::Update(Box::new(update)));
        }
        world.connect(0, 0);
        world.connect(1, 1);
        for step in steps {
            world.run(step);
            for (node, name) in NODES.iter().enumerate() {
                let (reported, pending) = world.pending(node);
                prop_assert_eq!(reported, pending, "{}", name);
            }
        }
        world.converge();
        for (node, agent) in world.agents.iter().enumerate() {
            let stream = agent.stream.as_ref().expect("connected");
            let wanted = view(&world.replicas[stream.replica], NODES[node]);
            prop_assert_eq!(&agent.held, &wanted, "{}", NODES[node]);
        }
        // Both replicas have the same state now, so connecting to the other one would resend
        // nothing.
        for (name, agent) in NODES.iter().zip(&world.agents) {
            let other = 1 - agent.stream.as_ref().expect("connected").replica;
            let wanted = view(&world.replicas[other], name);
            prop_assert_eq!(buckets(&agent.held), buckets(&wanted));
        }
    }

    /// A node that never reads costs at most its view and the records of the frame in its slot.
    #[test]
    fn a_session_that_does_not_read_is_bounded(
        updates in proptest::collection::vec(update(), 0..80),
    ) {
        let mut world = World::new();
        world.connect(0, 0);
        for update in updates {
            world.run(Step::Update(Box::new(update)));
            world.run(Step::Flush(0));
        }
        let hub = &world.replicas[0];
        let (pending, view) = (hub.pending("n0"), hub.graph.view("n0").ids().count());
        let stream = world.agents[0].stream.as_mut().expect("connected");
        let in_slot = match stream.frames.try_recv() {
            Ok(frame) => decode(&frame.expect("a frame")).changes.len(),
            Err(_) => 0,
        };
        prop_assert!(
            pending <= view + in_slot,
            "{} pending, {} in the view, {} in the slot",
            pending,
            view,
            in_slot,
        );
    }
}
