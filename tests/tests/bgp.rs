//! Our BGP speaker on real sockets with daemons of the distribution: BIRD 2, FRR and GoBGP.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use margay_bgp::attributes::Family;
use margay_bgp::codec::{self, Plain};
use margay_bgp::config::{Password, PeerConfig, PeerId, SpeakerConfig};
use margay_bgp::export::ExportPolicy;
use margay_bgp::filter::{FilterAction, FilterRule, RouteOperation};
use margay_bgp::message::{Capabilities, Open};
use margay_bgp::rib::LocalRoute;
use margay_bgp::session::State;
use margay_tests::bgp::{Daemon, Driver, Kind, PACKAGES, Seen};
use margay_tests::cluster::preflight;
use margay_tests::cluster::process::POLL;
use margay_tests::namespace::{Namespace, connect};

const OURS: [&str; 2] = ["10.9.0.1", "fd00:9::1"];
const THEIRS: [&str; 2] = ["10.9.0.2", "fd00:9::2"];
const AS: u32 = 64512;
const OTHER_AS: u32 = 65001;
const PEER: PeerId = PeerId(1);
/// What the daemon announces, with the large community 64512:1:2.
const ROUTES: [&str; 2] = ["192.0.2.0/24", "2001:db8:1::/48"];
/// What we announce, with the large community 64512:7:9.
const BLOCKS: [&str; 2] = ["10.65.0.0/26", "fd00:65::/122"];
/// Metric that our import filter gives what has the daemon's community.
const PRIORITY: u32 = 77;

/// Two namespaces with a cable.
struct Cable {
    ours: Namespace,
    theirs: Namespace,
}

impl Cable {
    fn new() -> Result<Self> {
        preflight::prepare(&|line| eprintln!("{line}"))?;
        preflight::prepare_also(&PACKAGES, &|line| eprintln!("{line}"))?;
        let (ours, theirs) = (Namespace::new()?, Namespace::new()?);
        let address = |address: &str| format!("{address}/24");
        connect(
            (&ours, "eth0", &address(OURS[0])),
            (&theirs, "eth0", &address(THEIRS[0])),
        )?;
        for (namespace, address) in [(&ours, OURS[1]), (&theirs, THEIRS[1])] {
            namespace.ip(&format!("addr add {address}/64 dev eth0 nodad"))?;
        }
        Ok(Self { ours, theirs })
    }
}

/// What a case says about both ends.
struct Case {
    kind: Kind,
    /// Index of the IP version that the session is over.
    over: usize,
    /// The daemon's AS number, as it has it and as we have it configured.
    asn: u32,
    expected_asn: u32,
    router_id: &'static str,
    hold_time: Duration,
    password: Option<&'static str>,
    is_restarting: bool,
}

impl Case {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            over: 0,
            asn: OTHER_AS,
            expected_asn: OTHER_AS,
            router_id: THEIRS[0],
            hold_time: Duration::from_secs(90),
            password: None,
            is_restarting: false,
        }
    }

    fn daemon(&self) -> String {
        let (own, neighbor) = (THEIRS[self.over], OURS[self.over]);
        let text = match self.kind {
            Kind::Bird => include_str!("bgp/bird.conf"),
            Kind::Frr => include_str!("bgp/frr.conf"),
            Kind::Gobgp => include_str!("bgp/gobgp.toml"),
        };
        // In place of a password there is a setting that changes nothing.
        let password = match (self.kind, self.password) {
            (Kind::Bird, Some(password)) => format!("password \"{password}\";"),
            (Kind::Frr, Some(password)) => format!("neighbor {neighbor} password {password}"),
            (Kind::Gobgp, Some(password)) => format!("auth-password = \"{password}\""),
            _ => String::new(),
        };
        let hold = self.hold_time.as_secs();
        text.replace("OWN_AS", &self.asn.to_string())
            .replace("OUR_AS", &AS.to_string())
            .replace("ROUTER_ID", self.router_id)
            .replace("OWN_ADDRESS", own)
            .replace("NEIGHBOR", neighbor)
            .replace("HOLD", &hold.to_string())
            .replace("KEEPALIVE", &(hold / 3).to_string())
            .replace("PASSWORD", &password)
    }

    fn peer(&self, password: Option<&str>) -> Result<PeerConfig> {
        let address: IpAddr = THEIRS[self.over].parse()?;
        let mut config = PeerConfig::new(SocketAddr::new(address, 179), self.expected_asn);
        config.families = Family::ALL.into();
        config.hold_time = self.hold_time;
        config.connect_retry = Duration::from_secs(1);
        for (family, own) in Family::ALL.into_iter().zip(OURS) {
            config.own_next_hops.insert(family, own.parse()?);
        }
        let set = FilterAction::Accept(vec![RouteOperation::SetPriority(PRIORITY)]);
        let rule = FilterRule {
            community: Some("64512:1:2".parse()?),
            ..FilterRule::new(set)
        };
        config.import.ipv4.push(rule.clone());
        config.import.ipv6.push(rule);
        config.transport.password = password
            .map(|text| Password::new(text.to_owned()))
            .transpose()?;
        Ok(config)
    }

    fn start(&self, cable: &Cable) -> Result<Driver> {
        self.start_with(cable, self.password)
    }

    fn start_with(&self, cable: &Cable, password: Option<&str>) -> Result<Driver> {
        let mut config = SpeakerConfig::new(AS, OURS[0].parse()?);
        config.is_restarting = self.is_restarting;
        let driver = Driver::start(&cable.ours, config, vec![(PEER, self.peer(password)?)])?;
        driver.call(|speaker, moment| {
            let mut policy = ExportPolicy::default();
            for block in BLOCKS.map(net) {
                policy.blocks.insert(block, true);
                policy
                    .communities
                    .insert(block, ["64512:7:9".parse().expect("a community")].into());
            }
            speaker.set_export_policy(policy, moment);
            for net in BLOCKS.map(net) {
                speaker.announce(
                    LocalRoute {
                        net,
                        interface: None,
                        priority: None,
                    },
                    moment,
                );
            }
        });
        Ok(driver)
    }
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn is_up(seen: &Seen) -> bool {
    seen.peers
        .get(&PEER)
        .is_some_and(|peer| peer.state == State::Established)
}

