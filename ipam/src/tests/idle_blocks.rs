//! Blocks that are not needed go back, and whatever ends in the middle leaves nothing that nobody
//! will find.

use std::time::Duration;

use margay_api::network::TunnelKind;
use margay_api::rule::IpVersion;

use super::*;
use crate::addresses::NodeAddresses;
use crate::idle_blocks::{IDLE_GRACE, SCAN_INTERVAL};
use crate::namespaces;

/// Lets the owner look for what it does not need, and do it.
async fn wait(time: Duration) {
    tokio::time::sleep(time).await;
    tokio::time::sleep(SCAN_INTERVAL + Duration::from_secs(1)).await;
}

fn ranges(node: &Node, name: &str) -> Vec<String> {
    node.store.with(|contents| {
        let own = contents
            .blocks()
            .into_values()
            .filter(|block| block.node() == Some(name));
        own.map(|block| block.cidr().to_string()).collect()
    })
}

#[tokio::test(start_paused = true)]
async fn what_a_burst_has_claimed_is_others_afterwards() {
    let contents = Memory::default();
    let pools = vec![pool("10.0.0.0/26", 28)];
    let (one, two) = (
        mk_node("n1", &contents, pools.clone()),
        mk_node("n2", &contents, pools),
    );
    for number in 0..50 {
        one.allocator
            .assign(wanted(&format!("h{number}")))
            .await
            .expect("64 addresses");
    }
    two.limit(|limits| limits.strict_affinity = true);
    notify_all(&[&one, &two]);
    two.allocator
        .assign(wanted("late"))
        .await
        .expect_err("n1 has all four blocks");
    for number in 0..50 {
        one.allocator
            .release(format!("h{number}"))
            .await
            .expect("release");
    }
    notify_all(&[&one, &two]);
    wait(Duration::from_secs(60)).await;
    assert_eq!(ranges(&one, "n1").len(), 4, "not yet");
    wait(IDLE_GRACE).await;
    assert_eq!(ranges(&one, "n1").len(), 1, "the last one stays");
    let affinities = one
        .store
        .with(|contents| contents.affinities().values().copied().collect::<Vec<_>>());
    assert_eq!(affinities, [AffinityState::Confirmed]);
    notify_all(&[&one, &two]);
    for number in 0..40 {
        two.allocator
            .assign(wanted(&format!("late{number}")))
            .await
            .expect("three blocks");
        notify_all(&[&one, &two]);
    }
    wait(IDLE_GRACE).await;
    assert_eq!(ranges(&two, "n2").len(), 3, "what is in use stays");
}

#[tokio::test(start_paused = true)]
async fn blocks_of_pools_that_serve_no_more_go_and_count_no_more() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/24", 30)]);
    node.limit(|limits| limits.max_blocks = 20);
    for number in 0..76 {
        node.allocator
            .assign(wanted(&format!("h{number}")))
            .await
            .expect("19 blocks and a spare one");
    }
    for number in 1..76 {
        node.allocator
            .release(format!("h{number}"))
            .await
            .expect("release");
    }
    notify_all(&[&node]);
    assert!(ranges(&node, "n1").len() >= 19);
    let disabled = NodePool {
        closed: Some("is disabled".to_owned()),
        ..pool("10.0.0.0/24", 30)
    };
    let new = named_pool("new", "10.1.0.0/24", 30);
    node.pools
        .send_replace(Some(Arc::new(vec![disabled, new.clone()])));
    let fresh = node
        .allocator
        .assign(wanted("fresh"))
        .await
        .expect("they do not count");
    assert!(fresh[0].to_string().starts_with("10.1.0."), "{fresh:?}");
    wait(IDLE_GRACE).await;
    let old = |node: &Node| {
        ranges(node, "n1")
            .into_iter()
            .filter(|range| range.starts_with("10.0.0."))
            .count()
    };
    assert_eq!(old(&node), 1, "the one that a pod is in");
    node.pools.send_replace(Some(Arc::new(vec![new])));
    notify_all(&[&node]);
    node.allocator
        .release("h0".to_owned())
        .await
        .expect("release");
    wait(Duration::ZERO).await;
    assert_eq!(old(&node), 0, "its pool is gone, so it does not wait");
    assert_eq!(
        node.store.with(|contents| contents.affinities().len()),
        ranges(&node, "n1").len()
    );
}

