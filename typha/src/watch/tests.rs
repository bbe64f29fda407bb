//! Scripted responses of an API server, and the resulting events to the owner task.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http::{Request, Response};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::client::Body;
use margay_calc::update::Update;
use prometheus_client::registry::Registry as Metrics;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::*;
use crate::cache::Cache;
use crate::registry::Registry;

const KIND: &str = "ConfigMap";

/// An expected request, by parts of its path and query, and its response.
struct Scene {
    request: &'static [&'static str],
    code: u16,
    body: String,
}

fn scene(request: &'static [&'static str], lines: &[Value]) -> Scene {
    let body = lines.iter().map(|line| format!("{line}\n")).collect();
    Scene {
        request,
        code: 200,
        body,
    }
}

fn refusal(request: &'static [&'static str], code: u16) -> Scene {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "text", "reason": "Reason", "code": code});
    Scene {
        request,
        code,
        body: status.to_string(),
    }
}

fn object(name: &str, version: u64) -> Value {
    json!({
        "metadata": {
            "namespace": "ns",
            "name": name,
            "uid": "u",
            "resourceVersion": version.to_string(),
        },
    })
}

fn added(name: &str, version: u64) -> Value {
    json!({"type": "ADDED", "object": object(name, version)})
}

fn end(version: u64) -> Value {
    json!({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": version.to_string(),
        "annotations": {"k8s.io/initial-events-end": "true"}}}})
}

fn gone() -> Value {
    json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}})
}

const LIST: &[&str] = &["watch=true", "sendInitialEvents=true"];
const PAGED_LIST: &[&str] = &["/api/v1/configmaps?&limit=500"];

fn parse(map: ConfigMap) -> Ingested {
    let name = map.metadata.name.unwrap_or_default();
    Ingested {
        update: Some(Update::Namespace(name, Some(Default::default()))),
        ..Ingested::default()
    }
}

/// Plays the scenes up to the first request after them. Returns a line for each event that removed
/// or completed something.
async fn play(never_empty: bool, scenes: Vec<Scene>) -> Vec<String> {
    play_at("/api/v1/configmaps", None, never_empty, scenes).await
}

/// Like [`play`], for a kind at that path; with a definition it is an optional kind.
async fn play_at(
    path: &'static str,
    definition: Option<&'static str>,
    never_empty: bool,
    scenes: Vec<Scene>,
) -> Vec<String> {
    let script = Arc::new(Mutex::new(VecDeque::from(scenes)));
    let over = Arc::new(Notify::new());
    let at_end = over.clone();
    let server = tower::service_fn(move |request: Request<Body>| {
        let scene = script.lock().expect("one thread").pop_front();
        let uri = request.uri().to_string();
        let at_end = at_end.clone();
        async move {
            let Some(scene) = scene else {
                at_end.notify_one();
                return std::future::pending().await;
            };
            for part in scene.request {
                assert!(uri.contains(part), "expected {part}, got {uri}");
            }
            let response = Response::builder().status(scene.code);
            let body = Body::from(scene.body.into_bytes());
            Ok::<_, Infallible>(response.body(body).expect("a response"))
        }
    });
    let (events, mut inbox) = mpsc::channel(64);
    let watch = Watch {
        kind: KIND,
        path: path.to_owned(),
        form: Form::Plain,
        definition: definition.map(str::to_owned),
        never_empty,
        client: kube::Client::new(server, "default"),
        events,
        counters: Counters::register(&mut Metrics::default(), Registry::default()),
        jitter: || 0.0,
    };
    let task = tokio::spawn(watch.run(parse));
    let mut cache = Cache::new([KIND]);
    let mut results = Vec::new();
    // Events of the last scene are in the queue when the next request is made.
    loop {
        tokio::select! {
            biased;
            Some(event) = inbox.recv() => results.extend(apply(&mut cache, event)),
            () = over.notified() => break,
        }
    }
    task.abort();
    results
}

