//! Which policy decides about a packet, from the records that nodes hold.

use std::net::IpAddr;

use margay_api::endpoint::EndpointKey;
use margay_api::network::NodeInfo;
use margay_api::rule::{Action, Protocol};
use margay_calc::evaluate::{Direction, HostStage, Packet, Records, Step, evaluate, evaluate_host};
use margay_calc::graph::Graph;
use margay_calc::model::{HostInterfaces, Record, RecordId};
use margay_calc::text;
use margay_proto::debug::{ExplainRequest, ExplainResponse, Party, party};
use tonic::Status;

/// A source port out of the range that systems choose from; nobody writes policy for it.
const SOURCE_PORT: u16 = 49_152;
/// An echo request.
const PING: (u8, u8) = (8, 0);

/// One end of a packet.
struct End {
    /// The pod, when it is one.
    pod: Option<EndpointKey>,
    /// Host endpoints of the node, when it is one.
    hosts: Vec<Host>,
    addresses: Vec<IpAddr>,
}

/// A host endpoint of a node.
struct Host {
    name: String,
    /// Whether the packet passes it for certain. Which interface has an address is known to the node alone.
    is_certain: bool,
}

/// Follows a packet through the policies of both of its ends.
pub fn explain(graph: &Graph, question: &ExplainRequest) -> Result<ExplainResponse, Status> {
    let from = end(graph, "from", question.from.as_ref())?;
    let to = end(graph, "to", question.to.as_ref())?;
    let packet = packet(&from, &to, question)?;
    let (verdict, steps) = follow(graph, &from, &to, &packet);
    let (pending_verdict, pending_steps) =
        graph.pending().map(|pending| follow(&pending, &from, &to, &packet)).unwrap_or_default();
    Ok(ExplainResponse { verdict, steps, pending_verdict, pending_steps })
}

/// The verdict of these records, and what led to it.
fn follow(records: &impl Records, from: &End, to: &End, packet: &Packet) -> (String, Vec<String>) {
    let mut allowed = true;
    let mut steps = Vec::new();
    for (end, direction, name) in [(from, Direction::Egress, "egress"), (to, Direction::Ingress, "ingress")] {
        let Some(pod) = &end.pod else {
            if end.hosts.is_empty() {
                steps.push(format!("{name}: neither a pod nor a node with host endpoints, so no policy applies"));
            }
            for host in &end.hosts {
                let (may_pass, lines) = at_host(records, host, direction, packet);
                allowed &= may_pass || !host.is_certain;
                steps.extend(lines.into_iter().map(|line| format!("{name} at {line}")));
            }
            continue;
        };
        let verdict = evaluate(records, pod, direction, packet);
        allowed &= verdict.action == Action::Allow;
        let lines = text::verdict(&verdict);
        steps.extend(lines.lines().map(|line| format!("{name} of {pod}: {line}")));
    }
    (if allowed { "allow" } else { "deny" }.to_owned(), steps)
}

/// Whether a packet of the host itself passes a host endpoint, and what led to it.
fn at_host(records: &impl Records, host: &Host, direction: Direction, packet: &Packet) -> (bool, Vec<String>) {
    let certainty = if host.is_certain { "" } else { ", if it is this one's interface" };
    let mut lines = Vec::new();
    for stage in [HostStage::Untracked, HostStage::PreDnat, HostStage::Normal] {
        let verdict = evaluate_host(records, &host.name, stage, direction, packet);
        if verdict.trace != [Step::Unmatched(Action::Pass)] {
            let steps = text::verdict(&verdict);
            lines
                .extend(steps.lines().map(|line| format!("host endpoint {}{certainty}: {stage:?}: {line}", host.name)));
        }
        if verdict.action != Action::Pass {
            return (verdict.action == Action::Allow, lines);
        }
    }
    (true, lines)
}

fn end(graph: &Graph, field: &str, party: Option<&Party>) -> Result<End, Status> {
    let party = party.and_then(|party| party.party.as_ref());
    match party {
        Some(party::Party::Pod(name)) => pod(graph, field, name),
        Some(party::Party::Address(text)) => {
            let address =
                text.parse().map_err(|_| refused(format!("{field}.address: {text:?} is not an IP address")))?;
            Ok(of_address(graph, address))
        }
        None => Err(refused(format!("{field}: missing; give pod \"NAMESPACE/NAME\" or address"))),
    }
}

