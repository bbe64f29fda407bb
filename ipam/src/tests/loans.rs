//! Addresses out of others' blocks, for nodes that have no room and can claim no block.

use super::*;

/// Nodes that know of all blocks, on one pool.
fn mk_nodes(count: usize, contents: &Memory, pools: &[NodePool]) -> Vec<Node> {
    (1..=count)
        .map(|n| mk_node(&format!("n{n}"), contents, pools.to_vec()))
        .collect()
}

async fn fill(node: &Node, prefix: &str, count: usize) -> BTreeSet<IpNet> {
    let mut given = BTreeSet::new();
    for number in 0..count {
        given.extend(
            node.allocator
                .assign(wanted(&format!("{prefix}{number}")))
                .await
                .expect("room"),
        );
    }
    given
}

#[tokio::test]
async fn five_nodes_share_four_blocks() {
    let contents = Memory::default();
    let nodes = mk_nodes(5, &contents, &[pool("10.0.0.0/27", 29)]);
    let mut given = BTreeSet::new();
    for (number, node) in nodes.iter().enumerate() {
        notify_all(&nodes.iter().collect::<Vec<_>>());
        let tunnel = AddressRequest {
            usage: Use::Tunnel,
            ipv4: Demand::Always(Vec::new()),
            ipv6: Demand::Never,
            ..wanted(&format!("vxlan-tunnel-addr-n{number}"))
        };
        let first = node
            .allocator
            .assign(tunnel.clone())
            .await
            .expect("a tunnel of every node");
        assert_eq!(
            node.allocator.assign(tunnel).await.expect("the same"),
            first
        );
        given.extend(first);
        given.extend(fill(node, &format!("p{number}-"), 4).await);
    }
    assert_eq!(given.len(), 25, "no address twice");
    notify_all(&nodes.iter().collect::<Vec<_>>());
    given.extend(fill(&nodes[4], "more", 7).await);
    assert_eq!(given.len(), 32, "all that there are");
    let full = nodes[4]
        .allocator
        .assign(wanted("late"))
        .await
        .expect_err("32 addresses");
    for part in [
        "node n5 has no block for it",
        "default (10.0.0.0/27) is taken",
        "none was found in blocks of other nodes",
    ] {
        assert!(full.to_string().contains(part), "{full}");
    }
    nodes[4]
        .allocator
        .release("more3".to_owned())
        .await
        .expect("release");
    nodes[4]
        .allocator
        .assign(wanted("late"))
        .await
        .expect("the address that is free again");
    assert_eq!(contents.lock().blocks().len(), 4);
    for number in 0..4 {
        nodes[4]
            .allocator
            .release(format!("p4-{number}"))
            .await
            .expect("release");
        assert_eq!(
            nodes[4]
                .store
                .with(|contents| held(contents, &format!("p4-{number}"))),
            (vec![], vec![])
        );
    }
}

#[tokio::test]
async fn a_tunnel_whose_address_is_borrowed_has_the_same_after_a_restart() {
    let contents = Memory::default();
    let nodes = mk_nodes(2, &contents, &[pool("10.0.0.0/29", 29)]);
    fill(&nodes[0], "a", 2).await;
    notify_all(&[&nodes[0], &nodes[1]]);
    let tunnel = || AddressRequest {
        usage: Use::Tunnel,
        ..wanted("vxlan-tunnel-addr-n2")
    };
    let first = nodes[1].allocator.assign(tunnel()).await.expect("borrowed");
    let restarted = mk_node(
        "n2",
        &contents,
        vec![
            pool("10.0.0.0/29", 29),
            named_pool("new", "10.1.0.0/29", 29),
        ],
    );
    notify_all(&[&restarted]);
    restarted
        .allocator
        .assign(wanted("pod"))
        .await
        .expect("a block of its own");
    assert_eq!(
        restarted
            .allocator
            .assign(tunnel())
            .await
            .expect("the same"),
        first
    );
}

#[tokio::test]
async fn what_may_not_be_borrowed_is_refused_with_the_reason() {
    let contents = Memory::default();
    let nodes = mk_nodes(2, &contents, &[pool("10.0.0.0/28", 28)]);
    fill(&nodes[0], "a", 2).await;
    notify_all(&[&nodes[0], &nodes[1]]);
    nodes[1].limit(|limits| limits.strict_affinity = true);
    let strict = nodes[1]
        .allocator
        .assign(wanted("h"))
        .await
        .expect_err("strict");
    assert!(
        matches!(&strict, NoAddress::Exhausted(text) if text.contains("has strictAffinity")),
        "{strict}"
    );
    nodes[1].limit(|limits| {
        limits.strict_affinity = false;
        limits.reserved = vec!["10.0.0.0/28".parse().expect("a range")];
    });
    let reserved = nodes[1]
        .allocator
        .assign(wanted("h"))
        .await
        .expect_err("reserved");
    assert!(matches!(reserved, NoAddress::Exhausted(_)), "{reserved}");
    nodes[1].limit(|limits| limits.reserved.clear());
    let closed = NodePool {
        closed: Some("is disabled".to_owned()),
        ..pool("10.0.0.0/28", 28)
    };
    nodes[1].pools.send_replace(Some(Arc::new(vec![closed])));
    let closed = nodes[1]
        .allocator
        .assign(wanted("h"))
        .await
        .expect_err("disabled");
    assert!(
        matches!(&closed, NoAddress::Exhausted(text) if text.contains("default is disabled")),
        "{closed}"
    );
    nodes[1]
        .pools
        .send_replace(Some(Arc::new(vec![pool("10.0.0.0/28", 28)])));
    // Being given back: neither its addresses nor its range are to be had.
    let present = contents.lock().blocks();
    for block in present.values() {
        let spec = margay_api::v3::ipam::IPAMBlockSpec {
            deleted: true,
            ..block.spec().clone()
        };
        contents
            .lock()
            .put_block(&Block::parse(spec).expect("sound"));
    }
    nodes[1]
        .allocator
        .assign(wanted("h"))
        .await
        .expect_err("marked as deleted");
    assert_eq!(
        nodes[1].store.with(|contents| held(contents, "h").1),
        Vec::<String>::new()
    );
}

