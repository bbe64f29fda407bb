//! Sessions: how they come up, what ends them, and what stays when they do.

mod net;

use std::time::Duration;

use margay_bgp::codec;
use margay_bgp::config::{PeerConfig, SpeakerConfig};
use margay_bgp::message::Role;
use margay_bgp::notification::{self, Notification};
use margay_bgp::rib::LocalRoute;
use margay_bgp::session::SessionState;
use net::{Net, address, id, pair};
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

fn established(net: &Net) -> bool {
    net.state(0, 1) == SessionState::Established && net.state(1, 0) == SessionState::Established
}

/// A pair that is up and has a route of each node.
fn up(seed: u64, asns: [u32; 2], change: impl Fn(&mut PeerConfig)) -> Net {
    let mut net = pair(seed, asns, change);
    net.announce(0, "10.65.0.0/26");
    net.announce(1, "10.65.1.0/26");
    net.until("both routes", |net| {
        net.kernel(0) == ["10.65.1.0/26"] && net.kernel(1) == ["10.65.0.0/26"]
    });
    assert!(established(&net));
    net
}

#[test]
fn a_session_comes_up_whoever_connects() {
    for (passive, seed) in [([false, false], 1), ([true, false], 2), ([false, true], 3)] {
        let mut net = Net::new(seed);
        for node in 0..2 {
            net.add(64512, |_| {});
            let mut config = net.config(1 - node, 64512);
            config.is_passive = passive[node];
            net.peer(node, 1 - node, config);
        }
        net.run(20 * SECOND);
        assert!(established(&net), "{passive:?}");
        let status = net.nodes[0].speaker.status(id(1)).unwrap();
        let agreed = status.negotiated.unwrap();
        assert_eq!((agreed.hold_time, agreed.keepalive), (240 * SECOND, 80 * SECOND));
        assert!(
            agreed.notification_restart && agreed.enhanced_route_refresh && agreed.four_octet_as
        );
    }
}

/// What the configuration of the second node makes of the session, and which NOTIFICATION says so.
#[test]
fn opens_that_do_not_go_together_end_with_their_notification() {
    type Change = fn(&mut PeerConfig);
    let rows: [(&str, [u32; 2], Change, Change, &str); 4] = [
        ("wrong AS", [64512, 65001], |_| {}, |config| config.asn = 64513, "bad peer AS (2/2)"),
        (
            "roles",
            [64512, 65001],
            |config| config.role = Some(Role::Provider),
            |config| config.role = Some(Role::Provider),
            "role mismatch (2/11)",
        ),
        (
            "families",
            [64512, 64512],
            |config| config.families = [margay_bgp::attributes::Family::Ipv6].into(),
            |_| {},
            "unsupported capability (2/7)",
        ),
        (
            "local AS",
            [64512, 65001],
            |config| config.local_asn = Some(64999),
            |_| {},
            "bad peer AS (2/2)",
        ),
    ];
    for (what, asns, first, second, text) in rows {
        let mut net = Net::new(7);
        for (node, change) in [(0, first), (1, second)] {
            net.add(asns[node], |_| {});
            let mut config = net.config(1 - node, asns[1 - node]);
            change(&mut config);
            net.peer(node, 1 - node, config);
        }
        net.run(120 * SECOND);
        assert!(net.has_logged(0, "Ended") && net.has_logged(1, "Ended"), "{what}");
        let ends =
            net.nodes.iter().flat_map(|node| &node.log).filter(|line| line.contains("Ended"));
        // The reason is told as text, too.
        let all = ends.cloned().collect::<Vec<_>>().join("\n");
        let codes = text.split(['(', '/', ')']).collect::<Vec<_>>();
        assert!(
            all.contains(&format!("code: {}, subcode: {}", codes[1], codes[2])),
            "{what}: {all}"
        );
        assert_ne!(net.state(0, 1), SessionState::Established, "{what}");
    }
}

