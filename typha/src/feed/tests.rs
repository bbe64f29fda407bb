use k8s_openapi::api::core::v1::Namespace;
use serde_json::{Value, json};

use super::*;

fn namespace(namespace: Namespace) -> Parsed {
    let labels = namespace.metadata.labels.unwrap_or_default();
    Parsed {
        update: Some(Update::Namespace(namespace.metadata.name.unwrap_or_default(), Some(labels))),
        ..Parsed::default()
    }
}

fn mk_feed() -> Feed<Namespace> {
    Feed::new(namespace, Form::Plain, true)
}

fn object(name: &str, version: u64) -> Value {
    json!({"metadata": {"name": name, "uid": format!("u-{name}"), "resourceVersion": version.to_string(),
        "labels": {"v": version.to_string()}, "managedFields": [{"manager": "x"}]}, "spec": {"finalizers": ["kubernetes"]}})
}

fn event(kind: &str, object: Value) -> Vec<u8> {
    json!({"type": kind, "object": object}).to_string().into_bytes()
}

fn bookmark(version: u64, end: bool) -> Vec<u8> {
    let annotations = if end { json!({"k8s.io/initial-events-end": "true"}) } else { json!({}) };
    event(
        "BOOKMARK",
        json!({"kind": "Namespace", "metadata": {"resourceVersion": version.to_string(), "annotations": annotations}}),
    )
}

/// One word for each line: what came of it.
fn script(feed: &mut Feed<Namespace>, lines: &[Vec<u8>]) -> Vec<String> {
    let told = lines.iter().map(|line| match feed.line(line) {
        Ok(News::None) => "-".to_owned(),
        Ok(News::Object(object, trace)) => {
            let trace = if trace.is_some() { " traced" } else { "" };
            format!("object {}{trace}", object.key.name)
        }
        Ok(News::Deleted(key)) => format!("deleted {}", key.name),
        Ok(News::List(objects)) => {
            let names: Vec<_> = objects.iter().map(|object| object.key.name.as_str()).collect();
            format!("list {}", names.join(","))
        }
        Err(fault) => {
            let list = if fault.needs_list() { " (list)" } else { "" };
            format!("{fault}{list}")
        }
    });
    told.collect()
}

#[test]
fn a_streamed_list_then_changes() {
    let mut feed = mk_feed();
    let told = script(
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
    assert_eq!(told, ["-", "-", "list a,b", "object a", "deleted b", "-"]);
    assert_eq!(feed.version(), Some("20"), "bookmarks count");
}

#[test]
fn a_list_in_pages() {
    let mut feed = mk_feed();
    let page = json!({"metadata": {"resourceVersion": "7", "continue": "more"}, "items": [object("a", 3)]});
    let (news, next) = feed.page(&page.to_string()).expect("a page");
    assert!(matches!(news, News::None));
    assert_eq!(next.as_deref(), Some("more"));
    let page = json!({"metadata": {"resourceVersion": "7", "continue": ""}, "items": [object("b", 5)]});
    let (news, next) = feed.page(&page.to_string()).expect("a page");
    let News::List(objects) = news else { panic!("{news:?}") };
    assert_eq!((objects.len(), next), (2, None));
    assert_eq!(feed.version(), Some("7"));
}

#[test]
fn a_forgotten_version_needs_a_new_list_and_other_errors_do_not() {
    let mut feed = mk_feed();
    let status = |code: u16| event("ERROR", json!({"kind": "Status", "code": code, "message": "words"}));
    let told = script(&mut feed, &[event("ADDED", object("a", 3)), bookmark(7, true), status(500), status(410)]);
    assert_eq!(told[2..], ["API server: 500 words", "API server: 410 words (list)"]);
    assert_eq!(feed.version(), Some("7"), "kept until the list is asked for");
}

#[test]
fn lists_that_cannot_be_right_are_refused() {
    let mut feed = mk_feed();
    script(&mut feed, &[event("ADDED", object("a", 30)), bookmark(40, true)]);
    feed.restart();
    let told = script(&mut feed, &[event("ADDED", object("a", 3)), bookmark(10, true)]);
    assert!(told[1].starts_with("list is of version 10, but 40 was seen"), "{told:?}");
    feed.restart();
    let told = script(&mut feed, &[bookmark(50, true)]);
    assert!(told[0].starts_with("list is empty"), "{told:?}");
    feed.restart();
    let told = script(&mut feed, &[event("ADDED", object("a", 3)), bookmark(60, true)]);
    assert_eq!(told, ["-", "list a"]);
    assert_eq!(feed.version(), Some("60"));
}

#[test]
fn a_list_that_did_not_end_is_forgotten() {
    let mut feed = mk_feed();
    script(&mut feed, &[event("ADDED", object("a", 3))]);
    feed.restart();
    let told = script(&mut feed, &[event("ADDED", object("b", 3)), bookmark(7, true)]);
    assert_eq!(told, ["-", "list b"]);
}

#[test]
fn what_is_deleted_during_a_list_does_not_come_back_with_it() {
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
fn a_policy_that_cannot_be_read_closes_what_its_readable_fields_leave() {
    use margay_api::policy::Policy;
    use margay_api::v3::{GlobalNetworkPolicy, policy};
    fn parse(object: GlobalNetworkPolicy) -> Parsed {
        let key = PolicyKey::of(PolicyKind::GlobalNetworkPolicy, &object.metadata);
        let parsed = policy::global_network_policy(&object).ok();
        Parsed { update: Some(Update::Policy(key, parsed)), ..Parsed::default() }
    }
    let mut feed = Feed::new(parse, Form::Plain, false);
    let mut stands = |spec: Value| -> Option<Policy> {
        let object = json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
            "metadata": {"name": "p", "resourceVersion": "3", "labels": 7}, "spec": spec});
        let line = event("ADDED", object);
        assert!(matches!(feed.line(&line), Ok(News::None)));
        let News::List(mut objects) = feed.line(&bookmark(7, true)).expect("a list") else { panic!("it has ended") };
        feed.restart();
        let observed = objects.remove(0);
        assert!(observed.prefers_former && !observed.problems.is_empty());
        match observed.update {
            Some(Update::Policy(_, policy)) => policy,
            _ => None,
        }
    };
    let policy =
        stands(json!({"selector": "a == 'b'", "order": "first", "ingress": [{"action": 7}], "types": ["Ingress"]}));
    let policy = policy.expect("something stands in its place");
    assert_eq!(
        (policy.selector.to_string().as_str(), policy.applies_ingress, policy.applies_egress),
        ("a == \"b\"", true, false)
    );
    assert_eq!(policy.ingress, [margay_api::rule::Rule::any(margay_api::rule::Action::Deny)]);
    let all = stands(json!({"selector": 7, "types": 7, "tier": "t"})).expect("something stands in its place");
    assert_eq!((all.selector.to_string().as_str(), all.tier.as_str()), ("all()", "t"));
    assert!(all.applies_ingress && all.applies_egress);
}

