//! What every sync server must do, as far as no other test shows it.

use std::collections::BTreeSet;

use margay_calc::model::RecordId;
use margay_typha::cause::Cause;
use margay_typha::event::Event;
use margay_typha::object::Observed;
use tower::{Service, ServiceExt};

use crate::held::Held;
use crate::peers::{self, Typha, address_of, key, mk_pod, until};

/// Objects of one event.
const CHUNK: usize = 500;

fn held_pods(held: &Held) -> BTreeSet<&str> {
    let pods = held.keys().filter_map(|id| match id {
        RecordId::Endpoint(key) => Some(key.name.as_str()),
        _ => None,
    });
    pods.collect()
}

async fn observe_all(typha: &Typha, pods: impl Iterator<Item = Observed>) {
    let mut pods = pods.peekable();
    while pods.peek().is_some() {
        typha.observe(pods.by_ref().take(CHUNK).collect()).await;
    }
}

#[tokio::test]
async fn of_ten_thousand_pods_those_that_stay_are_exact() {
    const PODS: u16 = 10_000;
    let typha = Typha::start().await;
    let mut node = typha.node("n1").await;
    let pods = (0..PODS).map(|number| mk_pod(&format!("p{number}"), "n1", number));
    observe_all(&typha, pods).await;
    node.until(|held| held_pods(held).len() == usize::from(PODS))
        .await;
    // p1 goes and p12 stays, although its name begins alike.
    let is_deleted = |number: &u16| number % 3 == 1;
    for number in (0..PODS).filter(is_deleted) {
        typha
            .send(Event::Deleted {
                kind: "Pod",
                key: key(&format!("p{number}")),
                cause: Cause::default(),
            })
            .await;
    }
    let rest: BTreeSet<String> = (0..PODS)
        .filter(|number| !is_deleted(number))
        .map(|number| format!("p{number}"))
        .collect();
    node.until(|held| held_pods(held).len() == rest.len()).await;
    assert!(held_pods(&node.held).into_iter().eq(&rest));
    let mut late = typha.node("n1").await;
    late.frame().await;
    assert!(
        held_pods(&late.held).into_iter().eq(&rest),
        "a late client gets the same"
    );
}

#[tokio::test]
async fn two_hundred_thousand_pods_reach_ten_nodes() {
    const PODS: u32 = 200_000;
    let typha = Typha::start().await;
    let pods = (0..PODS).map(|number| {
        let mut pod = mk_pod(&format!("p{number}"), &format!("n{}", number % 1000), 0);
        peers::set_address(&mut pod, 0x0b00_0000 + number);
        pod
    });
    observe_all(&typha, pods).await;
    for number in 0..10 {
        let mut node = typha.node(&format!("n{number}")).await;
        let first = node.frame().await;
        assert!(first.trailer.in_sync);
        assert_eq!(held_pods(&node.held).len(), 200);
    }
}

#[tokio::test]
async fn half_of_a_hundred_nodes_leave_and_nothing_of_them_stays() {
    let typha = Typha::start().await;
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let pods = (0..1000)
        .map(|number| mk_pod(&format!("p{number}"), &format!("n{}", number % 100), number));
    observe_all(&typha, pods).await;
    // The first connection starts what stays.
    drop(typha.node("n0").await);
    until(|| typha.registry.sessions().is_empty()).await;
    let before = tasks();
    let mut nodes = Vec::new();
    for number in 0..100 {
        let mut node = typha.node(&format!("n{number}")).await;
        node.frame().await;
        assert_eq!(held_pods(&node.held).len(), 10);
        nodes.push(node);
    }
    until(|| typha.registry.sessions().len() == 100).await;
    let mut number = 0;
    nodes.retain(|_| {
        number += 1;
        number % 2 == 0
    });
    until(|| typha.registry.sessions().len() == 50).await;
    typha.observe(vec![mk_pod("more", "n1", 5000)]).await;
    nodes[0]
        .until(|held| held_pods(held).contains("more"))
        .await;
    drop(nodes);
    until(|| typha.registry.sessions().is_empty() && tasks() <= before).await;
}

#[tokio::test]
async fn a_method_that_does_not_exist_is_refused_with_the_one_that_does() {
    let typha = Typha::start().await;
    let channel = typha
        .channel(&typha.authority, "margay:node:n1", "margay:nodes")
        .await;
    let mut channel = channel.expect("our CA");
    let request = http::Request::post("/margay.sync.v1.Sync/Everything")
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .body(tonic::body::Body::empty())
        .expect("a request");
    let ready = channel.ready().await.expect("a connection");
    let answer = ready.call(request).await.expect("an answer");
    let status = tonic::Status::from_header_map(answer.headers()).expect("a status");
    assert_eq!(status.code(), tonic::Code::Unimplemented);
    assert!(status.message().contains("has only Sync"), "{status:?}");
}

