//! Frames that a pod may try, each with where it may come out: mostly nowhere.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use margay_api::network::Mac;
use margay_tests::raw::packet::{self, ARP, IPV4, IPV6, SERVICE_VLAN, VLAN};
use margay_tests::raw::{Packet, Transport};

use crate::lab::{GATEWAY, Lab, PORT, Place, marked, marked_mac, vtep_mac};

/// UDP port of VXLAN.
const VXLAN: u16 = 4789;
const ROUTING_HEADER: u8 = 43;
pub const HOP_BY_HOP: u8 = 0;
pub const DESTINATION_OPTIONS: u8 = 60;
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;

/// An attack.
pub struct Attack {
    /// Description for people.
    pub name: String,
    /// Its number.
    pub number: u16,
    /// The frames, in order.
    pub frames: Vec<Vec<u8>>,
    /// Place where it comes out.
    pub comes_out: BTreeSet<Place>,
}

impl Attack {
    pub fn new(
        lab: &mut Lab,
        name: impl Into<String>,
        frames: impl FnOnce(&Lab, u16) -> Vec<Vec<u8>>,
    ) -> Self {
        let number = lab.number();
        Self {
            name: name.into(),
            number,
            frames: frames(lab, number),
            comes_out: BTreeSet::new(),
        }
    }

    pub fn harmless(self, places: &[Place]) -> Self {
        Self {
            comes_out: places.iter().copied().collect(),
            ..self
        }
    }
}