#[test]
fn errors_that_repeat_are_tried_less_and_less_often() {
    let mut net = Net::new(5);
    for node in 0..2 {
        net.add(64512, |_| {});
        let asn = if node == 0 { 64512 } else { 64513 };
        let config = net.config(1 - node, asn);
        net.peer(node, 1 - node, config);
    }
    let count = |net: &Net| net.nodes[0].log.iter().filter(|line| line.contains("Ended")).count();
    net.run(60 * SECOND);
    let first = count(&net);
    net.run(600 * SECOND);
    let later = count(&net) - first;
    assert!((4..=40).contains(&first), "{first}");
    // Ten times as long, and each wait is close to a minute.
    assert!((8..=40).contains(&later), "{later} after {first}");
}

#[test]
fn a_router_id_of_both_is_refused_within_a_system_only() {
    for (asns, expected) in [([64512, 64512], false), ([64512, 65001], true)] {
        let mut net = Net::new(11);
        for (node, asn) in asns.into_iter().enumerate() {
            net.add(asn, |config: &mut SpeakerConfig| config.router_id = [9, 9, 9, 9].into());
            let config = net.config(1 - node, asns[1 - node]);
            net.peer(node, 1 - node, config);
        }
        net.run(60 * SECOND);
        assert_eq!(established(&net), expected, "{asns:?}");
        assert_eq!(net.has_logged(0, "code: 2, subcode: 3"), !expected, "{asns:?}");
    }
}

#[test]
fn a_peer_that_is_silent_is_given_up_after_the_hold_time() {
    let mut net = up(13, [64512, 64512], |config| {
        config.hold_time = 3 * SECOND;
        config.restart_time = None;
    });
    net.run(30 * SECOND);
    assert!(established(&net), "keepalives keep it up");
    assert!(!net.has_logged(0, "Ended"));
    net.hold(0, 1, true);
    // The last KEEPALIVE is a second old at most.
    net.run(Duration::from_millis(1900));
    assert!(established(&net));
    net.run(2 * SECOND);
    assert!(net.has_logged(0, "code: 4, subcode: 0") && net.has_logged(0, "Remove"));
    net.hold(0, 1, false);
    net.until("back", established);
}

/// Where the sender takes nothing although its own KEEPALIVEs come, as RFC 9687 has it.
#[test]
fn a_peer_that_takes_nothing_is_given_up() {
    let mut net = up(17, [64512, 64512], |config| config.hold_time = Duration::ZERO);
    net.hold(0, 1, true);
    net.announce(0, "10.65.7.0/26");
    net.run(470 * SECOND);
    assert!(established(&net));
    net.run(20 * SECOND);
    assert!(net.has_logged(0, "code: 8, subcode: 0"));
}

#[test]
fn messages_that_the_state_does_not_expect_end_the_session() {
    let mut net = up(19, [64512, 65001], |config| config.restart_time = None);
    let open = {
        let mut bytes = codec::encode(codec::Plain::Keepalive);
        // An OPEN of the shortest form.
        bytes[17] = 29;
        bytes[18] = 1;
        bytes.extend([4, 0xfd, 0xe9, 0, 90, 1, 1, 1, 1, 0]);
        bytes
    };
    net.inject(0, 1, &open);
    net.run(SECOND / 2);
    assert!(net.has_logged(0, "code: 5, subcode: 3"));
    assert!(net.kernel(0).is_empty());
    net.until("back", |net| net.kernel(0) == ["10.65.1.0/26"]);
}

#[test]
fn a_malformed_route_is_withdrawn_and_the_session_stays() {
    let mut net = up(23, [64512, 65001], |_| {});
    // ORIGIN has a value that there is not.
    let mut bytes = vec![255; 16];
    let attributes = [0x40, 1, 1, 3, 0x40, 2, 6, 2, 1, 0, 0, 0xfd, 0xe9, 0x40, 3, 4, 10, 9, 0, 2];
    bytes.extend([0, 23 + 20 + 5, 2, 0, 0, 0, 20]);
    bytes.extend(attributes);
    bytes.extend([26, 10, 65, 1, 0]);
    net.inject(0, 1, &bytes);
    net.run(SECOND);
    assert!(established(&net) && !net.has_logged(0, "Ended"));
    assert!(net.has_logged(0, "Problem"));
    assert!(net.kernel(0).is_empty());
}

