//! Bytes and messages: what daemons send, what is malformed, and any bytes at all.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use data_encoding::HEXLOWER;
use ipnet::IpNet;
use margay_bgp::attributes::{
    Aggregator, AsPath, Attributes, Community, Family, LargeCommunity, NextHop, Origin, Segment,
    UnknownAttribute,
};
use margay_bgp::codec::{CodecContext, Framer, MAX_MESSAGE, decode, encode_update, end_of_rib};
use margay_bgp::message::{Message, Update};
use proptest::prelude::*;

const INTERNAL: CodecContext = CodecContext {
    four_octet_as: true,
    is_internal: true,
    ipv4: true,
    ipv6: true,
    extended_next_hop: false,
};
const EXTERNAL: CodecContext = CodecContext { is_internal: false, ..INTERNAL };

fn captured() -> Vec<(&'static str, Vec<u8>)> {
    let lines = include_str!("data/daemons.txt").lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, hex) = line.split_once(' ').expect("a name and bytes");
            (name, HEXLOWER.decode(hex.as_bytes()).expect("hexadecimal"))
        })
        .collect()
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn update(message: &[u8], context: &CodecContext) -> Update {
    match decode(message, context) {
        Ok(Message::Update(update)) => update,
        other => panic!("not an UPDATE: {other:?}"),
    }
}

/// Per daemon and kind of session: what its OPEN says, and which routes it announced with what.
#[test]
fn what_daemons_send_is_understood() {
    for (name, context) in [("64512", INTERNAL), ("65001", EXTERNAL)] {
        for daemon in ["bird", "frr", "gobgp"] {
            let peer = format!("{daemon}-{name}");
            let (mut routes, mut ends, mut opens) = (BTreeSet::new(), BTreeSet::new(), 0);
            for (_, bytes) in captured().into_iter().filter(|(from, _)| *from == peer) {
                match decode(&bytes, &context).expect("a message") {
                    Message::Open(open) => {
                        opens += 1;
                        assert_eq!((open.asn, open.router_id), (64512, Ipv4Addr::new(10, 9, 0, 1)));
                        let known = open.capabilities;
                        assert_eq!(known.families, Family::ALL.into(), "{peer}");
                        assert!(known.four_octet_as && known.route_refresh, "{peer}");
                        assert_eq!(known.enhanced_route_refresh, daemon != "gobgp", "{peer}");
                        assert_eq!(known.graceful_restart.is_some(), daemon != "gobgp", "{peer}");
                        let restarting =
                            known.graceful_restart.is_some_and(|each| each.is_restarting);
                        assert_eq!(restarting, daemon == "frr", "{peer}");
                    }
                    Message::Update(update) => {
                        assert_eq!(update.errors, Vec::<String>::new(), "{peer}");
                        ends.extend(update.end_of_rib);
                        for (attributes, nets) in update.announced {
                            let path = attributes.as_path.to_string();
                            assert_eq!(path, if name == "65001" { "64512" } else { "" }, "{peer}");
                            assert_eq!(attributes.local_pref.is_some(), name == "64512", "{peer}");
                            routes.extend(nets.into_iter().map(|net| {
                                let large = attributes.large_communities.iter();
                                (net, large.map(ToString::to_string).collect::<Vec<_>>().join(" "))
                            }));
                        }
                    }
                    Message::Keepalive => {}
                    other => panic!("{peer}: {other:?}"),
                }
            }
            assert_eq!(opens, 1, "{peer}");
            let large = "64512:1:2".to_owned();
            assert!(routes.contains(&(net("192.0.2.0/24"), large.clone())), "{peer}: {routes:?}");
            let nets: BTreeSet<IpNet> = routes.iter().map(|(net, _)| *net).collect();
            let all = ["192.0.2.0/24", "198.51.100.0/25", "203.0.113.7/32", "2001:db8:1::/48"];
            assert_eq!(nets, all.into_iter().map(net).collect(), "{peer}");
            assert_eq!(ends.len(), if daemon == "gobgp" { 0 } else { 2 }, "{peer}");
        }
    }
}

