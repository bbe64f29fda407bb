//! Routes between speakers: what is chosen, what goes on, and with which attributes.

mod net;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use margay_bgp::attributes::{Attributes, Community, Family};
use margay_bgp::codec;
use margay_bgp::config::{NextHopMode, PeerConfig};
use margay_bgp::export::ExportPolicy;
use margay_bgp::filter::{FilterAction, FilterRule, MatchOperator, PrefixMatch, RouteOperation};
use margay_bgp::message::{RefreshKind, Role};
use margay_bgp::rib::{LocalRoute, NextHopInfo};
use margay_bgp::session::State;
use net::{Net, address, id};
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);
const ROUTE: &str = "10.65.0.0/26";

/// A net of these autonomous systems, with sessions between these nodes that both sides change as
/// the function says: it gets the node and its peer.
fn build(
    seed: u64,
    asns: &[u32],
    links: &[(usize, usize)],
    change: impl Fn(usize, usize, &mut PeerConfig),
) -> Net {
    let mut net = Net::new(seed);
    for asn in asns {
        net.add(*asn, |_| {});
    }
    for (one, other) in links {
        for (node, peer) in [(*one, *other), (*other, *one)] {
            let mut config = net.config(peer, asns[peer]);
            change(node, peer, &mut config);
            net.peer(node, peer, config);
        }
    }
    for (one, other) in links {
        net.until("sessions", |net| {
            [net.state(*one, *other), net.state(*other, *one)] == [State::Established; 2]
        });
    }
    net
}

fn sent(net: &Net, node: usize, peer: usize, route: &str) -> Option<Attributes> {
    let route = net::net(route);
    let mut routes = net.nodes[node].speaker.routes_sent(id(peer));
    routes
        .find(|(net, _)| **net == route)
        .map(|(_, attributes)| (**attributes).clone())
}

fn next_hops(net: &Net, node: usize, route: &str) -> Vec<IpAddr> {
    let found = net.nodes[node].kernel.get(&net::net(route));
    found.map_or_else(Vec::new, |route| {
        route.next_hops.iter().map(|hop| hop.address).collect()
    })
}

/// 0 and 1 are of one system, 2 of another one, beyond 1.
#[test]
fn attributes_change_at_the_border_of_a_system() {
    let mut net = build(3, &[64512, 64512, 65001], &[(0, 1), (1, 2)], |_, _, _| {});
    net.announce(0, ROUTE);
    net.announce(2, "10.65.2.0/26");
    net.run(SECOND);
    let within = sent(&net, 0, 1, ROUTE).unwrap();
    assert_eq!(
        (within.local_pref, within.as_path.to_string()),
        (Some(100), String::new())
    );
    assert_eq!(within.next_hop.address, address(0));
    let out = sent(&net, 1, 2, ROUTE).unwrap();
    assert_eq!(
        (out.local_pref, out.as_path.to_string()),
        (None, "64512".to_owned())
    );
    assert_eq!(out.next_hop.address, address(1));
    let inwards = sent(&net, 1, 0, "10.65.2.0/26").unwrap();
    assert_eq!(
        (inwards.local_pref, inwards.as_path.to_string()),
        (Some(100), "65001".to_owned())
    );
    // Within the system the next hop is the neighbour's.
    assert_eq!(inwards.next_hop.address, address(2));
    assert_eq!(next_hops(&net, 0, "10.65.2.0/26"), [address(2)]);
    assert_eq!(next_hops(&net, 2, ROUTE), [address(1)]);
    assert!(net.kernel(1).len() == 2 && sent(&net, 2, 1, ROUTE).is_none());
}

