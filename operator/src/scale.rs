//! Number of typha replicas: it follows the size of the cluster, and is at most the number of nodes
//! that may run one, because each replica takes a port of its node.

use k8s_openapi::api::core::v1::{
    NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration,
};
use margay_api::installation::ReplicaBounds;

use crate::inputs::NodeFacts;

/// Returns the replicas for `nodes` usable nodes, of which `eligible` may run typha: 1 up to two
/// nodes, 2 up to four, else one for 200 nodes and two more, at least three; then clamped to the
/// bounds, of which the lower one takes precedence, and to the eligible nodes. The formula is
/// Calico's (tigera/operator), so that a cluster that is taken over keeps its size. If no node may
/// run typha there is one replica, whose pending pod reports why.
pub fn typha_replicas(nodes: usize, eligible: usize, bounds: Option<&ReplicaBounds>) -> i32 {
    let wanted = match nodes {
        0..=2 => 1,
        3..=4 => 2,
        _ => i32::try_from(nodes / 200 + 2).unwrap_or(i32::MAX).max(3),
    };
    let minimum = bounds.and_then(|b| b.minimum).unwrap_or(1).max(1);
    let maximum = bounds.and_then(|b| b.maximum).unwrap_or(i32::MAX);
    let room = i32::try_from(eligible).unwrap_or(i32::MAX).max(1);
    wanted.min(maximum).max(minimum).min(room)
}

/// Counts the usable nodes that a pod like this may be scheduled to, by its selector, its required
/// node affinity and its tolerations.
pub fn eligible(nodes: &[NodeFacts], pod: &PodSpec) -> usize {
    nodes
        .iter()
        .filter(|node| node.usable && is_eligible(node, pod))
        .count()
}

fn is_eligible(node: &NodeFacts, pod: &PodSpec) -> bool {
    let selects = |(label, value): (&String, &String)| node.labels.get(label) == Some(value);
    let required = pod
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| {
            affinity
                .required_during_scheduling_ignored_during_execution
                .as_ref()
        });
    let tolerations = pod.tolerations.as_deref().unwrap_or_default();
    pod.node_selector.iter().flatten().all(selects)
        && required.is_none_or(|required| {
            required
                .node_selector_terms
                .iter()
                .any(|term| matches_term(node, term))
        })
        && node.taints.iter().all(|taint| {
            tolerations
                .iter()
                .any(|toleration| tolerates(toleration, taint))
        })
}

/// Returns true when the node matches the term. A term without requirements matches no node.
fn matches_term(node: &NodeFacts, term: &NodeSelectorTerm) -> bool {
    let labels = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let label = |wanted: &NodeSelectorRequirement| {
        matches_requirement(wanted, node.labels.get(&wanted.key).map(String::as_str))
    };
    let field = |wanted: &NodeSelectorRequirement| {
        matches_requirement(
            wanted,
            Some(node.name.as_str()).filter(|_| wanted.key == "metadata.name"),
        )
    };
    (!labels.is_empty() || !fields.is_empty())
        && labels.iter().all(label)
        && fields.iter().all(field)
}

fn matches_requirement(wanted: &NodeSelectorRequirement, found: Option<&str>) -> bool {
    let values = wanted.values.as_deref().unwrap_or_default();
    let listed = found.is_some_and(|found| values.iter().any(|value| value == found));
    let number = |text: &str| text.parse::<i64>().ok();
    let numbers = || Some((number(found?)?, number(values.first()?)?));
    match wanted.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Gt" => numbers().is_some_and(|(found, bound)| found > bound),
        "Lt" => numbers().is_some_and(|(found, bound)| found < bound),
        _ => false,
    }
}

