//! Conversion of a ClusterNetworkPolicy to the parsed form.
//!
//! A rule that is not recognised is left out if it would accept, and denies everything in its
//! direction if it would deny or pass, because its author meant to stop something here.

use std::sync::Arc;

use crate::k8s::labels;
use crate::k8s::netpol::{is_pod, is_port_name};
use crate::limits::{Budget, PortOwner};
use crate::meta::{LABEL_NAMESPACE, PREFIX_NAMESPACE};
use crate::network::parse_net;
use crate::policy::{Order, Policy, PolicyKey, PolicyKind, Traffic};
use crate::problem::{Problems, Refusal};
use crate::rule::{Action, EntityMatch, Port, PortRange, Protocol, Rule};
use crate::selector::{Node, Selector};

use super::{
    ADMIN_TIER, BASELINE_TIER, ClusterNetworkPolicy, ClusterNetworkPolicySpec, EgressRule,
    IngressRule, NamespacedPods, Peer, PortMatch, ProtocolMatch, TransportMatch,
};

/// Order of a policy whose priority is not valid: before every priority.
const BEFORE_ALL: f64 = -1.0;

/// Returns the identity of the policy.
pub fn key(policy: &ClusterNetworkPolicy) -> PolicyKey {
    PolicyKey::of(PolicyKind::KubernetesClusterNetworkPolicy, &policy.metadata)
}

/// Parses a policy. A refusal carries the policy with its unreadable parts closed. If its tier,
/// priority or subject is not valid, that is the first policy of the first tier, for all pods,
/// without what allows.
pub fn policy(policy: &ClusterNetworkPolicy) -> Result<Policy, Refusal> {
    let spec = &policy.spec;
    let mut problems = Problems::default();
    let tier = tier(&mut problems, spec.tier.as_deref().unwrap_or_default());
    let order = priority(&mut problems, spec.priority);
    let subject = subject(&mut problems, spec.subject.as_ref());
    let mut budget = Budget::default();
    let ingress: Vec<Rule> = { spec.ingress.iter().enumerate() }
        .flat_map(|(index, rule)| {
            ingress_rule(
                &mut problems,
                &mut budget,
                &format!("spec.ingress[{index}]"),
                rule,
            )
        })
        .collect();
    let egress: Vec<Rule> = { spec.egress.iter().enumerate() }
        .flat_map(|(index, rule)| {
            egress_rule(
                &mut problems,
                &mut budget,
                &format!("spec.egress[{index}]"),
                rule,
            )
        })
        .collect();
    let is_known = tier.is_some() && order.is_some() && subject.is_some();
    let parsed = Policy {
        tier: tier.unwrap_or(ADMIN_TIER).to_owned(),
        order: Order(Some(order.unwrap_or(BEFORE_ALL))),
        selector: subject.unwrap_or_else(is_pod),
        traffic: Traffic::Normal,
        // Both tiers pass at their end, so a direction without rules has no effect.
        applies_ingress: !ingress.is_empty(),
        applies_egress: !egress.is_empty(),
        ingress,
        egress,
    };
    let closed = |parsed: Policy| match is_known {
        true => Some(parsed),
        false => Some(without_allowing(spec, parsed)),
    };
    problems
        .finish(parsed, closed)
        .map_err(|refusal| refusal.or_former(!is_known))
}

/// Replacement of a policy whose tier, priority or subject is not valid: denies in each direction
/// in which a rule does more than accept.
fn without_allowing(spec: &ClusterNetworkPolicySpec, policy: Policy) -> Policy {
    let rules = |denies: bool| {
        if denies {
            vec![Rule::any(Action::Deny)]
        } else {
            Vec::new()
        }
    };
    let ingress = rules(spec.ingress.iter().any(|rule| rule.action != "Accept"));
    let egress = rules(spec.egress.iter().any(|rule| rule.action != "Accept"));
    Policy {
        applies_ingress: !ingress.is_empty(),
        applies_egress: !egress.is_empty(),
        ingress,
        egress,
        ..policy
    }
}

fn tier(problems: &mut Problems, tier: &str) -> Option<&'static str> {
    match tier {
        "Admin" => Some(ADMIN_TIER),
        "Baseline" => Some(BASELINE_TIER),
        other => {
            problems.add(
                "spec.tier",
                other,
                "not a tier of cluster-wide policies",
                "use Admin or Baseline",
            );
            None
        }
    }
}

