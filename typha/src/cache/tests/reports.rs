//! Nodes' reports of their pods, which are ahead of the API.

use super::*;

#[test]
fn reports_of_a_disconnected_node_expire() {
    let mut cache = Cache::new([POD]);
    cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
    cache.apply(POD, observed("b", "u2", mk_endpoint("b", &[])));
    assert_eq!(
        cache.apply_local("n1", report("a", "u1", &[])),
        Ok(vec![mk_endpoint("a", &[])]),
        "its sandbox is created again"
    );
    assert_eq!(
        cache.apply_local("n1", report("b", "u2", &["10.0.0.2"])),
        Ok(vec![mk_endpoint("b", &["10.0.0.2"])])
    );
    // Further reports go to another replica.
    assert_eq!(
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.3"]))),
        [],
        "the report applies"
    );
    let updates = cache.expire_reports("n1");
    assert_eq!(
        updates,
        [mk_endpoint("a", &["10.0.0.3"]), mk_endpoint("b", &[])],
        "until it expires"
    );
    assert_eq!(cache.expire_reports("n1"), []);
    assert_eq!(
        cache
            .apply(POD, observed("b", "u2", mk_endpoint("b", &["10.0.0.2"])))
            .len(),
        1
    );
}

#[test]
fn a_node_is_ahead_of_the_api_for_its_own_pods() {
    let mut cache = Cache::new([POD]);
    cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[])));
    let updates = cache.apply_local("n1", report("a", "u1", &["10.0.0.1"]));
    assert_eq!(updates, Ok(vec![mk_endpoint("a", &["10.0.0.1"])]));
    let updates = cache.apply_local("n2", report("a", "u1", &["10.0.0.2"]));
    assert_eq!(updates, Ok(vec![]), "it is not the pod of n2");
    // The API shows another change of the pod, but not yet its address: the report stays.
    assert_eq!(
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[]))),
        []
    );
    // Now the API shows it, and the API applies from here on.
    assert_eq!(
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"]))),
        []
    );
    let updates = cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.3"])));
    assert_eq!(updates, [mk_endpoint("a", &["10.0.0.3"])]);
}

#[test]
fn a_report_applies_to_one_pod_and_not_to_its_successor() {
    let mut cache = Cache::new([POD]);
    // Reported before the API shows the pod.
    assert_eq!(
        cache.apply_local("n1", report("a", "u2", &["10.0.0.2"])),
        Ok(vec![])
    );
    let updates = cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
    assert_eq!(
        updates,
        [mk_endpoint("a", &["10.0.0.1"])],
        "this is its predecessor"
    );
    cache.delete(POD, &key("a"));
    let updates = cache.apply(POD, observed("a", "u2", mk_endpoint("a", &[])));
    assert_eq!(updates, [mk_endpoint("a", &["10.0.0.2"])]);
    // No address any more, while the API still shows one.
    cache.apply(POD, observed("a", "u2", mk_endpoint("a", &["10.0.0.2"])));
    let updates = cache.apply_local("n1", report("a", "u2", &[]));
    assert_eq!(updates, Ok(vec![mk_endpoint("a", &[])]));
    cache.delete(POD, &key("a"));
    let updates = cache.apply(POD, observed("a", "u2", mk_endpoint("a", &["10.0.0.2"])));
    assert_eq!(
        updates,
        [mk_endpoint("a", &["10.0.0.2"])],
        "removed with the pod"
    );
}

#[test]
fn a_node_cannot_take_the_address_of_another() {
    let mut cache = Cache::new([POD, BLOCK]);
    let mut block = |borrowed: &[&str]| {
        let lend = |address: &&str| (address.parse().expect("an address"), "n1".to_owned());
        let borrowed = borrowed.iter().map(lend).collect();
        let info = BlockInfo {
            node: Some("n2".to_owned()),
            borrowed,
            ..BlockInfo::default()
        };
        let range = "10.0.0.0/26".parse().expect("a range");
        let pool = Pool {
            cidr: "10.0.0.0/16".parse().expect("a range"),
            encapsulation: Encapsulation::None,
            nat_outgoing: false,
            block_size: 26,
            is_exported: true,
            created: 0,
        };
        cache.apply(
            "IPPool",
            observed("pool", "u", Update::Pool("pool".to_owned(), Some(pool))),
        );
        cache.apply(
            BLOCK,
            observed("block", "u", Update::Block(range, Some(info))),
        );
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &[])));
        cache.apply_local("n1", report("a", "u1", &["10.0.0.1"]))
    };
    let refused = block(&[]).expect_err("the block is of n2").to_string();
    assert!(
        refused.contains("10.0.0.1 in a block of node \"n2\""),
        "{refused}"
    );
    assert_eq!(
        block(&["10.0.0.1"]),
        Ok(vec![mk_endpoint("a", &["10.0.0.1"])])
    );
    let elsewhere = cache.apply_local("n1", report("a", "u1", &["10.0.0.64"]));
    assert_eq!(elsewhere, Ok(vec![mk_endpoint("a", &["10.0.0.64"])]));
}

