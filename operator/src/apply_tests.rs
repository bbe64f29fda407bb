use kube::core::response::Status;
use serde_json::json;

use super::*;
use crate::manifest::kind;

fn owner() -> Owner {
    Owner {
        name: "default".to_owned(),
        uid: "ours".to_owned(),
    }
}

fn key(kind_name: &str, name: &str) -> Key {
    Key {
        kind: kind(kind_name),
        namespace: String::new(),
        name: name.to_owned(),
    }
}

fn present(owner: &str) -> Present {
    Present {
        version: "1".to_owned(),
        uid: format!("uid of {owner}'s"),
        owner: owner.to_owned(),
        terminating: false,
    }
}

#[test]
fn owned_objects_that_are_neither_wanted_nor_kept_are_swept() {
    let leaving = Present {
        terminating: true,
        ..present("ours")
    };
    let inputs = Inputs {
        present: BTreeMap::from([
            (key("ClusterRole", "wanted"), present("ours")),
            (key("ClusterRole", "kept"), present("ours")),
            (key("ClusterRole", "old"), present("ours")),
            (key("ClusterRole", "leaving"), leaving),
            (key("ClusterRole", "of-another"), present("theirs")),
            (key("ClusterRole", "of-nobody"), present("")),
            (key("IPPool", "default-ipv4-ippool"), present("ours")),
            (key("Secret", "margay-typha-tls"), present("ours")),
        ]),
        ..Inputs::default()
    };
    let wanted = Object::new("ClusterRole", json!({ "metadata": { "name": "wanted" } }));
    let keep = BTreeSet::from([key("ClusterRole", "kept")]);
    let swept = unwanted(&inputs, &[wanted], &keep, &owner());
    assert_eq!(swept.len(), 1);
    assert_eq!(swept[0].0, key("ClusterRole", "old"));
    let condition = swept[0].1.preconditions.as_ref().unwrap();
    assert_eq!(condition.uid.as_deref(), Some("uid of ours's"));
}

#[test]
fn objects_that_are_up_to_date_are_not_written() {
    let print = fingerprint(&json!({ "a": 1 }));
    let other = fingerprint(&json!({ "a": 2 }));
    let applied = (print, "1".to_owned());
    let changed = Present {
        version: "2".to_owned(),
        ..present("ours")
    };
    let leaving = Present {
        terminating: true,
        ..present("ours")
    };
    let table = [
        (Some(&applied), &print, Some(present("ours")), true),
        (Some(&applied), &other, Some(present("ours")), false),
        (Some(&applied), &print, Some(changed), false),
        (Some(&applied), &print, Some(leaving), false),
        (Some(&applied), &print, None, false),
        (None, &print, Some(present("ours")), false),
    ];
    for (applied, print, present, wanted) in table {
        assert_eq!(
            is_up_to_date(applied, print, present.as_ref()),
            wanted,
            "{present:?}"
        );
    }
}

fn refused(code: u16, message: &str) -> Error {
    Error::Api(
        Status {
            code,
            message: message.to_owned(),
            ..Status::default()
        }
        .boxed(),
    )
}

#[test]
fn errors_are_transient_if_a_retry_can_help() {
    let table = [
        (409, "modified", true, "modified"),
        (429, "slow down", true, "slow down"),
        (503, "etcd", true, "etcd"),
        (
            403,
            "unable to create: namespace is terminating because it is being terminated",
            true,
            "terminated",
        ),
        (403, "cannot patch", false, "apply deploy/operator.yaml"),
        (
            404,
            "not found",
            false,
            "does not serve rbac.authorization.k8s.io/v1 clusterroles",
        ),
        (422, "spec.x: Invalid", false, "spec.x: Invalid"),
    ];
    for (code, message, transient, wanted) in table {
        let found = failure(key("ClusterRole", "a"), &refused(code, message));
        assert_eq!(found.transient, transient, "{code}");
        assert!(found.message.contains(wanted), "{}", found.message);
    }
}

#[test]
fn objects_are_applied_after_those_that_they_refer_to() {
    let turn = |kind: &str| wave(&Object::new(kind, json!({ "metadata": { "name": "a" } })));
    for (first, then) in [
        ("Namespace", "ServiceAccount"),
        ("Namespace", "Secret"),
        ("ClusterRole", "ClusterRoleBinding"),
        (
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
        ),
        ("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"),
        ("ServiceAccount", "Deployment"),
        ("Secret", "Deployment"),
        ("ConfigMap", "DaemonSet"),
    ] {
        assert!(turn(first) < turn(then), "{first} before {then}");
    }
    assert!(OWNED_KINDS.iter().all(|kind| turn(kind.kind) < WAVES));
}