fn udp(source: IpAddr, destination: IpAddr, number: u16) -> Packet {
    Packet::new(
        source,
        destination,
        Transport::Udp {
            ports: (4000, PORT),
            data: marked(number),
        },
    )
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Every destination of the attacker, with the addresses.
fn targets(lab: &Lab) -> [(Place, [IpAddr; 2]); 4] {
    [
        (Place::Victim, lab.victim().addresses),
        (Place::Remote, lab.remote().addresses),
        (Place::Host, lab.nodes[0].addresses),
        (Place::OtherHost, lab.nodes[1].addresses),
    ]
}

/// Where an honest packet to this place comes by: what goes through the tunnel is a packet to the
/// other node, too.
pub fn way(place: Place, target: IpAddr) -> Vec<Place> {
    let (far, tunnelled) = (
        matches!(place, Place::Remote | Place::OtherHost),
        place == Place::Remote && target.is_ipv4(),
    );
    let by = far
        .then_some(Place::Wire)
        .into_iter()
        .chain(tunnelled.then_some(Place::OtherHost));
    by.chain([place]).collect()
}

/// Everything that must not come out even without a policy.
pub fn all(lab: &mut Lab) -> Vec<Attack> {
    let mut attacks = forged(lab);
    attacks.extend(loopback(lab));
    attacks.extend(frames(lab));
    attacks.extend(tunnels(lab));
    attacks.extend(source_routes(lab));
    attacks.extend(groups(lab));
    attacks
}

/// Source addresses that are not the pod's own.
fn forged(lab: &mut Lab) -> Vec<Attack> {
    let others = targets(lab);
    let of_nobody = [
        ["127.0.0.1", "::1"],
        ["0.0.0.0", "::"],
        ["169.254.1.1", "fe80::ecee:eeff:feee:eeee"],
        ["255.255.255.255", "ff02::1"],
        ["224.0.0.1", "fe80::1"],
        ["8.8.8.8", "2001:db8::1"],
    ];
    let sources = others
        .iter()
        .map(|(_, addresses)| *addresses)
        .chain(of_nobody.map(|pair| pair.map(address)));
    let mut attacks = Vec::new();
    for pair in sources.collect::<Vec<_>>() {
        for (place, targets) in others {
            for (source, target) in pair.into_iter().zip(targets) {
                let name = |how: &str| format!("{how} forged {source} to {place:?}");
                attacks.push(Attack::new(lab, name("plain"), |lab, number| {
                    vec![lab.frame(&udp(source, target, number))]
                }));
                attacks.push(Attack::new(lab, name("in parts"), |lab, number| {
                    let parts = udp(source, target, number).fragments(number, &[(0, 8), (8, 64)]);
                    let ethertype = if source.is_ipv4() { IPV4 } else { IPV6 };
                    parts
                        .iter()
                        .map(|part| packet::ethernet(GATEWAY, lab.attacker().mac, ethertype, part))
                        .collect()
                }));
                attacks.push(Attack::new(
                    lab,
                    name("behind a priority tag"),
                    |lab, number| {
                        vec![packet::tagged(
                            &lab.frame(&udp(source, target, number)),
                            VLAN,
                            0,
                        )]
                    },
                ));
                attacks.push(Attack::new(lab, name("behind two tags"), |lab, number| {
                    let inner = packet::tagged(&lab.frame(&udp(source, target, number)), VLAN, 0);
                    vec![packet::tagged(&inner, SERVICE_VLAN, 0)]
                }));
            }
        }
    }
    attacks
}

/// The node's own loopback addresses, from a link on which they are routed.
fn loopback(lab: &mut Lab) -> Vec<Attack> {
    let own = lab.attacker().addresses;
    let targets = ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"].map(address);
    let attack = |target: IpAddr| {
        let own = own[usize::from(target.is_ipv6())];
        Attack::new(lab, format!("to loopback {target}"), |lab, number| {
            vec![lab.frame(&udp(own, target, number))]
        })
    };
    targets.into_iter().map(attack).collect()
}

/// Frames in forms that others might read differently than the node does.
fn frames(lab: &mut Lab) -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (place, addresses) in targets(lab) {
        for (own, target) in lab.attacker().addresses.into_iter().zip(addresses) {
            let name = |how: &str| format!("{how} to {target}");
            let mut put = |how: &str, change: &dyn Fn(&Lab, Vec<u8>) -> Vec<u8>| {
                Attack::new(lab, name(how), |lab, number| {
                    vec![change(lab, lab.frame(&udp(own, target, number)))]
                })
            };
            attacks.push(put("own address behind a VLAN tag", &|_, frame| {
                packet::tagged(&frame, VLAN, 7)
            }));
            attacks.push(put("own address behind a service tag", &|_, frame| {
                packet::tagged(&frame, SERVICE_VLAN, 7)
            }));
            attacks.push(put("own address in LLC and SNAP", &|_, frame| {
                packet::snap(&frame)
            }));
            attacks.push(put(
                "own address in LLC and SNAP behind a tag",
                &|_, frame| packet::tagged(&packet::snap(&frame), VLAN, 0),
            ));
            attacks.push(put("own address to another's hardware", &|lab, frame| {
                [&lab.victim().mac.0[..], &frame[6..]].concat()
            }));
            // A priority tag does not change a packet's source; policy sees the packet as without
            // it.
            let tagged = put("own address behind a priority tag", &|_, frame| {
                packet::tagged(&frame, VLAN, 0)
            });
            attacks.push(tagged.harmless(&way(place, target)));
            // Broadcast on the link reaches the node alone, which does not forward it.
            let broadcast = put("own address to all hardware", &|_, frame| {
                [&[0xff; 6], &frame[6..]].concat()
            });
            attacks.push(broadcast.harmless(if place == Place::Host {
                &[Place::Host]
            } else {
                &[]
            }));
        }
    }
    attacks
}

/// Packets in which others are hidden.
fn tunnels(lab: &mut Lab) -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (_, addresses) in targets(lab) {
        for (own, target) in lab.attacker().addresses.into_iter().zip(addresses) {
            let inside = |lab: &Lab, number: u16| {
                let [forged, _] = lab.victim().addresses;
                let [remote, _] = lab.remote().addresses;
                let inner = udp(forged, remote, number);
                packet::ethernet(vtep_mac(2), vtep_mac(1), IPV4, &inner.encode())
            };
            let vxlan = |lab: &Lab, number: u16| {
                let header = [8, 0, 0, 0, 0, 0x10, 0, 0];
                let data = [&header[..], &inside(lab, number)].concat();
                Packet::new(
                    own,
                    target,
                    Transport::Udp {
                        ports: (VXLAN, VXLAN),
                        data,
                    },
                )
            };
            attacks.push(Attack::new(
                lab,
                format!("VXLAN over {target}"),
                |lab, number| vec![lab.frame(&vxlan(lab, number))],
            ));
            attacks.push(Attack::new(
                lab,
                format!("VXLAN in parts over {target}"),
                |lab, number| {
                    let packet = vxlan(lab, number);
                    let parts = packet.fragments(number, &[(0, 8), (8, 16), (24, 200)]);
                    parts
                        .iter()
                        .map(|part| {
                            packet::ethernet(GATEWAY, lab.attacker().mac, packet.ethertype(), part)
                        })
                        .collect()
                },
            ));
            if target.is_ipv6() {
                attacks.push(Attack::new(
                    lab,
                    format!("VXLAN behind options over {target}"),
                    |lab, number| {
                        let extensions = vec![(DESTINATION_OPTIONS, vec![1, 4, 0, 0, 0, 0])];
                        vec![lab.frame(&Packet {
                            extensions,
                            ..vxlan(lab, number)
                        })]
                    },
                ));
                continue;
            }
            attacks.push(Attack::new(
                lab,
                format!("IP in IP to {target}"),
                |lab, number| {
                    let data = inside(lab, number)[14..].to_vec();
                    vec![lab.frame(&Packet::new(
                        own,
                        target,
                        Transport::Other { protocol: 4, data },
                    ))]
                },
            ));
        }
    }
    attacks
}

