//! How selectors of the API become selectors over effective labels: which namespaces and service accounts they may reach.

use crate::meta::{LABEL_NAMESPACE, LABEL_SERVICE_ACCOUNT, PREFIX_NAMESPACE, PREFIX_SERVICE_ACCOUNT};
use crate::selector::{Node, Selector};

/// Everything of one namespace.
pub(super) fn in_namespace(namespace: &str) -> Selector {
    Node::Equals(LABEL_NAMESPACE.to_owned(), namespace.to_owned()).into()
}

/// Everything that runs under one of these service accounts.
pub(super) fn under_accounts(names: &[String]) -> Selector {
    let names = names.iter().cloned().collect();
    Node::In(LABEL_SERVICE_ACCOUNT.to_owned(), names).into()
}

/// A namespace selector over effective labels: `all()` is whatever is in a namespace, `global()` whatever is in none.
pub(super) fn of_namespaces(selector: &Selector) -> Selector {
    namespaced(selector.with_prefix(PREFIX_NAMESPACE).root).into()
}

/// A service account selector over effective labels.
pub(super) fn of_accounts(selector: &Selector) -> Selector {
    selector.with_prefix(PREFIX_SERVICE_ACCOUNT)
}

/// A policy's own service account selector: there `all()` is whatever runs under a service account.
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
