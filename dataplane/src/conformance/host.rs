//! Expected verdicts of packets of interfaces that have host endpoints, stage by stage.

use std::net::IpAddr;

use margay_api::rule::Action;
use margay_calc::evaluate::{Direction, HostStage};
use margay_calc::model::{HostInterfaces, Record, RecordId};
use margay_nft::IfName;
use proptest::prelude::*;
use proptest::sample::select;

use super::{Way, pod_of};
use crate::nftables::sample;
use crate::nftables::simulate::Packet;
use crate::{Links, Records};

/// The host endpoint of an interface, computed independently of the compiler.
fn owner(records: &Records, links: &Links, interface: IfName) -> Option<String> {
    let hosts = || {
        records
            .iter()
            .filter_map(|(id, record)| match (id, record) {
                (RecordId::HostEndpoint(name), Record::HostEndpoint(host)) => {
                    Some((name, &host.interfaces))
                }
                _ => None,
            })
    };
    let name = interface.as_str();
    if name == "lo" || name.starts_with("cali") {
        return None;
    }
    let own = hosts().find(|(_, interfaces)| match interfaces {
        HostInterfaces::All => false,
        HostInterfaces::Named(wanted) => wanted == name,
        HostInterfaces::WithAddress(wanted) => links
            .get(name)
            .is_some_and(|own| own.iter().any(|address| wanted.contains(address))),
    });
    let other = || hosts().find(|(_, interfaces)| **interfaces == HostInterfaces::All);
    own.or_else(other).map(|(name, _)| name.clone())
}

/// Expected verdict of a packet, stage by stage.
struct Oracle<'a> {
    view: &'a Records,
    packet: &'a Packet,
    /// Host endpoints of its input and output interface.
    ends: [Option<String>; 2],
    accepted: bool,
    reports: Vec<String>,
}

impl Oracle<'_> {
    /// Whether it passes this stage.
    fn host(&mut self, stage: HostStage, direction: Direction) -> bool {
        let end = &self.ends[usize::from(direction == Direction::Egress)];
        let (Some(host), false) = (end, self.accepted) else {
            return true;
        };
        let (action, reports) =
            sample::decides_at_host(self.view, host, stage, direction, self.packet);
        self.reports.extend(reports);
        let goes_on = matches!(stage, HostStage::Untracked | HostStage::PreDnat);
        self.accepted = goes_on && action == Action::Allow;
        action != Action::Deny
    }

    fn pod(&mut self, address: IpAddr, direction: Direction) -> bool {
        let Some(pod) = pod_of(address) else {
            return true;
        };
        let (allowed, reports) = sample::decides(self.view, &pod, direction, self.packet);
        self.reports.extend(reports);
        allowed
    }
}

/// Expected result of a packet by the records.
pub(super) fn oracle(
    view: &Records,
    links: &Links,
    packet: &Packet,
    way: Way,
) -> (bool, Vec<String>) {
    use Direction::{Egress, Ingress};
    let owner =
        |interface: Option<IfName>| interface.and_then(|interface| owner(view, links, interface));
    let ends = [owner(packet.input), owner(packet.output)];
    let mut oracle = Oracle {
        view,
        packet,
        ends,
        accepted: false,
        reports: Vec::new(),
    };
    let passed = match way {
        Way::ToHost => {
            oracle.host(HostStage::Untracked, Ingress)
                && oracle.host(HostStage::PreDnat, Ingress)
                && oracle.host(HostStage::Normal, Ingress)
        }
        Way::Forwarded => {
            oracle.host(HostStage::Untracked, Ingress)
                && oracle.host(HostStage::PreDnat, Ingress)
                && oracle.host(HostStage::Forward, Ingress)
                && oracle.pod(packet.source, Egress)
                && oracle.pod(packet.destination, Ingress)
                && oracle.host(HostStage::Forward, Egress)
        }
        Way::FromHost => {
            oracle.host(HostStage::Untracked, Egress) && oracle.host(HostStage::Normal, Egress)
        }
    };
    (passed, oracle.reports)
}

/// A packet with one of these input interfaces, and one of these output interfaces unless its
/// destination is a pod.
pub(super) fn packet() -> impl Strategy<Value = (Packet, Way)> {
    let outside = || select(vec!["eth0", "eth1", "eth2"]);
    (
        sample::packet(),
        outside(),
        outside(),
        select(vec![Way::ToHost, Way::Forwarded, Way::FromHost]),
        any::<bool>(),
    )
        .prop_map(|(packet, input, output, way, translated)| {
            let end = |address, outside: &str| match pod_of(address) {
                Some(_) => sample::interface_of(address),
                None => IfName::new(outside),
            };
            let packet = match way {
                Way::ToHost => Packet {
                    input: IfName::new(input),
                    output: None,
                    ..packet
                },
                Way::Forwarded => {
                    let (input, output) =
                        (end(packet.source, input), end(packet.destination, output));
                    Packet {
                        input,
                        output,
                        ..packet
                    }
                }
                Way::FromHost => {
                    let output = end(packet.destination, output);
                    Packet {
                        input: None,
                        output,
                        translated,
                        from_host: true,
                        ..packet
                    }
                }
            };
            (packet, way)
        })
}