#[test]
fn more_prefixes_than_the_limit_end_the_session_for_a_while() {
    let mut net = pair(29, [64512, 64512], |config| config.max_prefixes = 3);
    for index in 0..4 {
        net.announce(1, &format!("10.65.{index}.0/26"));
    }
    net.run(30 * SECOND);
    // The routes go although graceful restart has been agreed on: the Cease is a hard one.
    assert!(net.has_logged(0, "code: 6, subcode: 9"), "{:#?}", net.nodes[0].log);
    assert!(net.kernel(0).is_empty());
    let ends =
        |net: &Net| net.nodes[0].log.iter().filter(|line| line.contains("subcode: 9")).count();
    net.run(150 * SECOND);
    assert_eq!(ends(&net), 1);
    net.withdraw(1, "10.65.3.0/26");
    net.until("within the limit", |net| net.kernel(0).len() == 3);
}

#[test]
fn a_connection_that_breaks_leaves_routes_for_the_restart_time() {
    let mut net = up(31, [64512, 64512], |_| {});
    net.unreachable.insert(1);
    net.cut(0, 1);
    net.run(100 * SECOND);
    assert_eq!(net.kernel(0), ["10.65.1.0/26"]);
    assert_eq!(net.nodes[0].speaker.status(id(1)).unwrap().stale.len(), 1);
    net.run(30 * SECOND);
    assert!(net.kernel(0).is_empty());
    assert!(net.has_logged(0, "did not come back in time"));
}

/// What is sent again stays without a gap, and what is not goes with the end of the table.
#[test]
fn a_peer_that_comes_back_has_its_routes_all_the_time() {
    let mut net = up(37, [64512, 64512], |_| {});
    net.announce(1, "10.65.2.0/26");
    net.run(SECOND);
    net.cut(0, 1);
    net.withdraw(1, "10.65.2.0/26");
    assert_eq!(net.kernel(0).len(), 2);
    let before = net.nodes[0].log.len();
    net.until("back", established);
    net.run(SECOND);
    assert_eq!(net.kernel(0), ["10.65.1.0/26"]);
    let changes: Vec<&String> =
        net.nodes[0].log[before..].iter().filter(|line| line.contains("Route(")).collect();
    assert_eq!(changes.len(), 1, "{changes:?}");
}

#[test]
fn notifications_keep_routes_by_rfc_8538_and_a_hard_reset_does_not() {
    let rows = [
        (Notification::new(notification::ADMINISTRATIVE_RESET), true, true),
        (Notification::new(notification::ADMINISTRATIVE_RESET).into_hard_reset(), true, false),
        (Notification::new(notification::ADMINISTRATIVE_RESET), false, false),
    ];
    for (notification, has_restart, expected) in rows {
        let mut net = up(41, [64512, 64512], |config| {
            if !has_restart {
                config.restart_time = None;
            }
        });
        let bytes = codec::encode(&notification);
        net.unreachable.insert(1);
        net.inject(0, 1, &bytes);
        net.run(SECOND);
        assert_eq!(!net.kernel(0).is_empty(), expected, "{notification}");
    }
}

/// A node that has booted has no route of before in its kernel, and says so: its peers drop theirs
/// when it is back, and not at the end of its table.
#[test]
fn a_speaker_that_lost_its_kernel_says_so() {
    let mut net = up(79, [64512, 64512], |_| {});
    net.lose(1, true);
    let std::net::IpAddr::V4(router_id) = address(1) else { unreachable!() };
    let config = SpeakerConfig::new(64512, router_id);
    let mut speaker = margay_bgp::speaker::Speaker::new(config, net.now).unwrap();
    let moment = net.moment();
    let config = net.config(0, 64512);
    speaker.set_peer(id(0), config, moment).unwrap();
    net.nodes[1].speaker = speaker;
    assert_eq!(net.kernel(0), ["10.65.1.0/26"]);
    net.until("back", established);
    assert!(net.kernel(0).is_empty());
    let agreed = net.nodes[0].speaker.status(id(1)).unwrap().negotiated.unwrap();
    let families = agreed.graceful_restart.unwrap().families;
    assert!(families.values().all(|is_preserved| !is_preserved), "{families:?}");
}

