//! Judgement of a commit: its state is one that the replica behind the stream has had, and no
//! packet is allowed that neither the state before nor the one after allows.

use std::net::{IpAddr, Ipv4Addr};

use margay_api::endpoint::EndpointKey;
use margay_api::rule::{Action, Protocol};
use margay_calc::evaluate::{Direction, Packet, evaluate};
use margay_calc::model::{Record, RecordId};

use crate::kernel::Kernel;
use crate::oracle::Records;
use crate::run::Run;

/// Ports that policies speak of, and one that none does.
const PORTS: [u16; 3] = [80, 443, 7];
/// Last bytes of the pods' addresses.
pub const HOSTS: std::ops::Range<u8> = 0..16;
/// Packets that are judged of a commit that looks sound.
const SAMPLE: usize = 3;

/// A packet at one end of a connection.
struct Probe {
    endpoint: EndpointKey,
    direction: Direction,
    packet: Packet,
}

/// Address of a pod.
pub fn address(host: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, host).into()
}

/// Judges what is about to be committed.
pub fn check_commit(run: &Run, name: &str, kernel: &mut Kernel, committed: &Records) {
    let is_known = kernel.find_state();
    let after = kernel
        .sources
        .last()
        .map(|source| source.oracle.lock().view(name));
    let probes = probes(committed);
    let step = if is_known {
        (probes.len() / SAMPLE).max(1)
    } else {
        1
    };
    let first = usize::try_from(kernel.commits).unwrap_or_default() % step.max(1);
    let is_one_of = |probe: &Probe| {
        let before = kernel
            .records
            .as_ref()
            .is_none_or(|before| is_allowed(before, probe));
        before || after.as_ref().is_some_and(|after| is_allowed(after, probe))
    };
    // A state between the two may be in force as well, so of a known one only the newest is judged.
    let is_judged = !is_known || after.as_ref() == Some(committed);
    let sample = probes
        .iter()
        .skip(first)
        .step_by(step)
        .filter(|_| is_judged);
    let weaker = sample
        .filter(|probe| is_allowed(committed, probe))
        .find(|probe| !is_one_of(probe));
    if let Some(Probe {
        endpoint,
        direction,
        packet,
    }) = weaker
    {
        let (from, to, port) = (packet.source, packet.destination, packet.destination_port);
        run.fail(
            name,
            format_args!(
                "weaker than before and after: {direction:?} of {endpoint} allows {from} -> \
                 {to}:{port}"
            ),
        );
    }
    if !is_known {
        run.fail(
            name,
            format_args!(
                "commits a state that its replica has not had: {}",
                difference(committed, after.as_ref())
            ),
        );
    }
}

/// First record in which two views differ.
pub fn difference(one: &Records, other: Option<&Records>) -> String {
    let Some(other) = other else {
        return "there was no replica".to_owned();
    };
    for (id, record) in one {
        match other.get(id) {
            None => return format!("{id:?} should not be there"),
            Some(wanted) if wanted != record => {
                return format!("{id:?} is {record:?}, not {wanted:?}");
            }
            Some(_) => {}
        }
    }
    let missing = other.keys().find(|id| !one.contains_key(*id));
    missing.map_or_else(
        || "nothing differs now".to_owned(),
        |id| format!("{id:?} is missing"),
    )
}

fn is_allowed(records: &Records, probe: &Probe) -> bool {
    evaluate(records, &probe.endpoint, probe.direction, &probe.packet).action == Action::Allow
}

fn probes(records: &Records) -> Vec<Probe> {
    let mut probes = Vec::new();
    for (id, record) in records {
        let (RecordId::Endpoint(endpoint), Record::Endpoint(value)) = (id, record) else {
            continue;
        };
        let Some(own) = value.addresses.first().copied() else {
            continue;
        };
        for (place, host) in HOSTS.step_by(3).enumerate() {
            let destination_port = PORTS[place % PORTS.len()];
            for (direction, source, destination) in [
                (Direction::Ingress, address(host), own),
                (Direction::Egress, own, address(host)),
            ] {
                let protocol = Protocol::TCP;
                let packet = Packet {
                    source,
                    destination,
                    protocol,
                    source_port: 49_152,
                    destination_port,
                    icmp: (0, 0),
                };
                probes.push(Probe {
                    endpoint: endpoint.clone(),
                    direction,
                    packet,
                });
            }
        }
    }
    probes
}
