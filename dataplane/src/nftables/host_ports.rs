//! Host ports: packets to a port of the node are translated to a pod's address and port.
//!
//! ```text
//!  prerouting  -99  hostports-in          packets that come in over a link
//!  output      -99  hostports-out         packets of the node's processes
//!  postrouting 111  hostports-masquerade  packets that would not come back otherwise
//! ```
//!
//! They are right after kube-proxy's chains (-100), so that a Service has precedence, and only
//! packets to an address of the node are theirs: what the node forwards passes. Policies of host
//! endpoints before translation see the port of the node, all others that of the pod.
//!
//! A source is masqueraded where replies would bypass the translation: the pod's own address, which
//! its kernel takes for a forgery, and 127.0.0.0/8, which a pod cannot answer. Everybody else stays
//! visible to the pod. Packets to `::1` are left alone: the kernel discards the replies, as IPv6
//! has no `route_localnet`, and the `portmap` plugin has no such host ports either.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use super::base::{self, Inputs, Section};
use super::elements;
use super::names;
use crate::Attached;
use margay_nft::{
    AddressType, ChainType, CmpOp, Datum, Family, Field, FieldType, Hook, Key, Masquerade, Match,
    Nat, NatTarget, NatType, Proto, Rule, Selector, Set, SetKind, SetName, SetRef, Side, Statement,
    Transport, Value,
};

/// Prefix of all chains and maps of host ports.
const PREFIX: &str = "hostports-";
/// After kube-proxy (`NF_IP_PRI_NAT_DST`, -100).
const AFTER_KUBE_PROXY: i32 = -99;
/// After our own chain of masquerading, and so after kube-proxy's.
const AFTER_MASQUERADE: i32 = 111;

