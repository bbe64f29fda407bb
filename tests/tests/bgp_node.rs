//! The node's BGP with routers of BIRD beside it: packets of a pod follow what is learnt, and
//! nothing is lost while an agent restarts.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use margay_api::bgp::SecretKey;
use margay_calc::model::BgpPeerRecord;
use margay_node::bgp::report::PeerReport;
use margay_tests::bgp::node::{BEHIND, BLOCKS, BgpNode, POD, ROUTES, Router, RouterOptions};
use margay_tests::bgp::{Daemon, Flow, Kind, PACKAGES};
use margay_tests::cluster::preflight;
use margay_tests::cluster::process::{POLL, wait_for};
use margay_tests::lab::node::Node;
use margay_tests::lab::{Lab, Options};
use serde_json::json;

/// How long a test waits for what is to come.
const LIMIT: Duration = Duration::from_secs(60);

fn prepare() -> Result<()> {
    preflight::prepare(&|line| eprintln!("{line}"))?;
    preflight::prepare_also(&PACKAGES, &|line| eprintln!("{line}"))
}

/// A node that runs, with these routers.
fn mk_node<const N: usize>(options: [RouterOptions; N]) -> Result<(BgpNode, Vec<Router>)> {
    prepare()?;
    let mut node = BgpNode::new()?;
    let mut routers = Vec::new();
    for (number, options) in (0..).zip(options) {
        routers.push(Router::start(&node, number, options)?);
    }
    for router in &routers {
        node.record.peers.extend(router.peers()?);
    }
    node.start()?;
    Ok((node, routers))
}

fn has_routes(learned: &str) -> bool {
    ROUTES.iter().all(|route| learned.contains(route))
}

/// Datagrams of the pod to the addresses behind the routers, of both IP versions, which arrive.
fn start_flows(node: &BgpNode, routers: &[Router]) -> Result<[Flow; 2]> {
    let at: Vec<_> = routers.iter().map(|router| &router.namespace).collect();
    let start = |target: &str| Flow::start(&node.pod, target.parse()?, &at);
    let flows = [start(BEHIND[0])?, start(BEHIND[1])?];
    flows.iter().try_for_each(Flow::wait_answers)?;
    Ok(flows)
}

fn stays(time: Duration, what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < time {
        ensure!(holds(), "not for {time:?}: {what}");
        std::thread::sleep(POLL);
    }
    Ok(())
}

#[test]
fn packets_follow_learnt_routes_and_blocks_are_announced() -> Result<()> {
    let (node, routers) = mk_node([RouterOptions::default()])?;
    let router = &routers[0];
    node.wait_learned(has_routes)?;
    router.wait_blocks()?;
    let flows = start_flows(&node, &routers)?;
    // A prefix that the pod's node has as its own is not learnt, nor one that is withdrawn.
    for flow in flows {
        let before = flow.lost();
        flow.finish(before)?;
    }
    let blocks = node.learned()?;
    ensure!(!blocks.contains(BLOCKS[0]), "{blocks}");
    router.daemon.ask(&router.namespace, "disable static1")?;
    node.wait_learned(|learned| !learned.contains(ROUTES[0]) && learned.contains(ROUTES[1]))?;
    router.daemon.ask(&router.namespace, "enable static1")?;
    node.wait_learned(has_routes)?;
    // What others remove comes back.
    node.host.ip(&format!("route del {} proto 83", ROUTES[0]))?;
    node.wait_learned(has_routes)
}

/// The agent is killed and comes again: no packet is lost on the way, and what is left in the
/// kernel from before goes when everything has come.
#[test]
fn an_agent_that_is_killed_and_comes_again_loses_no_packet() -> Result<()> {
    let (mut node, routers) = mk_node([RouterOptions::default()])?;
    let router = &routers[0];
    node.wait_learned(has_routes)?;
    router.wait_blocks()?;
    let flows = start_flows(&node, &routers)?;
    let before = flows.each_ref().map(Flow::lost);
    node.kill();
    let is_down = |answer: &str| !answer.contains("Established");
    router
        .daemon
        .wait_for(&router.namespace, "show protocols", is_down)?;
    node.host
        .ip("route add 198.51.100.0/24 via 10.9.0.2 proto 83 metric 1024")?;
    flows.iter().try_for_each(Flow::wait_answers)?;
    node.start()?;
    node.wait_established(router)?;
    node.wait_learned(|learned| !learned.contains("198.51.100.0/24"))?;
    ensure!(has_routes(&node.learned()?), "{}", node.learned()?);
    router.wait_blocks()?;
    flows.iter().try_for_each(Flow::wait_answers)?;
    for (flow, before) in flows.into_iter().zip(before) {
        flow.finish(before)?;
    }
    Ok(())
}

