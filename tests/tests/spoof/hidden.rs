//! Ports that are hard to find in a packet.

use std::net::IpAddr;

use margay_tests::raw::packet::{self, IPV4, IPV6};
use margay_tests::raw::{Packet, Transport};

use crate::lab::{DENIED, GATEWAY, Lab, PORT, Place, marked};

use super::attacks::{Attack, DESTINATION_OPTIONS, HOP_BY_HOP, way};

/// Packets to a port that policy denies, in forms in which it is hard to find, and the same to one
/// that it allows.
pub fn hidden_ports(lab: &mut Lab, ends: (IpAddr, IpAddr), place: Place) -> Vec<Attack> {
    let (own, target) = ends;
    let to = |port: u16, number: u16| {
        let data = [marked(number), vec![0x55; 50]].concat();
        Packet::new(
            own,
            target,
            Transport::Udp {
                ports: (4000 + number, port),
                data,
            },
        )
    };
    let through = way(place, target);
    let framed = |lab: &Lab, parts: &[Vec<u8>]| -> Vec<Vec<u8>> {
        let ethertype = if own.is_ipv4() { IPV4 } else { IPV6 };
        parts
            .iter()
            .map(|part| packet::ethernet(GATEWAY, lab.attacker().mac, ethertype, part))
            .collect()
    };
    let mut attacks = Vec::new();
    for (port, comes_out) in [(PORT, &through[..]), (DENIED, &[])] {
        let mut put = |how: &str, frames: &dyn Fn(&Lab, u16) -> Vec<Vec<u8>>| {
            Attack::new(lab, format!("{how} to {target} port {port}"), frames).harmless(comes_out)
        };
        attacks.push(put("whole", &|lab, number| {
            vec![lab.frame(&to(port, number))]
        }));
        attacks.push(put("in parts", &|lab, number| {
            framed(
                lab,
                &to(port, number).fragments(number, &[(0, 8), (8, 32), (40, 100)]),
            )
        }));
        attacks.push(put("in parts, last first", &|lab, number| {
            framed(
                lab,
                &to(port, number).fragments(number, &[(40, 100), (8, 32), (0, 8)]),
            )
        }));
        if own.is_ipv6() {
            attacks.push(put("behind options", &|lab, number| {
                let extensions = vec![
                    (HOP_BY_HOP, vec![1, 4, 0, 0, 0, 0]),
                    (
                        DESTINATION_OPTIONS,
                        vec![1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                    ),
                ];
                vec![lab.frame(&Packet {
                    extensions,
                    ..to(port, number)
                })]
            }));
            attacks.push(put("as its only part", &|lab, number| {
                framed(lab, &to(port, number).fragments(number, &[(0, 500)]))
            }));
        } else {
            attacks.push(put("behind an option", &|lab, number| {
                vec![lab.frame(&Packet {
                    options: vec![1, 1, 1, 0],
                    ..to(port, number)
                })]
            }));
        }
    }
    // The fragment with the port has the allowed one, and one before or after it overlaps it. The
    // receiver may take either, so neither the node nor anybody behind it may see both: all of it
    // is discarded, unless the later one is wholly within the other and is ignored.
    let overlaps = [
        (
            "a longer part after",
            [(true, 0, 16), (false, 0, 24), (true, 16, 100)],
            false,
        ),
        (
            "a part before",
            [(false, 0, 8), (true, 0, 16), (true, 16, 100)],
            false,
        ),
        (
            "a part in the last",
            [(true, 16, 100), (false, 8, 16), (true, 0, 16)],
            false,
        ),
        (
            "the same part after",
            [(true, 0, 16), (false, 0, 8), (true, 16, 100)],
            true,
        ),
    ];
    for (how, parts, is_ignored) in overlaps {
        let attack = Attack::new(
            lab,
            format!("a port overwritten by {how} to {target}"),
            |lab, number| {
                let (good, bad) = (to(PORT, number), to(DENIED, number));
                let part = |(is_good, offset, length)| {
                    let packet = if is_good { &good } else { &bad };
                    packet.fragments(number, &[(offset, length)]).remove(0)
                };
                framed(lab, &parts.map(part))
            },
        );
        attacks.push(attack.harmless(if is_ignored { &through } else { &[] }));
    }
    attacks.push(Attack::new(
        lab,
        format!("a later part without a first one to {target}"),
        |lab, number| {
            let packet = Packet::new(
                own,
                target,
                Transport::Udp {
                    ports: (4000, PORT),
                    data: [vec![0; 24], marked(number)].concat(),
                },
            );
            framed(lab, &packet.fragments(number, &[(24, 100)]))
        },
    ));
    attacks
}