/// An UPDATE of attributes as hexadecimal, and prefixes of IPv4.
fn raw_update(attributes: &str, nlri: &str) -> Vec<u8> {
    let hex = |text: &str| HEXLOWER.decode(text.replace(' ', "").as_bytes()).expect("hexadecimal");
    let (attributes, nlri) = (hex(attributes), hex(nlri));
    let length = u16::try_from(23 + attributes.len() + nlri.len()).expect("a short message");
    let attributes_length = u16::try_from(attributes.len()).expect("short");
    let mut message = vec![255; 16];
    message.extend(length.to_be_bytes());
    message.extend([2, 0, 0]);
    message.extend(attributes_length.to_be_bytes());
    message.extend(attributes);
    message.extend(nlri);
    message
}

const ORIGIN: &str = "40010100";
const PATH: &str = "400206 0201 0000fde9";
const HOP: &str = "400304 0a090001";

/// RFC 7606: which malformed attributes withdraw the routes, are left out, or end the session.
#[test]
fn what_is_malformed_has_the_consequence_of_its_attribute() {
    let good = format!("{ORIGIN}{PATH}{HOP}");
    let rows = [
        ("nothing", good.clone(), "announced"),
        ("ORIGIN 3", format!("40010103{PATH}{HOP}"), "withdrawn"),
        ("ORIGIN of two bytes", format!("4001020000{PATH}{HOP}"), "withdrawn"),
        ("no ORIGIN", format!("{PATH}{HOP}"), "withdrawn"),
        ("no AS_PATH", format!("{ORIGIN}{HOP}"), "withdrawn"),
        ("no NEXT_HOP", format!("{ORIGIN}{PATH}"), "withdrawn"),
        ("NEXT_HOP of three bytes", format!("{ORIGIN}{PATH}4003030a0900"), "withdrawn"),
        ("segment beyond AS_PATH", format!("{ORIGIN}400206 0202 0000fde9{HOP}"), "withdrawn"),
        ("MED of three bytes", format!("{good}800403000001"), "withdrawn"),
        ("COMMUNITIES of three bytes", format!("{good}c00803000001"), "withdrawn"),
        ("LARGE_COMMUNITIES of four bytes", format!("{good}c0200400000001"), "withdrawn"),
        ("ATOMIC_AGGREGATE with a value", format!("{good}40060101"), "announced, told"),
        // It is left out as RFC 4271 has it, without a word.
        ("LOCAL_PREF from outside", format!("{good}40050400000064"), "announced"),
        ("attribute beyond the message", format!("{good}c008ff00"), "withdrawn"),
        ("MP_REACH_NLRI cut", format!("{good}800e050001011001"), "session"),
    ];
    for (what, attributes, expected) in rows {
        let message = raw_update(&attributes, "18c00002");
        let found = match decode(&message, &EXTERNAL) {
            Err(error) => {
                assert_eq!(error.notification.code, 3, "{what}");
                "session".to_owned()
            }
            Ok(Message::Update(update)) => {
                let told = if update.errors.is_empty() { "" } else { ", told" };
                match (update.announced.is_empty(), update.withdrawn.is_empty()) {
                    (false, true) => {
                        assert_eq!(update.announced[0].0.local_pref, None, "{what}");
                        format!("announced{told}")
                    }
                    (true, false) => "withdrawn".to_owned(),
                    _ => format!("{update:?}"),
                }
            }
            Ok(other) => format!("{other:?}"),
        };
        assert_eq!(found, expected, "{what}");
    }
}

#[test]
fn prefixes_that_cannot_be_read_end_the_session() {
    let good = format!("{ORIGIN}{PATH}{HOP}");
    for nlri in ["21c0000201", "18c000", "ff"] {
        let error = decode(&raw_update(&good, nlri), &EXTERNAL).unwrap_err();
        assert_eq!(error.notification.codes(), (3, 10), "{nlri}");
    }
}

#[test]
fn headers_that_are_none_are_told_by_their_codes() {
    let header = |marker: u8, length: u16, kind: u8| {
        let mut header = vec![marker; 16];
        header.extend(length.to_be_bytes());
        header.push(kind);
        header
    };
    let rows = [
        (header(0, 19, 4), (1, 1)),
        (header(255, 18, 4), (1, 2)),
        (header(255, 4097, 2), (1, 2)),
        (header(255, 19, 9), (1, 3)),
    ];
    for (bytes, codes) in rows {
        let error = Framer::default().push(&bytes, &mut |_| true).unwrap_err();
        assert_eq!(error.notification.codes(), codes, "{error}");
    }
    let refresh = [header(255, 20, 5), vec![0]].concat();
    assert_eq!(decode(&refresh, &EXTERNAL).unwrap_err().notification.codes(), (7, 1));
}

