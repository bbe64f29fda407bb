use k8s_openapi::api::core::v1::Namespace;
use serde_json::{Value, json};

use super::*;

fn namespace(namespace: Namespace) -> Ingested {
    let labels = namespace.metadata.labels.unwrap_or_default();
    Ingested {
        update: Some(Update::Namespace(
            namespace.metadata.name.unwrap_or_default(),
            Some(labels.into()),
        )),
        ..Ingested::default()
    }
}

fn mk_feed() -> Feed<Namespace> {
    Feed::new(namespace, Form::Plain, true)
}

fn object(name: &str, version: u64) -> Value {
    json!({"metadata": {"name": name, "uid": format!("u-{name}"),
        "resourceVersion": version.to_string(),
        "labels": {"v": version.to_string()},
        "managedFields": [{"manager": "x"}]}, "spec": {"finalizers": ["kubernetes"]}})
}

fn event(kind: &str, object: Value) -> Vec<u8> {
    json!({"type": kind, "object": object})
        .to_string()
        .into_bytes()
}

fn bookmark(version: u64, end: bool) -> Vec<u8> {
    let annotations = if end {
        json!({"k8s.io/initial-events-end": "true"})
    } else {
        json!({})
    };
    event(
        "BOOKMARK",
        json!({
            "kind": "Namespace",
            "metadata": {"resourceVersion": version.to_string(), "annotations": annotations},
        }),
    )
}

/// Decodes lines, one text per result.
fn script(feed: &mut Feed<Namespace>, lines: &[Vec<u8>]) -> Vec<String> {
    let results = lines.iter().map(|line| match feed.decode_line(line) {
        Ok(WatchEvent::Bookmark) => "-".to_owned(),
        Ok(WatchEvent::Applied(object, trace)) => {
            let trace = if trace.is_some() { " traced" } else { "" };
            format!("object {}{trace}", object.key.name)
        }
        Ok(WatchEvent::Deleted(key)) => format!("deleted {}", key.name),
        Ok(WatchEvent::ListComplete(objects)) => {
            let names: Vec<_> = objects.into_iter().map(|object| object.key.name).collect();
            format!("list {}", names.join(","))
        }
        Err(error) => {
            let list = if error.needs_list() { " (list)" } else { "" };
            format!("{error}{list}")
        }
    });
    results.collect()
}

#[test]
fn a_streamed_list_then_changes() {
    let mut feed = mk_feed();
    let results = script(
        &mut feed,
        &[
            event("ADDED", object("a", 3)),
            event("ADDED", object("b", 5)),
            bookmark(7, true),
            event("MODIFIED", object("a", 9)),
            event("DELETED", object("b", 11)),
            bookmark(20, false),
        ],
    );
    assert_eq!(
        results,
        ["-", "-", "list a,b", "object a", "deleted b", "-"]
    );
    assert_eq!(feed.version(), Some("20"), "bookmarks advance the version");
}

#[test]
fn a_list_in_pages() {
    let mut feed = mk_feed();
    let page = json!({
        "metadata": {"resourceVersion": "7", "continue": "more"},
        "items": [object("a", 3)],
    });
    let (event, next) = feed.decode_page(&page.to_string()).expect("a page");
    assert!(matches!(event, WatchEvent::Bookmark));
    assert_eq!(next.as_deref(), Some("more"));
    let page =
        json!({"metadata": {"resourceVersion": "7", "continue": ""}, "items": [object("b", 5)]});
    let (event, next) = feed.decode_page(&page.to_string()).expect("a page");
    let WatchEvent::ListComplete(objects) = event else {
        panic!("{event:?}")
    };
    assert_eq!((objects.len(), next), (2, None));
    assert_eq!(feed.version(), Some("7"));
}

#[test]
fn a_forgotten_version_needs_a_new_list_and_other_errors_do_not() {
    let mut feed = mk_feed();
    let status = |code: u16| {
        event(
            "ERROR",
            json!({"kind": "Status", "code": code, "message": "text"}),
        )
    };
    let results = script(
        &mut feed,
        &[
            event("ADDED", object("a", 3)),
            bookmark(7, true),
            status(500),
            status(410),
        ],
    );
    assert_eq!(
        results[2..],
        ["API server: 500 text", "API server: 410 text (list)"]
    );
    assert_eq!(
        feed.version(),
        Some("7"),
        "kept until the list is requested"
    );
}

#[test]
fn lists_that_cannot_be_right_are_refused() {
    let mut feed = mk_feed();
    script(
        &mut feed,
        &[event("ADDED", object("a", 30)), bookmark(40, true)],
    );
    feed.restart();
    let results = script(
        &mut feed,
        &[event("ADDED", object("a", 3)), bookmark(10, true)],
    );
    assert!(
        results[1].starts_with("list is of version 10, but 40 was received"),
        "{results:?}"
    );
    feed.restart();
    let results = script(&mut feed, &[bookmark(50, true)]);
    assert!(results[0].starts_with("list is empty"), "{results:?}");
    feed.restart();
    let results = script(
        &mut feed,
        &[event("ADDED", object("a", 3)), bookmark(60, true)],
    );
    assert_eq!(results, ["-", "list a"]);
    assert_eq!(feed.version(), Some("60"));
}

#[test]
fn an_incomplete_list_is_dropped() {
    let mut feed = mk_feed();
    script(&mut feed, &[event("ADDED", object("a", 3))]);
    feed.restart();
    let results = script(
        &mut feed,
        &[event("ADDED", object("b", 3)), bookmark(7, true)],
    );
    assert_eq!(results, ["-", "list b"]);
}

