//! Changes of others reach nodes while the largest policies come in, through the real server, and typha's memory
//! does not follow their size. A program of its own, as it measures the memory of the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::v3;
use margay_calc::model::{Record, RecordId};
use margay_typha::compute::Event;
use margay_typha::feed::{Feed, Form, News, Parsed};
use margay_typha::hub::Cause;
use margay_typha::kinds;
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

/// The most by which memory may grow.
const ROOM: usize = 50 << 20;
/// Changes of a pod while policies come in.
const CHANGES: u16 = 40;

/// A field of the process's status, in bytes.
fn memory(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
    line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().expect("a number") * 1024
}

/// A watch of one kind that reports one object.
struct Watched<K> {
    kind: &'static str,
    feed: Feed<K>,
    line: String,
}

impl<K: DeserializeOwned> Watched<K> {
    fn new(kind: &'static str, parse: fn(K) -> Parsed, object: &str) -> Self {
        let mut feed = Feed::new(parse, Form::Plain, false);
        let end = r#"{"metadata":{"resourceVersion":"1","annotations":{"k8s.io/initial-events-end":"true"}}}"#;
        let listed = feed.line(format!(r#"{{"type":"BOOKMARK","object":{end}}}"#).as_bytes());
        assert!(matches!(listed, Ok(News::List(objects)) if objects.is_empty()));
        Self { kind, feed, line: format!(r#"{{"type":"MODIFIED","object":{object}}}"#) }
    }

    /// The event of another report of the object.
    fn event(&mut self) -> Event {
        let Ok(News::Object(object, _)) = self.feed.line(self.line.as_bytes()) else { panic!("no object") };
        assert!(!object.problems.is_empty(), "{} is beyond the limits", object.key);
        Event::Observed { kind: self.kind, objects: vec![*object], cause: Cause::default() }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn others_are_served_while_the_largest_policies_come_in() {
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
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak is forgotten");
    let before = memory("VmRSS:");

    let is_over = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (typha, is_over) = (typha.clone(), is_over.clone());
        async move {
            let kubernetes = "KubernetesNetworkPolicy";
            let mut inwards = Watched::<NetworkPolicy>::new(kubernetes, kinds::kubernetes_policy, &inwards);
            let mut outwards = Watched::<NetworkPolicy>::new(kubernetes, kinds::kubernetes_policy, &outwards);
            let mut multiplied = Watched::<v3::NetworkPolicy>::new("NetworkPolicy", kinds::network_policy, &multiplied);
            while !is_over.load(Ordering::Relaxed) {
                for next in [Watched::event(&mut inwards), Watched::event(&mut outwards)] {
                    typha.tell(next).await;
                }
                typha.tell(multiplied.event()).await;
            }
        }
    });
    for number in 1001..1001 + CHANGES {
        typha.observe(vec![mk_pod("b", "n2", number)]).await;
        own.until(|held| is_member_anywhere(held, address_of(number))).await;
    }
    is_over.store(true, Ordering::Relaxed);
    writing.await.expect("policies are written to the end");
    let closed = |held: &held::Held| {
        let closed = |(id, record): (&RecordId, &Record)| match (id, record) {
            (RecordId::Policy(key), Record::Policy(policy)) => {
                ["inwards", "outwards", "multiplied"].contains(&key.name.as_str())
                    && policy.ingress.is_empty()
                    && policy.egress.is_empty()
            }
            _ => false,
        };
        held.iter().filter(|entry| closed(*entry)).count()
    };
    own.until(|held| closed(held) == 3).await;
    let grown = memory("VmHWM:").saturating_sub(before);
    assert!(grown < ROOM, "{grown} bytes more");
}