fn apply(cache: &mut Cache, event: Event) -> Option<String> {
    match event {
        Event::ListStarted(kind) => cache.start_list(kind),
        Event::Observed { kind, objects, .. } => {
            for object in objects {
                cache.apply(kind, object);
            }
            return None;
        }
        Event::Deleted { kind, key, .. } => {
            cache.delete(kind, &key);
            return Some(format!("deleted {key}"));
        }
        Event::ListCompleted { kind, limit, reply } => {
            reply.send(cache.missing(kind, limit)).expect("a receiver");
        }
        Event::Sweep { kind, .. } => {
            let removed = cache.sweep(kind).len();
            let held: usize = cache.counts().map(|(_, count, _)| count).sum();
            return Some(format!("in sync with {held}, {removed} removed"));
        }
        Event::Answered { .. } | Event::Unanswered { .. } => return None,
        _ => panic!("not an event of a watch"),
    }
    None
}

#[tokio::test]
async fn a_watch_resumes_from_its_version() {
    let results = play(
        false,
        vec![
            scene(LIST, &[added("a", 3), end(5)]),
            scene(
                &["resourceVersion=5"],
                &[json!({"type": "DELETED", "object": object("a", 7)})],
            ),
            refusal(&["resourceVersion=7"], 500),
            scene(&["resourceVersion=7"], &[]),
        ],
    )
    .await;
    assert_eq!(results, ["in sync with 1, 0 removed", "deleted ns/a"]);
}

#[tokio::test]
async fn a_new_list_removes_what_is_confirmed_to_be_gone() {
    let results = play(
        false,
        vec![
            scene(LIST, &[added("a", 3), added("b", 4), end(5)]),
            scene(&["resourceVersion=5"], &[gone()]),
            scene(LIST, &[added("a", 3), end(9)]),
            refusal(&["/api/v1/namespaces/ns/configmaps/b"], 404),
        ],
    )
    .await;
    assert_eq!(
        results,
        ["in sync with 2, 0 removed", "in sync with 1, 1 removed"]
    );
}

#[tokio::test]
async fn a_list_that_lacks_what_exists_removes_nothing() {
    let results = play(
        false,
        vec![
            scene(LIST, &[added("a", 3), added("b", 4), end(5)]),
            scene(&["resourceVersion=5"], &[gone()]),
            scene(LIST, &[end(9)]),
            scene(&["/api/v1/namespaces/ns/configmaps/a"], &[object("a", 3)]),
            // A list whose missing objects cannot be requested removes nothing either.
            scene(LIST, &[end(10)]),
            refusal(&["/api/v1/namespaces/ns/configmaps/a"], 500),
            scene(LIST, &[added("a", 3), added("b", 4), end(11)]),
        ],
    )
    .await;
    assert_eq!(
        results,
        ["in sync with 2, 0 removed", "in sync with 2, 0 removed"]
    );
}

#[tokio::test]
async fn an_old_list_is_ignored() {
    let results = play(
        false,
        vec![
            scene(LIST, &[added("a", 30), end(50)]),
            scene(&["resourceVersion=50"], &[gone()]),
            scene(LIST, &[end(20)]),
            scene(LIST, &[added("a", 30), end(60)]),
        ],
    )
    .await;
    assert_eq!(
        results,
        ["in sync with 1, 0 removed", "in sync with 1, 0 removed"]
    );
}

#[tokio::test]
async fn an_empty_first_list_is_refused_where_that_cannot_be() {
    let scenes = || {
        vec![
            scene(LIST, &[end(5)]),
            scene(LIST, &[added("a", 3), end(6)]),
        ]
    };
    assert_eq!(play(true, scenes()).await, ["in sync with 1, 0 removed"]);
}

#[tokio::test]
async fn lists_are_paged_where_streaming_is_not_supported() {
    let page = |items: Value, next: &str| {
        json!({
            "metadata": {"resourceVersion": "5", "continue": next},
            "items": items,
        })
    };
    for not_streamed in [refusal(LIST, 422), scene(LIST, &[added("a", 3)])] {
        let results = play(
            false,
            vec![
                not_streamed,
                scene(PAGED_LIST, &[page(json!([object("a", 3)]), "more")]),
                scene(&["continue=more"], &[page(json!([object("b", 4)]), "")]),
                scene(&["watch=true", "resourceVersion=5"], &[]),
            ],
        )
        .await;
        assert_eq!(results, ["in sync with 2, 0 removed"]);
    }
}

