//! How soon a pod's change reaches a node beside the largest policies: alone, with them in force, and while they are
//! written all the time; beside each figure how much longer that is than alone.
//!
//! `cargo bench -p margay-typha --bench beside`. Wall time from the event of the watch to the frame at the node, through
//! the real server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::v3;
use margay_typha::cache::Observed;
use margay_typha::compute::Event;
use margay_typha::feed::{Feed, Form, News, Parsed};
use margay_typha::hub::Cause;
use margay_typha::kinds;
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

/// Changes that are timed.
const CHANGES: u16 = 2000;
/// Between two writes of a policy: faster than anybody writes by hand.
const PAUSE: Duration = Duration::from_millis(100);
/// What others may take longer beside the policies.
const BUDGET: f64 = 1.2;

fn observed<K: DeserializeOwned>(parse: fn(K) -> Parsed, object: &str) -> Observed {
    let mut feed = Feed::new(parse, Form::Plain, false);
    let end = r#"{"metadata":{"resourceVersion":"1","annotations":{"k8s.io/initial-events-end":"true"}}}"#;
    feed.line(format!(r#"{{"type":"BOOKMARK","object":{end}}}"#).as_bytes()).expect("a list without objects");
    match feed.line(format!(r#"{{"type":"MODIFIED","object":{object}}}"#).as_bytes()) {
        Ok(News::Object(object, _)) => *object,
        other => panic!("{other:?}"),
    }
}

/// A policy as the API server sends it.
#[derive(Clone, Copy)]
enum Kind {
    Kubernetes,
    Calico,
}

struct Written {
    name: &'static str,
    kind: Kind,
    object: String,
}

impl Written {
    fn new(name: &'static str, kind: Kind, spec: &str) -> Self {
        let version = match kind {
            Kind::Kubernetes => "networking.k8s.io/v1",
            Kind::Calico => "projectcalico.org/v3",
        };
        Self { name, kind, object: large::object(version, "ns", name, spec) }
    }

    /// What its watch does with it.
    fn event(&self) -> Event {
        let (kind, observed) = match self.kind {
            Kind::Kubernetes => {
                ("KubernetesNetworkPolicy", observed::<NetworkPolicy>(kinds::kubernetes_policy, &self.object))
            }
            Kind::Calico => ("NetworkPolicy", observed::<v3::NetworkPolicy>(kinds::network_policy, &self.object)),
        };
        Event::Observed { kind, objects: vec![observed], cause: Cause::default() }
    }
}

/// Median and 99th percentile of the changes of a pod, until a node has each.
async fn changes(typha: &Typha, node: &mut Agent) -> (Duration, Duration) {
    let mut times = Vec::with_capacity(CHANGES.into());
    for number in 0..CHANGES {
        let address = 1000 + number;
        let started = Instant::now();
        typha.observe(vec![mk_pod("b", "n2", address)]).await;
        node.until(|held| is_member_anywhere(held, address_of(address))).await;
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
    typha.observe(vec![mk_pod("a", "n1", 1), mk_pod("b", "n2", 999)]).await;
    let mut node = typha.node("n1").await;
    node.until(|held| is_member_anywhere(held, address_of(999))).await;
    println!("a pod's change, from the watch to a node, beside the largest policies");
    changes(&typha, &mut node).await;
    let alone = changes(&typha, &mut node).await;
    report("alone", alone, alone);
    let policies = [
        Written::new("inwards", Kind::Kubernetes, &large::inwards(20_000, 20_000)),
        Written::new("outwards", Kind::Kubernetes, &large::outwards(20_000, 20_000)),
        Written::new("multiplied", Kind::Calico, &large::multiplied()),
        Written::new("largest-in", Kind::Kubernetes, &large::inwards(200, 300)),
        Written::new("largest-out", Kind::Kubernetes, &large::outwards(100, 150)),
    ];
    for policy in &policies {
        let started = Instant::now();
        let event = policy.event();
        println!("  {}: read in {:.2?}", policy.name, started.elapsed());
        typha.tell(event).await;
    }
    changes(&typha, &mut node).await;
    report("beside them", changes(&typha, &mut node).await, alone);
    let is_over = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (typha, is_over) = (typha.clone(), is_over.clone());
        async move {
            for policy in policies.iter().cycle() {
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                typha.tell(policy.event()).await;
                tokio::time::sleep(PAUSE).await;
            }
        }
    });
    report(&format!("while one is written every {PAUSE:?}"), changes(&typha, &mut node).await, alone);
    is_over.store(true, Ordering::Relaxed);
    writing.await.expect("it ends");
}
