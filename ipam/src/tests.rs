//! The allocator against a store in memory that other nodes share: races, conflicts, lost answers,
//! exhaustion.

mod collector;
mod faults;
mod fixture;
mod guard;
mod idle_blocks;
mod loans;
mod named_addresses;
mod namespaces;
mod random;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use margay_api::ipam::block::Block;
use margay_api::ipam::limits::Limits;
use margay_api::v3::ipam::{AllocationAttribute, IPReservationSpec};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::allocator::Allocator;
use super::inputs::{BlockMap, Inputs};
use super::limits::KnownLimits;
use super::pools::{NodePool, Pools, Use};
use super::request::{AddressRequest, Demand, NoAddress};
use super::store::memory::{Contents, Kept, Memory};
use super::store::{AffinityState, Namespace, Objects, Store, StoreError};
use fixture::*;

#[tokio::test]
async fn nodes_that_start_together_share_a_pool_and_no_address() {
    let contents = Memory::default();
    let nodes: Vec<Node> = (0..3)
        .map(|n| mk_node(&format!("n{n}"), &contents, vec![pool("10.0.0.0/24", 28)]))
        .collect();
    let asks = nodes.iter().flat_map(|node| {
        (0..40).map(|n| {
            node.allocator
                .assign(wanted(&format!("{}-{n}", node.store.node)))
        })
    });
    let answers = futures::future::join_all(asks).await;
    let addresses: BTreeSet<IpNet> = answers
        .into_iter()
        .flat_map(|answer| answer.expect("240 addresses serve 120 pods"))
        .collect();
    assert_eq!(addresses.len(), 120);
    let contents = contents.lock();
    for (block, value) in contents.blocks() {
        let owner = value.node().expect("a node's block");
        assert_eq!(
            contents.affinities().get(&(owner.to_owned(), block)),
            Some(&AffinityState::Confirmed),
            "{block} has no confirmed affinity of its owner"
        );
    }
    assert_eq!(contents.handles().len(), 120);
    assert!(
        contents.writes < 120,
        "{} writes: many pods share one",
        contents.writes
    );
}

#[tokio::test]
async fn the_same_handle_has_the_same_address_and_release_gives_it_back() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    let first = node
        .allocator
        .assign(wanted("h"))
        .await
        .expect("an address");
    let (again, other) = tokio::join!(
        node.allocator.assign(wanted("h")),
        node.allocator.assign(wanted("other"))
    );
    assert_eq!(again.expect("the same"), first);
    assert_ne!(other.expect("another"), first);
    node.allocator
        .release("h".to_owned())
        .await
        .expect("release");
    node.allocator
        .release("h".to_owned())
        .await
        .expect("releasing twice is no error");
    let contents = contents.lock();
    assert_eq!(contents.handles().keys().collect::<Vec<_>>(), ["other"]);
    assert_eq!(
        contents
            .blocks()
            .into_values()
            .map(|block| block.allocated().count())
            .sum::<usize>(),
        1
    );
}

#[tokio::test]
async fn somebody_elses_change_of_a_block_is_kept() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    node.allocator
        .assign(wanted("first"))
        .await
        .expect("an address");
    node.store.with(|contents| {
        let mut block = contents.blocks().into_values().next().expect("one block");
        block
            .assign(&wanted("foreign").attribute, |_| false)
            .expect("room");
        contents.put_block(&block);
    });
    let second = node
        .allocator
        .assign(wanted("second"))
        .await
        .expect("an address");
    let foreign = node.store.with(|contents| {
        contents
            .blocks()
            .into_values()
            .flat_map(|block| block.of_handle("foreign"))
            .collect::<Vec<_>>()
    });
    assert_eq!(foreign.len(), 1);
    assert_ne!(second[0].addr(), foreign[0]);
}