fn pod(graph: &Graph, field: &str, name: &str) -> Result<End, Status> {
    let Some((namespace, name)) = name.split_once('/') else {
        return Err(refused(format!("{field}.pod: {name:?} must be NAMESPACE/NAME")));
    };
    let key = EndpointKey::new(namespace, name);
    match graph.record(&RecordId::Endpoint(key.clone())).as_deref() {
        Some(Record::Endpoint(endpoint)) => {
            Ok(End { pod: Some(key), hosts: Vec::new(), addresses: endpoint.addresses.clone() })
        }
        _ => Err(Status::not_found(format!(
            "{field}.pod: there is no endpoint {key}; ListRecords with kind endpoint shows all"
        ))),
    }
}

/// Who has the address, if it is a pod or a node.
fn of_address(graph: &Graph, address: IpAddr) -> End {
    let pod = graph.pod_at(address);
    let node = graph.nodes().find(|(_, node)| has(node, address)).map(|(name, _)| name);
    let hosts = node.filter(|_| pod.is_none()).map(|node| hosts(graph, node, address)).unwrap_or_default();
    End { pod, hosts, addresses: vec![address] }
}

fn has(node: &NodeInfo, address: IpAddr) -> bool {
    let own = [node.ipv4.map(|net| net.addr().into()), node.ipv6.map(|net| net.addr().into())];
    let tunnels = [node.vtep.map(|vtep| vtep.address.into()), node.vtep6.map(|vtep| vtep.address.into())];
    own.into_iter().chain(tunnels).flatten().any(|known: IpAddr| known == address)
}

/// Host endpoints of a node, those that have the address alone if there are any.
fn hosts(graph: &Graph, node: &str, address: IpAddr) -> Vec<Host> {
    let (mut with_address, mut all, mut others) = (Vec::new(), Vec::new(), 0);
    for (id, _) in graph.view(node).host_endpoints() {
        let record = graph.record(&id);
        let (RecordId::HostEndpoint(name), Some(Record::HostEndpoint(host))) = (&id, record.as_deref()) else {
            continue;
        };
        match &host.interfaces {
            HostInterfaces::WithAddress(addresses) if addresses.contains(&address) => {
                with_address.push(Host { name: name.clone(), is_certain: true });
            }
            HostInterfaces::WithAddress(_) => others += 1,
            HostInterfaces::All | HostInterfaces::Named(_) => all.push((name.clone(), host.interfaces.clone())),
        }
    }
    let is_alone = all.len() + others == 1;
    let all = all.into_iter().map(|(name, interfaces)| {
        let is_certain = is_alone && interfaces == HostInterfaces::All;
        Host { name, is_certain }
    });
    if with_address.is_empty() { all.collect() } else { with_address }
}

fn packet(from: &End, to: &End, question: &ExplainRequest) -> Result<Packet, Status> {
    let mut pairs = from.addresses.iter().flat_map(|from| to.addresses.iter().map(move |to| (*from, *to)));
    let pair = pairs.find(|(from, to)| from.is_ipv4() == to.is_ipv4());
    let (source, destination) =
        pair.ok_or_else(|| Status::failed_precondition("the ends have no addresses of one IP version yet"))?;
    let port = u16::try_from(question.port)
        .map_err(|_| refused(format!("port: {} is not within 0..=65535", question.port)))?;
    let protocol = protocol(&question.protocol, source.is_ipv4())?;
    Ok(Packet { source, destination, protocol, source_port: SOURCE_PORT, destination_port: port, icmp: PING })
}

fn protocol(text: &str, is_ipv4: bool) -> Result<Protocol, Status> {
    match text.to_ascii_lowercase().as_str() {
        "" | "tcp" => Ok(Protocol::TCP),
        "udp" => Ok(Protocol::UDP),
        "sctp" => Ok(Protocol::SCTP),
        "icmp" if is_ipv4 => Ok(Protocol::ICMP),
        "icmp" | "icmpv6" => Ok(Protocol::ICMPV6),
        number => number
            .parse()
            .map(Protocol)
            .map_err(|_| refused(format!("protocol: {text:?} is not tcp, udp, sctp, icmp or a number below 256"))),
    }
}

fn refused(words: String) -> Status {
    Status::invalid_argument(words)
}