#[test]
fn families_that_were_not_agreed_on_are_left_out() {
    let only_ipv6 = CodecContext { ipv4: false, ..INTERNAL };
    let message = raw_update(&format!("{ORIGIN}400200{HOP}"), "18c00002");
    let found = update(&message, &only_ipv6);
    assert!(found.announced.is_empty() && found.withdrawn.is_empty());
    // IPv4 by MP_REACH_NLRI over IPv6 is taken if RFC 8950 was agreed on, and withdrawn if not.
    let over =
        format!("{ORIGIN}400200 800e19 000101 10 20010db8000000000000000000000001 00 18c00002");
    let found = update(&raw_update(&over, ""), &INTERNAL);
    assert_eq!((found.withdrawn, found.errors.len()), (vec![net("192.0.2.0/24")], 1));
    let agreed = CodecContext { extended_next_hop: true, ..INTERNAL };
    let found = update(&raw_update(&over, ""), &agreed);
    assert_eq!(found.announced[0].1, [net("192.0.2.0/24")]);
    assert!(found.announced[0].0.next_hop.address.is_ipv6());
}

#[test]
fn the_end_of_a_table_is_marked_per_family() {
    for family in Family::ALL {
        let found = update(&end_of_rib(family), &INTERNAL);
        assert_eq!(found, Update { end_of_rib: Some(family), ..Update::default() });
    }
}

#[test]
fn a_table_is_packed_and_what_cannot_be_sent_is_counted() {
    let nets: Vec<IpNet> = (0..5000u32)
        .map(|index| IpNet::new(Ipv4Addr::from(0x0a00_0000 + (index << 8)).into(), 24).expect("24"))
        .collect();
    let mut attributes = Attributes::local(Ipv4Addr::new(10, 9, 0, 1).into());
    let mut out = Vec::new();
    assert_eq!(encode_update(Some(&attributes), &nets, &INTERNAL, &mut out), 0);
    // A prefix takes four bytes, and a message holds 4096 with less than 60 of other things.
    assert!(out.len() < 4 * nets.len() + 5 * 60, "{}", out.len());
    let mut found = Vec::new();
    let mut framer = Framer::default();
    framer
        .push(&out, &mut |message| {
            assert!(message.len() <= MAX_MESSAGE);
            found.extend(update(message, &INTERNAL).announced.remove(0).1);
            true
        })
        .expect("messages");
    assert_eq!((found, framer.held()), (nets.clone(), 0));
    attributes.communities = (0..1500).map(Community).collect();
    out.clear();
    assert_eq!(encode_update(Some(&attributes), &nets, &INTERNAL, &mut out), nets.len());
    assert!(out.is_empty());
}

fn any_net() -> impl Strategy<Value = IpNet> {
    let ipv4 = (any::<u32>(), 0u8..=32)
        .prop_map(|(address, length)| IpNet::new(Ipv4Addr::from(address).into(), length));
    let ipv6 = (any::<u128>(), 0u8..=128)
        .prop_map(|(address, length)| IpNet::new(Ipv6Addr::from(address).into(), length));
    prop_oneof![ipv4, ipv6].prop_map(|net| net.expect("a length of the family").trunc())
}

fn any_attributes() -> impl Strategy<Value = Attributes> {
    let asn = 1u32..u32::MAX;
    let path = prop::collection::vec(prop::collection::vec(asn.clone(), 1..300), 0..3);
    let communities = prop::collection::btree_set(any::<u32>(), 0..5);
    let large = prop::collection::btree_set(any::<[u32; 3]>(), 0..5);
    let options =
        (any::<Option<u32>>(), any::<Option<u32>>(), any::<bool>(), prop::option::of(asn));
    let reflected = (any::<Option<u32>>(), prop::collection::vec(any::<u32>(), 0..4));
    let unknown = prop::option::of(prop::collection::vec(any::<u8>(), 0..300));
    (path, communities, large, options, reflected, unknown, 0usize..3).prop_map(
        |(
            path,
            communities,
            large,
            (med, local_pref, atomic, customer),
            reflected,
            unknown,
            origin,
        )| {
            let mut attributes = Attributes::local(Ipv4Addr::new(10, 9, 0, 1).into());
            attributes.origin = [Origin::Igp, Origin::Egp, Origin::Incomplete][origin];
            attributes.as_path = AsPath(
                path.iter()
                    .flat_map(|asns| asns.chunks(255))
                    .map(|c| Segment::Sequence(c.to_vec()))
                    .collect(),
            );
            attributes.communities = communities.into_iter().map(Community).collect();
            attributes.large_communities = large.into_iter().map(LargeCommunity).collect();
            attributes.med = med;
            attributes.local_pref = local_pref;
            attributes.atomic_aggregate = atomic;
            attributes.only_to_customer = customer;
            attributes.aggregator =
                customer.map(|asn| Aggregator { asn, router_id: Ipv4Addr::new(1, 2, 3, 4) });
            attributes.originator_id = reflected.0.map(Ipv4Addr::from);
            attributes.cluster_list = reflected.1.into_iter().map(Ipv4Addr::from).collect();
            attributes.unknown = unknown
                .map(|value| UnknownAttribute { flags: 0xe0, code: 213, value })
                .into_iter()
                .collect();
            attributes
        },
    )
}