#[tokio::test]
async fn a_full_pool_is_reported_and_serves_again_when_space_returns() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/30", 30)]);
    for n in 0..4 {
        node.allocator
            .assign(wanted(&format!("h{n}")))
            .await
            .expect("an address");
    }
    let full = node
        .allocator
        .assign(wanted("late"))
        .await
        .expect_err("four addresses serve four pods");
    assert!(
        matches!(
            &full,
            NoAddress::Exhausted(text) if text.contains("default (10.0.0.0/30)") && text.contains(
                "add an IPPool",
            ),
        ),
        "{full:?}"
    );
    node.allocator
        .release("h2".to_owned())
        .await
        .expect("release");
    node.allocator
        .assign(wanted("late"))
        .await
        .expect("the released address");
    node.pools.send_replace(Some(Arc::new(vec![
        pool("10.0.0.0/30", 30),
        NodePool {
            name: "more".to_owned(),
            ..pool("10.1.0.0/30", 30)
        },
    ])));
    node.allocator
        .assign(wanted("later"))
        .await
        .expect("the new pool");
}

#[tokio::test]
async fn without_a_pool_the_error_has_the_remedy() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, Vec::new());
    let error = node
        .allocator
        .assign(wanted("h"))
        .await
        .expect_err("no pool");
    assert!(
        matches!(&error, NoAddress::Exhausted(text) if text.contains("no IPPool may be used")),
        "{error:?}"
    );
    node.pools.send_replace(Some(Arc::new(vec![NodePool {
        manual: true,
        ..pool("10.0.0.0/26", 26)
    }])));
    assert!(
        node.allocator.assign(wanted("h")).await.is_err(),
        "a pool that must be named served a request that names none"
    );
    let named = AddressRequest {
        ipv4: Demand::Always(vec!["default".to_owned()]),
        ..wanted("h")
    };
    node.allocator.assign(named).await.expect("the named pool");
}

#[tokio::test]
async fn a_restarted_node_uses_the_blocks_that_it_has() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/24", 26)]);
    let address = node
        .allocator
        .assign(wanted("before"))
        .await
        .expect("an address");
    let restarted = mk_node("n1", &contents, vec![pool("10.0.0.0/24", 26)]);
    notify_blocks(&restarted, "n1");
    restarted
        .allocator
        .release("before".to_owned())
        .await
        .expect("found by its handle, loaded or not");
    restarted
        .allocator
        .assign(wanted("after"))
        .await
        .expect("an address");
    let left = restarted.store.with(|contents| {
        contents
            .blocks()
            .into_values()
            .flat_map(|block| block.of_handle("before"))
            .count()
    });
    assert_eq!(left, 0, "{address:?} was not released");
}

#[tokio::test]
async fn a_pod_gets_an_address_of_each_pools_version_under_one_handle() {
    let contents = Memory::default();
    let node = dual("n1", &contents);
    let asks = (0..20).map(|n| node.allocator.assign(wanted(&format!("h{n}"))));
    let mut all = BTreeSet::new();
    for answer in futures::future::join_all(asks).await {
        let addresses = answer.expect("both versions have room");
        assert_eq!(
            addresses
                .iter()
                .map(|net| net.addr().is_ipv6())
                .collect::<Vec<_>>(),
            [false, true]
        );
        all.extend(addresses);
    }
    assert_eq!(all.len(), 40);
    let (blocks, addresses) = node.store.with(|contents| held(contents, "h7"));
    assert_eq!(
        (blocks.len(), addresses.len()),
        (2, 2),
        "{blocks:?} {addresses:?}"
    );
    let again = node.allocator.assign(wanted("h7")).await.expect("the same");
    assert_eq!(
        again
            .iter()
            .map(|net| net.addr().to_string())
            .collect::<Vec<_>>(),
        addresses
    );
    node.allocator
        .release("h7".to_owned())
        .await
        .expect("release");
    assert_eq!(
        node.store.with(|contents| held(contents, "h7")),
        (vec![], vec![])
    );
    assert_eq!(node.store.with(|contents| held(contents, "h8").1.len()), 2);
}