#[test]
fn the_next_hop_is_what_the_mode_says() {
    let rows = [
        (NextHopMode::Auto, [64512, 64512], 2, 1),
        (NextHopMode::Own, [64512, 64512], 1, 1),
        (NextHopMode::Keep, [64512, 64512], 2, 1),
        (NextHopMode::Auto, [64512, 65009], 1, 1),
        (NextHopMode::Keep, [64512, 65009], 2, 1),
    ];
    for (mode, asns, of_others, own) in rows {
        let net = &mut build(
            5,
            &[asns[1], asns[0], 65001],
            &[(0, 1), (1, 2)],
            |node, peer, config| {
                if (node, peer) == (1, 0) {
                    config.next_hop_mode = mode;
                }
            },
        );
        net.announce(2, "10.65.2.0/26");
        net.announce(1, ROUTE);
        net.run(SECOND);
        let hops = (next_hops(net, 0, "10.65.2.0/26"), next_hops(net, 0, ROUTE));
        assert_eq!(
            hops,
            (vec![address(of_others)], vec![address(own)]),
            "{mode:?} {asns:?}"
        );
    }
}

/// 0 reflects; 1 and 2 are its clients, 3 and 4 are not.
#[test]
fn a_reflector_passes_on_what_comes_from_or_goes_to_clients() {
    let links = [(0, 1), (0, 2), (0, 3), (0, 4)];
    let mut net = build(7, &[64512; 5], &links, |node, peer, config| {
        config.is_reflector_client = node == 0 && (peer == 1 || peer == 2);
    });
    for node in 1..5 {
        net.announce(node, &format!("10.65.{node}.0/26"));
    }
    net.run(SECOND);
    let routes = |nodes: &[usize]| -> Vec<String> {
        nodes
            .iter()
            .map(|node| format!("10.65.{node}.0/26"))
            .collect()
    };
    assert_eq!(net.kernel(1), routes(&[2, 3, 4]));
    assert_eq!(net.kernel(2), routes(&[1, 3, 4]));
    assert_eq!(net.kernel(3), routes(&[1, 2]));
    assert_eq!(net.kernel(4), routes(&[1, 2]));
    let reflected = sent(&net, 0, 2, "10.65.1.0/26").unwrap();
    assert_eq!(reflected.originator_id.map(IpAddr::from), Some(address(1)));
    assert_eq!(
        reflected.cluster_list,
        [[10, 9, 0, 1]].map(std::net::Ipv4Addr::from)
    );
    assert_eq!(reflected.next_hop.address, address(1));
}

/// Two reflectors of one client, which are each other's clients: nothing goes round.
#[test]
fn what_has_been_reflected_here_is_not_taken_again() {
    let mut net = build(
        9,
        &[64512; 3],
        &[(0, 1), (0, 2), (1, 2)],
        |node, _, config| {
            config.is_reflector_client = node < 2;
        },
    );
    net.announce(2, ROUTE);
    net.run(SECOND);
    assert!((0..2).all(|node| next_hops(&net, node, ROUTE) == [address(2)]));
    net.withdraw(2, ROUTE);
    net.run(SECOND);
    assert!((0..3).all(|node| net.kernel(node).is_empty()));
}

/// 0 has the same route of two routers: both next hops, the better one alone, what is left.
#[test]
fn equal_paths_go_to_the_kernel_together() {
    let mut net = build(
        11,
        &[64512, 65001, 65001],
        &[(0, 1), (0, 2)],
        |_, _, config| {
            config.restart_time = None;
        },
    );
    for router in 1..3 {
        net.announce(router, ROUTE);
    }
    net.run(SECOND);
    assert_eq!(next_hops(&net, 0, ROUTE), [address(1), address(2)]);
    let moment = net.moment();
    let far = NextHopInfo {
        metric: 10,
        ..NextHopInfo::default()
    };
    net.nodes[0]
        .speaker
        .set_next_hop(address(1), Some(Some(far)), moment);
    net.run(SECOND);
    assert_eq!(next_hops(&net, 0, ROUTE), [address(2)]);
    let moment = net.moment();
    net.nodes[0]
        .speaker
        .set_next_hop(address(2), Some(None), moment);
    net.run(SECOND);
    assert_eq!(next_hops(&net, 0, ROUTE), [address(1)]);
    let moment = net.moment();
    net.nodes[0].speaker.set_next_hop(address(1), None, moment);
    net.nodes[0].speaker.set_next_hop(address(2), None, moment);
    net.run(SECOND);
    assert_eq!(next_hops(&net, 0, ROUTE).len(), 2);
    assert_eq!(
        net.nodes[0].speaker.next_hops(),
        [address(1), address(2)].into()
    );
    net.unreachable.insert(1);
    net.cut(0, 1);
    net.run(SECOND);
    assert_eq!(next_hops(&net, 0, ROUTE), [address(2)]);
}

