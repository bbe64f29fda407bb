//! Kubernetes network policies. All their rules allow, so leaving out an invalid one can only
//! close.

use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::{
    IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::limits::{Budget, PortOwner};
use crate::meta::{LABEL_NAMESPACE, LABEL_ORCHESTRATOR, PREFIX_NAMESPACE};
use crate::network::parse_net;
use crate::policy::{DEFAULT_TIER, Order, Policy, PolicyKey, PolicyKind, Traffic};
use crate::problem::{Problems, Refusal};
use crate::rule::{Action, EntityMatch, Port, PortRange, Protocol, Rule};
use crate::selector::{Node, Selector};

use super::labels;
use super::pod::{ORCHESTRATOR, protocol};

/// Order of Kubernetes policies in the default tier (libcalico-go's conversion package, 1000).
pub const ORDER: f64 = 1000.0;

/// Returns the identity of the policy.
pub fn key(policy: &NetworkPolicy) -> PolicyKey {
    PolicyKey::of(PolicyKind::KubernetesNetworkPolicy, &policy.metadata)
}

/// Parses a policy. A refusal carries the policy without its invalid parts; if the pods that it
/// selects are not known, it carries no rules and applies to all pods of its namespace.
pub fn policy(policy: &NetworkPolicy) -> Result<(PolicyKey, Policy), Refusal> {
    let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
    let parsed = match &policy.spec {
        Some(found) => spec(namespace, found),
        None => spec(namespace, &NetworkPolicySpec::default()),
    };
    parsed.map(|parsed| (key(policy), parsed))
}

/// Parses the spec of a policy of that namespace.
pub fn spec(namespace: &str, spec: &NetworkPolicySpec) -> Result<Policy, Refusal> {
    let mut problems = Problems::default();
    let pods = spec.pod_selector.clone().unwrap_or_default();
    let selector = labels::selector(&mut problems, "spec.podSelector", &pods);
    let (applies_ingress, applies_egress) = directions(&mut problems, spec);
    let mut budget = Budget::default();
    let mut ingress = Vec::new();
    for (index, rule) in spec.ingress.iter().flatten().enumerate() {
        let at = format!("spec.ingress[{index}]");
        if !budget.has_room(
            &mut problems,
            &at,
            count_unmergeable(&rule.from),
            rule.ports.as_ref().map_or(0, Vec::len),
        ) {
            continue;
        }
        let peers = peers(&mut problems, namespace, &format!("{at}.from"), &rule.from);
        let ports = ports(&mut problems, &at, &rule.ports);
        let lists = ports.iter().map(|ports| &*ports.ports);
        if budget.charge_pairs(&mut problems, &at, &peers, lists, PortOwner::Endpoint) {
            ingress.extend(product(&peers, &ports, |peer, local| (peer, local)));
        }
    }
    let mut egress = Vec::new();
    for (index, rule) in spec.egress.iter().flatten().enumerate() {
        let at = format!("spec.egress[{index}]");
        if !budget.has_room(
            &mut problems,
            &at,
            count_unmergeable(&rule.to),
            rule.ports.as_ref().map_or(0, Vec::len),
        ) {
            continue;
        }
        let peers = peers(&mut problems, namespace, &format!("{at}.to"), &rule.to);
        let ports = ports(&mut problems, &at, &rule.ports);
        let lists = ports.iter().map(|ports| &*ports.ports);
        if budget.charge_pairs(&mut problems, &at, &peers, lists, PortOwner::Peer) {
            egress.extend(product(&peers, &ports, |peer, local| {
                let destination = EntityMatch {
                    ports: local.ports,
                    ..peer
                };
                (EntityMatch::default(), destination)
            }));
        }
    }
    let is_known = selector.is_some();
    let parsed = Policy {
        tier: DEFAULT_TIER.to_owned(),
        order: Order(Some(ORDER)),
        selector: in_namespace(namespace, selector.unwrap_or_else(Selector::all)),
        traffic: Traffic::Normal,
        applies_ingress,
        applies_egress,
        ingress,
        egress,
    };
    // All rules allow, and without the selector it is not known for which pods.
    let closed = |parsed| match is_known {
        true => Some(parsed),
        false => Some(Policy {
            ingress: Vec::new(),
            egress: Vec::new(),
            ..parsed
        }),
    };
    problems
        .finish(parsed, closed)
        .map_err(|refusal| refusal.or_former(!is_known))
}

/// Selects the pods of that namespace that match.
fn in_namespace(namespace: &str, pods: Selector) -> Selector {
    let own = Node::Equals(LABEL_NAMESPACE.to_owned(), namespace.to_owned());
    Selector::and([own.into(), is_pod(), pods])
}

pub(super) fn is_pod() -> Selector {
    Node::Equals(LABEL_ORCHESTRATOR.to_owned(), ORCHESTRATOR.to_owned()).into()
}

fn directions(problems: &mut Problems, spec: &NetworkPolicySpec) -> (bool, bool) {
    let types = spec.policy_types.as_deref().unwrap_or_default();
    let has_egress = spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
    if types.is_empty() {
        return (true, has_egress);
    }
    let mut applies = (false, false);
    for (index, found) in types.iter().enumerate() {
        match found.as_str() {
            "Ingress" => applies.0 = true,
            "Egress" => applies.1 = true,
            other => {
                applies = (true, true);
                problems.add(
                    format!("spec.policyTypes[{index}]"),
                    other,
                    "not a direction",
                    "use Ingress or Egress",
                );
            }
        }
    }
    applies
}

/// Returns the rules of all pairs of a peer and the ports of a protocol. `sides` makes source and
/// destination from the peer and from an entity that has the ports: ports are always those of the
/// destination.
fn product(
    peers: &[EntityMatch],
    ports: &[Ports],
    sides: impl Fn(EntityMatch, EntityMatch) -> (EntityMatch, EntityMatch),
) -> Vec<Rule> {
    let pairs = peers
        .iter()
        .flat_map(|peer| ports.iter().map(move |ports| (peer, ports)));
    let rule = |(peer, ports): (&EntityMatch, &Ports)| {
        let local = EntityMatch {
            ports: ports.ports.clone(),
            ..EntityMatch::default()
        };
        let (source, destination) = sides(peer.clone(), local);
        Rule {
            protocol: ports.protocol,
            source,
            destination,
            ..Rule::any(Action::Allow)
        }
    };
    pairs.map(rule).collect()
}

/// Converts the peers of a rule: one entry for each valid one, or one that matches everything if
/// none is listed. All ranges without exceptions become one entry, at the position of the first.
fn peers(
    problems: &mut Problems,
    namespace: &str,
    at: &str,
    peers: &Option<Vec<NetworkPolicyPeer>>,
) -> Vec<EntityMatch> {
    match peers.as_deref() {
        None | Some([]) => vec![EntityMatch::default()],
        Some(peers) => {
            let mut sound: Vec<EntityMatch> = Vec::new();
            let mut ranges: Option<usize> = None;
            for (index, found) in peers.iter().enumerate() {
                let Some(found) = peer(problems, namespace, &format!("{at}[{index}]"), found)
                else {
                    continue;
                };
                match ranges.filter(|_| is_plain(&found)) {
                    Some(place) => sound[place].nets.extend(found.nets),
                    None => {
                        ranges = ranges.or(is_plain(&found).then_some(sound.len()));
                        sound.push(found);
                    }
                }
            }
            sound
        }
    }
}

/// Counts peers that cannot be merged with others.
fn count_unmergeable(peers: &Option<Vec<NetworkPolicyPeer>>) -> usize {
    let is_unmergeable = |peer: &&NetworkPolicyPeer| match &peer.ip_block {
        Some(block) => block
            .except
            .as_ref()
            .is_some_and(|except| !except.is_empty()),
        None => true,
    };
    peers.iter().flatten().filter(is_unmergeable).count()
}

/// Returns true for ranges without exceptions.
fn is_plain(peer: &EntityMatch) -> bool {
    !peer.nets.is_empty() && peer.not_nets.is_empty()
}

fn peer(
    problems: &mut Problems,
    namespace: &str,
    at: &str,
    peer: &NetworkPolicyPeer,
) -> Option<EntityMatch> {
    let NetworkPolicyPeer {
        ip_block,
        namespace_selector,
        pod_selector,
    } = peer;
    if let Some(block) = ip_block {
        if namespace_selector.is_some() || pod_selector.is_some() {
            problems.add(
                format!("{at}.ipBlock"),
                &block.cidr,
                "combined with selectors",
                "write a peer of its own for the ipBlock",
            );
            return None;
        }
        return ip_block_match(problems, &format!("{at}.ipBlock"), block);
    }
    if namespace_selector.is_none() && pod_selector.is_none() {
        problems.add(
            at,
            "{}",
            "a peer without selectors or ranges",
            "give a podSelector, namespaceSelector or ipBlock",
        );
        return None;
    }
    let namespaces = match namespace_selector {
        Some(found) => {
            let field = format!("{at}.namespaceSelector");
            let found = labels::selector(problems, &field, found)?;
            match found.root {
                Node::All => Node::Has(LABEL_NAMESPACE.to_owned()).into(),
                _ => found.with_prefix(PREFIX_NAMESPACE),
            }
        }
        None => Node::Equals(LABEL_NAMESPACE.to_owned(), namespace.to_owned()).into(),
    };
    let pods = match pod_selector {
        Some(found) => labels::selector(problems, &format!("{at}.podSelector"), found)?,
        None => Selector::all(),
    };
    Some(EntityMatch {
        selector: Some(Selector::and([namespaces, is_pod(), pods])),
        ..EntityMatch::default()
    })
}

fn ip_block_match(problems: &mut Problems, at: &str, block: &IPBlock) -> Option<EntityMatch> {
    let Some(net) = parse_net(&block.cidr) else {
        problems.add(
            format!("{at}.cidr"),
            &block.cidr,
            "not a range",
            "write it like 10.0.0.0/8 or fd00::/8",
        );
        return None;
    };
    let mut not_nets: Vec<IpNet> = Vec::new();
    for (index, text) in block.except.iter().flatten().enumerate() {
        let inside =
            |except: &IpNet| net.contains(except) && except.prefix_len() > net.prefix_len();
        match parse_net(text).filter(inside) {
            Some(except) => not_nets.push(except),
            None => {
                problems.add(
                    format!("{at}.except[{index}]"),
                    text,
                    format!("not a smaller range inside {net}"),
                    "name ranges inside the cidr only",
                );
                return None;
            }
        }
    }
    Some(EntityMatch {
        nets: vec![net],
        not_nets,
        ..EntityMatch::default()
    })
}

/// Ports of one protocol; without a protocol, everything.
#[derive(Clone, Debug)]
struct Ports {
    protocol: Option<Protocol>,
    /// Empty means any.
    ports: Arc<[Port]>,
}

/// Converts the ports of a rule: one entry for each protocol that is listed validly, or one that
/// matches everything if none is listed.
fn ports(problems: &mut Problems, at: &str, ports: &Option<Vec<NetworkPolicyPort>>) -> Vec<Ports> {
    let ports = match ports.as_deref() {
        None | Some([]) => {
            return vec![Ports {
                protocol: None,
                ports: Arc::default(),
            }];
        }
        Some(ports) => ports,
    };
    let mut sound: Vec<(Protocol, Option<Port>)> = Vec::new();
    for (index, found) in ports.iter().enumerate() {
        sound.extend(port(problems, &format!("{at}.ports[{index}]"), found));
    }
    [Protocol::TCP, Protocol::UDP, Protocol::SCTP]
        .into_iter()
        .filter_map(|protocol| {
            let mut of_protocol = sound
                .iter()
                .filter(|(found, _)| *found == protocol)
                .map(|(_, port)| port.clone())
                .peekable();
            of_protocol.peek()?;
            // One entry without a port means all ports of the protocol, whatever the other entries
            // list.
            let ports: Option<Vec<Port>> = of_protocol.collect();
            Some(Ports {
                protocol: Some(protocol),
                ports: ports.unwrap_or_default().into(),
            })
        })
        .collect()
}

fn port(
    problems: &mut Problems,
    at: &str,
    found: &NetworkPolicyPort,
) -> Option<(Protocol, Option<Port>)> {
    let Some(protocol) = protocol(found.protocol.as_deref()) else {
        problems.add(
            format!("{at}.protocol"),
            found.protocol.as_deref().unwrap_or_default(),
            "not a protocol with ports",
            "use TCP, UDP or SCTP",
        );
        return None;
    };
    let valid = |number: i32| u16::try_from(number).ok().filter(|port| *port > 0);
    let port = match (&found.port, found.end_port) {
        (None, None) => return Some((protocol, None)),
        (Some(IntOrString::Int(first)), end) => {
            let range = valid(*first).zip(valid(end.unwrap_or(*first)));
            range
                .filter(|(first, last)| first <= last)
                .map(|(first, last)| Port::Range(PortRange { first, last }))
        }
        (Some(IntOrString::String(name)), None) => {
            is_port_name(name).then(|| Port::Named(name.clone()))
        }
        _ => None,
    };
    if port.is_none() {
        let first = match &found.port {
            None => String::new(),
            Some(IntOrString::Int(number)) => number.to_string(),
            Some(IntOrString::String(name)) => name.clone(),
        };
        let end = found.end_port.map(|end| format!(" to {end}"));
        problems.add(
            format!("{at}.port"),
            first + &end.unwrap_or_default(),
            "not a port",
            "use a number from 1 to 65535, with an endPort that is not smaller, or a port name \
             without endPort",
        );
    }
    Some((protocol, Some(port?)))
}

pub(super) fn is_port_name(name: &str) -> bool {
    name.len() <= 15
        && name.contains(|c: char| c.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}
