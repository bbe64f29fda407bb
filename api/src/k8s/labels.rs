//! Labels of namespaces and service accounts, as the endpoints in them inherit them, and label selectors.

use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta};

use crate::meta::{LABEL_PARENT_NAME, Labels, NamespacedName};
use crate::problem::Problems;
use crate::selector::{Node, Selector};

/// Name and labels of a namespace; the label with its name is always the true one, whatever a user wrote there.
pub fn namespace(namespace: &Namespace) -> (String, Labels) {
    let name = namespace.metadata.name.clone().unwrap_or_default();
    (name, inherited(&namespace.metadata))
}

/// Name and labels of a service account; the label with its name is always the true one, whatever a user wrote there.
pub fn service_account(account: &ServiceAccount) -> (NamespacedName, Labels) {
    let metadata = &account.metadata;
    let key =
        NamespacedName::new(metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default());
    (key, inherited(metadata))
}

fn inherited(metadata: &ObjectMeta) -> Labels {
    let mut labels = metadata.labels.clone().unwrap_or_default();
    let name = metadata.name.clone().unwrap_or_default();
    labels.insert(LABEL_PARENT_NAME.to_owned(), name);
    labels
}

/// A Kubernetes label selector as one of ours; empty matches everything. `None`: it is not valid, with the reasons noted.
pub(crate) fn selector(problems: &mut Problems, field: &str, selector: &LabelSelector) -> Option<Selector> {
    let known = problems.len();
    let equal = selector.match_labels.iter().flatten().map(|(label, value)| Node::Equals(label.clone(), value.clone()));
    let mut operands: Vec<Node> = equal.collect();
    for (index, requirement) in selector.match_expressions.iter().flatten().enumerate() {
        let at = format!("{field}.matchExpressions[{index}]");
        operands.extend(expression(problems, &at, requirement));
    }
    let parts = operands.into_iter().map(Selector::from);
    (problems.len() == known).then(|| Selector::and(parts))
}

fn expression(problems: &mut Problems, at: &str, requirement: &LabelSelectorRequirement) -> Option<Node> {
    let label = requirement.key.clone();
    let values = requirement.values.iter().flatten().cloned();
    let is_empty = requirement.values.iter().flatten().next().is_none();
    match requirement.operator.as_str() {
        "In" | "NotIn" if is_empty => {
            problems.add(format!("{at}.values"), "", "In and NotIn need values", "name at least one value");
            None
        }
        "In" => Some(Node::In(label, values.collect())),
        "NotIn" => Some(Node::NotIn(label, values.collect())),
        "Exists" => Some(Node::Has(label)),
        "DoesNotExist" => Some(Node::Not(Box::new(Node::Has(label)))),
        other => {
            problems.add(format!("{at}.operator"), other, "not an operator", "use In, NotIn, Exists or DoesNotExist");
            None
        }
    }
}