#[test]
fn one_bad_object_is_its_own_problem() {
    let mut feed = mk_feed();
    let mut bad = object("bad", 3);
    bad["spec"]["finalizers"] = json!(7);
    let line = event("ADDED", bad);
    script(&mut feed, &[event("ADDED", object("a", 3)), bookmark(7, true)]);
    let Ok(News::Object(observed, _)) = feed.line(&line) else { panic!("an object") };
    assert_eq!(observed.key.name, "bad");
    assert!(observed.prefers_former);
    assert_eq!(observed.update, None);
    assert!(observed.problems[0].contains("invalid type"), "{:?}", observed.problems);
}

#[test]
fn noise_is_a_fault() {
    let lines: [&[u8]; 4] = [b"", b"{}", b"{\"type\":\"ADDED\",\"object\":{}}", b"\xff\xfe"];
    for line in lines {
        let mut feed = mk_feed();
        assert!(matches!(feed.line(line), Err(Fault::Line(_))), "{line:?}");
    }
}

#[test]
fn a_writers_trace_is_continued_once() {
    let mut feed = mk_feed();
    let mut traced = object("a", 8);
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    traced["metadata"]["annotations"] = json!({"margay.io/traceparent": parent, "other": "x"});
    let told = script(
        &mut feed,
        &[
            bookmark(6, false),
            event("ADDED", object("a", 3)),
            bookmark(7, true),
            event("MODIFIED", traced.clone()),
            event("MODIFIED", traced),
        ],
    );
    assert_eq!(told, ["-", "-", "list a", "object a traced", "object a"]);
}

#[test]
fn objects_of_the_older_storage_mean_what_users_wrote() {
    use margay_api::storage::Kind;
    use margay_api::v3::GlobalNetworkSet;
    let parse = |set: GlobalNetworkSet| Parsed {
        update: None,
        prefers_former: false,
        problems: vec![format!("{:?} {:?}", set.metadata.name, set.metadata.labels)],
    };
    let kind = Kind::of("GlobalNetworkSet").expect("a kind of Calico's");
    let mut feed = Feed::new(parse, Form::Stored(kind), false);
    let stored = |kept: &str| {
        json!({"apiVersion": "crd.projectcalico.org/v1", "kind": "GlobalNetworkSet",
            "metadata": {"name": "s", "uid": "01020304-0506-4708-890a-0b0c0d0e0f10", "resourceVersion": "5",
                "annotations": {"projectcalico.org/metadata": kept}},
            "spec": {"nets": null}})
    };
    feed.line(&event("ADDED", stored(r#"{"labels":{"role":"db"}}"#))).expect("an object");
    feed.line(&event("ADDED", stored("{"))).expect("an object");
    let News::List(objects) = feed.line(&bookmark(5, true)).expect("a list") else { panic!("the list has ended") };
    assert_eq!(objects[0].problems, [r#"Some("s") Some({"role": "db"})"#]);
    assert!(!objects[1].prefers_former, "the rest of the object holds");
    assert!(
        objects[1].problems[1].contains("projectcalico.org/metadata") && objects[1].problems[1].contains("not JSON")
    );
}