#[tokio::test(start_paused = true)]
async fn a_block_that_somebody_borrows_from_meanwhile_stays() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/28", 29)]);
    for number in 0..9 {
        node.allocator
            .assign(wanted(&format!("h{number}")))
            .await
            .expect("an address");
    }
    for number in 0..9 {
        node.allocator
            .release(format!("h{number}"))
            .await
            .expect("release");
    }
    node.store.with(|contents| {
        for mut block in contents.blocks().into_values() {
            block
                .assign(&wanted("guest").attribute, |_| false)
                .expect("room");
            contents.put_block(&block);
        }
    });
    wait(IDLE_GRACE).await;
    assert_eq!(ranges(&node, "n1").len(), 2);
    let affinities = node
        .store
        .with(|contents| contents.affinities().values().copied().collect::<Vec<_>>());
    assert_eq!(affinities, [AffinityState::Confirmed; 2]);
    node.allocator
        .assign(wanted("pod"))
        .await
        .expect("it serves on");
}

#[tokio::test(start_paused = true)]
async fn a_block_of_no_pool_goes_when_those_who_borrowed_from_it_have_given_back() {
    let contents = Memory::default();
    let pools = vec![pool("10.0.0.0/29", 29)];
    let of = |node: &str, handle: &str| {
        let mut wanted = wanted(handle);
        wanted.attribute.secondary = Some(BTreeMap::from([("node".to_owned(), node.to_owned())]));
        wanted
    };
    let (one, two) = (
        mk_node("n1", &contents, pools.clone()),
        mk_node("n2", &contents, pools),
    );
    one.allocator
        .assign(of("n1", "own"))
        .await
        .expect("an address");
    notify_all(&[&one, &two]);
    two.allocator
        .assign(of("n2", "guest"))
        .await
        .expect("a loan");
    one.allocator
        .assign(of("n1", "other"))
        .await
        .expect("a write that meets the loan");
    for node in [&one, &two] {
        node.pools.send_replace(Some(Arc::new(Vec::new())));
    }
    for handle in ["own", "other"] {
        one.allocator
            .release(handle.to_owned())
            .await
            .expect("release");
    }
    wait(IDLE_GRACE).await;
    assert_eq!(ranges(&one, "n1").len(), 1, "the guest is in it");
    two.allocator
        .release("guest".to_owned())
        .await
        .expect("release");
    wait(Duration::ZERO).await;
    assert_eq!(ranges(&one, "n1").len(), 0);
}

/// A node's work from the first block to the last: pods come, one borrows, all go, and blocks go
/// back.
async fn live(node: &Node, nodes: &[&Node]) {
    for number in 0..10 {
        let _ = node.allocator.assign(wanted(&format!("h{number}"))).await;
        notify_all(nodes);
    }
    let _ = node.allocator.assign(exact("exact", &["10.0.0.31"])).await;
    for number in 0..10 {
        let _ = node.allocator.release(format!("h{number}")).await;
    }
    let _ = node.allocator.release("exact".to_owned()).await;
    wait(IDLE_GRACE).await;
}