#[test]
fn filters_act_at_once_on_what_is_there() {
    let mut net = build(13, &[64512, 65001], &[(0, 1)], |_, _, _| {});
    net.announce(0, ROUTE);
    net.announce(1, "10.65.1.0/26");
    net.run(SECOND);
    let ends = |net: &Net| {
        net.nodes[0]
            .log
            .iter()
            .filter(|line| line.contains("Ended"))
            .count()
    };
    let before = ends(&net);
    let within = |cidr: &str, action| FilterRule {
        prefix: PrefixMatch::new(net::net(cidr), MatchOperator::In, None, None).ok(),
        ..FilterRule::new(action)
    };
    let mut config = net.config(1, 65001);
    config.import.ipv4 = vec![within("10.65.1.0/24", FilterAction::Reject)];
    let community = "64512:7:9".parse().unwrap();
    let operations = vec![
        RouteOperation::AddCommunity(community),
        RouteOperation::PrependAsPath(vec![64512, 64512]),
    ];
    config.export.ipv4 = vec![within("10.65.0.0/24", FilterAction::Accept(operations))];
    config.communities.insert(Community(0xfc00_0001));
    net.peer(0, 1, config.clone());
    net.run(SECOND);
    assert!(net.kernel(0).is_empty());
    let out = sent(&net, 0, 1, ROUTE).unwrap();
    assert_eq!(out.as_path.to_string(), "64512 64512 64512");
    assert!(out.has_community(community) && out.communities.contains(&Community(0xfc00_0001)));
    assert_eq!(net.kernel(1), [ROUTE]);
    let set = FilterAction::Accept(vec![RouteOperation::SetPriority(512)]);
    config.import.ipv4 = vec![within("10.65.1.0/24", set)];
    config.export.ipv4 = vec![within("10.65.0.0/24", FilterAction::Reject)];
    net.peer(0, 1, config.clone());
    net.run(SECOND);
    assert_eq!(net.nodes[0].kernel[&net::net("10.65.1.0/26")].priority, 512);
    assert!(net.kernel(1).is_empty());
    // What is outside the pools goes if a filter says so.
    net.announce(0, "192.0.2.0/24");
    net.run(SECOND);
    assert!(net.kernel(1).is_empty());
    config.export.ipv4 = vec![within("192.0.2.0/24", FilterAction::Accept(Vec::new()))];
    net.peer(0, 1, config);
    net.run(SECOND);
    assert_eq!(net.kernel(1), [ROUTE, "192.0.2.0/24"]);
    assert_eq!(ends(&net), before);
}

