//! Policies of the maximal size that the API server accepts, as a watch reports them.

use std::fmt::Write as _;

/// A JSON list of `count` items.
pub fn list(count: usize, item: impl Fn(usize) -> String) -> String {
    let mut text = String::from("[");
    for number in 0..count {
        let separator = if number == 0 { "" } else { "," };
        write!(text, "{separator}{}", item(number)).expect("a String takes any text");
    }
    text + "]"
}

/// Peers that select pods by label, each with another value.
pub fn peers(count: usize) -> String {
    list(count, |number| {
        format!(r#"{{"podSelector":{{"matchLabels":{{"app":"a{number}"}}}}}}"#)
    })
}

/// Named ports of a Kubernetes NetworkPolicy.
pub fn names(count: usize) -> String {
    list(count, |number| format!(r#"{{"port":"p{number}"}}"#))
}

/// Spec of a Kubernetes NetworkPolicy with one ingress rule of that many peers and named ports.
pub fn inwards(peer_count: usize, name_count: usize) -> String {
    let (peers, names) = (peers(peer_count), names(name_count));
    format!(r#"{{"podSelector":{{}},"ingress":[{{"from":{peers},"ports":{names}}}]}}"#)
}

/// Spec with one egress rule of that many peers and named ports.
pub fn outwards(peer_count: usize, name_count: usize) -> String {
    let (peers, names) = (peers(peer_count), names(name_count));
    format!(
        r#"{{"podSelector":{{}},"policyTypes":["Egress"],"egress":[{{"to":{peers},"ports":{names}}}]}}"#
    )
}

/// Spec of a NetworkPolicy of Calico: 1024 rules, each with 50 named ports on both sides.
pub fn multiplied() -> String {
    let ports = list(50, |number| format!(r#""p{number}""#));
    let side = |label: &str| format!(r#"{{"selector":"app == '{label}'","ports":{ports}}}"#);
    let rule = format!(
        r#"{{"action":"Allow","protocol":"TCP","source":{},"destination":{}}}"#,
        side("a1"),
        side("a2")
    );
    format!(
        r#"{{"selector":"all()","types":["Ingress"],"ingress":{}}}"#,
        list(1024, |_| rule.clone())
    )
}

/// NetworkPolicy with this spec.
pub fn object(version: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        r#"{{"apiVersion":"{version}","kind":"NetworkPolicy","metadata":{{"namespace":"{namespace}","name":"{name}","resourceVersion":"7"}},"spec":{spec}}}"#
    )
}