#[tokio::test]
async fn a_node_that_may_claim_no_more_borrows() {
    let bounds: [fn(&mut Limits); 2] = [
        |limits| limits.max_blocks = 1,
        |limits| limits.may_claim = false,
    ];
    for limit in bounds {
        let contents = Memory::default();
        let nodes = mk_nodes(2, &contents, &[pool("10.0.0.0/24", 30)]);
        let mine = fill(&nodes[1], "mine", 1).await;
        fill(&nodes[0], "a", 2).await;
        nodes[1].limit(limit);
        notify_all(&[&nodes[0], &nodes[1]]);
        let mut given = fill(&nodes[1], "b", 5).await;
        given.extend(mine);
        assert_eq!(given.len(), 6);
        let own = nodes[1].store.with(|contents| {
            contents
                .blocks()
                .into_values()
                .filter(|block| block.node() == Some("n2"))
                .count()
        });
        assert!(
            own <= 2,
            "{own} blocks of a node that may claim one, and a spare one before"
        );
        nodes[1].limit(|limits| limits.strict_affinity = true);
        let refused = nodes[1]
            .allocator
            .assign(wanted("late"))
            .await
            .expect_err("strict");
        assert!(matches!(refused, NoAddress::Exhausted(_)), "{refused}");
    }
}

#[tokio::test]
async fn a_pod_of_both_versions_may_borrow_one_of_them() {
    let contents = Memory::default();
    let pools = [
        pool("10.0.0.0/29", 29),
        named_pool("six", "fd00::/120", 122),
    ];
    let nodes = mk_nodes(2, &contents, &pools);
    fill(&nodes[0], "a", 1).await;
    notify_all(&[&nodes[0], &nodes[1]]);
    let both = nodes[1]
        .allocator
        .assign(wanted("h"))
        .await
        .expect("IPv4 borrowed, IPv6 of its own block");
    assert_eq!(
        both.iter()
            .map(|net| net.addr().is_ipv6())
            .collect::<Vec<_>>(),
        [false, true]
    );
    assert_eq!(
        nodes[1]
            .allocator
            .assign(wanted("h"))
            .await
            .expect("the same"),
        both
    );
    let (blocks, addresses) = nodes[1].store.with(|contents| held(contents, "h"));
    assert_eq!(
        (blocks.len(), addresses.len()),
        (2, 2),
        "{blocks:?} {addresses:?}"
    );
    // Also by one who knows nothing of the loan.
    let restarted = mk_node("n2", &contents, pools.to_vec());
    notify_all(&[&restarted]);
    restarted
        .allocator
        .release("h".to_owned())
        .await
        .expect("release");
    assert_eq!(
        nodes[1].store.with(|contents| held(contents, "h")),
        (vec![], vec![])
    );
}

#[tokio::test(start_paused = true)]
async fn an_address_rests_before_it_is_given_again() {
    let contents = Memory::default();
    let nodes = mk_nodes(2, &contents, &[pool("10.0.0.0/30", 30)]);
    nodes
        .iter()
        .for_each(|node| node.limit(|limits| limits.cooldown = 60));
    fill(&nodes[0], "a", 4).await;
    notify_all(&[&nodes[0], &nodes[1]]);
    nodes[0]
        .allocator
        .release("a1".to_owned())
        .await
        .expect("release");
    nodes[0]
        .allocator
        .release("a1".to_owned())
        .await
        .expect("twice is no error");
    let resting = nodes[0]
        .allocator
        .assign(wanted("b"))
        .await
        .expect_err("it rests");
    assert!(
        resting
            .to_string()
            .contains("1 addresses that rest for the 60 seconds of ipCooldownSeconds"),
        "{resting}"
    );
    nodes[1]
        .allocator
        .assign(wanted("b"))
        .await
        .expect_err("for others as well");
    let named = nodes[1]
        .allocator
        .assign(exact("b", &["10.0.0.1"]))
        .await
        .expect_err("who names it too");
    assert!(
        matches!(&named, NoAddress::Unavailable(text) if text.contains("10.0.0.1 was released at")),
        "{named}"
    );
    let restarted = mk_node("n1", &contents, vec![pool("10.0.0.0/30", 30)]);
    restarted.limit(|limits| limits.cooldown = 60);
    notify_all(&[&restarted]);
    restarted
        .allocator
        .assign(wanted("b"))
        .await
        .expect_err("it outlives the agent");
    let rested = std::time::Duration::from_secs(60) + crate::idle_blocks::SCAN_INTERVAL;
    tokio::time::sleep(rested).await;
    let lent = nodes[1]
        .allocator
        .assign(wanted("b"))
        .await
        .expect("borrowed");
    assert_eq!(lent[0].addr().to_string(), "10.0.0.1");
    nodes[1]
        .allocator
        .release("b".to_owned())
        .await
        .expect("release");
    tokio::time::sleep(rested).await;
    assert_eq!(
        restarted
            .allocator
            .assign(wanted("c"))
            .await
            .expect("its own"),
        lent
    );
}
