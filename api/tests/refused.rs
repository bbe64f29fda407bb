//! The replacement of a refused object never allows what the object as written might have denied.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use margay_api::endpoint::HostInterface;
use margay_api::policy::{Order, Policy};
use margay_api::problem::Refusal;
use margay_api::rule::{Action, Rule};
use margay_api::v3::{self, GlobalNetworkPolicy, HostEndpoint, NetworkPolicy, NetworkSet};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

fn mk<T: serde::de::DeserializeOwned>(kind: &str, spec: &Value) -> T {
    let metadata = json!({ "name": "p", "namespace": "ns" });
    let object = json!({
        "apiVersion": "projectcalico.org/v3",
        "kind": kind,
        "metadata": metadata,
        "spec": spec,
    });
    serde_json::from_value(object).unwrap()
}

fn refused<T: std::fmt::Debug>(parsed: Result<T, Refusal<T>>) -> Refusal<T> {
    parsed.expect_err("it is not as it should be")
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

/// Labels of one endpoint of each sort that policies of the table may select.
fn endpoints() -> Vec<(&'static str, BTreeMap<String, String>)> {
    let own = ("projectcalico.org/namespace", "ns");
    vec![
        (
            "db of ns",
            labels(&[
                own,
                ("role", "db"),
                ("projectcalico.org/serviceaccount", "default"),
            ]),
        ),
        ("web of ns", labels(&[own, ("role", "web")])),
        (
            "db of other",
            labels(&[
                ("projectcalico.org/namespace", "other"),
                ("pcns.team", "a"),
                ("role", "db"),
            ]),
        ),
        ("host", labels(&[("role", "db")])),
    ]
}

fn closes(policy: &Policy) -> Vec<&'static str> {
    endpoints()
        .into_iter()
        .filter(|(_, labels)| policy.selector.matches(labels))
        .map(|(name, _)| name)
        .collect()
}

/// The selectors of a policy, and the endpoints that its replacement applies to: all that the
/// readable parts select.
#[test]
fn a_policy_with_an_unreadable_selector_closes_what_the_others_select() {
    let all = ["db of ns", "web of ns", "db of other", "host"];
    let global: [(Value, &[&str]); 5] = [
        (json!({ "selector": "role = 'db'" }), &all),
        (
            json!({ "selector": "role = 'db'", "namespaceSelector": "team == 'a'" }),
            &["db of other"],
        ),
        (
            json!({ "selector": "role == 'db'", "namespaceSelector": "team = 'a'" }),
            &["db of ns", "db of other", "host"],
        ),
        (
            json!({ "selector": "role == 'db'", "serviceAccountSelector": "(" }),
            &["db of ns", "db of other", "host"],
        ),
        (json!({ "selector": "global()" }), &all),
    ];
    let (deny, allow) = (
        json!([{ "action": "Deny" }]),
        json!([{ "action": "Allow" }]),
    );
    for (selectors, wanted) in &global {
        for (rules, stands) in [(&deny, vec![Rule::any(Action::Deny)]), (&allow, vec![])] {
            let mut spec = selectors.clone();
            spec["ingress"] = rules.clone();
            (spec["order"], spec["tier"]) = (json!(7), json!("t"));
            let policy: GlobalNetworkPolicy = mk("GlobalNetworkPolicy", &spec);
            let refusal = refused(v3::parse::policy::global_network_policy(&policy));
            assert!(refusal.prefers_former, "{spec}");
            let closed = refusal.closed.unwrap();
            assert_eq!(closes(&closed), *wanted, "{spec}");
            assert_eq!(
                (closed.tier.as_str(), closed.order, &closed.ingress),
                ("t", Order(Some(7.0)), &stands),
                "{spec}"
            );
            assert_eq!(
                (closed.applies_ingress, closed.applies_egress),
                (true, false),
                "{spec}"
            );
        }
    }
    let namespaced: [(Value, &[&str]); 3] = [
        (
            json!({ "selector": "role = 'db'" }),
            &["db of ns", "web of ns"],
        ),
        (
            json!({ "selector": "role == 'db'", "serviceAccountSelector": "x" }),
            &["db of ns"],
        ),
        (
            json!({ "selector": "role is db", "serviceAccountSelector": "all()" }),
            &["db of ns"],
        ),
    ];
    for (spec, wanted) in &namespaced {
        let refusal = refused(v3::parse::policy::network_policy(&mk::<NetworkPolicy>(
            "NetworkPolicy",
            spec,
        )));
        assert!(
            refusal.prefers_former && closes(&refusal.closed.unwrap()) == *wanted,
            "{spec}"
        );
    }
    let known = json!({ "selector": "role == 'db'", "ingress": [{ "action": "Forbid" }] });
    let refusal = refused(v3::parse::policy::network_policy(&mk::<NetworkPolicy>(
        "NetworkPolicy",
        &known,
    )));
    assert!(
        !refusal.prefers_former,
        "its selectors are known, so the replacement is as close as possible"
    );
}

#[test]
fn an_unreadable_staged_policy_has_no_replacement() {
    let staged: v3::StagedNetworkPolicy =
        mk("StagedNetworkPolicy", &json!({ "selector": "role = 'db'" }));
    let refusal = refused(v3::parse::staged::staged_network_policy(&staged));
    assert!(refusal.closed.is_none() && !refusal.prefers_former);
}

