//! Changes of others reach nodes while the largest policies arrive, through the real server, and
//! typha's memory does not grow with their size. A program of its own, because it measures the
//! memory of the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::v3;
use margay_calc::ingest::{self, Ingested};
use margay_calc::model::{Record, RecordId};
use margay_typha::cause::Cause;
use margay_typha::event::Event;
use margay_typha::feed::{Feed, Form, WatchEvent};
use serde::de::DeserializeOwned;

use crate::peers::{Typha, address_of, addresses, is_member_anywhere, mk_pod};

#[allow(dead_code, reason = "shared with other tests")]
#[path = "stream/held.rs"]
mod held;
#[path = "stream/large.rs"]
mod large;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "stream/peers.rs"]
mod peers;

/// Limit for the growth of memory.
const MEMORY_LIMIT: usize = 50 << 20;
/// Number of changes of a pod while policies arrive.
const CHANGES: u16 = 40;

/// A field of `/proc/self/status`, in bytes.
fn memory(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().expect("a number") * 1024
}

/// Watch of one kind that reports one object.
struct ObjectWatch<K> {
    kind: &'static str,
    feed: Feed<K>,
    line: String,
}

impl<K: DeserializeOwned> ObjectWatch<K> {
    fn new(kind: &'static str, ingest: fn(K) -> Ingested, object: &str) -> Self {
        let mut feed = Feed::new(ingest, Form::Plain, false);
        let end = r#"{"metadata":{"resourceVersion":"1","annotations":{"k8s.io/initial-events-end":"true"}}}"#;
        let listed = feed.decode_line(format!(r#"{{"type":"BOOKMARK","object":{end}}}"#).as_bytes());
        assert!(matches!(listed, Ok(WatchEvent::ListComplete(objects)) if objects.is_empty()));
        Self { kind, feed, line: format!(r#"{{"type":"MODIFIED","object":{object}}}"#) }
    }

    /// Reports the object again.
    fn event(&mut self) -> Event {
        let Ok(WatchEvent::Applied(object, _)) = self.feed.decode_line(self.line.as_bytes()) else {
            panic!("no object")
        };
        assert!(!object.problems.is_empty(), "{} is beyond the limits", object.key);
        Event::Observed { kind: self.kind, objects: vec![*object], cause: Cause::default() }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_others_are_sent_while_the_largest_policies_arrive() {
    let typha = Arc::new(Typha::start().await);
    typha.select_everything().await;
    typha.observe(vec![mk_pod("a", "n1", 1), mk_pod("b", "n2", 1000)]).await;
    let mut other = typha.node("n2").await;
    other.until(|held| !addresses(held, "b").is_empty()).await;
    let mut own = typha.node("n1").await;
    own.until(|held| is_member_anywhere(held, address_of(1000))).await;

    let (core, calico) = ("networking.k8s.io/v1", "projectcalico.org/v3");
    let inwards = large::object(core, "ns", "inwards", &large::inwards(20_000, 20_000));
    let outwards = large::object(core, "ns", "outwards", &large::outwards(20_000, 20_000));
    let multiplied = large::object(calico, "ns", "multiplied", &large::multiplied());
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak is reset");
    let before = memory("VmRSS:");

    let is_done = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (typha, is_done) = (typha.clone(), is_done.clone());
        async move {
            let kubernetes = "KubernetesNetworkPolicy";
            let mut inwards = ObjectWatch::<NetworkPolicy>::new(kubernetes, ingest::kubernetes_policy, &inwards);
            let mut outwards = ObjectWatch::<NetworkPolicy>::new(kubernetes, ingest::kubernetes_policy, &outwards);
            let mut multiplied =
                ObjectWatch::<v3::NetworkPolicy>::new("NetworkPolicy", ingest::network_policy, &multiplied);
            while !is_done.load(Ordering::Relaxed) {
                for next in [inwards.event(), outwards.event()] {
                    typha.send(next).await;
                }
                typha.send(multiplied.event()).await;
            }
        }
    });
    for number in 1001..1001 + CHANGES {
        typha.observe(vec![mk_pod("b", "n2", number)]).await;
        own.until(|held| is_member_anywhere(held, address_of(number))).await;
    }
    is_done.store(true, Ordering::Relaxed);
    writer.await.expect("the writer panicked");
    let count_closed = |held: &held::Held| {
        let is_closed = |(id, record): (&RecordId, &Record)| match (id, record) {
            (RecordId::Policy(key), Record::Policy(policy)) => {
                ["inwards", "outwards", "multiplied"].contains(&key.name.as_str())
                    && policy.ingress.is_empty()
                    && policy.egress.is_empty()
            }
            _ => false,
        };
        held.iter().filter(|entry| is_closed(*entry)).count()
    };
    own.until(|held| count_closed(held) == 3).await;
    let grown = memory("VmHWM:").saturating_sub(before);
    assert!(grown < MEMORY_LIMIT, "{grown} bytes more");
}