#[test]
fn rules_of_the_node_change_what_goes_out() {
    let mut net = build(15, &[64512, 65001], &[(0, 1)], |_, _, _| {});
    net.announce(0, ROUTE);
    net.announce(0, "10.65.0.7/32");
    net.run(SECOND);
    assert_eq!(net.kernel(1), [ROUTE, "10.65.0.7/32"]);
    let mut policy = ExportPolicy::default();
    policy.pools.insert(net::net("10.65.0.0/16"), true);
    policy.blocks.insert(net::net(ROUTE), true);
    policy
        .communities
        .insert(net::net(ROUTE), ["64512:5".parse().unwrap()].into());
    let moment = net.moment();
    net.nodes[0]
        .speaker
        .set_export_policy(policy.clone(), moment);
    net.run(SECOND);
    assert_eq!(net.kernel(1), [ROUTE]);
    assert!(
        sent(&net, 0, 1, ROUTE)
            .unwrap()
            .has_community("64512:5".parse().unwrap())
    );
    // A pod that moves is announced beside the block, by its smaller metric.
    let moment = net.moment();
    let route = LocalRoute {
        net: net::net("10.65.0.7/32"),
        interface: None,
        priority: Some(512),
    };
    net.nodes[0].speaker.announce(route, moment);
    net.run(SECOND);
    assert_eq!(net.kernel(1), [ROUTE, "10.65.0.7/32"]);
    policy.blocks.insert(net::net(ROUTE), false);
    policy.pools.insert(net::net("10.65.0.0/16"), false);
    let moment = net.moment();
    net.nodes[0].speaker.set_export_policy(policy, moment);
    net.run(SECOND);
    assert!(net.kernel(1).is_empty());
}

#[test]
fn services_of_peers_stay_out_of_the_kernel_and_go_on() {
    let mut net = build(17, &[64512, 65001, 65002], &[(0, 1), (0, 2)], |_, _, _| {});
    for node in 0..2 {
        let mut policy = ExportPolicy::default();
        policy.services.insert(net::net("10.96.0.0/12"), ());
        policy.service_ranges.insert(net::net("10.96.0.0/12"), ());
        let moment = net.moment();
        net.nodes[node].speaker.set_export_policy(policy, moment);
    }
    net.announce(1, "10.96.0.0/12");
    net.run(SECOND);
    assert!(net.kernel(0).is_empty());
    assert_eq!(net.kernel(2), ["10.96.0.0/12"]);
}

#[test]
fn well_known_communities_are_obeyed() {
    let rows = [
        (0xffff_ff01, [true, false]),
        (0xffff_ff03, [true, false]),
        (0xffff_ff02, [false; 2]),
    ];
    for (community, expected) in rows {
        let mut net = build(
            19,
            &[64512, 64512, 65001, 65002],
            &[(0, 1), (0, 2), (0, 3)],
            |node, peer, config| {
                if (node, peer) == (3, 0) {
                    config.communities.insert(Community(community));
                }
            },
        );
        net.announce(3, "10.65.3.0/26");
        net.run(SECOND);
        let has = [1, 2].map(|node| !net.kernel(node).is_empty());
        assert_eq!(has, expected, "{community:x}");
        assert_eq!(net.kernel(0).len(), 1);
    }
}

/// 1 is a customer of 0 and of 2: what it has of one does not go to the other (RFC 9234).
#[test]
fn roles_keep_routes_from_leaking() {
    let mut net = build(
        21,
        &[65010, 65020, 65030, 65040],
        &[(0, 1), (1, 2), (1, 3)],
        |node, peer, config| {
            config.role = Some(match (node, peer) {
                (1, 3) => Role::Provider,
                (3, 1) | (1, _) => Role::Customer,
                _ => Role::Provider,
            });
        },
    );
    net.announce(0, ROUTE);
    net.announce(3, "10.65.3.0/26");
    net.run(SECOND);
    assert!(net.kernel(1).contains(&ROUTE.to_owned()));
    assert_eq!(net.kernel(2), ["10.65.3.0/26"]);
    assert_eq!(net.kernel(3), [ROUTE]);
    assert_eq!(
        sent(&net, 0, 1, ROUTE).unwrap().only_to_customer,
        Some(65010)
    );
}

