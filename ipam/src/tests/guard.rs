//! No block that overlaps another, by whichever way, and no answer out of an old cache.

use super::*;

fn cidr(text: &str) -> IpNet {
    text.parse().expect("a range")
}

/// Puts a block of a node into storage, with one address of it taken, as an earlier pool has left
/// it.
fn put_block(contents: &Memory, range: &str, node: &str, handle: &str) -> IpNet {
    let mut block = Block::new(cidr(range), node, String::new());
    let address = block
        .assign(&exact(handle, &[]).attribute, |_| false)
        .expect("room");
    contents.lock().put_block(&block);
    contents.lock().put_handle(handle, &[cidr(range)]);
    address.into()
}

/// Every pair of blocks that have addresses in common.
fn overlaps(contents: &Memory) -> Vec<(IpNet, IpNet)> {
    let blocks: Vec<IpNet> = contents.lock().blocks().into_keys().collect();
    let pairs = blocks
        .iter()
        .flat_map(|one| blocks.iter().map(move |other| (*one, *other)));
    pairs
        .filter(|(one, other)| one != other && one.contains(other))
        .collect()
}

#[tokio::test]
async fn blocks_of_a_new_size_overlap_no_block_of_the_former_size() {
    // Former and new size of blocks, and whether the view has the former block yet: without it,
    // larger ones are found by name.
    for (former, new, is_in_view) in [
        (29, 26, true),
        (26, 29, true),
        (26, 29, false),
        (28, 28, false),
    ] {
        let contents = Memory::default();
        let held = put_block(&contents, &format!("10.0.0.0/{former}"), "n1", "first");
        let node = mk_node("n2", &contents, vec![pool("10.0.0.0/25", new)]);
        let whole = || exact("second", &[&held.addr().to_string()]);
        if is_in_view {
            notify_all(&[&node]);
        }
        let error = node
            .allocator
            .assign(whole())
            .await
            .expect_err("it is taken");
        assert!(
            matches!(&error, NoAddress::Refused(text) if text.contains("is taken by pod x/first")),
            "{error:?}"
        );
        for number in 0..40 {
            let given = node
                .allocator
                .assign(wanted(&format!("h{number}")))
                .await
                .expect("the pool has 128 addresses");
            assert_ne!(given, [held], "/{former} to /{new}");
        }
        assert!(overlaps(&contents).is_empty(), "/{former} to /{new}");
        // Free in the former block: it is taken out of that, and no other block is made for it.
        let beside = node
            .allocator
            .assign(exact("beside", &["10.0.0.1"]))
            .await
            .expect("it is free");
        let (blocks, addresses) = node.store.with(|contents| held_by(contents, "beside"));
        assert_eq!(
            (blocks, addresses),
            (
                vec![format!("10.0.0.0/{former}")],
                vec![beside[0].addr().to_string()]
            )
        );
        node.allocator
            .release("beside".to_owned())
            .await
            .expect("release");
        assert_eq!(
            node.store.with(|contents| held_by(contents, "beside")),
            (vec![], vec![])
        );
    }
}

use super::held as held_by;

/// Damages a block, as an edit by hand may.
fn damage(contents: &Memory, range: &str) {
    let mut spec = Block::new(cidr(range), "n9", String::new()).spec().clone();
    spec.allocations.pop();
    contents.lock().put_block_spec(cidr(range), spec);
}

