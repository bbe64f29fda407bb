//! Rewriting of selectors to effective labels: the namespaces and service accounts that they may
//! reach.

use crate::meta::{
    LABEL_NAMESPACE, LABEL_SERVICE_ACCOUNT, PREFIX_NAMESPACE, PREFIX_SERVICE_ACCOUNT,
};
use crate::selector::{Node, Selector};

/// Selects everything in one namespace.
pub(super) fn in_namespace(namespace: &str) -> Selector {
    Node::Equals(LABEL_NAMESPACE.to_owned(), namespace.to_owned()).into()
}

/// Selects everything that runs under one of these service accounts.
pub(super) fn under_accounts(names: &[String]) -> Selector {
    let names = names.iter().cloned().collect();
    Node::In(LABEL_SERVICE_ACCOUNT.to_owned(), names).into()
}

/// Rewrites a namespace selector to effective labels: `all()` is everything in a namespace,
/// `global()` everything outside of namespaces.
pub(super) fn of_namespaces(selector: &Selector) -> Selector {
    namespaced(selector.with_prefix(PREFIX_NAMESPACE).root).into()
}

/// Rewrites a service account selector to effective labels.
pub(super) fn of_accounts(selector: &Selector) -> Selector {
    selector.with_prefix(PREFIX_SERVICE_ACCOUNT)
}

/// Rewrites the service account selector of a policy itself: there `all()` is everything that runs
/// under a service account.
pub(super) fn of_policy_accounts(selector: &Selector) -> Selector {
    match selector.root {
        Node::All => Node::Has(LABEL_SERVICE_ACCOUNT.to_owned()).into(),
        _ => of_accounts(selector),
    }
}

fn namespaced(node: Node) -> Node {
    let has = Node::Has(LABEL_NAMESPACE.to_owned());
    match node {
        Node::All => has,
        Node::Global => Node::Not(Box::new(has)),
        Node::Not(operand) => match namespaced(*operand) {
            Node::Not(inner) => *inner,
            inner => Node::Not(Box::new(inner)),
        },
        Node::And(operands) => Node::And(operands.into_iter().map(namespaced).collect()),
        Node::Or(operands) => Node::Or(operands.into_iter().map(namespaced).collect()),
        node => node,
    }
}
