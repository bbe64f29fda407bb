//! Which hellos a replica answers, beside others: an owner without a network, in virtual time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use margay_calc::model::RecordId;
use margay_proto::sync::{SERVERS_METADATA, Versions};
use margay_runtime::ready::Readiness;
use margay_runtime::shutdown::Shutdown;
use margay_typha::cache::Cache;
use margay_typha::cause::Cause;
use margay_typha::codec::FrameBytes;
use margay_typha::compute::{EVENT_QUEUE, GraphOwner};
use margay_typha::event::Event;
use margay_typha::freshness::{CATCH_UP, CUT_OFF};
use margay_typha::hello::{Capabilities, Hello};
use margay_typha::metrics::Counters;
use margay_typha::object::Observed;
use margay_typha::placement::{Placement, Replica};
use margay_typha::registry::Registry;
use prometheus_client::registry::Registry as Metrics;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;
use tonic::{Code, Status};

use crate::held::{Held, apply, buckets, decode};
use crate::peers::{key, mk_pod};

type Frames = mpsc::Receiver<Result<FrameBytes, Status>>;

/// A replica whose API is the test.
struct Owner {
    events: mpsc::Sender<Event>,
    registry: Registry,
    readiness: Readiness,
    shutdown: Shutdown,
    sessions: AtomicU64,
}

impl Owner {
    /// Starts one whose pod has this name; it is in sync.
    async fn start(pod: &str) -> Self {
        let registry = Registry::default();
        let counters = Counters::register(&mut Metrics::default(), registry.clone());
        let (readiness, shutdown) = (Readiness::default(), Shutdown::default());
        let gate = readiness.gate("sync", "starting");
        let mut owner = GraphOwner::new(Cache::new(["Pod"]), counters, registry.clone(), gate);
        owner.hub.placement = Placement::new(pod);
        let (events, inbox) = mpsc::channel(EVENT_QUEUE);
        tokio::spawn(owner.run(inbox, shutdown.clone()));
        let owner = Self {
            events,
            registry,
            readiness,
            shutdown,
            sessions: AtomicU64::new(1),
        };
        owner.send(Event::ListStarted("Pod")).await;
        owner.observe(mk_pod("p0", "n1", 1), 0).await;
        let (kind, version, newest) = ("Pod", 11, 10);
        owner
            .send(Event::Sweep {
                kind,
                version,
                newest,
            })
            .await;
        owner.idle().await;
        owner
    }

    async fn send(&self, event: Event) {
        assert!(self.events.send(event).await.is_ok(), "the owner has ended");
    }

    async fn observe(&self, object: Observed, version: u64) {
        self.send(Event::Observed {
            kind: "Pod",
            objects: vec![object],
            cause: Cause {
                version,
                ..Cause::default()
            },
        })
        .await;
    }

    async fn answer(&self, version: u64) {
        let kind = "Pod";
        self.send(Event::Answered { kind, version }).await;
        self.idle().await;
    }

    async fn fail(&self) {
        let (kind, reason) = ("Pod", "connection refused".to_owned());
        self.send(Event::Unanswered { kind, reason }).await;
    }

    /// Waits until the owner has handled everything that is due.
    async fn idle(&self) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    /// Tells the replica which ones are ready.
    async fn set_replicas(&self, pods: &[&str]) {
        self.send(Event::Replicas(mk_replicas(pods))).await;
        self.idle().await;
    }

    /// Sends the hello of a node that holds these records and this version of pods.
    async fn hello(&self, node: &str, held: &Held, version: u64, has_alternatives: bool) -> Frames {
        let (slot, frames) = mpsc::channel(1);
        let versions = match version {
            0 => Versions::new(),
            version => Versions::from([("Pod".to_owned(), version)]),
        };
        let hello = Hello {
            node: node.to_owned(),
            session: self.sessions.fetch_add(1, Ordering::Relaxed),
            agent_version: String::new(),
            buckets: if held.is_empty() {
                Vec::new()
            } else {
                buckets(held)
            },
            versions,
            has_alternatives,
            capabilities: Capabilities {
                host_endpoints: true,
                compact: true,
                bgp: true,
            },
            slot,
            blocked: Arc::new(AtomicBool::new(false)),
        };
        self.send(Event::Hello(hello)).await;
        self.idle().await;
        frames
    }
}

fn mk_replicas(pods: &[&str]) -> Vec<Replica> {
    let replica = |pod: &&str| Replica {
        pod: (*pod).to_owned(),
        server: format!("{pod}:5473"),
        zone: String::new(),
    };
    pods.iter().map(replica).collect()
}

/// The frame that is there.
fn frame(frames: &mut Frames) -> margay_proto::sync::Frame {
    decode(&frames.try_recv().expect("an answer").expect("a frame"))
}