/// The flag of a length of two octets says nothing about the attribute.
fn without_lengths(mut attributes: Attributes) -> Attributes {
    attributes.unknown.iter_mut().for_each(|each| each.flags &= !0x10);
    attributes
}

proptest! {
    /// What is written is read again, in whatever pieces it arrives.
    #[test]
    fn updates_survive_the_wire(
        attributes in any_attributes(),
        nets in prop::collection::btree_set(any_net(), 1..60),
        cuts in prop::collection::vec(1usize..700, 1..40),
    ) {
        let (ipv4, ipv6): (Vec<IpNet>, Vec<IpNet>) =
            nets.into_iter().partition(|net| Family::of(net) == Family::Ipv4);
        let mut over_ipv6 = attributes.clone();
        over_ipv6.next_hop = NextHop {
            address: IpAddr::V6("2001:db8::1".parse().unwrap()),
            link_local: Some("fe80::1".parse().unwrap()),
        };
        let mut bytes = Vec::new();
        prop_assert_eq!(encode_update(Some(&attributes), &ipv4, &INTERNAL, &mut bytes), 0);
        prop_assert_eq!(encode_update(Some(&over_ipv6), &ipv6, &INTERNAL, &mut bytes), 0);
        prop_assert_eq!(encode_update(None, &ipv4, &INTERNAL, &mut bytes), 0);
        prop_assert_eq!(encode_update(None, &ipv6, &INTERNAL, &mut bytes), 0);
        let (mut announced, mut withdrawn, mut framer) = (Vec::new(), Vec::new(), Framer::default());
        let (mut rest, mut cuts) = (bytes.as_slice(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            rest = later;
            let pushed = framer.push(piece, &mut |message| {
                let found = update(message, &INTERNAL);
                assert_eq!(found.errors, Vec::<String>::new());
                for (attributes, nets) in found.announced {
                    announced.extend(nets.into_iter().map(|net| (net, without_lengths(attributes.clone()))));
                }
                withdrawn.extend(found.withdrawn);
                true
            });
            prop_assert!(pushed.is_ok());
            prop_assert!(framer.held() < MAX_MESSAGE);
        }
        let expected: Vec<(IpNet, Attributes)> = ipv4
            .iter()
            .map(|net| (*net, attributes.clone()))
            .chain(ipv6.iter().map(|net| (*net, over_ipv6.clone())))
            .map(|(net, attributes)| (net, without_lengths(attributes)))
            .collect();
        prop_assert_eq!(announced, expected);
        prop_assert_eq!(withdrawn, [ipv4, ipv6].concat());
    }

    /// Nothing that a peer sends ends the process.
    #[test]
    fn any_change_of_a_message_is_read_or_refused(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..6),
    ) {
        let messages = captured();
        let mut bytes = which.get(&messages).1.clone();
        for (at, byte, kind) in changes {
            let at = 19 + at.index(bytes.len().saturating_sub(18)).min(bytes.len() - 19);
            match kind {
                0 if at < bytes.len() => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => bytes.truncate(at.max(19)),
            }
        }
        let length = u16::try_from(bytes.len()).unwrap();
        bytes[16..18].copy_from_slice(&length.to_be_bytes());
        for context in [INTERNAL, EXTERNAL, CodecContext { four_octet_as: false, ..EXTERNAL }] {
            if let Err(error) = decode(&bytes, &context) {
                prop_assert!((1..=7).contains(&error.notification.code), "{}", error);
            }
        }
    }
}
