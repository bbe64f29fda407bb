//! Labels of namespaces and service accounts as their endpoints inherit them, and label selectors.

use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    LabelSelector, LabelSelectorRequirement, ObjectMeta,
};

use crate::meta::{LABEL_PARENT_NAME, Labels, NamespacedName};
use crate::problem::Problems;
use crate::selector::{Node, Selector, is_label_name};

/// Returns name and labels of a namespace; the label with its name is always the true one, whatever
/// a user wrote there.
pub fn namespace(namespace: &Namespace) -> (String, Labels) {
    let name = namespace.metadata.name.clone().unwrap_or_default();
    (name, inherited(&namespace.metadata))
}

/// Returns name and labels of a service account; the label with its name is always the true one,
/// whatever a user wrote there.
pub fn service_account(account: &ServiceAccount) -> (NamespacedName, Labels) {
    let metadata = &account.metadata;
    let key = NamespacedName::new(
        metadata.namespace.clone().unwrap_or_default(),
        metadata.name.clone().unwrap_or_default(),
    );
    (key, inherited(metadata))
}

fn inherited(metadata: &ObjectMeta) -> Labels {
    let mut labels = metadata.labels.clone().unwrap_or_default();
    let name = metadata.name.clone().unwrap_or_default();
    labels.insert(LABEL_PARENT_NAME.to_owned(), name);
    labels
}

/// Converts a Kubernetes label selector; empty matches everything. `None`: it is not valid, and the
/// problems recorded.
pub(crate) fn selector(
    problems: &mut Problems,
    field: &str,
    selector: &LabelSelector,
) -> Option<Selector> {
    let known = problems.len();
    let mut operands = Vec::new();
    for (label, value) in selector.match_labels.iter().flatten() {
        let at = format!("{field}.matchLabels");
        if can_be_written(problems, &at, label, [value]) {
            operands.push(Node::Equals(label.clone(), value.clone()));
        }
    }
    for (index, requirement) in selector.match_expressions.iter().flatten().enumerate() {
        let at = format!("{field}.matchExpressions[{index}]");
        operands.extend(expression(problems, &at, requirement));
    }
    let parts = operands.into_iter().map(Selector::from);
    (problems.len() == known).then(|| Selector::and(parts))
}

fn expression(
    problems: &mut Problems,
    at: &str,
    requirement: &LabelSelectorRequirement,
) -> Option<Node> {
    let label = requirement.key.clone();
    let values = requirement.values.iter().flatten().cloned();
    let is_empty = requirement.values.iter().flatten().next().is_none();
    if !can_be_written(problems, at, &label, requirement.values.iter().flatten()) {
        return None;
    }
    match requirement.operator.as_str() {
        "In" | "NotIn" if is_empty => {
            problems.add(
                format!("{at}.values"),
                "",
                "In and NotIn need values",
                "name at least one value",
            );
            None
        }
        "In" => Some(Node::In(label, values.collect())),
        "NotIn" => Some(Node::NotIn(label, values.collect())),
        "Exists" => Some(Node::Has(label)),
        "DoesNotExist" => Some(Node::Not(Box::new(Node::Has(label)))),
        other => {
            problems.add(
                format!("{at}.operator"),
                other,
                "not an operator",
                "use In, NotIn, Exists or DoesNotExist",
            );
            None
        }
    }
}

/// Returns true when a selector of these has an unambiguous text. IP sets are named by the text of
/// their selector: a key that reads like a piece of one would turn its set into another's. The API
/// server ensures this for built-in kinds, but not for those of a CRD.
fn can_be_written<'a>(
    problems: &mut Problems,
    at: &str,
    label: &str,
    values: impl IntoIterator<Item = &'a String>,
) -> bool {
    let known = problems.len();
    if !is_label_name(label) {
        problems.add(
            at,
            label,
            "not the name of a label",
            "use letters, digits, `_`, `.`, `/` and `-`, 1 to 512 of them",
        );
    }
    for value in values
        .into_iter()
        .filter(|value| value.contains('"') && value.contains('\''))
    {
        problems.add(
            at,
            value,
            "not the value of a label",
            "use letters, digits, `_`, `.` and `-`",
        );
    }
    problems.len() == known
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(key: &str, values: &[&str]) -> Result<String, Vec<String>> {
        let requirement = LabelSelectorRequirement {
            key: key.to_owned(),
            operator: "In".to_owned(),
            values: Some(values.iter().map(|value| (*value).to_owned()).collect()),
        };
        let written = LabelSelector {
            match_labels: None,
            match_expressions: Some(vec![requirement]),
        };
        let mut problems = Problems::default();
        let parsed =
            selector(&mut problems, "spec.subject", &written).map(|parsed| parsed.to_string());
        parsed.ok_or_else(|| {
            problems
                .into_vec()
                .into_iter()
                .map(|problem| problem.field)
                .collect()
        })
    }

    #[test]
    fn no_key_and_no_value_reads_like_a_piece_of_a_selector() {
        assert_eq!(
            parse("app", &["web", "a'b"]),
            Ok("app in {\"a'b\", \"web\"}".to_owned())
        );
        let at = vec!["spec.subject.matchExpressions[0]".to_owned()];
        for key in [
            "",
            "a b",
            "a in {\"b\"} || c",
            "]a",
            "has(a)",
            &"k".repeat(513),
        ] {
            assert_eq!(parse(key, &["web"]), Err(at.clone()), "{key:?}");
        }
        assert_eq!(parse("app", &["web", "a'b\"c"]), Err(at));
    }
}