/// The status that is there, with the servers that it names.
fn status(frames: &mut Frames) -> (Code, String) {
    let status = frames.try_recv().expect("an answer").expect_err("a status");
    let servers = status.metadata().get(SERVERS_METADATA);
    let servers = servers.and_then(|servers| servers.to_str().ok());
    (status.code(), servers.unwrap_or_default().to_owned())
}

fn is_waiting(frames: &mut Frames) -> bool {
    matches!(frames.try_recv(), Err(TryRecvError::Empty))
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_behind_takes_nothing_back() {
    let (one, two) = (Owner::start("one").await, Owner::start("two").await);
    let mut held = Held::new();
    let mut frames = one.hello("n1", &held, 0, true).await;
    let first = frame(&mut frames);
    assert_eq!(first.trailer.versions.get("Pod"), Some(&10));
    apply(&mut held, &first);
    one.observe(mk_pod("p1", "n1", 2), 12).await;
    one.idle().await;
    let second = frame(&mut frames);
    assert_eq!(second.trailer.versions.get("Pod"), Some(&12));
    apply(&mut held, &second);

    // It may catch up; if it does not, the node is sent elsewhere, even as the last resort.
    for has_alternatives in [true, false] {
        let mut late = two.hello("n1", &held, 12, has_alternatives).await;
        assert!(is_waiting(&mut late));
        tokio::time::sleep(CATCH_UP).await;
        assert_eq!(status(&mut late).0, Code::Unavailable);
    }
    let mut late = two.hello("n1", &held, 12, true).await;
    two.observe(mk_pod("p1", "n1", 2), 12).await;
    two.idle().await;
    let resumed = frame(&mut late);
    assert_eq!(
        (resumed.changes, resumed.trailer.restated_buckets),
        (vec![], vec![])
    );
    assert!(held.contains_key(&RecordId::Endpoint(key("p1"))));
}

#[tokio::test(start_paused = true)]
async fn a_node_follows_an_api_that_went_back() {
    let replica = Owner::start("one").await;
    let mut refused = replica.hello("n1", &Held::new(), 12, true).await;
    tokio::time::sleep(CATCH_UP).await;
    assert_eq!(status(&mut refused).0, Code::Unavailable);
    replica.answer(10).await;
    let mut answered = replica.hello("n1", &Held::new(), 12, true).await;
    assert!(frame(&mut answered).trailer.in_sync);
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_cut_off_says_so_and_sends_its_nodes_away_once() {
    let replica = Owner::start("one").await;
    replica.set_replicas(&["one", "two"]).await;
    let mut streams = Vec::new();
    for node in 0..20 {
        let mut frames = replica
            .hello(&format!("n{node}"), &Held::new(), 0, true)
            .await;
        frame(&mut frames);
        streams.push(frames);
    }
    assert!(replica.readiness.is_ready());
    replica.fail().await;
    tokio::time::sleep(CUT_OFF / 2).await;
    replica.idle().await;
    assert!(
        replica.readiness.is_ready(),
        "an API server restarts in less"
    );
    tokio::time::sleep(CUT_OFF / 2).await;
    let missing = replica.readiness.missing();
    assert!(
        missing[0].1.contains("watch of Pod: connection refused"),
        "{missing:?}"
    );
    assert!(replica.registry.is_cut_off());

    // All are sent away, one after another, to the other one.
    tokio::time::sleep(Duration::from_secs(2)).await;
    for frames in &mut streams {
        let mut answers = std::iter::from_fn(|| frames.try_recv().ok());
        let status = answers.find_map(Result::err).expect("a status");
        assert_eq!(
            status.metadata().get(SERVERS_METADATA).expect("a hint"),
            "two:5473"
        );
    }
    assert!(replica.registry.sessions().is_empty());
    let mut again = replica.hello("n1", &Held::new(), 0, true).await;
    assert_eq!(
        status(&mut again),
        (Code::Unavailable, "two:5473".to_owned())
    );
    // Nobody else answers either: it is served, and stays.
    let mut last = replica.hello("n1", &Held::new(), 0, false).await;
    assert!(frame(&mut last).trailer.in_sync);
    tokio::time::sleep(2 * CUT_OFF).await;
    assert_eq!(replica.registry.sessions().len(), 1);

    replica.answer(11).await;
    assert!(replica.readiness.is_ready() && !replica.registry.is_cut_off());
    let mut served = replica.hello("n2", &Held::new(), 0, true).await;
    assert!(frame(&mut served).trailer.in_sync);
}

#[tokio::test(start_paused = true)]
async fn nodes_are_moved_once_to_the_replica_that_is_to_serve_them() {
    const NODES: usize = 60;
    let replica = Owner::start("one").await;
    let mut streams = Vec::new();
    for node in 0..NODES {
        let mut frames = replica
            .hello(&format!("n{node}"), &Held::new(), 0, true)
            .await;
        assert_eq!(frame(&mut frames).trailer.servers, [""; 0]);
        streams.push(frames);
    }
    replica.set_replicas(&["one", "two"]).await;
    let mut misplaced = BTreeSet::new();
    for (node, frames) in streams.iter_mut().enumerate() {
        let servers = frame(frames).trailer.servers;
        assert_eq!(servers.len(), 2, "everybody is informed");
        if servers[0] == "two:5473" {
            misplaced.insert(node);
        }
    }
    assert!(
        (NODES / 4..3 * NODES / 4).contains(&misplaced.len()),
        "{misplaced:?}"
    );
    assert_eq!(
        replica.registry.sessions().len(),
        NODES,
        "the list may still change"
    );
    tokio::time::sleep(Duration::from_secs(30)).await;
    for (node, frames) in streams.iter_mut().enumerate() {
        match misplaced.contains(&node) {
            true => assert_eq!(status(frames).1, "two:5473"),
            false => assert!(is_waiting(frames), "n{node} stays"),
        }
    }
    // One that comes later is moved at once.
    let new = (100..).map(|node| format!("n{node}"));
    let mut placement = Placement::new("one");
    placement.set(mk_replicas(&["one", "two"]));
    let new = new
        .into_iter()
        .find(|node| placement.is_misplaced(node, ""));
    let mut late = replica
        .hello(&new.expect("one of many"), &Held::new(), 0, true)
        .await;
    frame(&mut late);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(status(&mut late).1, "two:5473");
    // One that comes back, because the other one is full, is not sent away again.
    let node = format!("n{}", misplaced.first().expect("some"));
    let mut back = replica.hello(&node, &Held::new(), 0, true).await;
    assert!(frame(&mut back).trailer.in_sync);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(is_waiting(&mut back));
}

#[tokio::test(start_paused = true)]
async fn a_full_replica_refuses_with_a_hint_unless_there_is_nobody_else() {
    let replica = Owner::start("one").await;
    replica.set_replicas(&["one", "two"]).await;
    let mut streams = Vec::new();
    for node in 0..100 {
        let mut frames = replica
            .hello(&format!("n{node}"), &Held::new(), 0, true)
            .await;
        frame(&mut frames);
        streams.push(frames);
    }
    let mut refused = replica.hello("late", &Held::new(), 0, true).await;
    assert_eq!(
        status(&mut refused),
        (Code::Unavailable, "two:5473".to_owned())
    );
    let mut served = replica.hello("late", &Held::new(), 0, false).await;
    assert!(frame(&mut served).trailer.in_sync);
    replica.set_replicas(&["one"]).await;
    let mut alone = replica.hello("later", &Held::new(), 0, true).await;
    assert!(frame(&mut alone).trailer.in_sync);
}

#[tokio::test(start_paused = true)]
async fn a_herd_of_hellos_is_answered_as_views_are_taken() {
    const NODES: usize = 200;
    let replica = Owner::start("one").await;
    let mut streams = Vec::new();
    for node in 0..NODES {
        let (slot, frames) = mpsc::channel(1);
        let hello = Hello {
            node: format!("n{node}"),
            session: 1000 + node as u64,
            agent_version: String::new(),
            buckets: Vec::new(),
            versions: Versions::new(),
            has_alternatives: true,
            capabilities: Capabilities::default(),
            slot,
            blocked: Arc::default(),
        };
        replica.send(Event::Hello(hello)).await;
        streams.push(frames);
    }
    replica.idle().await;
    let count = |streams: &[Frames]| streams.iter().filter(|frames| !frames.is_empty()).count();
    let begun = count(&streams);
    assert!((1..NODES / 2).contains(&begun), "{begun} views at once");
    // As views are taken others follow.
    for frames in &mut streams[..begun] {
        frame(frames);
    }
    replica.idle().await;
    assert!((1..=begun).contains(&count(&streams)));
    // Nodes that do not take theirs delay the others for a second each time.
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(count(&streams), NODES - begun);
}

#[tokio::test(start_paused = true)]
async fn a_drain_moves_streams_without_a_snapshot() {
    let (one, two) = (Owner::start("one").await, Owner::start("two").await);
    one.set_replicas(&["one", "two"]).await;
    let mut held = Held::new();
    let mut frames = one.hello("n1", &held, 0, true).await;
    apply(&mut held, &frame(&mut frames));
    one.shutdown.trigger();
    one.idle().await;
    assert_eq!(
        status(&mut frames),
        (Code::Unavailable, "two:5473".to_owned())
    );
    let mut moved = two.hello("n1", &held, 10, true).await;
    let first = frame(&mut moved);
    assert_eq!(
        (first.changes, first.trailer.restated_buckets),
        (vec![], vec![])
    );
}
