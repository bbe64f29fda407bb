//! Chains of address translation.

use std::net::IpAddr;

use super::base;
use crate::tests::support::{chain_name, set_name};
use crate::*;

fn masquerade(ports: Option<(u16, u16)>, fully_random: bool) -> Statement {
    Statement::Masquerade(Masquerade {
        ports,
        fully_random,
    })
}

fn nat(kind: NatType, to: NatTarget, fully_random: bool) -> Statement {
    Statement::Nat(Nat {
        kind,
        to,
        fully_random,
    })
}

fn address(text: &str, ports: Option<(u16, u16)>) -> NatTarget {
    NatTarget::Address(text.parse::<IpAddr>().expect("an address"), ports)
}

fn tcp() -> Rule {
    Rule::new().when(Match::is(Selector::L4proto, Proto::TCP))
}

pub(super) fn source_translation(ruleset: &mut Ruleset) {
    let mut put = |name: &str, base, rules: Vec<Rule>| {
        ruleset.put_chain(chain_name(name), Chain::base(base, rules))
    };
    put(
        "snat-1",
        base(ChainType::Nat, Hook::Postrouting, 110, ChainPolicy::Accept),
        vec![
            Rule::new().counter().then(masquerade(None, false)),
            Rule::new()
                .when(Match::in_set(Selector::Saddr4, &set_name("nets-4")))
                .then(masquerade(None, true)),
            tcp().then(masquerade(Some((1024, 65535)), true)),
            tcp().then(masquerade(Some((1024, 65535)), false)),
            Rule::new().then(nat(NatType::Source, address("10.0.0.1", None), false)),
            tcp().then(nat(
                NatType::Source,
                address("10.0.0.1", Some((100, 200))),
                true,
            )),
            Rule::new().then(nat(NatType::Source, address("fd00::1", None), false)),
        ],
    );
}

pub(super) fn destination_translation(ruleset: &mut Ruleset) {
    let mut put = |name: &str, base, rules: Vec<Rule>| {
        ruleset.put_chain(chain_name(name), Chain::base(base, rules))
    };
    let service = NatTarget::Map {
        family: Family::Ipv4,
        key: vec![
            Selector::Daddr4,
            Selector::L4proto,
            Selector::Dport(Transport::Any),
        ],
        map: SetRef::Named(set_name("service-1")),
        with_port: true,
    };
    let floating = NatTarget::Map {
        family: Family::Ipv6,
        key: vec![Selector::Daddr6],
        map: SetRef::Named(set_name("floating-6")),
        with_port: false,
    };
    put(
        "dnat-1",
        base(ChainType::Nat, Hook::Prerouting, -99, ChainPolicy::Accept),
        vec![
            tcp().then(nat(
                NatType::Destination,
                address("10.0.0.1", Some((8080, 8080))),
                false,
            )),
            tcp().then(nat(
                NatType::Destination,
                address("fd00::1", Some((8080, 8080))),
                false,
            )),
            Rule::new().then(nat(NatType::Destination, service, false)),
            Rule::new().then(nat(NatType::Destination, floating, false)),
        ],
    );
}