#[test]
fn our_own_number_in_a_path_is_taken_as_often_as_is_allowed() {
    for (allowed, prepended, expected) in [(0, 0usize, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1)] {
        // 0 and 2 are of one system, with 1 of another one between them.
        let mut net = build(
            23,
            &[64512, 65001, 64512],
            &[(0, 1), (1, 2)],
            |node, _, config| {
                if node == 2 {
                    config.allowed_local_asn = allowed;
                }
                if node == 0 {
                    let operations = vec![RouteOperation::PrependAsPath(vec![64512; prepended])];
                    let action = FilterAction::Accept(if prepended > 0 {
                        operations
                    } else {
                        Vec::new()
                    });
                    config.export.ipv4 = vec![FilterRule::new(action)];
                }
            },
        );
        net.announce(0, ROUTE);
        net.run(SECOND);
        assert_eq!(net.kernel(2).len(), expected, "{allowed} {prepended}");
        assert_eq!(net.kernel(1), [ROUTE]);
    }
}

#[test]
fn a_path_that_begins_with_another_system_is_refused_if_asked_for() {
    for (enforces, expected) in [(false, 1), (true, 0)] {
        let mut net = build(25, &[64512, 65001], &[(0, 1)], |_, _, config| {
            config.enforce_first_as = enforces;
        });
        net.announce(1, ROUTE);
        net.run(SECOND);
        // The same with 65009 in front.
        let attributes = {
            let mut attributes = sent(&net, 1, 0, ROUTE).unwrap();
            attributes.as_path.prepend(&[65009]);
            attributes
        };
        let context = codec::Context {
            four_octet_as: true,
            is_internal: false,
            ipv4: true,
            ipv6: true,
            extended_next_hop: false,
        };
        let mut bytes = Vec::new();
        codec::encode_update(Some(&attributes), &[net::net(ROUTE)], &context, &mut bytes);
        net.inject(0, 1, &bytes);
        net.run(SECOND);
        assert_eq!(net.kernel(0).len(), expected);
        assert_eq!(net.has_logged(0, "does not begin with AS 65001"), enforces);
    }
}

#[test]
fn routes_are_sent_again_when_asked_for() {
    let mut net = build(27, &[64512, 64512], &[(0, 1)], |_, _, _| {});
    net.announce(1, ROUTE);
    net.run(SECOND);
    let updates = |net: &Net| net.nodes[0].speaker.status(id(1)).unwrap().updates;
    let before = updates(&net);
    let moment = net.moment();
    assert!(
        net.nodes[0]
            .speaker
            .request_refresh(id(1), Family::Ipv4, moment)
    );
    assert!(
        !net.nodes[0]
            .speaker
            .request_refresh(id(1), Family::Ipv6, moment)
    );
    net.run(SECOND);
    assert_eq!(updates(&net), before + 1);
    // Between its markers a refresh is the whole table: what is not in it goes (RFC 7313).
    net.inject(0, 1, &codec::refresh(Family::Ipv4, RefreshKind::Begin));
    net.run(SECOND);
    assert_eq!(net.kernel(0), [ROUTE]);
    net.inject(0, 1, &codec::refresh(Family::Ipv4, RefreshKind::End));
    net.run(SECOND);
    assert!(net.kernel(0).is_empty());
    // Without a beginning an end means nothing.
    let moment = net.moment();
    net.nodes[0]
        .speaker
        .request_refresh(id(1), Family::Ipv4, moment);
    net.run(SECOND);
    net.inject(0, 1, &codec::refresh(Family::Ipv4, RefreshKind::End));
    net.run(SECOND);
    assert_eq!(net.kernel(0), [ROUTE]);
}

/// A peer that takes nothing costs one entry per prefix, and gets the latest.
#[test]
fn changes_merge_while_a_peer_is_slow() {
    let mut net = build(29, &[64512, 64512], &[(0, 1)], |_, _, _| {});
    net.hold(0, 1, true);
    for round in 0..200 {
        for index in 0..10 {
            let text = format!("10.65.{index}.0/26");
            if (round + index) % 2 == 0 {
                net.announce(0, &text)
            } else {
                net.withdraw(0, &text)
            }
        }
        net.run(Duration::from_millis(10));
    }
    let before = net.nodes[1].speaker.status(id(0)).unwrap().updates;
    net.hold(0, 1, false);
    net.run(SECOND);
    let expected: Vec<String> = (1..10)
        .step_by(2)
        .map(|index| format!("10.65.{index}.0/26"))
        .collect();
    assert_eq!(net.kernel(1), expected);
    assert!(net.nodes[1].speaker.status(id(0)).unwrap().updates - before <= 2);
}