/// BIRD is killed: its routes stay in the kernel until it is back.
#[test]
fn a_router_whose_daemon_restarts_loses_no_packet() -> Result<()> {
    let options = RouterOptions {
        // Its kernel keeps what it has.
        more: "protocol direct { disabled; }".to_owned(),
        ..RouterOptions::default()
    };
    let (node, mut routers) = mk_node([options])?;
    node.wait_learned(has_routes)?;
    routers[0].wait_blocks()?;
    let addresses = routers[0].sockets()?;
    routers[0].daemon.kill()?;
    for address in addresses {
        let is_down = || {
            node.session(address)
                .is_some_and(|peer| !peer.is_established())
        };
        wait_for(LIMIT, || format!("the end of {address}"), is_down)?;
        let stale = node.session(address).is_some_and(|peer| peer.is_stale);
        ensure!(stale, "{:?}", node.session(address));
    }
    ensure!(has_routes(&node.learned()?), "{}", node.learned()?);
    Ok(())
}

#[test]
fn packets_are_spread_over_two_routers_and_move_when_a_link_goes() -> Result<()> {
    let (node, routers) = mk_node([RouterOptions::default(), RouterOptions::default()])?;
    for router in &routers {
        node.wait_established(router)?;
        router.wait_blocks()?;
    }
    let both = |learned: &str| {
        [
            "via 10.9.0.2",
            "via 10.9.1.2",
            "via fd00:9::2",
            "via fd00:9:1::2",
        ]
        .iter()
        .all(|via| learned.contains(via))
    };
    node.wait_learned(both)?;
    let flows = start_flows(&node, &routers)?;
    node.host.ip("link set eth1 down")?;
    let one = |learned: &str| {
        has_routes(learned) && !learned.contains("10.9.1.2") && !learned.contains("fd00:9:1::2")
    };
    node.wait_learned(one)?;
    flows.iter().try_for_each(Flow::wait_answers)?;
    node.host.ip("link set eth1 up")?;
    node.host.ip("addr add fd00:9:1::1/64 dev eth1 nodad")?;
    node.wait_learned(both)
}

#[test]
fn without_bgp_sessions_are_closed_and_learnt_routes_go() -> Result<()> {
    let (node, routers) = mk_node([RouterOptions::default()])?;
    let router = &routers[0];
    node.wait_learned(has_routes)?;
    router.wait_blocks()?;
    node.turn_off()?;
    node.wait_learned(str::is_empty)?;
    let has_gone = |answer: &str| !answer.contains(BLOCKS[0]);
    router
        .daemon
        .wait_for(&router.namespace, "ipv4", has_gone)?;
    let listening = node.host.command("ss", &["-Hltn", "sport = :179"], "")?;
    ensure!(listening.is_empty(), "{listening}");
    ensure!(node.session(router.sockets()?[0]).is_none());
    node.apply()?;
    node.wait_learned(has_routes)
}

/// Routes of an earlier process go on a node that has no BGP any more.
#[test]
fn a_node_that_has_no_bgp_when_it_starts_has_no_learnt_routes() -> Result<()> {
    let (mut node, routers) = mk_node([RouterOptions::default()])?;
    node.wait_learned(has_routes)?;
    node.kill();
    drop(routers);
    node.start_without()?;
    node.wait_learned(str::is_empty)
}

fn secret(name: &str) -> Option<SecretKey> {
    let (name, key) = (name.to_owned(), "password".to_owned());
    Some(SecretKey { name, key })
}