#[tokio::test]
async fn a_block_that_cannot_be_read_costs_the_pool_its_range_alone() {
    for (range, left) in [
        ("10.0.0.0/30", 12),
        ("10.0.0.4/30", 12),
        ("10.0.0.8/30", 12),
        ("10.0.0.8/29", 8),
    ] {
        for node in ["n1", "n2", "n3"] {
            let contents = Memory::default();
            damage(&contents, range);
            let node = mk_node(node, &contents, vec![pool("10.0.0.0/28", 30)]);
            for number in 0..left {
                let given = node
                    .allocator
                    .assign(wanted(&format!("h{number}")))
                    .await
                    .expect("it is in another block");
                assert!(!cidr(range).contains(&given[0]), "{given:?} in {range}");
            }
            let full = node
                .allocator
                .assign(wanted("late"))
                .await
                .expect_err("the rest cannot be read");
            assert!(matches!(full, NoAddress::Exhausted(_)), "{full:?}");
            let affinities = contents.lock().affinities();
            assert!(
                affinities
                    .keys()
                    .all(|(_, block)| !cidr(range).contains(block)),
                "{affinities:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_block_of_a_node_that_cannot_be_read_holds_up_its_own_pods_alone() {
    let contents = Memory::default();
    put_block(&contents, "10.0.0.0/30", "n1", "inside");
    put_block(&contents, "10.0.0.4/30", "n1", "beside");
    put_block(&contents, "10.0.0.8/30", "n2", "lent");
    let n1 = mk_node("n1", &contents, vec![pool("10.0.0.0/28", 30)]);
    let n3 = mk_node("n3", &contents, vec![pool("10.0.0.0/28", 30)]);
    notify_all(&[&n1, &n3]);
    damage(&contents, "10.0.0.0/30");
    let again = mk_node("n1", &contents, vec![pool("10.0.0.0/28", 30)]);
    again.map.send_replace(n1.map.borrow().clone());
    for handle in ["unknown", "beside"] {
        again
            .allocator
            .release(handle.to_owned())
            .await
            .unwrap_or_else(|error| panic!("{handle}: {error}"));
    }
    let error = again
        .allocator
        .release("inside".to_owned())
        .await
        .expect_err("it is in the block");
    assert!(
        error.to_string().contains("IPAMBlock 10-0-0-0-30") && error.to_string().contains("repair"),
        "{error}"
    );
    // One block for n3, and what it then borrows is in blocks that can be read.
    for number in 0..10 {
        let given = n3
            .allocator
            .assign(wanted(&format!("h{number}")))
            .await
            .expect("4, 4 and 2 of others");
        assert!(!cidr("10.0.0.0/30").contains(&given[0]), "{given:?}");
    }
}

#[tokio::test]
async fn a_pool_that_takes_nothing_new_gives_nothing_by_any_way() {
    let contents = Memory::default();
    let why = "is not allocatable: it overlaps pool default";
    let closed = NodePool {
        closed: Some(why.to_owned()),
        ..named_pool("late", "10.0.0.0/26", 28)
    };
    let node = mk_node("n1", &contents, vec![closed]);
    let named = AddressRequest {
        ipv4: Demand::Always(vec!["late".to_owned()]),
        ..wanted("named")
    };
    for wanted in [wanted("any"), exact("exact", &["10.0.0.4"]), named] {
        let error = node
            .allocator
            .assign(wanted)
            .await
            .expect_err("the pool is closed");
        assert!(error.to_string().contains(why), "{error}");
    }
    assert!(contents.lock().blocks().is_empty());
}

#[tokio::test]
async fn nothing_is_given_from_where_two_blocks_overlap() {
    let contents = Memory::default();
    put_block(&contents, "10.0.0.0/28", "n1", "old");
    put_block(&contents, "10.0.0.8/29", "n2", "guest");
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/27", 28)]);
    notify_all(&[&node]);
    let mut given = BTreeSet::new();
    for number in 0..20 {
        given.extend(
            node.allocator
                .assign(wanted(&format!("h{number}")))
                .await
                .expect("7 and 16 addresses"),
        );
    }
    assert!(
        given
            .iter()
            .all(|address| !cidr("10.0.0.8/29").contains(address)),
        "{given:?}"
    );
    let error = node
        .allocator
        .assign(exact("named", &["10.0.0.9"]))
        .await
        .expect_err("it is in two blocks");
    assert!(
        error
            .to_string()
            .contains("10.0.0.0/28 and 10.0.0.8/29, which overlap"),
        "{error}"
    );
}

#[tokio::test]
async fn what_has_been_taken_behind_the_cache_is_not_answered_from_it() {
    for is_in_view in [false, true] {
        let contents = Memory::default();
        let node = mk_node("n1", &contents, vec![pool("10.0.0.0/28", 29)]);
        let mut tunnel = AddressRequest {
            usage: Use::Tunnel,
            ..wanted("vxlan-tunnel-addr-n1")
        };
        tunnel.ipv4 = Demand::Always(Vec::new());
        tunnel.ipv6 = Demand::Never;
        let former = node
            .allocator
            .assign(tunnel.clone())
            .await
            .expect("an address");
        notify_all(&[&node]);
        node.allocator
            .assign(wanted("pod"))
            .await
            .expect("an address");
        // The collector takes the node for gone, and another one claims the range.
        node.store.with(|contents| contents.clear_blocks());
        let other = mk_node("n2", &contents, vec![pool("10.0.0.0/29", 29)]);
        let pods = futures::future::join_all(
            (0..8).map(|n| other.allocator.assign(wanted(&format!("other{n}")))),
        )
        .await;
        let others: BTreeSet<IpNet> = pods
            .into_iter()
            .flat_map(|given| given.expect("eight addresses"))
            .collect();
        if is_in_view {
            notify_all(&[&node]);
        }
        let again = match node.allocator.assign(tunnel.clone()).await {
            // By its old map the rest of the pool is taken too.
            Err(NoAddress::Unavailable(_)) if !is_in_view => {
                notify_all(&[&node]);
                node.allocator.assign(tunnel).await.expect("an address")
            }
            given => given.expect("an address"),
        };
        assert_eq!(
            others.contains(&former[0]),
            cidr("10.0.0.0/29").contains(&former[0])
        );
        assert!(!others.contains(&again[0]), "{again:?} is another pod's");
        assert_eq!(
            node.store
                .with(|contents| held(contents, "vxlan-tunnel-addr-n1").1),
            [again[0].addr().to_string()]
        );
    }
}

#[tokio::test]
async fn a_pod_takes_its_own_address_over_from_its_earlier_sandbox() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    let of = |handle: &str, pod: &str, on: &str| {
        let mut wanted = exact(handle, &["10.0.0.7"]);
        let secondary = [
            ("namespace", "x"),
            ("pod", pod),
            ("node", on),
            ("timestamp", handle),
        ];
        wanted.attribute.secondary = Some(
            secondary
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        );
        wanted
    };
    let fixed = node
        .allocator
        .assign(of("net.old", "fixed", "n1"))
        .await
        .expect("free");
    for (handle, pod, on) in [
        ("net.new", "other", "n1"),
        ("net.new", "fixed", "n2"),
        ("other.old", "fixed", "n1"),
    ] {
        let error = node
            .allocator
            .assign(of(handle, pod, on))
            .await
            .expect_err("another pod, node, or network");
        assert!(
            error.to_string().contains("is taken by pod x/fixed"),
            "{error}"
        );
    }
    // The state of the node is lost, and with it what the agent knew.
    let again = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    notify_all(&[&again]);
    assert_eq!(
        again
            .allocator
            .assign(of("net.new", "fixed", "n1"))
            .await
            .expect("its own"),
        fixed
    );
    assert_eq!(
        node.store
            .with(|contents| contents.handles().keys().cloned().collect::<Vec<_>>()),
        ["net.new"]
    );
    again
        .allocator
        .release("net.old".to_owned())
        .await
        .expect("nothing to release");
    assert_eq!(
        node.store.with(|contents| held(contents, "net.new").1),
        ["10.0.0.7"]
    );
    again
        .allocator
        .release("net.new".to_owned())
        .await
        .expect("release");
    assert_eq!(
        node.store.with(|contents| held(contents, "net.new")),
        (vec![], vec![])
    );
}