/// Returns true when the toleration allows scheduling in spite of the taint; one of
/// `PreferNoSchedule` never prevents it.
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let key = toleration.key.as_deref().unwrap_or_default();
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let is_selected =
        (key.is_empty() || key == taint.key) && (effect.is_empty() || effect == taint.effect);
    let has_value = match toleration.operator.as_deref().unwrap_or_default() {
        "Exists" => true,
        "" | "Equal" => {
            !key.is_empty()
                && toleration.value.as_deref().unwrap_or_default()
                    == taint.value.as_deref().unwrap_or_default()
        }
        _ => false,
    };
    taint.effect == "PreferNoSchedule" || (is_selected && has_value)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn follows_the_formula_and_the_bounds() {
        for (nodes, wanted) in [
            (0, 1),
            (1, 1),
            (2, 1),
            (3, 2),
            (4, 2),
            (5, 3),
            (199, 3),
            (400, 4),
            (5000, 27),
        ] {
            assert_eq!(typha_replicas(nodes, nodes, None), wanted, "{nodes} nodes");
        }
        let bounds = ReplicaBounds {
            minimum: Some(2),
            maximum: Some(5),
        };
        assert_eq!(typha_replicas(2, 2, Some(&bounds)), 2);
        assert_eq!(typha_replicas(5000, 5000, Some(&bounds)), 5);
    }

    #[test]
    fn there_are_no_more_replicas_than_nodes_that_may_run_one() {
        let bounds = ReplicaBounds {
            minimum: Some(3),
            maximum: None,
        };
        for (nodes, eligible, bounds, wanted) in [
            (3, 1, None, 1),
            (3, 0, None, 1),
            (5000, 3, None, 3),
            (5000, 40, None, 27),
            (9, 2, Some(&bounds), 2),
        ] {
            assert_eq!(
                typha_replicas(nodes, eligible, bounds),
                wanted,
                "{eligible} of {nodes}"
            );
        }
    }

    /// n1 is the control plane, n2 and n3 are workers, of which n3 is tainted, and n4 is cordoned.
    fn nodes() -> Vec<NodeFacts> {
        let node = |name: &str, label: (&str, &str), taints: Value| NodeFacts {
            name: name.to_owned(),
            usable: name != "n4",
            labels: [(label.0.to_owned(), label.1.to_owned())].into(),
            taints: serde_json::from_value(taints).unwrap(),
            ..NodeFacts::default()
        };
        let control =
            json!([{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]);
        let kept = json!([
            {"key": "kept", "value": "gpu", "effect": "NoExecute"},
            {"key": "soft", "effect": "PreferNoSchedule"},
        ]);
        vec![
            node("n1", ("role", "control"), control),
            node("n2", ("size", "7"), json!([])),
            node("n3", ("size", "40"), kept),
            node("n4", ("role", "control"), json!([])),
        ]
    }

    #[test]
    fn a_node_is_eligible_as_the_scheduler_sees_it() {
        let all = json!([{"operator": "Exists"}]);
        let affinity = |terms: Value| {
            json!({
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
                },
            })
        };
        let expression = |key: &str, operator: &str, values: Value| {
            json!({
                "matchExpressions": [{"key": key, "operator": operator, "values": values}],
            })
        };
        let table = [
            ("everything tolerated", json!({"tolerations": all}), 3),
            ("nothing tolerated", json!({}), 1),
            (
                "selector",
                json!({"tolerations": all, "nodeSelector": {"role": "control"}}),
                1,
            ),
            (
                "selector without toleration",
                json!({"nodeSelector": {"role": "control"}}),
                0,
            ),
            (
                "by key",
                json!({"tolerations": [{"key": "kept", "operator": "Exists"}]}),
                2,
            ),
            (
                "by value",
                json!({"tolerations": [{"key": "kept", "value": "gpu", "effect": "NoExecute"}]}),
                2,
            ),
            (
                "by another value",
                json!({"tolerations": [{"key": "kept", "value": "cpu"}]}),
                1,
            ),
            (
                "by another effect",
                json!({
                    "tolerations": [{"key": "kept", "operator": "Exists", "effect": "NoSchedule"}],
                }),
                1,
            ),
            (
                "In",
                json!({
                    "tolerations": all,
                    "affinity": affinity(
                        json!([expression("role", "In", json!(["control", "x"]))]),
                    ),
                }),
                1,
            ),
            (
                "NotIn",
                json!({
                    "tolerations": all,
                    "affinity": affinity(json!([expression("role", "NotIn", json!(["control"]))])),
                }),
                2,
            ),
            (
                "Exists",
                json!({
                    "tolerations": all,
                    "affinity": affinity(json!([expression("size", "Exists", json!([]))])),
                }),
                2,
            ),
            (
                "DoesNotExist",
                json!({
                    "tolerations": all,
                    "affinity": affinity(json!([expression("size", "DoesNotExist", json!([]))])),
                }),
                1,
            ),
            (
                "Gt",
                json!({
                    "tolerations": all,
                    "affinity": affinity(json!([expression("size", "Gt", json!(["8"]))])),
                }),
                1,
            ),
            (
                "one of two terms",
                json!({
                    "tolerations": all,
                    "affinity": affinity(
                        json!([
                            expression("role", "Exists", json!([])),
                            expression("size", "Lt", json!(["8"])),
                        ]),
                    ),
                }),
                2,
            ),
            (
                "by name",
                json!({
                    "tolerations": all,
                    "affinity": affinity(
                        json!([
                            {
                                "matchFields": [{
                                    "key": "metadata.name",
                                    "operator": "In",
                                    "values": ["n2"],
                                }],
                            },
                        ]),
                    ),
                }),
                1,
            ),
            (
                "an empty term",
                json!({"tolerations": all, "affinity": affinity(json!([{}]))}),
                0,
            ),
        ];
        for (what, pod, wanted) in table {
            let mut pod = pod;
            pod["containers"] = json!([]);
            let pod: PodSpec = serde_json::from_value(pod).unwrap();
            assert_eq!(eligible(&nodes(), &pod), wanted, "{what}");
        }
    }
}
