//! Addresses that a pod names, of its own node or another, and reserved ones.

use super::*;

/// `n1` has the block of 10.0.0.0/26 and one of fd00::/120; `n2` has neither.
async fn owner_and_guest(contents: &Memory) -> (Node, Node, [String; 2]) {
    let (owner, guest) = (dual("n1", contents), dual("n2", contents));
    owner
        .allocator
        .assign(wanted("owner"))
        .await
        .expect("two addresses");
    let blocks: Vec<IpNet> = owner
        .store
        .with(|contents| contents.blocks().into_keys().collect());
    let last = |block: &IpNet| block.broadcast().to_string();
    (owner, guest, [last(&blocks[0]), last(&blocks[1])])
}

#[tokio::test]
async fn a_pod_gets_the_addresses_that_it_names_out_of_whosever_block() {
    let contents = Memory::default();
    let (owner, guest, [four, six]) = owner_and_guest(&contents).await;
    let both = || exact("h", &[&six, &four]);
    for _ in 0..2 {
        let found = guest.allocator.assign(both()).await.expect("both are free");
        assert_eq!(
            found
                .iter()
                .map(|net| net.addr().to_string())
                .collect::<Vec<_>>(),
            [four.as_str(), six.as_str()]
        );
    }
    // The owner, whose cache is old, neither gives them away nor loses its own.
    let mut others = BTreeSet::new();
    for n in 0..20 {
        others.extend(
            owner
                .allocator
                .assign(wanted(&format!("h{n}")))
                .await
                .expect("there is room"),
        );
    }
    assert_eq!(others.len(), 40);
    assert!(
        others
            .iter()
            .all(|net| ![&four, &six].contains(&&net.addr().to_string())),
        "{others:?}"
    );
    assert_eq!(
        guest.store.with(|contents| held(contents, "h").1),
        [four.as_str(), six.as_str()]
    );
    guest
        .allocator
        .release("h".to_owned())
        .await
        .expect("release");
    assert_eq!(
        guest.store.with(|contents| held(contents, "h")),
        (vec![], vec![])
    );
    owner
        .allocator
        .assign(exact("own", &[&four]))
        .await
        .expect("free again, and of its own block");
    owner
        .allocator
        .release("own".to_owned())
        .await
        .expect("release");
    assert_eq!(
        guest.store.with(|contents| held(contents, "own")),
        (vec![], vec![])
    );
}

#[tokio::test]
async fn what_is_half_in_an_own_block_is_given_back_whole_even_after_a_restart() {
    let contents = Memory::default();
    let (_owner, guest, [four, _]) = owner_and_guest(&contents).await;
    guest
        .allocator
        .assign(wanted("local"))
        .await
        .expect("blocks of its own");
    let six = guest
        .store
        .with(|contents| held(contents, "local").0.last().cloned())
        .expect("a block of IPv6");
    let six = six
        .parse::<IpNet>()
        .expect("a range")
        .broadcast()
        .to_string();
    guest
        .allocator
        .assign(exact("h", &[&four, &six]))
        .await
        .expect("both are free");
    let restarted = dual("n2", &contents);
    notify_blocks(&restarted, "n2");
    restarted
        .allocator
        .assign(wanted("later"))
        .await
        .expect("its blocks are read");
    restarted
        .allocator
        .release("h".to_owned())
        .await
        .expect("release");
    assert_eq!(
        restarted.store.with(|contents| held(contents, "h")),
        (vec![], vec![])
    );
}

#[tokio::test]
async fn an_address_that_cannot_be_assigned_has_a_reason_and_nothing_is_kept() {
    let contents = Memory::default();
    let (owner, guest, [four, six]) = owner_and_guest(&contents).await;
    owner
        .allocator
        .assign(exact("first", &[&six]))
        .await
        .expect("free");
    let refused = async |addresses: &[&str], why: &str| {
        let error = guest
            .allocator
            .assign(exact("h", addresses))
            .await
            .expect_err(why);
        assert!(
            matches!(&error, NoAddress::Refused(text) if text.contains(why)),
            "{error:?}"
        );
        guest
            .allocator
            .release("h".to_owned())
            .await
            .expect("what the service does after a failure");
        assert_eq!(
            guest.store.with(|contents| held(contents, "h")),
            (vec![], vec![]),
            "{why}"
        );
    };
    refused(&[&four, &six], "is taken by pod x/first").await;
    refused(&["192.0.2.1"], "192.0.2.1 is in no IPPool").await;
    guest.limit(|limits| limits.strict_affinity = true);
    refused(
        &[&four],
        "of host:n1, and IPAMConfiguration default has strictAffinity",
    )
    .await;
    let own = guest
        .allocator
        .assign(wanted("local"))
        .await
        .expect("a block of its own")[0]
        .network();
    let block = guest.store.with(|contents| {
        contents
            .blocks()
            .into_keys()
            .find(|cidr| cidr.contains(&own))
            .expect("the block of an address")
    });
    guest
        .allocator
        .assign(exact("h", &[&block.broadcast().to_string()]))
        .await
        .expect("of its own block");
}

#[tokio::test]
async fn reserved_addresses_are_for_those_only_who_name_them() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/29", 30)]);
    let reserved = ["10.0.0.1", "10.0.0.2", "10.0.0.4/30"];
    let spec = IPReservationSpec {
        reserved_cidrs: reserved.map(str::to_owned).to_vec(),
    };
    let (wanted_limits, _) = Limits::new(None, &BTreeMap::from([("r".to_owned(), spec)]), None);
    node.limits.send_replace(Some(Arc::new(wanted_limits)));
    let mut given = BTreeSet::new();
    for n in 0..2 {
        given.extend(
            node.allocator
                .assign(wanted(&format!("h{n}")))
                .await
                .expect("two are left"),
        );
    }
    let given: Vec<String> = given.iter().map(|net| net.addr().to_string()).collect();
    assert_eq!(given, ["10.0.0.0", "10.0.0.3"]);
    let full = node
        .allocator
        .assign(wanted("late"))
        .await
        .expect_err("the rest is reserved");
    assert!(
        matches!(&full, NoAddress::Exhausted(text) if text.contains("no address is free")),
        "{full:?}"
    );
    assert_eq!(
        contents.lock().blocks().len(),
        1,
        "a block that is reserved whole was claimed"
    );
    let named = node
        .allocator
        .assign(exact("named", &["10.0.0.2"]))
        .await
        .expect("who names it gets it");
    assert_eq!(named[0].addr().to_string(), "10.0.0.2");
    node.limits.send_replace(Some(Arc::default()));
    node.allocator
        .assign(wanted("late"))
        .await
        .expect("reserved no more");
}
