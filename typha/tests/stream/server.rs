//! gRPC side over real TLS: authorisation, views, and the cost of a bad peer to others.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use margay_calc::model::RecordId;
use margay_proto::debug::debug_client::DebugClient;
use margay_proto::debug::{ListNodesRequest, NodeStatus, SetLogRequest};
use margay_proto::sync::{LocalEndpoint, encode_local_endpoint, wire};
use margay_typha::app::Timeouts;
use margay_typha::event::Event;
use tokio::io::AsyncReadExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::peers::{self, Agent, Authority, Typha, address_of, mk_pod, until};

#[tokio::test]
async fn a_node_gets_its_view_and_nothing_else() {
    let typha = Typha::start().await;
    typha
        .observe(vec![mk_pod("a", "n1", 1), mk_pod("b", "n2", 2)])
        .await;
    let mut one = typha.node("n1").await;
    let mut two = typha.node("n2").await;
    let endpoint = |name: &str| RecordId::Endpoint(peers::key(name));
    for (agent, own, other) in [(&mut one, "a", "b"), (&mut two, "b", "a")] {
        let first = agent.frame().await;
        assert!(first.trailer.in_sync);
        assert!(agent.held.contains_key(&endpoint(own)));
        assert!(!agent.held.contains_key(&endpoint(other)));
    }
    typha.observe(vec![mk_pod("c", "n1", 3)]).await;
    one.until(|held| held.contains_key(&endpoint("c"))).await;
    one.ack().await;
    let (nodes, current) = (&typha.registry, 2);
    two.ack().await;
    until(|| nodes.count_current() == (2, current)).await;
    assert_eq!(
        two.frames, 1,
        "a change that does not concern a node is not sent to it"
    );
}

#[tokio::test]
async fn the_certificate_decides_who_may_do_what() {
    let typha = Typha::start().await;
    let debug = |channel| async move {
        let answer = DebugClient::new(channel)
            .list_nodes(ListNodesRequest {})
            .await;
        answer.map(|_| ()).map_err(|status| status.code())
    };
    // Tests have no log whose filter could be replaced.
    let set_log = |channel, filter: String| async move {
        DebugClient::new(channel)
            .set_log(SetLogRequest { filter })
            .await
            .expect_err("no log")
            .code()
    };
    let health = |channel| async move {
        let request = HealthCheckRequest {
            service: String::new(),
        };
        let answer = HealthClient::new(channel).check(request).await;
        answer.map(|_| ()).map_err(|status| status.code())
    };
    let denied = Err(Code::PermissionDenied);
    let table = [
        ("margay:node:n1", "margay:nodes", Ok(()), denied, denied),
        ("margay:node:", "margay:nodes", denied, denied, denied),
        ("margay:reader", "margay:nodes", denied, denied, denied),
        ("margay:reader", "margay:readers", denied, Ok(()), Ok(())),
        ("margay:node:n1", "margay:readers", denied, Ok(()), Ok(())),
        ("margay-typha", "", denied, denied, denied),
    ];
    for (name, organization, may_sync, may_debug, may_health) in table {
        let channel = typha
            .channel(&typha.authority, name, organization)
            .await
            .expect("our CA");
        let sync = Agent::open(channel.clone(), vec![]).await;
        assert_eq!(
            sync.map(|_| ()).map_err(|status| status.code()),
            may_sync,
            "{name}"
        );
        assert_eq!(
            debug(channel.clone()).await,
            may_debug,
            "{name} {organization}"
        );
        for (filter, expected) in [
            ("margay_typha=debug", Code::FailedPrecondition),
            ("a=b=c", Code::InvalidArgument),
            (&*"x".repeat(5000), Code::InvalidArgument),
        ] {
            let expected = may_debug.map_or_else(|denied| denied, |()| expected);
            assert_eq!(
                set_log(channel.clone(), filter.to_owned()).await,
                expected,
                "{name} {organization} {filter}"
            );
        }
        assert_eq!(health(channel).await, may_health, "{name} {organization}");
    }
    let stranger = Authority::new();
    let refused = typha
        .channel(&stranger, "margay:node:n1", "margay:nodes")
        .await;
    let refused = match refused {
        // TLS 1.3 tells a client that it was refused only after its side of the handshake.
        Ok(channel) => Agent::open(channel, vec![]).await.map(|_| ()).is_err(),
        Err(_) => true,
    };
    assert!(refused, "a certificate of another authority");
}

