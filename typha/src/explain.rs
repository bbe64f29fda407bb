//! Which policy decides about a packet, from the records that nodes hold.

use std::net::IpAddr;

use margay_api::endpoint::EndpointKey;
use margay_api::rule::{Action, Protocol};
use margay_calc::evaluate::{Direction, Packet, Records, evaluate};
use margay_calc::graph::Graph;
use margay_calc::model::{Record, RecordId};
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
    addresses: Vec<IpAddr>,
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
            steps.push(format!("{name}: not a pod, so no policy of a pod applies"));
            continue;
        };
        let verdict = evaluate(records, pod, direction, packet);
        allowed &= verdict.action == Action::Allow;
        let lines = text::verdict(&verdict);
        steps.extend(lines.lines().map(|line| format!("{name} of {pod}: {line}")));
    }
    (if allowed { "allow" } else { "deny" }.to_owned(), steps)
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
        Some(Record::Endpoint(endpoint)) => Ok(End { pod: Some(key), addresses: endpoint.addresses.clone() }),
        _ => Err(Status::not_found(format!(
            "{field}.pod: there is no endpoint {key}; ListRecords with kind endpoint shows all"
        ))),
    }
}

/// Who has the address, if it is a pod.
fn of_address(graph: &Graph, address: IpAddr) -> End {
    let ids = crate::debug::all_ids(graph);
    let pod = ids.into_iter().find_map(|id| match id {
        RecordId::Endpoint(key) => match graph.record(&RecordId::Endpoint(key.clone())).as_deref() {
            Some(Record::Endpoint(endpoint)) if endpoint.addresses.contains(&address) => Some(key),
            _ => None,
        },
        _ => None,
    });
    End { pod, addresses: vec![address] }
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