/// Packets with further hops in a routing header or option.
fn source_routes(lab: &mut Lab) -> Vec<Attack> {
    let mut attacks = Vec::new();
    let [own, own6] = lab.attacker().addresses;
    let all = targets(lab);
    for (first, [via, via6]) in all {
        for (place, [last, last6]) in all {
            if via == last {
                continue;
            }
            for (kind, option) in [
                ("loose", LOOSE_SOURCE_ROUTE),
                ("strict", STRICT_SOURCE_ROUTE),
            ] {
                let IpAddr::V4(hop) = last else { continue };
                let name = format!("a {kind} source route by {via} to {place:?}");
                attacks.push(Attack::new(lab, name, |lab, number| {
                    let options = [&[option, 7, 4][..], &hop.octets(), &[0]].concat();
                    vec![lab.frame(&Packet {
                        options,
                        ..udp(own, via, number)
                    })]
                }));
            }
            let IpAddr::V6(hop) = last6 else { continue };
            // Routers on the way do not act on such a header: it may reach its destination, which
            // discards it.
            let far = matches!(first, Place::Remote | Place::OtherHost).then_some(Place::Wire);
            let pod = matches!(first, Place::Victim | Place::Remote).then_some(first);
            let reaches: Vec<Place> = far.into_iter().chain(pod).collect();
            for kind in [0, 2, 3, 4] {
                let name = format!("a routing header of type {kind} by {via6} to {place:?}");
                let attack = Attack::new(lab, name, |lab, number| {
                    let body = [&[kind, 1, 0, 0, 0, 0][..], &hop.octets()].concat();
                    vec![lab.frame(&Packet {
                        extensions: vec![(ROUTING_HEADER, body)],
                        ..udp(own6, via6, number)
                    })]
                });
                attacks.push(attack.harmless(&reaches));
            }
        }
    }
    attacks
}

/// Broadcast and multicast.
fn groups(lab: &mut Lab) -> Vec<Attack> {
    let own = lab.attacker().addresses;
    let groups = [
        "255.255.255.255",
        "10.244.1.255",
        "224.0.0.1",
        "224.0.0.251",
        "239.1.2.3",
        "ff02::1",
        "ff05::2",
        "ff0e::1",
    ];
    let mut attacks = Vec::new();
    for group in groups.map(address) {
        let own = own[usize::from(group.is_ipv6())];
        for all in [
            Mac([0xff; 6]),
            Mac([1, 0, 0x5e, 0, 0, 1]),
            Mac([0x33, 0x33, 0, 0, 0, 1]),
        ] {
            let attack = Attack::new(lab, format!("to {group} by {all}"), |lab, number| {
                let packet = udp(own, group, number);
                vec![packet::ethernet(
                    all,
                    lab.attacker().mac,
                    packet.ethertype(),
                    &packet.encode(),
                )]
            });
            // The node itself is addressed by the groups that it is a member of; it is a router.
            let member = ["255.255.255.255", "224.0.0.1", "ff02::1", "ff05::2"]
                .contains(&group.to_string().as_str());
            attacks.push(attack.harmless(if member { &[Place::Host] } else { &[] }));
        }
    }
    attacks
}

