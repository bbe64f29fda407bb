//! A ruleset that uses every type and variant.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::support::{chain_name, ifname, set_name, table};
use crate::*;
use nat::{destination_translation, source_translation};

mod nat;

pub fn v4(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

pub fn v6(text: &str) -> Ipv6Addr {
    text.parse().expect("an address")
}

pub fn net(text: &str) -> Field {
    text.parse::<IpNet>().expect("a prefix").into()
}

pub fn port(port: u16) -> Field {
    Datum::Port(port).into()
}

pub fn addresses(first: &str, last: &str) -> Field {
    Field::range(v4(first).into(), v4(last).into())
}

/// The whole sample.
pub fn everything() -> Ruleset {
    let mut ruleset = Ruleset::new(table());
    sets(&mut ruleset);
    maps(&mut ruleset);
    ruleset.put_chain(
        chain_name("endpoint-1"),
        Chain::regular(vec![Rule::new().counter().drop()]),
    );
    ruleset.put_chain(chain_name("endpoint-2"), Chain::default());
    ruleset.put_chain(
        chain_name("tests-1"),
        Chain::regular(
            tests()
                .into_iter()
                .map(|t| Rule::new().when(t).accept())
                .collect::<Vec<_>>(),
        ),
    );
    ruleset.put_chain(chain_name("lookups-1"), Chain::regular(lookups()));
    ruleset.put_chain(chain_name("actions-1"), Chain::regular(actions()));
    bases(&mut ruleset);
    source_translation(&mut ruleset);
    destination_translation(&mut ruleset);
    ruleset
}

fn sets(ruleset: &mut Ruleset) {
    use FieldType::{Iface, Ipv4, Ipv6, Mark, Port, Proto as Protocol};
    let mut put = |name: &str, set: Set| ruleset.put_set(set_name(name), set);
    put(
        "addresses-4",
        Set::members(SetKind::of(Ipv4), [v4("10.0.0.1"), v4("10.0.0.2")]),
    );
    put(
        "addresses-6",
        Set::members(SetKind::of(Ipv6), [v6("fd00::1"), v6("fd00::2")]),
    );
    put("empty-4", Set::new(SetKind::of(Ipv4)));
    put(
        "nets-4",
        Set::members(
            SetKind::of(Ipv4).with_intervals(),
            [
                net("10.0.0.0/9"),
                net("10.128.0.0/9"),
                addresses("11.0.0.0", "11.0.0.5"),
                v4("192.168.0.1").into(),
                net("240.0.0.0/4"),
            ],
        ),
    );
    put(
        "nets-6",
        Set::members(
            SetKind::of(Ipv6).with_intervals(),
            [
                net("fd00::/8"),
                Field::range(v6("fe80::1").into(), v6("fe80::5").into()),
                v6("2001:db8::1").into(),
            ],
        ),
    );
    put(
        "all-4",
        Set::members(SetKind::of(Ipv4).with_intervals(), [net("0.0.0.0/0")]),
    );
    put(
        "ports-1",
        Set::members(
            SetKind::of([Protocol, Port]),
            [
                [Proto::TCP.into(), port(80)],
                [Proto::UDP.into(), port(53)],
                [Proto::SCTP.into(), port(99)],
            ],
        ),
    );
    put(
        "peers-1",
        Set::members(
            SetKind::of([Ipv4, Protocol, Port]).with_intervals(),
            [
                [net("10.0.0.0/8"), Proto::TCP.into(), Field::from(80..=90)],
                [v4("1.2.3.4").into(), Proto::UDP.into(), port(53)],
            ],
        ),
    );
    put(
        "ranges-1",
        Set::members(
            SetKind::of(Port).with_intervals(),
            [port(0), Field::from(80..=90), Field::from(60000..=65535)],
        ),
    );
    put(
        "interfaces-1",
        Set::members(SetKind::of(Iface), [ifname("cali123"), ifname("eth0")]),
    );
    put(
        "marks-1",
        Set::members(SetKind::of(Mark), [Datum::Mark(0x10), Datum::Mark(0x20000)]),
    );
}

fn maps(ruleset: &mut Ruleset) {
    use FieldType::{Iface, Ipv4, Ipv6, Port, Proto as Protocol};
    let endpoint = chain_name("endpoint-1");
    let mut put = |name: &str, set: Set| ruleset.put_set(set_name(name), set);
    put(
        "dispatch-1",
        Set::verdicts(
            SetKind::of(Iface).with_verdicts(),
            [
                (ifname("cali1"), Verdict::Goto(endpoint.clone())),
                (ifname("cali2"), Verdict::Jump(endpoint.clone())),
                (ifname("cali3"), Verdict::Drop),
                (ifname("cali4"), Verdict::Accept),
                (ifname("cali5"), Verdict::Return),
                (ifname("cali6"), Verdict::Continue),
            ],
        ),
    );
    put(
        "by-port-1",
        Set::verdicts(
            SetKind::of([Protocol, Port])
                .with_intervals()
                .with_verdicts(),
            [([Proto::TCP.into(), Field::from(80..=90)], Verdict::Accept)],
        ),
    );
    put(
        "by-source-1",
        Set::verdicts(
            SetKind::of(Ipv4).with_intervals().with_verdicts(),
            [
                (net("10.0.0.0/8"), Verdict::Goto(endpoint)),
                (net("11.0.0.0/8"), Verdict::Drop),
            ],
        ),
    );
    let data = |data: &[Datum]| Value::Data(data.into());
    let mut service = Set::new(SetKind::of([Ipv4, Protocol, Port]).with_data([Ipv4, Port]));
    let key = Key::from([v4("10.1.1.1").into(), Proto::TCP.into(), port(80)]);
    service
        .elements
        .insert(key, data(&[v4("10.2.2.2").into(), Datum::Port(8080)]));
    put("service-1", service);
    let mut floating = Set::new(SetKind::of(Ipv6).with_data(Ipv6));
    floating
        .elements
        .insert(v6("fd00::1").into(), data(&[v6("fd00::2").into()]));
    put("floating-6", floating);
}

/// Matches that older kernels (5.10) accept in prerouting chains only.
fn arrival_tests() -> Vec<Match> {
    let with_mark =
        |exists| [true, false].map(|with_mark| Match::ReversePath { exists, with_mark });
    [true, false].into_iter().flat_map(with_mark).collect()
}

/// Every match that any chain accepts.
pub fn tests() -> Vec<Match> {
    use Selector::*;
    let mut tests = vec![
        Match::iif_prefix(ifname("cali")),
        Match::NamePrefix(Oifname, CmpOp::Ne, ifname("cali")),
        Match::is(Iifname, ifname("eth0")),
        Match::not(Oifname, ifname("eth0")),
        Match::is(L4proto, Proto::TCP),
        Match::not(L4proto, Proto::SCTP),
        Match::is(L4proto, Proto(4)),
        Match::is(L4proto, Proto(200)),
        Match::is(Nfproto, Family::Ipv4),
        Match::is(Nfproto, Family::Ipv6),
        Match::is(Mark, Datum::Mark(0x10)),
        Match::MarkBits {
            mask: 0x00ff_0000,
            op: CmpOp::Eq,
            value: 0x0001_0000,
        },
        Match::MarkBits {
            mask: 0x00ff_0000,
            op: CmpOp::Ne,
            value: 0x0001_0000,
        },
        Match::MarkBits {
            mask: 0x0001_0000,
            op: CmpOp::Ne,
            value: 0,
        },
        Match::MarkBits {
            mask: u32::MAX,
            op: CmpOp::Eq,
            value: 7,
        },
        Match::is(EtherSaddr, Datum::Ether([0xee; 6])),
        Match::not(EtherSaddr, Datum::Ether([0xee; 6])),
        Match::LaterFragment,
    ];
    tests.extend(address_tests());
    tests.extend(transport_tests());
    tests.extend(state_tests());
    tests
}

fn address_tests() -> Vec<Match> {
    use Selector::*;
    let prefixes = [
        "10.0.0.1/32",
        "10.0.0.0/8",
        "10.0.0.0/9",
        "10.0.0.0/24",
        "10.0.0.0/31",
        "0.0.0.0/0",
    ];
    let prefixes6 = [
        "fd00::1/128",
        "fd00::/8",
        "fd00::/9",
        "2001:db8::/32",
        "2001:db8::/127",
    ];
    let mut tests: Vec<Match> = prefixes
        .iter()
        .map(|prefix| Match::is(Saddr4, net(prefix)))
        .collect();
    tests.extend(
        prefixes
            .iter()
            .map(|prefix| Match::not(Daddr4, net(prefix))),
    );
    tests.extend(
        prefixes6
            .iter()
            .map(|prefix| Match::is(Daddr6, net(prefix))),
    );
    tests.extend(
        prefixes6
            .iter()
            .map(|prefix| Match::not(Saddr6, net(prefix))),
    );
    tests.push(Match::is(Saddr4, addresses("10.0.0.1", "10.0.0.9")));
    tests.push(Match::not(Saddr4, addresses("10.0.0.1", "10.0.0.9")));
    tests
}

fn transport_tests() -> Vec<Match> {
    use Selector::*;
    let mut tests = Vec::new();
    for transport in [
        Transport::Any,
        Transport::Tcp,
        Transport::Udp,
        Transport::UdpLite,
        Transport::Sctp,
    ] {
        tests.push(Match::is(Dport(transport), port(80)));
        tests.push(Match::not(Dport(transport), port(80)));
        tests.push(Match::is(Sport(transport), 1000..=2000));
        tests.push(Match::not(Sport(transport), 1000..=2000));
    }
    tests.extend([0u8, 3, 8, 11, 200].map(|kind| Match::is(IcmpType, Datum::IcmpType(kind))));
    tests.extend([0u8, 1, 13, 200].map(|code| Match::is(IcmpCode, Datum::IcmpCode(code))));
    tests.extend(
        [1u8, 2, 128, 135, 136, 200].map(|kind| Match::is(Icmp6Type, Datum::Icmp6Type(kind))),
    );
    tests.extend([0u8, 1, 4, 200].map(|code| Match::not(Icmp6Code, Datum::Icmp6Code(code))));
    tests
}

fn state_tests() -> Vec<Match> {
    let types = [
        AddressType::Unicast,
        AddressType::Local,
        AddressType::Broadcast,
        AddressType::Multicast,
    ];
    let mut tests = vec![
        Match::CtState(CmpOp::Eq, CtState::ESTABLISHED | CtState::RELATED),
        Match::CtState(CmpOp::Eq, CtState::NEW),
        Match::CtState(CmpOp::Ne, CtState::INVALID | CtState::UNTRACKED),
        Match::CtState(CmpOp::Ne, CtState::INVALID),
        Match::CtDnat(CmpOp::Eq),
        Match::CtDnat(CmpOp::Ne),
    ];
    tests.extend(types.map(|kind| Match::AddressType(Side::Destination, CmpOp::Eq, kind)));
    tests.extend(types.map(|kind| Match::AddressType(Side::Source, CmpOp::Ne, kind)));
    tests
}

fn lookups() -> Vec<Rule> {
    use Selector::*;
    let ports = [L4proto, Dport(Transport::Any)];
    let accept = |test: Match| Rule::new().when(test).accept();
    let endpoint = || Verdict::Goto(chain_name("endpoint-1"));
    vec![
        accept(Match::in_set(Saddr4, &set_name("addresses-4"))),
        accept(Match::not_in_set(Daddr4, &set_name("nets-4"))),
        Rule::new()
            .when(Match::in_set(Saddr4, &set_name("addresses-4")))
            .when(Match::not_in_set(Daddr4, &set_name("nets-4")))
            .when(Match::is(Dport(Transport::Tcp), 443..=444))
            .counter()
            .accept(),
        accept(Match::in_set(Daddr6, &set_name("nets-6"))),
        accept(Match::in_set(Iifname, &set_name("interfaces-1"))),
        accept(Match::in_set(Mark, &set_name("marks-1"))),
        accept(Match::in_set(Dport(Transport::Udp), &set_name("ranges-1"))),
        accept(Match::in_set(ports, &set_name("ports-1"))),
        accept(Match::in_set(
            [Saddr4, L4proto, Dport(Transport::Any)],
            &set_name("peers-1"),
        )),
        accept(Match::any_of(L4proto, [Proto::TCP, Proto::UDP])),
        accept(Match::none_of(Iifname, [ifname("a"), ifname("b")])),
        accept(Match::any_of(
            Saddr4,
            [
                net("10.0.0.0/8"),
                v4("11.0.0.1").into(),
                addresses("12.0.0.0", "12.0.0.5"),
            ],
        )),
        accept(Match::none_of(Saddr6, [v6("fd00::1"), v6("fd00::2")])),
        accept(Match::any_of(
            Dport(Transport::Sctp),
            [port(5), Field::from(1000..=2000)],
        )),
        accept(Match::any_of(
            IcmpType,
            [Datum::IcmpType(0), Datum::IcmpType(8)],
        )),
        accept(Match::any_of(
            ports,
            [
                [Proto::TCP.into(), port(80)],
                [Proto::UDP.into(), Field::from(53..=54)],
            ],
        )),
        Rule::new().inline_vmap(
            CtState,
            [
                (set::CtState::ESTABLISHED, Verdict::Accept),
                (set::CtState::RELATED, Verdict::Accept),
                (set::CtState::INVALID, Verdict::Drop),
            ],
        ),
        Rule::new().vmap(Iifname, &set_name("dispatch-1")),
        Rule::new().vmap(ports, &set_name("by-port-1")),
        Rule::new().vmap(Saddr4, &set_name("by-source-1")),
        Rule::new().inline_vmap(
            [Iifname, Oifname],
            [([ifname("a").into(), ifname("b").into()], endpoint())],
        ),
        Rule::new()
            .when(Match::any_of(L4proto, [Proto::TCP, Proto::UDP]))
            .inline_vmap(
                Dport(Transport::Any),
                [
                    (port(80), endpoint()),
                    (Field::from(90..=99), Verdict::Drop),
                ],
            ),
    ]
}

fn actions() -> Vec<Rule> {
    let then = |statement| Rule::new().then(statement);
    let log = |target| {
        Statement::Log(Log {
            prefix: "calico-packet: ".to_owned(),
            target,
        })
    };
    let limit = |rate, unit, burst, over| {
        Statement::Limit(Limit {
            rate,
            unit,
            burst,
            over,
        })
    };
    let mark = |mask, value| Statement::MarkSet(MarkSet { mask, value });
    vec![
        Rule::new().counter(),
        then(log(LogTarget::Syslog(4))),
        then(log(LogTarget::Syslog(6))),
        then(log(LogTarget::Group {
            group: 5,
            snaplen: 0,
            queue_threshold: 0,
        })),
        then(log(LogTarget::Group {
            group: 6,
            snaplen: 100,
            queue_threshold: 10,
        })),
        then(limit(10, RateUnit::Second, Limit::DEFAULT_BURST, false)).accept(),
        then(limit(10, RateUnit::Minute, 20, true)).drop(),
        then(limit(3, RateUnit::Hour, 1, false)).drop(),
        then(limit(3, RateUnit::Day, 1, false)).drop(),
        then(mark(u32::MAX, 0x10)),
        then(mark(0x00ff_0000, 0)),
        then(mark(0x0001_0000, 0x0001_0000)),
        then(mark(0x00ff_0000, 0x0001_0000)),
        then(Statement::Reject(Reject::AdminProhibited)),
        then(Statement::Reject(Reject::PortUnreachable)),
        then(Statement::Reject(Reject::HostUnreachable)),
        then(Statement::Reject(Reject::NoRoute)),
        Rule::new()
            .when(Match::is(Selector::Dport(Transport::Tcp), port(81)))
            .then(Statement::Reject(Reject::TcpReset)),
        Rule::new().verdict(Verdict::Continue),
        Rule::new().jump(&chain_name("endpoint-2")),
        Rule::new()
            .when(Match::is(Selector::Mark, Datum::Mark(1)))
            .goto(&chain_name("endpoint-1")),
        Rule::new().ret(),
    ]
}

const fn base(kind: ChainType, hook: Hook, priority: i32, policy: ChainPolicy) -> Base {
    Base {
        kind,
        hook,
        priority,
        policy,
    }
}

fn bases(ruleset: &mut Ruleset) {
    let mut put = |name: &str, base, rules: Vec<Rule>| {
        ruleset.put_chain(chain_name(name), Chain::base(base, rules))
    };
    let notrack = Rule::new()
        .when(Match::is(Selector::Dport(Transport::Udp), port(4789)))
        .then(Statement::Notrack);
    let mut raw = vec![notrack];
    raw.extend(
        arrival_tests()
            .into_iter()
            .map(|test| Rule::new().when(test).accept()),
    );
    put(
        "raw-1",
        base(
            ChainType::Filter,
            Hook::Prerouting,
            -300,
            ChainPolicy::Accept,
        ),
        raw,
    );
    put(
        "mangle-1",
        base(
            ChainType::Filter,
            Hook::Postrouting,
            -149,
            ChainPolicy::Accept,
        ),
        vec![],
    );
    put(
        "input-1",
        base(ChainType::Filter, Hook::Input, 5, ChainPolicy::Accept),
        vec![Rule::new().jump(&chain_name("tests-1"))],
    );
    put(
        "forward-1",
        base(ChainType::Filter, Hook::Forward, -5, ChainPolicy::Drop),
        vec![Rule::new().jump(&chain_name("lookups-1"))],
    );
    put(
        "output-1",
        base(ChainType::Route, Hook::Output, -150, ChainPolicy::Accept),
        vec![],
    );
    put(
        "odd-1",
        base(ChainType::Filter, Hook::Output, 27, ChainPolicy::Accept),
        vec![],
    );
}