/// A host endpoint's spec, its interfaces without a last valid version, and whether that version is
/// preferred.
#[test]
fn a_host_endpoint_with_an_unknown_interface_applies_to_all_interfaces_without_one() {
    use HostInterface::{All, ByAddress, Named};
    let table = [
        (
            json!({ "node": "n1", "interfaceName": "eth 0" }),
            Some(All),
            true,
        ),
        (
            json!({ "node": "n1", "expectedIPs": ["192.0.2.1", "192.0.2"] }),
            Some(All),
            true,
        ),
        (
            json!({ "node": "n1", "expectedIPs": ["192.0.2"] }),
            Some(All),
            true,
        ),
        (json!({ "node": "n1" }), None, true),
        (json!({ "interfaceName": "eth0" }), None, true),
        (
            json!({ "node": "n1", "interfaceName": "eth0", "expectedIPs": ["192.0.2"] }),
            Some(Named("eth0".into())),
            false,
        ),
        (
            json!({ "node": "n1", "expectedIPs": ["192.0.2.1"], "profiles": ["x"] }),
            Some(ByAddress),
            false,
        ),
    ];
    for (spec, stands, former) in table {
        let refusal = refused(v3::parse::host::host_endpoint(&mk::<HostEndpoint>(
            "HostEndpoint",
            &spec,
        )));
        let interface = refusal.closed.map(|closed| closed.interface);
        assert_eq!(
            (interface, refusal.prefers_former),
            (stands, former),
            "{spec}"
        );
    }
}

#[test]
fn a_typing_error_does_not_change_the_meaning_of_an_object() {
    let set = json!({ "nets": ["10.0.0.0/88", "10.1.0.0/16"] });
    let refusal = refused(v3::parse::netset::network_set(&mk::<NetworkSet>(
        "NetworkSet",
        &set,
    )));
    assert!(refusal.prefers_former && refusal.closed.unwrap().nets.len() == 1);
    let pool = |spec: &str| {
        let spec: Value = serde_yaml_ng::from_str(spec).unwrap();
        refused(v3::parse::pool::pool(&mk("IPPool", &spec)))
    };
    assert!(pool("cidr: 10.0.0.0").prefers_former);
    assert!(pool("{cidr: 10.0.0.0/16, vxlanMode: Allways}").prefers_former);
    let unserving = pool("{cidr: 10.0.0.0/16, nodeSelector: a = b}");
    assert!(
        !unserving.prefers_former && unserving.closed.is_some(),
        "its routes do not depend on the nodes that it serves"
    );
    for spec in [
        json!({ "nodeSelector": "a = b" }),
        json!({ "nodeSelector": "has(a)", "vxlanVNI": 0 }),
    ] {
        assert!(
            refused(v3::parse::felix::overrides(&mk(
                "FelixConfiguration",
                &spec
            )))
            .prefers_former,
            "{spec}"
        );
    }
}

fn part() -> impl Strategy<Value = &'static str> {
    select(vec![
        "",
        "all()",
        "has(role)",
        "role == 'db'",
        "role != 'db'",
        "!has(role)",
        "role in {'db'} || has(team)",
    ])
}

fn spoilt() -> impl Strategy<Value = &'static str> {
    select(vec![
        "role = 'db'",
        "has(role",
        "role ==",
        "&&",
        "role == 'db' &&",
        "role in 'db'",
        "ROLE IS DB",
        ")",
    ])
}

proptest! {
    /// Whatever part of a policy's selectors is broken: the replacement applies to all endpoints
    /// that the intact policy would apply to.
    #[test]
    fn selected_endpoints_are_closed(
        parts in [part(), part(), part()],
        spoil in spoilt(),
        which in 0..3_usize,
        actions in proptest::collection::vec(select(vec!["Allow", "Deny", "Log", "Pass"]), 0..3),
        types in select(vec![json!(["Ingress"]), json!(["Egress"]), json!(["Ingress", "Egress"])]),
        endpoint in proptest::collection::btree_map(
            select(vec!["role", "team", "pcns.role", "pcns.team", "pcsa.role",
                "projectcalico.org/namespace",
                "projectcalico.org/serviceaccount"]).prop_map(str::to_owned),
            select(vec!["db", "web", "ns"]).prop_map(str::to_owned), 0..5),
    ) {
        let rules: Vec<Value> = actions.iter().map(|action| json!({ "action": action })).collect();
        let fields = ["selector", "namespaceSelector", "serviceAccountSelector"];
        let mut spec = json!({ "types": types, "ingress": rules, "egress": rules });
        for (field, part) in fields.iter().zip(parts) {
            spec[field] = json!(part);
        }
        let sound = v3::parse::policy::global_network_policy(
            &mk::<GlobalNetworkPolicy>("GlobalNetworkPolicy", &spec),
        ).unwrap();
        spec[fields[which]] = json!(spoil);
        let refusal = v3::parse::policy::global_network_policy(
            &mk::<GlobalNetworkPolicy>("GlobalNetworkPolicy", &spec),
        ).unwrap_err();
        let closed = refusal.closed.unwrap();
        prop_assert!(!sound.selector.matches(&endpoint) || closed.selector.matches(&endpoint));
        prop_assert_eq!(
            (closed.applies_ingress, closed.applies_egress),
            (sound.applies_ingress, sound.applies_egress),
        );
        prop_assert_eq!(
            (&closed.tier, closed.order, closed.traffic),
            (&sound.tier, sound.order, sound.traffic),
        );
        let stops = |rules: &[Rule]| rules.iter().any(
            |rule| !matches!(rule.action, Action::Allow | Action::Log),
        );
        for (closed, sound) in [
            (&closed.ingress, &sound.ingress),
            (&closed.egress, &sound.egress),
        ] {
            prop_assert!(closed.iter().all(|rule| *rule == Rule::any(Action::Deny)));
            prop_assert_eq!(!closed.is_empty(), stops(sound));
        }
    }
}