fn has_routes(seen: &Seen) -> bool {
    is_up(seen)
        && ROUTES
            .iter()
            .all(|route| seen.kernel.contains_key(&net(route)))
}

fn has_removed(seen: &Seen) -> bool {
    seen.log.iter().any(|line| line.contains("Remove"))
}

/// GoBGP takes its own routes by its client.
fn announce(daemon: &Daemon, kind: Kind, cable: &Cable) -> Result<()> {
    if kind == Kind::Gobgp {
        for (version, (route, own)) in ["ipv4", "ipv6"].iter().zip(ROUTES.iter().zip(THEIRS)) {
            let words = format!(
                "global rib add -a {version} {route} large-community 64512:1:2 nexthop {own}"
            );
            daemon.ask(&cable.theirs, &words)?;
        }
    }
    Ok(())
}

fn has_blocks(daemon: &Daemon, cable: &Cable) -> Result<()> {
    for (version, block) in ["ipv4", "ipv6"].into_iter().zip(BLOCKS) {
        daemon.wait_for(&cable.theirs, version, |answer| answer.contains(block))?;
    }
    Ok(())
}

/// Nothing of what must not be is seen for as long as it would take to come.
fn stays(time: Duration, what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < time {
        ensure!(holds(), "not for {time:?}: {what}");
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Routes of both families, over a session of either: with next hop, large community and what a
/// filter made of it.
fn routes_cross(kind: Kind, over: usize) -> Result<()> {
    let cable = Cable::new()?;
    let case = Case {
        over,
        ..Case::new(kind)
    };
    let daemon = Daemon::start(kind, &cable.theirs, &case.daemon())?;
    announce(&daemon, kind, &cable)?;
    let driver = case.start(&cable)?;
    driver
        .wait_for("routes of the peer", has_routes)
        .with_context(|| daemon.log())?;
    let seen = driver.seen();
    for (route, next_hop) in ROUTES.into_iter().zip(THEIRS) {
        let found = &seen.kernel[&net(route)];
        let addresses: Vec<String> = found
            .next_hops
            .iter()
            .map(|hop| hop.address.to_string())
            .collect();
        assert_eq!(
            (addresses, found.priority),
            (vec![next_hop.to_owned()], PRIORITY),
            "{route}"
        );
    }
    has_blocks(&daemon, &cable)?;
    let shown = |answer: &str| {
        let text = answer.replace([' ', '(', ')', ','], ":").replace("::", ":");
        text.contains("64512:7:9")
    };
    let question = if kind == Kind::Frr {
        "show bgp ipv4 unicast 10.65.0.0/26"
    } else {
        "ipv4"
    };
    daemon.wait_for(&cable.theirs, question, shown)?;
    driver.call(|speaker, moment| speaker.withdraw(&net(BLOCKS[0]), moment));
    daemon.wait_for(&cable.theirs, "ipv4", |answer| !answer.contains(BLOCKS[0]))?;
    assert!(is_up(&driver.seen()) && !has_removed(&driver.seen()));
    Ok(())
}

#[test]
fn routes_of_both_families_cross_over_ipv4_with_bird() -> Result<()> {
    routes_cross(Kind::Bird, 0)
}

#[test]
fn routes_of_both_families_cross_over_ipv6_with_bird() -> Result<()> {
    routes_cross(Kind::Bird, 1)
}

#[test]
fn routes_of_both_families_cross_over_ipv4_with_frr() -> Result<()> {
    routes_cross(Kind::Frr, 0)
}

#[test]
fn routes_of_both_families_cross_over_ipv6_with_frr() -> Result<()> {
    routes_cross(Kind::Frr, 1)
}

#[test]
fn routes_of_both_families_cross_over_ipv4_with_gobgp() -> Result<()> {
    routes_cross(Kind::Gobgp, 0)
}

#[test]
fn routes_of_both_families_cross_over_ipv6_with_gobgp() -> Result<()> {
    routes_cross(Kind::Gobgp, 1)
}

/// The daemon dies and comes again: its routes stay in the kernel all the time.
fn daemon_restarts(kind: Kind) -> Result<()> {
    let cable = Cable::new()?;
    let case = Case::new(kind);
    let mut daemon = Daemon::start(kind, &cable.theirs, &case.daemon())?;
    let driver = case.start(&cable)?;
    driver.wait_for("routes of the peer", has_routes)?;
    daemon.kill()?;
    driver.wait_for("the end of the session", |seen| !is_up(seen))?;
    let stale = driver.seen().peers[&PEER].stale.clone();
    assert_eq!(stale, Family::ALL.into(), "{:#?}", driver.seen());
    let daemon = daemon.restart(&cable.theirs)?;
    let is_whole = |seen: &Seen| has_routes(seen) && seen.peers[&PEER].stale.is_empty();
    driver.wait_for("the session again, with the end of the table", is_whole)?;
    has_blocks(&daemon, &cable)?;
    let log = driver.seen().log;
    let back = log
        .iter()
        .rposition(|line| line.contains("Established"))
        .context("a session")?;
    // FRR sends End-of-RIB before routes that pass a route-map defined after `router bgp`, the
    // order that it writes itself, and at that stale ones go (RFC 4724 section 4.2).
    let until = if kind == Kind::Frr { back } else { log.len() };
    assert!(
        !log[..until].iter().any(|line| line.contains("Remove")),
        "{log:#?}"
    );
    Ok(())
}

#[test]
fn routes_of_bird_stay_while_it_restarts() -> Result<()> {
    daemon_restarts(Kind::Bird)
}

#[test]
fn routes_of_frr_stay_while_it_is_away() -> Result<()> {
    daemon_restarts(Kind::Frr)
}

/// Our process dies and comes again: the daemon has our routes all the time.
fn we_restart(kind: Kind) -> Result<()> {
    let cable = Cable::new()?;
    let case = Case::new(kind);
    let daemon = Daemon::start(kind, &cable.theirs, &case.daemon())?;
    let driver = case.start(&cable)?;
    driver.wait_for("routes of the peer", has_routes)?;
    has_blocks(&daemon, &cable)?;
    drop(driver);
    let has_block = || {
        daemon
            .ask(&cable.theirs, "ipv4")
            .is_ok_and(|answer| answer.contains(BLOCKS[0]))
    };
    stays(
        Duration::from_secs(2),
        "our block at the peer while we are away",
        has_block,
    )?;
    let driver = Case {
        is_restarting: true,
        ..case
    }
    .start(&cable)?;
    driver.wait_for("routes of the peer", has_routes)?;
    let is_synced = |seen: &Seen| {
        seen.log
            .iter()
            .filter(|line| line.contains("Synced"))
            .count()
            == 2
    };
    driver.wait_for("the end of the peer's tables", is_synced)?;
    stays(
        Duration::from_secs(3),
        "our block at the peer after our restart",
        has_block,
    )
}

#[test]
fn bird_keeps_our_routes_while_we_restart() -> Result<()> {
    we_restart(Kind::Bird)
}

#[test]
fn frr_keeps_our_routes_while_we_restart() -> Result<()> {
    we_restart(Kind::Frr)
}

const ALL: [Kind; 3] = [Kind::Bird, Kind::Frr, Kind::Gobgp];

/// Fails unless this NOTIFICATION ends the attempt before a session is established.
fn ensure_refused(case: &Case, notification: &str) -> Result<()> {
    let cable = Cable::new()?;
    let _daemon = Daemon::start(case.kind, &cable.theirs, &case.daemon())?;
    let driver = case.start(&cable)?;
    let has = |seen: &Seen, text: &str| seen.log.iter().any(|line| line.contains(text));
    driver.wait_for("a NOTIFICATION", |seen: &Seen| has(seen, notification))?;
    assert!(!has(&driver.seen(), "Established"), "{:?}", case.kind);
    Ok(())
}

#[test]
fn a_wrong_as_number_is_reported_and_brings_no_session() -> Result<()> {
    for kind in ALL {
        let case = Case {
            expected_asn: OTHER_AS + 1,
            ..Case::new(kind)
        };
        ensure_refused(&case, "bad peer AS (2/2)")?;
    }
    Ok(())
}

#[test]
fn a_router_id_of_both_brings_no_session_within_a_system() -> Result<()> {
    for kind in ALL {
        let case = Case {
            asn: AS,
            expected_asn: AS,
            router_id: OURS[0],
            ..Case::new(kind)
        };
        ensure_refused(&case, "bad BGP identifier (2/3)")?;
    }
    Ok(())
}

#[test]
fn a_password_is_asked_for_on_both_sides() -> Result<()> {
    for kind in ALL {
        let cable = Cable::new()?;
        let case = Case {
            password: Some("moss-and-stone"),
            ..Case::new(kind)
        };
        let daemon = Daemon::start(kind, &cable.theirs, &case.daemon())?;
        announce(&daemon, kind, &cable)?;
        let driver = case.start(&cable)?;
        driver
            .wait_for("routes of the peer", has_routes)
            .with_context(|| daemon.log())?;
        drop(driver);
        for wrong in [Some("stone-and-moss"), None] {
            let driver = case.start_with(&cable, wrong)?;
            let is_silent = || !driver.seen().log.iter().any(|line| line.contains("Open"));
            stays(Duration::from_secs(4), "no connection", is_silent)?;
        }
        let driver = case.start(&cable)?;
        driver.wait_for("the session again", is_up)?;
    }
    Ok(())
}

#[test]
fn a_hold_time_of_three_seconds_holds() -> Result<()> {
    for kind in ALL {
        let cable = Cable::new()?;
        let case = Case {
            hold_time: Duration::from_secs(3),
            ..Case::new(kind)
        };
        let daemon = Daemon::start(kind, &cable.theirs, &case.daemon())?;
        announce(&daemon, kind, &cable)?;
        let driver = case.start(&cable)?;
        driver.wait_for("routes of the peer", has_routes)?;
        let agreed = driver.seen().peers[&PEER]
            .negotiated
            .clone()
            .context("a session")?;
        assert_eq!(agreed.hold_time, Duration::from_secs(3), "{kind:?}");
        stays(Duration::from_secs(7), "the session", || {
            is_up(&driver.seen())
        })?;
    }
    Ok(())
}

/// A malformed route of a peer by hand is withdrawn, on a session that stays (RFC 7606).
#[test]
fn a_malformed_update_is_a_withdrawal() -> Result<()> {
    let cable = Cable::new()?;
    let case = Case::new(Kind::Bird);
    let driver = case.start(&cable)?;
    let target = SocketAddr::new(OURS[0].parse()?, 179);
    let mut stream = cable.theirs.run(|| TcpStream::connect(target))?;
    let open = Open {
        asn: OTHER_AS,
        hold_time: Duration::from_secs(90),
        router_id: THEIRS[0].parse()?,
        capabilities: Capabilities {
            families: Family::ALL.into(),
            four_octet_as: true,
            ..Capabilities::default()
        },
    };
    stream.write_all(&codec::encode(&open))?;
    stream.write_all(&codec::encode(Plain::Keepalive))?;
    driver.wait_for("the session", is_up)?;
    let path = [0x40, 2, 6, 2, 1, 0, 0, 0xfd, 0xe9];
    let hop = [0x40, 3, 4, 10, 9, 0, 2];
    let update = |origin: u8| {
        let attributes = [&[0x40, 1, 1, origin][..], &path, &hop].concat();
        let length = u8::try_from(23 + attributes.len() + 4).expect("a short message");
        let head = [
            &[255; 16][..],
            &[0, length, 2, 0, 0, 0, attributes.len() as u8],
        ]
        .concat();
        [&head[..], &attributes, &[24, 192, 0, 2]].concat()
    };
    stream.write_all(&update(0))?;
    driver.wait_for("the route", |seen| {
        seen.kernel.contains_key(&net(ROUTES[0]))
    })?;
    stream.write_all(&update(9))?;
    driver.wait_for("no route", |seen| seen.kernel.is_empty())?;
    let seen = driver.seen();
    assert!(
        is_up(&seen) && seen.log.iter().any(|line| line.contains("Problem")),
        "{seen:#?}"
    );
    // A length that leads beyond the message is no route any more: that ends the session.
    stream.write_all(&[&[255; 16][..], &[0, 23, 2, 0, 9, 0, 0]].concat())?;
    driver.wait_for("the end", |seen| !is_up(seen))?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    let last = &rest[rest.len() - 21..];
    assert_eq!(
        last[18..],
        [3, 3, 1],
        "a NOTIFICATION of a malformed attribute list"
    );
    Ok(())
}