#[tokio::test]
async fn a_kind_that_is_not_served_is_never_in_sync() {
    let results = play(false, vec![refusal(LIST, 404), refusal(LIST, 404)]).await;
    assert_eq!(results, [] as [String; 0]);
}

/// Response to the request for a definition that is served at these versions.
fn definition(versions: &[&str]) -> Scene {
    let versions: Vec<Value> = { versions.iter() }
        .map(|name| json!({"name": name, "served": true, "storage": false}))
        .collect();
    let body = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
    "metadata": {"name": "maps.g"},
    "spec": {
        "group": "g",
        "scope": "Cluster",
        "names": {"kind": "Map", "plural": "maps"},
        "versions": versions,
    }});
    scene(&["customresourcedefinitions/maps.g"], &[body])
}

#[tokio::test(start_paused = true)]
async fn a_kind_without_definition_has_no_objects_until_it_has_one() {
    let no_definition = || refusal(&["customresourcedefinitions/maps.g"], 404);
    let results = play_at(
        "/apis/g/v1/maps",
        Some("maps.g"),
        false,
        vec![
            refusal(LIST, 404),
            no_definition(),
            scene(LIST, &[added("a", 3), end(5)]),
            refusal(&["resourceVersion=5"], 404),
            no_definition(),
            refusal(&["/apis/g/v1/namespaces/ns/maps/a"], 404),
        ],
    )
    .await;
    assert_eq!(
        results,
        [
            "in sync with 0, 0 removed",
            "in sync with 1, 0 removed",
            "in sync with 0, 1 removed"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_kind_whose_definition_exists_is_retried() {
    let results = play_at(
        "/apis/g/v1/maps",
        Some("maps.g"),
        false,
        vec![
            refusal(LIST, 404),
            definition(&["v2", "v1"]),
            refusal(LIST, 404),
            refusal(&["customresourcedefinitions/maps.g"], 500),
            scene(&["/apis/g/v1/maps", "watch=true"], &[added("a", 3), end(5)]),
        ],
    )
    .await;
    assert_eq!(results, ["in sync with 1, 0 removed"]);
}

#[tokio::test(start_paused = true)]
async fn a_kind_is_read_at_the_version_at_which_it_is_served() {
    let results = play_at(
        "/apis/g/v1/maps",
        Some("maps.g"),
        false,
        vec![
            refusal(LIST, 404),
            definition(&["v2"]),
            scene(&["/apis/g/v2/maps", "watch=true"], &[added("a", 3), end(5)]),
        ],
    )
    .await;
    assert_eq!(results, ["in sync with 1, 0 removed"]);
}

#[tokio::test]
async fn a_parser_that_panics_ends_the_watch_and_its_waiter() {
    fn panicking(_: ConfigMap) -> Ingested {
        panic!("an unexpected object")
    }
    let server = tower::service_fn(move |_: Request<Body>| async move {
        let body = scene(LIST, &[added("a", 3), end(5)]).body;
        Ok::<_, Infallible>(Response::new(Body::from(body.into_bytes())))
    });
    let (events, _inbox) = mpsc::channel(64);
    let watch = Watch {
        kind: KIND,
        path: "/api/v1/configmaps".to_owned(),
        form: Form::Plain,
        definition: None,
        never_empty: false,
        client: kube::Client::new(server, "default"),
        events,
        counters: Counters::register(&mut Metrics::default(), Registry::default()),
        jitter: || 0.0,
    };
    let mut tasks = margay_runtime::tasks::Tasks::default();
    tasks.spawn("owner", std::future::pending());
    tasks.spawn("watch of ConfigMap", watch.run(panicking));
    let ended = tasks.wait_for_end().await;
    let expected = "task watch of ConfigMap has ended: panic: an unexpected object; the process \
                    exits and must be restarted";
    assert_eq!(ended.to_string(), expected);
}