#[tokio::test]
async fn a_node_that_has_everything_is_sent_nothing() {
    let typha = Typha::start().await;
    let pods = (0..40).map(|i| mk_pod(&format!("p{i}"), "n1", i));
    typha.observe(pods.collect()).await;
    let mut agent = typha.node("n1").await;
    agent.frame().await;
    let held = std::mem::take(&mut agent.held);
    assert!(held.len() >= 40);
    drop(agent);
    let mut again = typha.node_holding("n1", held).await;
    let first = again.frame().await;
    assert_eq!(first.changes, []);
    assert_eq!(first.trailer.restated_buckets, [] as [u32; 0]);
    typha.observe(vec![mk_pod("p0", "n1", 99)]).await;
    let changed = again.frame().await;
    assert_eq!(changed.changes.len(), 1);
}

#[tokio::test]
async fn a_node_that_repeats_hello_is_answered_seldom_and_costs_the_others_nothing() {
    let typha = Typha::start().await;
    typha
        .observe(vec![mk_pod("a", "bad", 1), mk_pod("b", "good", 2)])
        .await;
    let mut good = typha.node("good").await;
    good.frame().await;
    let begin = std::time::Instant::now();
    let channel = typha
        .channel(&typha.authority, "margay:node:bad", "margay:nodes")
        .await
        .expect("our CA");
    let mut streams = Vec::new();
    for number in 0..40 {
        // Digests that differ everywhere, so that the response is the whole view.
        streams.push(
            Agent::open(channel.clone(), vec![number; 256])
                .await
                .expect("a stream"),
        );
    }
    typha.observe(vec![mk_pod("c", "good", 3)]).await;
    good.until(|held| held.contains_key(&RecordId::Endpoint(peers::key("c"))))
        .await;
    let mut answered = 0;
    for stream in &mut streams {
        answered += u64::from(stream.is_answered().await);
    }
    assert!(answered > 0, "the latest one is answered");
    assert!(
        answered <= 5 + begin.elapsed().as_secs(),
        "{answered} of {} hellos",
        streams.len()
    );
}

#[tokio::test]
async fn one_that_does_not_read_costs_the_others_nothing() {
    let typha = Typha::start().await;
    typha
        .observe(vec![mk_pod("a", "slow", 0), mk_pod("a0", "quick", 0)])
        .await;
    let mut slow = typha.node("slow").await;
    slow.frame().await;
    let mut quick = typha.node("quick").await;
    quick.frame().await;
    // Far more than HTTP/2 flow control lets through to a stream that is not read.
    let (pods, flips) = (200_u16, 60_u16);
    let last = address_of(flips);
    for flip in 1..=flips {
        let of_slow = (1..pods).map(|i| mk_pod(&format!("a{i}"), "slow", flip));
        typha
            .observe(of_slow.chain([mk_pod("a0", "quick", flip)]).collect())
            .await;
        quick
            .until(|held| peers::addresses(held, "a0") == [address_of(flip)])
            .await;
    }
    quick.ack().await;
    let reader = typha
        .channel(&typha.authority, "margay:reader", "margay:readers")
        .await;
    let mut debug = DebugClient::new(reader.expect("our CA"));
    let mut list = async || {
        let answer = debug.list_nodes(ListNodesRequest {}).await.expect("nodes");
        answer.into_inner().nodes
    };
    let by_name = |nodes: &[NodeStatus], name: &str| {
        nodes
            .iter()
            .find(|node| node.node == name)
            .cloned()
            .expect("a node")
    };
    let nodes = list().await;
    let stalled = by_name(&nodes, "slow");
    assert!(
        stalled.pending_records > 0,
        "its connection took everything: {stalled:?}"
    );
    assert!(
        stalled.pending_records <= u32::from(pods),
        "more than its view: {stalled:?}"
    );
    let read = by_name(&nodes, "quick");
    assert_eq!(
        (read.pending_records, read.acked_revision),
        (0, read.sent_revision)
    );
    // It reads again: the buffered frames, then one frame with everything that it missed.
    slow.until(|held| peers::addresses(held, "a7") == [last])
        .await;
    assert!(
        slow.frames < usize::from(flips) / 2,
        "{} frames",
        slow.frames
    );
    slow.ack().await;
    let caught_up = || typha.registry.count_current() == (2, 2);
    until(caught_up).await;
}

