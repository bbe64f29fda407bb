//! Policies that are too large are refused before they are multiplied, closed, and reported with
//! the limit.

#![allow(clippy::unwrap_used)]

use k8s_openapi::api::networking::v1::NetworkPolicy;
use margay_api::k8s::{cnp, netpol};
use margay_api::limits::{MAX_ENTRIES, MAX_REFERENCES};
use margay_api::policy::{Policy, StagedPolicy};
use margay_api::problem::Refusal;
use margay_api::rule::Action;
use margay_api::v3::parse;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn mk<T: DeserializeOwned>(version: &str, kind: &str, spec: &Value) -> T {
    let metadata = json!({"name": "default.p", "namespace": "ns"});
    let object = json!({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec});
    serde_json::from_value(object).unwrap()
}

fn kubernetes(spec: &Value) -> Result<Policy, Refusal> {
    netpol::policy(&mk::<NetworkPolicy>(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        spec,
    ))
    .map(|(_, policy)| policy)
}

fn calico(spec: &Value) -> Result<Policy, Refusal> {
    parse::policy::network_policy(&mk("projectcalico.org/v3", "NetworkPolicy", spec))
}

fn peers(count: usize) -> Vec<Value> {
    (0..count)
        .map(|number| json!({"podSelector": {"matchLabels": {"app": format!("a{number}")}}}))
        .collect()
}

fn names(count: usize) -> Vec<Value> {
    (0..count)
        .map(|number| json!({"port": format!("p{number}")}))
        .collect()
}

fn blocks(count: usize) -> Vec<Value> {
    let block = |number: usize| {
        json!({
            "ipBlock": {"cidr": format!("10.{}.{}.0/24", number / 256 % 256, number % 256)},
        })
    };
    (0..count).map(block).collect()
}

#[test]
fn what_people_write_is_far_below_the_limits() {
    let many = (0..100)
        .map(|port| json!({"port": 8000 + port}))
        .collect::<Vec<_>>();
    let (twenty, ten) = (&many[..20], &many[..10]);
    for (what, spec) in [
        (
            "30000 ranges and 20 ports",
            json!({"ingress": [{"from": blocks(30_000), "ports": twenty}]}),
        ),
        (
            "500 peers and 100 ports",
            json!({"ingress": [{"from": peers(500), "ports": many}]}),
        ),
        (
            "1000 peers and 10 named ports",
            json!({"egress": [{"to": peers(1000), "ports": names(10)}]}),
        ),
        (
            "200 rules",
            json!({"ingress": vec![json!({"from": peers(10), "ports": ten}); 200]}),
        ),
    ] {
        let policy = kubernetes(&spec).unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
        assert!(
            !policy.ingress.is_empty() || !policy.egress.is_empty(),
            "{what}"
        );
    }
    let nets: Vec<String> = (0..40)
        .map(|number| format!("10.{number}.0.0/16"))
        .collect();
    let rule = json!({
        "action": "Deny",
        "protocol": "TCP",
        "source": {"nets": nets},
        "destination": {"ports": ["http", 80]},
    });
    calico(&json!({"ingress": vec![rule; 1024]})).unwrap();
}

#[test]
fn ranges_of_one_rule_are_one_peer_and_ports_are_shared() {
    let to = [blocks(3000), peers(2), blocks(1)].concat();
    let spec = json!({"egress": [{"to": to, "ports": names(100)}]});
    let policy = kubernetes(&spec).unwrap();
    assert_eq!(policy.egress.len(), 3);
    assert_eq!(policy.egress[0].destination.nets.len(), 3001);
    let lists: Vec<*const _> = policy
        .egress
        .iter()
        .map(|rule| rule.destination.ports.as_ptr())
        .collect();
    assert!(lists.iter().all(|list| *list == lists[0]), "one list");
}