#[test]
fn an_object_deleted_during_a_list_does_not_come_back_with_it() {
    let mut feed = mk_feed();
    let lines = [
        event("ADDED", object("a", 3)),
        event("ADDED", object("b", 4)),
        event("DELETED", object("a", 6)),
        bookmark(7, true),
    ];
    assert_eq!(script(&mut feed, &lines), ["-", "-", "deleted a", "list b"]);
}

#[test]
fn an_unreadable_policy_closes_what_its_readable_fields_select() {
    use margay_api::policy::Policy;
    use margay_api::v3::{GlobalNetworkPolicy, parse};
    fn parse(object: GlobalNetworkPolicy) -> Ingested {
        let key = PolicyKey::of(PolicyKind::GlobalNetworkPolicy, &object.metadata);
        let parsed = parse::policy::global_network_policy(&object).ok();
        Ingested {
            update: Some(Update::Policy(key, parsed)),
            ..Ingested::default()
        }
    }
    let mut feed = Feed::new(parse, Form::Plain, false);
    let mut substitute = |spec: Value| -> Option<Policy> {
        let object = json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
            "metadata": {"name": "p", "resourceVersion": "3", "labels": 7}, "spec": spec});
        let line = event("ADDED", object);
        assert!(matches!(feed.decode_line(&line), Ok(WatchEvent::Bookmark)));
        let WatchEvent::ListComplete(objects) =
            feed.decode_line(&bookmark(7, true)).expect("a list")
        else {
            panic!("it has ended")
        };
        feed.restart();
        let observed = objects.into_iter().next().expect("the policy");
        assert!(observed.prefers_former && !observed.problems.is_empty());
        match observed.update {
            Some(Update::Policy(_, policy)) => policy,
            _ => None,
        }
    };
    let policy = substitute(json!({
        "selector": "a == 'b'",
        "order": "first",
        "ingress": [{"action": 7}],
        "types": ["Ingress"],
    }));
    let policy = policy.expect("a substitute");
    assert_eq!(
        (
            policy.selector.to_string().as_str(),
            policy.applies_ingress,
            policy.applies_egress
        ),
        ("a == \"b\"", true, false)
    );
    assert_eq!(
        policy.ingress,
        [margay_api::rule::Rule::any(margay_api::rule::Action::Deny)]
    );
    let all = substitute(json!({"selector": 7, "types": 7, "tier": "t"})).expect("a substitute");
    assert_eq!(
        (all.selector.to_string().as_str(), all.tier.as_str()),
        ("all()", "t")
    );
    assert!(all.applies_ingress && all.applies_egress);
}

#[test]
fn a_bad_object_affects_no_other() {
    let mut feed = mk_feed();
    let mut bad = object("bad", 3);
    bad["spec"]["finalizers"] = json!(7);
    let line = event("ADDED", bad);
    script(
        &mut feed,
        &[event("ADDED", object("a", 3)), bookmark(7, true)],
    );
    let Ok(WatchEvent::Applied(observed, _)) = feed.decode_line(&line) else {
        panic!("an object")
    };
    assert_eq!(observed.key.name, "bad");
    assert!(observed.prefers_former);
    assert_eq!(observed.update, None);
    assert!(
        observed.problems[0].contains("invalid type"),
        "{:?}",
        observed.problems
    );
}

#[test]
fn noise_is_an_error() {
    let lines: [&[u8]; 4] = [
        b"",
        b"{}",
        b"{\"type\":\"ADDED\",\"object\":{}}",
        b"\xff\xfe",
    ];
    for line in lines {
        let mut feed = mk_feed();
        assert!(
            matches!(feed.decode_line(line), Err(WatchError::Line(_))),
            "{line:?}"
        );
    }
}

#[test]
fn a_writers_trace_is_continued_once() {
    let mut feed = mk_feed();
    let mut traced = object("a", 8);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    traced["metadata"]["annotations"] = json!({"margay.io/traceparent": parent, "other": "x"});
    let results = script(
        &mut feed,
        &[
            bookmark(6, false),
            event("ADDED", object("a", 3)),
            bookmark(7, true),
            event("MODIFIED", traced.clone()),
            event("MODIFIED", traced),
        ],
    );
    assert_eq!(results, ["-", "-", "list a", "object a traced", "object a"]);
}

#[test]
fn objects_of_the_older_storage_have_the_metadata_of_users() {
    use margay_api::storage::Kind;
    use margay_api::v3::GlobalNetworkSet;
    let parse = |set: GlobalNetworkSet| Ingested {
        update: None,
        prefers_former: false,
        problems: vec![format!("{:?} {:?}", set.metadata.name, set.metadata.labels)],
    };
    let kind = Kind::of("GlobalNetworkSet").expect("a kind of Calico's");
    let mut feed = Feed::new(parse, Form::Stored(kind), false);
    let stored = |kept: &str| {
        json!({"apiVersion": "crd.projectcalico.org/v1", "kind": "GlobalNetworkSet",
            "metadata": {"name": "s", "uid": "01020304-0506-4708-890a-0b0c0d0e0f10",
                "resourceVersion": "5",
                "annotations": {"projectcalico.org/metadata": kept}},
            "spec": {"nets": null}})
    };
    feed.decode_line(&event("ADDED", stored(r#"{"labels":{"role":"db"}}"#)))
        .expect("an object");
    feed.decode_line(&event("ADDED", stored("{")))
        .expect("an object");
    let WatchEvent::ListComplete(objects) = feed.decode_line(&bookmark(5, true)).expect("a list")
    else {
        panic!("the list has ended")
    };
    let objects: Vec<_> = objects.into_iter().collect();
    assert_eq!(objects[0].problems, [r#"Some("s") Some({"role": "db"})"#]);
    assert!(!objects[1].prefers_former, "the rest of the object holds");
    assert!(
        objects[1].problems[1].contains("projectcalico.org/metadata")
            && objects[1].problems[1].contains("not JSON")
    );
}