/// Whether a chain or set belongs to host ports.
pub(super) fn is_host_port(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Which addresses of the node a map is for.
#[derive(Clone, Copy)]
enum Of {
    /// The one in the key.
    OneAddress,
    /// All of the family.
    EveryAddress,
}

impl Of {
    fn map_name(self, family: Family) -> SetName {
        let kind = match self {
            Self::OneAddress => "by-address",
            Self::EveryAddress => "any",
        };
        names::set(&format!("{PREFIX}{kind}-{}", names::digit(family)))
    }

    fn kind(self, family: Family) -> SetKind {
        let port = [FieldType::Proto, FieldType::Port];
        let key: Vec<FieldType> = match self {
            Self::OneAddress => [family.address_type()].into_iter().chain(port).collect(),
            Self::EveryAddress => port.into(),
        };
        SetKind::of(key).with_data(vec![family.address_type(), FieldType::Port])
    }

    fn selectors(self, family: Family) -> Vec<Selector> {
        let port = [Selector::L4proto, Selector::Dport(Transport::Any)];
        match self {
            Self::OneAddress => [base::destination(family)]
                .into_iter()
                .chain(port)
                .collect(),
            Self::EveryAddress => port.into(),
        }
    }

    /// Translates to what the map says.
    fn rule(self, family: Family) -> Rule {
        Rule::new().then(Statement::Nat(Nat {
            kind: NatType::Destination,
            to: NatTarget::Map {
                family,
                key: self.selectors(family),
                map: SetRef::Named(self.map_name(family)),
                with_port: true,
            },
            fully_random: false,
        }))
    }
}

/// Renders the chains and maps; empty if no pod has a host port. Of two pods with one port, which
/// the CNI service refuses, the first by interface has it.
pub(super) fn render(
    inputs: &Inputs,
    attached: &BTreeMap<String, Attached>,
    families: &[Family],
) -> Section {
    let mut section = Section::default();
    let families: Vec<Family> = families
        .iter()
        .copied()
        .filter(|family| add_maps(*family, attached, &mut section))
        .collect();
    if families.is_empty() {
        return section;
    }
    let mut rules = vec![
        Rule::new()
            .when(Match::AddressType(
                Side::Destination,
                CmpOp::Ne,
                AddressType::Local,
            ))
            .accept(),
    ];
    rules.extend(inputs.accept_ipvs_services(&families));
    for family in &families {
        if *family == Family::Ipv6 {
            let loopback = Match::is(Selector::Daddr6, Ipv6Addr::LOCALHOST);
            rules.push(Rule::new().when(loopback).accept());
        }
        rules.push(Of::OneAddress.rule(*family));
        rules.push(Of::EveryAddress.rule(*family));
    }
    let nat = |hook, priority| base::base_chain(ChainType::Nat, hook, priority);
    section.add_chain(
        "hostports-in",
        nat(Hook::Prerouting, AFTER_KUBE_PROXY),
        rules.clone(),
    );
    section.add_chain("hostports-out", nat(Hook::Output, AFTER_KUBE_PROXY), rules);
    section.add_chain(
        "hostports-masquerade",
        nat(Hook::Postrouting, AFTER_MASQUERADE),
        families
            .iter()
            .flat_map(|family| masquerade_rules(*family))
            .collect(),
    );
    section
}

/// Adds the maps of a family; returns whether a pod has a host port there.
fn add_maps(family: Family, attached: &BTreeMap<String, Attached>, section: &mut Section) -> bool {
    let mut one = Set::new(Of::OneAddress.kind(family));
    let mut every = Set::new(Of::EveryAddress.kind(family));
    for pod in attached.values() {
        let mut addresses = pod.addresses.iter();
        let Some(address) = addresses.find(|address| elements::family(**address) == family) else {
            continue;
        };
        for port in &pod.host_ports {
            let key = [
                Field::from(Proto(port.protocol.0)),
                Field::from(Datum::Port(port.port)),
            ];
            let (map, key) = match port.address {
                Some(own) if elements::family(own) != family => continue,
                Some(own) if !own.is_unspecified() => {
                    let own = Field::from(Datum::from(own));
                    (&mut one, Key::concat([own].into_iter().chain(key)))
                }
                _ => (&mut every, Key::concat(key)),
            };
            let to = [Datum::from(*address), Datum::Port(port.pod_port)];
            map.elements.entry(key).or_insert(Value::Data(to.into()));
        }
    }
    if one.elements.is_empty() && every.elements.is_empty() {
        return false;
    }
    section.sets.insert(Of::OneAddress.map_name(family), one);
    section
        .sets
        .insert(Of::EveryAddress.map_name(family), every);
    true
}

fn masquerade_rules(family: Family) -> Vec<Rule> {
    let masquerade = Statement::Masquerade(Masquerade {
        ports: None,
        fully_random: true,
    });
    let translated = Rule::new().when(Match::CtDnat(CmpOp::Eq));
    // To the pod that sent it.
    let own = Match::in_set(
        vec![Selector::Oifname, base::source(family)],
        &base::pods_set(family),
    );
    let mut rules = vec![translated.clone().when(own).then(masquerade.clone())];
    if family == Family::Ipv4 {
        rules.push(
            translated
                .when(Match::is(Selector::Saddr4, base::loopback_net()))
                .when(Match::oif_prefix(names::workload_prefix()))
                .then(masquerade),
        );
    }
    rules
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use expect_test::expect;
    use margay_api::endpoint::EndpointKey;
    use margay_api::host_port::HostPort;
    use margay_api::rule::Protocol;
    use margay_nft::Ruleset;

    use super::*;

    fn mk_pod(name: &str, addresses: &[&str], ports: &[(&str, Protocol, u16, u16)]) -> Attached {
        let ip = |text: &str| -> IpAddr { text.parse().expect("an address") };
        let port = |(address, protocol, port, pod_port): &(&str, Protocol, u16, u16)| HostPort {
            address: (!address.is_empty()).then(|| ip(address)),
            protocol: *protocol,
            port: *port,
            pod_port: *pod_port,
        };
        Attached {
            endpoint: EndpointKey::new("x", name),
            uid: String::new(),
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            host_ports: ports.iter().map(port).collect(),
        }
    }

    fn text(pods: &[Attached]) -> String {
        let attached: BTreeMap<String, Attached> = pods
            .iter()
            .map(|pod| (format!("cali{}", pod.endpoint.name), pod.clone()))
            .collect();
        let section = render(&Inputs::default(), &attached, &Family::ALL);
        let mut ruleset = Ruleset::new(names::table());
        for (name, chain) in section.chains {
            ruleset.put_chain(name, chain);
        }
        for (name, set) in section.sets {
            ruleset.put_set(name, set);
        }
        // The comments are hashes of the rules.
        let text = ruleset.to_string();
        let lines = text.lines().map(|line| match line.split_once(" comment ") {
            Some((rule, _)) => format!("{rule}\n"),
            None => format!("{line}\n"),
        });
        lines.collect()
    }

    #[test]
    fn each_address_of_a_pod_has_its_ports_of_that_ip_version() {
        let (tcp, udp, sctp) = (Protocol::TCP, Protocol::UDP, Protocol::SCTP);
        let both = mk_pod(
            "a",
            &["10.0.0.1", "fd00::1"],
            &[
                ("", tcp, 8080, 80),
                ("0.0.0.0", udp, 53, 53),
                ("fd00:1::1", sctp, 7, 8),
            ],
        );
        let ipv4 = mk_pod(
            "b",
            &["10.0.0.2"],
            &[
                ("192.0.2.1", tcp, 443, 8443),
                ("::", tcp, 1, 2),
                // The first pod has it.
                ("", tcp, 8080, 81),
            ],
        );
        expect![[r#"
            table inet margay {
            	map hostports-any-4 {
            		type inet_proto . inet_service : ipv4_addr . inet_service
            		elements = { tcp . 8080 : 10.0.0.1 . 80,
            			     udp . 53 : 10.0.0.1 . 53 }
            	}

            	map hostports-any-6 {
            		type inet_proto . inet_service : ipv6_addr . inet_service
            		elements = { tcp . 8080 : fd00::1 . 80 }
            	}

            	map hostports-by-address-4 {
            		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
            		elements = { 192.0.2.1 . tcp . 443 : 10.0.0.2 . 8443 }
            	}

            	map hostports-by-address-6 {
            		type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service
            		elements = { fd00:1::1 . sctp . 7 : fd00::1 . 8 }
            	}

            	chain hostports-in {
            		type nat hook prerouting priority dstnat + 1; policy accept;
            		fib daddr type != local accept
            		dnat ip to ip daddr . meta l4proto . th dport map @hostports-by-address-4
            		dnat ip to meta l4proto . th dport map @hostports-any-4
            		ip6 daddr ::1 accept
            		dnat ip6 to ip6 daddr . meta l4proto . th dport map @hostports-by-address-6
            		dnat ip6 to meta l4proto . th dport map @hostports-any-6
            	}

            	chain hostports-masquerade {
            		type nat hook postrouting priority 111; policy accept;
            		ct status dnat oifname . ip saddr @pods-4 masquerade fully-random
            		ct status dnat ip saddr 127.0.0.0/8 oifname "cali*" masquerade fully-random
            		ct status dnat oifname . ip6 saddr @pods-6 masquerade fully-random
            	}

            	chain hostports-out {
            		type nat hook output priority -99; policy accept;
            		fib daddr type != local accept
            		dnat ip to ip daddr . meta l4proto . th dport map @hostports-by-address-4
            		dnat ip to meta l4proto . th dport map @hostports-any-4
            		ip6 daddr ::1 accept
            		dnat ip6 to ip6 daddr . meta l4proto . th dport map @hostports-by-address-6
            		dnat ip6 to meta l4proto . th dport map @hostports-any-6
            	}
            }
        "#]]
        .assert_eq(&text(&[both, ipv4]));
    }

    #[test]
    fn without_host_ports_there_is_nothing() {
        let pods = [mk_pod("a", &["10.0.0.1", "fd00::1"], &[])];
        let empty = Ruleset::new(names::table()).to_string();
        assert_eq!(text(&pods).trim_end(), empty.trim_end());
    }
}