#[tokio::test(start_paused = true)]
async fn an_end_at_any_step_loses_no_address_and_gives_none_twice() {
    for steps in 0.. {
        let contents = Memory::default();
        let pools = vec![pool("10.0.0.0/27", 30)];
        let other = mk_node("n2", &contents, pools.clone());
        for number in 0..18 {
            other
                .allocator
                .assign(wanted(&format!("other{number}")))
                .await
                .expect("others have most of it");
        }
        let end = End::after(steps);
        let mortal = mk_mortal("n1", &contents, pools.clone(), end.clone());
        notify_all(&[&mortal, &other]);
        let all = [&mortal, &other];
        let lived = live(&mortal, &all);
        let is_over = async {
            while !end.has_come() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let has_ended = tokio::select! { biased; () = is_over => true, () = lived => false };
        drop(mortal);
        // Started again, it takes back what was not finished, as the service does, and goes on.
        let node = mk_node("n1", &contents, pools);
        notify_all(&[&node, &other]);
        for handle in (0..10).map(|n| format!("h{n}")).chain(["exact".to_owned()]) {
            node.allocator.release(handle).await.expect("release");
        }
        notify_all(&[&node, &other]);
        node.allocator
            .assign(wanted("last"))
            .await
            .expect("it serves");
        notify_all(&[&node, &other]);
        wait(IDLE_GRACE).await;
        node.allocator
            .release("last".to_owned())
            .await
            .expect("release");
        wait(IDLE_GRACE).await;
        node.store.with(|contents| check(contents, steps));
        if !has_ended {
            assert!(steps > 100, "{steps} steps are not the whole of it");
            return;
        }
    }
}

/// Nothing of `n1` is left but a block or two, whose affinities are what they should be; what has
/// no block is marked as about to go, or was about to be made.
fn check(contents: &Contents, steps: u32) {
    let mut addresses = BTreeSet::new();
    for (cidr, block) in contents.blocks() {
        // Marked as deleted, and empty: the collector finishes it.
        if block.spec().deleted && block.allocated().next().is_none() {
            continue;
        }
        for (address, attribute) in block.allocated() {
            let handle = attribute.handle_id.clone().unwrap_or_default();
            assert!(
                handle.starts_with("other"),
                "{handle} has {address} for ever after {steps} steps"
            );
            assert!(
                addresses.insert(address),
                "{address} twice after {steps} steps"
            );
        }
        let owner = block.node().expect("a node's").to_owned();
        let affinity = contents.affinities().get(&(owner, cidr)).copied();
        assert_eq!(
            affinity,
            Some(AffinityState::Confirmed),
            "{cidr} after {steps} steps"
        );
    }
    assert_eq!(addresses.len(), 18);
    let own = contents
        .blocks()
        .into_values()
        .filter(|block| block.node() == Some("n1"))
        .count();
    assert!(own <= 1, "{own} blocks of n1 after {steps} steps");
    for ((node, cidr), state) in contents.affinities() {
        let is_needed = contents
            .block(cidr)
            .is_some_and(|block| block.node() == Some(node.as_str()));
        assert!(
            is_needed || state != AffinityState::Confirmed,
            "affinity {node} {cidr} after {steps} steps"
        );
    }
    let handles: Vec<String> = contents
        .handles()
        .into_keys()
        .filter(|handle| !handle.starts_with("other"))
        .collect();
    assert_eq!(handles, Vec::<String>::new(), "after {steps} steps");
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_is_being_deleted_loses_its_tunnels_at_once_and_its_blocks_when_they_are_empty()
{
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![named_pool("old", "10.0.0.0/24", 28)]);
    let look = namespaces::reader(Arc::new(node.store.clone()));
    let addresses = NodeAddresses::new("n1".to_owned(), node.allocator.clone(), look, clock);
    let pod = node
        .allocator
        .assign(wanted("pod"))
        .await
        .expect("an address");
    let tunnel = addresses
        .tunnel(TunnelKind::Vxlan(IpVersion::V4))
        .await
        .expect("an address");
    let closed = Some("is being deleted".to_owned());
    let leaving = NodePool {
        closed,
        is_terminating: true,
        ..named_pool("old", "10.0.0.0/24", 28)
    };
    node.pools
        .send_replace(Some(Arc::new(vec![leaving.clone()])));
    assert_eq!(
        addresses
            .tunnel(TunnelKind::Vxlan(IpVersion::V4))
            .await
            .expect("the same"),
        tunnel,
        "there is no other pool"
    );
    node.pools.send_replace(Some(Arc::new(vec![
        leaving,
        named_pool("new", "10.1.0.0/24", 28),
    ])));
    assert!(addresses.has_to_move(&tunnel));
    let moved = addresses
        .tunnel(TunnelKind::Vxlan(IpVersion::V4))
        .await
        .expect("another one");
    assert!(moved[0].to_string().starts_with("10.1.0."), "{moved:?}");
    assert_eq!(
        addresses
            .tunnel(TunnelKind::Vxlan(IpVersion::V4))
            .await
            .expect("the same"),
        moved
    );
    assert_eq!(
        node.allocator
            .assign(wanted("pod"))
            .await
            .expect("the same"),
        pod,
        "who has an address keeps it"
    );
    notify_all(&[&node]);
    wait(IDLE_GRACE).await;
    let old = || {
        ranges(&node, "n1")
            .into_iter()
            .filter(|range| range.starts_with("10.0.0."))
            .count()
    };
    assert_eq!(old(), 1);
    node.allocator
        .release("pod".to_owned())
        .await
        .expect("release");
    wait(Duration::ZERO).await;
    assert_eq!(old(), 0, "it does not wait for the grace");
}
