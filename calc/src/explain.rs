//! Explains the verdict on a packet at both of its ends, from the records that nodes hold.

use std::fmt;
use std::net::IpAddr;

use margay_api::endpoint::EndpointKey;
use margay_api::network::{NodeInfo, TunnelKind};
use margay_api::rule::{Action, IpVersion, Protocol};

use crate::evaluate::{
    Direction, HostStage, Packet, Records, Step, Verdict, evaluate, evaluate_host,
};
use crate::graph::Graph;
use crate::model::{HostInterfaces, Record, RecordId};
use crate::text;

/// First port of the dynamic range (RFC 6335, section 6), as a client would use.
const SOURCE_PORT: u16 = 49_152;
/// ICMP echo request: type and code.
const PING: (u8, u8) = (8, 0);

/// Source or destination of a packet, as a person names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Party {
    /// A pod, as `NAMESPACE/NAME`.
    Pod(String),
    /// An IP address.
    Address(String),
}

/// A packet to explain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Source; required.
    pub from: Option<Party>,
    /// Destination; required.
    pub to: Option<Party>,
    /// tcp, udp, sctp, icmp or a number; empty: tcp.
    pub protocol: String,
    /// Destination port.
    pub port: u32,
}

/// Verdict on a packet, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether both ends allow it.
    pub is_allowed: bool,
    /// Verdicts where the packet passes policies, in order.
    pub ends: Vec<EndVerdict>,
}

impl Outcome {
    /// Steps of the evaluation, in order, as text.
    pub fn steps(&self) -> Vec<String> {
        self.ends.iter().flat_map(EndVerdict::steps).collect()
    }
}

/// Verdict at one end of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndVerdict {
    /// Direction as seen from the end.
    pub direction: Direction,
    /// Whose policies decide.
    pub place: Place,
}

/// Endpoint at one end of a packet, with the verdict of its policies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Neither a pod nor a node with host endpoints: no policy applies.
    Outside,
    /// A pod.
    Pod(EndpointKey, Verdict),
    /// A host endpoint of a node.
    Host {
        /// Name of its object.
        name: String,
        /// The packet passes it for certain. Only the node knows which interface has an address.
        is_certain: bool,
        /// Stage of the packet.
        stage: HostStage,
        /// Verdict at that stage.
        verdict: Verdict,
    },
}

impl EndVerdict {
    /// `egress` or `ingress`.
    pub fn direction_name(&self) -> &'static str {
        match self.direction {
            Direction::Egress => "egress",
            Direction::Ingress => "ingress",
        }
    }

    fn steps(&self) -> Vec<String> {
        let name = self.direction_name();
        let lines = |verdict, place: String| {
            text::verdict(verdict)
                .lines()
                .map(|line| format!("{name} {place}: {line}"))
                .collect()
        };
        match &self.place {
            Place::Outside => {
                vec![format!(
                    "{name}: neither a pod nor a node with host endpoints, so no policy applies"
                )]
            }
            Place::Pod(pod, verdict) => lines(verdict, format!("of {pod}")),
            Place::Host {
                name,
                is_certain,
                stage,
                verdict,
            } => {
                let certainty = if *is_certain {
                    ""
                } else {
                    ", if it is this one's interface"
                };
                lines(
                    verdict,
                    format!("at host endpoint {name}{certainty}: {stage:?}"),
                )
            }
        }
    }
}

/// Answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The packet that the question is about.
    pub packet: Packet,
    /// By the enforced policies.
    pub enforced: Outcome,
    /// As if staged policies were enforced; `None` if nothing is staged.
    pub staged: Option<Outcome>,
}

/// Reason why a question cannot be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExplainError {
    /// A field is missing or malformed.
    Invalid(String),
    /// The pod has no endpoint.
    NoEndpoint {
        /// Field of the question.
        field: &'static str,
        /// The pod.
        key: EndpointKey,
    },
    /// Source and destination have no addresses of a common IP version.
    NoCommonVersion,
}