#[test]
fn a_password_is_read_and_a_wrong_one_brings_no_session() -> Result<()> {
    prepare()?;
    let mut node = BgpNode::new()?;
    let options = RouterOptions {
        session: "password \"moss-and-stone\";",
        ..RouterOptions::default()
    };
    let router = Router::start(&node, 0, options)?;
    let protect = |peer: BgpPeerRecord| BgpPeerRecord {
        password: secret("bgp"),
        ..peer
    };
    node.record.peers = router.peers()?.into_iter().map(protect).collect();
    node.start()?;
    // Without its Secret there is no session, and that is reported.
    let says = |text: &str| {
        node.problems()
            .is_ok_and(|problems| problems.contains(text))
    };
    let reported =
        || says("bgp-passwords") && says("key password of Secret bgp: it does not exist");
    wait_for(
        LIMIT,
        || format!("a problem: {:?}", node.problems()),
        reported,
    )?;
    ensure!(node.session(router.sockets()?[0]).is_none());
    node.secrets.set("bgp", "stone-and-moss");
    for address in router.sockets()? {
        let tried = || {
            node.session(address)
                .is_some_and(|peer| peer.last_end.is_some())
        };
        let what = || format!("an attempt: {:?}", node.session(address));
        wait_for(LIMIT, what, tried)?;
        let end = node
            .session(address)
            .and_then(|peer| peer.last_end)
            .unwrap_or_default();
        ensure!(end.contains("password"), "{end}");
        ensure!(
            !node
                .session(address)
                .is_some_and(|peer| peer.is_established())
        );
    }
    node.secrets.set("bgp", "moss-and-stone\n");
    node.wait_established(&router)?;
    node.wait_learned(has_routes)?;
    ensure!(node.problems()?.is_empty(), "{}", node.problems()?);
    Ok(())
}

#[test]
fn packets_from_further_away_than_allowed_bring_no_session() -> Result<()> {
    for (line, hops, is_allowed) in [
        ("direct; ttl security on;", Some(1), true),
        // A TTL of 1, as of anybody who is not asked for more.
        ("direct;", None, true),
        ("direct;", Some(1), false),
        ("multihop 3; ttl security on;", Some(3), true),
    ] {
        prepare()?;
        let mut node = BgpNode::new()?;
        let options = RouterOptions {
            session: line,
            ..RouterOptions::default()
        };
        let router = Router::start(&node, 0, options)?;
        let near = |peer: BgpPeerRecord| BgpPeerRecord {
            ttl_security: hops,
            ..peer
        };
        node.record.peers = router.peers()?.into_iter().map(near).collect();
        node.start()?;
        if is_allowed {
            node.wait_established(&router)?;
            continue;
        }
        for address in router.sockets()? {
            let is_known = || node.session(address).is_some();
            wait_for(LIMIT, || format!("the peer {address}"), is_known)?;
            let is_down = || {
                node.session(address)
                    .is_some_and(|peer| !peer.is_established())
            };
            stays(Duration::from_secs(5), "no session", is_down)?;
        }
    }
    Ok(())
}

#[test]
fn a_hold_time_of_three_seconds_holds() -> Result<()> {
    let options = RouterOptions {
        session: "hold time 3; keepalive time 1;",
        ..RouterOptions::default()
    };
    let (node, routers) = mk_node([options])?;
    node.wait_established(&routers[0])?;
    let address = routers[0].sockets()?[0];
    let agreed = node.session(address).and_then(|peer| peer.hold_time);
    ensure!(agreed == Some(Duration::from_secs(3)), "{agreed:?}");
    let is_up = || {
        node.session(address)
            .is_some_and(|peer| peer.is_established())
    };
    stays(Duration::from_secs(7), "the session", is_up)
}

/// An address that the node has borrowed is announced beside its blocks, and of its own pods' the
/// blocks alone.
#[test]
fn addresses_within_blocks_are_not_announced() -> Result<()> {
    let (mut node, routers) = mk_node([RouterOptions::default()])?;
    let router = &routers[0];
    router.wait_blocks()?;
    let answer = router.daemon.ask(&router.namespace, "ipv4")?;
    ensure!(!answer.contains(&format!("{}/32", POD[0])), "{answer}");
    // The block is another node's: the pod's address is a borrowed one.
    node.record.blocks.clear();
    node.apply()?;
    let borrowed =
        |answer: &str| answer.contains(&format!("{}/32", POD[0])) && !answer.contains(BLOCKS[0]);
    router.daemon.wait_for(&router.namespace, "ipv4", borrowed)
}

/// Routes of a router that has many.
const MANY: u32 = 20_000;

