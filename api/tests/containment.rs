//! Containment: whatever selectors its author writes, a policy of a namespace neither applies to
//! endpoints of other namespaces nor is widened by their labels.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1;
use margay_api::k8s::netpol;
use margay_api::meta::{LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_SERVICE_ACCOUNT, Labels};
use margay_api::policy::Policy;
use margay_api::problem::Refusal;
use margay_api::rule::EntityMatch;
use margay_api::v3::{self, NetworkPolicy};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

/// Fragments that close what the rewrite opens, or refer to labels of other namespaces.
const PIECES: [&str; 26] = [
    "all()",
    "global()",
    "has(app)",
    "!has(app)",
    "!has(projectcalico.org/namespace)",
    "app == 'web'",
    "app != 'web'",
    "app not in {'web'}",
    "projectcalico.org/namespace == 'victim'",
    "projectcalico.org/namespace != 'own'",
    "projectcalico.org/namespace starts with ''",
    "pcns.team == 'a'",
    "pcsa.role != 'admin'",
    "pcns.projectcalico.org/name == 'victim'",
    " || ",
    " && ",
    "!",
    "(",
    ")",
    "'",
    "\"",
    "\\",
    "}",
    "#",
    "\n",
    "\u{0}",
];

/// A selector of an attacker: mostly valid ones, joined in every way, and broken ones.
fn selector() -> impl Strategy<Value = String> {
    let term = || {
        (any::<bool>(), select(&PIECES[..14])).prop_map(|(is_negated, term)| {
            if is_negated {
                format!("!({term})")
            } else {
                term.to_owned()
            }
        })
    };
    let sound = (term(), vec((any::<bool>(), term()), 0..3)).prop_map(|(first, more)| {
        more.into_iter().fold(first, |text, (is_or, term)| {
            format!("{text} {} {term}", if is_or { "||" } else { "&&" })
        })
    });
    prop_oneof![3 => sound, 1 => vec(select(&PIECES[..]), 0..7).prop_map(|pieces| pieces.concat())]
}

/// Labels that pods of another namespace can have.
fn foreign() -> impl Strategy<Value = Labels> {
    let keys = select(vec![
        "app",
        "pcns.team",
        "pcsa.role",
        "pcns.projectcalico.org/name",
    ])
    .prop_map(str::to_owned);
    let values = select(vec!["web", "db", "a", "admin", "own", "victim"]).prop_map(str::to_owned);
    btree_map(keys, values, 0..4).prop_map(|mut labels| {
        let reserved = [
            (LABEL_NAMESPACE, "victim"),
            (LABEL_ORCHESTRATOR, "k8s"),
            (LABEL_SERVICE_ACCOUNT, "default"),
        ];
        labels.extend(reserved.map(|(key, value)| (key.to_owned(), value.to_owned())));
        labels
    })
}

fn parsed<T: serde::de::DeserializeOwned>(version: &str, spec: &Value) -> Result<T, TestCaseError> {
    let object = json!({
        "apiVersion": version, "kind": "NetworkPolicy", "metadata": {
            "name": "p",
            "namespace": "own",
        }, "spec": spec,
    });
    serde_json::from_value(object).map_err(|error| TestCaseError::fail(error.to_string()))
}

/// Returns the policy that is enforced, also for a refused object.
fn enforced(result: Result<Policy, Refusal>) -> Option<Policy> {
    result.map_or_else(|refusal| refusal.closed, Some)
}