#[tokio::test]
async fn a_peer_that_disappears_is_noticed() {
    let ping = Duration::from_millis(100);
    let timeouts = Timeouts {
        ping,
        pong: ping,
        ..Timeouts::default()
    };
    let typha = Typha::start_with(timeouts, &[]).await;
    let proxy = peers::Proxy::start(typha.address).await;
    let channel = typha.channel_at(
        proxy.address,
        &typha.authority,
        "margay:node:n1",
        "margay:nodes",
    );
    let mut agent = Agent::open(channel.await.expect("our CA"), vec![])
        .await
        .expect("a stream");
    agent.frame().await;
    assert_eq!(typha.registry.sessions().len(), 1);
    proxy.freeze();
    until(|| typha.registry.sessions().is_empty()).await;
}

#[tokio::test]
async fn silent_and_malformed_peers_are_cut_off() {
    let timeouts = Timeouts {
        hello: Duration::from_millis(100),
        ..Timeouts::default()
    };
    let typha = Typha::start_with(timeouts, &[]).await;
    let open = async |first: Vec<wire::Up>| {
        let channel = typha
            .channel(&typha.authority, "margay:node:n1", "margay:nodes")
            .await;
        Agent::open_raw(channel.expect("our CA"), first)
            .await
            .expect("a stream")
    };
    let ack = |record: Option<wire::RecordId>| wire::Up {
        message: Some(wire::up::Message::Ack(wire::Ack {
            errors: vec![wire::RecordError {
                id: record,
                message: String::new(),
            }],
            ..wire::Ack::default()
        })),
    };
    let hello = || wire::Up {
        message: Some(wire::up::Message::Hello(wire::Hello::default())),
    };
    let table = [
        (vec![], Code::DeadlineExceeded, "no hello within"),
        (
            vec![ack(None)],
            Code::InvalidArgument,
            "the first message must be hello",
        ),
        (vec![hello(), hello()], Code::InvalidArgument, "hello twice"),
        (
            vec![hello(), ack(None)],
            Code::InvalidArgument,
            "ack.errors.id: missing",
        ),
    ];
    for (messages, code, text) in table {
        let mut agent = open(messages).await;
        let status = agent.end().await;
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(text), "{status:?}");
        until(|| typha.registry.sessions().is_empty()).await;
    }
    // What a later version adds is ignored.
    let mut agent = open(vec![hello(), wire::Up { message: None }]).await;
    agent.frame().await;
    // Not TLS: the connection ends, and all others are served.
    let mut noise = tokio::net::TcpStream::connect(typha.address)
        .await
        .expect("connect");
    tokio::io::AsyncWriteExt::write_all(&mut noise, &[0_u8; 64])
        .await
        .expect("write");
    let mut end = Vec::new();
    let _ = noise.read_to_end(&mut end).await;
    assert_eq!(typha.registry.sessions().len(), 1);
}