fn priority(problems: &mut Problems, priority: Option<i32>) -> Option<f64> {
    let known = priority.filter(|priority| (0..=1000).contains(priority));
    if known.is_none() {
        let value = priority
            .map(|priority| priority.to_string())
            .unwrap_or_default();
        problems.add(
            "spec.priority",
            value,
            "not a priority",
            "use a number from 0 (first) to 1000",
        );
    }
    known.map(f64::from)
}

fn subject(problems: &mut Problems, subject: Option<&Peer>) -> Option<Selector> {
    let nobody = Peer::default();
    let subject = pods(problems, "spec.subject", subject.unwrap_or(&nobody))?;
    if subject.is_none() {
        problems.add(
            "spec.subject",
            "",
            "names no pods",
            "give either namespaces or pods",
        );
    }
    subject
}

/// Replacement of a rule that is not recognised.
fn closed(action: &str) -> Vec<Rule> {
    match action {
        "Accept" => Vec::new(),
        _ => vec![Rule::any(Action::Deny)],
    }
}

fn ingress_rule(
    problems: &mut Problems,
    budget: &mut Budget,
    at: &str,
    rule: &IngressRule,
) -> Vec<Rule> {
    let known = problems.len();
    let action = action(problems, at, &rule.action);
    unknown(problems, at, rule.unknown.keys());
    let from = peers(problems, &format!("{at}.from"), &rule.from, false);
    let ports = ports(problems, at, &rule.protocols);
    budget.charge_pairs(
        problems,
        at,
        &from,
        ports.iter().map(|ports| &*ports.ports),
        PortOwner::Endpoint,
    );
    if problems.len() != known {
        return closed(&rule.action);
    }
    let pairs = from
        .iter()
        .flat_map(|peer| ports.iter().map(move |ports| (peer, ports)));
    let rule = |(peer, ports): (&EntityMatch, &Ports)| Rule {
        protocol: ports.protocol,
        source: peer.clone(),
        destination: EntityMatch {
            ports: ports.ports.clone(),
            ..EntityMatch::default()
        },
        ..Rule::any(action)
    };
    pairs.map(rule).collect()
}

fn egress_rule(
    problems: &mut Problems,
    budget: &mut Budget,
    at: &str,
    rule: &EgressRule,
) -> Vec<Rule> {
    let known = problems.len();
    let action = action(problems, at, &rule.action);
    unknown(problems, at, rule.unknown.keys());
    let to = peers(problems, &format!("{at}.to"), &rule.to, true);
    let ports = ports(problems, at, &rule.protocols);
    budget.charge_pairs(
        problems,
        at,
        &to,
        ports.iter().map(|ports| &*ports.ports),
        PortOwner::Peer,
    );
    let nobody_declares = |peer: &&EntityMatch| peer.selector.is_none();
    if ports.iter().any(Ports::is_named) && to.iter().find(nobody_declares).is_some() {
        problems.add(
            format!("{at}.protocols"),
            "destinationNamedPort",
            "networks and nodes have no named ports",
            "give destinationPort, or write a rule of its own for them",
        );
    }
    if problems.len() != known {
        return closed(&rule.action);
    }
    let pairs = to
        .iter()
        .flat_map(|peer| ports.iter().map(move |ports| (peer, ports)));
    let rule = |(peer, ports): (&EntityMatch, &Ports)| Rule {
        protocol: ports.protocol,
        destination: EntityMatch {
            ports: ports.ports.clone(),
            ..peer.clone()
        },
        ..Rule::any(action)
    };
    pairs.map(rule).collect()
}

fn action(problems: &mut Problems, at: &str, action: &str) -> Action {
    match action {
        "Accept" => Action::Allow,
        "Deny" => Action::Deny,
        "Pass" => Action::Pass,
        other => {
            problems.add(
                format!("{at}.action"),
                other,
                "not an action",
                "use Accept, Deny or Pass",
            );
            Action::Deny
        }
    }
}

fn unknown<'a>(problems: &mut Problems, at: &str, fields: impl IntoIterator<Item = &'a String>) {
    for field in fields {
        problems.add(
            format!("{at}.{field}"),
            field,
            "not a known field, and ignoring it could widen the rule",
            "remove the field or correct its name",
        );
    }
}