/// Many routes come, are still there after a restart, are restored, and go.
#[test]
fn many_routes_come_are_kept_and_go() -> Result<()> {
    let route = |number: u32| format!("route 20.{}.{}.0/24 blackhole;", number >> 8, number & 0xff);
    let routes: Vec<String> = (0..MANY).map(route).collect();
    let options = RouterOptions {
        more: format!("protocol static many {{ ipv4; {} }}", routes.join("\n")),
        ..RouterOptions::default()
    };
    let begin = Instant::now();
    let (mut node, routers) = mk_node([options])?;
    let count = |learned: &str| {
        learned
            .lines()
            .filter(|line| line.starts_with("20."))
            .count()
    };
    let has_all = |learned: &str| count(learned) == MANY as usize && has_routes(learned);
    node.wait_learned(has_all)?;
    println!("{MANY} routes after {:?}", begin.elapsed());
    node.kill();
    node.start()?;
    node.wait_established(&routers[0])?;
    node.host.ip("route flush proto 83")?;
    node.wait_learned(has_all)?;
    routers[0]
        .daemon
        .ask(&routers[0].namespace, "disable many")?;
    node.wait_learned(|learned| count(learned) == 0 && has_routes(learned))
}

/// BIRD of the router between the subnets of a lab. Nodes also send it what their mesh has, but not
/// what they would send back to it.
const FABRIC: &str = "router id 172.30.0.254;
protocol device {}
protocol kernel { ipv4 { export where source = RTS_BGP; }; }
template bgp nodes {
  local as 65001; connect delay time 1; connect retry time 1; error wait time 1, 2;
  graceful restart on; ipv4 { import all; export none; };
}
protocol bgp n1 from nodes { neighbor 172.30.0.1 as 64512; }
protocol bgp n2 from nodes { neighbor 172.30.0.2 as 64512; }
protocol bgp n3 from nodes { neighbor 172.30.1.3 as 64512; }
";

/// Waits for sessions with the router and both other nodes.
fn wait_sessions(node: &Node, daemon: &Daemon) -> Result<()> {
    let is_up = || {
        node.bgp().is_some_and(|report| {
            report.peers.len() == 3 && report.peers.values().all(PeerReport::is_established)
        })
    };
    let what = || {
        format!(
            "sessions of {}: {:#?}\n{}",
            node.name,
            node.bgp(),
            daemon.log()
        )
    };
    wait_for(LIMIT, what, is_up)
}

/// Three agents with typha, in two subnets with a router between them, and a pool without
/// encapsulation: nodes learn each other's blocks in their mesh, and the router learns them too.
#[test]
fn pods_of_a_mesh_of_nodes_reach_each_other_across_subnets() -> Result<()> {
    prepare()?;
    let options = Options {
        pool: json!({"cidr": "10.65.0.0/16"}),
        bgp: true,
        ..Options::default()
    };
    let mut lab = Lab::new(&options)?;
    let daemon = Daemon::start(Kind::Bird, lab.fabric().namespace(), FABRIC)?;
    for (node, router) in [
        ("n1", "172.30.0.254"),
        ("n2", "172.30.0.254"),
        ("n3", "172.30.1.254"),
    ] {
        let problems = lab.apply(&json!({
            "apiVersion": "projectcalico.org/v3",
            "kind": "BGPPeer",
            "metadata": {"name": format!("router-of-{node}")},
            "spec": {"node": node, "peerIP": router, "asNumber": 65001},
        }))?;
        ensure!(problems.is_empty(), "{problems:?}");
    }
    lab.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}))?;
    for (node, name) in [("n1", "a"), ("n3", "c")] {
        let spec = json!({"containers": [{"name": "c"}]});
        let metadata = json!({"namespace": "x", "name": name});
        lab.add_pod(node, &json!({"metadata": metadata, "spec": spec}))?;
    }
    lab.wait_enforced()?;
    lab.nodes()
        .try_for_each(|node| wait_sessions(node, &daemon))?;
    let (from, to) = (lab.pod("x/a")?, lab.pod("x/c")?);
    let flow = Flow::start(&from.namespace, to.addresses[0], &[&to.namespace])?;
    flow.wait_answers()?;
    let before = flow.lost();
    lab.stop_agent("n3")?;
    flow.wait_answers()?;
    lab.start_agent("n3")?;
    lab.wait_enforced()?;
    wait_sessions(lab.node("n3")?, &daemon)?;
    flow.wait_answers()?;
    flow.finish(before)
}
