use jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::manifest::{Key, kind};

fn now() -> Timestamp {
    "2026-11-23T10:00:00.75Z".parse().unwrap()
}

fn deployment(status: Value) -> Deployment {
    serde_json::from_value(json!({
        "metadata": { "name": TYPHA, "generation": 2 },
        "spec": { "replicas": 2, "selector": {}, "template": {} },
        "status": status,
    }))
    .unwrap()
}

fn daemon_set(status: Value) -> DaemonSet {
    let mut whole = json!({
        "currentNumberScheduled": 3, "desiredNumberScheduled": 3, "numberMisscheduled": 0,
        "numberReady": 3,
    });
    whole
        .as_object_mut()
        .unwrap()
        .extend(status.as_object().unwrap().clone());
    serde_json::from_value(json!({
        "metadata": { "name": NODE, "generation": 2 },
        "spec": { "selector": {}, "template": {} },
        "status": whole,
    }))
    .unwrap()
}

fn up() -> Inputs {
    Inputs {
        pools: Some(Vec::new()),
        deployments: vec![deployment(
            json!({ "observedGeneration": 2, "updatedReplicas": 2, "availableReplicas": 2 }),
        )],
        daemon_sets: vec![daemon_set(
            json!({ "observedGeneration": 2, "updatedNumberScheduled": 3, "numberAvailable": 3 }),
        )],
        ..Inputs::default()
    }
}

fn message(finding: Option<Finding>) -> String {
    finding
        .map(|f| format!("{}: {}", f.reason, f.message))
        .unwrap_or_default()
}

#[test]
fn a_whole_installation_is_available_and_nothing_else() {
    let state = calico(&up(), &Findings::default());
    assert_eq!(state, State::default());
    assert_eq!(ippools(&up(), &Findings::default()), State::default());
    let conditions = conditions("Available", &state, 7, &[], now());
    let texts: Vec<String> = conditions
        .iter()
        .map(|c| {
            format!(
                "{}={} {} {}",
                c.kind, c.status, c.reason, c.observed_generation
            )
        })
        .collect();
    assert_eq!(
        texts,
        [
            "Available=True AllObjectsAvailable 7",
            "Progressing=False NotApplicable 7",
            "Degraded=False NotApplicable 7",
        ]
    );
    assert_eq!(conditions[0].last_transition_time, "2026-11-23T10:00:00Z");
}

#[test]
fn a_rollout_is_progressing_with_its_counts() {
    let with_deployment = |status: Value| Inputs {
        deployments: vec![deployment(status)],
        ..up()
    };
    let with_daemon_set = |status: Value| Inputs {
        daemon_sets: vec![daemon_set(status)],
        ..up()
    };
    let table = [
        (
            Inputs {
                deployments: vec![],
                ..up()
            },
            "Deployment margay-system/margay-typha does not exist yet",
        ),
        (
            Inputs {
                daemon_sets: vec![],
                ..up()
            },
            "DaemonSet margay-system/margay-node does not exist yet",
        ),
        (
            with_deployment(json!({ "observedGeneration": 1 })),
            "its rollout has not begun",
        ),
        (
            with_deployment(
                json!({ "observedGeneration": 2, "updatedReplicas": 1, "availableReplicas": 2 }),
            ),
            "margay-typha: 1 of 2 replicas have the newest revision",
        ),
        (
            with_deployment(
                json!({ "observedGeneration": 2, "updatedReplicas": 2, "availableReplicas": 1 }),
            ),
            "margay-typha: 1 of 2 replicas are available",
        ),
        (
            with_daemon_set(json!({ "observedGeneration": 1 })),
            "its rollout has not begun",
        ),
        (
            with_daemon_set(json!({
                "observedGeneration": 2,
                "updatedNumberScheduled": 2,
                "numberAvailable": 3,
            })),
            "margay-node: 2 of 3 agents have the newest revision",
        ),
        (
            with_daemon_set(json!({
                "observedGeneration": 2,
                "updatedNumberScheduled": 3,
                "numberAvailable": 0,
            })),
            "margay-node: 0 of 3 agents are available",
        ),
    ];
    for (inputs, wanted) in table {
        let state = calico(&inputs, &Findings::default());
        assert_eq!(state.degraded, None);
        let text = message(state.progressing);
        assert!(
            text.starts_with("ResourceNotReady: ") && text.contains(wanted),
            "{text}"
        );
    }
}

fn pod(name: &str, node: &str, status: Value) -> k8s_openapi::api::core::v1::Pod {
    serde_json::from_value(json!({
        "metadata": { "name": name, "namespace": NAMESPACE },
        "spec": { "nodeName": node, "containers": [] },
        "status": status,
    }))
    .unwrap()
}

fn waiting(reason: &str, last: Value) -> Value {
    json!({ "containerStatuses": [{
        "name": "margay-node", "image": "margay.io/margay:v9", "imageID": "", "ready": false,
        "restartCount": 3,
        "state": { "waiting": { "reason": reason, "message": "the message" } }, "lastState": last,
    }] })
}

