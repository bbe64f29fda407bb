//! Latency of a pod's change to a node beside the largest policies: alone, with them in force, and
//! while they are written continuously; each with its ratio to the latency alone.
//!
//! `cargo bench -p margay-typha --bench beside`. Wall time from the event of the watch to the frame
//! at the node, through the real server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::v3;
use margay_calc::ingest::{self, Ingested};
use margay_typha::cause::Cause;
use margay_typha::event::Event;
use margay_typha::feed::{Feed, Form, WatchEvent};
use margay_typha::object::Observed;
use serde::de::DeserializeOwned;

use crate::peers::{Agent, Typha, address_of, is_member_anywhere, mk_pod};

#[allow(dead_code, reason = "shared with tests")]
#[path = "../tests/stream/held.rs"]
mod held;
#[allow(dead_code, reason = "shared with tests")]
#[path = "../tests/stream/large.rs"]
mod large;
#[allow(dead_code, reason = "shared with tests")]
#[path = "../tests/stream/peers.rs"]
mod peers;

/// Number of timed changes.
const CHANGES: u16 = 2000;
/// Time between two writes of a policy.
const PAUSE: Duration = Duration::from_millis(100);
/// Limit for the ratio.
const BUDGET: f64 = 1.2;

fn observe<K: DeserializeOwned>(ingest: fn(K) -> Ingested, object: &str) -> Observed {
    let mut feed = Feed::new(ingest, Form::Plain, false);
    let end = r#"{"metadata":{"resourceVersion":"1","annotations":{"k8s.io/initial-events-end":"true"}}}"#;
    feed.decode_line(format!(r#"{{"type":"BOOKMARK","object":{end}}}"#).as_bytes())
        .expect("a list without objects");
    match feed.decode_line(format!(r#"{{"type":"MODIFIED","object":{object}}}"#).as_bytes()) {
        Ok(WatchEvent::Applied(object, _)) => *object,
        other => panic!("{other:?}"),
    }
}

#[derive(Clone, Copy)]
enum PolicySource {
    Kubernetes,
    Calico,
}

/// A policy as the API server sends it.
struct WrittenPolicy {
    name: &'static str,
    source: PolicySource,
    object: String,
}

impl WrittenPolicy {
    fn new(name: &'static str, source: PolicySource, spec: &str) -> Self {
        let version = match source {
            PolicySource::Kubernetes => "networking.k8s.io/v1",
            PolicySource::Calico => "projectcalico.org/v3",
        };
        Self {
            name,
            source,
            object: large::object(version, "ns", name, spec),
        }
    }

    /// Event that its watch sends.
    fn event(&self) -> Event {
        let (kind, observed) = match self.source {
            PolicySource::Kubernetes => (
                "KubernetesNetworkPolicy",
                observe::<NetworkPolicy>(ingest::kubernetes_policy, &self.object),
            ),
            PolicySource::Calico => (
                "NetworkPolicy",
                observe::<v3::NetworkPolicy>(ingest::network_policy, &self.object),
            ),
        };
        Event::Observed {
            kind,
            objects: vec![observed],
            cause: Cause::default(),
        }
    }
}

/// Median and 99th percentile of the latency of a pod's changes to a node.
async fn measure_changes(typha: &Typha, node: &mut Agent) -> (Duration, Duration) {
    let mut times = Vec::with_capacity(CHANGES.into());
    for number in 0..CHANGES {
        let address = 1000 + number;
        let started = Instant::now();
        typha.observe(vec![mk_pod("b", "n2", address)]).await;
        node.until(|held| is_member_anywhere(held, address_of(address)))
            .await;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

fn report(what: &str, (p50, p99): (Duration, Duration), alone: (Duration, Duration)) {
    let ratio = |now: Duration, alone: Duration| now.as_secs_f64() / alone.as_secs_f64();
    println!(
        "  {what}: p50 {p50:.2?} ({:.2} x), p99 {p99:.2?} ({:.2} x)   [budget {BUDGET} x]",
        ratio(p50, alone.0),
        ratio(p99, alone.1)
    );
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let typha = Arc::new(Typha::start().await);
    typha.select_everything().await;
    typha
        .observe(vec![mk_pod("a", "n1", 1), mk_pod("b", "n2", 999)])
        .await;
    let mut node = typha.node("n1").await;
    node.until(|held| is_member_anywhere(held, address_of(999)))
        .await;
    println!("a pod's change, from the watch to a node, beside the largest policies");
    // Warms up.
    measure_changes(&typha, &mut node).await;
    let alone = measure_changes(&typha, &mut node).await;
    report("alone", alone, alone);
    let policies = [
        WrittenPolicy::new(
            "inwards",
            PolicySource::Kubernetes,
            &large::inwards(20_000, 20_000),
        ),
        WrittenPolicy::new(
            "outwards",
            PolicySource::Kubernetes,
            &large::outwards(20_000, 20_000),
        ),
        WrittenPolicy::new("multiplied", PolicySource::Calico, &large::multiplied()),
        WrittenPolicy::new(
            "largest-in",
            PolicySource::Kubernetes,
            &large::inwards(200, 300),
        ),
        WrittenPolicy::new(
            "largest-out",
            PolicySource::Kubernetes,
            &large::outwards(100, 150),
        ),
    ];
    for policy in &policies {
        let started = Instant::now();
        let event = policy.event();
        println!("  {}: ingested in {:.2?}", policy.name, started.elapsed());
        typha.send(event).await;
    }
    measure_changes(&typha, &mut node).await;
    report(
        "beside them",
        measure_changes(&typha, &mut node).await,
        alone,
    );
    let is_done = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (typha, is_done) = (typha.clone(), is_done.clone());
        async move {
            for policy in policies.iter().cycle() {
                if is_done.load(Ordering::Relaxed) {
                    return;
                }
                typha.send(policy.event()).await;
                tokio::time::sleep(PAUSE).await;
            }
        }
    });
    report(
        &format!("while one is written every {PAUSE:?}"),
        measure_changes(&typha, &mut node).await,
        alone,
    );
    is_done.store(true, Ordering::Relaxed);
    writer.await.expect("the writer panicked");
}