/// The agent of a node goes and comes again: its peers keep its routes, and it announces nothing
/// before it has theirs.
#[test]
fn a_speaker_that_restarts_loses_nothing() {
    for (seed, is_noticed) in [(43, true), (47, false)] {
        let mut net = up(seed, [64512, 64512], |_| {});
        // A third node that never comes, and one without graceful restart.
        net.nodes[1].speaker.shut_down(
            true,
            "",
            margay_bgp::session::Moment { now: net.now, jitter: 0 },
        );
        net.lose(1, is_noticed);
        let before = net.nodes[0].log.len();
        let config = {
            let std::net::IpAddr::V4(router_id) = address(1) else { unreachable!() };
            let mut config = SpeakerConfig::new(64512, router_id);
            config.is_restarting = true;
            config
        };
        let mut policy = margay_bgp::export::ExportPolicy::default();
        policy.pools.insert(net::net("10.65.0.0/16"), true);
        let moment = net.moment();
        let mut speaker = margay_bgp::speaker::Speaker::new(config, net.now).unwrap();
        speaker.set_export_policy(policy, moment);
        let config = net.config(0, 64512);
        speaker.set_peer(id(0), config, moment).unwrap();
        let route = LocalRoute { net: net::net("10.65.1.0/26"), interface: None, priority: None };
        speaker.announce(route, moment);
        net.nodes[1].speaker = speaker;
        net.nodes[1].synced = 0;
        net.until("synced", |net| net.nodes[1].synced == 2);
        net.run(SECOND);
        assert!(established(&net));
        assert_eq!(
            (net.kernel(0), net.kernel(1)),
            (vec!["10.65.1.0/26".into()], vec!["10.65.0.0/26".into()])
        );
        let gone = net.nodes[0].log[before..].iter().any(|line| line.contains("Remove"));
        assert!(!gone, "{:#?}", &net.nodes[0].log[before..]);
    }
}

#[test]
fn a_restart_does_not_wait_for_ever() {
    let mut net = Net::new(53);
    net.add(64512, |config| {
        config.is_restarting = true;
        config.selection_deferral = 60 * SECOND;
    });
    for peer in 1..3 {
        net.add(64512, |_| {});
        let config = net.config(peer, 64512);
        net.peer(0, peer, config);
        let config = net.config(0, 64512);
        net.peer(peer, 0, config);
        net.announce(peer, &format!("10.65.{peer}.0/26"));
    }
    net.announce(0, "10.65.0.0/26");
    net.unreachable.insert(2);
    net.run(55 * SECOND);
    assert_eq!(net.state(0, 1), SessionState::Established);
    assert!(net.kernel(0).is_empty() && net.kernel(1).is_empty());
    // Nobody has IPv6, so that is complete at once.
    assert_eq!(net.nodes[0].synced, 1);
    net.run(10 * SECOND);
    assert_eq!(
        (net.kernel(0), net.kernel(1)),
        (vec!["10.65.1.0/26".into()], vec!["10.65.0.0/26".into()])
    );
    assert_eq!(net.nodes[0].synced, 2);
}

#[test]
fn two_that_restart_at_once_do_not_wait_for_each_other() {
    let mut net = Net::new(59);
    for node in 0..2 {
        net.add(64512, |config| config.is_restarting = true);
        let config = net.config(1 - node, 64512);
        net.peer(node, 1 - node, config);
        net.announce(node, &format!("10.65.{node}.0/26"));
    }
    net.run(30 * SECOND);
    assert_eq!(
        (net.kernel(0), net.kernel(1)),
        (vec!["10.65.1.0/26".into()], vec!["10.65.0.0/26".into()])
    );
    assert_eq!((net.nodes[0].synced, net.nodes[1].synced), (2, 2));
}