#[tokio::test]
async fn nothing_is_sent_before_the_api_is_in_sync() {
    let typha = Typha::start_with(Timeouts::default(), &["Pod"]).await;
    let mut early = typha.node("n1").await;
    typha.send(Event::ListStarted("Pod")).await;
    typha.observe(vec![mk_pod("a", "n1", 1)]).await;
    let answered = tokio::time::timeout(Duration::from_millis(50), early.frame()).await;
    assert!(answered.is_err(), "no view from half of the API");
    assert!(!typha.readiness.is_ready());
    let kind = "Pod";
    let (version, newest) = (0, 0);
    typha
        .send(Event::Sweep {
            kind,
            version,
            newest,
        })
        .await;
    let first = early.frame().await;
    assert!(first.trailer.in_sync);
    assert_eq!(peers::addresses(&early.held, "a"), [address_of(1)]);
    assert!(typha.readiness.is_ready());
}

#[tokio::test]
async fn a_node_reports_addresses_of_its_own_pods_to_all() {
    let typha = Typha::start().await;
    typha.select_everything().await;
    let mut without = mk_pod("a", "n1", 0);
    peers::clear_addresses(&mut without);
    typha.observe(vec![without, mk_pod("b", "n2", 2)]).await;
    let one = typha.node("n1").await;
    let mut two = typha.node("n2").await;
    two.frame().await;
    let address = IpAddr::from(Ipv4Addr::new(10, 9, 9, 9));
    assert!(!peers::is_member_anywhere(&two.held, address));
    let report = |uid: &str| {
        encode_local_endpoint(&LocalEndpoint {
            key: peers::key("a"),
            addresses: vec![address],
            uid: uid.to_owned(),
        })
    };
    // Reports of other nodes, or about another pod of that name, are rejected.
    two.send(report("u-a")).await;
    one.send(report("u-other")).await;
    one.send(report("u-a")).await;
    two.until(|held| peers::is_member_anywhere(held, address))
        .await;
}

/// A node reports to one replica that a pod has lost its address, and to the next one that it has
/// another. The first one returns to the API's state after a while.
#[tokio::test]
async fn reports_of_a_node_expire_after_its_stream() {
    let one = Typha::start_with_grace(Duration::from_millis(50)).await;
    let two = Typha::start().await;
    let report = |addresses: Vec<IpAddr>| {
        encode_local_endpoint(&LocalEndpoint {
            key: peers::key("a"),
            addresses,
            uid: "u-a".to_owned(),
        })
    };
    for typha in [&one, &two] {
        typha.select_everything().await;
        typha
            .observe(vec![mk_pod("a", "n1", 1), mk_pod("b", "n2", 2)])
            .await;
    }
    let mut watcher = one.node("n2").await;
    watcher
        .until(|held| peers::is_member_anywhere(held, address_of(1)))
        .await;
    let reporter = one.node("n1").await;
    reporter.send(report(Vec::new())).await;
    watcher
        .until(|held| !peers::is_member_anywhere(held, address_of(1)))
        .await;
    drop(reporter);
    let reporter = two.node("n1").await;
    reporter.send(report(vec![address_of(7)])).await;
    for typha in [&one, &two] {
        typha.observe(vec![mk_pod("a", "n1", 7)]).await;
    }
    watcher
        .until(|held| peers::is_member_anywhere(held, address_of(7)))
        .await;
}

#[tokio::test]
async fn a_second_stream_replaces_the_first() {
    let typha = Typha::start().await;
    let mut first = typha.node("n1").await;
    first.frame().await;
    let mut second = typha.node("n1").await;
    second.frame().await;
    assert_eq!(first.end().await.code(), Code::Aborted);
    typha.observe(vec![mk_pod("a", "n1", 1)]).await;
    second.frame().await;
    assert_eq!(typha.registry.sessions().len(), 1);
}

#[tokio::test]
async fn at_shutdown_nodes_are_sent_to_other_replicas() {
    let typha = Typha::start().await;
    let mut agents = Vec::new();
    for name in ["n1", "n2", "n3"] {
        let mut agent = typha.node(name).await;
        agent.frame().await;
        agents.push(agent);
    }
    typha.shutdown.trigger();
    for mut agent in agents {
        assert_eq!(agent.end().await.code(), Code::Unavailable);
    }
    typha.ended().await;
}