/// Messages by which others would be misled about routes and neighbours. They are known by the
/// hardware address that they claim, or by their data.
pub fn claims(lab: &mut Lab) -> Vec<Attack> {
    let mut attacks = Vec::new();
    let claimed = [
        lab.victim().addresses[0],
        lab.remote().addresses[0],
        lab.nodes[1].addresses[0],
        address("169.254.1.1"),
    ];
    for claim in claimed {
        let IpAddr::V4(claim) = claim else { continue };
        for (operation, target) in [
            (1, claim),
            (2, claim),
            (1, Ipv4Addr::new(169, 254, 1, 1)),
            (2, Ipv4Addr::BROADCAST),
        ] {
            for to in [Mac([0xff; 6]), GATEWAY, lab.victim().mac] {
                let name = format!("ARP {operation} of {claim} about {target} to {to}");
                attacks.push(Attack::new(lab, name, |lab, number| {
                    let message = packet::arp(operation, (marked_mac(number), claim), (to, target));
                    let frame = packet::ethernet(to, lab.attacker().mac, ARP, &message);
                    vec![
                        frame.clone(),
                        packet::tagged(&frame, VLAN, 0),
                        packet::snap(&frame),
                    ]
                }));
            }
        }
    }
    let own = lab.attacker().addresses[1];
    let (victim, node, all) = (
        lab.victim().addresses[1],
        lab.nodes[0].addresses[1],
        address("ff02::1"),
    );
    let gateway = address("fe80::ecee:eeff:feee:eeee");
    for source in ["fe80::1", "fe80::ecee:eeff:feee:eeee", "::"]
        .map(address)
        .into_iter()
        .chain([own])
    {
        // What a pod sends from its own address is subject to policy, and so are its claims about
        // itself on the link: the node believes none of them.
        let host = |target: IpAddr| {
            [all, gateway, node]
                .contains(&target)
                .then_some(Place::Host)
        };
        let under_own =
            |target: IpAddr| host(target).or((target == victim).then_some(Place::Victim));
        for target in [all, gateway, victim, node] {
            let mut put =
                |what: &str, kind: u8, reaches: Option<Place>, body: &dyn Fn(Mac) -> Vec<u8>| {
                    let name = format!("{what} from {source} to {target}");
                    let attack = Attack::new(lab, name, |lab, number| {
                        let transport = Transport::Icmp {
                            kind: (kind, 0),
                            body: body(marked_mac(number)),
                        };
                        let frame = lab.frame(&Packet::new(source, target, transport));
                        vec![
                            frame.clone(),
                            packet::tagged(&frame, VLAN, 0),
                            packet::snap(&frame),
                        ]
                    });
                    attacks.push(attack.harmless(reaches.as_slice()));
                };
            let of_own = if source == own {
                under_own(target)
            } else {
                None
            };
            put("a router's announcement", 134, of_own, &announcement);
            // These would lead the victim's address to the attacker.
            put("a redirect", 137, None, &|mac| {
                let IpAddr::V6(address) = victim else {
                    return Vec::new();
                };
                [
                    &[0; 4][..],
                    &address.octets(),
                    &address.octets(),
                    &[2, 1],
                    &mac.0,
                ]
                .concat()
            });
            let on_link = if source == own {
                under_own(target)
            } else {
                host(target)
            };
            put(
                "a neighbour's announcement",
                136,
                on_link.filter(|_| !source.is_unspecified()),
                &|mac| {
                    let IpAddr::V6(address) = victim else {
                        return Vec::new();
                    };
                    [&[0x20, 0, 0, 0][..], &address.octets(), &[2, 1], &mac.0].concat()
                },
            );
        }
    }
    attacks
}

/// Flags: others are routers; lifetimes of half an hour; a prefix for own addresses, and the
/// hardware address.
fn announcement(mac: Mac) -> Vec<u8> {
    let mut body = vec![64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    body.extend([3, 4, 64, 0xc0]);
    body.extend(1800_u32.to_be_bytes());
    body.extend(1800_u32.to_be_bytes());
    body.extend([0; 4]);
    body.extend([
        0x20, 0x01, 0x0d, 0xb8, 0xba, 0xd0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    body.extend([1, 1]);
    body.extend(mac.0);
    body
}