#[test]
fn a_stuck_pod_degrades_with_node_container_and_remedy() {
    let ended = json!({ "terminated": { "exitCode": 101 } });
    let table = [
        (
            waiting("CrashLoopBackOff", ended),
            "pod p1 on node n1: container margay-node: CrashLoopBackOff: it ended with status 101; \
             see kubectl logs -n margay-system p1 -c margay-node --previous",
        ),
        (
            waiting("ErrImageNeverPull", json!({})),
            "ErrImageNeverPull: the message; make image margay.io/margay:v9 available to the node",
        ),
        (
            waiting("CreateContainerConfigError", json!({})),
            "see kubectl describe pod -n margay-system p1",
        ),
    ];
    for (status, wanted) in table {
        let inputs = Inputs {
            pods: vec![pod("p1", "n1", status)],
            ..up()
        };
        let text = message(calico(&inputs, &Findings::default()).degraded);
        assert!(
            text.starts_with("PodFailure: ") && text.contains(wanted),
            "{text}"
        );
    }
    let starting = Inputs {
        pods: vec![pod("p1", "n1", waiting("ContainerCreating", json!({})))],
        ..up()
    };
    assert_eq!(calico(&starting, &Findings::default()).degraded, None);
}

#[test]
fn a_runtimes_long_message_is_cut() {
    let mut status = waiting("ErrImagePull", json!({}));
    status["containerStatuses"][0]["state"]["waiting"]["message"] = json!("ü".repeat(1000));
    let inputs = Inputs {
        pods: vec![pod("p1", "n1", status)],
        ..up()
    };
    let text = message(calico(&inputs, &Findings::default()).degraded);
    assert!(
        text.contains("ü...; make image") && text.chars().count() < 400,
        "{text}"
    );
}

#[test]
fn examples_are_few_and_counted() {
    let pods = (0..5)
        .map(|i| pod(&format!("p{i}"), "n1", waiting("ErrImagePull", json!({}))))
        .collect();
    let text = message(calico(&Inputs { pods, ..up() }, &Findings::default()).degraded);
    assert!(
        text.contains("pod p2") && !text.contains("pod p3"),
        "{text}"
    );
    assert!(text.ends_with("; and 2 more"), "{text}");
}

#[test]
fn the_reason_of_an_unready_pod_is_reported_during_progress() {
    let unscheduled = json!({
        "phase": "Pending",
        "conditions": [{
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "no node",
        }],
    });
    let inputs = Inputs {
        daemon_sets: vec![],
        pods: vec![pod("p1", "n1", unscheduled)],
        ..up()
    };
    let text = message(calico(&inputs, &Findings::default()).progressing);
    assert!(
        text.contains("pod p1 on node n1 is Pending and not ready (Unschedulable: no node)"),
        "{text}"
    );
}

fn problem(field: &str) -> Problem {
    Problem {
        field: field.to_owned(),
        value: "5".to_owned(),
        rule: "rule".to_owned(),
        remedy: "remedy".to_owned(),
    }
}

fn failed(kind_name: &str, transient: bool) -> Failure {
    Failure {
        key: Key {
            kind: kind(kind_name),
            namespace: String::new(),
            name: "x".to_owned(),
        },
        message: "reason".to_owned(),
        transient,
    }
}

#[test]
fn problems_for_a_person_degrade_the_right_part() {
    let bad_mtu = Findings {
        spec: Some(SpecError::Invalid(vec![problem("spec.calicoNetwork.mtu")])),
        ..Findings::default()
    };
    let bad_pool = Findings {
        spec: Some(SpecError::Invalid(vec![problem(
            "spec.calicoNetwork.ipPools[0].cidr",
        )])),
        ..Findings::default()
    };
    let conflict = Findings {
        conflicts: vec!["IPPool a differs".to_owned()],
        ..Findings::default()
    };
    let undecodable = Findings {
        spec: Some(SpecError::Undecodable("invalid type".to_owned())),
        ..Findings::default()
    };
    let certificates = Findings {
        certificates: Some("broken".to_owned()),
        ..Findings::default()
    };
    let refused = Findings {
        failures: vec![failed("ClusterRole", false)],
        ..Findings::default()
    };
    let busy = Findings {
        failures: vec![failed("ClusterRole", true)],
        ..Findings::default()
    };
    let table = [
        (
            bad_mtu,
            "InvalidConfigurationError: spec.calicoNetwork.mtu is 5: rule; remedy",
            "",
        ),
        (
            bad_pool,
            "InvalidConfigurationError: spec.calicoNetwork.ipPools[0].cidr is 5",
            "InvalidConfigurationError: spec.calicoNetwork.ipPools[0].cidr is 5",
        ),
        (conflict, "", "ResourceValidationError: IPPool a differs"),
        (
            undecodable,
            "InvalidConfigurationError: Installation spec: invalid type",
            "",
        ),
        (certificates, "CertificateError: broken", ""),
        (
            refused,
            "ResourceUpdateError: ClusterRole x cannot be applied: reason",
            "",
        ),
        (busy, "", ""),
    ];
    for (findings, whole, pools) in table {
        let text = message(calico(&up(), &findings).degraded);
        assert!(
            text.starts_with(whole) && text.is_empty() == whole.is_empty(),
            "{text}"
        );
        let text = message(ippools(&up(), &findings).degraded);
        assert!(
            text.starts_with(pools) && text.is_empty() == pools.is_empty(),
            "{text}"
        );
    }
    let trying = Findings {
        failures: vec![failed("ClusterRole", true)],
        ..Findings::default()
    };
    assert!(message(calico(&up(), &trying).progressing).contains("retrying"));
}