#[tokio::test]
async fn a_renewed_certificate_ends_no_stream() {
    let typha = Typha::start().await;
    let mut node = typha.node("n1").await;
    node.frame().await;
    typha.renew_certificate();
    // A new connection gets the new certificate, and the stream goes on.
    let mut other = typha.node("n2").await;
    other.frame().await;
    typha.observe(vec![mk_pod("a", "n1", 1)]).await;
    node.until(|held| peers::addresses(held, "a") == [address_of(1)])
        .await;
}

#[tokio::test]
async fn a_frame_has_the_version_and_the_time_of_what_caused_it() {
    let typha = Typha::start().await;
    let mut node = typha.node("n1").await;
    node.frame().await;
    let seen_unix_ns = margay_runtime::clock::unix_ns();
    let version = 4711;
    typha
        .send(Event::Observed {
            kind: "Pod",
            objects: vec![mk_pod("a", "n1", 1)],
            cause: Cause {
                seen_unix_ns,
                version,
                ..Cause::default()
            },
        })
        .await;
    let frame = node.frame().await;
    assert_eq!(frame.trailer.event_unix_ns, seen_unix_ns);
    assert_eq!(frame.trailer.versions.get("Pod"), Some(&version));
    node.ack().await;
    until(|| typha.registry.count_current() == (1, 1)).await;
    // Observed once, and a histogram's sum would fall with a negative time.
    let text = typha.metrics();
    for stage in ["enforcement", "flush", "delivery", "ack"] {
        let sum = peers::value(&text, &format!("margay_typha_{stage}_seconds_sum"));
        assert!((0.0..60.0).contains(&sum), "{stage}: {sum}");
    }
}

#[tokio::test]
async fn metrics_move_under_calicos_names_too() {
    let typha = Typha::start().await;
    let value = |name: &str| peers::value(&typha.metrics(), name);
    let of_felix = |name: &str| value(&format!("{name}{{syncer=\"felix\"}}"));
    typha
        .observe(vec![mk_pod("a", "n1", 1), mk_pod("b", "n2", 2)])
        .await;
    let mut node = typha.node("n1").await;
    node.frame().await;
    assert_eq!(value("typha_connections_accepted"), 1.0);
    assert_eq!(value("typha_connections_active"), 1.0);
    assert_eq!(value("typha_connections_dropped"), 0.0);
    assert_eq!(of_felix("typha_connections_streaming"), 1.0);
    assert_eq!(of_felix("typha_updates_total"), 2.0);
    assert_eq!(of_felix("typha_updates_skipped"), 0.0);
    let sequence = of_felix("typha_breadcrumb_seq_number");
    // The same again changes nothing.
    typha.observe(vec![mk_pod("a", "n1", 1)]).await;
    typha.observe(vec![mk_pod("a", "n1", 3)]).await;
    node.frame().await;
    assert_eq!(of_felix("typha_updates_total"), 4.0);
    assert_eq!(of_felix("typha_updates_skipped"), 1.0);
    assert_eq!(of_felix("typha_cache_size"), 2.0);
    assert_eq!(of_felix("typha_breadcrumb_seq_number"), sequence + 1.0);
    assert!(of_felix("typha_breadcrumb_size_count") >= 1.0);
    assert_eq!(of_felix("typha_kvs_per_msg_count"), 1.0);
    assert!(of_felix("typha_kvs_per_msg_sum") >= 1.0);
    typha.observe(vec![mk_pod("a", "n1", 4)]).await;
    node.frame().await;
    assert!(of_felix("typha_client_latency_secs_count") >= 1.0);
    drop(node);
    until(|| value("typha_connections_active") == 0.0).await;
    assert_eq!(value("typha_connections_accepted"), 1.0);
    assert!(value("process_resident_memory_bytes") > 1e6);
}

#[tokio::test]
async fn what_changes_nothing_reaches_nobody() {
    let typha = Typha::start().await;
    typha.select_everything().await;
    typha.observe(vec![mk_pod("a", "n1", 1)]).await;
    let mut node = typha.node("n1").await;
    node.frame().await;
    for version in 1..50 {
        typha
            .send(Event::Observed {
                kind: "Pod",
                objects: vec![mk_pod("a", "n1", 1)],
                cause: Cause {
                    version,
                    ..Cause::default()
                },
            })
            .await;
    }
    typha.observe(vec![mk_pod("a", "n1", 2)]).await;
    let next = node.frame().await;
    assert!(next.changes.len() <= 2, "{next:?}");
    assert_eq!(peers::addresses(&node.held, "a"), [address_of(2)]);
}