fn lets_in(entity: &EntityMatch, labels: &Labels) -> bool {
    let is_in = entity
        .selector
        .as_ref()
        .is_none_or(|selector| selector.matches(labels));
    is_in
        && !entity
            .not_selector
            .as_ref()
            .is_some_and(|selector| selector.matches(labels))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1500,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_selector_of_a_namespaced_policy_reaches_out(
        (subject, account, peer, not_peer) in (selector(), selector(), selector(), selector()),
        foreign in foreign(),
    ) {
        let entities = [
            json!({ "selector": peer }),
            json!({ "selector": peer, "notSelector": not_peer }),
            json!({ "notSelector": not_peer }),
            json!({ "serviceAccounts": { "selector": account } }),
        ];
        let sources: Vec<Value> = entities.iter().filter(|entity| {
            // An empty field counts as unset, and then no selector restricts the rule.
            entity.as_object().is_some_and(
                |fields| fields.values().all(|value| value.as_str() != Some("")),
            )
                && *entity != &json!({ "serviceAccounts": { "selector": "" } })
        }).map(|entity| json!({ "action": "Allow", "source": entity })).collect();
        let destinations: Vec<Value> = sources.iter()
            .map(|rule| json!({ "action": "Allow", "destination": rule["source"] })).collect();
        let spec = json!({
            "selector": subject, "serviceAccountSelector": account, "ingress": sources,
            "egress": destinations,
        });
        let policy: NetworkPolicy = parsed("projectcalico.org/v3", &spec)?;
        if let Some(policy) = enforced(v3::parse::policy::network_policy(&policy)) {
            prop_assert!(
                !policy.selector.matches(&foreign),
                "{} takes hold of {foreign:?}",
                policy.selector,
            );
            for rule in policy.ingress.iter().chain(&policy.egress) {
                let peer = [&rule.source, &rule.destination].into_iter().all(
                    |entity| lets_in(entity, &foreign),
                );
                prop_assert!(!peer, "{rule:?} lets in {foreign:?}");
            }
        }
    }

    #[test]
    fn no_label_selector_of_a_namespaced_policy_reaches_out(
        keys in vec((
            select(
                vec![
                    "app",
                    "pcns.team",
                    "projectcalico.org/namespace",
                    "projectcalico.org/orchestrator",
                ],
            ),
            select(vec!["In", "NotIn", "Exists", "DoesNotExist"]),
            select(vec!["web", "a", "victim", "k8s"])), 0..4),
        foreign in foreign(),
    ) {
        let demands: Vec<Value> = keys.iter().map(|(key, operator, value)| {
            let values = if operator.ends_with("In") { vec![*value] } else { Vec::new() };
            json!({ "key": key, "operator": operator, "values": values })
        }).collect();
        let pods = json!({ "matchExpressions": demands });
        let peers = json!([{ "podSelector": pods }]);
        let spec = json!({
            "podSelector": pods, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{ "from": peers }], "egress": [{ "to": peers }],
        });
        let policy: v1::NetworkPolicy = parsed("networking.k8s.io/v1", &spec)?;
        if let Some(policy) = enforced(netpol::policy(&policy).map(|(_, policy)| policy)) {
            prop_assert!(
                !policy.selector.matches(&foreign),
                "{} takes hold of {foreign:?}",
                policy.selector,
            );
            for rule in policy.ingress.iter().chain(&policy.egress) {
                let peer = [&rule.source, &rule.destination].into_iter().all(
                    |entity| lets_in(entity, &foreign),
                );
                prop_assert!(!peer, "{rule:?} lets in {foreign:?}");
            }
        }
    }
}

#[test]
fn a_policy_applies_to_its_own_namespace() {
    let own = |app: &str| {
        BTreeMap::from([
            (LABEL_NAMESPACE.to_owned(), "own".to_owned()),
            (LABEL_ORCHESTRATOR.to_owned(), "k8s".to_owned()),
            ("app".to_owned(), app.to_owned()),
        ])
    };
    let spec = json!({ "selector": "app == 'web' || app == 'db'", "ingress": [] });
    let policy: NetworkPolicy = parsed("projectcalico.org/v3", &spec).expect("a policy");
    let policy = v3::parse::policy::network_policy(&policy).expect("a sound policy");
    assert!(
        policy.selector.matches(&own("db")) && !policy.selector.matches(&own("other")),
        "{}",
        policy.selector
    );
}