impl fmt::Display for ExplainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(text) => f.write_str(text),
            Self::NoEndpoint { field, key } => write!(f, "{field}.pod: there is no endpoint {key}"),
            Self::NoCommonVersion => {
                f.write_str("the ends have no addresses of one IP version yet")
            }
        }
    }
}

impl std::error::Error for ExplainError {}

/// Explains the verdicts of the policies at both ends of a packet.
pub fn explain(graph: &Graph, question: &Question) -> Result<Explanation, ExplainError> {
    let from = find_end(graph, "from", question.from.as_ref())?;
    let to = find_end(graph, "to", question.to.as_ref())?;
    let packet = build_packet(&from, &to, question)?;
    Ok(Explanation {
        packet,
        enforced: evaluate_both_ends(graph, &from, &to, &packet),
        staged: graph
            .staged_view()
            .map(|staged| evaluate_both_ends(&staged, &from, &to, &packet)),
    })
}

/// One end of a packet.
struct PacketEnd {
    /// The pod, if it is one.
    pod: Option<EndpointKey>,
    /// Host endpoints, if it is a node.
    hosts: Vec<HostCandidate>,
    addresses: Vec<IpAddr>,
}

/// A host endpoint that a packet of its node may pass.
#[derive(Clone)]
struct HostCandidate {
    name: String,
    /// The packet passes it for certain. Only the node knows which interface has an address.
    is_certain: bool,
}

/// Evaluates a packet with these records.
fn evaluate_both_ends(
    records: &impl Records,
    from: &PacketEnd,
    to: &PacketEnd,
    packet: &Packet,
) -> Outcome {
    let mut outcome = Outcome {
        is_allowed: true,
        ends: Vec::new(),
    };
    for (end, direction) in [(from, Direction::Egress), (to, Direction::Ingress)] {
        let mut add = |place| outcome.ends.push(EndVerdict { direction, place });
        let Some(pod) = &end.pod else {
            if end.hosts.is_empty() {
                add(Place::Outside);
            }
            for host in &end.hosts {
                let may_pass = evaluate_at_host(records, host, direction, packet, &mut add);
                outcome.is_allowed &= may_pass || !host.is_certain;
            }
            continue;
        };
        let verdict = evaluate(records, pod, direction, packet);
        outcome.is_allowed &= verdict.action == Action::Allow;
        add(Place::Pod(pod.clone(), verdict));
    }
    outcome
}

/// Returns whether a packet of the host itself passes a host endpoint, and adds the verdicts of its
/// stages.
fn evaluate_at_host(
    records: &impl Records,
    host: &HostCandidate,
    direction: Direction,
    packet: &Packet,
    add: &mut impl FnMut(Place),
) -> bool {
    for stage in [HostStage::Untracked, HostStage::PreDnat, HostStage::Normal] {
        let verdict = evaluate_host(records, &host.name, stage, direction, packet);
        let action = verdict.action;
        if verdict.trace != [Step::Unmatched(Action::Pass)] {
            let HostCandidate { name, is_certain } = host.clone();
            add(Place::Host {
                name,
                is_certain,
                stage,
                verdict,
            });
        }
        if action != Action::Pass {
            return action == Action::Allow;
        }
    }
    true
}

fn find_end(
    graph: &Graph,
    field: &'static str,
    party: Option<&Party>,
) -> Result<PacketEnd, ExplainError> {
    match party {
        Some(Party::Pod(name)) => find_pod(graph, field, name),
        Some(Party::Address(text)) => {
            let address = text.parse().map_err(|_| {
                ExplainError::Invalid(format!("{field}.address: {text:?} is not an IP address"))
            })?;
            Ok(find_by_address(graph, address))
        }
        None => Err(ExplainError::Invalid(format!(
            "{field}: missing; give pod \"NAMESPACE/NAME\" or address"
        ))),
    }
}