#[test]
fn pools_whose_kind_is_not_served_are_waited_for() {
    let inputs = Inputs {
        pools: None,
        ..up()
    };
    let text = message(ippools(&inputs, &Findings::default()).progressing);
    assert!(text.contains("does not serve IPPool"), "{text}");
    assert_eq!(calico(&inputs, &Findings::default()), State::default());
}

#[test]
fn a_conditions_transition_time_changes_only_with_its_status() {
    let first = conditions("Ready", &State::default(), 1, &[], now());
    let later = now() + jiff::SignedDuration::from_secs(60);
    let same = conditions("Ready", &State::default(), 2, &first, later);
    assert_eq!(same[0].last_transition_time, first[0].last_transition_time);
    assert_eq!(same[0].observed_generation, 2);
    let broken = State {
        degraded: Some(Finding::new("PodFailure", "x")),
        ..State::default()
    };
    let after = conditions("Ready", &broken, 2, &same, later);
    assert_eq!(after[0].status, "False");
    assert_eq!(after[0].last_transition_time, "2026-11-23T10:01:00Z");
    assert_eq!(after[1].last_transition_time, first[1].last_transition_time);
    assert_eq!(after[2].status, "True");
}

#[test]
fn settings_without_effect_are_reported_beside_available() {
    let one = |field: &str, is_unsafe| Ignored {
        is_unsafe,
        object: "Installation default".to_owned(),
        field: format!("spec.{field} is x"),
        meaning: "nothing follows".to_owned(),
    };
    let calico_ignored = [one("fine", false), one("bad", true)].into();
    let ignored = fields::Report {
        calico: calico_ignored,
        ..fields::Report::default()
    };
    let state = calico(
        &up(),
        &Findings {
            ignored,
            ..Findings::default()
        },
    );
    let shown = conditions("Available", &state, 7, &[], now());
    let texts: Vec<String> = shown
        .iter()
        .map(|c| format!("{}={} {}", c.kind, c.status, c.message))
        .collect();
    assert_eq!(
        texts,
        [
            "Available=True All objects available; without effect: Installation default, spec.fine \
             is x: nothing follows",
            "Progressing=False ",
            "Degraded=True Installation default, spec.bad is x: nothing follows",
        ]
    );
    assert_eq!(
        ippools(
            &up(),
            &Findings {
                overlaps: vec!["IPPool b: overlaps".to_owned()],
                ..Findings::default()
            }
        )
        .degraded,
        Some(Finding::new(
            "ResourceValidationError",
            "IPPool b: overlaps"
        ))
    );
}

#[test]
fn the_installation_shows_problems_of_pools_too() {
    let pools = State {
        degraded: Some(Finding::new("ResourceValidationError", "pool")),
        progressing: Some(Finding::new("ResourceNotFound", "kind")),
        ..State::default()
    };
    let shown = overall(&State::default(), &pools);
    assert_eq!(message(shown.degraded), "ResourceValidationError: pool");
    assert_eq!(shown.progressing, None);
}

#[test]
fn problems_of_objects_and_nodes_are_reported_with_examples_and_counts() {
    use margay_api::report::Listing;
    let listing = |subjects: &[&str]| {
        Listing::of(subjects, |subject| {
            Entry::new(subject, "field: value: rule; remedy")
        })
    };
    let with = |objects: &[&str], records: &[&str], nodes: &[&str]| Inputs {
        reports: Report {
            objects: listing(objects),
            records: listing(records),
            nodes: listing(nodes),
        },
        ..up()
    };
    assert_eq!(policies(&up()), State::default());
    let inputs = with(
        &["NetworkPolicy a/p", "Tier t", "Tier u", "Tier v"],
        &["policy x on node n1"],
        &[],
    );
    assert_eq!(
        message(policies(&inputs).degraded),
        "ResourceValidationError: 4 objects not used as written, 1 records not enforced on a node \
         as written: NetworkPolicy a/p: field: value: rule; remedy; Tier t: field: value: rule; \
         remedy; Tier u: field: value: rule; remedy"
    );
    assert_eq!(
        calico(&inputs, &Findings::default()),
        State::default(),
        "a tenant's bad policy is no fault of the whole"
    );
    let inputs = with(&[], &[], &["n1", "n2", "n3", "n4"]);
    assert_eq!(policies(&inputs), State::default());
    let text = message(calico(&inputs, &Findings::default()).degraded);
    assert!(
        text.starts_with("NodeNotAsWanted: node n1: field") && text.ends_with("; and 1 more"),
        "{text}"
    );
}