#[test]
fn a_peer_that_goes_for_good_takes_its_routes_along() {
    let mut net = up(61, [64512, 64512], |_| {});
    let moment = net.moment();
    net.nodes[1].speaker.shut_down(false, "rack 7 moves", moment);
    net.run(SECOND);
    assert!(net.kernel(0).is_empty());
    assert!(net.has_logged(0, "subcode: 9"));
    let mut net = up(67, [64512, 64512], |_| {});
    let moment = net.moment();
    net.nodes[1].speaker.remove_peer(id(0), moment);
    net.run(SECOND);
    assert!(net.kernel(0).is_empty() && net.kernel(1).is_empty());
    assert!(net.nodes[1].speaker.status(id(0)).is_none());
    // Nobody is configured there any more.
    net.run(60 * SECOND);
    assert_ne!(net.state(0, 1), SessionState::Established);
}

#[test]
fn what_is_wrong_with_a_configuration_is_said() {
    let mut net = pair(71, [64512, 64512], |_| {});
    let rows: [(fn(&mut PeerConfig), &str); 5] = [
        (|config| config.asn = 0, "asn: 0"),
        (|config| config.hold_time = 2 * SECOND, "hold_time: 2s"),
        (|config| config.keepalive = Some(Duration::ZERO), "keepalive: 0ns"),
        (|config| config.restart_time = Some(4096 * SECOND), "restart_time: 4096s"),
        (|config| config.families.clear(), "families: []"),
    ];
    for (change, expected) in rows {
        let mut config = net.config(1, 64512);
        change(&mut config);
        let moment = net.moment();
        let error = net.nodes[0].speaker.set_peer(id(1), config, moment).unwrap_err().to_string();
        assert!(error.starts_with(expected) && error.contains("; "), "{error}");
    }
    let twin = net.config(1, 64512);
    let moment = net.moment();
    let error = net.nodes[0].speaker.set_peer(id(9), twin, moment).unwrap_err();
    assert_eq!(error.field, "address");
}

#[test]
fn a_session_that_is_reset_comes_back() {
    for is_up in [true, false] {
        let mut net = pair(73, [64512, 64512], |_| {});
        if is_up {
            net.until("the session", established);
        }
        let moment = net.moment();
        net.nodes[0].speaker.reset_peer(id(1), "new key", moment);
        let mut config = net.config(1, 64512);
        config.hold_time = 30 * SECOND;
        net.peer(0, 1, config);
        net.until("the session", established);
        assert_eq!(net.has_logged(1, "code: 6, subcode: 4"), is_up);
        let agreed = net.nodes[1].speaker.status(id(0)).unwrap().negotiated.unwrap();
        assert_eq!(agreed.hold_time, 30 * SECOND);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Connections break and stall at any time while routes change at both ends: in the end the
    /// session is up, and each has exactly what the other one announces.
    #[test]
    fn whatever_happens_to_connections_both_ends_agree(
        seed in any::<u64>(),
        is_internal in any::<bool>(),
        has_restart in any::<bool>(),
        events in prop::collection::vec((0usize..6, 0u8..20, 0u64..4000), 0..40),
    ) {
        let asns = if is_internal { [64512, 64512] } else { [64512, 65001] };
        let mut net = pair(seed, asns, |config| {
            config.hold_time = 9 * SECOND;
            if !has_restart {
                config.restart_time = None;
            }
        });
        for (kind, index, wait) in events {
            let node = usize::from(index % 2);
            match kind {
                0 => net.cut(0, 1),
                1 => net.hold(0, 1, true),
                2 => net.hold(0, 1, false),
                3 => net.withdraw(node, &format!("10.65.{}.0/26", index / 2)),
                _ => net.announce(node, &format!("10.65.{}.0/26", index / 2)),
            }
            net.run(Duration::from_millis(wait));
        }
        net.hold(0, 1, false);
        net.until("up again", established);
        net.run(5 * SECOND);
        prop_assert!(established(&net));
        for node in 0..2 {
            let local = net.nodes[1 - node].speaker.local_routes();
            let own: Vec<String> =
                net.nodes[node].speaker.local_routes().map(|route| route.net.to_string()).collect();
            // A prefix that both have is each one's own.
            let expected: Vec<String> =
                local.map(|route| route.net.to_string()).filter(|net| !own.contains(net)).collect();
            prop_assert_eq!(net.kernel(node), expected);
        }
    }
}