#[test]
fn a_policy_beyond_the_limits_is_closed_and_reports_why() {
    for (what, spec) in [
        (
            "peers times ports",
            json!({"ingress": [{"from": peers(20_000), "ports": names(20_000)}, {}]}),
        ),
        (
            "the same, outwards",
            json!({"egress": [{"to": peers(20_000), "ports": names(20_000)}]}),
        ),
        (
            "named ports of each peer",
            json!({"egress": [{"to": peers(200), "ports": names(200)}]}),
        ),
        (
            "many rules",
            json!({"ingress": vec![json!({"from": peers(50), "ports": names(50)}); 200]}),
        ),
    ] {
        let refusal = kubernetes(&spec).map(|_| panic!("{what}")).unwrap_err();
        assert!(
            refusal.problems[0].field.starts_with("spec."),
            "{what}: {refusal}"
        );
        let rule = &refusal.problems[0].rule;
        assert!(
            rule.contains(&MAX_ENTRIES.to_string()) || rule.contains(&MAX_REFERENCES.to_string()),
            "{what}: {rule}"
        );
        let closed = refusal.closed.unwrap();
        assert!(closed.applies_ingress || closed.applies_egress, "{what}");
        // Only rules that fit are left: nothing is opened that is not written.
        assert!(
            closed.ingress.len() + closed.egress.len() < 20_000,
            "{what}"
        );
        let staged = json!({
            "stagedAction": "Set",
            "podSelector": {},
            "ingress": spec.get("ingress"),
            "egress": spec.get("egress"),
        });
        let staged = parse::staged::staged_kubernetes_network_policy(&mk(
            "projectcalico.org/v3",
            "StagedKubernetesNetworkPolicy",
            &staged,
        ));
        assert_eq!(
            staged.map_err(|refusal| refusal.closed),
            Err(None::<StagedPolicy>),
            "{what}, staged"
        );
    }
}

#[test]
fn beyond_the_limits_a_policy_of_calico_denies_if_it_would_have() {
    let ports: Vec<String> = (0..50).map(|number| format!("p{number}")).collect();
    for (action, closed) in [
        ("Allow", vec![]),
        ("Deny", vec![Action::Deny]),
        ("Pass", vec![Action::Deny]),
    ] {
        let rule = json!({"action": action, "protocol": "TCP",
            "source": {"ports": ports, "selector": "a == 'b'"},
            "destination": {"ports": ports, "selector": "a == 'c'"}});
        let refusal = calico(&json!({"ingress": vec![rule; 1024]})).unwrap_err();
        let instead = refusal.closed.unwrap();
        assert_eq!(
            instead
                .ingress
                .iter()
                .map(|rule| rule.action)
                .collect::<Vec<_>>(),
            closed,
            "{action}"
        );
        assert!(refusal.problems.len() <= 101, "{}", refusal.problems.len());
    }
}

#[test]
fn beyond_the_limits_a_cluster_wide_policy_denies_where_it_would_not_accept() {
    let peers: Vec<Value> = (0..300)
        .map(|number| json!({"namespaces": {"matchLabels": {"n": format!("a{number}")}}}))
        .collect();
    let protocols: Vec<Value> = (0..300)
        .map(|number| json!({"destinationNamedPort": format!("p{number}")}))
        .collect();
    for (action, count) in [("Accept", 0), ("Deny", 1), ("Pass", 1)] {
        let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"action": action, "to": peers, "protocols": protocols}]});
        let refusal = cnp::policy(&mk(
            "policy.networking.k8s.io/v1alpha2",
            "ClusterNetworkPolicy",
            &spec,
        ))
        .unwrap_err();
        let instead = refusal.closed.unwrap();
        assert_eq!(instead.egress.len(), count, "{action}");
        assert!(
            instead
                .egress
                .iter()
                .all(|rule| rule.action == Action::Deny)
        );
    }
}

#[test]
fn of_a_thousand_mistakes_a_hundred_are_listed_and_none_is_long() {
    let bad: Vec<Value> = (0..5000)
        .map(|_| json!({"port": "x".repeat(4000)}))
        .collect();
    let refusal = kubernetes(&json!({"ingress": [{"ports": bad}]})).unwrap_err();
    assert_eq!(refusal.problems.len(), 101);
    assert!(
        refusal.to_string().contains("4900 more problems"),
        "{refusal}"
    );
    assert!(
        refusal
            .problems
            .iter()
            .all(|problem| problem.value.len() < 300)
    );
}