/// Returns one entry for each peer; a rule without peers matches nothing and is a problem.
fn peers(problems: &mut Problems, at: &str, peers: &[Peer], outward: bool) -> Vec<EntityMatch> {
    if peers.is_empty() {
        problems.add(at, "", "has no peers", "give at least one peer");
    }
    let read =
        |(index, found): (usize, &Peer)| peer(problems, &format!("{at}[{index}]"), found, outward);
    peers.iter().enumerate().filter_map(read).collect()
}

fn peer(problems: &mut Problems, at: &str, peer: &Peer, outward: bool) -> Option<EntityMatch> {
    if let Some(selector) = pods(problems, at, peer)? {
        return Some(EntityMatch {
            selector: Some(selector),
            ..EntityMatch::default()
        });
    }
    match (&peer.nodes, &peer.networks) {
        (Some(nodes), None) if outward => {
            let nodes = labels::selector(problems, &format!("{at}.nodes"), nodes)?;
            Some(EntityMatch {
                nodes: Some(nodes),
                ..EntityMatch::default()
            })
        }
        (None, Some(networks)) if outward => {
            let nets = nets(problems, &format!("{at}.networks"), networks)?;
            Some(EntityMatch {
                nets,
                ..EntityMatch::default()
            })
        }
        _ => {
            let remedy = if outward {
                "give namespaces, pods, nodes or networks"
            } else {
                "give namespaces or pods"
            };
            problems.add(at, "{}", "a peer without selectors or ranges", remedy);
            None
        }
    }
}

/// Returns the selector of `namespaces` or `pods`; `Some(None)`: neither is set. `None`: one is
/// invalid, and the problem recorded.
fn pods(problems: &mut Problems, at: &str, peer: &Peer) -> Option<Option<Selector>> {
    let known = problems.len();
    unknown(problems, at, peer.unknown.keys());
    let given = [
        peer.namespaces.is_some(),
        peer.pods.is_some(),
        peer.nodes.is_some(),
        peer.networks.is_some(),
    ];
    if given.into_iter().filter(|given| *given).count() > 1 {
        problems.add(
            at,
            "several",
            "exactly one field must be set",
            "write a peer for each",
        );
    }
    if problems.len() != known {
        return None;
    }
    let selected = match (&peer.namespaces, &peer.pods) {
        (Some(namespaces), _) => {
            let namespaces = labels::selector(problems, &format!("{at}.namespaces"), namespaces)?;
            Selector::and([in_namespaces(&namespaces), is_pod()])
        }
        (
            _,
            Some(NamespacedPods {
                namespace_selector,
                pod_selector,
                unknown: others,
            }),
        ) => {
            unknown(problems, &format!("{at}.pods"), others.keys());
            let namespaces = labels::selector(
                problems,
                &format!("{at}.pods.namespaceSelector"),
                namespace_selector,
            );
            let pods = labels::selector(problems, &format!("{at}.pods.podSelector"), pod_selector);
            if problems.len() != known {
                return None;
            }
            Selector::and([in_namespaces(&namespaces?), is_pod(), pods?])
        }
        (None, None) => return Some(None),
    };
    Some(Some(selected))
}

fn in_namespaces(selector: &Selector) -> Selector {
    match selector.root {
        Node::All => Node::Has(LABEL_NAMESPACE.to_owned()).into(),
        _ => selector.with_prefix(PREFIX_NAMESPACE),
    }
}

fn nets(problems: &mut Problems, at: &str, networks: &[String]) -> Option<Vec<ipnet::IpNet>> {
    let known = problems.len();
    if networks.is_empty() {
        problems.add(at, "[]", "names no range", "give at least one range");
    }
    let mut nets = Vec::with_capacity(networks.len());
    for (index, text) in networks.iter().enumerate() {
        match parse_net(text).filter(|_| text.contains('/')) {
            Some(net) => nets.push(net),
            None => problems.add(
                format!("{at}[{index}]"),
                text,
                "not a range",
                "write it like 10.0.0.0/8 or fd00::/8, and an address like 10.1.2.3/32",
            ),
        }
    }
    (problems.len() == known).then_some(nets)
}

/// Ports of one protocol; without a protocol, everything or a named port.
#[derive(Clone, Debug)]
struct Ports {
    protocol: Option<Protocol>,
    /// Empty means any.
    ports: Arc<[Port]>,
}