fn find_pod(graph: &Graph, field: &'static str, name: &str) -> Result<PacketEnd, ExplainError> {
    let Some((namespace, name)) = name.split_once('/') else {
        return Err(ExplainError::Invalid(format!(
            "{field}.pod: {name:?} must be NAMESPACE/NAME"
        )));
    };
    let key = EndpointKey::new(namespace, name);
    match graph.record(&RecordId::Endpoint(key.clone())).as_deref() {
        Some(Record::Endpoint(endpoint)) => Ok(PacketEnd {
            pod: Some(key),
            hosts: Vec::new(),
            addresses: endpoint.addresses.clone(),
        }),
        _ => Err(ExplainError::NoEndpoint { field, key }),
    }
}

/// Finds the pod or node with the address.
fn find_by_address(graph: &Graph, address: IpAddr) -> PacketEnd {
    let pod = graph.pod_at(address);
    let node = graph
        .nodes()
        .find(|(_, node)| has_address(node, address))
        .map(|(name, _)| name);
    let hosts = node
        .filter(|_| pod.is_none())
        .map(|node| host_candidates(graph, node, address))
        .unwrap_or_default();
    PacketEnd {
        pod,
        hosts,
        addresses: vec![address],
    }
}

fn has_address(node: &NodeInfo, address: IpAddr) -> bool {
    let own = IpVersion::ALL.map(|version| node.own_address(version));
    let tunnels = TunnelKind::ALL.map(|kind| node.tunnel_address(kind));
    own.into_iter()
        .chain(tunnels)
        .flatten()
        .any(|known| known == address)
}

/// Host endpoints of a node; only those with the address, if there are any.
fn host_candidates(graph: &Graph, node: &str, address: IpAddr) -> Vec<HostCandidate> {
    let (mut with_address, mut all, mut others) = (Vec::new(), Vec::new(), 0);
    for (id, _) in graph.view(node).host_endpoints() {
        let record = graph.record(&id);
        let (RecordId::HostEndpoint(name), Some(Record::HostEndpoint(host))) =
            (&id, record.as_deref())
        else {
            continue;
        };
        match &host.interfaces {
            HostInterfaces::WithAddress(addresses) if addresses.contains(&address) => {
                with_address.push(HostCandidate {
                    name: name.clone(),
                    is_certain: true,
                });
            }
            HostInterfaces::WithAddress(_) => others += 1,
            HostInterfaces::All | HostInterfaces::Named(_) => {
                all.push((name.clone(), host.interfaces.clone()))
            }
        }
    }
    let is_alone = all.len() + others == 1;
    let all = all.into_iter().map(|(name, interfaces)| {
        let is_certain = is_alone && interfaces == HostInterfaces::All;
        HostCandidate { name, is_certain }
    });
    if with_address.is_empty() {
        all.collect()
    } else {
        with_address
    }
}

fn build_packet(
    from: &PacketEnd,
    to: &PacketEnd,
    question: &Question,
) -> Result<Packet, ExplainError> {
    let mut pairs = from
        .addresses
        .iter()
        .flat_map(|from| to.addresses.iter().map(move |to| (*from, *to)));
    let pair = pairs.find(|(from, to)| from.is_ipv4() == to.is_ipv4());
    let (source, destination) = pair.ok_or(ExplainError::NoCommonVersion)?;
    let port = u16::try_from(question.port).map_err(|_| {
        ExplainError::Invalid(format!("port: {} is not within 0..=65535", question.port))
    })?;
    let protocol = parse_protocol(&question.protocol, source.is_ipv4())?;
    Ok(Packet {
        source,
        destination,
        protocol,
        source_port: SOURCE_PORT,
        destination_port: port,
        icmp: PING,
    })
}

fn parse_protocol(text: &str, is_ipv4: bool) -> Result<Protocol, ExplainError> {
    match text.to_ascii_lowercase().as_str() {
        "" | "tcp" => Ok(Protocol::TCP),
        "udp" => Ok(Protocol::UDP),
        "sctp" => Ok(Protocol::SCTP),
        "icmp" if is_ipv4 => Ok(Protocol::ICMP),
        "icmp" | "icmpv6" => Ok(Protocol::ICMPV6),
        number => number.parse().map(Protocol).map_err(|_| {
            ExplainError::Invalid(format!(
                "protocol: {text:?} is not tcp, udp, sctp, icmp or a number below 256"
            ))
        }),
    }
}