/// IPv6 routes over a session of IPv4 have the next hop that is configured, and do not go without.
#[test]
fn routes_of_the_other_family_need_a_next_hop_of_their_own() {
    for own in [None, Some("fd00:9::1")] {
        let mut net = build(31, &[64512, 64512], &[(0, 1)], |node, _, config| {
            config.families = Family::ALL.into();
            if let (0, Some(own)) = (node, own) {
                config
                    .own_next_hops
                    .insert(Family::Ipv6, own.parse().unwrap());
            }
        });
        net.announce(0, "fd00:65::/122");
        net.run(SECOND);
        let expected: Vec<IpAddr> = own.map(|own| own.parse().unwrap()).into_iter().collect();
        assert_eq!(next_hops(&net, 1, "fd00:65::/122"), expected);
    }
}

#[test]
fn a_large_table_arrives_whole() {
    let mut net = build(33, &[64512, 64512], &[(0, 1)], |_, _, _| {});
    for index in 0..3000u32 {
        net.announce(0, &format!("10.65.{}.{}/32", index >> 8, index & 255));
    }
    net.run(SECOND);
    assert_eq!(net.kernel(1).len(), 3000);
    let status = net.nodes[1].speaker.status(id(0)).unwrap();
    assert_eq!(status.received, [3000, 0]);
    net.cut(0, 1);
    net.run(60 * SECOND);
    assert_eq!(net.kernel(1).len(), 3000);
}

/// The routes of every node's kernel, with their next hops.
fn tables(net: &Net) -> Vec<BTreeMap<String, Vec<IpAddr>>> {
    let table = |node: usize| {
        net.kernel(node)
            .into_iter()
            .map(|text| (text.clone(), next_hops(net, node, &text)))
            .collect()
    };
    (0..net.nodes.len()).map(table).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Two reflectors, three clients and two routers outside: in whatever order things happen and
    /// bytes arrive, with sessions that break on the way, the tables are those of the final state.
    #[test]
    fn tables_depend_on_the_final_state_alone(
        seeds in any::<[u64; 2]>(),
        events in prop::collection::vec((0usize..7, 0u8..6, any::<bool>()), 1..30),
        breaks in prop::collection::vec((0usize..10, 0u64..3000), 0..6),
    ) {
        let asns = [64512, 64512, 64512, 64512, 64512, 65001, 65002];
        let links =
            [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (2, 5), (3, 6), (4, 6)];
        let reflects = |node: usize, peer: usize, config: &mut PeerConfig| {
            config.is_reflector_client = node < 2 && (2..5).contains(&peer);
            config.restart_time = node.is_multiple_of(2).then_some(30 * SECOND);
        };
        let mut disturbed = build(seeds[0], &asns, &links, reflects);
        for (index, (node, route, is_added)) in events.iter().enumerate() {
            let text = format!("10.65.{route}.0/26");
            if *is_added { disturbed.announce(*node, &text) } else {
                disturbed.withdraw(*node, &text)
            }
            if let Some((link, wait)) = breaks.get(index) {
                disturbed.cut(links[*link].0, links[*link].1);
                disturbed.run(Duration::from_millis(*wait));
            }
        }
        disturbed.run(120 * SECOND);
        let mut plain = build(seeds[1], &asns, &links, reflects);
        for node in 0..7 {
            let routes: Vec<LocalRoute> = disturbed.nodes[node].speaker
                .local_routes()
                .cloned()
                .collect();
            for route in routes {
                plain.announce(node, &route.net.to_string());
            }
        }
        plain.run(120 * SECOND);
        prop_assert_eq!(tables(&disturbed), tables(&plain));
    }
}