impl Ports {
    fn is_named(&self) -> bool {
        self.ports.iter().any(|port| matches!(port, Port::Named(_)))
    }
}

/// Returns one entry for each protocol, with the ports of all its matches, and one for named ports;
/// an unrestricted one if there are no matches.
fn ports(problems: &mut Problems, at: &str, protocols: &[ProtocolMatch]) -> Vec<Ports> {
    if protocols.is_empty() {
        return vec![Ports {
            protocol: None,
            ports: Arc::default(),
        }];
    }
    let mut found: Vec<(Option<Protocol>, Option<Port>)> = Vec::new();
    for (index, protocol) in protocols.iter().enumerate() {
        found.extend(protocol_match(
            problems,
            &format!("{at}.protocols[{index}]"),
            protocol,
        ));
    }
    [
        Some(Protocol::TCP),
        Some(Protocol::UDP),
        Some(Protocol::SCTP),
        None,
    ]
    .into_iter()
    .filter_map(|protocol| {
        let of_protocol = found
            .iter()
            .filter(|(of, _)| *of == protocol)
            .map(|(_, port)| port.clone());
        let of_protocol: Vec<Option<Port>> = of_protocol.collect();
        // One match without a port means all ports of the protocol, whatever the other matches
        // list.
        let ports: Option<Vec<Port>> = of_protocol.iter().cloned().collect();
        (!of_protocol.is_empty()).then(|| Ports {
            protocol,
            ports: ports.unwrap_or_default().into(),
        })
    })
    .collect()
}

/// Returns protocol and port, of which a named port has no protocol; or `None` with the problems
/// recorded.
fn protocol_match(
    problems: &mut Problems,
    at: &str,
    found: &ProtocolMatch,
) -> Option<(Option<Protocol>, Option<Port>)> {
    let known = problems.len();
    unknown(problems, at, found.unknown.keys());
    let transports = [
        ("tcp", Protocol::TCP, &found.tcp),
        ("udp", Protocol::UDP, &found.udp),
        ("sctp", Protocol::SCTP, &found.sctp),
    ];
    let transports = transports
        .into_iter()
        .filter_map(|(name, protocol, found)| Some((name, protocol, found.as_ref()?)));
    let name = found.destination_named_port.as_ref();
    let read = match (transports.collect::<Vec<_>>().as_slice(), name) {
        ([(field, protocol, transport)], None) => {
            let port = port(problems, &format!("{at}.{field}"), transport);
            (Some(*protocol), port)
        }
        ([], Some(name)) if is_port_name(name) => (None, Some(Port::Named(name.clone()))),
        ([], Some(name)) => {
            let remedy =
                "use the name of a container's port: at most 15 lower case letters, digits and '-'";
            problems.add(
                format!("{at}.destinationNamedPort"),
                name,
                "not a port name",
                remedy,
            );
            return None;
        }
        _ => {
            problems.add(
                at,
                "{}",
                "exactly one field must be set",
                "give tcp, udp, sctp or destinationNamedPort, and write a match for each",
            );
            return None;
        }
    };
    (problems.len() == known).then_some(read)
}

/// Returns the port or range; none is any.
fn port(problems: &mut Problems, at: &str, transport: &TransportMatch) -> Option<Port> {
    unknown(problems, at, transport.unknown.keys());
    let PortMatch {
        number,
        range,
        unknown: others,
    } = transport.destination_port.as_ref()?;
    let at = format!("{at}.destinationPort");
    unknown(problems, &at, others.keys());
    let valid = |number: i32| u16::try_from(number).ok().filter(|port| *port > 0);
    let (first, last, value) = match (number, range) {
        (Some(number), None) => (valid(*number), valid(*number), number.to_string()),
        (None, Some(range)) => (
            valid(range.start),
            valid(range.end),
            format!("{} to {}", range.start, range.end),
        ),
        _ => (None, None, "{}".to_owned()),
    };
    match first.zip(last).filter(|(first, last)| first <= last) {
        Some((first, last)) => Some(Port::Range(PortRange { first, last })),
        None => {
            problems.add(
                at,
                value,
                "not a port",
                "give a number from 1 to 65535, or a range of them with start below end",
            );
            None
        }
    }
}