#[tokio::test]
async fn what_is_asked_for_by_version_is_given_and_nothing_else() {
    let contents = Memory::default();
    let node = dual("n1", &contents);
    let six = AddressRequest {
        ipv4: Demand::Never,
        ..wanted("six")
    };
    assert!(
        node.allocator.assign(six).await.expect("an address")[0]
            .addr()
            .is_ipv6()
    );
    let named = AddressRequest {
        ipv6: Demand::Always(vec!["fd00::/120".to_owned()]),
        ..wanted("both")
    };
    assert_eq!(
        node.allocator
            .assign(named)
            .await
            .expect("two addresses")
            .len(),
        2
    );
    let nowhere = AddressRequest {
        ipv6: Demand::Always(vec!["default".to_owned()]),
        ..wanted("none")
    };
    let error = node
        .allocator
        .assign(nowhere)
        .await
        .expect_err("the pool is of the other version");
    assert!(
        matches!(
            &error,
            NoAddress::Refused(text) if text.contains("not of IPv6") && text.contains("ipv6_pools"),
        ),
        "{error:?}"
    );
    assert_eq!(
        node.store.with(|contents| held(contents, "none")),
        (vec![], vec![]),
        "all or nothing"
    );
}

#[tokio::test]
async fn a_pod_that_cannot_have_both_gets_neither() {
    let contents = Memory::default();
    let six = NodePool {
        name: "six".to_owned(),
        ..pool("fd00::/127", 127)
    };
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/24", 26), six.clone()]);
    for n in 0..2 {
        node.allocator
            .assign(wanted(&format!("h{n}")))
            .await
            .expect("both");
    }
    let error = node
        .allocator
        .assign(wanted("late"))
        .await
        .expect_err("IPv6 is used up");
    assert!(
        matches!(&error, NoAddress::Exhausted(text) if text.contains("six (fd00::/127)")),
        "{error:?}"
    );
    assert_eq!(
        node.store.with(|contents| held(contents, "late")),
        (vec![], vec![])
    );
    node.allocator
        .release("h0".to_owned())
        .await
        .expect("release");
    assert_eq!(
        node.allocator
            .assign(wanted("late"))
            .await
            .expect("both")
            .len(),
        2
    );
    node.pools
        .send_replace(Some(Arc::new(vec![pool("10.0.0.0/24", 26)])));
    assert_eq!(
        node.allocator
            .assign(wanted("four"))
            .await
            .expect("the pool of IPv6 is gone")
            .len(),
        1
    );
    assert_eq!(
        node.allocator
            .assign(wanted("late"))
            .await
            .expect("what it has")
            .len(),
        2
    );
}

#[tokio::test]
async fn a_restarted_node_gives_back_what_is_in_blocks_that_it_has_not_read_yet() {
    let contents = Memory::default();
    let node = dual("n1", &contents);
    node.allocator
        .assign(wanted("before"))
        .await
        .expect("two addresses");
    let restarted = dual("n1", &contents);
    restarted.map.send_replace(None);
    restarted
        .allocator
        .release("before".to_owned())
        .await
        .expect("its object names the blocks");
    assert_eq!(
        restarted.store.with(|contents| held(contents, "before")),
        (vec![], vec![])
    );
}