#[test]
fn a_node_cannot_fill_the_memory() {
    let mut cache = Cache::new([POD]);
    let mut refused = 0;
    for pod in 0..5000 {
        let addresses = report(&format!("p{pod}"), "u", &["10.0.0.1"]);
        refused += usize::from(cache.apply_local("n1", addresses).is_err());
    }
    assert_eq!(refused, 5000 - 1024);
    assert!(
        cache
            .apply_local("n2", report("a", "u", &["10.0.0.1"]))
            .is_ok()
    );
    cache.start_list(POD);
    for pod in 0..1000 {
        cache.apply(
            POD,
            observed(
                &format!("p{pod}"),
                "u",
                mk_endpoint(&format!("p{pod}"), &[]),
            ),
        );
    }
    cache.sweep(POD);
    let mut refused = 0;
    for pod in 0..500 {
        refused += usize::from(
            cache
                .apply_local("n1", report(&format!("q{pod}"), "u", &["10.0.0.1"]))
                .is_err(),
        );
        refused += usize::from(
            cache
                .apply_local("n3", report(&format!("q{pod}"), "u", &["10.0.0.1"]))
                .is_err(),
        );
    }
    assert_eq!(
        refused,
        500 + 500 - MAX_UNKNOWN,
        "one has reached its limit, the other part of it"
    );
    assert!(
        cache
            .apply_local("n3", report("p7", "u", &["10.0.0.7"]))
            .is_ok(),
        "the API knows it"
    );
}

#[test]
fn reports_without_address_about_unknown_pods_are_not_kept() {
    let mut cache = Cache::new([POD]);
    let report_end = |cache: &mut Cache, node: &str, name: &str, uid: &str| {
        cache
            .apply_local(node, report(name, uid, &[]))
            .expect("accepted");
    };
    // Before the first list every pod counts as known.
    cache.start_list(POD);
    report_end(&mut cache, "n1", "listed", "u1");
    report_end(&mut cache, "n1", "unlisted", "u1");
    assert_eq!(cache.overlays.reports("n1"), 2);
    let updates = cache.apply(
        POD,
        observed("listed", "u1", mk_endpoint("listed", &["10.0.0.1"])),
    );
    assert_eq!(updates, [mk_endpoint("listed", &[])]);
    cache.sweep(POD);
    assert_eq!(cache.overlays.reports("n1"), 1, "of the pod that is there");
    cache.delete(POD, &key("listed"));
    // Deleted in the API first, then on its node; or replaced by another of the same name, on the
    // same node or elsewhere.
    cache.apply(
        POD,
        observed("other", "u2", mk_endpoint("other", &["10.0.0.3"])),
    );
    for pod in 0..5000 {
        report_end(&mut cache, "n1", &format!("p{pod}"), "u1");
    }
    report_end(&mut cache, "n1", "other", "u1");
    let ended = Observed {
        update: None,
        ..observed("ended", "u1", mk_endpoint("ended", &[]))
    };
    cache.apply(POD, ended);
    report_end(&mut cache, "n1", "ended", "u1");
    report_end(&mut cache, "n2", "other", "u1");
    // Reported and revoked before the API shows it; a report about its predecessor does not revoke
    // it.
    assert_eq!(
        cache.apply_local("n1", report("a", "u2", &["10.0.0.2"])),
        Ok(vec![])
    );
    report_end(&mut cache, "n1", "a", "u1");
    assert_eq!(cache.overlays.reports("n1"), 1);
    report_end(&mut cache, "n1", "a", "u2");
    assert_eq!(
        (cache.overlays.reports("n1"), cache.overlays.reports("n2")),
        (0, 0)
    );
}

#[test]
fn reports_of_a_deleted_node_are_kept_for_existing_pods_only() {
    let node = |name: &str| {
        let update = Update::Node(
            name.to_owned(),
            Some(margay_api::network::NodeInfo::default()),
        );
        Observed {
            key: ObjectKey::new("", name),
            ..observed(name, "u", update)
        }
    };
    for is_swept in [false, true] {
        let mut cache = Cache::new([POD, "Node"]);
        for name in ["n1", "n2"] {
            cache.apply("Node", node(name));
        }
        cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"])));
        cache
            .apply_local("n1", report("a", "u1", &["10.0.0.2"]))
            .expect("accepted");
        cache
            .apply_local("n1", report("unknown", "u1", &["10.0.0.3"]))
            .expect("accepted");
        cache
            .apply_local("n2", report("unknown", "u1", &["10.0.0.4"]))
            .expect("accepted");
        if is_swept {
            cache.start_list("Node");
            cache.apply("Node", node("n2"));
            cache.sweep("Node");
        } else {
            cache.delete("Node", &ObjectKey::new("", "n1"));
        }
        assert_eq!(
            (cache.overlays.reports("n1"), cache.overlays.reports("n2")),
            (1, 1)
        );
        assert_eq!(
            cache.apply(POD, observed("a", "u1", mk_endpoint("a", &["10.0.0.1"]))),
            []
        );
        cache.delete(POD, &key("a"));
        assert_eq!(cache.overlays.reports("n1"), 0);
    }
}