#[tokio::test]
async fn a_node_claims_as_many_blocks_as_it_may() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/24", 30)]);
    node.limit(|limits| limits.max_blocks = 2);
    for n in 0..8 {
        node.allocator
            .assign(wanted(&format!("h{n}")))
            .await
            .expect("two blocks serve eight");
    }
    let refused = node
        .allocator
        .assign(wanted("late"))
        .await
        .expect_err("a third block");
    assert!(
        matches!(&refused, NoAddress::Exhausted(text) if text.contains("maxBlocksPerHost")),
        "{refused:?}"
    );
    node.limit(|limits| limits.max_blocks = 3);
    node.allocator
        .assign(wanted("late"))
        .await
        .expect("a third block");

    let other = mk_node("n2", &contents, vec![pool("10.1.0.0/24", 30)]);
    other.limit(|limits| limits.may_claim = false);
    let refused = other
        .allocator
        .assign(wanted("other"))
        .await
        .expect_err("no block");
    assert!(
        matches!(&refused, NoAddress::Exhausted(text) if text.contains("autoAllocateBlocks")),
        "{refused:?}"
    );
    let refused = other
        .allocator
        .assign(exact("other", &["10.1.0.255"]))
        .await
        .expect_err("in no block");
    assert!(
        matches!(&refused, NoAddress::Refused(text) if text.contains("autoAllocateBlocks")),
        "{refused:?}"
    );
    assert!(
        contents
            .lock()
            .blocks()
            .values()
            .all(|block| block.node() == Some("n1"))
    );
}

#[tokio::test]
async fn while_the_data_is_locked_nothing_is_written() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    node.allocator
        .assign(wanted("before"))
        .await
        .expect("an address");
    node.limit(|limits| limits.is_locked = true);
    let writes = node.store.with(|contents| contents.writes);
    let assigned = node
        .allocator
        .assign(wanted("late"))
        .await
        .expect_err("locked");
    let named = node
        .allocator
        .assign(exact("named", &["10.0.0.60"]))
        .await
        .expect_err("locked");
    let released = node
        .allocator
        .release("before".to_owned())
        .await
        .expect_err("locked");
    for error in [assigned, named, released] {
        assert!(
            matches!(&error, NoAddress::Unavailable(text) if text.contains("datastoreReady false")),
            "{error:?}"
        );
    }
    assert_eq!(node.store.with(|contents| contents.writes), writes);
    node.limit(|limits| limits.is_locked = false);
    node.allocator
        .assign(wanted("late"))
        .await
        .expect("unlocked");
    node.allocator
        .release("before".to_owned())
        .await
        .expect("unlocked");
}

#[tokio::test]
async fn before_the_bounds_are_known_nobody_gets_an_address() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    node.limits.send_replace(None);
    let early = node.allocator.assign(wanted("early"));
    let known = async {
        tokio::task::yield_now().await;
        assert_eq!(node.store.with(|contents| contents.writes), 0);
        node.limits.send_replace(Some(Arc::default()));
    };
    tokio::join!(early, known)
        .0
        .expect("an address, once they are");
}

#[tokio::test]
async fn a_pool_that_is_named_must_be_there() {
    let contents = Memory::default();
    let far = NodePool {
        name: "far".to_owned(),
        selected: false,
        ..pool("10.9.0.0/26", 26)
    };
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26), far]);
    let of = |handle: &str, pools: &[&str]| AddressRequest {
        ipv4: Demand::Always(pools.iter().map(|pool| (*pool).to_owned()).collect()),
        ..wanted(handle)
    };
    let error = node
        .allocator
        .assign(of("h", &["default", "none"]))
        .await
        .expect_err("one of them is not there");
    assert!(
        matches!(
            &error,
            NoAddress::Refused(text) if text.contains("IPPool \"none\" does not exist"),
        ),
        "{error:?}"
    );
    let near = node
        .allocator
        .assign(wanted("near"))
        .await
        .expect("a pool that selects the node")[0];
    assert!(near.to_string().starts_with("10.0.0."), "{near}");
    let far = node
        .allocator
        .assign(of("far", &["far"]))
        .await
        .expect("its selector counts for those who do not name it")[0];
    assert!(far.to_string().starts_with("10.9.0."), "{far}");
    let error = node
        .allocator
        .assign(exact("exact", &["10.9.0.60"]))
        .await
        .expect_err("not a pool for this node");
    assert!(
        matches!(
            &error,
            NoAddress::Refused(text) if text.contains("is in IPPool far, whose nodeSelector"),
        ),
        "{error:?}"
    );
}
